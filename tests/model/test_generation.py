"""Tests of generation by both families: caches, padding, beams, sampling, prompts, and the experts that tokens really pass."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, set_seed

from helpers.models import padded, random_ids, tiny_model, tiny_seq2seq_model


pytestmark = pytest.mark.pairs


START, STEPS = 1, 8
PAD = {"causal": 1, "seq2seq": 2}
MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 5},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
}
ROWS = [random_ids(1, length, seed=length, low=3, high=91)[0] for length in (2, 5, 9)]
IDS = random_ids(3, 5, low=3, high=91)

every_family = pytest.mark.parametrize("family", PAD)
every_stage = pytest.mark.parametrize("stage", [1, 2])
every_mode = pytest.mark.parametrize("mode", MODES)


def build(family: str, stage: int = 1, **overrides):
    if family == "causal":  # untied: a tiny model with one embedding says one word for ever
        model = tiny_model(**{"moe_layer_positions": [0, 2], "tie_word_embeddings": False, **overrides})
    else:
        model = tiny_seq2seq_model(**overrides)
    if stage == 2:
        model.freeze_router()
    return model.eval()


def batch_of(family: str, side: str = "left", extra: int = 0) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded `extra` columns wider than they must be."""
    longest = torch.full((max(map(len, ROWS)) + extra,), START)
    ids = padded([*ROWS, longest], PAD[family], side)[:-1]
    return {"input_ids": ids, "attention_mask": ids.ne(PAD[family]).long()}


def generate(model, inputs, mode: str = "greedy", seed: int = 1, **options) -> torch.Tensor:
    """The new tokens; without an end token every sequence runs to its full length."""
    options = {"max_new_tokens": STEPS, "eos_token_id": None, **MODES[mode], **options}
    if model.config.is_encoder_decoder:  # for the same reason
        options["no_repeat_ngram_size"] = 1
    set_seed(seed)
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    return model.generate(**inputs, **options)[:, -options["max_new_tokens"] :]


@torch.no_grad()
def by_hand(model, ids, prompt=None, steps: int = STEPS) -> torch.Tensor:
    """Greedy decoding with nothing of `generate` and no cache: the reference."""
    source, written = {}, ids
    if model.config.is_encoder_decoder:
        source, written = {"input_ids": ids}, torch.full((len(ids), 1), START) if prompt is None else prompt
    for _ in range(steps):
        if source:
            logits = model(**source, decoder_input_ids=written, use_cache=False).logits[:, -1]
            logits = logits.scatter(-1, written, -torch.inf)
        else:
            logits = model(written, use_cache=False).logits[:, -1]
        written = torch.cat([written, logits.argmax(-1, keepdim=True)], 1)
    return written[:, -steps:]


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@every_stage
@every_family
def test_greedy_decoding_gives_the_most_likely_tokens_with_and_without_cache(family, stage, cache):
    model = build(family, stage)
    expected = by_hand(model, IDS)
    assert len(expected.unique()) > 3  # a model that repeats one token would prove little
    options = {"cache_implementation": cache} if cache else {"use_cache": False}
    assert torch.equal(generate(model, IDS, disable_compile=True, **options), expected)


def test_a_decoder_with_fewer_blocks_than_the_encoder_decodes_with_its_cache():
    sizes = {"encoder_layers": 3, "decoder_layers": 1, "decoder_moe_layer_positions": [1]}
    model = build("seq2seq", **sizes, do_layer_norm_before=True, position_embedding_type="learned")
    assert torch.equal(generate(model, IDS), by_hand(model, IDS))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "backend"), [(1, "grouped_mm"), (2, "batched_mm")])
