"""Tests of the decoder-only model: outputs, losses, checkpointing, compilation, initialisation, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, set_seed

from helpers import ROOT
from helpers.models import TINY, gradients, random_ids, switch_checkpointing, tiny_config, tiny_model
from modeling_stablemoe import StableMoEConfig, StableMoEForCausalLM, StableMoEModel
from modeling_stablemoe.runs.recipes import load_preset


pytestmark = pytest.mark.pairs


IDS = random_ids()
PRESETS = ROOT / "configuration" / "models"


def frozen(**overrides) -> StableMoEForCausalLM:
    model = tiny_model(**overrides)
    model.freeze_router()
    return model


def both_stages(**overrides):
    return [tiny_model(**overrides), frozen(**overrides)]


def checkpointing_switches() -> list[str]:
    names = ["activation_checkpointing_enable", "gradient_checkpointing_enable"]
    return [name for name in names if hasattr(StableMoEForCausalLM, name)]


# Outputs


@pytest.mark.parametrize("stage", [1, 2])
def test_eager_and_sdpa_attention_agree(stage):
    model = both_stages()[stage - 1].eval()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    outputs = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        outputs[implementation] = model(IDS, attention_mask=mask).logits[mask.bool()]
    assert_close(outputs["eager"], outputs["sdpa"], rtol=1e-5, atol=1e-5)


def test_attention_is_causal():
    model = tiny_model().eval()
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 99
    before, after = model(IDS).logits, model(changed).logits
    assert_close(before[:, :-1], after[:, :-1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-3)


def test_hidden_states_are_one_more_than_blocks_and_end_in_the_output_of_the_backbone():
    model = tiny_model(num_hidden_layers=3, moe_layer_positions=[1, 3]).eval().model
    outputs = model(IDS, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    assert all(state.shape == (3, 7, 32) for state in outputs.hidden_states)
    assert_close(outputs.hidden_states[-1], outputs.last_hidden_state, rtol=0, atol=0)


def test_attentions_are_one_a_block_and_sum_to_one():
    model = tiny_model().eval()
    model.set_attn_implementation("eager")
    attentions = model(IDS, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(3, 4, 7, 7)] * 2
    assert_close(attentions[0].sum(-1), torch.ones(3, 4, 7), rtol=1e-5, atol=1e-5)
    assert attentions[0].triu(1).abs().max() == 0


def test_return_dict_false_gives_the_same_as_a_tuple():
    model = tiny_model().eval()
    loss, logits = model(IDS, labels=IDS, use_cache=False, return_dict=False)[:2]
    outputs = model(IDS, labels=IDS)
    assert_close((loss, logits), (outputs.loss, outputs.logits), rtol=0, atol=0)


@pytest.mark.parametrize("logits_to_keep", [1, 3, torch.tensor([0, 5])])
def test_logits_to_keep_gives_those_positions_only(logits_to_keep):
    model = tiny_model().eval()
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    whole = model(IDS).logits
    assert_close(model(IDS, logits_to_keep=logits_to_keep).logits, whole[:, kept], rtol=1e-5, atol=1e-6)


# Router outputs


@pytest.mark.parametrize(("in_config", "argument", "given"), [(False, None, False), (True, None, True)])
@pytest.mark.parametrize("training", [False, True])
def test_router_logits_follow_the_config_where_nothing_is_asked(in_config, argument, given, training):
    model = tiny_model(output_router_logits=in_config).train(training)
    outputs = model(IDS, labels=IDS, output_router_logits=argument)
    assert (outputs.router_logits is not None) is given
    assert (outputs.expert_indices is not None) is given


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("argument", [False, True])
def test_the_argument_beats_the_config(in_config, argument):
    model = tiny_model(output_router_logits=in_config).eval()
    outputs = model(IDS, labels=IDS, output_router_logits=argument)
    assert (outputs.router_logits is not None) is argument
    assert (outputs.aux_loss is not None) is argument


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_router_logits_are_the_raw_scores_of_each_moe_layer(stage, training):
    model = both_stages(moe_layer_positions=[1, 2])[stage - 1].train(training)
    inputs = []
    for layer in model.model.moe_layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    outputs = model(IDS, output_router_logits=True)
    assert len(outputs.router_logits) == len(outputs.expert_indices) == 2
    for layer, hidden, logits, index in zip(
        model.model.moe_layers, inputs, outputs.router_logits, outputs.expert_indices, strict=True
    ):
        assert logits.shape == (21, 5)
        assert index.shape == (3, 7)
        assert_close(logits, hidden.flatten(0, 1) @ layer.router.centroids.T, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits.exp().sum(-1), torch.ones(21))  # no (log-)softmax was taken
        if training and stage == 1:
            assert torch.equal(index.flatten(), logits.argmax(-1))


def test_aux_loss_is_zero_in_stage_2_and_positive_in_stage_1():
    for training in (False, True):
        learning, fixed = (model.train(training) for model in both_stages())
        outputs = learning(IDS, output_router_logits=True)
        expected = 0.3 * outputs.balance_loss + 1.0 * outputs.distillation_loss
        assert_close(outputs.aux_loss, expected, rtol=1e-6, atol=0)
        assert outputs.aux_loss > 0.1
        outputs = fixed(IDS, output_router_logits=True)
        assert_close(outputs.aux_loss, torch.tensor(0.0), rtol=0, atol=0)


def test_the_model_gives_aux_loss_without_labels():
    outputs = tiny_model().eval()(IDS, output_router_logits=True)
    assert outputs.loss is None
    assert outputs.aux_loss.shape == ()


# Losses


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("output_router_logits", [False, True])
def test_loss_in_evaluation_is_the_cross_entropy(stage, output_router_logits):
    model = both_stages()[stage - 1].eval()
    labels = IDS.clone()
    labels[1, 2:5] = -100
    outputs = model(IDS, labels=labels, output_router_logits=output_router_logits)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(outputs.loss, expected, rtol=1e-6, atol=0)
    assert_close(outputs.task_loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("coefficient", [1.0, 0.25, 0.0])
def test_loss_in_training_adds_the_auxiliary_loss_by_its_coefficient(coefficient):
    outputs = tiny_model(router_aux_loss_coef=coefficient).train()(IDS, labels=IDS)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert_close(outputs.task_loss, expected, rtol=1e-6, atol=0)
    assert_close(outputs.loss, outputs.task_loss + coefficient * outputs.aux_loss, rtol=1e-6, atol=0)
    assert outputs.aux_loss > 0.1


def test_loss_in_stage_2_training_is_the_task_loss():
    outputs = frozen().train()(IDS, labels=IDS)
    assert_close(outputs.loss, outputs.task_loss, rtol=0, atol=0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_in_batch_divides_the_task_loss_and_weighs_the_auxiliary_loss(as_tensor):
    model = tiny_model().train()
    labels = IDS.clone()
    labels[:, 4] = -100  # 3 sequences of 5 targets
    num_items = torch.tensor(60) if as_tensor else 60
    plain = model(IDS, labels=labels)
    outputs = model(IDS, labels=labels, num_items_in_batch=num_items)
    assert_close(outputs.task_loss, plain.task_loss * 15 / 60, rtol=1e-5, atol=0)
    assert_close(outputs.aux_loss, plain.aux_loss * 15 / 60, rtol=1e-5, atol=0)
    assert_close(outputs.loss, outputs.task_loss + outputs.aux_loss, rtol=1e-6, atol=0)


def test_two_micro_batches_of_one_batch_sum_to_its_loss_and_gradient_where_counts_do_not_matter():
    # The balance counts are per micro-batch by design, so balance is off here; see the next test for what it does.
    ids = random_ids(4)
    whole, parts = tiny_model(balance_loss_coef=0.0).train(), tiny_model(balance_loss_coef=0.0).train()
    num_items = ids[:, 1:].numel()
    expected = whole(ids, labels=ids)
    expected.loss.backward()
    losses = []
    for micro_batch in ids.split(2):
        outputs = parts(micro_batch, labels=micro_batch, num_items_in_batch=num_items)
        outputs.loss.backward()
        losses.append((outputs.loss.detach(), outputs.aux_loss.detach()))
    assert_close(sum(loss for loss, _ in losses), expected.loss.detach(), rtol=1e-5, atol=0)
    assert_close(sum(aux for _, aux in losses), expected.aux_loss.detach(), rtol=1e-5, atol=0)
    assert_close(gradients(parts), gradients(whole), rtol=1e-4, atol=1e-6)


def test_two_equal_micro_batches_sum_to_the_whole_loss_and_gradient_with_balance_too():
    half = random_ids(2)
    ids = torch.cat([half, half])
    whole, parts = tiny_model().train(), tiny_model().train()
    expected = whole(ids, labels=ids)
    expected.loss.backward()
    losses = []
    for micro_batch in ids.split(2):
        outputs = parts(micro_batch, labels=micro_batch, num_items_in_batch=ids[:, 1:].numel())
        outputs.loss.backward()
        losses.append(outputs.loss.detach())
    assert expected.balance_loss > 0.1
    assert_close(sum(losses), expected.loss.detach(), rtol=1e-5, atol=0)
    assert_close(gradients(parts), gradients(whole), rtol=1e-4, atol=1e-6)


def test_auxiliary_loss_is_weighed_by_shifted_labels_that_come_without_labels():
    model, options = tiny_model(), {"num_items_in_batch": 40, "output_router_logits": True}
    labels = IDS.clone()
    labels[0, 3:] = -100
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    alone = model(IDS, shift_labels=shifted, **options)
    both = model(IDS, labels=labels, shift_labels=shifted, **options)
    assert alone.loss is None
    assert_close(alone.aux_loss, both.aux_loss)
    assert alone.aux_loss < 0.5 * model(IDS, output_router_logits=True).aux_loss


def test_shift_labels_are_used_as_they_are():
    model = tiny_model().train()
    shifted = F.pad(IDS, (0, 1), value=-100)[:, 1:].contiguous()
    expected = model(IDS, labels=IDS, num_items_in_batch=36)
    outputs = model(IDS, labels=IDS, shift_labels=shifted, num_items_in_batch=36)
    assert_close((outputs.loss, outputs.aux_loss), (expected.loss, expected.aux_loss), rtol=1e-6, atol=0)


def test_padding_changes_no_loss():
    for model in both_stages():
        model.train()
        expected = model(IDS, labels=IDS)
        padded = F.pad(IDS, (0, 4), value=1)
        mask, labels = F.pad(torch.ones_like(IDS), (0, 4)), F.pad(IDS, (0, 4), value=-100)
        outputs = model(padded, attention_mask=mask, labels=labels)
        for name in ("loss", "task_loss", "aux_loss", "balance_loss", "distillation_loss", "expert_load"):
            assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# Activation checkpointing


@pytest.mark.parametrize("name", checkpointing_switches())
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_activation_checkpointing_changes_neither_loss_nor_gradients(stage, name):
    overrides = {"moe_layer_positions": [0, 2], "dropout": 0.1}
    plain, checkpointed = (both_stages(**overrides)[stage - 1].train() for _ in range(2))
    getattr(checkpointed, name)({"use_reentrant": False})
    reran = []
    checkpointed.model.moe_layers[0].router.register_forward_hook(lambda *_: reran.append(1))
    results = []
    for model in (plain, checkpointed):
        set_seed(1)
        outputs = model(IDS, labels=IDS, output_router_logits=True)
        outputs.loss.backward()
        results.append({**gradients(model), **{k: outputs[k].detach() for k in ("loss", "aux_loss", "expert_load")}})
        assert len(outputs.router_logits) == 2
    assert len(reran) == 2  # it was recomputed, so checkpointing was on
    assert results[0].keys() == results[1].keys()
    assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)
    assert (results[1]["model.moe_layers.0.router.centroids"] != 0).any()


@pytest.mark.parametrize("name", checkpointing_switches())
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_reentrant_checkpointing_is_refused(name):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"Re-entrant activation checkpointing .*\{'use_reentrant': False\}"):
        getattr(model, name)({"use_reentrant": True})
    assert not any(module.gradient_checkpointing for module in model.modules() if hasattr(module, "attention"))


def test_checkpointing_without_arguments_is_not_reentrant():
    model = tiny_model().train()
    switch_checkpointing(model)
    model(IDS, labels=IDS).loss.backward()
    assert model.model.moe_layers[0].router.distilled_router.embedding.grad.abs().sum() > 0


# Parameters


def test_the_head_shares_the_token_embedding_and_nothing_else_does():
    model = tiny_model()
    embedding = model.get_input_embeddings().weight
    sharing = [n for n, p in model.named_parameters(remove_duplicate=False) if p.data_ptr() == embedding.data_ptr()]
    assert sharing == ["model.embed_tokens.weight", "lm_head.weight"]
    untied = tiny_model(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("distilled_router", ["word_embedding", "counts", "cnn"])
def test_parameters_are_floating_point_and_integers_are_buffers_that_are_saved(distilled_router):
    learning = tiny_model(distilled_router=distilled_router, router_normalization="standardize", expert_bias_rate=0.1)
    frozen_one = copy.deepcopy(learning)
    frozen_one.freeze_router()
    for model in (learning, frozen_one):
        assert all(parameter.is_floating_point() for parameter in model.parameters())
        buffers = dict(model.named_buffers())
        assert not any(values.is_floating_point() for values in buffers.values())
        assert buffers.keys() <= model.state_dict().keys()


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("value", [True, False])
def test_gradients_are_switched_for_all_parameters_as_loops_do_it(is_frozen, value):
    model = frozen(moe_layer_positions=[0, 2]) if is_frozen else tiny_model(moe_layer_positions=[0, 2])
    assert model.requires_grad_(not value) is model
    for parameter in model.parameters():
        parameter.requires_grad = value
    assert {parameter.requires_grad for parameter in model.parameters()} == {value}


def test_every_parameter_has_a_gradient_in_stage_1():
    model = tiny_model(moe_layer_positions=[0, 2], num_experts=3).train()
    ids = random_ids(8, 20)
    model(ids, labels=ids).loss.backward()
    # Gradients of zero are left out by name only where the mathematics makes them zero (a key bias moves no softmax).
    without = [
        n for n, p in model.named_parameters() if p.is_floating_point() and (p.grad is None or not p.grad.any())
    ]
    assert without == []


def test_stage_2_gives_no_gradient_to_what_the_table_replaced():
    model = frozen().train()
    model(IDS, labels=IDS).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    prefix = "model.moe_layers.0."
    assert without == {
        f"{prefix}router.distilled_router.embedding",
        f"{prefix}router.distilled_router.centroids",
    }


def sizes(config: StableMoEConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = StableMoEForCausalLM(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    counts = {"experts": 0, "distilled router": 0, "shared": 0}
    for name, parameter in model.named_parameters():
        if "frozen_router" in name:
            continue
        kind = "experts" if "expert_stack" in name else "distilled router" if "distilled_router" in name else "shared"
        counts[kind] += parameter.numel()
    return counts


def test_the_base_model_of_the_paper_has_the_parameters_of_its_table():
    counts = sizes(StableMoEConfig())
    assert counts["shared"] == pytest.approx(124e6, rel=0.005)
    assert counts["experts"] == pytest.approx(454e6, rel=0.002)
    assert counts["distilled router"] == pytest.approx(2.51e6, rel=0.003)


def test_the_large_model_of_the_paper_has_the_parameters_of_its_table():
    config = StableMoEConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        num_experts=64,
        num_expert_sublayers=6,
    )
    counts = sizes(config)
    assert counts["shared"] == pytest.approx(355e6, rel=0.005)
    assert counts["experts"] == pytest.approx(3.22e9, rel=0.003)


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.json")), ids=lambda path: path.stem)
def test_every_preset_builds_on_the_meta_device(path):
    config = load_preset(path)
    with torch.device("meta"):
        model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    assert len(model.moe_layers_by_name) == config.num_moe_layers > 0


def test_initialisation_is_deterministic():
    first, second = (_fresh(seed=3) for _ in range(2))
    assert_close(dict(first.named_parameters()), dict(second.named_parameters()), rtol=0, atol=0)
    other = _fresh(seed=4)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def _fresh(seed: int) -> StableMoEForCausalLM:
    set_seed(seed)
    return StableMoEForCausalLM(tiny_config(moe_layer_positions=[0, 2]))


def test_a_new_model_is_untouched_by_its_experts():
    # W2 starts at zero in every expert, so all experts are the identity until they learn.
    set_seed(0)
    model = StableMoEForCausalLM(tiny_config()).eval()
    dense = StableMoEForCausalLM(tiny_config(moe_layer_positions=[])).eval()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "moe_layers" not in k})
    assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_missing_weights_are_initialised_to_finite_seeded_values(seed, tmp_path):
    dense = tiny_model(moe_layer_positions=[])
    dense.save_pretrained(tmp_path)
    loaded = []
    for _ in range(2):
        set_seed(seed)
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


# Where MoE layers stand


def test_the_dense_model_trains_and_generates_and_has_no_router():
    model = tiny_model(moe_layer_positions=[]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        outputs = model(IDS, labels=IDS, output_router_logits=True)
        assert_close(outputs.aux_loss, torch.tensor(0.0), rtol=0, atol=0)
        losses.append(outputs.loss.item())
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    generated = model.eval().generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (3, 10)
    assert model.route(IDS).shape == (0, 3, 7)
    assert model.router_fingerprint() is None
    with pytest.raises(ValueError, match="There is no router to freeze: `moe_layer_positions` is empty"):
        model.freeze_router()
    assert model.routing_stage == 1


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_position_is_counted_in_blocks_before_the_layer(position):
    model = tiny_model(moe_layer_positions=[position]).eval().model
    order = []
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, i=i: order.append(f"block {i + 1}"))
    model.moe_layers[0].register_forward_hook(lambda *_: order.append("experts"))
    model(IDS)
    blocks = ["block 1", "block 2"]
    assert order == [*blocks[:position], "experts", *blocks[position:]]


def test_every_moe_layer_has_parameters_and_a_routing_of_its_own():
    model = frozen(moe_layer_positions=[0, 1, 2]).eval()
    ids = torch.arange(99).unsqueeze(0)[:, :60]
    routes = model.route(ids)
    assert routes.shape == (3, 1, 60)
    assert not torch.equal(routes[0], routes[1])
    before = model(ids).logits
    for layer in model.model.moe_layers:
        backup = copy.deepcopy(layer.state_dict())
        with torch.no_grad():
            layer.expert_stack.sublayers[1].down_proj.zero_()
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)
        layer.load_state_dict(backup)
    assert_close(model(ids).logits, before, rtol=0, atol=0)


# Errors


@pytest.mark.parametrize("bad", [-1, 99, 10**6])
def test_token_ids_outside_the_vocabulary_are_refused(bad):
    model = tiny_model().eval()
    ids = IDS.clone()
    ids[1, 3] = bad
    message = rf"There is a token id {bad}, outside 0\.\.98 of `vocab_size`; .*`resize_token_embeddings`"
    for call in (model, model.model, model.route):
        with pytest.raises(ValueError, match=message):
            call(ids)


def test_positions_past_the_maximum_are_refused():
    model = tiny_model().eval()
    with pytest.raises(ValueError, match=r"There is a position 64, outside 0\.\.63 of `max_position_embeddings`"):
        model(random_ids(1, 65))
    with pytest.raises(
        ValueError, match=r"Generation may go on to position 68, outside 0\.\.63 of .* lower `max_new_tokens`"
    ):
        model.generate(random_ids(1, 60), max_new_tokens=10, min_new_tokens=10)
    assert model(random_ids(1, 64)).logits.shape == (1, 64, 99)


def test_a_call_without_input_is_refused():
    with pytest.raises(ValueError, match=r"^Pass `input_ids` or `inputs_embeds`\.$"):
        tiny_model()()


# Training and compiling


def test_thirty_steps_learn_one_batch_across_the_transition():
    model = AutoModelForCausalLM.from_config(StableMoEConfig(**TINY)).train()
    ids = random_ids(4, 16)
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
    assert losses[-1] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break_equals_eager_in_both_stages(backend):
    ids = random_ids(2, 8)
    for model in both_stages():
        model.eval()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        with torch.no_grad():
            outputs, expected = compiled(ids, labels=ids), model(ids, labels=ids)
        assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=0)


def test_a_training_pass_compiles_to_one_graph_with_its_losses_and_statistics_in_both_stages():
    ids = random_ids(2, 8)
    for model in both_stages():
        model.train()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            expected, outputs = model(ids, labels=ids), compiled(ids, labels=ids)
        assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=0)
        assert_close(outputs.aux_loss, expected.aux_loss, rtol=1e-5, atol=0)
        assert torch.equal(outputs.expert_load, expected.expert_load)
        assert_close(outputs.routing_health, expected.routing_health, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_the_backbone_alone_is_the_backbone_of_the_language_model():
    model = tiny_model().eval()
    backbone = StableMoEModel(model.config).eval()
    backbone.load_state_dict(model.model.state_dict())
    assert_close(backbone(IDS).last_hidden_state, model.model(IDS).last_hidden_state, rtol=0, atol=0)
