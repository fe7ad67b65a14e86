"""Tests of both families of models: outputs, losses, checkpointing, parameters, compilation, errors."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, set_seed

from helpers import ROOT
from helpers.matrices import one_fast
from helpers.models import gradients, padded, random_ids, tiny_classifier, tiny_model, tiny_seq2seq_model
from modeling_stablemoe import (
    StableMoEConfig,
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoESeq2SeqConfig,
)
from modeling_stablemoe.runs.recipes import load_preset


pytestmark = pytest.mark.pairs


PRESETS = ROOT / "configuration" / "models"
IDS = random_ids(high=91)
BUILDERS = {"causal": tiny_model, "seq2seq": tiny_seq2seq_model, "classifier": tiny_classifier}
# Of the token ids that each MoE layer is given of a batch.
SHAPES = {"causal": [(3, 7)] * 2, "seq2seq": [(3, 6), (3, 7), (3, 7)]}

every_family = pytest.mark.parametrize("family", SHAPES)
every_stage = pytest.mark.parametrize("stage", [1, 2])


def build(family: str, stage: int = 1, **overrides):
    if family != "seq2seq":
        overrides = {"moe_layer_positions": [0, 2], **overrides}
    model = BUILDERS[family](**overrides)
    if stage == 2:
        model.freeze_router()
    return model


def batch_of(family: str) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the right."""
    width = 6 if family == "seq2seq" else 7
    rows = [random_ids(1, length, seed=length, low=3, high=91)[0] for length in (width, 3, 5)]
    pad = 2 if family == "seq2seq" else 1
    batch = {"input_ids": padded(rows, pad), "attention_mask": padded([torch.ones_like(row) for row in rows], 0)}
    if family == "classifier":
        return {**batch, "labels": torch.tensor([0, 2, 1])}
    targets = rows if family == "causal" else [random_ids(1, n, seed=10 + n, low=3, high=91)[0] for n in (4, 7, 2)]
    return {**batch, "labels": padded(targets, -100)}


def routing_of(outputs, name: str) -> tuple:
    """A recorded output of all MoE layers, the encoder's first."""
    if name in outputs or "encoder_" + name not in outputs:
        return outputs.get(name)
    return outputs["encoder_" + name] + outputs["decoder_" + name]


def train_step(model, batch) -> dict[str, torch.Tensor]:
    set_seed(1)
    outputs = model.train()(**batch)
    outputs.loss.backward()
    return {**gradients(model), "loss": outputs.loss.detach(), "load": outputs.expert_load}


# Outputs


@every_stage
@every_family
def test_eager_and_sdpa_attention_agree_in_loss_and_gradients(family, stage):
    results = []
    for implementation in ("eager", "sdpa"):
        model = build(family, stage)
        model.set_attn_implementation(implementation)
        configs = [module.config for module in model.modules() if hasattr(module, "config")]
        assert {config._attn_implementation for config in configs} == {implementation}
        results.append(train_step(model, batch_of(family)))
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "positions", "shapes"),
    [
        (
            "causal",
            {"num_hidden_layers": 3, "moe_layer_positions": [1, 3]},
            {"hidden_states": [(3, 7, 32)] * 4, "attentions": [(3, 4, 7, 7)] * 3},
        ),
        (
            "seq2seq",
            {"decoder_moe_layer_positions": [0, 3]},
            {
                "encoder_hidden_states": [(3, 6, 24)] * 3,
                "decoder_hidden_states": [(3, 7, 24)] * 4,
                "encoder_attentions": [(3, 3, 6, 6)] * 2,
                "decoder_attentions": [(3, 3, 7, 7)] * 3,
                "cross_attentions": [(3, 3, 7, 6)] * 3,
            },
        ),
    ],
    ids=["causal", "seq2seq"],
)
@torch.no_grad()
def test_hidden_states_and_attentions_are_one_per_block_of_each_side(family, positions, shapes):
    model, batch = build(family, **positions).eval(), batch_of(family)
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert {name: [tuple(values.shape) for values in outputs[name]] for name in shapes} == shapes
    side, padding = ("decoder_", batch["attention_mask"].eq(0)) if family == "seq2seq" else ("", None)
    assert_close(outputs.logits, model.lm_head(outputs[f"{side}hidden_states"][-1]), rtol=0, atol=0)
    assert outputs[f"{side}attentions"][0].triu(1).abs().max() == 0
    for name in (name for name in shapes if "attentions" in name):
        for weights in outputs[name]:
            assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=1e-5, atol=1e-5)
            if name in ("encoder_attentions", "cross_attentions"):
                assert weights.movedim(-1, 1)[padding].abs().max() == 0


