"""Judging a stage 1 in a real Trainer: what is logged, when it has settled, whether it is worth freezing."""

import logging

import pytest
import torch

from helpers.models import tiny_model
from helpers.trainers import BLOCKS, assert_same_weights, make_trainer, weights
from modeling_stablemoe import StageTransitionCallback
from modeling_stablemoe.measure.meter import RoutingMeter
from modeling_stablemoe.measure.verdict import Verdict, load_of


HEALTHY = {
    "distillation_agreement": 0.9,
    "distillation_agreement_by_id": 0.8,
    "load_max_over_mean": 1.2,
    "mean_gate": 0.5,
    "closed_gates": 0.0,
    "common_direction": 0.3,
}


def transition_of(trainer) -> dict:
    return next(entry for entry in trainer.state.log_history if "transition_step" in entry)


def changes_of(trainer) -> list[tuple[int, float]]:
    return [(entry["step"], entry["table_change"]) for entry in trainer.state.log_history if "table_change" in entry]


def test_logs_show_what_tells_a_healthy_stage_1_from_a_sick_one(tmp_path):
    trainer = make_trainer(tmp_path, StageTransitionCallback(6))
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    health, agreement = ("mean_gate", "closed_gates", "common_direction"), ("agreement", "agreement_by_id")
    for name in (*health, *(f"distillation_{each}" for each in agreement)):
        assert 0 <= first[name] <= 1, name
    assert first["load_max_over_mean"] >= 1
    assert "mean_gate" in last
    assert "distillation_agreement_by_id" not in last
    entry = transition_of(trainer)
    assert {f"transition_{name}" for name in (*health, *agreement, "load_max_over_mean")} <= entry.keys()


def test_logged_health_is_the_mean_over_the_tokens_since_the_last_log(tmp_path):
    model, gates = tiny_model(), []
    (layer,) = model.moe_layers_by_name.values()
    layer.router.register_forward_hook(lambda router, args, decision: gates.append(decision[-1][1].detach()))
    trainer = make_trainer(tmp_path, StageTransitionCallback(6), model=model, gradient_accumulation_steps=2)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for number, entry in enumerate(entries):
        window = torch.cat(gates[6 * number : 6 * number + 6]).flatten()
        assert entry["mean_gate"] == pytest.approx(window.mean().item(), rel=1e-5)
        assert entry["closed_gates"] == pytest.approx((window < 0.05).float().mean().item())


