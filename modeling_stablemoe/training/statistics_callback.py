# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The `TrainerCallback` that adds routing statistics to the logs, and what it shares with the stage transition.

It is thin: the numbers are made in `statistics.py`.
"""

import logging
from pathlib import Path

from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

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

from .card_callback import add_model_card
from .logging_callback import (
    LoggingCallback,
    TrainingStopwatch,
    find_caller,
    refuse_label_smoother,
    refuse_lost_losses,
)
from .processes import check_same_routing


logger = logging.getLogger(__name__)

# Where the load of each expert goes.
EXPERT_LOAD = ("history", "reporters", "none")


class RoutingStatisticsCallback(LoggingCallback):
    """Adds routing statistics to the Trainer's training logs, and so to its reporters, for a model of any router.

    Each log tells of the steps since the last one, of the tokens of all processes, padding left out:

    - `task_loss`, `routing_stage`, `mean_gate`, `closed_gates`, `common_direction`; `router_entropy` where the
      routing learns and `overflow` where there is a capacity; where the log covers steps in which the routing was learned also
      `balance_loss` and, where it is distilled, `distillation_loss`, `distillation_agreement` and
      `distillation_agreement_by_id` (see `RoutingTotals.metrics`, also for what NaN comes to).
    - `load_max_over_mean`, `load_min_over_mean` and `load_entropy` of the layer that is worst in it and `dead_experts` of
      all layers (see `LayerLoads`); with several MoE layers those of each, but for the least load, too, as
      `load_entropy/layer_0`, or `/encoder_0` and `/decoder_0`.
    - `tokens_per_second`: tokens read by all processes, source and target together, over the wall-clock time since the
      last log. Loading data and logging count; evaluation, saving and `RoutingFluctuationCallback` do not.
    - the load of each expert, where and how `expert_load` says.

    What is saved and pushed gets a model card (see `ModelCardCallback`).

    `StageTransitionCallback` does all this and freezes the routing; take one of the two.

    Args:
        expert_load (`str`): where the load of each expert goes, as tokens over the mean of its layer (1 is even):
            `"history"`: into the log history alone, as the list `expert_load`, one row a MoE layer, which keeps the
            console to one line and is what `scripts/plot_run.py` draws; `"reporters"`: to the reporters (and the
            console), too, as `expert_load/layer_0/expert_0`; `"none"`: nowhere, for when layers x experts are so many
            thousands that they would swell `trainer_state.json`.

    Raises:
        ValueError: for another `expert_load`; at the start of training, for a model of another kind or a dense one; at a
            step of stage 1 on a loss that leaves the routing losses out.
    """

    _meter: RoutingMeter | None = None
    _has_model_card = False
    _coefficient: float | None = None

    def __init__(self, expert_load: str = "history"):
        if expert_load not in EXPERT_LOAD:
            raise ValueError(f"`expert_load` must be one of {list(EXPERT_LOAD)}, got {expert_load!r}.")
        self.expert_load = expert_load

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """See to it that what is saved has a model card; note what the routing losses count for.

        A trainer built upon Trainer may change that later.
        """
        add_model_card(find_caller(CallbackHandler))
        self._has_model_card = True
        self._coefficient = find_stablemoe(model).config.router_aux_loss_coef if _is_watchable(model) else None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Begin to watch the model."""
        resume_routing(model, args, state)
        self._watch_model(args, find_loaded(model))

    def _watch_model(self, args: TrainingArguments, stablemoe: TwoStageRoutingMixin):
        refuse_label_smoother(args)
        self._check_coefficient(stablemoe)
        check_same_routing(stablemoe, "at the start of training")
        self._find_handler()
        if not self._has_model_card:  # added to a Trainer that was made already
            add_model_card(self._handler)
            self._has_model_card = True
        self._go_first()
        if self._meter is not None:
            self._meter.close()
        self._meter = RoutingMeter(stablemoe)
        self.stopwatch = TrainingStopwatch()

    def on_step_begin(self, args, state, control, **kwargs):
        """Let the stopwatch run."""
        self.stopwatch.begin_step()

    def _check_coefficient(self, stablemoe: TwoStageRoutingMixin):
        """Say so if a trainer has changed the weight of the routing losses, as TRL's may."""
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

    def on_step_end(self, args, state, control, **kwargs):
        """Close the step in the statistics."""
        self._meter.end_step()
        self.stopwatch.end_step()

    def on_evaluate(self, args, state, control, **kwargs):
        """Leave the evaluation out of the time of training."""
        if self.stopwatch is not None:  # evaluated before or after training
            self.stopwatch.interrupt()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the routing statistics since the last log to the Trainer's training logs."""
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
        config, seconds = self._meter.model.config, self.stopwatch.pop()
        metrics = totals.metrics(self._meter.model.routing_stage) | loads.named(layer_names(config))
        if seconds > 0:
            metrics["tokens_per_second"] = totals.total("tokens_read") / seconds
        if self.expert_load == "reporters":
            metrics |= loads.experts(layer_names(config))
        return metrics

    def on_save(self, args, state, control, model=None, **kwargs):
        """Put beside a checkpoint of adapters the routing, which is not in it; leave saving out of the time of training."""
        if self.stopwatch is not None:
            self.stopwatch.interrupt()
        if holds_adapters(model):
            save_routing(model, checkpoint_of_step(args, state))

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        """Add to what Trainer uploads during training, which are weights and config alone, the code files."""
        # Of several processes only the first gets here, and writing takes all of them.
        if not is_distributed():
            self.on_save(args, state, control, model=model, **kwargs)
        if state.is_world_process_zero:
            copy_code_files(checkpoint_of_step(args, state), args.output_dir)
            copy_routing(checkpoint_of_step(args, state), args.output_dir)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Stop watching."""
        is_best = getattr(args, "load_best_model_at_end", False)  # a loop of one's own may give less
        if is_best and state.best_model_checkpoint is not None:
            _load_routing_beside(model, Path(state.best_model_checkpoint))
        self._meter.close()


def find_loaded(model: nn.Module) -> TwoStageRoutingMixin:
    """Find the StableMoE model, in the stage that its weights say, which an engine may have loaded by now."""
    stablemoe = find_stablemoe(model)
    stablemoe.follow_loaded_routing()
    return stablemoe


def resume_routing(model: nn.Module, args: TrainingArguments, state: TrainerState):
    """Take up the routing of adapters that have been resumed by an engine, or by PEFT from before they held it."""
    checkpoint = resumed_checkpoint(args, state)
    if checkpoint is not None:
        _load_routing_beside(model, checkpoint)


def _load_routing_beside(model: nn.Module, checkpoint: Path):
    if holds_adapters(model) and (checkpoint / ROUTING_FILE).is_file():
        load_routing(model, checkpoint)


def _is_watchable(model: nn.Module) -> bool:
    """Tell whether `find_stablemoe` finds a model; where it does not, training ends with its error at the start."""
    try:
        find_stablemoe(model)
    except ValueError:
        return False
    return True


__all__ = ["RoutingStatisticsCallback", "find_loaded", "resume_routing"]