@pytest.mark.parametrize("logits_to_keep", [1, 3, torch.tensor([0, 5])])
def test_logits_to_keep_gives_those_positions_only(logits_to_keep):
    model = build("causal").eval()
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    whole = model(IDS).logits
    assert_close(model(IDS, logits_to_keep=logits_to_keep).logits, whole[:, kept], rtol=1e-5, atol=1e-6)


# Router outputs


@pytest.mark.parametrize(("in_config", "argument"), [(False, None), (True, None), (True, False), (False, True)])
@every_family
def test_router_outputs_are_given_where_asked_for(family, in_config, argument):
    model = build(family, output_router_logits=in_config)
    given = in_config if argument is None else argument
    for training in (True, False):
        outputs = model.train(training)(**batch_of(family), output_router_logits=argument)
        for name in ("router_logits", "expert_indices"):
            assert bool(routing_of(outputs, name)) is given
        assert (outputs.aux_loss is not None) is (given or training)
        assert training or torch.equal(outputs.loss, outputs.task_loss)


@pytest.mark.parametrize("training", [True, False])
@every_stage
@every_family
def test_router_outputs_are_the_raw_scores_experts_and_loads_of_each_moe_layer(family, stage, training):
    model, batch = build(family, stage).train(training), batch_of(family)
    hidden = []
    for layer in model.moe_layers_by_name.values():
        layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    outputs = model(**batch, output_router_logits=True)
    scores, experts = routing_of(outputs, "router_logits"), outputs.expert_indices
    assert [tuple(index.shape) for index in experts] == SHAPES[family]
    routed = model.routed_tokens(**batch)
    for i, layer in enumerate(model.moe_layers_by_name.values()):
        assert_close(scores[i], hidden[i].flatten(0, 1) @ layer.router.centroids.T, rtol=1e-5, atol=1e-5)
        ids, mask = routed[i]
        greedy = scores[i].argmax(-1).view_as(ids)
        assert torch.equal(experts[i], greedy if training and stage == 1 else model.route(ids)[i])
        assert torch.equal(outputs.expert_load[i], experts[i][mask.bool()].bincount(minlength=5))


# Losses


@every_family
def test_the_auxiliary_loss_is_weighed_and_ends_with_stage_1(family):
    model = build(family, router_aux_loss_coef=0.25).train()
    outputs = model(**batch_of(family))
    expected = 0.3 * outputs.balance_loss + 1.0 * outputs.distillation_loss
    assert outputs.aux_loss > 0.1
    assert_close(outputs.aux_loss, expected, rtol=1e-6, atol=0)
    assert_close(outputs.loss, outputs.task_loss + 0.25 * outputs.aux_loss, rtol=1e-6, atol=0)
    model.freeze_router()
    outputs = model(**batch_of(family))
    assert outputs.aux_loss == 0
    assert torch.equal(outputs.loss, outputs.task_loss)


