"""Tests of the distilled routers that look back at earlier tokens: definitions, caches, frozen weights, training."""

import functools
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.trainer_utils import get_last_checkpoint

from helpers.checkpoints import edit_weights
from helpers.matrices import one_fast
from helpers.models import padded, random_ids, switch_checkpointing, tiny_config, tiny_model, tiny_seq2seq_model
from helpers.trainers import make_trainer, weights
from modeling_stablemoe import StableMoEForCausalLM, StageTransitionCallback
from modeling_stablemoe.model.configuration_stablemoe import DISTILLED_ROUTERS, TABLE_ROUTERS
from modeling_stablemoe.model.context_stablemoe import whole_sequences
from modeling_stablemoe.model.distillation_stablemoe import ContextRouter, sees_context


pytestmark = pytest.mark.pairs


KINDS = [kind for kind in DISTILLED_ROUTERS if kind not in TABLE_ROUTERS]
PAD, START = 2, 1
ROWS = [random_ids(1, length, seed=length, low=3, high=91)[0] for length in (2, 5, 9)]
FAMILIES = {
    "language model": functools.partial(tiny_model, moe_layer_positions=[0, 2], pad_token_id=PAD),
    "seq2seq": tiny_seq2seq_model,
}

# One of each class; layers of a Transformer are in the definition.
every_class = pytest.mark.parametrize("kind", ["bigram", "cnn", "transformer_2"])
every_family = pytest.mark.parametrize("family", FAMILIES)
both_stages = pytest.mark.parametrize("stage", [1, 2])


def build(kind: str, stage: int = 1, family: str = "language model", **overrides):
    model = FAMILIES[family](distilled_router=kind, **overrides)
    if stage == 2:
        model.freeze_router()
    assert model.routing_stage == stage
    return model.eval()


def layers_of(model) -> list:
    return list(model.moe_layers_by_name.values())


def distilled_of(model) -> list[ContextRouter]:
    return [layer.router.distilled_router for layer in layers_of(model)]


