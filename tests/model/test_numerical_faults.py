"""Numbers that are not finite, experts without tokens or with all of them, batches without anything to learn from."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from helpers.logs import recorded_warnings
from helpers.matrices import one_fast
from helpers.models import COUNTING, Decision, gradients, random_ids, tiny_model, tiny_seq2seq_model
from helpers.trainers import assert_same_weights, make_trainer
from modeling_stablemoe import RoutingStatisticsCallback, StageTransitionCallback
from modeling_stablemoe.measure.meter import RoutingMeter


pytestmark = pytest.mark.pairs


KINDS = {
    "stable": {},
    "counts": COUNTING,
    "bigram": {"distilled_router": "bigram"},
    "switch": {"router_type": "switch"},
    "base": {"router_type": "base"},
    "hash": {"router_type": "hash"},
}
FAMILIES = {"causal": tiny_model, "seq2seq": tiny_seq2seq_model}
BACKENDS = ["eager", "grouped_mm", "batched_mm"]
CASES = [(kind, 1) for kind in KINDS] + [("stable", 2), ("counts", 2), ("bigram", 2)]
every_case = pytest.mark.parametrize(("kind", "stage"), CASES)
every_family = pytest.mark.parametrize("family", FAMILIES)
# Every router in a language model, some in an encoder and a decoder.
every_model = pytest.mark.parametrize(
    ("family", "kind", "stage"),
    [
        *(("causal", *case) for case in CASES),
        ("seq2seq", "counts", 1),
        ("seq2seq", "base", 1),
        ("seq2seq", "stable", 2),
    ],
)
every_bad = pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
IDS = random_ids(low=3, high=90)
NONE = torch.full_like(IDS, -100)
PADDING = torch.zeros_like(IDS)


def build(kind: str, family: str = "causal", stage: int = 1, **overrides):
    model = FAMILIES[family](**(KINDS[kind] | overrides))
    if stage == 2:
        model.freeze_router()
    return model.train()


def layers_of(model) -> list:
    return list(model.moe_layers_by_name.values())


def spoil(model, bad: float, where=(0, 4)):
    """Put `bad` into the hidden state of some tokens at the input of every MoE layer; gives a function that ends it."""

    def hook(layer, args):
        hidden = args[0].clone()
        hidden[where] = bad
        return hidden, *args[1:]

    hooks = [layer.register_forward_pre_hook(hook) for layer in layers_of(model)]
    return lambda: [hook.remove() for hook in hooks]


def statistics_of(model) -> dict[str, torch.Tensor]:
    """All that is followed without a gradient: integers, so equal means equal to the bit."""
    return {
        name: parameter.clone()
        for name, parameter in model.named_parameters()
        if not parameter.is_floating_point() and "frozen_router" not in name
    }


def finite_statistics(model) -> bool:
    memories = [layer.router.memory() for layer in layers_of(model) if layer.router.memory is not None]
    return all(bool(values.isfinite().all()) for memory in memories for values in memory.values())


def assert_finite_gradients(model):
    assert [name for name, gradient in gradients(model).items() if not gradient.isfinite().all()] == []


@pytest.fixture
def warned():
    with recorded_warnings("modeling_stablemoe") as messages:
        yield messages


# Hidden states that are not finite


@pytest.mark.parametrize(
    ("kind", "stage", "backend", "bad"),
    [(*CASES[i], BACKENDS[i % 3], [torch.nan, torch.inf][i % 2]) for i in range(len(CASES))],
)
@torch.no_grad()
def test_a_bad_token_leaves_the_other_tokens_of_its_layer_alone(kind, stage, backend, bad):
    model = build(kind, stage=stage, moe_layer_positions=[0]).eval()
    model.set_experts_implementation(backend)
    (layer,), hidden = layers_of(model), []
    layer.register_forward_hook(lambda module, args, output: hidden.append(output))
    model(IDS)
    spoil(model, bad)
    model(IDS)
    good, spoiled = hidden
    others = torch.ones(IDS.shape, dtype=torch.bool)
    others[0, 4] = False
    # A product over one token more is rounded otherwise.
    assert_close(spoiled[others], good[others], rtol=1e-5, atol=1e-6)
    assert not spoiled[0, 4].isfinite().any()


@every_model
def test_a_bad_token_spoils_the_loss_for_all_to_see_but_no_other_row_and_no_statistic(kind, stage, family):
    sound, sick = (build(kind, family, stage).train(kind != "base") for _ in range(2))  # BASE balances whole batches
    spoil(sick, torch.nan)
    good, spoiled = (model(IDS, labels=IDS, output_router_logits=True) for model in (sound, sick))
    assert spoiled.loss.isnan()
    assert_close(spoiled.logits[1:], good.logits[1:], rtol=1e-5, atol=1e-5)
    assert spoiled.aux_loss.isfinite()
    assert torch.equal(spoiled.expert_load.sum(-1), good.expert_load.sum(-1))
    assert finite_statistics(sick)
    spoiled.loss.backward()
    # Nor is the gradient hidden: a loss scaler skips this step.
    assert not all(gradient.isfinite().all() for gradient in gradients(sick).values())


@every_bad
@every_family
def test_to_statistics_and_counts_a_bad_token_is_padding(family, bad):
    # The layer stands before the first block: attention brings nothing to it.
    only_first = {"moe_layer_positions": [0]} if family == "causal" else {"encoder_moe_layer_positions": [0]}
    if family == "seq2seq":
        only_first["decoder_moe_layer_positions"] = []
    spoiled, padded = (build("counts", family, **only_first) for _ in range(2))
    for model in (spoiled, padded):
        model(IDS.flip(0), labels=IDS)
    stop = spoil(spoiled, bad, (0, -1))
    spoiled(IDS, labels=IDS)
    mask = torch.ones_like(IDS)
    mask[0, -1] = 0
    padded(IDS, attention_mask=mask, labels=IDS)
    assert_same_weights(statistics_of(spoiled), statistics_of(padded))
    stop()
    spoil(spoiled, bad, slice(None))
    before = statistics_of(spoiled)
    spoiled(IDS, labels=IDS)
    assert_same_weights(statistics_of(spoiled), before)


@pytest.mark.parametrize("huge", [1e19, 3e38])
def test_squares_that_overflow_leave_the_running_variance_finite(huge):
    model = build("counts")
    spoil(model, huge, (slice(None), slice(3, None)))
    for _ in range(3):
        model(IDS, labels=IDS)
    assert finite_statistics(model)
    (layer,) = layers_of(model)
    assert layer.router.memory()["tokens"].item() == 3 * IDS.numel()


def test_a_score_that_overflows_has_no_gradient_and_leaves_that_of_the_others_finite():
    (layer,) = layers_of(build("stable"))
    hidden = torch.rand(1, 6, 32) + 0.1
    hidden[0, 2] = 1e30
    hidden.requires_grad_()
    with torch.no_grad():
        layer.router.centroids[1] = 1e12
    decision = Decision.of(layer.router(hidden, IDS[:1, :6]))
    (decision.router_logits * torch.arange(5)).sum().backward()
    assert decision.router_logits.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert layer.router.centroids.grad.isfinite().all()
    assert (layer.router.centroids.grad[1].abs() < 1e3).all()  # the token of 1e30 is not in it


@every_bad
@pytest.mark.parametrize("where", [(0, 4), (slice(None), 0), slice(None)])
def test_base_balances_tokens_with_bad_states_too(bad, where):
    model = build("base")
    spoil(model, bad, where)
    outputs = model(IDS, labels=IDS)
    assert outputs.expert_load.amax() - outputs.expert_load.amin() <= 1
    assert outputs.expert_load.sum() == IDS.numel()


def test_vectors_are_routed_as_the_nearest_token_whatever_else_is_not_finite():
    model = build("stable").eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    vectors = model.model.embed_tokens(torch.tensor([[3, 9, 98]])).detach()
    assert model.model.nearest_token_ids(vectors).tolist() == [[3, 9, 98]]
    vectors[0, 1] = torch.nan
    first, bad, last = model.model.nearest_token_ids(vectors)[0].tolist()
    assert (first, last) == (3, 98)
    assert 0 <= bad < 99
    assert model(inputs_embeds=vectors).logits.shape == (1, 3, 99)


@every_family
@pytest.mark.parametrize("kind", ["stable", "hash"])
def test_logs_show_nan_where_there_was_some_and_nowhere_else(kind, family):
    model = build(kind, family)
    meter = RoutingMeter(model)
    stop = spoil(model, torch.nan)
    model(IDS, labels=IDS)
    meter.end_step()
    spoiled = meter.pop_window().metrics(model.routing_stage)
    assert {name for name, value in spoiled.items() if not math.isfinite(value)} == {"task_loss", "common_direction"}
    stop()
    model(IDS, labels=IDS)
    meter.end_step()
    assert json.dumps(meter.pop_window().metrics(model.routing_stage), allow_nan=False)


# Freezing what has diverged


@pytest.mark.parametrize(("kind", "settings"), [("stable", {}), ("counts", {}), ("stable", {"max_frozen_load": 1.5})])
def test_a_table_of_bad_weights_follows_the_rule_and_is_warned_of_by_its_layer(kind, settings, warned):
    model = build(kind, "seq2seq", **settings)
    model(IDS, labels=IDS)
    second = layers_of(model)[1].router.distilled_router
    unseen = 2
    with torch.no_grad():
        second.embedding[unseen] = torch.nan
    model.freeze_router()
    tables = torch.stack([layer.frozen_router.values() for layer in layers_of(model)])
    assert tables.min() >= 0
    assert tables.max() < 5
    if "max_frozen_load" not in KINDS[kind] | settings:
        assert tables[1, unseen] == 0
    (message,) = [text for text in warned if "is frozen although" in text]
    assert "`model.decoder.moe_layers.0`" in message
    assert "embedding hold NaN" in message
    assert "lower the learning rate" in message


def test_sound_weights_are_frozen_without_a_word(warned):
    build("stable").freeze_router()
    assert warned == []


def test_bad_weights_that_would_be_frozen_as_they_are_are_refused_by_their_layer():
    model = build("bigram", "seq2seq")
    with torch.no_grad():
        layers_of(model)[2].router.distilled_router.embedding[3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"`model\.decoder\.moe_layers\.1` cannot be frozen: embedding hold NaN"):
        model.freeze_router()
    assert model.routing_stage == 1
    assert not any(layer.frozen_router.is_frozen for layer in layers_of(model))


def spoil_step(trainer, number: int):
    """Let one training pass of a run meet NaN, from which the optimizer spreads it everywhere."""
    passes = []

    def hook(layer, args):
        passes.append(None)
        return (args[0] * torch.nan if len(passes) == number else args[0], *args[1:])

    layers_of(trainer.model)[0].register_forward_pre_hook(hook)


@pytest.mark.parametrize("kind", one_fast("counts", "stable"))
def test_a_run_that_has_diverged_still_freezes_and_its_logs_say_so(kind, tmp_path, warned):
    settings = {"max_steps": 6, "logging_steps": 2, "save_strategy": "steps", "save_steps": 6}
    trainer = make_trainer(tmp_path, StageTransitionCallback(4), model=build(kind), **settings)
    spoil_step(trainer, 3)
    trainer.train()
    assert trainer.model.routing_stage == 2
    assert not all(p.isfinite().all() for p in trainer.model.parameters())
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    logs = {entry["step"]: entry for entry in state["log_history"] if "task_loss" in entry}
    assert math.isfinite(logs[2]["task_loss"])
    assert math.isnan(logs[4]["task_loss"])
    (entry,) = [entry for entry in state["log_history"] if "transition_step" in entry]
    assert math.isnan(entry["transition_common_direction"])
    assert any("NaN or infinite weights" in text for text in warned)


def test_a_run_that_has_diverged_stops_where_weights_would_be_frozen(tmp_path):
    trainer = make_trainer(tmp_path, StageTransitionCallback(4), model=build("bigram"), max_steps=6)
    spoil_step(trainer, 3)
    with pytest.raises(ValueError, match=r"`model\.moe_layers\.0` cannot be frozen"):
        trainer.train()


# Experts without tokens, and one with all


def test_an_expert_without_tokens_only_decays_and_its_bias_revives_it():
    small = {"num_attention_heads": 1, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = tiny_model(expert_bias_rate=0.5, balance_loss_coef=0.0, **small).train()
    (layer,), dead = layers_of(model), 4
    with torch.no_grad():
        layer.router.memory.expert_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, -18.0]).view(torch.int32))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.1)
    experts = list(layer.expert_stack.parameters())

    def step() -> int:
        outputs = model(IDS, labels=IDS)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return outputs.expert_load[0, dead].item()

    start = [parameter.detach()[dead].clone() for parameter in experts]
    assert not any(step() for _ in range(20))
    assert layer.router.memory()["expert_bias"][dead] == -8.0  # 0.5 up at every step
    decayed = [parameter.detach()[dead] for parameter in experts]
    assert_close(decayed, [values * (1 - 1e-3 * 0.1) ** 20 for values in start], rtol=1e-4, atol=0)
    assert not any(optimizer.state[parameter]["exp_avg"][dead].any() for parameter in experts)
    assert any(step() for _ in range(100))
    assert all(optimizer.state[parameter]["exp_avg"][dead].any() for parameter in experts)
    assert all(bool(parameter.isfinite().all()) for parameter in learned)


@pytest.mark.parametrize(("router", "largest"), [("stable", 5 - 1), ("switch", 5)])
def test_one_expert_with_all_tokens_costs_the_most(router, largest):
    model = build("stable", router_type=router, distilled_router="word_embedding")
    (layer,) = layers_of(model)
    with torch.no_grad():
        layer.router.centroids.fill_(-1.0)[2] = 1.0
    layer.register_forward_pre_hook(lambda module, args: (args[0].abs() + 0.5, *args[1:]))
    meter = RoutingMeter(model)
    outputs = model(IDS, labels=IDS)
    outputs.loss.backward()
    meter.end_step()
    assert outputs.expert_load.tolist() == [[0, 0, 21, 0, 0]]
    metrics = meter.pop_window().metrics(1)
    assert (metrics["load_max_over_mean"], metrics["load_min_over_mean"]) == (5, 0)
    gate = outputs.routing_health.mean_gate.item()
    assert gate > 0.99
    assert outputs.balance_loss.item() == pytest.approx(largest * gate, rel=1e-5)
    assert_finite_gradients(model)


@every_family
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2)])
def test_base_with_fewer_tokens_than_experts_gives_none_two(shape, family):
    model = build("base", family)
    ids = IDS[: shape[0], : shape[1]]
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.expert_load.max() == 1
    assert (outputs.expert_load.sum(-1) == ids.numel()).all()
    assert_finite_gradients(model)


# Batches without anything to learn from


def weighted(outputs, model) -> float:
    return model.config.router_aux_loss_coef * outputs.aux_loss.item()


@every_model
def test_a_batch_of_padding_alone_is_harmless(kind, stage, family):
    model = build(kind, family, stage)
    model(IDS, labels=IDS)
    before, meter = statistics_of(model), RoutingMeter(model)
    outputs = model(IDS, attention_mask=PADDING, labels=NONE)
    outputs.loss.backward()
    meter.end_step()
    assert outputs.logits.isfinite().all()
    assert outputs.task_loss.item() == 0.0
    assert_finite_gradients(model)
    if family == "causal":
        assert outputs.loss.item() == outputs.aux_loss.item() == 0.0
        assert outputs.expert_load.sum() == 0
        assert_same_weights(statistics_of(model), before)
        assert not any(gradient.any() for gradient in gradients(model).values())
        # Means over no tokens are left out; the loads have none to compare.
        metrics = meter.pop_window().metrics(model.routing_stage)
        shares = {"load_max_over_mean", "load_min_over_mean", "load_entropy"}
        assert metrics.keys() == {"routing_stage", "dead_experts", *shares}
        assert all(math.isnan(metrics[name]) for name in shares)
        assert metrics["dead_experts"] == outputs.expert_load.numel()
    else:
        # An empty target still has the token that it begins with: one a row is routed.
        assert outputs.expert_load.sum(-1).tolist() == [0, 3, 3]
        assert outputs.loss.item() == pytest.approx(weighted(outputs, model))
    with torch.no_grad():
        assert model.eval()(IDS, attention_mask=PADDING, labels=NONE).loss.item() == 0.0


@every_family
@pytest.mark.parametrize("num_items", [None, torch.tensor(0), 10], ids=str)
@pytest.mark.parametrize("kind", ["stable", "hash"])
def test_tokens_without_targets_have_no_task_loss_whatever_it_is_divided_by(kind, num_items, family):
    model = build(kind, family)
    # Else its targets of -100 would be padding.
    target = {"decoder_input_ids": IDS, "decoder_attention_mask": torch.ones_like(IDS)} if family == "seq2seq" else {}
    outputs = model(IDS, labels=NONE, num_items_in_batch=num_items, **target)
    assert (outputs.expert_load.sum(-1) == IDS.numel()).all()
    outputs.loss.backward()
    assert outputs.task_loss.item() == 0.0
    # They are routed, and so balanced; of a batch that is told its items they are no share.
    assert (outputs.aux_loss.item() != 0.0) == (num_items is None and kind == "stable")
    assert outputs.loss.item() == pytest.approx(weighted(outputs, model))
    assert_finite_gradients(model)


@every_family
@pytest.mark.parametrize("kind", ["stable", "base"])
def test_an_empty_micro_batch_adds_nothing_to_the_gradient_of_a_step(kind, family):
    with_it, without = build(kind, family), build(kind, family)
    count = with_it.count_targets(IDS)
    for model in (with_it, without):
        model(IDS, labels=IDS, num_items_in_batch=count).loss.backward()
    with_it(IDS, attention_mask=PADDING, labels=NONE, num_items_in_batch=count).loss.backward()
    assert_same_weights(gradients(with_it), gradients(without))


@pytest.mark.parametrize("family", one_fast(*FAMILIES))
def test_a_run_with_a_batch_without_targets_trains_on_and_logs_finite_numbers(family, tmp_path):
    blocks = [{"input_ids": row} for row in random_ids(8, 6, seed=1)]

    def collate(rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        empty = ids[0, 0] == blocks[2]["input_ids"][0]
        return {"input_ids": ids, "labels": torch.full_like(ids, -100) if empty else ids}

    trainer = make_trainer(
        tmp_path,
        RoutingStatisticsCallback(),
        model=build("stable", family, vocab_size=99),
        train_dataset=blocks,
        max_steps=8,
        per_device_train_batch_size=1,
        logging_steps=1,
        data_seed=0,
    )
    trainer.data_collator = collate
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 8
    assert json.dumps(logs, allow_nan=False)
    assert sum("task_loss" not in entry for entry in logs) == 1
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


# Short sequences


@every_case
def test_sequences_of_one_token_have_nothing_to_predict_and_are_routed(kind, stage):
    model, ids = build(kind, stage=stage), IDS[:3, :1]
    for num_items in (None, 4):
        outputs = model(ids, labels=ids, num_items_in_batch=num_items)
        outputs.loss.backward()
        assert outputs.task_loss.item() == 0.0
        assert outputs.loss.item() == pytest.approx(weighted(outputs, model))
        assert outputs.expert_load.sum() == 3
        assert_finite_gradients(model)
    assert model.eval()(ids, labels=ids).loss.item() == 0.0


NO_TOKEN = r"There is no token: `{}` has shape \({}.*Pass one sequence at least, of one token at least"


@every_family
def test_input_without_any_token_is_refused(family):
    model = build("stable", family)
    empty = IDS[:, :0]
    with pytest.raises(ValueError, match=NO_TOKEN.format("input_ids", "3, 0")):
        model(empty, labels=IDS)
    with pytest.raises(ValueError, match=NO_TOKEN.format("input_ids", "0, 7")):
        model(IDS[:0], labels=IDS[:0])
    with pytest.raises(ValueError, match=NO_TOKEN.format("inputs_embeds", "3, 0")):
        model(inputs_embeds=torch.zeros(3, 0, model.config.hidden_size), labels=IDS)
    with pytest.raises(ValueError, match=NO_TOKEN.format("input_ids", "1, 0")):
        model.eval().generate(empty[:1], max_new_tokens=2)


def test_a_target_without_any_position_is_refused():
    model = build("stable", "seq2seq")
    with pytest.raises(ValueError, match=r"There is no target: `labels` has shape \(3, 0\). An empty target is one"):
        model(IDS, labels=IDS[:, :0])
    with pytest.raises(ValueError, match=NO_TOKEN.format("input_ids", "3, 0")):
        model(IDS, decoder_input_ids=IDS[:, :0])