def test_agreement_is_the_share_of_routed_tokens_over_both_sides():
    model, batch = build("seq2seq").train(), batch_of("seq2seq")
    outputs = model(**batch, output_router_logits=True)
    agreed = total = 0
    layers = model.moe_layers_by_name.values()
    for layer, (ids, mask), index in zip(layers, model.routed_tokens(**batch), outputs.expert_indices, strict=True):
        agreed += (layer.route(ids) == index)[mask].sum().item()
        total += mask.sum().item()
    assert total == 14 + 13 + 13
    assert outputs.distillation_agreement.item() == pytest.approx(agreed / total)


@pytest.mark.parametrize("as_tensor", [False, True])
@every_family
def test_num_items_in_batch_divides_the_task_loss_and_weighs_the_auxiliary_losses(family, as_tensor):
    model = build(family).train()
    labels = IDS.clone()
    labels[:, 4] = -100
    targets = 15 if family == "causal" else 18  # a language model predicts no first token
    plain = model(input_ids=IDS, labels=labels)
    outputs = model(input_ids=IDS, labels=labels, num_items_in_batch=torch.tensor(60) if as_tensor else 60)
    for name in ("task_loss", "aux_loss", "loss"):
        assert_close(outputs[name], plain[name] * targets / 60, rtol=1e-5, atol=0)
    for name in ("balance_loss", "distillation_loss", "expert_load"):
        assert_close(outputs[name], plain[name], rtol=1e-5, atol=0)


def test_shift_labels_are_used_as_they_are_and_weigh_the_auxiliary_loss_without_labels_too():
    model, options = build("causal").train(), {"num_items_in_batch": 40}
    labels = IDS.clone()
    labels[0, 3:] = -100
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(IDS, labels=labels, **options)
    both = model(IDS, labels=labels, shift_labels=shifted, **options)
    assert_close((both.loss, both.aux_loss), (expected.loss, expected.aux_loss), rtol=1e-6, atol=0)
    alone = model(IDS, shift_labels=shifted, **options)
    assert alone.loss is None
    assert_close(alone.aux_loss, expected.aux_loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
@every_family
def test_dropout_follows_the_config_while_training_only(family, name):
    def logits(model, seed):
        set_seed(seed)
        return model(**batch_of(family)).logits

    model = build(family, 2, **{name: 0.4})
    assert not torch.allclose(logits(model.train(), 0), logits(model, 1), atol=1e-2)
    assert torch.equal(logits(model, 0), logits(model, 0))
    assert torch.equal(logits(model.eval(), 0), logits(build(family, 2, dropout=0.0).train(), 1))


def test_dropout_falls_on_embeddings_and_every_sublayer_of_the_blocks(monkeypatch):
    rates = []
    dropout = F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True: rates.append(p) or dropout(x, p, training))
    model = build("seq2seq", dropout=0.125, attention_dropout=0.25).train()
    model.set_attn_implementation("eager")
    model(**batch_of("seq2seq"))
    # Embeddings of both sides; 2 blocks of 2 sublayers and 3 blocks of 3; an attention in each but the FFNs.
    assert rates.count(0.125) == 2 + 2 * 2 + 3 * 3
    assert rates.count(0.25) == 2 + 3 * 2
    assert set(rates) == {0.125, 0.25}


# Activation checkpointing


@pytest.mark.parametrize("options", [{"use_reentrant": False}, None], ids=str)
@every_stage
@pytest.mark.parametrize("family", [*SHAPES, "classifier"])
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_activation_checkpointing_changes_neither_loss_nor_gradients(family, stage, options):
    results = []
    for checkpointed in (False, True):
        model = build(family, stage, dropout=0.1)
        runs = []
        for layer in model.moe_layers_by_name.values():
            layer.router.register_forward_hook(lambda router, *_, runs=runs: runs.append(router))
        if checkpointed:
            model.gradient_checkpointing_enable(options)
        results.append(train_step(model, batch_of(family)))
        often = {runs.count(layer.router) for layer in model.moe_layers_by_name.values()}
        assert often == {2 if checkpointed else 1}
    assert results[0].keys() == results[1].keys()
    assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_reentrant_checkpointing_is_refused(name):
    model = build("causal")
    if not hasattr(model, name):
        pytest.skip("this transformers has one name for it")
    with pytest.raises(ValueError, match=r"Re-entrant activation checkpointing .*\{'use_reentrant': False\}"):
        getattr(model, name)({"use_reentrant": True})
    assert not any(module.gradient_checkpointing for module in model.modules() if hasattr(module, "attention"))


