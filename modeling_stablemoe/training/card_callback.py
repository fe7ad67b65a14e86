# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""A `TrainerCallback` that puts a model card, filled from the run, beside everything that is saved and pushed."""

import logging
import shutil
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.checkpoints.finding import checkpoint_of_step
from modeling_stablemoe.hub.cards import CARD_FILE, CardFacts, build_model_card, is_filled_card
from modeling_stablemoe.measure.fluctuation import FIGURE_FILE
from modeling_stablemoe.measure.report import last_evaluation, summarize_run
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin

from .logging_callback import find_caller


logger = logging.getLogger(__name__)


class ModelCardCallback(TrainerCallback):
    """Puts a model card beside every model that a Trainer saves or pushes, filled from the run at that step.

    These are checkpoints, what `save_model` and the model's own `save_pretrained` write, and what `Trainer.push_to_hub`
    and every `hub_strategy` upload, where Trainer's draft of a card would stand else. A README.md that somebody wrote is
    left alone. A model that is trained further by somebody else is saved without one. Arguments of `Trainer.push_to_hub`, such as `license`, are taken into the card.

    `StageTransitionCallback` and `RoutingStatisticsCallback` bring this callback, unless there is one: pass your own to
    say more than a run can know. After `trainer.remove_callback(ModelCardCallback)`, before training, there are no cards but
    Trainer's drafts.

    Args:
        facts (`CardFacts`, *optional*): license, language, data sets and the like. The model that training started from is
            found out where it is not named.

    Raises:
        ValueError: at the start of training, if there is no StableMoE model.
    """

    def __init__(self, facts: CardFacts | None = None):
        self.facts = facts or CardFacts()
        self._name = ""
        self._found: dict = {}  # facts that the model knows
        self._args: TrainingArguments | None = None
        self._state: TrainerState | None = None
        self._has_ended = False

    def __deepcopy__(self, memo):
        # A copy of the model is one of the same run.
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Follow the model and the state that Trainer has just made or resumed."""
        if _stablemoe_in(model) is None:
            raise ValueError(
                f"{type(model).__name__} is not a StableMoE model: ModelCardCallback needs a model of "
                "`modeling_stablemoe`. If it was loaded with `trust_remote_code=True`, import `modeling_stablemoe` first."
            )
        self._has_ended = False
        self._follow(args, state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Stand by the model again, which forgets its run with every step: of another run this one knows nothing."""
        _stablemoe_in(model).after_saving = self.write

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        """Follow a model that is not trained here, only evaluated."""
        self._follow(args, state, model)

    def on_train_end(self, args, state, control, **kwargs):
        """Take note that the model may be that of the best checkpoint from now on."""
        self._has_ended = True

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        """Put the card of the checkpoint into the folder that Trainer uploads during training."""
        self._follow(args, state, model)
        card = checkpoint_of_step(args, state) / CARD_FILE
        target = Path(args.output_dir) / CARD_FILE
        if state.is_world_process_zero and card.exists() and _may_write(target):
            replace_file(target, partial(shutil.copyfile, card))

    def _follow(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None):
        self._args, self._state = args, state
        stablemoe = None if model is None else _stablemoe_in(model)
        if stablemoe is None:
            return
        stablemoe.after_saving = self.write
        self._name = args.hub_model_id or Path(args.output_dir).resolve().name
        trainer = find_caller(Trainer)
        if trainer is not None:
            self._name = trainer.hub_model_id or self._name
            # The only place where Trainer lets its draft be replaced. Adapters have a card of their own kind.
            if trainer.accelerator.unwrap_model(trainer.model) is stablemoe:
                trainer.create_model_card = partial(self._create_model_card, stablemoe)
        self._found = {"base_model": stablemoe.config.name_or_path or None, "tags": list(stablemoe.model_tags or [])}

    def _create_model_card(
        self,
        model: PreTrainedModel,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ):
        """Stand in for `Trainer.create_model_card`, with its arguments; `dataset_name` is TRL's."""
        if not self._state.is_world_process_zero:
            return
        facts = self._all_facts().updated(
            language=_listed(language),
            license=license,
            tags=_listed(tags),
            base_model=finetuned_from,
            task=tasks if tasks is None else _listed(tasks)[0],
            datasets=_listed(dataset_tags),
            dataset_name=dataset_name or (dataset if dataset is None else ", ".join(_listed(dataset))),
            dataset_config=dataset_args if dataset_args is None else _listed(dataset_args)[0],
        )
        self.write(model, Path(self._args.output_dir), facts=facts, title=model_name)

    def write(
        self, model: PreTrainedModel, folder: str | Path, facts: CardFacts | None = None, title: str | None = None
    ):
        """Write the card of a model to a folder, and the figure of the routing fluctuation once training has ended.

        Args:
            model (`PreTrainedModel`): of this package, at the step that the Trainer is at.
            folder (`str` or `Path`): an existing folder; a README.md that is no such card is left as it is.
            facts (`CardFacts`, *optional*): Default: those of the callback and those that were found out.
            title (`str`, *optional*): heading. Default: the model's name.
        """
        if not _may_write(Path(folder) / CARD_FILE):
            return
        card = build_model_card(
            model_name=self._name,
            config=model.config,
            results=self._results(model),
            model_class=type(model),
            facts=facts or self._all_facts(),
            title=title,
            figure=self._bring_figure(Path(folder)),
        )
        replace_file(Path(folder) / CARD_FILE, card.save)

    def _all_facts(self) -> CardFacts:
        known = {name: value for name, value in vars(self.facts).items() if value}
        return CardFacts(**{**self._found, **known})

    def _results(self, model: PreTrainedModel) -> dict:
        state, args = self._state, self._args
        is_best = self._has_ended and args.load_best_model_at_end and state.best_model_checkpoint is not None
        step = state.best_global_step if is_best else state.global_step
        results = summarize_run(model, state, step)
        return {**results, **last_evaluation(state.log_history, step if is_best else None, model.can_generate())}

    def _bring_figure(self, folder: Path) -> str | None:
        figure = Path(self._args.output_dir) / FIGURE_FILE
        if not self._has_ended or not figure.exists():
            return None  # one that is there during training is of an earlier run
        if folder.resolve() != figure.parent.resolve():
            shutil.copyfile(figure, folder / FIGURE_FILE)
        return FIGURE_FILE


def add_model_card(handler: CallbackHandler | None):
    """Let a Trainer have a `ModelCardCallback`, unless it has one."""
    if handler is not None and not any(isinstance(callback, ModelCardCallback) for callback in handler.callbacks):
        handler.add_callback(ModelCardCallback())


def _stablemoe_in(model: nn.Module) -> TwoStageRoutingMixin | None:
    """Find the StableMoE model, dense or not, in what may wrap it."""
    return next((module for module in model.modules() if isinstance(module, TwoStageRoutingMixin)), None)


def _may_write(path: Path) -> bool:
    if not path.exists() or is_filled_card(path):
        return True
    logger.warning("%s was not filled by this package: it stays, and there is no model card.", path)
    return False


def _listed(value: str | list[str] | None) -> list[str] | None:
    return [value] if isinstance(value, str) else value


__all__ = ["ModelCardCallback", "add_model_card"]
