"""The routing statistics in the Trainer's logs."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback

from helpers.models import random_ids, tiny_model, tiny_seq2seq_model
from helpers.trainers import (
    BLOCKS,
    PAIRS,
    STATISTICS,
    Recorder,
    assert_same_weights,
    make_seq2seq_trainer,
    make_trainer,
    training_logs,
    weights,
)
from modeling_stablemoe import RoutingFluctuationCallback, RoutingStatisticsCallback, StageTransitionCallback
from modeling_stablemoe.measure.meter import LayerLoads
from modeling_stablemoe.training import RoutingTrainer, TrainingClockCallback
from modeling_stablemoe.training.logging_callback import TrainingStopwatch


# What is logged


@pytest.mark.parametrize(("trainer_class", "order"), [(Trainer, 1), (RoutingTrainer, -1)])
def test_statistics_reach_the_history_and_reporters(tmp_path, trainer_class, order):
    recorder = Recorder()
    callbacks = [StageTransitionCallback(6), recorder][::order]
    trainer = make_trainer(tmp_path, *callbacks, trainer_class=trainer_class)
    trainer.train()
    for logs in (training_logs(trainer.state.log_history), training_logs(recorder.logs)):
        assert [entry["step"] for entry in logs] == [3, 6, 9, 12]
        for entry in logs[:2]:
            assert entry.keys() >= STATISTICS
        for entry in logs[2:]:
            assert entry.keys() & STATISTICS == {"task_loss", "load_max_over_mean", "routing_stage"}
        assert [entry["routing_stage"] for entry in logs] == [1, 2, 2, 2]
    for logged, reported in zip(training_logs(trainer.state.log_history), training_logs(recorder.logs), strict=True):
        assert {name: logged.get(name) for name in STATISTICS} == {name: reported.get(name) for name in STATISTICS}
    [entry] = [entry for entry in recorder.logs if "transition_step" in entry]
    assert ("loss" in entry) == (trainer_class is Trainer)  # with the next log, or at once


def test_a_check_between_two_logs_is_reported_with_the_next_one_or_at_once(tmp_path):
    for trainer_class, steps in ((Trainer, [3, 6]), (RoutingTrainer, [2, 4, 6])):
        recorder, watch = Recorder(), RoutingFluctuationCallback(BLOCKS, check_steps=2, num_tokens=64)
        trainer = make_trainer(tmp_path, watch, recorder, trainer_class=trainer_class, max_steps=6)
        trainer.train()
        reported = {
            entry["step"]: entry["routing_fluctuation"] for entry in recorder.logs if "routing_fluctuation" in entry
        }
        kept = [entry for entry in trainer.state.log_history if "routing_fluctuation" in entry]
        assert [entry["step"] for entry in kept] == [2, 4, 6]
        assert list(reported) == steps
        assert reported[6] == kept[-1]["routing_fluctuation"]


def test_task_loss_of_the_log_is_the_loss_without_the_weighted_auxiliary_losses(tmp_path):
    model = tiny_model(moe_layer_positions=[0, 2], balance_loss_coef=0.7, distillation_loss_coef=0.4)
    trainer = make_trainer(tmp_path, StageTransitionCallback(7), model=model, gradient_accumulation_steps=3)
    trainer.train()
    for entry in training_logs(trainer.state.log_history):
        auxiliary = 0.7 * entry.get("balance_loss", 0.0) + 0.4 * entry.get("distillation_loss", 0.0)
        assert entry["task_loss"] == pytest.approx(entry["loss"] - auxiliary, abs=1e-5), entry["step"]


def test_logged_numbers_do_not_depend_on_the_accumulation(tmp_path):
    logs = []
    for batch_size, accumulation in ((6, 1), (2, 3)):
        # Without balance loss: its counts are those of a micro-batch, as documented.
        trainer = make_trainer(
            tmp_path,
            StageTransitionCallback(6),
            model=tiny_model(balance_loss_coef=0.0),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-3,
        )
        trainer.train()
        logs.append(training_logs(trainer.state.log_history))
    for whole, accumulated in zip(*logs, strict=True):
        for name in STATISTICS - {"balance_loss"}:
            assert (name in whole) == (name in accumulated)
            assert whole.get(name, 0) == pytest.approx(accumulated.get(name, 0), abs=1e-5), name


def collate_padded(rows):
    """Right padding, masked out, and prompts without labels."""
    length = max(len(row["input_ids"]) for row in rows)
    batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
    for row in rows:
        ids, missing = row["input_ids"], length - len(row["input_ids"])
        batch["input_ids"].append(F.pad(ids, (0, missing), value=1))
        batch["attention_mask"].append(F.pad(torch.ones_like(ids), (0, missing)))
        labels = ids.clone()
        labels[: row["prompt"]] = -100
        batch["labels"].append(F.pad(labels, (0, missing), value=-100))
    return {name: torch.stack(rows) for name, rows in batch.items()}


def recompute(passes) -> dict[str, float]:
    """The statistics of some forward passes, token by token."""
    task, targets, tokens, balance, distillation, agreed, uncertainty = [0.0] * 7
    load = torch.zeros(2, 5)
    for batch in passes:
        shifted = batch["labels"][:, 1:]
        task += F.cross_entropy(batch["logits"][:, :-1].flatten(0, 1), shifted.flatten(), reduction="sum").item()
        targets += (shifted != -100).sum().item()
        real = batch["attention_mask"].flatten().bool()
        tokens += real.sum().item()
        for layer, (scores, distilled) in enumerate(zip(batch["scores"], batch["distilled"], strict=True)):
            scores, distilled = scores[real], distilled.flatten(0, 1)[real]
            chosen = scores.argmax(-1)
            count = torch.bincount(chosen, minlength=5).float()
            load[layer] += count
            fair = len(scores) / 5
            for expert in range(5):
                gates = torch.sigmoid(scores[chosen == expert, expert]).sum()
                balance += ((count[expert] - fair) / fair * gates).item()
            distillation -= distilled.log_softmax(-1)[torch.arange(len(chosen)), chosen].sum().item()
            agreed += (distilled.argmax(-1) == chosen).float().sum().item() / 2
            uncertainty += torch.distributions.Categorical(logits=scores).entropy().sum().item() / math.log(5) / 2
    of_layers = [torch.distributions.Categorical(row).entropy().item() / math.log(5) for row in load]
    return {
        "task_loss": task / targets,
        "balance_loss": balance / tokens,
        "distillation_loss": distillation / tokens,
        "distillation_agreement": agreed / tokens,
        "load_max_over_mean": (load.amax(-1) / load.mean(-1)).max().item(),
        "router_entropy": uncertainty / tokens,
        "load_entropy": min(of_layers),
        "load_entropy/layer_0": of_layers[0],
        "load_entropy/layer_1": of_layers[1],
        "dead_experts": (load == 0).sum().item(),
        "dead_experts/layer_1": (load[1] == 0).sum().item(),
    }


def test_statistics_equal_a_recomputation_with_padding_prompts_and_two_layers(tmp_path):
    model, passes = tiny_model(moe_layer_positions=[0, 2], output_router_logits=True), []

    @torch.no_grad()
    def keep(module, args, kwargs, output):
        if module.training:
            layers = module.moe_layers_by_name.values()
            distilled = [layer.router.distilled_router(kwargs["input_ids"]) for layer in layers]
            passes.append({**kwargs, "logits": output.logits, "scores": output.router_logits, "distilled": distilled})

    model.register_forward_hook(keep, with_kwargs=True)
    rows = [
        {"input_ids": row[: 5 + index % 11], "prompt": index % 4} for index, row in enumerate(random_ids(24, 16, 3))
    ]
    trainer = make_trainer(
        tmp_path, StageTransitionCallback(11), model=model, gradient_accumulation_steps=2, remove_unused_columns=False
    )
    trainer.train_dataset, trainer.data_collator = rows, collate_padded
    trainer.train()
    logs = training_logs(trainer.state.log_history)[:3]
    assert [entry["step"] for entry in logs] == [3, 6, 9]
    for index, entry in enumerate(logs):
        expected = recompute(passes[6 * index : 6 * (index + 1)])
        assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_statistics_leave_training_as_it_is(tmp_path):
    plain = make_trainer(tmp_path, model=tiny_model(dropout=0.2))
    watched = make_trainer(tmp_path, StageTransitionCallback(12), model=tiny_model(dropout=0.2))
    for trainer in (plain, watched):
        torch.manual_seed(5)
        trainer.train()
    expected = weights(plain.model)
    actual = weights(watched.model)
    for name in list(actual):
        if name.endswith("routing_table"):
            del actual[name], expected[name]
    assert_same_weights(actual, expected)
    # The hook is gone with the run.
    assert not watched.model._forward_hooks


# The load of each expert


ROUTERS = {
    "stable": {},
    "stable, a dozen tokens of capacity": {"expert_capacity_factor": 1.0},
    "switch": {"router_type": "switch"},
    "base": {"router_type": "base"},
    "hash": {"router_type": "hash"},
    "stable, two experts": {"num_experts_per_tok": 2},
    "hash of three experts, two dozen tokens of capacity": {
        "router_type": "hash",
        "num_experts_per_tok": 3,
        "expert_capacity_factor": 1.0,
    },
}


@pytest.mark.parametrize("router", ROUTERS)
def test_load_of_each_expert_is_that_of_its_tokens_for_every_router_in_both_stages(router, tmp_path):
    model, chosen = tiny_model(moe_layer_positions=[0, 2], output_router_logits=True, **ROUTERS[router]), []
    model.register_forward_hook(lambda module, args, output: chosen.append(output.expert_indices))
    is_frozen = router.startswith("stable")
    callback = StageTransitionCallback(2) if is_frozen else RoutingStatisticsCallback()
    trainer = make_trainer(tmp_path, callback, model=model, logging_steps=1, max_steps=4)
    trainer.train()
    logs = training_logs(trainer.state.log_history)
    assert [entry["routing_stage"] for entry in logs] == (
        [1, 2, 2, 2] if is_frozen else [2 if router.startswith("hash") else 1] * 4
    )
    k = model.config.num_experts_per_tok
    for entry, layers in zip(logs, chosen, strict=True):
        counts = torch.stack([torch.bincount(index.flatten(), minlength=5) for index in layers])
        torch.testing.assert_close(torch.tensor(entry["expert_load"]), counts / (6.4 * k), rtol=0, atol=1e-4)
        assert ("router_entropy" in entry) == (not router.startswith("hash"))
        if "capacity" in router:
            # 32 tokens, with k experts each, over 5 experts: 6 each, or 19 where k is 3.
            assert entry["overflow"] == pytest.approx((counts - 32 * k // 5).clamp(min=0).sum().item() / (64 * k))
        else:
            assert "overflow" not in entry


def test_load_of_each_expert_goes_where_it_is_asked_to(tmp_path):
    seen = {}
    for where in ("history", "reporters", "none"):
        recorder = Recorder()
        trainer = make_trainer(tmp_path, RoutingStatisticsCallback(expert_load=where), recorder, max_steps=3)
        trainer.train()
        [history], [reported] = training_logs(trainer.state.log_history), training_logs(recorder.logs)
        seen[where] = history
        names = {f"expert_load/layer_0/expert_{index}" for index in range(5)}
        assert (names <= reported.keys()) == (names <= history.keys()) == (where == "reporters")
        assert ("expert_load" in history) == (where == "history")
        # A list is no number that a reporter could draw.
        assert all(isinstance(value, (int, float)) for value in reported.values())
        assert not [name for name in reported if "/" in name and "expert_load" not in name]  # of one layer
    [row] = seen["history"]["expert_load"]
    assert row == pytest.approx(
        [seen["reporters"][f"expert_load/layer_0/expert_{index}"] for index in range(5)], abs=1e-4
    )
    with pytest.raises(ValueError, match=r"`expert_load` must be one of \['history', 'reporters', 'none'\], got True"):
        RoutingStatisticsCallback(expert_load=True)


def test_layers_of_encoder_and_decoder_are_told_apart(tmp_path):
    trainer = make_seq2seq_trainer(tmp_path, StageTransitionCallback(3))
    trainer.train()
    for entry in training_logs(trainer.state.log_history):
        layers = {name.split("/")[1] for name in entry if "/" in name}
        assert layers == {"encoder_0", "decoder_0", "decoder_1"}
        assert entry["dead_experts"] == sum(entry[f"dead_experts/{layer}"] for layer in layers)
        assert entry["load_entropy"] == min(entry[f"load_entropy/{layer}"] for layer in layers)
        assert [len(row) for row in entry["expert_load"]] == [5, 5, 5]


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ([[3.0, 3.0], [1.0, 1.0]], (1.0, 1.0, 1.0, 0)),
        ([[4.0, 0.0], [2.0, 2.0]], (2.0, 0.0, 0.0, 1)),
        ([[7.0]], (1.0, 1.0, 1.0, 0)),
    ],
)
def test_evenness_of_loads_at_its_ends(load, expected):
    names = ("load_max_over_mean", "load_min_over_mean", "load_entropy", "dead_experts")
    assert LayerLoads(torch.tensor(load).double()).worst() == dict(zip(names, expected, strict=True))


# Tokens per second


class Clock:
    """Stands still but for what it is told."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("modeling_stablemoe.training.logging_callback.time.perf_counter", lambda: self.now)

    def watch(self, model):
        """A training pass takes a second, another one a hundred."""

        def pass_by(module, *_):
            self.now += 1 if module.training else 100

        model.register_forward_hook(pass_by)
        return model