# Parameters


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("causal", ["model.embed_tokens.weight", "lm_head.weight"]),
        ("seq2seq", ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"]),
    ],
)
def test_embeddings_and_head_are_one_parameter_unless_they_are_untied(family, names):
    model = build(family)
    embedding = model.get_input_embeddings().weight
    assert [name for name, p in model.named_parameters(remove_duplicate=False) if p is embedding] == names
    untied = build(family, tie_word_embeddings=False)
    assert len({id(p) for name, p in untied.named_parameters() if name in names}) == len(names)


@pytest.mark.parametrize("distilled_router", ["word_embedding", "counts", "cnn"])
def test_parameters_are_floating_point_and_integers_are_buffers_that_are_saved(distilled_router):
    learning = tiny_model(distilled_router=distilled_router, router_normalization="standardize", expert_bias_rate=0.1)
    frozen = copy.deepcopy(learning)
    frozen.freeze_router()
    for model in (learning, frozen):
        assert all(parameter.is_floating_point() for parameter in model.parameters())
        buffers = dict(model.named_buffers())
        assert not any(values.is_floating_point() for values in buffers.values())
        assert buffers.keys() <= model.state_dict().keys()


@every_stage
@every_family
def test_every_parameter_learns_in_stage_1_and_all_but_the_distilled_routers_in_stage_2(family, stage):
    model = build(family, stage, num_experts=3).train()
    ids = random_ids(8, 20, low=3, high=91)
    model(ids, labels=ids).loss.backward()
    replaced = {name for name, _ in model.named_parameters() if stage == 2 and "distilled_router" in name}
    assert {name for name, p in model.named_parameters() if p.grad is None} == replaced
    assert [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()] == []


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
TRANSLATION = json.loads((PRESETS / "paper-translation.json").read_text())


