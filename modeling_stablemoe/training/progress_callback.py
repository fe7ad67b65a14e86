# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What a person sees of a run: one bar on a terminal, a line per log elsewhere."""

import sys
import time

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.utils import logging as transformers_logging

from modeling_stablemoe.measure.report import perplexity_of


# Without tqdm's own estimate of the time left, which knows nothing of stages and evaluations.
_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


def show_progress(trainer: Trainer):
    """Let a trainer show its run by a bar or by lines, in place of the dictionaries of all that is logged.

    The log history, and so `trainer_state.json`, and the reporters have all numbers. `disable_tqdm` asks for lines.
    """
    transformers_logging.disable_progress_bar()  # one for each file that is written would stand between
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    has_bar = sys.stderr.isatty() and not trainer.args.disable_tqdm
    trainer.add_callback(ProgressBarCallback() if has_bar else ProgressLinesCallback())


# Seconds after which a run has to say something, where the first log takes longer.
_PATIENCE = 10.0


class ProgressLinesCallback(TrainerCallback):
    """Prints a short line per log and per evaluation, and one before the first log where that takes its time."""

    # Where the stage that goes on began, its step and time: the time left is estimated by it.
    _began: tuple[int, float] | None = None
    _is_silent = True

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin to measure the time of a step."""
        super().on_train_begin(args, state, control, **kwargs)
        self._begin(state)
        self._is_silent = True

    def on_step_end(self, args, state, control, **kwargs):
        """Give a sign of life before the first log."""
        super().on_step_end(args, state, control, **kwargs)
        if self._is_silent and state.is_world_process_zero:
            self._show_pace(state)

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the evaluation of the saved model to the results."""
        super().on_train_end(args, state, control, **kwargs)
        self._began = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the numbers that one watches."""
        if not state.is_world_process_zero or logs is None:
            return
        if "transition_step" in logs:
            self._begin(state)  # steps of the second stage take another time
        if "eval_loss" in logs and self._began is not None:
            tqdm.write(f"step {state.global_step}/{state.max_steps}: {_describe_evaluation(logs)}")
        elif "loss" in logs:
            self._is_silent = False
            self._show(state, logs)

    def _begin(self, state: TrainerState):
        self._began = (state.global_step, time.monotonic())

    def _show_pace(self, state: TrainerState):
        if time.monotonic() - self._began[1] >= _PATIENCE:
            self._is_silent = False
            tqdm.write(" | ".join([f"step {state.global_step}/{state.max_steps}", *self._pace(state)]))

    def _pace(self, state: TrainerState) -> list[str]:
        """Return the time of a step so far, and the time left."""
        step, began = self._began
        seconds = (time.monotonic() - began) / max(1, state.global_step - step)
        pace = f"{seconds:.1f} s/step" if seconds >= 1 else f"{1 / max(seconds, 1e-9):.1f} steps/s"
        return [pace, *self._time_left(state)]

    def _show(self, state: TrainerState, logs: dict):
        parts = [f"step {state.global_step}/{state.max_steps}", *self._stage_of(logs), *self._numbers(logs)]
        parts += self._time_left(state)
        tqdm.write(" | ".join(parts))

    def _stage_of(self, logs: dict) -> list[str]:
        return [f"stage {logs['routing_stage']}"] if "routing_stage" in logs else []

    def _numbers(self, logs: dict) -> list[str]:
        parts = [f"loss {logs.get('task_loss', logs['loss']):.3f}"]
        if "load_max_over_mean" in logs:
            parts.append(f"load {logs['load_max_over_mean']:.2f}")
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        return parts

    def _time_left(self, state: TrainerState) -> list[str]:
        """Estimate the time to the end by that of the present stage, evaluations and saving included."""
        if self._began is None or state.global_step <= self._began[0]:
            return []
        step, began = self._began
        seconds = (time.monotonic() - began) / (state.global_step - step) * (state.max_steps - state.global_step)
        return [f"{tqdm.format_interval(seconds)} left"]


class ProgressBarCallback(ProgressLinesCallback, ProgressCallback):
    """Shows the numbers of the last log and the time left beside a bar, before the first log the pace; a line per evaluation."""

    _last_numbers: list[str] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.bar_format = _BAR
        self._last_numbers = None

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar, and let the time left go with it."""
        if self.training_bar is not None and self._began is not None:
            numbers = self._last_numbers
            parts = self._pace(state) if numbers is None else [*numbers, *self._time_left(state)]
            self.training_bar.set_postfix_str(", ".join(parts), refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def _show_pace(self, state: TrainerState):
        """Leave that to the bar."""

    def on_prediction_step(self, args, state, control, **kwargs):
        """Open no second bar in training, where an evaluation ends with a line; one that stands alone has its own."""
        if self.training_bar is None:
            super().on_prediction_step(args, state, control, **kwargs)

    def _show(self, state: TrainerState, logs: dict):
        if self.training_bar is None:
            return
        self.training_bar.set_description_str("".join(f"{stage} " for stage in self._stage_of(logs)), refresh=False)
        self._last_numbers = self._numbers(logs)
        self.training_bar.set_postfix_str(", ".join([*self._last_numbers, *self._time_left(state)]))


def _describe_evaluation(logs: dict) -> str:
    parts = [f"validation loss {logs['eval_loss']:.3f}", f"perplexity {perplexity_of(logs['eval_loss']):.4g}"]
    names = {"eval_bleu": "BLEU", "eval_chrf": "chrF"}
    return ", ".join([*parts, *(f"{names[name]} {logs[name]:.1f}" for name in names if name in logs)])


__all__ = ["ProgressBarCallback", "ProgressLinesCallback", "show_progress"]
