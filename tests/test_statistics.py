"""The routing statistics in the Trainer's logs. Run: `python -m pytest tests/test_statistics.py`."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids, tiny_model
from trainers import BLOCKS, STATISTICS, Recorder, assert_same_weights, make_trainer, training_logs, weights

from modeling_stablemoe import RoutingFluctuationCallback, StageTransitionCallback


# What is logged


def test_statistics_reach_the_history_and_reporters_that_stand_before_the_callback(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, StageTransitionCallback(6))
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
    assert any("transition_step" in entry for entry in recorder.logs)


def test_statistics_reach_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callbacks = [StageTransitionCallback(6), RoutingFluctuationCallback(BLOCKS, check_steps=3, num_tokens=64)]
    trainer = make_trainer(tmp_path, *callbacks, report_to="tensorboard")
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    history = trainer.state.log_history
    for name in [*STATISTICS, "routing_fluctuation", "transition_agreement"]:
        expected = {entry["step"]: entry[name] for entry in history if name in entry and "train_loss" not in entry}
        scalars = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert scalars.keys() == expected.keys(), name
        assert scalars == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("stage1_steps", [6, 7])
def test_task_loss_of_the_log_is_the_loss_without_the_weighted_auxiliary_losses(tmp_path, stage1_steps):
    model = tiny_model(moe_layer_positions=[0, 2], balance_loss_coef=0.7, distillation_loss_coef=0.4)
    trainer = make_trainer(tmp_path, StageTransitionCallback(stage1_steps), model=model, gradient_accumulation_steps=3)
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
    task, targets, tokens, balance, distillation, agreed, layers = [0.0] * 7
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
    return {
        "task_loss": task / targets,
        "balance_loss": balance / tokens,
        "distillation_loss": distillation / tokens,
        "distillation_agreement": agreed / tokens,
        "load_max_over_mean": (load.amax(-1) / load.mean(-1)).max().item(),
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