def batch_of(rows: list[torch.Tensor], side: str, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of a padded batch, `extra` columns wider than it must be."""
    fill = torch.zeros(max(map(len, rows)) + extra, dtype=torch.long)
    ids = padded([*rows, fill], PAD, side)[:-1]
    mask = padded([*map(torch.ones_like, rows), fill], 0, side)[:-1]
    return ids, mask


def run(model, ids, mask=None, **kwargs):
    """Routes a batch on every side of a model, in a forward pass."""
    if model.config.is_encoder_decoder:
        kwargs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return model(ids, attention_mask=mask, output_router_logits=True, **kwargs)


def experts(model, ids, mask=None, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(run(model, ids, mask, **kwargs).expert_indices)


def alone(model, rows=ROWS) -> list[torch.Tensor]:
    """The experts of each row by `route`, without any padding: `(moe layers, length)` each."""
    return [model.route(row.unsqueeze(0))[:, 0] for row in rows]


def taken_out(routed: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    return [of_row[:, real.bool()] for of_row, real in zip(routed.unbind(1), mask, strict=True)]


def assert_all_equal(actual, expected):
    assert len(actual) == len(expected)
    assert all(map(torch.equal, actual, expected))


# Definitions, against NumPy in float64, position by position


def bigram_features(w, x):
    return [x[0]] + [(x[t] + x[t - 1]) / 2 for t in range(1, len(x))]


def cnn_features(w, x):
    R = x.shape[1]
    matrices = [w["conv_weight"][:, k * R : (k + 1) * R] for k in range(5)]  # the last is that of the token itself
    return [w["conv_bias"] + sum(matrices[4 - j] @ x[t - j] for j in range(5) if t >= j) for t in range(len(x))]


def normed(x, weight, bias):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight + bias


def transformer_features(w, x):
    C, R = x.shape
    heads = 5 if R % 5 == 0 else 2 if R % 2 == 0 else 1
    half = (R + 1) // 2
    angle = [[t / 10000 ** (2 * i / R) for i in range(half)] for t in range(C)]
    h = [x[t] + np.concatenate([np.sin(angle[t]), np.cos(angle[t])])[:R] for t in range(C)]
    for i in range(len(w["qkv_weight"])):
        qkv = [w["qkv_weight"][i] @ normed(v, w["attn_norm_weight"][i], w["attn_norm_bias"][i]) for v in h]
        q, k, v = zip(*[np.split(vector + w["qkv_bias"][i], 3) for vector in qkv], strict=True)
        for t in range(C):
            parts = []
            for part in np.split(np.arange(R), heads):
                score = np.array([q[t][part] @ k[s][part] for s in range(t + 1)]) / np.sqrt(R / heads)
                p = np.exp(score - score.max())
                parts.append(sum(p[s] / p.sum() * v[s][part] for s in range(t + 1)))
            h[t] = h[t] + w["out_weight"][i] @ np.concatenate(parts) + w["out_bias"][i]
        for t in range(C):
            inner = w["up_weight"][i] @ normed(h[t], w["mlp_norm_weight"][i], w["mlp_norm_bias"][i]) + w["up_bias"][i]
            h[t] = h[t] + w["down_weight"][i] @ np.maximum(inner, 0) + w["down_bias"][i]
    return [normed(v, w["norm_weight"], w["norm_bias"]) for v in h]


def reference_scores(kind: str, router: ContextRouter, row) -> np.ndarray:
    """The scores of one row of real tokens, `(tokens, experts)`."""
    w = {name: p.detach().numpy().astype(np.float64) for name, p in router.named_parameters()}
    features = {"bigram": bigram_features, "cnn": cnn_features}.get(kind, transformer_features)
    return np.stack(features(w, w["embedding"][np.asarray(row)])) @ w["centroids"].T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [7, 8, 10])  # one head, two, five
def test_each_kind_is_what_its_definition_says(kind, width):
    model = build(kind, distilled_router_dim=width)
    for layer, router in enumerate(distilled_of(model)):
        if kind.startswith("transformer"):
            assert len(router.qkv_weight) == int(kind[-1])
        for row in ROWS:
            expected = reference_scores(kind, router, row)
            tokens = whole_sequences(row.unsqueeze(0))
            actual = router(tokens, exact=True)
            assert actual.dtype == torch.float64
            np.testing.assert_allclose(actual[0].detach().numpy(), expected, rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(router(tokens)[0].detach().numpy(), expected, rtol=1e-4, atol=1e-4)
            assert model.route(row.unsqueeze(0))[layer, 0].tolist() == expected.argmax(-1).tolist()


def test_the_word_embedding_sees_no_context_and_costs_none():
    assert [sees_context(tiny_config(distilled_router=kind)) for kind in DISTILLED_ROUTERS] == [False] * 2 + [True] * 5
    model = build("word_embedding")
    seen = []
    layers_of(model)[0].register_forward_pre_hook(lambda _, args: seen.append(args[1][2]))
    outputs = model(random_ids(), use_cache=True)
    assert seen == [None]
    assert len(outputs.past_key_values.layers) == 2


# How it starts


@every_class
def test_weights_start_orthogonal_normal_one_or_zero(kind):
    torch.manual_seed(0)
    model = StableMoEForCausalLM(tiny_config(distilled_router=kind, vocab_size=2000, distilled_router_dim=50))
    router = distilled_of(model)[0]
    assert_close(router.centroids @ router.centroids.T, 0.01 * torch.eye(5), rtol=1e-5, atol=1e-7)
    assert_close(router.embedding.std(), torch.tensor(1.0), rtol=0.02, atol=0)
    for name, parameter in router.named_parameters():
        if name.endswith("norm_weight"):
            assert (parameter == 1).all()
        elif name.endswith("_bias"):
            assert not parameter.any()
        elif name.endswith("_weight"):
            assert_close(parameter.std(), torch.tensor(parameter.shape[-1] ** -0.5), rtol=0.1, atol=0)


# Padding and batches


@every_class
def test_a_row_of_padding_only_stays_finite(kind):
    router = distilled_of(build(kind))[0]
    ids = random_ids(2, 6)
    mask = torch.tensor([[False] * 6, [True] * 6])
    scores = router(whole_sequences(ids, mask))
    assert torch.isfinite(scores).all()
    scores[1].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in router.parameters())


# Caches


def cache_for(model, kind: str, length: int):
    if kind == "static":
        caches = [StaticCache(config=model.config, max_cache_len=length) for _ in range(2)]
    else:
        caches = [DynamicCache(config=model.config if kind == "of config" else None) for _ in range(2)]
    return EncoderDecoderCache(*caches) if model.config.is_encoder_decoder else caches[0]


def in_pieces(model, ids, mask, cache, sizes) -> torch.Tensor:
    """The experts of a cached pass in pieces, of the layers that use the cache."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    routed = []
    for end, size in zip(ends, sizes, strict=True):
        piece, seen = ids[:, end - size : end], None if mask is None else mask[:, :end]
        if model.config.is_encoder_decoder:
            arguments = {"decoder_input_ids": piece, "decoder_attention_mask": seen, "input_ids": ids}
        else:
            arguments = {"input_ids": piece, "attention_mask": seen}
        outputs = model(**arguments, past_key_values=cache, use_cache=True, output_router_logits=True)
        routed.append(torch.stack(outputs.expert_indices[-2:]))
    return torch.cat(routed, dim=-1)


@every_family
@every_class
@both_stages
@torch.no_grad()
def test_a_cache_routes_as_the_whole_sequence_however_it_is_cut(kind, family, stage):
    model = build(kind, stage, family)
    ids, mask = batch_of([random_ids(1, length, seed=length)[0] % 91 for length in (3, 7, 9)], "left", 1)
    expected, expected_unpadded = model.route(ids, mask)[-2:], model.route(ids)[-2:]
    for cache_kind, sizes in (("dynamic", [1] * 10), ("of config", [4, 1, 5]), ("static", [4, 1, 5])):
        routed = in_pieces(model, ids, mask, cache_for(model, cache_kind, length=14), sizes)
        assert_all_equal(taken_out(routed, mask), taken_out(expected, mask))
        assert torch.equal(in_pieces(model, ids, None, cache_for(model, cache_kind, 14), [6, 4]), expected_unpadded)


@pytest.mark.parametrize("kind", ["cnn", "transformer_1"])
@both_stages
@torch.no_grad()
def test_rounding_decides_nothing(kind, stage):
    model = build(kind, distilled_router_dim=50)
    for router in distilled_of(model):  # experts so alike that float32 sums in another order choose others
        router.centroids.copy_(router.centroids[:1] + 1e-7 * torch.randn_like(router.centroids))
    if stage == 2:
        model.freeze_router()
    rows = list(random_ids(6, 12, low=3))
    ids, mask = batch_of(rows, "left", 3)
    expected = alone(model, rows)
    assert_all_equal(taken_out(in_pieces(model, ids, mask, DynamicCache(), [1] * 15), mask), expected)
    assert_all_equal(taken_out(in_pieces(model, ids, mask, cache_for(model, "static", 40), [5, 10]), mask), expected)
    assert_all_equal(taken_out(experts(model, ids, mask), mask), expected)


@torch.no_grad()
def test_ids_live_in_the_cache_as_one_more_layer_and_move_with_it():
    model, ids = build("cnn"), random_ids(3, 6)
    cache = model(ids, use_cache=True).past_key_values
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(3, 4, 6, 8)] * 2 + [(3, 1, 6, 1)]
    assert cache.layers[2].keys.dtype == torch.long
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 5]))
    rows = torch.cat([ids[[2, 0, 0], :4], random_ids(3, 3, seed=5)], 1)
    outputs = model(rows[:, 4:], past_key_values=cache, output_router_logits=True)
    assert torch.equal(torch.stack(outputs.expert_indices), model.route(rows)[..., 4:])


