# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The stage transition for MoE models of transformers: their routing is learned, then a table holds it."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerState

from modeling_stablemoe.checkpoints.finding import checkpoint_of_step, resumed_checkpoint
from modeling_stablemoe.measure.meter import evenness
from modeling_stablemoe.model.losses_stablemoe import is_distributed, sum_across_processes
from modeling_stablemoe.training.logging_callback import LoggingCallback

from .installing import (
    TABLES_NAME,
    facts_of,
    install_tables,
    installed_layers,
    learned_layers,
    load_tables,
    remove_tables,
    save_tables,
)
from .making import COUNTS_NAME, RouteCounter, RouteCounts, load_counts, make_tables, save_counts


logger = logging.getLogger(__name__)


class TableTransitionCallback(LoggingCallback):
    """Counts the routes of a `Trainer`'s last steps before the transition, and freezes them as balanced tables.

    From then on a token has the same experts whatever its context; gates and experts go on learning. The model's own balance loss
    leaves frozen layers out. Checkpoints get the tables beside the weights (`routing_tables.safetensors`), and so does
    `output_dir` at the end; a resumed run goes on with them, or with the counts that it had.

    The history gets `transition_step`, `frozen_layers`, `table_agreement` (share of the counted choices that the tables keep,
    mean over frozen layers) and `table_load_max_over_mean` (of the worst of them).

    Args:
        step (`int` or `float`): optimizer steps until the transition, or their share of all steps, inside (0, 1).
        count_steps (`int`): the last steps before it, whose routes are counted; >= 1.
        max_load (`float`): tokens allowed on one expert, in mean loads; >= 1.
        layers (sequence of `int`, *optional*): indices of the blocks to freeze. Default: all that route by a learned choice.
        min_agreement (`float`, *optional*): freeze those of them only whose table keeps at least this share of the choices.

    Attributes:
        frozen (`list[int]`): blocks frozen at the transition; empty before.

    Raises:
        ValueError: for a value out of range; at the start of training, if the transition would come after its end, tables cannot
            be installed in a layer, or a run is resumed without its tables.
    """

    def __init__(
        self,
        step: int | float,
        count_steps: int,
        max_load: float,
        layers: Sequence[int] | None = None,
        min_agreement: float | None = None,
    ):
        if not (0 < step < 1 if isinstance(step, float) else step >= 1):
            raise ValueError(f"`step` is {step}; pass an int >= 1, or a share of all steps inside (0, 1).")
        if count_steps < 1:
            raise ValueError(f"`count_steps` is {count_steps}; pass an integer >= 1.")
        if max_load < 1:
            raise ValueError(f"`max_load` is {max_load}; pass a number >= 1, 1 being the mean load.")
        if min_agreement is not None and not 0 <= min_agreement <= 1:
            raise ValueError(f"`min_agreement` is {min_agreement}; pass a share in [0, 1].")
        self.step, self.count_steps, self.max_load = step, count_steps, max_load
        self.layers, self.min_agreement = layers, min_agreement
        self.frozen: list[int] = []
        self._transition_step = 0
        self._counter: RouteCounter | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Check that the transition can happen, and catch up where a resumed run is past it."""
        self._transition_step = round(self.step * state.max_steps) if isinstance(self.step, float) else self.step
        if not 1 <= self._transition_step <= state.max_steps:
            raise ValueError(
                f"The transition at step {self._transition_step} is not within training ({state.max_steps} steps): change `step`."
            )
        checkpoint = resumed_checkpoint(args, state)
        done = _past_transition(state)
        if done is not None and done["frozen_layers"] and not installed_layers(model):
            if checkpoint is None or not (checkpoint / TABLES_NAME).is_file():
                raise ValueError(
                    f"The routing was frozen at step {done['transition_step']}, and there is no {TABLES_NAME} to resume from. Name the "
                    "checkpoint in `TrainingArguments(resume_from_checkpoint=...)`, too, or load its tables before training: "
                    "`load_tables(model, checkpoint)`."
                )
            load_tables(model, checkpoint)
        if done is not None:
            self.frozen = installed_layers(model)
            return
        layers = learned_layers(model) if self.layers is None else list(self.layers)
        self._counter = RouteCounter(model, layers, in_training=True)
        for layer in layers:
            facts_of(model, layer)  # an error now, not at the transition
        if state.global_step > self._first_counted():
            if checkpoint is not None and (checkpoint / COUNTS_NAME).is_file():
                if state.is_world_process_zero:  # what all processes have counted
                    load_counts(self._counter.counts, checkpoint / COUNTS_NAME)
            else:
                logger.warning("There is no %s to resume from: routes are counted from this step on.", COUNTS_NAME)

    def _first_counted(self) -> int:
        """Steps that are over when counting begins."""
        return max(0, self._transition_step - self.count_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        """Start counting when it is time."""
        if self._counter is not None and not self._counter.is_counting and state.global_step >= self._first_counted():
            self._counter.__enter__()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Freeze when it is time."""
        if self._counter is None or state.global_step < self._transition_step:
            return
        self._counter.__exit__()
        counts, self._counter = _summed(self._counter.counts, model), None
        made = make_tables(counts, self.max_load)
        choices = counts.k * int(counts.tokens.sum())
        agreements = [balanced.agreement / choices for balanced in made.balanced]
        passing = [
            place for place, kept in enumerate(agreements) if self.min_agreement is None or kept >= self.min_agreement
        ]
        self.frozen = [counts.layers[place] for place in passing]
        metrics = {"transition_step": state.global_step, "frozen_layers": len(passing)}
        if passing:
            install_tables(model, made.tables[passing], self.frozen)
            loads = [evenness(made.balanced[place].load)["load_max_over_mean"].item() for place in passing]
            metrics["table_agreement"] = sum(agreements[place] for place in passing) / len(passing)
            metrics["table_load_max_over_mean"] = max(loads)
        self._log(state, control, metrics)
        if state.is_world_process_zero:
            shares = ", ".join(f"{layer}: {kept:.1%}" for layer, kept in zip(counts.layers, agreements, strict=True))
            tqdm.write(
                f"Routing of layers {self.frozen} frozen after step {state.global_step} of {state.max_steps}. Choices that the tables "
                f"keep: {shares}."
            )

    def on_save(self, args, state, control, model=None, **kwargs):
        """Put beside a checkpoint the tables, or what has been counted for them."""
        checkpoint = checkpoint_of_step(args, state)
        if self._counter is not None and self._counter.is_counting:
            counts = _summed(self._counter.counts, model)
            if state.is_world_process_zero:
                save_counts(counts, checkpoint / COUNTS_NAME, {})
        self._save_tables(model, checkpoint, state)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Put the tables into `output_dir`; warn if there are none; take them out of a best model that had none."""
        if self._counter is not None:
            if self._counter.is_counting:
                self._counter.__exit__()
            logger.warning("Training ended before step %d: the routing is not frozen.", self._transition_step)
            return
        best = state.best_model_checkpoint if getattr(args, "load_best_model_at_end", False) else None
        if self.frozen and best is not None and not (Path(best) / TABLES_NAME).is_file():
            remove_tables(model)
            logger.warning(
                "The best checkpoint, %s, is from before the transition: the tables are taken out again.", best
            )
        self._save_tables(model, Path(args.output_dir), state)

    def _save_tables(self, model: PreTrainedModel, folder: Path, state: TrainerState):
        if state.is_world_process_zero and installed_layers(model):
            folder.mkdir(parents=True, exist_ok=True)
            save_tables(model, folder)


def _past_transition(state: TrainerState) -> dict | None:
    return next((entry for entry in state.log_history if "frozen_layers" in entry), None)


def _summed(counts: RouteCounts, model: PreTrainedModel) -> RouteCounts:
    """Add up what all processes have counted; every process must call this."""
    if not is_distributed():
        return counts

    def total(values: Tensor) -> Tensor:
        return sum_across_processes(values.to(model.device, copy=True)).cpu()

    chosen = torch.stack(list(map(total, counts.chosen)))
    return RouteCounts(counts.layers, total(counts.tokens), chosen, None, counts.k)


__all__ = ["TableTransitionCallback"]
