# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The `TrainerCallback` that makes the transition from stage 1 to stage 2, and the others beside it.

It is thin: freezing is a method of the model.
"""

import json
import logging
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import TrainerState

from modeling_stablemoe.checkpoints.adapters import ROUTING_FILE, has_routing, holds_adapters
from modeling_stablemoe.checkpoints.finding import resumed_checkpoint
from modeling_stablemoe.measure.verdict import FrozenReport, SettlingWatch, Verdict, judge, load_of_frozen
from modeling_stablemoe.model.distillation_stablemoe import sees_context
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin

from .loops import copy_moe_layers, drop_idle_gradients, freeze_router, restore_moe_layers
from .statistics_callback import RoutingStatisticsCallback, find_loaded, resume_routing


logger = logging.getLogger(__name__)

# Beside a checkpoint of stage 1: what `SettlingWatch` goes on from.
WATCH_FILE = "stage1_watch.safetensors"


class StageTransitionCallback(RoutingStatisticsCallback):
    """Freezes the routing: stage 1 before, stage 2 after.

    The transition happens once, at the end of an optimizer step, before anything is logged, evaluated or saved at that
    step; callbacks that stand before this one see it from the next step on. The stage is read from the model and the step
    from the Trainer, so a resumed run needs no more than the checkpoint. `requires_grad` and the optimizer's groups stay as
    they are. Every router that is distilled can be frozen: `"stable"`, and `"switch"` and `"base"` with a
    `distilled_router` (table 5).

    Adds the statistics of `RoutingStatisticsCallback` to the Trainer's logs and, while there are tables to compare,
    `table_change`, the share of the tokens so far whose expert, by the table that would be frozen, is not that of the
    last check. At the transition it logs an entry with `transition_*` of its own and says in plain words what is being
    frozen; a routing that is not worth it gets a warning with the remedy, and so do weights that have become NaN.

    Args:
        stage1_steps (`int` or `float`): length of stage 1, as optimizer steps (an `int` >= 1) or as a share of all
            steps (a `float` in (0, 1)). The paper's language models take 6 000 of 60 000 steps (table 7).
        settled_change (`float`, *optional*): freeze earlier, once `table_change` was at most this in two checks in
            succession and nothing speaks against it. `stage1_steps` is the latest step then.
        hold_until_ready (`int` or `float`, *optional*): where something speaks against freezing after `stage1_steps`,
            go on with stage 1 until nothing does, but until this step, or share of all steps, at the latest.
        check_steps (`int`, *optional*): optimizer steps between checks. Default: as between logs.
        best_of_stage2 (`bool`): let evaluations of stage 1 count neither for the best checkpoint nor for the patience of
            `EarlyStoppingCallback`, so that `load_best_model_at_end` leaves a frozen model. The evaluation of the
            transition step is of stage 2. With `save_strategy="best"`, stage 1 saves at every evaluation. Default: the
            evaluations of both stages compete, and a best checkpoint of stage 1 loads as a model that is not frozen.
        expert_load (`str`): where the load of each expert goes: `"history"`, `"reporters"` or `"none"`, as of
            `RoutingStatisticsCallback`.
        model_card (`bool`): write model cards, unless a `ModelCardCallback` is in the list.

    Raises:
        ValueError: for a value out of range; at the start of training, if stage 1 would outlast it, if the model is of
            another kind or dense, if it is frozen already, if its routing is not distilled, or if it is to settle and
            has no table; at a step of stage 1 on a loss that leaves the routing losses out; at the transition, if weights
            to be frozen as they are hold NaN or infinities.
    """

    def __init__(
        self,
        stage1_steps: int | float,
        settled_change: float | None = None,
        hold_until_ready: int | float | None = None,
        check_steps: int | None = None,
        best_of_stage2: bool = False,
        expert_load: str = "history",
        model_card: bool = True,
    ):
        super().__init__(expert_load, model_card)
        _check_steps("stage1_steps", stage1_steps)
        if hold_until_ready is not None:
            _check_steps("hold_until_ready", hold_until_ready)
        if settled_change is not None and not (_is_number(settled_change, float) and 0 <= settled_change < 1):
            raise ValueError(f"`settled_change` is a share of tokens in [0, 1), got {settled_change!r}.")
        if check_steps is not None and not (_is_number(check_steps) and check_steps >= 1):
            raise ValueError(f"`check_steps` must be an integer >= 1, got {check_steps!r}.")
        self.stage1_steps = stage1_steps
        self.settled_change = settled_change
        self.hold_until_ready = hold_until_ready
        self.check_steps = check_steps
        self.best_of_stage2 = best_of_stage2
        self.transition_step: int | None = None
        self.last_step: int | None = None
        self._watch: SettlingWatch | None = None
        self._change: float | None = None
        # From the transition to the end of training, where that may begin again in between.
        self._before_freezing: dict[str, Tensor] | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Check that the transition can happen, and catch up where a resumed run is past it."""
        resume_routing(model, args, state)
        stablemoe = find_loaded(model)
        self._begin_again(stablemoe, state, optimizer)
        _require_resumed_routing(model, state)
        self.transition_step = self.resolve_transition_step(state.max_steps)
        self.last_step = self.resolve_last_step(state.max_steps)
        stablemoe.require_distillation()
        if self.settled_change is not None and sees_context(stablemoe.config):
            raise ValueError(
                f"`settled_change` watches a table, and a {stablemoe.config.distilled_router!r} router has none: leave it out."
            )
        settled = self.settled_change is not None and any("transition_step" in entry for entry in state.log_history)
        if stablemoe.routing_stage == 2 and state.global_step < self.transition_step and not settled:
            raise ValueError(
                f"The model's routing is frozen already, but stage 1 should last until step {self.transition_step} and "
                f"this is step {state.global_step}. To train a frozen model further, or one with a hash, leave "
                "StageTransitionCallback out; to resume a run, give the `stage1_steps` it was started with."
            )
        self._watch_model(args, state, stablemoe)
        _warn_of_idle_routers(stablemoe)
        self._watch = SettlingWatch(self._meter)
        if state.global_step > 0:
            checkpoint = resumed_checkpoint(args, state)
            if checkpoint is not None:
                _check_fingerprint_of_checkpoint(stablemoe, checkpoint)
            # All processes ask, also one that sees no checkpoint: the first one reads and tells the others.
            folder = checkpoint or Path(args.output_dir)
            if stablemoe.routing_stage == 1 and not self._watch.load(folder / WATCH_FILE):
                logger.warning(
                    "There is no %s in %r: what stage 1 has seen is counted again from step %d. If the checkpoint is "
                    "elsewhere, name it in `TrainingArguments(resume_from_checkpoint=...)`, too.",
                    WATCH_FILE,
                    str(folder),
                    state.global_step,
                )
        if self.best_of_stage2 and (
            stablemoe.routing_stage == 1 or (state.best_global_step or 0) < (_frozen_at(state) or 0)
        ):
            _forget_best(state)  # the run may have been started without the option
        if stablemoe.routing_stage == 1 and state.global_step >= self.last_step:
            self._freeze(args, state, control, judge(self._meter))

    def on_step_end(self, args, state, control, **kwargs):
        """Close the step in the statistics; check the routing, and freeze it when it is time."""
        super().on_step_end(args, state, control, **kwargs)
        if self._meter.model.routing_stage == 2:
            return
        if self.best_of_stage2:
            _forget_best(state)
        step, interval = state.global_step, self.check_steps or max(1, int(state.logging_steps))
        is_check = step % interval == 0
        if is_check:
            self._change = self._watch.check()
        if step >= self.last_step or (step >= self.transition_step and self.hold_until_ready is None):
            self._freeze(args, state, control, judge(self._meter))
        elif step == self.transition_step or (step > self.transition_step and is_check):
            verdict = judge(self._meter)
            if not verdict.problems():
                self._freeze(args, state, control, verdict)
            elif step == self.transition_step:
                self._say(
                    state, f"StableMoE: the transition is held, until step {self.last_step} at the latest:", verdict
                )
        elif is_check and self.settled_change is not None and self._watch.has_settled(self.settled_change):
            verdict = judge(self._meter)
            if not verdict.problems():
                self._freeze(args, state, control, verdict)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the routing statistics, and the change that the last check found."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if logs is not None and "loss" in logs and self._change is not None:
            self._add(logs, state, {"table_change": self._change})
            self._change = None

    def _save_beside(self, model: nn.Module, checkpoint: Path):
        """Save in stage 1 also what watching goes on from."""
        super()._save_beside(model, checkpoint)
        if self._meter is not None and self._meter.model.routing_stage == 1:
            self._watch.save(checkpoint / WATCH_FILE)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Let no optimizer move D and Ê in stage 2, which have a gradient of zero there on several processes."""
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        drop_idle_gradients(self._meter.model)

    def on_train_end(self, args, state, control, **kwargs):
        """Stop watching, and warn if the model is left in stage 1."""
        super().on_train_end(args, state, control, **kwargs)
        self._before_freezing = None
        if self._meter.model.routing_stage == 1:
            logger.warning("%s", self._describe_unfrozen_end(state))

    def _describe_unfrozen_end(self, state: TrainerState) -> str:
        frozen_at = _frozen_at(state)
        if frozen_at is not None:
            return (
                f"The best checkpoint, of step {state.best_global_step}, was loaded at the end of training and is from "
                f"stage 1 (the transition was at step {frozen_at}): its routing is not frozen. Call "
                "`model.freeze_router()` and save the model again, or let frozen checkpoints alone compete, with "
                "`best_of_stage2=True`."
            )
        if state.global_step < self.transition_step:
            when = f"before the transition at step {self.transition_step}"
        else:
            when = f"while the transition was held, until step {self.last_step} at the latest"
        return (
            f"Training ended at step {state.global_step}, {when}: the routing is not frozen. Train on, or call "
            "`model.freeze_router()` and save the model again. To keep early stopping out of stage 1, set "
            "`best_of_stage2=True`."
        )

    def resolve_transition_step(self, max_steps: int) -> int:
        """Return the step in [1, max_steps] at whose end the routing is frozen, unless it settles earlier or is held.

        Raises:
            ValueError: if stage 1 would outlast training.
        """
        return _resolve_steps("stage1_steps", self.stage1_steps, max_steps)

    def resolve_last_step(self, max_steps: int) -> int:
        """Return the step at whose end the routing is frozen at the latest.

        Raises:
            ValueError: if it is not between the transition and the end of training.
        """
        transition = self.resolve_transition_step(max_steps)
        if self.hold_until_ready is None:
            return transition
        last = _resolve_steps("hold_until_ready", self.hold_until_ready, max_steps)
        if last < transition:
            raise ValueError(
                f"`hold_until_ready` ends at step {last}, before the transition at step {transition}; raise it, or leave "
                "it out."
            )
        return last

    def _begin_again(self, stablemoe: TwoStageRoutingMixin, state: TrainerState, optimizer: Optimizer):
        """Undo the transition of a run that `auto_find_batch_size` has stopped and starts again, with the model as it is."""
        if self._before_freezing is not None and self._meter.model is stablemoe:
            if stablemoe.routing_stage == 2 and _frozen_at(state) is None:
                logger.warning("Training begins again, and with it stage 1: the routing frozen meanwhile is gone.")
                restore_moe_layers(stablemoe, self._before_freezing, optimizer)
        self._before_freezing = None

    def _freeze(self, args, state, control, verdict: Verdict):
        """Freeze, log what was frozen, and say it."""
        model, counts = self._meter.model, self._meter.counted_tokens()
        if getattr(args, "auto_find_batch_size", False):  # a loop of one's own may give less
            self._before_freezing = copy_moe_layers(model)
        balanced = freeze_router(model)
        frozen = FrozenReport(
            verdict,
            self._meter.num_recent_steps,
            load_of_frozen(model, counts),
            balanced,
            counts,
            model.config.num_experts_per_tok,
        )
        report = {"routing_stage": 2, "transition_step": state.global_step, **frozen.metrics()}
        self._log(state, control, report)
        lines = [
            f"StableMoE: routing frozen after step {state.global_step} of {state.max_steps}; stage 2 begins.",
            f"frozen: {_describe_frozen(model)}",
            *frozen.lines(),
            "From here on a token always goes to the same expert, in training and in the saved model.",
        ]
        self._say(state, "\n  ".join(lines), verdict)

    def _say(self, state: TrainerState, message: str, verdict: Verdict):
        if not state.is_world_process_zero:
            return
        tqdm.write(message)
        problems = verdict.problems()
        if problems:
            logger.warning("%s. Without that this routing is not worth freezing.", ". ".join(problems))


def _describe_frozen(model: TwoStageRoutingMixin) -> str:
    config = model.config
    layers = f"{config.num_moe_layers} MoE layer{'s' * (config.num_moe_layers > 1)}"
    experts = "expert" if config.num_experts_per_tok == 1 else f"{config.num_experts_per_tok} experts"
    what = f"the {experts} of each of {config.vocab_size:,} token ids in {layers}"
    if sees_context(config):
        what = f"the weights of the distilled router ({config.distilled_router}) of {layers}, which looks back at earlier tokens"
    return f"{what} (fingerprint {config.router_fingerprint})"


def _require_resumed_routing(model: nn.Module, state: TrainerState):
    """Refuse adapters that have been resumed without the routing of their run."""
    if state.global_step == 0 or not holds_adapters(model) or has_routing(model, is_frozen=bool(_frozen_at(state))):
        return
    raise ValueError(
        f"The adapters resumed at step {state.global_step} have come without the routing of their run, which is in "
        f"{ROUTING_FILE} beside them. Name their checkpoint in `TrainingArguments(resume_from_checkpoint=...)`, too, or give "
        "the model its routing before training, with `modeling_stablemoe.checkpoints.adapters.load_routing(model, checkpoint)`."
    )


def _warn_of_idle_routers(stablemoe: TwoStageRoutingMixin):
    """Warn if stage 1 distils nothing, as where PEFT has switched off all gradients but the adapters'."""
    if stablemoe.routing_stage == 2:
        return
    for name, layer in stablemoe.moe_layers_by_name.items():
        distilled_router = layer.bare_router.distilled_router
        # Counting needs no gradient.
        if not distilled_router.observes and not any(p.requires_grad for p in distilled_router.parameters()):
            logger.warning(
                "The distilled router of %s has no parameter that learns: stage 1 would freeze what it is now. With PEFT "
                'add `modules_to_save=["distilled_router"]`, or call `model.freeze_router()` before training.',
                name,
            )
            return


