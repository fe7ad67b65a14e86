"""Tests of generating a target: caches, padding, beams, sampling, prompts, and the experts that tokens really pass."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache, set_seed

from helpers.models import padded, random_ids, tiny_seq2seq_model


pytestmark = pytest.mark.pairs


PAD, START = 2, 1
STEPS = 8
# `eos_token_id=None`: every target runs to its full length. No token twice, or a tiny model says one word for ever.
COMMON = {"max_new_tokens": STEPS, "eos_token_id": None, "no_repeat_ngram_size": 1}
MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 5},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
}
SOURCES = [random_ids(1, length, seed=length, low=3, high=91)[0] for length in (2, 5, 9)]


@pytest.fixture(params=[1, 2], ids=["stage 1", "stage 2"])
def model(request):
    model = tiny_seq2seq_model()
    if request.param == 2:
        model.freeze_router()
    assert model.routing_stage == request.param
    return model.eval()


def source_ids(batch: int = 3, length: int = 6) -> torch.Tensor:
    return random_ids(batch, length, low=3, high=91)


def batch_of(rows: list[torch.Tensor], side: str, extra: int = 0) -> dict[str, torch.Tensor]:
    """A padded batch, `extra` columns wider than it must be."""
    longest = torch.full((max(map(len, rows)) + extra,), START)
    ids = padded([*rows, longest], PAD, side)[:-1]
    return {"input_ids": ids, "attention_mask": ids.ne(PAD).long()}


def translate(model, inputs, mode: str = "greedy", seed: int = 1, **kwargs) -> torch.Tensor:
    set_seed(seed)
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    return model.generate(**inputs, **{**COMMON, **MODES[mode], **kwargs})


@torch.no_grad()
def by_hand(model, source, target=None, steps: int = STEPS) -> torch.Tensor:
    """Greedy decoding with nothing of `generate` and no cache: the reference."""
    target = torch.full((len(source), 1), START) if target is None else target
    for _ in range(steps):
        logits = model(source, decoder_input_ids=target, use_cache=False).logits[:, -1]
        target = torch.cat([target, logits.scatter(-1, target, -torch.inf).argmax(-1, keepdim=True)], 1)
    return target


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_greedy_decoding_gives_the_most_likely_tokens_with_and_without_cache(model, cache):
    source = source_ids()
    expected = by_hand(model, source)
    assert len(expected.unique()) > 12  # a model that ignores its source would prove little
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    assert torch.equal(translate(model, source, use_cache=cache is not None, **options), expected)


def test_a_decoder_with_fewer_blocks_than_the_encoder_decodes_with_its_cache():
    sizes = {"encoder_layers": 3, "decoder_layers": 1, "decoder_moe_layer_positions": [1]}
    model = tiny_seq2seq_model(**sizes, do_layer_norm_before=True, position_embedding_type="learned").eval()
    assert torch.equal(translate(model, source_ids()), by_hand(model, source_ids()))


def alone(model, rows, mode: str, **kwargs) -> torch.Tensor:
    """Each row without padding, as often as there are rows, so that sampling draws the same numbers for it."""
    return torch.cat(
        [translate(model, row.expand(len(rows), -1), mode, **kwargs)[i : i + 1] for i, row in enumerate(rows)]
    )


@pytest.mark.parametrize("mode", MODES)
def test_batches_of_any_padding_equal_each_source_alone_with_and_without_cache(model, mode):
    expected = alone(model, SOURCES, mode)
    assert len(expected.unique(dim=0)) == 3
    for side, extra, use_cache in (("left", 0, True), ("right", 3, True), ("left", 2, False), ("right", 0, False)):
        generated = translate(model, batch_of(SOURCES, side, extra), mode, use_cache=use_cache)
        assert torch.equal(generated, expected), (side, extra, use_cache)


def test_modes_differ_and_sampling_follows_its_seed(model):
    source = source_ids()
    generated = [translate(model, source, mode) for mode in MODES]
    assert not torch.equal(generated[0], generated[2])
    assert torch.equal(generated[2], translate(model, source, "sampling", seed=1))
    assert not torch.equal(generated[2], translate(model, source, "sampling", seed=2))


def log_likelihood(model, source, target) -> torch.Tensor:
    scores = model(source, decoder_input_ids=target[:, :-1]).logits.log_softmax(-1)
    return scores.gather(-1, target[:, 1:].unsqueeze(-1)).sum((1, 2))


@torch.no_grad()
def test_beams_find_no_worse_targets_than_one(model):
    source = source_ids()
    one, five = (log_likelihood(model, source, translate(model, source, mode)) for mode in ("greedy", "beams"))
    assert (five - one).sum() > 0.01  # not a theorem, but beams that never find better are no search


# Routing


class Watch:
    """Notes what every MoE layer is given and what it does with it."""

    def __init__(self, model):
        self.passes = {name: [] for name in model.moe_layers_by_name}
        for name, layer in model.moe_layers_by_name.items():
            layer.register_forward_pre_hook(self._begin(name))
            layer.router.register_forward_hook(self._decided(name))
            layer.expert_stack.register_forward_pre_hook(self._dispatched(name))

    def _begin(self, name):
        return lambda _m, args: self.passes[name].append({"ids": args[1][0], "mask": args[1][1]})

    def _decided(self, name):
        return lambda _m, _a, decision: self.passes[name][-1].update(decided=decision[1])

    def _dispatched(self, name):
        return lambda _m, args: self.passes[name][-1].update(experts=args[1])

    def assert_routed_as_said(self, model):
        """Every token of every pass went to the expert that `route` names, and padding to none."""
        for layer, passes in enumerate(self.passes.values()):
            assert passes
            for seen in passes:
                expected = model.route(seen["ids"])[layer]
                assert torch.equal(seen["decided"], expected)
                if seen["mask"] is not None:
                    expected = expected.masked_fill(~seen["mask"], 5)
                assert torch.equal(seen["experts"].view_as(expected), expected)

    def ids_of(self, side: str) -> list[list[torch.Tensor]]:
        return [[seen["ids"] for seen in passes] for name, passes in self.passes.items() if f".{side}." in name]


@pytest.mark.parametrize(("use_cache", "side"), [(True, "left"), (False, "right")])
@pytest.mark.parametrize("mode", MODES)
def test_both_sides_route_as_route_says_in_every_mode(model, mode, use_cache, side):
    watch, batch = Watch(model), batch_of(SOURCES, side)
    generated = translate(model, batch, mode, use_cache=use_cache)
    watch.assert_routed_as_said(model)
    assert list(watch.passes) == [
        "model.encoder.moe_layers.0",
        "model.decoder.moe_layers.0",
        "model.decoder.moe_layers.1",
    ]
    ((seen,),) = watch.ids_of("encoder")  # once a generation
    assert torch.equal(seen, batch["input_ids"])
    ((encoded,),) = [passes for name, passes in watch.passes.items() if ".encoder." in name]
    assert torch.equal(encoded["mask"], batch["attention_mask"].bool())
    for passes in watch.ids_of("decoder"):
        assert len(passes) == STEPS
        assert [ids.shape[1] for ids in passes] == ([1] * STEPS if use_cache else list(range(1, STEPS + 1)))
        if mode != "beams":
            # The last token is produced, but never an input.
            assert torch.equal(torch.cat(passes, 1) if use_cache else passes[-1], generated[:, :-1])


# Caches


@torch.no_grad()
def test_the_cache_holds_the_target_so_far_and_the_source_once(model):
    batch = batch_of(SOURCES, "left")
    outputs = translate(model, batch, return_dict_in_generate=True)
    cache = outputs.past_key_values
    assert isinstance(cache, EncoderDecoderCache)
    assert cache.is_updated == {0: True, 1: True, 2: True}
    assert len(cache.self_attention_cache) == len(cache.cross_attention_cache) == 3
    assert cache.get_seq_length() == STEPS
    encoded = model.model.encoder(**batch).last_hidden_state
    for block, layer in zip(model.model.decoder.layers, cache.cross_attention_cache.layers, strict=True):
        keys, values = block.cross_attn.project(encoded)
        assert keys.shape == (3, 3, 9, 8)
        assert_close((layer.keys, layer.values), (keys, values), rtol=1e-5, atol=1e-5)
    for layer in cache.self_attention_cache.layers:
        assert layer.keys.shape == (3, 3, STEPS, 8)


@torch.no_grad()
def test_a_second_pass_over_a_cache_continues_the_first(model):
    batch, target = batch_of(SOURCES, "right"), random_ids(3, 7, seed=5, low=3, high=91)
    whole = model(**batch, decoder_input_ids=target).logits
    first = model(**batch, decoder_input_ids=target[:, :3], use_cache=True)
    second = model(
        encoder_outputs=(first.encoder_last_hidden_state,),
        attention_mask=batch["attention_mask"],
        decoder_input_ids=target[:, 3:],
        past_key_values=first.past_key_values,
    )
    assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-5, atol=1e-5)
    assert second.past_key_values.get_seq_length() == 7


# Other inputs


@pytest.mark.parametrize("mode", MODES)
def test_generation_goes_on_from_encoder_outputs(model, mode):
    batch = batch_of(SOURCES, "left")
    expected = translate(model, batch, mode)
    watch, encoded = Watch(model), model.get_encoder()(**batch)
    inputs = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"]}
    assert torch.equal(translate(model, inputs, mode), expected)
    assert [len(passes) for passes in watch.ids_of("encoder")] == [1]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt_of_the_decoder_is_continued(model, use_cache):
    source, prompt = source_ids(), random_ids(3, 4, seed=3, low=3, high=91)
    started = torch.cat([torch.full((3, 1), START), prompt], 1)
    expected = by_hand(model, source, started)
    assert expected.shape == (3, 5 + STEPS)
    for ids in (started, prompt):  # `generate` puts the start token before a prompt that lacks it
        assert torch.equal(translate(model, source, decoder_input_ids=ids, use_cache=use_cache), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_different_lengths_equal_each_alone(model, use_cache):
    prompts = [torch.cat([torch.tensor([START]), random_ids(1, n, seed=n, low=3, high=91)[0]]) for n in (4, 1, 2)]
    expected = torch.cat(
        [
            by_hand(model, source.unsqueeze(0), prompt.unsqueeze(0))[:, -STEPS:]
            for source, prompt in zip(SOURCES, prompts, strict=True)
        ]
    )
    ids, mask = padded(prompts, PAD, "left"), padded([torch.ones_like(row) for row in prompts], 0, "left")
    watch = Watch(model)
    generated = translate(
        model,
        batch_of(SOURCES, "left"),
        decoder_input_ids=ids,
        decoder_attention_mask=mask,
        use_cache=use_cache,
    )
    assert torch.equal(generated[:, -STEPS:], expected)
    watch.assert_routed_as_said(model)
    first = watch.passes["model.decoder.moe_layers.0"][0]
    assert torch.equal(first["mask"], mask.bool())


@pytest.mark.parametrize("use_cache", [True, False])
def test_embeddings_of_the_source_are_translated_as_its_ids_are(model, use_cache):
    batch = batch_of(SOURCES, "left")
    embeds = model.get_input_embeddings()(batch["input_ids"])
    inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    watch = Watch(model)
    for mode in MODES:
        assert torch.equal(
            translate(model, inputs, mode, use_cache=use_cache), translate(model, batch, mode, use_cache=use_cache)
        )
    watch.assert_routed_as_said(model)
    assert torch.equal(watch.ids_of("encoder")[0][0], batch["input_ids"])


def test_embeddings_of_the_target_decode_as_its_ids_do(model):
    source, target = source_ids(), random_ids(3, 5, seed=2, low=3, high=91)
    embeds = model.model.decoder.embed_tokens(target)
    expected = model(source, decoder_input_ids=target, output_router_logits=True)
    actual = model(source, decoder_inputs_embeds=embeds, output_router_logits=True)
    assert_close(actual.logits, expected.logits, rtol=0, atol=0)
    assert all(map(torch.equal, actual.decoder_expert_indices, expected.decoder_expert_indices))


# Limits and switches


def test_generation_stops_at_the_end_token_and_pads(model):
    source = source_ids()
    free = by_hand(model, source)
    stop = int(free[0, 4])
    generated = translate(model, source, eos_token_id=stop)
    for row, expected in zip(generated.tolist(), free.tolist(), strict=True):
        length = expected.index(stop) + 1 if stop in expected else 1 + STEPS
        assert row[:length] == expected[:length]
        assert set(row[length:]) <= {PAD}


def test_positions_past_the_maximum_are_refused():
    model = tiny_seq2seq_model(max_position_embeddings=10).eval()
    message = r"^There is a position 10, outside 0\.\.9 of `max_position_embeddings`; shorten .*\(`max_new_tokens`\)"
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=r"^Generation may go on to position 10, outside 0\.\.9 of"):
            translate(model, source_ids(1), max_new_tokens=11, use_cache=use_cache)
    with pytest.raises(ValueError, match=message):
        translate(model, source_ids(1, 11))
    # The last token is produced at position 9 and never an input.
    assert translate(model, source_ids(1, 10), max_new_tokens=10).shape == (1, 11)


@pytest.mark.parametrize("mode", MODES)
def test_recorded_routing_changes_no_token(model, mode):
    batch = batch_of(SOURCES, "left")
    expected = translate(model, batch, mode)
    assert torch.equal(translate(model, batch, mode, output_router_logits=True), expected)
    model.config.output_router_logits = True
    assert torch.equal(translate(model, batch, mode), expected)


def test_a_model_in_training_mode_generates():
    model = tiny_seq2seq_model()
    model.freeze_router()
    expected = translate(model.eval(), source_ids())
    assert torch.equal(translate(model.train(), source_ids()), expected)
    learning = tiny_seq2seq_model().train()
    assert translate(learning, source_ids()).shape == (3, 1 + STEPS)


def test_a_cache_for_one_side_only_is_refused():
    with pytest.raises(ValueError, match=r"^`cache` must be an EncoderDecoderCache, .* got a DynamicCache\.$"):
        tiny_seq2seq_model()(source_ids(), decoder_input_ids=source_ids(), past_key_values=DynamicCache())
