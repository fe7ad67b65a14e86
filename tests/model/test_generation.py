"""Tests of generation: caches, padding, sampling, beams, embeddings as input, pipelines."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, StaticCache, pipeline, set_seed

from helpers.models import random_ids, tiny_model, tiny_seq2seq_model


pytestmark = pytest.mark.pairs


# `eos_token_id=None`: every sequence runs to its full length, so that no comparison is of empty continuations.
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
PAD = 1


@pytest.fixture(params=[1, 2], ids=["stage 1", "stage 2"])
def model(request):
    model = tiny_model(moe_layer_positions=[0, 2])
    if request.param == 2:
        model.freeze_router()
    assert model.routing_stage == request.param
    return model.eval()


def continuation(model, ids, **kwargs) -> torch.Tensor:
    """Returns the new tokens only."""
    kwargs = {**GREEDY, "attention_mask": torch.ones_like(ids), **kwargs}
    return model.generate(ids, **kwargs)[:, ids.shape[1] :]


def by_hand(model, ids, steps: int = 12) -> torch.Tensor:
    """Greedy decoding with nothing of `generate` and no cache: the reference."""
    for _ in range(steps):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, -steps:]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_decoding_gives_the_most_likely_tokens_with_and_without_cache(model, use_cache):
    ids = random_ids(3, 5)
    expected = by_hand(model, ids)
    assert len(expected.unique()) > 3  # a model that repeats one token would prove little
    assert torch.equal(continuation(model, ids, use_cache=use_cache), expected)


def test_static_cache_gives_the_same_tokens(model):
    ids = random_ids(3, 5)
    generated = continuation(model, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(generated, by_hand(model, ids))


@pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
def test_a_decoding_step_over_a_static_cache_compiles_once_to_one_graph(model, backend):
    # What a CUDA graph of it needs, too.
    model.set_experts_implementation(backend)
    ids = random_ids(3, 9)
    cache = StaticCache(config=model.config, max_cache_len=12)
    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        model(ids[:, :5], past_key_values=cache, use_cache=True)
        logits = [step(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(5, 9)]
    assert_close(torch.cat(logits, 1), model(ids).logits[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [1, 4])
def test_left_padding_changes_no_token(model, padding):
    ids = random_ids(3, 5)
    padded = torch.cat([torch.full((3, padding), PAD), ids], 1)
    mask = torch.cat([torch.zeros(3, padding, dtype=torch.long), torch.ones_like(ids)], 1)
    assert torch.equal(continuation(model, padded, attention_mask=mask), by_hand(model, ids))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_batch_of_different_lengths_equals_each_alone(model, use_cache):
    prompts = [random_ids(1, length, seed=length) for length in (2, 5, 9)]
    batch = torch.cat([torch.cat([torch.full((1, 9 - ids.shape[1]), PAD), ids], 1) for ids in prompts])
    mask = batch.ne(PAD).long()
    generated = continuation(model, batch, attention_mask=mask, use_cache=use_cache)
    assert torch.equal(generated, torch.cat([by_hand(model, ids) for ids in prompts]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_the_logits_of_real_tokens(model, side):
    # Without `position_ids`, which `generate` passes itself: the model has to count them over real tokens.
    ids, pads = random_ids(3, 5), torch.full((3, 4), PAD)
    padded = torch.cat([pads, ids] if side == "left" else [ids, pads], 1)
    logits = model(padded, attention_mask=padded.ne(PAD).long()).logits
    assert_close(logits[:, 4:] if side == "left" else logits[:, :5], model(ids).logits, rtol=1e-5, atol=1e-5)


def test_padding_is_counted_in_a_second_pass_over_a_cache(model):
    ids, pads = random_ids(3, 5), torch.full((3, 4), PAD)
    padded = torch.cat([pads, ids], 1)
    mask = padded.ne(PAD).long()
    first = model(padded[:, :7], attention_mask=mask[:, :7], use_cache=True)
    second = model(padded[:, 7:], attention_mask=mask, past_key_values=first.past_key_values)
    assert_close(second.logits, model(ids).logits[:, 3:], rtol=1e-5, atol=1e-5)


def test_sampling_with_a_seed_gives_the_same_tokens_with_and_without_cache(model):
    ids = random_ids(3, 5)
    sampled = []
    for seed, use_cache in [(1, True), (1, False), (2, True)]:
        set_seed(seed)
        sampled.append(continuation(model, ids, do_sample=True, temperature=0.8, top_k=20, use_cache=use_cache))
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    assert not torch.equal(sampled[0], by_hand(model, ids))


def log_likelihood(model, prompt, new) -> torch.Tensor:
    ids = torch.cat([prompt, new], 1)
    scores = model(ids).logits.log_softmax(-1)[:, prompt.shape[1] - 1 : -1]
    return scores.gather(-1, new.unsqueeze(-1)).sum((1, 2))


def test_beam_search_is_the_same_with_and_without_cache_and_no_worse_than_greedy(model):
    ids = random_ids(3, 5)
    beams = [continuation(model, ids, num_beams=4, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*beams)
    with torch.no_grad():
        gain = log_likelihood(model, ids, beams[0]) - log_likelihood(model, ids, by_hand(model, ids))
    assert gain.sum() > 0.01  # not a theorem, but four beams that never find better than one are no search


def test_embeddings_as_input_continue_as_ids_do(model):
    ids = random_ids(3, 5)
    embeds = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds).logits, model(ids).logits, rtol=0, atol=0)
    for use_cache in (True, False):
        generated = model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(ids), use_cache=use_cache, **GREEDY
        )
        assert torch.equal(generated, by_hand(model, ids))


def test_cached_decoding_routes_as_route_says_for_the_whole_sequence(model):
    ids = random_ids(3, 5)
    seen = [[], []]
    for layer, indices in zip(model.model.moe_layers, seen, strict=True):
        layer.router.register_forward_hook(lambda _m, _a, decision, indices=indices: indices.append(decision[1]))
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **GREEDY)
    assert [indices[0].shape[1] for indices in seen] == [5, 5]
    assert all(index.shape[1] == 1 for indices in seen for index in indices[1:])
    # The last token is produced, but never an input.
    routed = torch.stack([torch.cat(indices, 1) for indices in seen])
    assert routed.shape == (2, 3, 16)
    assert torch.equal(routed, model.route(generated[:, :-1]))


@pytest.mark.parametrize("kind", ["word_embedding", "counts", "bigram", "transformer_1"])
@pytest.mark.parametrize("stage", [1, 2])
def test_drafts_of_an_early_exit_change_no_token(kind, stage):
    model = tiny_model(
        moe_layer_positions=[0, 2, 3], num_hidden_layers=3, distilled_router=kind, output_router_logits=True
    )
    if stage == 2:
        model.freeze_router()
    model.eval()
    ids, passes = random_ids(1, 5), []
    expected = by_hand(model, ids)
    for layer in (*model.model.layers, *model.model.moe_layers):
        layer.register_forward_pre_hook(lambda _module, _args, layer=layer: passes.append(layer))
    for blocks in (1, 2):
        passes.clear()
        assert torch.equal(continuation(model, ids, assistant_early_exit=blocks), expected)
        often = {layer: passes.count(layer) for layer in passes}
        full = often[model.model.layers[-1]]
        assert [often[layer] > full for layer in model.model.layers] == [True] * blocks + [False] * (3 - blocks)
        # Before the first block, after the second and after the third.
        assert [often[layer] > full for layer in model.model.moe_layers] == [True, blocks == 2, False]
    assert model.config.num_hidden_layers == 3


def test_an_early_exit_may_come_before_every_moe_layer():
    model = tiny_model(moe_layer_positions=[2], output_router_logits=True).eval()
    ids = random_ids(1, 5)
    assert torch.equal(continuation(model, ids, assistant_early_exit=1), by_hand(model, ids))


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}])
def test_a_generation_that_may_pass_the_last_position_fails_before_its_first_step(kind, options):
    model = tiny_model(position_embedding_type=kind, max_position_embeddings=12).eval()
    ids, passes = random_ids(1, 5), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    # The last token that is generated is not read.
    assert continuation(model, ids, max_new_tokens=8, **options).shape == (1, 8)
    passes.clear()
    message = (
        r"^Generation may go on to position 13, outside 0\.\.11 .* lower `max_new_tokens` or `max_length` by 2, or"
    )
    for longer in ({"max_new_tokens": 10}, {"max_new_tokens": None, "max_length": 15}):
        with pytest.raises(ValueError, match=message):
            continuation(model, ids, **{**options, **longer})
    with pytest.raises(ValueError, match=message):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY | {"max_new_tokens": 10})
    assert not passes


def test_padding_takes_no_position_of_a_generation():
    model = tiny_model(max_position_embeddings=12).eval()
    ids = random_ids(2, 5)
    padded = torch.cat([torch.full((2, 20), PAD), ids], 1)
    mask = torch.cat([torch.zeros(2, 20, dtype=torch.long), torch.ones_like(ids)], 1)
    assert torch.equal(continuation(model, padded, attention_mask=mask, max_new_tokens=8), by_hand(model, ids, 8))
    with pytest.raises(ValueError, match=r"`max_length` by 1, or shorten"):
        continuation(model, padded, attention_mask=mask, max_new_tokens=9)


def test_a_translation_that_may_pass_the_last_position_fails_before_its_first_step():
    model = tiny_seq2seq_model(max_position_embeddings=12).eval()
    source, passes = random_ids(2, 5, high=91), []
    assert model.generate(source, **GREEDY | {"max_new_tokens": 12}).shape == (2, 13)
    prompt = {"decoder_input_ids": random_ids(2, 6, low=3, high=91)}
    prompt["decoder_attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    assert model.generate(source, **prompt, **GREEDY | {"max_new_tokens": 7}).shape == (
        2,
        14,
    )  # it begins with a start
    model.model.decoder.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    for arguments, tokens in (({}, 13), (prompt, 8)):
        with pytest.raises(ValueError, match=r"^Generation may go on to position 12, outside 0\.\.11 .* by 1, or"):
            model.generate(source, **arguments, **GREEDY | {"max_new_tokens": tokens})
    assert not passes


def test_generation_stops_at_the_end_of_sequence_token_and_pads(model):
    ids = random_ids(3, 5)
    free = by_hand(model, ids)
    stop = int(free[0, 4])
    generated = continuation(model, ids, eos_token_id=stop, pad_token_id=PAD)
    for row, expected in zip(generated.tolist(), free.tolist(), strict=True):
        length = expected.index(stop) + 1 if stop in expected else 12
        assert row[:length] == expected[:length]
        assert set(row[length:]) <= {PAD}


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<eos>": 0, "<pad>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 99)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def test_the_text_generation_pipeline_continues_a_batch_of_texts(model, tokenizer):
    texts = ["w3 w50 w7", "w9 w10 w11 w12 w13", "w98"]
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    kwargs = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "return_full_text": False}
    together = [answer[0]["generated_text"].split() for answer in generate(texts, batch_size=3, **kwargs)]
    alone = [answer[0]["generated_text"].split() for answer in generate(texts, batch_size=1, **kwargs)]
    assert together == alone
    assert all(words and all(word.startswith(("w", "<")) for word in words) for words in together)
    ids = tokenizer(texts[1], return_tensors="pt").input_ids
    expected = model.generate(ids, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    assert together[1] == tokenizer.decode(expected[0, 5:], skip_special_tokens=True).split()
