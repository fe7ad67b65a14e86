"""Tests of what a pass reads of attention masks that reach past its tokens, of packed rows and of padding in the middle."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from helpers.models import random_ids, tiny_classifier, tiny_model, tiny_seq2seq_model


pytestmark = pytest.mark.pairs


LENGTH, PAD = 9, 2
PADDING = (4, 0, 1)  # on the left of each row

both_caches = pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
both_stages = pytest.mark.parametrize("stage", [1, 2])
each_way_of_looking_back = pytest.mark.parametrize("router", ["word_embedding", "cnn"])


def settled(model, stage: int):
    if stage == 2:
        model.freeze_router()
    return model.eval()


def language_model(stage: int, **config):
    return settled(tiny_model(moe_layer_positions=[0, 2], pad_token_id=PAD, **config), stage)


def translation_model(stage: int, **config):
    return settled(tiny_seq2seq_model(**config), stage)


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(3, LENGTH, low=3, high=91)
    mask = torch.stack([torch.arange(LENGTH) >= padding for padding in PADDING]).long()
    return ids.where(mask.bool(), PAD), mask


def make_cache(model, kind: str, length: int):
    own = StaticCache(model.config, max_cache_len=length) if kind == "static" else DynamicCache()
    return EncoderDecoderCache(own, DynamicCache()) if model.config.is_encoder_decoder else own


def run(model, ids, mask, **kwargs):
    """A pass of the side that has a cache."""
    if model.config.is_encoder_decoder:
        kwargs |= {
            "input_ids": random_ids(3, LENGTH, high=91),
            "decoder_input_ids": ids,
            "decoder_attention_mask": mask,
        }
    else:
        kwargs |= {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        return model(**kwargs, output_router_logits=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [language_model, translation_model])
@each_way_of_looking_back
@both_caches
@both_stages
def test_a_prompt_read_in_pieces_under_its_whole_mask_equals_one_pass(make, router, cache_kind, stage, attention):
    model = make(stage, distilled_router=router)
    model.set_attn_implementation(attention)
    ids, mask = left_padded()
    expected = run(model, ids, mask)
    for width in (LENGTH, LENGTH + 3):  # that of the prompt, that of a static cache
        wide = torch.cat([mask, mask.new_ones(3, width - LENGTH)], 1)
        cache = make_cache(model, cache_kind, LENGTH + 3)
        pieces = [run(model, piece, wide, cache=cache, use_cache=True) for piece in ids.split([3, 1, 5], dim=1)]
        real = mask.bool()
        logits = torch.cat([piece.logits for piece in pieces], 1)
        assert_close(logits[real], expected.logits[real], rtol=1e-4, atol=1e-5)
        side = "decoder_expert_indices" if model.config.is_encoder_decoder else "expert_indices"
        experts = [torch.stack(each[side]) for each in (*pieces, expected)]
        assert torch.equal(torch.cat(experts[:-1], -1)[:, real], experts[-1][:, real])


@both_caches
def test_what_a_later_piece_counts_are_its_own_real_tokens(cache_kind):
    model = language_model(1)
    ids, mask = left_padded()
    cache = make_cache(model, cache_kind, LENGTH)
    for start, end in ((0, 3), (3, LENGTH)):
        load = run(model, ids[:, start:end], mask, cache=cache, use_cache=True).expert_load
        assert load.sum(-1).tolist() == [mask[:, start:end].sum()] * 2


@both_caches
def test_a_classifier_without_a_padding_token_reads_the_last_real_token_of_the_piece(cache_kind):
    model = tiny_classifier(pad_token_id=None).eval()
    ids = random_ids(3, LENGTH)
    mask = torch.stack([torch.arange(LENGTH) < length for length in (9, 7, 6)]).long()
    wide = torch.cat([mask, mask.new_zeros(3, 2)], 1)
    cache = make_cache(model, cache_kind, LENGTH + 2)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model(ids[:, :5], attention_mask=wide, cache=cache, use_cache=True)
        actual = model(ids[:, 5:], attention_mask=wide, cache=cache, use_cache=True).logits
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@both_caches
@each_way_of_looking_back
@pytest.mark.parametrize("make", [language_model, translation_model])
def test_a_mask_that_ends_before_the_input_does_is_refused(make, router, cache_kind):
    model = make(2, distilled_router=router)
    ids, mask = left_padded()
    cache = make_cache(model, cache_kind, LENGTH)
    run(model, ids[:, :5], mask, cache=cache, use_cache=True)
    with pytest.raises(
        ValueError, match=r"^`attention_mask` covers 4 tokens, cache and input together have 9: pass it"
    ):
        run(model, ids[:, 5:], mask[:, 5:], cache=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"covers 8 tokens, cache and input together have 9"):
        run(model, ids, mask[:, :-1], use_cache=False)
