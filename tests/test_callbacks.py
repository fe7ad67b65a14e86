"""Tests of the Trainer callbacks, all with the real Trainer. Run: `python -m pytest tests/test_callbacks.py`."""

import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from modeling_stablemoe import RoutingFluctuationCallback, StableMoEForCausalLM, StageTransitionCallback
from modeling_stablemoe.callbacks import find_stablemoe
from modeling_stablemoe.data import collate_blocks
from modeling_stablemoe.fluctuation import RoutingHistory


BLOCKS = [{"input_ids": row} for row in random_ids(24, 16, seed=1)]
STATISTICS = {
    "task_loss",
    "balance_loss",
    "distillation_loss",
    "distillation_agreement",
    "load_max_over_mean",
    "routing_stage",
}


class Recorder(TrainerCallback):
    """Notes what a reporter sees."""

    def __init__(self):
        self.stages, self.fingerprints, self.logs = [], [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        stablemoe = find_stablemoe(model)
        self.stages.append(stablemoe.routing_stage)
        self.fingerprints.append(stablemoe.router_fingerprint())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


def make_trainer(folder, *callbacks, model=None, optimizers=(None, None), trainer_class=Trainer, **arguments):
    options = {
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    return trainer_class(
        model=tiny_model() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **options),
        train_dataset=options.pop("train_dataset", BLOCKS),
        eval_dataset=BLOCKS[:4],
        data_collator=collate_blocks,
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def training_logs(history) -> list[dict]:
    return [entry for entry in history if "loss" in entry]


# The transition


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("stage1_steps", "step"), [(1, 1), (5, 5), (0.4, 5), (12, 12), (0.01, 1)])
def test_transition_happens_once_at_its_step_whatever_the_accumulation(tmp_path, stage1_steps, step, accumulation):
    model, recorder, forward_stages = tiny_model(), Recorder(), []
    model.register_forward_hook(lambda module, *_: forward_stages.append(module.routing_stage))
    trainer = make_trainer(
        tmp_path,
        recorder,
        StageTransitionCallback(stage1_steps),
        model=model,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    assert recorder.stages == [1] * (step - 1) + [2] * (12 - step + 1)
    assert forward_stages == [1] * step * accumulation + [2] * (12 - step) * accumulation
    transitions = [entry for entry in trainer.state.log_history if "transition_step" in entry]
    assert [entry["transition_step"] for entry in transitions] == [step]
    assert [entry["step"] for entry in transitions] == [step]


@pytest.mark.parametrize(
    "intervals",
    [
        {"logging_strategy": "no"},
        {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        {"logging_steps": 7, "eval_strategy": "steps", "eval_steps": 5},
        {"logging_steps": 100, "logging_first_step": True, "save_strategy": "steps", "save_steps": 11},
        {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"},
    ],
)
def test_transition_does_not_depend_on_the_other_intervals(tmp_path, intervals):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, StageTransitionCallback(5), **intervals)
    trainer.train()
    assert recorder.stages == [1] * 4 + [2] * 8
    assert sum("transition_step" in entry for entry in trainer.state.log_history) == 1
    assert trainer.model.config.router_fingerprint == recorder.fingerprints[4]


def test_training_twice_with_the_same_callback_objects_is_refused_once_frozen(tmp_path):
    callback = StageTransitionCallback(5)
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    with pytest.raises(ValueError, match="frozen already"):
        trainer.train()


def test_checkpoint_of_the_transition_step_is_stage_2(tmp_path):
    make_trainer(tmp_path, StageTransitionCallback(5), save_strategy="steps", save_steps=1).train()
    stages = {}
    for step in (4, 5, 6):
        loaded = StableMoEForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        stages[step] = (loaded.routing_stage, loaded.config.router_fingerprint is not None)
    assert stages == {4: (1, False), 5: (2, True), 6: (2, True)}


def test_evaluation_of_the_transition_step_reads_what_stage_1_would_have_read(tmp_path):
    evaluation = {"eval_strategy": "steps", "eval_steps": 5, "max_steps": 5}
    frozen = make_trainer(tmp_path / "a", StageTransitionCallback(5), **evaluation)
    live = make_trainer(tmp_path / "b", **evaluation)
    losses = []
    for trainer in (frozen, live):
        trainer.train()
        losses += [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert frozen.model.routing_stage == 2
    assert live.model.routing_stage == 1
    assert len(losses) == 2
    assert losses[0] == losses[1]


def test_message_at_the_transition_says_steps_load_and_agreement(tmp_path, capsys):
    trainer = make_trainer(tmp_path, StageTransitionCallback(5))
    trainer.train()
    output = capsys.readouterr().out
    entry = next(entry for entry in trainer.state.log_history if "transition_step" in entry)
    assert "routing frozen after step 5 of 12" in output
    assert f"{entry['transition_agreement']:.1%} of the tokens" in output
    assert f"max/mean {entry['transition_load_max_over_mean']:.2f}" in output
    assert f"max/mean {entry['transition_table_load_max_over_mean']:.2f}" in output
    assert f"the {5 * 2 * 16} tokens seen in stage 1" in output
    assert trainer.model.config.router_fingerprint in output
    assert output.count("routing frozen") == 1


def test_transition_report_equals_a_recount(tmp_path):
    counts = torch.zeros(99)
    model = tiny_model()

    def count(module, args, kwargs, output):
        if module.routing_stage == 1:
            counts.add_(torch.bincount(kwargs["input_ids"].flatten(), minlength=99))

    model.register_forward_hook(count, with_kwargs=True)
    trainer = make_trainer(tmp_path, StageTransitionCallback(5), model=model, gradient_accumulation_steps=2)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "transition_step" in entry)
    (layer,) = model.moe_layers_by_name.values()
    load = torch.stack([counts[layer.frozen_router.values() == expert].sum() for expert in range(5)])
    assert entry["transition_table_load_max_over_mean"] == pytest.approx((load.max() / load.mean()).item())


# Stage 2 stands still


def optimizers_for(model, name):
    if name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
        return (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)), {}
    return (None, None), {"optim": name, "weight_decay": 0.1}


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "sgd"])
def test_routing_and_distilled_router_never_move_in_stage_2(tmp_path, name):
    model, seen = tiny_model(moe_layer_positions=[0, 2]), []
    ids = torch.arange(99).unsqueeze(0)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            layers = model.moe_layers_by_name.values()
            seen.append(
                {
                    "route": model.route(ids[:, :60]),
                    "fingerprint": model.router_fingerprint(),
                    "distilled": [p.detach().clone() for layer in layers for p in layer.router.stage1_parameters()],
                    "centroids": [layer.router.centroids.detach().clone() for layer in layers],
                }
            )

    optimizers, arguments = optimizers_for(model, name)
    make_trainer(
        tmp_path, Watch(), StageTransitionCallback(5), model=model, optimizers=optimizers, max_steps=30, **arguments
    ).train()
    before, frozen, after = seen[0], seen[4], seen[5:]
    assert len(after) == 25
    for distilled in zip(before["distilled"], frozen["distilled"], strict=True):
        assert not torch.equal(*distilled)  # they did learn in stage 1
    for step in after:
        assert torch.equal(step["route"], frozen["route"])
        assert step["fingerprint"] == frozen["fingerprint"]
        for was, now in zip(frozen["distilled"], step["distilled"], strict=True):
            assert torch.equal(was, now)
    for was, now in zip(frozen["centroids"], after[-1]["centroids"], strict=True):
        assert not torch.equal(was, now)  # the gate goes on learning (eq. 14)