class SlowSaving(TrainerCallback):
    def __init__(self, clock):
        self.clock = clock

    def on_save(self, args, state, control, **kwargs):
        self.clock.now += 1000


def test_tokens_per_second_are_of_training_alone(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    trainer = make_trainer(
        tmp_path,
        SlowSaving(clock),
        StageTransitionCallback(4),
        RoutingFluctuationCallback(BLOCKS, check_steps=2, num_tokens=64),
        model=clock.watch(tiny_model()),
        gradient_accumulation_steps=3,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    assert clock.now > 2000
    # Two blocks of 16 tokens in each pass.
    assert [entry["tokens_per_second"] for entry in training_logs(trainer.state.log_history)] == [32.0] * 4


def test_tokens_per_second_leave_out_padding_of_source_and_target(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    model = clock.watch(tiny_seq2seq_model(encoder_moe_layer_positions=[]))  # no layer of the encoder tells its tokens
    trainer = make_seq2seq_trainer(tmp_path, RoutingStatisticsCallback(), model=model, max_steps=8, logging_steps=8)
    trainer.train()
    [entry] = training_logs(trainer.state.log_history)
    assert entry["tokens_per_second"] == sum(len(ids) for pair in PAIRS for ids in pair.values()) / 8


def test_the_clock_stops_before_others_look_at_the_model(tmp_path, monkeypatch):
    clock, seconds = Clock(monkeypatch), TrainingClockCallback()
    trainer = make_trainer(
        tmp_path,
        RoutingFluctuationCallback(BLOCKS, check_steps=1, num_tokens=64),
        seconds,
        model=clock.watch(tiny_model()),
        trainer_class=RoutingTrainer,
        max_steps=3,
    )
    trainer.train()
    assert seconds.seconds == 3


def test_a_stopwatch_that_was_not_started_has_no_time():
    assert TrainingStopwatch().pop() == 0.0


def test_scores_that_nobody_asks_for_are_logged_while_the_routing_learns(tmp_path):
    trainer = make_trainer(tmp_path, StageTransitionCallback(2), model=tiny_model(), logging_steps=1, max_steps=4)
    trainer.train()
    logs = training_logs(trainer.state.log_history)
    assert ["router_entropy" in entry for entry in logs] == [True, True, False, False]