@pytest.mark.parametrize(
    ("config", "shared", "experts"),
    [
        (StableMoEConfig(), 124e6, 454e6),
        (StableMoEConfig(**LARGE, num_experts=64, num_expert_sublayers=6), 355e6, 3.22e9),
        (StableMoESeq2SeqConfig(), 76.9e6, 403.3e6),
        (StableMoESeq2SeqConfig(**TRANSLATION), 76.9e6, 403.3e6),
    ],
    ids=["base", "large", "translation", "translation preset"],
)
def test_models_of_the_paper_have_the_parameters_of_its_tables(config, shared, experts):
    with torch.device("meta"):
        model = (StableMoEForConditionalGeneration if config.is_encoder_decoder else StableMoEForCausalLM)(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    sizes = {name: p.numel() for name, p in model.named_parameters() if "distilled_router" not in name}
    of_experts = sum(size for name, size in sizes.items() if "expert_stack" in name)
    assert of_experts == pytest.approx(experts, rel=0.003)
    assert sum(sizes.values()) - of_experts == pytest.approx(shared, rel=0.005)


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.json")), ids=lambda path: path.stem)
def test_every_preset_builds_on_the_meta_device(path):
    config = load_preset(path)
    with torch.device("meta"):
        model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    assert len(model.moe_layers_by_name) == config.num_moe_layers > 0


def test_layers_at_one_position_are_the_sublayers_of_one_each_with_its_own_table():
    hash_layer = {"router_type": "hash", "num_expert_sublayers": 3, "moe_layer_positions": [1]}
    whole, apart = (
        tiny_model(**{**hash_layer, **how})
        for how in ({}, {"moe_layer_positions": [1, 1, 1], "num_expert_sublayers": 1})
    )
    weights = whole.state_dict()
    for index in range(3):
        for name in apart.model.moe_layers[index].expert_stack.sublayers[0].state_dict():
            ours = weights.pop(f"model.moe_layers.0.expert_stack.sublayers.{index}.{name}")
            weights[f"model.moe_layers.{index}.expert_stack.sublayers.0.{name}"] = ours
        weights[f"model.moe_layers.{index}.frozen_router.routing_table"] = (
            whole.model.moe_layers[0].frozen_router.values().int()
        )
    apart.load_state_dict(weights)
    assert_close(apart(IDS).logits, whole(IDS).logits)
    routes = torch.stack([torch.randperm(99) % 5 for _ in range(3)])
    apart.set_routing_tables(routes)
    assert all(map(torch.equal, apart.route(IDS), routes[:, IDS]))
    assert torch.equal(apart.generate(IDS, max_new_tokens=5)[:, :-5], IDS)


@every_family
def test_new_experts_change_nothing(family):
    # W2 starts at zero in every expert, so all experts are the identity until they learn.
    model = build(family).eval()
    fresh = type(model)(model.config).eval()
    nowhere = {name: [] for name in vars(model.config) if name.endswith("moe_layer_positions")}
    dense = build(family, **nowhere).eval()
    dense.load_state_dict({k: v for k, v in fresh.state_dict().items() if "moe_layers" not in k})
    assert_close(fresh(**batch_of(family)).logits, dense(**batch_of(family)).logits, rtol=1e-6, atol=1e-6)


def test_missing_weights_are_initialised_to_finite_seeded_values(tmp_path):
    dense = tiny_model(moe_layer_positions=[])
    dense.save_pretrained(tmp_path)
    loaded = []
    for _ in range(2):
        set_seed(1)
        model, info = StableMoEForCausalLM.from_pretrained(tmp_path, moe_layer_positions=[1], output_loading_info=True)
        assert len(info["missing_keys"]) == 1 + 2 + 1 + 2 * 6  # E; D, E^; the table; two sublayers of six tensors
        assert model.routing_stage == 1
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert model.model.moe_layers[0].frozen_router.routing_table.unique().tolist() == [-1]
        assert 0.9 < model.model.moe_layers[0].router.distilled_router.embedding.std() < 1.1
        assert model.model.moe_layers[0].expert_stack.sublayers[1].down_proj.abs().max() == 0
        loaded.append(model)
    assert_close(dict(loaded[0].named_parameters()), dict(loaded[1].named_parameters()), rtol=0, atol=0)
    assert_close(loaded[0].model.layers[1].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("family", "dense", "layers"),
    [
        ("causal", [""], 0),
        ("seq2seq", ["encoder_"], 2),
        ("seq2seq", ["decoder_"], 1),
        ("seq2seq", ["encoder_", "decoder_"], 0),
    ],
)
def test_a_model_or_a_side_of_it_may_be_dense(family, dense, layers):
    model = build(family, **{f"{side}moe_layer_positions": [] for side in dense}).train()
    outputs = model(**batch_of(family), output_router_logits=True)
    outputs.loss.backward()
    assert model.config.num_moe_layers == len(model.moe_layers_by_name) == layers
    assert model.route(IDS).shape == (layers, 3, 7)
    for side in dense:
        assert not outputs.get(f"{side}aux_loss")
    if layers:
        assert outputs.expert_load.shape == (layers, 5)
        assert outputs.aux_loss > 0.1
        model.freeze_router()
        assert model.routing_stage == 2
        return
    assert (outputs.aux_loss, outputs.expert_load, model.router_fingerprint()) == (0, None, None)
    assert model.eval().generate(IDS, max_new_tokens=3, min_new_tokens=3).shape[0] == 3
    with pytest.raises(ValueError, match="There is no router to freeze: `.*moe_layer_positions` "):
        model.freeze_router()


# Errors


@pytest.mark.parametrize("bad", [-1, 91, 10**6])
@pytest.mark.parametrize(
    ("family", "name"), [("causal", "input_ids")] + [("seq2seq", f"{s}input_ids") for s in ("", "decoder_")]
)
def test_token_ids_outside_the_vocabulary_are_refused(family, name, bad):
    model = build(family, **({"vocab_size": 91} if family == "causal" else {})).eval()
    ids = IDS.clone()
    ids[1, 3] = bad
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if family == "seq2seq" else {}), name: ids}
    message = rf"^There is a token id {bad}, outside 0\.\.90 of `vocab_size`; .*`resize_token_embeddings`"
    for call in (lambda: model(**inputs), lambda: model.model(**inputs), lambda: model.route(ids)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("family", "name"), [("causal", "input_ids")] + [("seq2seq", f"{s}input_ids") for s in ("", "decoder_")]
)
def test_positions_past_the_maximum_are_refused(family, name):
    model = build(family, max_position_embeddings=40)
    inputs = {
        "input_ids": random_ids(1, 5),
        **({"decoder_input_ids": random_ids(1, 5)} if family == "seq2seq" else {}),
    }
    assert model(**{**inputs, name: random_ids(1, 40, high=91)}).logits.isfinite().all()
    with pytest.raises(
        ValueError, match=r"^There is a position 40, outside 0\.\.39 of `max_position_embeddings`; shorten"
    ):
        model(**{**inputs, name: random_ids(1, 41, high=91)})