# Resuming

TRANSITION = 5


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run with a checkpoint at every step, dropout and accumulation."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = resumable_trainer(folder, tiny_model(dropout=0.1), save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer


def resumable_trainer(folder, model, stage1_steps=TRANSITION, **arguments):
    return make_trainer(
        folder,
        StageTransitionCallback(stage1_steps),
        model=model,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        **arguments,
    )


def group_sizes(trainer) -> list[int]:
    return [len(group["params"]) for group in trainer.optimizer.param_groups]


@pytest.mark.parametrize("start", ["fresh", "from_pretrained"])
@pytest.mark.parametrize("step", [TRANSITION - 2, TRANSITION, TRANSITION + 3])
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path, whole_run, step, start):
    checkpoint = f"{whole_run.args.output_dir}/checkpoint-{step}"
    if start == "fresh":
        model = tiny_model(seed=7, dropout=0.1)  # other weights: those that count are the checkpoint's
    else:
        model = StableMoEForCausalLM.from_pretrained(checkpoint)
        # Loading maps the file's own, unaligned memory, where CPU kernels add up in another order.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    trainer = resumable_trainer(tmp_path, model)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 12
    assert_same_weights(weights(trainer.model), weights(whole_run.model))
    assert trainer.model.config.router_fingerprint == whole_run.model.config.router_fingerprint
    assert group_sizes(trainer) == group_sizes(whole_run)
    transitions = [entry["step"] for entry in trainer.state.log_history if "transition_step" in entry]
    assert transitions == [TRANSITION]


