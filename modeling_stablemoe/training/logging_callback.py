# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What the callbacks share: writing into the Trainer's own log stream, time, and losses that leave the routing out."""

import time
from collections.abc import Callable

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin


class LoggingCallback(TrainerCallback):
    """A callback whose numbers appear in the Trainer's own log stream.

    It adds them to the dictionary of a log, which Trainer gives to one callback after the other, so reporters that stand
    behind it see them. `RoutingTrainer` sees to the order.
    """

    _trainer_log: Callable[[dict], object] | None = None
    # Numbers of entries in the history that no reporter has seen yet.
    _unreported: dict[str, float] | None = None

    def log_by(self, trainer_log: Callable[[dict], object]):
        """Write entries of its own by `Trainer.log`, and so to the reporters at once, not with the next log."""
        self._trainer_log = trainer_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Let reporters see with a training log what has had an entry of its own in the history since the last one."""
        if logs is not None and "loss" in logs and self._unreported:
            logs.update(self._unreported)
            self._unreported = None

    def _log(self, state: TrainerState, control: TrainerControl, metrics: dict):
        """Write an entry of its own."""
        if self._trainer_log is None:
            state.log_history.append({**metrics, "step": state.global_step})
            self._unreported = {**(self._unreported or {}), **metrics}
            return
        should_log = control.should_log
        self._trainer_log(dict(metrics))
        control.should_log = should_log  # which every log resets

    def _add(self, logs: dict, state: TrainerState, metrics: dict):
        """Add to the entry that the Trainer is about to give to the reporters."""
        logs.update(metrics)
        # The history holds a copy of `logs`, made before this call.
        self._add_to_history(state, metrics)

    def _add_to_history(self, state: TrainerState, metrics: dict):
        """Add to the last entry of the log history, which no reporter reads."""
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)


class TrainingStopwatch:
    """Times the training between logs, data loading included, in wall-clock seconds, and leaves interruptions out.

    A Trainer says when an evaluation or a save has ended, not when it began. So an interruption lasts from the end of a
    step, or from its log, to the beginning of the next step, and takes the loading of one batch with it.
    """

    def __init__(self):
        self._started: float | None = None
        self._resting_since = 0.0
        self._interrupted = False

    def begin_step(self):
        """Start at the first step; go on after an interruption."""
        now = time.perf_counter()
        self._started = now if self._started is None else self._started
        self._skip_interruption(now)

    def end_step(self):
        """Note the end of a step: an interruption may follow."""
        self._resting_since = time.perf_counter()

    def interrupt(self):
        """Leave out the time between the steps."""
        self._interrupted = True

    def pop(self) -> float:
        """Return the seconds since the last call and start from zero."""
        now = time.perf_counter()
        self._skip_interruption(now)
        seconds = 0.0 if self._started is None else now - self._started
        self._started = self._resting_since = now
        return seconds

    def _skip_interruption(self, now: float):
        if self._interrupted and self._started is not None:
            self._started += now - max(self._resting_since, self._started)
        self._interrupted = False


class TrainingClockCallback(LoggingCallback):
    """Adds `train_seconds` to the Trainer's logs: the time spent in optimizer steps since the start of training.

    Data loading, evaluation, saving and logging do not count, nor do callbacks that stand behind this one. A resumed run
    continues from the last log of its checkpoint.
    """

    def __init__(self):
        self.seconds = 0.0
        self._stopwatch = TrainingStopwatch()

    def on_train_begin(self, args, state, control, **kwargs):
        """Take up the time of the run that is resumed."""
        self.seconds = max((entry.get("train_seconds", 0.0) for entry in state.log_history), default=0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock; what was between the steps does not count."""
        self._stopwatch.interrupt()
        self._stopwatch.begin_step()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock, once the device has done what it was told if somebody is about to look."""
        # Trainer's own callback, which decides that, is the first in every list.
        if torch.cuda.is_available() and (control.should_log or control.should_evaluate):
            torch.cuda.synchronize()
        self.seconds += self._stopwatch.pop()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the time to logs of training and of evaluation."""
        if logs is not None and ("loss" in logs or "eval_loss" in logs):
            self._add(logs, state, {"train_seconds": self.seconds})


def refuse_label_smoother(args: TrainingArguments):
    """Refuse Trainer's own label smoothing, which takes the place of the model's loss, routing losses and all.

    Raises:
        ValueError: if `label_smoothing_factor` is set.
    """
    if getattr(args, "label_smoothing_factor", 0):  # a loop of one's own may give less
        raise ValueError(
            f"`label_smoothing_factor={args.label_smoothing_factor}` makes Trainer compute the loss without the routing "
            "losses, and the routing would learn nothing. Leave it at 0; StableMoESeq2SeqConfig has `label_smoothing`."
        )


def refuse_lost_losses(stablemoe: TwoStageRoutingMixin):
    """Refuse a step of stage 1 whose loss is without the routing losses: its gradients reach no distilled router.

    To be called between the backward pass and the optimizer's step. An engine that keeps gradients elsewhere, or an
    optimizer that steps in the backward pass, leaves none to look at, and this does nothing.

    Raises:
        ValueError: if other parameters have a gradient and none of those that the routing is distilled into has.
    """
    if stablemoe.routing_stage == 2:
        return
    layers = stablemoe.moe_layers_by_name.values()
    learned = [p for layer in layers for p in layer.bare_router.stage1_parameters() if p.requires_grad]
    if not learned or any(p.grad is not None for p in learned):
        return
    if any(p.grad is not None for p in stablemoe.parameters()):
        raise ValueError(
            "The loss of this step is without the routing losses: no gradient reaches the distilled routers, and stage 1 "
            "would end in a routing that nothing has trained. Trainer's `compute_loss_func`, and a `compute_loss` of your "
            "own, take the place of the model's loss: add `outputs.aux_loss` to yours (docs/train.md shows how), or leave "
            "the loss to the model."
        )


__all__ = [
    "LoggingCallback",
    "TrainingClockCallback",
    "TrainingStopwatch",
    "refuse_label_smoother",
    "refuse_lost_losses",
]