def test_a_decoding_step_over_a_static_cache_compiles_once_to_one_graph(stage, backend):
    # What a CUDA graph of it needs, too.
    model = build("causal", stage, num_hidden_layers=1, moe_layer_positions=[1])
    model.set_experts_implementation(backend)
    ids = random_ids(3, 9)
    cache = StaticCache(config=model.config, max_cache_len=12)
    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        model(ids[:, :5], past_key_values=cache, use_cache=True)
        logits = [step(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(5, 9)]
    assert_close(torch.cat(logits, 1), model(ids).logits[:, 5:], rtol=1e-4, atol=1e-5)


@every_mode
@every_stage
@every_family
def test_a_batch_of_any_padding_equals_each_row_alone_with_and_without_cache(family, stage, mode):
    model = build(family, stage)
    # As often as there are rows, so that sampling draws the same numbers.
    alone = [generate(model, row.expand(3, -1), mode)[i] for i, row in enumerate(ROWS)]
    assert len(torch.stack(alone).unique(dim=0)) > 1
    other_side = "left" if family == "causal" else "right"
    for side, extra, use_cache in (("left", 2, True), (other_side, 3, True), (other_side, 0, False)):
        generated = generate(model, batch_of(family, side, extra), mode, use_cache=use_cache)
        assert torch.equal(generated, torch.stack(alone)), (side, extra, use_cache)


@every_stage
@every_family
def test_sampling_follows_its_seed(family, stage):
    model = build(family, stage)
    first, again, other = (generate(model, IDS, "sampling", seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, by_hand(model, IDS))


@every_stage
@every_family
@torch.no_grad()
def test_beams_find_no_worse_continuations_than_one(family, stage):
    model = build(family, stage)
    likelihoods = []
    for mode in ("greedy", "beams"):
        new = generate(model, IDS, mode)
        if family == "causal":
            scores = model(torch.cat([IDS, new], 1)).logits[:, IDS.shape[1] - 1 : -1]
        else:
            scores = model(IDS, decoder_input_ids=torch.cat([torch.full((3, 1), START), new[:, :-1]], 1)).logits
        likelihoods.append(scores.log_softmax(-1).gather(-1, new.unsqueeze(-1)).sum())
    assert likelihoods[1] - likelihoods[0] > 0.01  # not a theorem, but beams that never find better are no search


# Routing


class Watch:
    """Notes what every MoE layer is given and what it does with it."""

    def __init__(self, model):
        self.model = model
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

    def assert_routed_as_said(self):
        """Every token of every pass went to the expert that `route` names, and padding to none."""
        for layer, passes in enumerate(self.passes.values()):
            assert passes
            for seen in passes:
                expected = self.model.route(seen["ids"])[layer]
                assert torch.equal(seen["decided"], expected)
                if seen["mask"] is not None:
                    expected = expected.masked_fill(~seen["mask"], 5)
                assert torch.equal(seen["experts"].view_as(expected), expected)

    def of_encoder(self) -> list[dict]:
        ((seen,),) = [passes for name, passes in self.passes.items() if ".encoder." in name]  # once per generation
        return seen

    def of_decoder(self) -> list[list[dict]]:
        return [passes for name, passes in self.passes.items() if ".encoder." not in name]


@pytest.mark.parametrize("use_cache", [True, False])
@every_mode
@every_stage
@every_family
def test_every_pass_routes_its_tokens_as_route_says_in_every_mode(family, stage, mode, use_cache):
    model = build(family, stage)
    watch, batch = Watch(model), batch_of(family, "left" if family == "causal" or use_cache else "right")
    generated = generate(model, batch, mode, use_cache=use_cache)
    watch.assert_routed_as_said()
    if family == "seq2seq":
        assert torch.equal(watch.of_encoder()["ids"], batch["input_ids"])
        assert torch.equal(watch.of_encoder()["mask"], batch["attention_mask"].bool())
    first = 9 if family == "causal" else 1
    for passes in watch.of_decoder():
        lengths = [first] + [1] * (STEPS - 1) if use_cache else list(range(first, first + STEPS))
        assert [seen["ids"].shape[1] for seen in passes] == lengths
        if mode != "beams":  # the last token is produced, but never an input
            read = torch.cat([seen["ids"] for seen in passes], 1) if use_cache else passes[-1]["ids"]
            assert torch.equal(read[:, first:], generated[:, :-1])


# Caches


@torch.no_grad()
def test_the_cache_holds_the_target_so_far_and_the_source_once():
    model, batch = build("seq2seq"), batch_of("seq2seq")
    options = {"max_new_tokens": STEPS, "eos_token_id": None, "do_sample": False}
    cache = model.generate(**batch, **options, return_dict_in_generate=True).past_key_values
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


def test_a_cache_for_one_side_only_is_refused():
    with pytest.raises(ValueError, match=r"^`cache` must be an EncoderDecoderCache, .* got a DynamicCache\.$"):
        build("seq2seq")(IDS, decoder_input_ids=IDS, past_key_values=DynamicCache())


# Other inputs


@every_mode
def test_generation_goes_on_from_encoder_outputs(mode):
    model, batch = build("seq2seq"), batch_of("seq2seq")
    expected = generate(model, batch, mode)
    watch, encoded = Watch(model), model.get_encoder()(**batch)
    inputs = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"]}
    assert torch.equal(generate(model, inputs, mode), expected)
    assert torch.equal(watch.of_encoder()["ids"], batch["input_ids"])


@pytest.mark.parametrize("use_cache", [True, False])
@every_stage
def test_a_prompt_of_the_decoder_is_continued(stage, use_cache):
    model, prompt = build("seq2seq", stage), random_ids(3, 4, seed=3, low=3, high=91)
    started = torch.cat([torch.full((3, 1), START), prompt], 1)
    expected = by_hand(model, IDS, started)
    for ids in (started, prompt):  # `generate` puts the start token before a prompt that lacks it
        assert torch.equal(generate(model, IDS, decoder_input_ids=ids, use_cache=use_cache), expected)


@pytest.mark.parametrize("use_cache", [True, False])
@every_stage
def test_prompts_of_different_lengths_equal_each_alone(stage, use_cache):
    model = build("seq2seq", stage)
    prompts = [torch.cat([torch.tensor([START]), random_ids(1, n, seed=n, low=3, high=91)[0]]) for n in (4, 1, 2)]
    expected = [by_hand(model, source[None], prompt[None]) for source, prompt in zip(ROWS, prompts, strict=True)]
    mask = padded([torch.ones_like(row) for row in prompts], 0, "left")
    options = {"decoder_input_ids": padded(prompts, PAD["seq2seq"], "left"), "decoder_attention_mask": mask}
    watch = Watch(model)
    generated = generate(model, batch_of("seq2seq"), **options, use_cache=use_cache)
    assert torch.equal(generated, torch.cat(expected))
    watch.assert_routed_as_said()
    assert torch.equal(watch.of_decoder()[0][0]["mask"], mask.bool())


@pytest.mark.parametrize("use_cache", [True, False])
@every_stage
@every_family
def test_embeddings_are_continued_as_their_ids_are(family, stage, use_cache):
    model, batch = build(family, stage), batch_of(family)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    for mode in ("greedy", "beams"):
        expected = generate(model, batch, mode, use_cache=use_cache)
        assert torch.equal(generate(model, inputs, mode, use_cache=use_cache), expected)


def test_embeddings_of_the_target_decode_as_its_ids_do():
    model, target = build("seq2seq"), random_ids(3, 5, seed=2, low=3, high=91)
    embeds = model.model.decoder.embed_tokens(target)
    expected = model(IDS, decoder_input_ids=target, output_router_logits=True)
    actual = model(IDS, decoder_inputs_embeds=embeds, output_router_logits=True)
    assert_close(actual.logits, expected.logits, rtol=0, atol=0)
    assert all(map(torch.equal, actual.decoder_expert_indices, expected.decoder_expert_indices))


# Drafts of an early exit


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["word_embedding", "bigram", pytest.param("transformer_1", marks=pytest.mark.slow)])
def test_drafts_of_an_early_exit_change_no_token(kind, stage):
    positions = {"moe_layer_positions": [0, 2, 3], "num_hidden_layers": 3}
    model, passes = build("causal", stage, **positions, distilled_router=kind, output_router_logits=True), []
    expected = by_hand(model, IDS[:1])
    for layer in (*model.model.layers, *model.model.moe_layers):
        layer.register_forward_pre_hook(lambda _module, _args, layer=layer: passes.append(layer))
    for blocks in (1, 2):
        passes.clear()
        assert torch.equal(generate(model, IDS[:1], assistant_early_exit=blocks), expected)
        often = {layer: passes.count(layer) for layer in passes}
        full = often[model.model.layers[-1]]
        assert [often[layer] > full for layer in model.model.layers] == [True] * blocks + [False] * (3 - blocks)
        # Before the first block, after the second and after the third.
        assert [often[layer] > full for layer in model.model.moe_layers] == [True, blocks == 2, False]
    assert model.config.num_hidden_layers == 3


def test_an_early_exit_may_come_before_every_moe_layer():
    model = build("causal", moe_layer_positions=[2], output_router_logits=True)
    assert torch.equal(generate(model, IDS[:1], assistant_early_exit=1), by_hand(model, IDS[:1]))


# Limits and switches


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}])
def test_a_generation_that_may_pass_the_last_position_fails_before_its_first_step(kind, options):
    # The last token that is generated is not read, but of one that may have been drafted.
    read = 12 if "prompt_lookup_num_tokens" not in options else 13
    sizes = {"position_embedding_type": kind, "max_position_embeddings": read, "tie_word_embeddings": False}
    model, passes = build("causal", **sizes), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    repeating = torch.tensor([[5, 6, 7, 5, 6]])  # something to draft from
    for prompt in (IDS[:1], repeating):
        assert generate(model, prompt, **options).shape == (1, 8)
    passes.clear()
    message = (
        rf"^Generation may go on to position {read + 1}, outside 0\.\.{read - 1} .* lower `max_new_tokens` or "
        r"`max_length` by 2, or"
    )
    inputs = {"inputs_embeds": model.get_input_embeddings()(IDS[:1])}
    for asked in (IDS[:1], inputs):
        with pytest.raises(ValueError, match=message):
            generate(model, asked, **options, max_new_tokens=10)
    with pytest.raises(ValueError, match=message):
        model.generate(IDS[:1], eos_token_id=None, max_length=15, **options)
    assert not passes


