# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""A `TrainerCallback` that puts a model card, filled from the run, beside what is saved and pushed."""

import logging
import shutil
from dataclasses import asdict
from pathlib import Path

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from modeling_stablemoe.checkpoints.adapters import holds_adapters
from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.checkpoints.finding import checkpoint_of_step
from modeling_stablemoe.hub.cards import CARD_FILE, CardFacts, build_model_card, is_filled_card
from modeling_stablemoe.measure.fluctuation import FIGURE_FILE
from modeling_stablemoe.measure.report import last_evaluation, summarize_run
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin


logger = logging.getLogger(__name__)


class ModelCardCallback(TrainerCallback, ExportableState):
    """Puts a model card, filled from the run at that step, beside every checkpoint and into the output folder.

    Each checkpoint, and each push of a `hub_strategy`, has the card of its step. The card of the model that training
    leaves is written into the output folder when training ends, and again after later evaluations: `trainer.save_model()`
    puts the weights beside it. Trainer asks no callback when it saves to another folder or when `push_to_hub` drafts a
    card: `RoutingTrainer` brings the card there, too. A README.md that somebody wrote is left alone; adapters keep the
    card of PEFT.

    `StageTransitionCallback` and `RoutingStatisticsCallback` write the same cards, unless this callback is in the list:
    it says more than a run can know.

    Args:
        facts (`CardFacts`, *optional*): license, language, data sets and the like; a `dict` of its fields will do. The
            model that training started from is found out where it is not named.

    Raises:
        ValueError: at the start of training, if there is no StableMoE model.
    """

    def __init__(self, facts: CardFacts | dict | None = None):
        self.facts = CardFacts(**facts) if isinstance(facts, dict) else facts or CardFacts()
        self._ended_with: TrainerState | None = None  # a run has a state of its own

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Refuse another model."""
        if not any(isinstance(module, TwoStageRoutingMixin) for module in model.modules()):
            raise ValueError(
                f"{type(model).__name__} is not a StableMoE model: ModelCardCallback needs a model of "
                "`modeling_stablemoe`. If it was loaded with `trust_remote_code=True`, import `modeling_stablemoe` first."
            )
        # Trainer's state has no place for it where the resumed run had no such callback.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_save(self, args, state, control, model=None, **kwargs):
        """Write the card of the checkpoint that Trainer has just saved."""
        self.write(model, checkpoint_of_step(args, state), args, state)

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        """Write the card into what Trainer is about to upload during training: the output folder, or the checkpoint."""
        checkpoint = checkpoint_of_step(args, state)
        if not self._has_ended(state) and checkpoint.is_dir():
            self.write(model, checkpoint, args, state)
            self.write(model, args.output_dir, args, state)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Write the card of the model that training leaves, which may be that of the best checkpoint."""
        self._ended_with = state
        self.on_evaluate(args, state, control, model=model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        """Update the card in the output folder, if training has ended."""
        # A trial saves nothing but checkpoints.
        if self._has_ended(state) and not getattr(state, "is_hyper_param_search", False):
            self.write(model, args.output_dir, args, state)

    @staticmethod
    def describes(model: nn.Module) -> bool:
        """Return True for a StableMoE model or what an engine made of it, False for anything else, such as adapters."""
        stablemoe = extract_model_from_parallel(model, keep_torch_compile=False)
        return isinstance(stablemoe, TwoStageRoutingMixin) and not holds_adapters(stablemoe)

    def write(
        self,
        model: nn.Module,
        folder: str | Path,
        args: TrainingArguments,
        state: TrainerState,
        *,
        facts: CardFacts | None = None,
        name: str | None = None,
        title: str | None = None,
    ):
        """Write the card of a model to a folder, and the figure of the routing fluctuation once training has ended.

        Args:
            model (`torch.nn.Module`): of what `describes` does not know there is no card.
            folder (`str` or `Path`): an existing folder; a README.md that is no such card is left as it is.
            args (`TrainingArguments`): of the run.
            state (`TrainerState`): of the run, at the step of the model.
            facts (`CardFacts`, *optional*): replace those of the callback where they say something.
            name (`str`, *optional*): of the model on the Hub. Default: `args.hub_model_id`, or that of the output folder.
            title (`str`, *optional*): heading. Default: the name.
        """
        if not self.describes(model) or not state.is_world_process_zero:
            return
        stablemoe, path = extract_model_from_parallel(model, keep_torch_compile=False), Path(folder) / CARD_FILE
        if path.exists() and not is_filled_card(path):
            logger.warning("%s was not filled by this package: it stays, and there is no model card.", path)
            return
        found = CardFacts(base_model=stablemoe.config.name_or_path or None, tags=list(stablemoe.model_tags or []))
        for more in (self.facts, facts or CardFacts()):
            found = found.updated(**{field: value for field, value in vars(more).items() if value})
        card = build_model_card(
            model_name=name or args.hub_model_id or Path(args.output_dir).resolve().name,
            config=stablemoe.config,
            results=self._results(stablemoe, args, state),
            model_class=type(stablemoe),
            facts=found,
            title=title,
            figure=self._bring_figure(Path(folder), args, state),
        )
        replace_file(path, card.save)

    def state(self) -> dict:
        """Return what `trainer_state.json` keeps, and by which the other callbacks know that this one is there."""
        return {"args": {"facts": asdict(self.facts)}, "attributes": {}}

    def _has_ended(self, state: TrainerState) -> bool:
        return state is self._ended_with

    def _results(self, model: PreTrainedModel, args: TrainingArguments, state: TrainerState) -> dict:
        is_best = self._has_ended(state) and args.load_best_model_at_end and state.best_model_checkpoint is not None
        step = state.best_global_step if is_best else state.global_step
        results = summarize_run(model, state, step)
        return {**results, **last_evaluation(state.log_history, step if is_best else None, model.can_generate())}

    def _bring_figure(self, folder: Path, args: TrainingArguments, state: TrainerState) -> str | None:
        figure = Path(args.output_dir) / FIGURE_FILE
        if not self._has_ended(state) or not figure.exists():
            return None  # one that is there during training is of an earlier run
        if folder.resolve() != figure.parent.resolve():
            shutil.copyfile(figure, folder / FIGURE_FILE)
        return FIGURE_FILE


def default_card(state: TrainerState) -> TrainerCallback:
    """Return what writes cards for a callback that watches routing; nothing where a `ModelCardCallback` is in the list.

    Args:
        state (`TrainerState`): of a Trainer that has resumed nothing yet: it knows the callbacks in the list.
    """
    has_own = ModelCardCallback.__name__ in state.stateful_callbacks
    return TrainerCallback() if has_own else ModelCardCallback()


__all__ = ["ModelCardCallback", "default_card"]