def test_resumed_run_logs_what_the_uninterrupted_one_logs(tmp_path, whole_run):
    # Step 3 is a logging step, so no window of the log is cut in two.
    trainer = resumable_trainer(tmp_path, tiny_model(seed=7, dropout=0.1))
    trainer.train(resume_from_checkpoint=f"{whole_run.args.output_dir}/checkpoint-3")
    names = [*STATISTICS, "loss", "step"]
    resumed, whole = (
        [{name: entry.get(name) for name in names} for entry in training_logs(run.state.log_history)]
        for run in (trainer, whole_run)
    )
    assert resumed == whole


def test_resuming_a_frozen_run_with_a_longer_stage_1_is_an_error(tmp_path, whole_run):
    trainer = resumable_trainer(tmp_path, tiny_model(dropout=0.1), stage1_steps=11)
    with pytest.raises(ValueError, match="should last until step 11 and this is step 8.*it was started with"):
        trainer.train(resume_from_checkpoint=f"{whole_run.args.output_dir}/checkpoint-8")


def test_resuming_past_the_transition_with_a_stage_1_checkpoint_freezes_at_once(tmp_path, whole_run):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, StageTransitionCallback(2), model=tiny_model(seed=7, dropout=0.1))
    trainer.train(resume_from_checkpoint=f"{whole_run.args.output_dir}/checkpoint-4")
    assert recorder.stages == [2] * 8
    (transition,) = [entry for entry in trainer.state.log_history if "transition_step" in entry]
    assert transition["step"] == 4


class ScriptedTrainer(Trainer):
    """A trainer whose evaluation says that one step was the best."""

    best_step = 0

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        metrics["eval_loss"] = 1.0 if self.state.global_step == self.best_step else 2.0
        return metrics


@pytest.mark.parametrize(("best_step", "stage"), [(3, 1), (9, 2)])
def test_best_model_across_the_transition_is_consistent(tmp_path, caplog, best_step, stage):
    trainer = make_trainer(
        tmp_path,
        StageTransitionCallback(5),
        trainer_class=ScriptedTrainer,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.best_step = best_step
    with caplog.at_level(logging.WARNING):
        trainer.train()
    model = trainer.model
    assert model.routing_stage == stage
    assert (model.config.router_fingerprint is None) == (stage == 1)
    assert model.config.router_fingerprint == model.router_fingerprint()
    best = StableMoEForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best_step}")
    assert_same_weights(weights(model), weights(best))
    model.save_pretrained(tmp_path / "final")
    assert StableMoEForCausalLM.from_pretrained(tmp_path / "final").routing_stage == stage
    # Training did pass the transition: the warning must not deny it.
    assert "before the transition" not in caplog.text
    assert ("best checkpoint" in caplog.text) == (stage == 1)


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


# What is refused


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_share_outside_0_and_1_is_refused(share):
    with pytest.raises(ValueError, match=r"must lie inside \(0, 1\)"):
        StageTransitionCallback(share)


@pytest.mark.parametrize("steps", [0, -3])
def test_stage_1_without_a_step_is_refused(steps):
    with pytest.raises(ValueError, match="at least 1 step"):
        StageTransitionCallback(steps)


@pytest.mark.parametrize("value", [True, "5", "0.1", None])
def test_stage_1_that_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="must be an int .* or a float"):
        StageTransitionCallback(value)