def test_padding_takes_no_position_of_a_generation():
    model = build("causal", max_position_embeddings=12)
    mask = torch.cat([torch.zeros(3, 20, dtype=torch.long), torch.ones_like(IDS)], 1)
    inputs = {"input_ids": torch.cat([torch.full((3, 20), PAD["causal"]), IDS], 1), "attention_mask": mask}
    assert torch.equal(generate(model, inputs), by_hand(model, IDS))
    with pytest.raises(ValueError, match=r"`max_length` by 1, or shorten"):
        generate(model, inputs, max_new_tokens=9)


def test_a_translation_that_may_pass_the_last_position_fails_before_its_first_step():
    model, passes = build("seq2seq", max_position_embeddings=12), []
    assert generate(model, IDS, max_new_tokens=12).shape == (3, 12)
    prompt = {"decoder_input_ids": random_ids(3, 6, low=3, high=91)}
    prompt["decoder_attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1]] + [[0, 1, 1, 1, 1, 1]] * 2)
    assert generate(model, IDS, **prompt, max_new_tokens=7).shape == (3, 7)  # it begins with a start
    model.model.decoder.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    for arguments, tokens in (({}, 13), ({"use_cache": False}, 13), (prompt, 8)):
        with pytest.raises(ValueError, match=r"^Generation may go on to position 12, outside 0\.\.11 .* by 1, or"):
            generate(model, IDS, **arguments, max_new_tokens=tokens)
    assert not passes


@every_family
def test_generation_stops_at_the_end_token_and_pads(family):
    model = build(family)
    free = by_hand(model, IDS)
    stop = int(free[0, 4])
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": PAD[family]}
    options |= {"no_repeat_ngram_size": 1} if family == "seq2seq" else {}
    generated = model.generate(IDS, eos_token_id=stop, **options)[:, 5 if family == "causal" else 1 :]
    for row, expected in zip(generated.tolist(), free.tolist(), strict=True):
        length = expected.index(stop) + 1 if stop in expected else STEPS
        assert row[:length] == expected[:length]
        assert set(row[length:]) <= {PAD[family]}


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@every_stage
@every_family
def test_neither_recorded_routing_nor_training_mode_changes_a_token(family, stage, mode):
    model = build(family, stage)
    expected = generate(model, IDS, mode)
    assert torch.equal(generate(model, IDS, mode, output_router_logits=True), expected)
    model.config.output_router_logits = True
    assert torch.equal(generate(model, IDS, mode), expected)
    in_training = generate(model.train(), IDS, mode)  # stage 1 then routes by the backbone
    assert stage == 1 or torch.equal(in_training, expected)
