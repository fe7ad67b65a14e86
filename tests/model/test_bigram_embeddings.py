"""Embeddings of a token and the one before it beside the experts, under caches, padding and packed rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from helpers.backbones import backed_model, dense_model
from helpers.models import random_ids, tiny_config, tiny_model, tiny_seq2seq_model
from modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.model.bigram_stablemoe import MULTIPLIERS
from modeling_stablemoe.model.context_stablemoe import previous_ids, whole_sequences


PAD = 2
OF_PAIRS = {"num_bigram_embeddings": 23, "moe_layer_positions": [0, 2], "pad_token_id": PAD}
BUILDERS = {
    "hash": lambda: tiny_model(router_type="hash", **OF_PAIRS),
    "stage 1": lambda: tiny_model(**OF_PAIRS),
    "llama": lambda: backed_model("llama", num_bigram_embeddings=23),
    "llama/ffn": lambda: backed_model("llama/ffn", num_bigram_embeddings=23),
}
every_model = pytest.mark.parametrize("name", BUILDERS)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@given(
    rows=st.lists(st.lists(st.integers(0, 8), min_size=6, max_size=6), min_size=1, max_size=3),
    real=st.lists(st.booleans(), min_size=6, max_size=6),
    begins=st.lists(st.booleans(), min_size=6, max_size=6),
    first=st.integers(0, 5),
)
@settings(deadline=None)
def test_the_previous_token_is_the_last_real_one_of_the_same_sequence(rows, real, begins, first):
    ids, mask = torch.tensor(rows), torch.tensor([real] * len(rows))
    sequences = torch.tensor([begins] * len(rows)).cumsum(-1)
    tokens = (ids[:, first:], mask[:, first:], ids, mask, torch.arange(first, 6), sequences)
    found = previous_ids(tokens)
    for row, ids_of_row in enumerate(rows):
        for t in range(first, 6):
            if real[t]:
                before = [s for s in range(t) if real[s]]
                is_known = before and sequences[row, before[-1]] == sequences[row, t]
                assert found[row, t - first] == (ids_of_row[before[-1]] if is_known else -1)
    assert torch.equal(previous_ids(whole_sequences(ids))[:, 1:], ids[:, :-1])
    assert (previous_ids((ids,)) == -1).all()


def test_a_pair_adds_its_row_times_a_matrix_and_a_gate():
    with_pairs, without = (
        tiny_model(router_type="hash", **OF_PAIRS),
        tiny_model(router_type="hash", **OF_PAIRS | {"num_bigram_embeddings": 0}),
    )
    layer, plain = with_pairs.model.moe_layers[0], without.model.moe_layers[0]
    plain.load_state_dict({name: values for name, values in layer.state_dict().items() if "bigram" not in name})
    hidden, ids = torch.randn(2, 5, 32), random_ids(2, 5)
    added = (layer(hidden, whole_sequences(ids)) - plain(hidden, ids)).detach().numpy()
    weights = {name: p.detach().double().numpy() for name, p in layer.bigram_embedding.named_parameters()}
    for row in range(2):
        for t in range(5):
            previous = -1 if t == 0 else int(ids[row, t - 1])
            mixed = (previous + 1) * MULTIPLIERS[0] + int(ids[row, t]) * MULTIPLIERS[1]
            e = weights["embedding.weight"][(mixed ^ (mixed >> 15)) % 23]
            h = hidden[row, t].double().numpy()
            expected = weights["proj.weight"] @ e / (1 + np.exp(-weights["gate"] @ h))
            np.testing.assert_allclose(added[row, t], expected, atol=1e-5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5]).bool()
    assert torch.equal(layer(hidden, whole_sequences(ids, mask))[0, 3:], hidden[0, 3:])


def test_pairs_spread_evenly_over_the_rows():
    layer = tiny_model(**OF_PAIRS | {"num_bigram_embeddings": 64, "vocab_size": 400}).model.moe_layers[0]
    pairs = torch.cartesian_prod(torch.arange(400), torch.arange(400))
    rows = layer.bigram_embedding.rows(whole_sequences(pairs))[:, 1]
    counts = rows.bincount(minlength=64).double()
    assert 0.9 < counts.min() / counts.mean() <= counts.max() / counts.mean() < 1.1


@every_model
@torch.no_grad()
def test_caches_padding_and_packed_rows_change_no_logit(name):
    model = BUILDERS[name]()
    model.set_attn_implementation("eager")
    rows = [random_ids(1, length, seed=length, low=3, high=60)[0] for length in (5, 9)]
    apart = [model(row[None]).logits[0] for row in rows]
    swapped = rows[0][[1, 0, 2, 3, 4]]
    assert not torch.allclose(model(swapped[None]).logits[0, 4], apart[0][4], atol=1e-3)
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    ids = torch.full_like(mask, PAD).masked_scatter(mask.bool(), torch.cat(rows))
    caches = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)
    whole = model(ids, attention_mask=mask).logits
    for cache in caches:
        ends, pieces = [6, 7, 9], []
        for begin, end in zip([0, *ends], ends, strict=False):
            pieces.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], **CLOSE)
    assert_close(whole[mask.bool()], torch.cat(apart), **CLOSE)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = model(torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0]
    assert_close(packed, torch.cat(apart), **CLOSE)


@pytest.mark.parametrize("build", [BUILDERS["hash"], BUILDERS["llama"]], ids=["paper", "llama"])
def test_generation_with_a_cache_and_beams_is_that_without(build):
    model, ids = build(), random_ids(2, 4, low=3, high=60)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "no_repeat_ngram_size": 1,
        "attention_mask": torch.ones_like(ids),
    }
    for more in ({}, {"num_beams": 3}):
        expected = model.generate(ids, use_cache=False, **options, **more)
        assert torch.equal(model.generate(ids, **options, **more), expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_every_tensor_of_it_learns_on_both_sides_of_a_translation_model(stage):
    model = tiny_seq2seq_model(num_bigram_embeddings=23).train()
    if stage == 2:
        model.freeze_router()
    ids = random_ids(2, 6, low=3)
    model(ids, labels=ids).loss.backward()
    learned = [
        name for name, p in model.named_parameters() if "bigram" in name and p.grad is not None and p.grad.any()
    ]
    assert len(learned) == 9


def test_a_new_one_changes_nothing_and_a_converted_model_begins_as_the_dense_one(tmp_path):
    dense = dense_model("llama")
    model = StableMoEForCausalLM.from_dense(dense, num_experts=4, num_bigram_embeddings=11)
    ids = random_ids(2, 6, low=3, high=60)
    assert torch.equal(model(ids).logits, dense(ids).logits)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    assert torch.equal(StableMoEForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_bad_numbers_of_rows_are_refused():
    for bad in (-1, 2.5, None):
        with pytest.raises(ValueError, match="`num_bigram_embeddings` must be an integer >= 0"):
            tiny_config(num_bigram_embeddings=bad)
