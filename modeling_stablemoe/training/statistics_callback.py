# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The `TrainerCallback` that adds routing statistics to the logs, and what it shares with the stage transition.

It is thin: the numbers are made in `measure/meter.py`.
"""

import logging
from pathlib import Path

from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from modeling_stablemoe.checkpoints.adapters import (
    ROUTING_FILE,
    copy_routing,
    holds_adapters,
    load_routing,
    save_routing,
)
from modeling_stablemoe.checkpoints.finding import checkpoint_of_step, find_stablemoe, resumed_checkpoint
from modeling_stablemoe.checkpoints.folders import copy_code_files
from modeling_stablemoe.measure.meter import LayerLoads, RoutingMeter, RoutingTotals, layer_names
from modeling_stablemoe.model.losses_stablemoe import is_distributed
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin

from .card_callback import default_card
from .logging_callback import LoggingCallback, TrainingStopwatch, refuse_label_smoother, refuse_lost_losses
from .processes import check_same_routing


logger = logging.getLogger(__name__)

# Where the load of each expert goes.
EXPERT_LOAD = ("history", "reporters", "none")


class RoutingStatisticsCallback(LoggingCallback):
    """Adds routing statistics to the Trainer's training logs, and so to its reporters, for a model of any router.

    Reporters see them at the same log if they stand behind this callback in the list. Trainer puts those of `report_to`
    before it; `RoutingTrainer` puts them behind.

    Each log tells of the steps since the last one, of the tokens of all processes, padding left out:

    - `task_loss`, `routing_stage`, `mean_gate`, `closed_gates`, `common_direction`; `router_entropy` where the
      routing learns and `overflow` where there is a capacity; where the log covers steps in which the routing was learned
      also `balance_loss` and, where it is distilled, `distillation_loss`, `distillation_agreement` and
      `distillation_agreement_by_id`. A loss or hidden state that was not finite makes `task_loss` or `common_direction`
      NaN.
    - `load_max_over_mean`, `load_min_over_mean` and `load_entropy` of the layer that is worst in it and `dead_experts` of
      all layers; with several MoE layers those of each, but for the least load, too, as `load_entropy/layer_0`, or
      `/encoder_0` and `/decoder_0`.
    - `tokens_per_second`: tokens read by all processes, source and target together, over the wall-clock time since the
      last log. Loading data and logging count; evaluation, saving and `RoutingFluctuationCallback` do not.
    - the load of each expert, where and how `expert_load` says.

    Checkpoints and the output folder get a model card, as `ModelCardCallback` describes.

    `StageTransitionCallback` does all this and freezes the routing; take one of the two.

    Args:
        expert_load (`str`): where the load of each expert goes, as tokens over the mean of its layer (1 is even):
            `"history"`: into the log history alone, as the list `expert_load`, one row per MoE layer, which keeps the
            console to one line and is what `scripts/plot_run.py` draws; `"reporters"`: to the reporters (and the
            console), too, as `expert_load/layer_0/expert_0`; `"none"`: nowhere, for when layers x experts are so many
            thousands that they would swell `trainer_state.json`.
        model_card (`bool`): write model cards, unless a `ModelCardCallback` is in the list.

    Raises:
        ValueError: for another `expert_load`; at the start of training, for a model of another kind or a dense one; at a
            step of stage 1 on a loss that leaves the routing losses out.
    """

    _meter: RoutingMeter | None = None
    _stopwatch: TrainingStopwatch | None = None
    _coefficient: float | None = None

    def __init__(self, expert_load: str = "history", model_card: bool = True):
        if expert_load not in EXPERT_LOAD:
            raise ValueError(f"`expert_load` must be one of {list(EXPERT_LOAD)}, got {expert_load!r}.")
        self.expert_load = expert_load
        # What writes the cards; `None` until it is known whether the list has a callback for that.
        self.model_card = None if model_card else TrainerCallback()

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """Determine whether cards are to be written; note what the routing losses count for.

        A trainer built upon Trainer may change that later.
        """
        self.model_card = self.model_card or default_card(state)
        self._coefficient = find_stablemoe(model).config.router_aux_loss_coef if _is_watchable(model) else None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Begin to watch the model."""
        resume_routing(model, args, state)
        self._watch_model(args, state, find_loaded(model))

    def _watch_model(self, args: TrainingArguments, state: TrainerState, stablemoe: TwoStageRoutingMixin):
        refuse_label_smoother(args)
        self._check_coefficient(stablemoe)
        check_same_routing(stablemoe, "at the start of training")
        self.model_card = self.model_card or default_card(state)  # added to a Trainer that was made already
        if self._meter is not None:
            self._meter.close()
        self._meter = RoutingMeter(stablemoe)
        self._stopwatch = TrainingStopwatch()

    def on_step_begin(self, args, state, control, **kwargs):
        """Let the stopwatch run."""
        self._leave_out_other_passes()
        self._stopwatch.begin_step()

    def _leave_out_other_passes(self):
        """Let nobody's evaluation, check or sample between the steps count as training."""
        if self._meter.pop_other_passes():
            self._stopwatch.interrupt()

    def _check_coefficient(self, stablemoe: TwoStageRoutingMixin):
        """Warn if a trainer has changed the weight of the routing losses, as TRL's may."""
        coefficient = stablemoe.config.router_aux_loss_coef
        if stablemoe.routing_stage == 1 and self._coefficient not in (None, coefficient):
            logger.warning(
                "`config.router_aux_loss_coef` was %s when the trainer was made and is %s now: the routing losses count "
                "that many times. If that is not what you want, set `router_aux_loss_coef=%s` in the trainer's arguments.",
                self._coefficient,
                coefficient,
                self._coefficient,
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Refuse to train stage 1 on a loss without the routing losses."""
        refuse_lost_losses(self._meter.model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Note when training pauses: what callbacks do at the end of the step comes after this."""
        self._stopwatch.end_step()

    def on_step_end(self, args, state, control, **kwargs):
        """Close the step in the statistics."""
        self._meter.end_step()

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        """Update the card of a trained model."""
        if self.model_card is not None:
            self.model_card.on_evaluate(args, state, control, model=model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the routing statistics since the last log to the Trainer's training logs."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if logs is None or "loss" not in logs or self._meter is None:
            return
        totals = self._meter.pop_window()
        if totals is None:
            return
        loads = LayerLoads(totals.load)
        self._add(logs, state, self._metrics(totals, loads))
        if self.expert_load == "history":
            # A list, which no reporter takes.
            rows = [[round(load, 4) for load in layer] for layer in loads.relative]
            self._add_to_history(state, {"expert_load": rows})

    def _metrics(self, totals: RoutingTotals, loads: LayerLoads) -> dict[str, float]:
        self._leave_out_other_passes()
        config, seconds = self._meter.model.config, self._stopwatch.pop()
        metrics = totals.metrics(self._meter.model.routing_stage) | loads.named(layer_names(config))
        if seconds > 0:
            metrics["tokens_per_second"] = totals.total("tokens_read") / seconds
        if self.expert_load == "reporters":
            metrics |= loads.experts(layer_names(config))
        return metrics

    def on_save(self, args, state, control, model=None, **kwargs):
        """Put beside a checkpoint what is not in it, and a card; do not time the saving."""
        self._stopwatch.interrupt()
        self._save_beside(model, checkpoint_of_step(args, state))
        self.model_card.on_save(args, state, control, model=model)

    def _save_beside(self, model: nn.Module, checkpoint: Path):
        """Save what a run goes on from and the checkpoint does not hold: of adapters, the routing."""
        if holds_adapters(model):
            save_routing(model, checkpoint)

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        """Add to what Trainer uploads during training, weights and config, the code files, a routing and a card."""
        checkpoint = checkpoint_of_step(args, state)
        # Of several processes only the first gets here, and writing takes all of them.
        if checkpoint.is_dir() and not is_distributed():
            self._save_beside(model, checkpoint)
        if state.is_world_process_zero:
            copy_code_files(checkpoint, args.output_dir)
            copy_routing(checkpoint, args.output_dir)
        if self.model_card is not None:
            self.model_card.on_push_begin(args, state, control, model=model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Stop watching."""
        is_best = getattr(args, "load_best_model_at_end", False)  # a loop of one's own may give less
        if is_best and state.best_model_checkpoint is not None:
            _load_routing_beside(model, Path(state.best_model_checkpoint))
        self._meter.close()
        self.model_card.on_train_end(args, state, control, model=model)


def find_loaded(model: nn.Module) -> TwoStageRoutingMixin:
    """Return the StableMoE model in the stage of its weights, which an engine may have loaded after it was made."""
    stablemoe = find_stablemoe(model)
    stablemoe.follow_loaded_routing()
    return stablemoe


def resume_routing(model: nn.Module, args: TrainingArguments, state: TrainerState):
    """Load the routing of adapters that an engine resumed, or PEFT from a checkpoint of before adapters held it."""
    checkpoint = resumed_checkpoint(args, state)
    if checkpoint is not None:
        _load_routing_beside(model, checkpoint)


def _load_routing_beside(model: nn.Module, checkpoint: Path):
    if holds_adapters(model) and (checkpoint / ROUTING_FILE).is_file():
        load_routing(model, checkpoint)


def _is_watchable(model: nn.Module) -> bool:
    """Return True if `find_stablemoe` finds a model; where it does not, training ends with its error at the start."""
    try:
        find_stablemoe(model)
    except ValueError:
        return False
    return True


__all__ = ["RoutingStatisticsCallback", "find_loaded", "resume_routing"]