@pytest.mark.parametrize("k", [1, 2])
def test_the_change_of_the_table_is_weighed_by_how_often_ids_occur(tmp_path, k):
    model, tables, counts = tiny_model(distilled_router="counts", num_experts_per_tok=k), [], torch.zeros(99)
    (layer,) = model.moe_layers_by_name.values()

    def note(module, args, kwargs, output):
        counts.add_(torch.bincount(kwargs["input_ids"].flatten(), minlength=99))

    class Tables(StageTransitionCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 2 == 0:
                tables.append((layer.router.distilled_router.table().view(99, k).tolist(), counts.clone()))
            super().on_step_end(args, state, control, **kwargs)

    model.register_forward_hook(note, with_kwargs=True)
    trainer = make_trainer(tmp_path, Tables(8), model=model, logging_steps=2)
    trainer.train()
    changes = changes_of(trainer)
    assert [step for step, _ in changes] == [4, 6, 8]
    for (_, change), (before, _), (after, seen) in zip(changes, tables, tables[1:], strict=False):
        changed = [1 - len(set(was) & set(now)) / k for was, now in zip(before, after, strict=True)]
        assert change == pytest.approx(float((torch.tensor(changed) * seen).sum() / seen.sum()))
    assert changes[0][1] > 0


@pytest.mark.parametrize(
    ("change", "worth_it", "expected"), [(0.01, True, 4), (0.02, True, 4), (0.03, True, 10), (0.01, False, 10)]
)
def test_settled_is_twice_at_most_the_given_change_and_a_routing_worth_freezing(
    tmp_path, monkeypatch, change, worth_it, expected
):
    metrics = HEALTHY | ({} if worth_it else {"closed_gates": 0.9})
    monkeypatch.setattr("modeling_stablemoe.training.transition.judge", lambda meter: Verdict(metrics, 1.0, False))
    monkeypatch.setattr(
        "modeling_stablemoe.training.transition.SettlingWatch.check",
        lambda watch: watch.changes.append(change) or change,
    )
    trainer = make_trainer(tmp_path, StageTransitionCallback(10, settled_change=0.02, check_steps=2))
    trainer.train()
    assert transition_of(trainer)["step"] == expected


@pytest.mark.parametrize(("ready_at", "expected"), [(4, 4), (7, 8), (99, 11)])
def test_the_transition_is_held_until_the_routing_is_ready_or_the_bound(
    tmp_path, monkeypatch, caplog, ready_at, expected
):
    trainer = make_trainer(tmp_path, StageTransitionCallback(4, hold_until_ready=11, check_steps=2))

    def judge(meter):
        sick = {} if trainer.state.global_step >= ready_at else {"closed_gates": 0.9}
        return Verdict(HEALTHY | sick, 1.0, False)

    monkeypatch.setattr("modeling_stablemoe.training.transition.judge", judge)
    with caplog.at_level(logging.WARNING, logger="modeling_stablemoe.training.transition"):
        trainer.train()
    assert transition_of(trainer)["step"] == expected
    warnings = [record.getMessage() for record in caplog.records if "not worth freezing" in record.getMessage()]
    assert len(warnings) == (expected > 4) + (expected == 11)


def test_a_sick_routing_is_frozen_with_a_warning_that_names_the_remedies(tmp_path, caplog):
    model = tiny_model()
    (layer,) = model.moe_layers_by_name.values()
    layer.router.distilled_router.centroids.data.zero_()  # every id to expert 0
    layer.router.centroids.data.zero_()
    layer.router.centroids.data[1] = 1e-3
    with caplog.at_level(logging.WARNING, logger="modeling_stablemoe.training.transition"):
        make_trainer(tmp_path, StageTransitionCallback(2), model=model, learning_rate=0.0).train()
    (warning,) = [record.getMessage() for record in caplog.records if "not worth freezing" in record.getMessage()]
    assert "the table's load max/mean is 5.00 (wanted: 2)" in warning
    assert "Set `max_frozen_load`" in warning


@pytest.mark.parametrize(
    ("metrics", "load", "balanced_later", "complaints"),
    [
        (HEALTHY, 1.5, False, []),
        (HEALTHY, 2.5, True, []),
        (HEALTHY, None, False, []),
        (HEALTHY, 2.5, False, ["max_frozen_load"]),
        (HEALTHY | {"distillation_agreement": 0.1}, 1.0, False, ["hardly more than a hash"]),
        ({"closed_gates": 0.6}, 3.0, False, ["max_frozen_load", "center_balance_loss"]),
    ],
)
def test_what_speaks_against_freezing(metrics, load, balanced_later, complaints):
    problems = Verdict(metrics, load, balanced_later).problems()
    assert len(problems) == len(complaints)
    assert all(complaint in problem for complaint, problem in zip(complaints, problems, strict=True))


@pytest.mark.parametrize(("num_experts", "wanted"), [(2, 0.57), (4, 0.36), (8, 0.25), (32, 0.17)])
def test_the_agreement_that_is_wanted_is_further_from_chance_than_a_hash(num_experts, wanted):
    for agreement in (wanted - 0.01, wanted + 0.01):
        metrics = HEALTHY | {"distillation_agreement": agreement}
        problems = Verdict(metrics, None, False, chance=1 / num_experts).problems()
        assert len(problems) == (agreement < wanted)
        assert all(f"(wanted: {wanted:.0%}, chance: {1 / num_experts:.0%})" in problem for problem in problems)


def test_the_transition_says_what_balance_has_cost(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path, StageTransitionCallback(6), model=tiny_model(max_frozen_load=1.1, distilled_router="counts")
    )
    trainer.train()
    entry, output = transition_of(trainer), capsys.readouterr().out
    assert entry["transition_table_load_max_over_mean"] < entry["transition_unbalanced_load_max_over_mean"]
    assert 0 <= entry["transition_agreement_gap"] <= entry["transition_agreement_given_up"] < 1
    kept, given_up = (entry[f"transition_{name}"] for name in ("expected_agreement", "agreement_given_up"))
    assert f"it keeps {kept:.1%} of the choices of all of stage 1, {given_up:.1%} fewer" in output


def test_the_transition_names_the_ids_that_have_an_expert_of_their_own(capsys, tmp_path):
    model = tiny_model(max_frozen_load=1.1, distilled_router="counts")
    rows = [{"input_ids": torch.cat([torch.full((8,), 7), row["input_ids"]])} for row in BLOCKS]
    trainer = make_trainer(tmp_path, StageTransitionCallback(6), model=model, train_dataset=rows)
    trainer.train()
    entry, output = transition_of(trainer), capsys.readouterr().out
    table = model.model.moe_layers[0].frozen_router.values()
    assert (table == table[7]).sum() == 1
    assert entry["transition_ids_above_limit"] == 1
    assert 1 < entry["transition_largest_shared_load"] <= 1.1 + 1e-6 < entry["transition_table_load_max_over_mean"]
    assert "within 1.10, but for the heaviest ids, it keeps" in output
    assert "Token id(s) 7 alone outweigh the limit: each has an expert of its own" in output


@pytest.mark.parametrize("k", [1, 2])
def test_a_resumed_run_goes_on_watching(tmp_path, k):
    def train(**arguments):
        trainer = make_trainer(
            tmp_path,
            StageTransitionCallback(12, settled_change=0.2, check_steps=1),
            model=tiny_model(distilled_router="counts", num_experts_per_tok=k),
            save_strategy="steps",
            save_steps=3,
            logging_steps=1,
        )
        trainer.train(**arguments)
        return trainer

    whole = train()
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert changes_of(resumed) == changes_of(whole)
    assert transition_of(resumed) == pytest.approx(transition_of(whole))
    assert_same_weights(weights(resumed.model), weights(whole.model))


def test_counts_of_earlier_parts_of_a_run_are_added():
    meter = RoutingMeter(tiny_model())
    assert meter.counted_tokens() is None
    meter.resume_counts(torch.ones(1, 99))
    assert meter.counted_tokens().sum() == 99
    ids = torch.stack([block["input_ids"] for block in BLOCKS[:2]])
    meter.model.train()(input_ids=ids, labels=ids)
    assert meter.counted_tokens().sum() == 99 + 32


def test_a_token_of_several_experts_is_one_token():
    meter = RoutingMeter(tiny_model(num_experts_per_tok=3, moe_layer_positions=[0, 2]))
    ids = torch.stack([block["input_ids"] for block in BLOCKS[:2]])
    output = meter.model.train()(input_ids=ids, labels=ids)
    meter.end_step()
    totals = meter.pop_window()
    assert [totals.total(name) for name in ("tokens", "tokens_read", "tokens_of_stage1")] == [32] * 3
    assert totals.load.sum(-1).tolist() == [96, 96]
    metrics = totals.metrics(stage=1)
    for name in ("balance_loss", "distillation_loss", "distillation_agreement"):
        assert metrics[name] == pytest.approx(float(output[name].detach()))


def test_loads_are_sums_of_counts():
    load = load_of(torch.tensor([[0, 1, 1]]), torch.tensor([[5, 2, 4]]), 3)
    assert load.tolist() == [[5.0, 6.0, 0.0]]
    load = load_of(torch.tensor([[[0, 1], [1, 2], [1, 0]]]), torch.tensor([[5, 2, 4]]), 3)
    assert load.tolist() == [[9.0, 11.0, 2.0]]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"settled_change": 1.0}, "`settled_change` is a share"),
        ({"settled_change": True}, "`settled_change` is a share"),
        ({"hold_until_ready": 0}, "`hold_until_ready` must be at least 1 step"),
        ({"hold_until_ready": 1.5}, "`hold_until_ready` as a share"),
        ({"hold_until_ready": "x"}, "`hold_until_ready` must be an int"),
        ({"check_steps": 0}, "`check_steps` must be an integer >= 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        StageTransitionCallback(4, **arguments)


def test_the_bound_must_lie_between_the_transition_and_the_end():
    with pytest.raises(ValueError, match="ends at step 3, before the transition at step 5"):
        StageTransitionCallback(5, hold_until_ready=3).resolve_last_step(10)
    with pytest.raises(ValueError, match="`hold_until_ready` of 11 steps is longer than training"):
        StageTransitionCallback(5, hold_until_ready=11).resolve_last_step(10)
    assert StageTransitionCallback(5, hold_until_ready=0.8).resolve_last_step(10) == 8


def test_a_router_without_a_table_cannot_settle(tmp_path):
    callback = StageTransitionCallback(4, settled_change=0.1)
    with pytest.raises(ValueError, match="`settled_change` watches a table"):
        make_trainer(tmp_path, callback, model=tiny_model(distilled_router="bigram")).train()