def test_stage_1_longer_than_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Stage 1 of 13 steps is longer than training \(12 steps\)"):
        make_trainer(tmp_path, StageTransitionCallback(13)).train()


def make_callback(kind):
    return StageTransitionCallback(5) if kind == "transition" else RoutingFluctuationCallback(BLOCKS, 5, 64)


@pytest.mark.parametrize("kind", ["transition", "fluctuation"])
def test_dense_model_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="dense.*`moe_layer_positions` is empty"):
        make_trainer(tmp_path, make_callback(kind), model=tiny_model(moe_layer_positions=[])).train()


@pytest.mark.parametrize("kind", ["transition", "fluctuation"])
def test_model_of_another_kind_is_refused(tmp_path, kind):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=8, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not a StableMoE model"):
        make_trainer(tmp_path, make_callback(kind), model=model).train()


def test_model_that_is_frozen_already_is_refused(tmp_path):
    model = tiny_model()
    model.freeze_router()
    with pytest.raises(ValueError, match="frozen already.*leave StageTransitionCallback out"):
        make_trainer(tmp_path, StageTransitionCallback(5), model=model).train()


def test_training_that_ends_in_stage_1_is_warned_about(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(tmp_path, StageTransitionCallback(5), Stop())
    with caplog.at_level(logging.WARNING, logger="modeling_stablemoe.callbacks"):
        trainer.train()
    assert "ended at step 3, before the transition at step 5: the routing is not frozen" in caplog.text
    assert trainer.model.routing_stage == 1


class Adapter(nn.Module):
    """Wraps a model as adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base_model = nn.ModuleDict({"inner": base})

    def forward(self, **kwargs):
        return self.base_model["inner"](**kwargs)


def test_model_inside_a_wrapper_is_found_and_frozen(tmp_path):
    wrapped = Adapter(tiny_model())
    assert find_stablemoe(wrapped) is wrapped.base_model["inner"]
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        recorder,
        StageTransitionCallback(5),
        RoutingFluctuationCallback(BLOCKS, 5, 64),
        model=wrapped,
        remove_unused_columns=False,
    )
    trainer.train()
    assert recorder.stages == [1] * 4 + [2] * 8
    assert training_logs(trainer.state.log_history)[0].keys() >= STATISTICS
    with pytest.raises(ValueError, match="Adapter is not a StableMoE model"):
        find_stablemoe(Adapter(nn.Linear(2, 2)))


# Routing fluctuation


def history_of(*checks) -> RoutingHistory:
    history = RoutingHistory()
    for step, stage, experts in checks:
        history.record(step, stage, torch.tensor(experts))
    return history


KNOWN = (
    (0, 1, [0, 1, 2, 3]),
    (10, 1, [0, 1, 2, 0]),  # one of four
    (20, 1, [1, 2, 2, 0]),  # two
    (30, 2, [1, 1, 2, 0]),  # one
    (40, 2, [1, 1, 2, 0]),
)


def test_changes_are_the_share_of_tokens_whose_expert_changed():
    history = RoutingHistory()
    returned = [history.record(step, stage, torch.tensor(experts)) for step, stage, experts in KNOWN]
    assert returned == history.changes() == [None, 0.25, 0.5, 0.25, 0.0]


def test_last_fluctuation_step_is_the_last_at_which_the_expert_was_not_the_final_one():
    # Token 0 settles after 10, token 1 (right, wrong, right) after 20, token 2 never moves, token 3 after 0.
    assert history_of(*KNOWN).last_fluctuation_steps().tolist() == [10, 20, 0, 0]


def test_summary_holds_the_cumulative_curve_and_the_shares_still_changing():
    summary = history_of(*KNOWN).summary()
    assert summary["tokens"] == 4
    assert summary["steps"] == summary["last_fluctuation"]["steps"] == [0, 10, 20, 30, 40]
    assert summary["stages"] == [1, 1, 1, 2, 2]
    assert summary["last_fluctuation"]["cumulative_share"] == [0.5, 0.75, 1.0, 1.0, 1.0]
    # After 8 steps two tokens had not settled, after 20 and 32 none.
    assert summary["share_still_changing_after"] == {"0.2": 0.5, "0.5": 0.0, "0.8": 0.0}


def test_stage_2_change_counts_only_checks_within_stage_2():
    assert history_of(*KNOWN).stage2_change() == 0.0
    assert history_of(*KNOWN[:4]).stage2_change() is None
    assert history_of(*KNOWN[:3]).stage2_change() is None
    moved = history_of(*KNOWN, (50, 2, [1, 1, 2, 1]), (60, 2, [1, 1, 2, 1]))
    assert moved.stage2_change() == 0.25
    assert moved.summary()["largest_change_in_stage2"] == 0.25


def test_history_is_saved_and_cut_at_the_step_that_is_resumed(tmp_path):
    history_of(*KNOWN).save(tmp_path / "history.safetensors")
    loaded = RoutingHistory()
    loaded.load(tmp_path / "history.safetensors", last_step=25)
    assert loaded.steps == [0, 10, 20]
    assert loaded.stages == [1, 1, 1]
    assert [experts.tolist() for experts in loaded.experts] == [experts for _, _, experts in KNOWN[:3]]
    assert loaded.record(30, 2, torch.tensor([1, 1, 2, 0])) == 0.25
    assert [path.name for path in tmp_path.iterdir()] == ["history.safetensors"]


def fluctuation_run(folder, *callbacks, model=None, stage1_steps=8, **arguments):
    """Two MoE layers: what reaches the second depends on how tokens were routed in the first."""
    watch = RoutingFluctuationCallback(BLOCKS, check_steps=3, num_tokens=100, batch_size=2)
    trainer = make_trainer(
        folder,
        *callbacks,
        StageTransitionCallback(stage1_steps),
        watch,
        model=tiny_model(moe_layer_positions=[0, 2]) if model is None else model,
        **arguments,
    )
    return trainer, watch


def test_fluctuation_compares_the_experts_that_training_would_use(tmp_path):
    model, chosen = tiny_model(moe_layer_positions=[0, 2]), {}
    batch = torch.stack([block["input_ids"] for block in BLOCKS[:7]])  # 112 tokens: 100, rounded up

    class Training(TrainerCallback):
        @torch.no_grad()
        def route(self, state):
            model.train()  # the tiny model has no dropout
            indices = model(input_ids=batch, output_router_logits=True).expert_indices
            chosen[state.global_step] = torch.stack([index.flatten() for index in indices])

        def on_train_begin(self, args, state, control, **kwargs):
            self.route(state)

        def on_step_end(self, args, state, control, **kwargs):
            self.route(state)

    trainer, watch = fluctuation_run(tmp_path, Training(), model=model)
    trainer.train()
    assert watch.history.steps == [0, 3, 6, 8, 9, 12]
    assert watch.history.stages == [1, 1, 1, 2, 2, 2]
    expected = [chosen[step] for step in watch.history.steps]
    logged = {entry["step"]: entry["routing_fluctuation"] for entry in trainer.state.log_history if len(entry) == 2}
    for index, step in enumerate(watch.history.steps):
        # Rows are examples, batches of 2: put the tokens of a layer side by side again.
        assert torch.equal(watch.history.experts[index].view(2, -1).long(), expected[index]), step
        if index:
            share = (expected[index] != expected[index - 1]).float().mean().item()
            assert logged[step] == pytest.approx(share)
    assert logged[3] > 0
    assert logged[9] == logged[12] == 0


def test_report_is_written_as_json_and_as_a_picture(tmp_path):
    trainer, watch = fluctuation_run(tmp_path)
    trainer.train()
    summary = json.loads((tmp_path / "routing_fluctuation.json").read_text())
    assert summary == watch.history.summary()
    assert summary["largest_change_in_stage2"] == 0
    image = pytest.importorskip("matplotlib.image")
    pixels = image.imread(tmp_path / "routing_fluctuation.png")
    assert pixels.shape == (600, 1500, 4)
    assert pixels.std() > 0.01
    assert not list(tmp_path.glob("*.partial"))


def test_resumed_run_continues_the_history_of_fluctuation(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole, whole_watch = fluctuation_run(tmp_path / "whole", **saving)
    whole.train()

    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    crashed, _ = fluctuation_run(tmp_path / "crashed", Crash(), **saving)
    with pytest.raises(KeyboardInterrupt):
        crashed.train()
    resumed, watch = fluctuation_run(tmp_path / "crashed", model=tiny_model(seed=7, moe_layer_positions=[0, 2]))
    resumed.train(resume_from_checkpoint=str(tmp_path / "crashed" / "checkpoint-5"))
    assert watch.history.summary() == whole_watch.history.summary()
    assert torch.equal(torch.stack(watch.history.experts), torch.stack(whole_watch.history.experts))
    assert (tmp_path / "crashed" / "routing_fluctuation.json").read_text() == (
        tmp_path / "whole" / "routing_fluctuation.json"
    ).read_text()


def test_new_run_in_an_old_folder_starts_its_own_history(tmp_path):
    for _ in range(2):
        trainer, watch = fluctuation_run(tmp_path)
        trainer.train()
        assert watch.history.steps == [0, 3, 6, 8, 9, 12]


def test_watching_fluctuation_leaves_weights_mode_and_random_numbers_as_they_are(tmp_path):
    modes = []

    class Modes(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            modes.append(all(module.training for module in model.modules()))

    plain = make_trainer(tmp_path / "a", StageTransitionCallback(8), model=tiny_model(dropout=0.2))
    watch = RoutingFluctuationCallback(BLOCKS, check_steps=1, num_tokens=100)
    watched = make_trainer(
        tmp_path / "b", StageTransitionCallback(8), watch, Modes(), model=tiny_model(dropout=0.2), logging_steps=1
    )
    states = []
    for trainer in (plain, watched):
        torch.manual_seed(5)
        trainer.train()
        states.append(torch.get_rng_state())
    assert_same_weights(weights(watched.model), weights(plain.model))
    assert torch.equal(*states)
    assert modes == [True] * 12
    assert watch.history.steps == list(range(13))


def test_fluctuation_without_a_transition_checks_the_last_step(tmp_path):
    watch = RoutingFluctuationCallback(BLOCKS, check_steps=5, num_tokens=64)
    make_trainer(tmp_path, watch).train()
    assert watch.history.steps == [0, 5, 10, 12]
    assert json.loads((tmp_path / "routing_fluctuation.json").read_text())["largest_change_in_stage2"] is None


def test_examples_of_different_lengths_are_watched(tmp_path):
    rows = [{"input_ids": row[: 3 + index]} for index, row in enumerate(random_ids(4, 16))]
    watch = RoutingFluctuationCallback(iter(rows), check_steps=5, num_tokens=1000)
    make_trainer(tmp_path, watch).train()
    assert watch.history.experts[0].numel() == 3 + 4 + 5 + 6


@pytest.mark.parametrize("name", ["check_steps", "num_tokens", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_numbers_of_the_fluctuation_callback_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 1"):
        RoutingFluctuationCallback(BLOCKS, **{name: value})


def test_data_set_that_cannot_be_watched_is_refused():
    with pytest.raises(ValueError, match="holds no tokens"):
        RoutingFluctuationCallback([])
    with pytest.raises(ValueError, match="holds no tokens"):
        RoutingFluctuationCallback([{"input_ids": []}])
    with pytest.raises(ValueError, match=r"need a column `input_ids`; there are \['text'\]"):
        RoutingFluctuationCallback([{"text": "a"}])


def test_resuming_from_a_checkpoint_with_an_altered_table_is_an_error(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, StageTransitionCallback(2), max_steps=4, **saving).train()
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    tensors = load_file(file)
    [name] = [name for name in tensors if name.endswith("routing_table")]
    tensors[name][7] = (tensors[name][7] + 1) % 5
    save_file(tensors, file, metadata={"format": "pt"})
    resumed = make_trainer(tmp_path, StageTransitionCallback(2), max_steps=6, **saving)
    with pytest.raises(ValueError, match="not those that it was saved with.*earlier checkpoint"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_history_of_other_tokens_is_refused_on_resuming(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tmp_path, RoutingFluctuationCallback(BLOCKS, check_steps=2, num_tokens=32), **saving).train()
    resumed = make_trainer(tmp_path, RoutingFluctuationCallback(BLOCKS, check_steps=2, num_tokens=64), **saving)
    with pytest.raises(ValueError, match="of other tokens than this run's.*delete the file"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