def _frozen_at(state: TrainerState) -> int | None:
    """Read the step of the transition off the history; `None` if there was none yet."""
    return next((entry["transition_step"] for entry in state.log_history if "transition_step" in entry), None)


def _forget_best(state: TrainerState):
    """Restart the search for the best checkpoint, and with it the patience of early stopping."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, (int, *kinds)) and not isinstance(value, bool)


def _check_steps(name: str, steps: int | float):
    if not _is_number(steps, float):
        raise ValueError(f"`{name}` must be an int (steps) or a float (share), got {steps!r}.")
    if isinstance(steps, float) and not 0 < steps < 1:
        raise ValueError(
            f"`{name}` as a share of all steps must lie inside (0, 1), got {steps}; pass an int for a number of steps."
        )
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"`{name}` must be at least 1 step, got {steps}.")


def _resolve_steps(name: str, steps: int | float, max_steps: int) -> int:
    if isinstance(steps, float):
        return max(1, round(steps * max_steps))
    if steps > max_steps:
        what = "Stage 1" if name == "stage1_steps" else f"`{name}`"
        raise ValueError(
            f"{what} of {steps} steps is longer than training ({max_steps} steps): the routing would never be frozen. "
            f"Lower `{name}` or train longer."
        )
    return steps


def _check_fingerprint_of_checkpoint(model: TwoStageRoutingMixin, checkpoint: Path):
    """Compare the routing that Trainer has resumed with the config of its checkpoint, which Trainer does not read."""
    try:
        expected = json.loads((checkpoint / "config.json").read_text()).get("router_fingerprint")
    except (OSError, ValueError):
        return  # not resumed from there, or in a format without a config
    actual = model.router_fingerprint()
    if actual != expected:
        raise ValueError(
            f"The routing tables in {str(checkpoint)!r} are not those that it was saved with: their fingerprint is "
            f"{actual}, its config has {expected}. Resume from an earlier checkpoint."
        )


__all__ = ["StageTransitionCallback"]
