"""What a person sees of a run."""

import re
import time

import pytest
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from helpers.trainers import make_trainer
from modeling_stablemoe import StageTransitionCallback
from modeling_stablemoe.training import RoutingTrainer, show_progress
from modeling_stablemoe.training.progress_callback import ProgressBarCallback, ProgressLinesCallback


def trained(folder, *callbacks, **options):
    trainer = make_trainer(
        folder,
        StageTransitionCallback(6),
        *callbacks,
        trainer_class=RoutingTrainer,
        eval_strategy="steps",
        eval_steps=6,
        **options,
    )
    show_progress(trainer)
    return trainer


def test_without_a_terminal_there_is_a_line_per_log_and_no_bar(tmp_path, capsys):
    trainer = trained(tmp_path)
    trainer.train()
    trainer.evaluate()
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("step ")]
    history = trainer.state.log_history
    losses = [entry for entry in history if "loss" in entry]
    expected = [
        f"step {entry['step']}/12 | stage {entry['routing_stage']} | loss {entry['task_loss']:.3f} | "
        f"load {entry['load_max_over_mean']:.2f} | {entry['tokens_per_second']:,.0f} tokens/s"
        for entry in losses
    ]
    logs = [line for line in lines if "|" in line]
    assert [re.sub(r" \| [\d:]+ left$", "", line) for line in logs] == expected
    assert [line.endswith("left") for line in logs] == [True, False, True, True]  # stage 2 has taken no time yet
    # The last evaluation belongs to the results.
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [line for line in lines if "|" not in line] == [
        f"step {entry['step']}/12: validation loss {entry['eval_loss']:.3f}, perplexity {2.718281828 ** entry['eval_loss']:.4g}"
        for entry in evaluations[:-1]
    ]
    assert "{" not in printed.out
    assert "\r" not in printed.out + printed.err
    assert {"grad_norm", "learning_rate", "mean_gate", "load_entropy"} <= losses[0].keys()


def test_a_terminal_has_one_bar_with_the_numbers(tmp_path, capsys):
    trainer = trained(tmp_path)
    trainer.remove_callback(ProgressLinesCallback)
    trainer.add_callback(ProgressBarCallback())
    trainer.train()
    printed = capsys.readouterr()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    bar = printed.err.split("\r")[-1]
    assert bar.startswith("stage 2 100%")
    # The only one: evaluations, of 2 batches each, end with a line.
    assert [each for each in printed.err.split("\r") if "/12 [" not in each and "%|" in each] == []
    assert f"loss {last['task_loss']:.3f}, load {last['load_max_over_mean']:.2f}, " in bar
    assert "00:00 left" in bar
    assert "step 6/12: validation loss" in printed.out
    assert "{" not in printed.out


def test_the_bar_has_pace_and_time_left_from_the_first_step(tmp_path, capsys):
    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.15 * (state.global_step == 0))  # longer than between two pictures of the bar

    trainer = trained(tmp_path, Slow(), logging_steps=12)
    trainer.remove_callback(ProgressLinesCallback)
    trainer.add_callback(ProgressBarCallback())
    trainer.train()
    early = [bar for bar in capsys.readouterr().err.split("\r") if " 1/12 [" in bar]
    assert re.search(r"\d (steps/s|s/step), [\d:]+ left\]", early[-1])


def test_a_run_whose_first_log_takes_its_time_gives_a_sign_of_life(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    callback, control = ProgressLinesCallback(), TrainerControl()
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    state = TrainerState(max_steps=100)
    callback.on_train_begin(args, state, control)
    for state.global_step in range(1, 6):
        clock[0] += 4.0
        callback.on_step_end(args, state, control)
    assert capsys.readouterr().out.splitlines() == ["step 3/100 | 4.0 s/step | 06:28 left"]


@pytest.mark.parametrize(("is_terminal", "disable_tqdm"), [(True, False), (True, True), (False, False)])
def test_a_bar_is_for_terminals_and_can_be_refused(tmp_path, monkeypatch, is_terminal, disable_tqdm):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    callbacks = trained(tmp_path, disable_tqdm=disable_tqdm).callback_handler.callbacks
    kinds = [type(each) for each in callbacks if isinstance(each, (ProgressLinesCallback, ProgressCallback))]
    assert kinds == [ProgressBarCallback if is_terminal and not disable_tqdm else ProgressLinesCallback]
    assert not any(isinstance(each, PrinterCallback) for each in callbacks)


def test_the_time_left_is_that_of_the_present_stage(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    callback, control = ProgressLinesCallback(), TrainerControl()
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    state = TrainerState(max_steps=100, global_step=10)  # a resumed run
    callback.on_train_begin(args, state, control)
    for step, clock[0], logs in (
        (20, 40.0, {"loss": 1.0}),  # 4 s a step, 80 steps
        (30, 90.0, {"transition_step": 30}),
        (40, 100.0, {"loss": 1.0}),  # 1 s a step, 60 steps
    ):
        state.global_step = step
        callback.on_log(args, state, control, logs=logs)
    assert [line.rpartition("| ")[2] for line in capsys.readouterr().out.splitlines()] == ["05:20 left", "01:00 left"]