@pytest.mark.parametrize("blocks", [2, 3])
def test_a_cache_that_holds_keys_without_ids_is_refused(blocks):
    ids = random_ids()
    stranger = build("word_embedding", num_hidden_layers=blocks)(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"^The cache holds keys of 7 tokens but the ids of 0, .* from the start"):
        build("bigram")(ids, past_key_values=stranger)


def test_an_offloaded_cache_is_refused():
    cache = DynamicCache()
    cache.offloading = True
    with pytest.raises(ValueError, match=r"an offloaded cache cannot hold them\. Generate without"):
        build("bigram")(random_ids(), past_key_values=cache, use_cache=True)


@every_family
def test_packed_sequences_that_nothing_tells_apart_are_refused(family):
    packed = {"cu_seq_lens_q": torch.tensor([0, 3, 7], dtype=torch.int32), "position_ids": torch.arange(7)[None]}
    ids = random_ids(1)
    with pytest.raises(ValueError, match=r"^This model looks back .* in a language model alone.* Pad them"):
        run(build("cnn", family=family), ids, torch.ones_like(ids), **packed)


def packed_row() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All rows in one: its ids, positions and where sequences begin and end."""
    positions = torch.cat([torch.arange(len(row)) for row in ROWS])
    ends = torch.tensor([0, *map(len, ROWS)]).cumsum(0)
    return torch.cat(ROWS)[None], positions[None], ends.int()


@every_class
@both_stages
@torch.no_grad()
def test_sequences_packed_into_a_row_are_routed_as_each_alone(kind, stage):
    model = build(kind, stage)
    model.set_attn_implementation("eager")
    ids, positions, ends = packed_row()
    expected = torch.cat(alone(model), -1)
    assert not torch.equal(model.route(ids)[:, 0], expected)
    logits = torch.cat([model(row[None]).logits for row in ROWS], 1)
    for given in ({}, {"cu_seq_lens_q": ends}):
        for use_cache in (True, False):
            outputs = model(ids, position_ids=positions, use_cache=use_cache, output_router_logits=True, **given)
            assert torch.equal(torch.stack(outputs.expert_indices)[:, 0], expected)
            assert_close(outputs.logits, logits, rtol=1e-4, atol=1e-5)
    twice = experts(model, ids.repeat(2, 1), position_ids=positions)
    assert torch.equal(twice, expected[:, None].expand(-1, 2, -1))


@every_class
def test_packing_teaches_what_rows_of_their_own_do(kind):
    model = build(kind).train()
    ids, positions, _ = packed_row()
    packed = model(ids, position_ids=positions).distillation_loss
    own, mask = batch_of(ROWS, "right")
    assert_close(packed, run(model, own, mask).distillation_loss, rtol=1e-4, atol=1e-5)


@every_family
@every_class
@both_stages
@torch.no_grad()
def test_padding_anywhere_in_a_row_moves_no_token_and_no_logit(kind, family, stage):
    model = build(kind, stage, family)
    rows = list(random_ids(2, 9, low=3, high=91))
    mask = torch.tensor([[0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1], [1] * 2 + [0] * 3 + [1] * 7 + [0] * 2])
    ids = torch.full_like(mask, PAD).masked_scatter(mask.bool(), torch.cat(rows))
    expected = alone(model, rows)
    assert any(len(of_row.unique()) > 2 for of_row in expected)
    for filler in (PAD, 7):  # what stands where the padding is does not matter
        filled = ids.masked_fill(mask == 0, filler)
        assert_all_equal(taken_out(experts(model, filled, mask), mask), expected)
        assert_all_equal(taken_out(model.route(filled, mask), mask), expected)
    for cache_kind in ("dynamic", "static"):
        pieces = in_pieces(model, ids, mask, cache_for(model, cache_kind, 18), [3, 1, 6, 4])
        assert_all_equal(taken_out(pieces, mask), [of_row[-2:] for of_row in expected])
    logits = run(model, ids, mask).logits
    for row, of_row, real in zip(rows, logits, mask.bool(), strict=True):
        assert_close(of_row[real], run(model, row[None]).logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_mask_that_does_not_cover_the_cache_is_refused():
    model, ids = build("bigram"), random_ids()
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"^`attention_mask` covers 7 tokens, cache and input together have 14"):
        model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)


# Generation

# No token twice, or a tiny model says one word for ever; so padding must be banned from rows that have none, too.
COMMON = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False, "no_repeat_ngram_size": 1}
COMMON["suppress_tokens"] = [PAD]


def generated(model, rows, **kwargs) -> torch.Tensor:
    """The new tokens of a left-padded batch, which on an encoder-decoder is source and prompt."""
    ids, mask = batch_of([torch.cat([torch.tensor([START]), row]) for row in rows], "left")
    if model.config.is_encoder_decoder:
        kwargs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    tokens = model.generate(ids, attention_mask=mask, **{**COMMON, **kwargs})
    return tokens[:, -COMMON["max_new_tokens"] :]


@every_family
@pytest.mark.parametrize("kind", ["cnn", "transformer_2"])
@both_stages
def test_generation_gives_the_same_tokens_with_every_cache_and_with_none(kind, family, stage):
    model = build(kind, stage, family)
    greedy, beams = generated(model, ROWS, use_cache=False), generated(model, ROWS, use_cache=False, num_beams=3)
    assert torch.equal(generated(model, ROWS), greedy)
    assert torch.equal(generated(model, ROWS, num_beams=3), beams)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generated(model, ROWS, **static), greedy)
    assert torch.equal(generated(model, ROWS[:1])[0], greedy[0])
    # Without the ban on repeated tokens, guesses from the prompt come true and are kept, others are cropped.
    repeating = random_ids(1, 4, low=3, high=91)[0].repeat(3)
    guessed, plain = (
        generated(model, [repeating], no_repeat_ngram_size=0, **more) for more in ({"prompt_lookup_num_tokens": 3}, {})
    )
    assert torch.equal(guessed, plain)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["cnn"])
def test_embeddings_as_input_continue_as_ids_do(kind, use_cache):
    model, ids = build(kind), random_ids(3, 5)
    options = {**COMMON, "no_repeat_ngram_size": 0, "attention_mask": torch.ones_like(ids), "use_cache": use_cache}
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), model.generate(ids, **options)[:, 5:])


# Freezing


def plenty(model) -> torch.Tensor:
    return random_ids(8, 20, high=model.config.vocab_size)


@every_family
@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_freezing_changes_nothing(kind, family, dtype):
    model = build(kind, 1, family).to(dtype)
    ids = plenty(model)
    for router in distilled_of(model):  # near-ties, that another order of summation would break
        router.centroids.copy_(router.centroids[:1] + 1e-2 * torch.randn_like(router.centroids))
    before = run(model, ids)
    routed = model.route(ids)
    model.freeze_router()
    after = run(model, ids)
    assert torch.equal(torch.stack(before.expert_indices), routed)
    assert torch.equal(torch.stack(after.expert_indices), routed)
    assert torch.equal(model.route(ids), routed)
    assert torch.equal(before.logits, after.logits)
    assert all(len(layer.unique()) > 1 for layer in routed)


@every_class
def test_the_fingerprint_is_that_of_this_routing_and_no_other(kind):
    model = build(kind, 2)
    fingerprints = {model.router_fingerprint(), build("word_embedding", 2).router_fingerprint()}
    assert model.config.router_fingerprint == model.router_fingerprint() == model.model.router_fingerprint()
    for layer in layers_of(model):
        for bits in layer.frozen_router.weights.parameters():
            bits.data.view(-1)[3] ^= 1  # the last bit of a number
            fingerprints.add(model.router_fingerprint())
            bits.data.view(-1)[3] ^= 1
    assert len(fingerprints) == 2 + 2 * len(list(layer.frozen_router.weights.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_class
@torch.no_grad()
def test_frozen_routing_is_the_same_in_every_dtype(kind, dtype):
    model = build(kind, 2)
    ids, fingerprint = plenty(model), model.router_fingerprint()
    expected = model.route(ids)
    model.to(dtype)
    for training in (False, True):
        assert torch.equal(experts(model.train(training), ids), expected)
    if dtype != torch.float16:  # torch does not mix the two
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(experts(model, ids), expected)
    assert model.router_fingerprint() == fingerprint


def test_tables_of_ones_own_are_refused():
    with pytest.raises(ValueError, match=r"^A 'bigram' router looks back .* has no tables to set\. Build "):
        build("bigram").set_routing_tables(torch.zeros(2, 99, dtype=torch.long))


# Resizing


@every_family
@every_class
@both_stages
def test_resizing_keeps_old_ids_and_takes_a_new_one_for_an_old_one(kind, family, stage, tmp_path):
    model = build(kind, stage, family)
    old_size, old_fingerprint = model.config.vocab_size, model.router_fingerprint()
    ids = plenty(model)
    before = model.route(ids)
    model.resize_token_embeddings(old_size + 11, mean_resizing=False)
    assert torch.equal(model.route(ids), before)
    assert model.config.router_fingerprint == model.router_fingerprint()
    new = ids.clone()
    new[:, 3] = old_size + 4
    if stage == 2:
        new_as_old = new.where(new < old_size, new - old_size)
        assert torch.equal(model.route(new), model.route(new_as_old))
        assert model.router_fingerprint() != old_fingerprint
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).route(new), model.route(new))
    model.resize_token_embeddings(40, mean_resizing=False)
    assert model.route(ids % 40).shape == before.shape
    assert model.routing_stage == stage


# Checkpoints


@pytest.fixture(scope="module")
def source():
    return build("transformer_2", 2)


@pytest.fixture
def checkpoint(source, tmp_path):
    source.save_pretrained(tmp_path / "frozen")
    return tmp_path / "frozen"


def assert_same_model(model, source):
    assert model.routing_stage == source.routing_stage
    assert model.router_fingerprint() == model.config.router_fingerprint == source.router_fingerprint()
    assert torch.equal(model.route(plenty(source)), source.route(plenty(source)))
    assert torch.equal(experts(model.eval(), plenty(source)), source.route(plenty(source)))


@every_class
@both_stages
def test_checkpoints_keep_routing_and_stage(kind, stage, tmp_path):
    model = build(kind, stage)
    model.save_pretrained(tmp_path)
    loaded, info = StableMoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_model(loaded, model)
    if stage == 2:
        assert_same_model(StableMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), model)
        stored = load_file(tmp_path / "model.safetensors")
        frozen = {name: tensor for name, tensor in stored.items() if "frozen_router.weights" in name}
        assert {tensor.dtype for tensor in frozen.values()} == {torch.int32}
        assert len(frozen) == len([name for name in stored if ".distilled_router." in name])


WEIGHTS = "model.moe_layers.{}.frozen_router.weights.{}"


def drop_layer(stored):
    for name in [name for name in stored if name.startswith(WEIGHTS.format(1, ""))]:
        del stored[name]


def set_bits(layer: int, name: str, bits: int):
    return lambda stored: stored[WEIGHTS.format(layer, name)].view(-1).__setitem__(5, bits)


DAMAGED = r"^The frozen router `model\.moe_layers\.1\.frozen_router\.weights\.%s` is damaged: its number %d %s, but .* source"
DAMAGE = {
    "a bit flipped": (
        lambda stored: stored[WEIGHTS.format(1, "up_weight")].view(-1)[7:8].bitwise_xor_(1),
        r"^The frozen routers of model\.moe_layers\.0, model\.moe_layers\.1 are not those that this checkpoint was saved",
    ),
    "a number lost": (set_bits(1, "qkv_weight", -1), DAMAGED % ("qkv_weight", 5, "is missing")),
    "a NaN": (set_bits(1, "embedding", 0x7FC00000), DAMAGED % ("embedding", 5, "is NaN or infinite")),
    "a tensor lost": (
        lambda stored: stored.pop(WEIGHTS.format(1, "norm_bias")),
        DAMAGED % ("norm_bias", 0, "is missing"),
    ),
    "a layer lost": (
        drop_layer,
        r"says that the routing is frozen .* the frozen router of model\.moe_layers\.1 is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_refused(checkpoint, damage):
    edit, message = DAMAGE[damage]
    edit_weights(checkpoint, edit)
    with pytest.raises(ValueError, match=message):
        StableMoEForCausalLM.from_pretrained(checkpoint)


def test_state_dicts_bring_their_stage(caplog):
    frozen, learning = build("transformer_2", 2), build("transformer_2", seed=7)
    learning.load_state_dict(frozen.state_dict())
    assert_same_model(learning, frozen)
    with pytest.raises(ValueError, match=r"^The frozen routers of model\.moe_layers\.0, .* are not those"):
        frozen.load_state_dict(build("transformer_2", 2, seed=7).state_dict())
    assert_same_model(frozen, learning)
    damaged = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    damaged[WEIGHTS.format(1, "centroids")][2, 1] = -1
    with pytest.raises(ValueError, match=r"weights\.centroids` is damaged: its number 17 is missing"):
        frozen.load_state_dict(damaged)
    damaged[WEIGHTS.format(1, "centroids")] = damaged[WEIGHTS.format(1, "centroids")].bfloat16()
    with pytest.raises(
        ValueError, match=r"weights\.centroids` holds integers, but what it was given is torch\.bfloat16"
    ):
        frozen.load_state_dict(damaged)
    assert_same_model(frozen, learning)
    logging.getLogger("modeling_stablemoe").propagate = True
    with caplog.at_level(logging.WARNING):
        frozen.load_state_dict(build("transformer_2").state_dict())
    assert "These weights are from stage 1" in caplog.text
    assert (frozen.routing_stage, frozen.config.router_fingerprint) == (1, None)


# Learning


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@every_family
@every_class
def test_distillation_reaches_all_of_the_distilled_router_and_nothing_else(kind, family):
    model = build(kind, 1, family).train()
    outputs = run(model, plenty(model), labels=plenty(model))
    distilled = {name for name, _ in model.named_parameters() if ".distilled_router." in name}
    assert gradients(model, outputs.distillation_loss).keys() == distilled
    assert not gradients(model, run(model, plenty(model), labels=plenty(model)).task_loss).keys() & distilled
    model.freeze_router()
    assert not gradients(model, run(model, plenty(model), labels=plenty(model)).loss).keys() & distilled


@every_class
def test_gradient_checkpointing_changes_no_gradient(kind):
    model = build(kind).train()
    ids, mask = batch_of(ROWS, "left")
    expected = gradients(model, run(model, ids, mask, labels=ids).loss)
    switch_checkpointing(model, {"use_reentrant": False})
    actual = gradients(model, run(model, ids, mask, labels=ids).loss)
    assert_close(actual, expected, rtol=0, atol=0)


# Trainer


@pytest.mark.parametrize("kind", one_fast("transformer_2", "bigram", "cnn"))
def test_trainer_freezes_and_resumes_across_the_transition(kind, tmp_path, capsys):
    def trainer(folder):
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
        return make_trainer(folder, StageTransitionCallback(5), model=build(kind), **saving)

    whole = trainer(tmp_path / "whole")
    whole.train()
    [entry] = [entry for entry in whole.state.log_history if "transition_step" in entry]
    assert (entry["transition_step"], entry["routing_stage"]) == (5, 2)
    assert "transition_agreement" in entry
    assert "transition_table_load_max_over_mean" not in entry
    printed = capsys.readouterr().out
    assert f"the weights of the distilled router ({kind}) of" in printed
    assert "looks back at earlier tokens" in printed
    assert whole.model.config.router_fingerprint in printed
    for step in (3, 6):
        resumed = trainer(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        expected, actual = weights(whole.model), weights(resumed.model)
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
        assert resumed.model.router_fingerprint() == whole.model.router_fingerprint()
    loaded = StableMoEForCausalLM.from_pretrained(get_last_checkpoint(tmp_path / "whole"))
    assert_same_model(loaded, whole.model.eval())