@pytest.mark.parametrize(
    ("family", "call", "message"),
    [
        ("causal", lambda model: model(), r"Pass `input_ids` or `inputs_embeds`\."),
        ("seq2seq", lambda model: model(labels=IDS), r"Pass `input_ids` or `inputs_embeds`\."),
        ("seq2seq", lambda model: model(IDS), r"The decoder has no input: pass `decoder_input_ids`, .* or `labels`\."),
        (
            "seq2seq",
            lambda model: model.model.decoder(IDS),
            r"The decoder attends to a source: pass `encoder_hidden_states`\.",
        ),
    ],
)
def test_calls_without_input_are_refused(family, call, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        call(build(family))


# Training and compiling


@every_family
def test_thirty_steps_learn_one_batch_across_the_transition(family):
    set_seed(0)
    config = build(family).config
    config.initializer_range, config.dropout = 0.02, 0.0
    model = (AutoModelForSeq2SeqLM if family == "seq2seq" else AutoModelForCausalLM).from_config(config).train()
    ids = random_ids(2, 12, low=3, high=91)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        if step == 10:
            model.freeze_router()
        outputs = model(ids, labels=ids)
        losses.append(outputs.task_loss.item())
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > 4.0
    assert losses[9] < losses[0] - 1.0
    assert losses[-1] < 0.4 * losses[0]


SMALL = {"num_hidden_layers": 1, "moe_layer_positions": [1], "num_expert_sublayers": 1}


@pytest.mark.parametrize("stage", one_fast(1, 2))
def test_a_training_pass_compiles_to_one_graph_with_its_losses_and_statistics(stage):
    model, ids = build("causal", stage, **SMALL).train(), random_ids(2, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, outputs = model(ids, labels=ids), compiled(ids, labels=ids)
    assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=0)
    assert_close(outputs.aux_loss, expected.aux_loss, rtol=1e-5, atol=0)
    assert torch.equal(outputs.expert_load, expected.expert_load)
    assert_close(outputs.routing_health, expected.routing_health, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.slow
@every_stage
def test_the_model_compiles_to_one_graph_by_inductor(stage):
    model, ids = build("causal", stage).eval(), random_ids(2, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    with torch.no_grad():
        outputs, expected = compiled(ids, labels=ids), model(ids, labels=ids)
    assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=0)
