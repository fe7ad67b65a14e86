# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""A `Trainer` that brings the numbers and cards of the routing callbacks everywhere, where `Trainer` asks no callback."""

from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from modeling_stablemoe.hub.cards import CardFacts

from .card_callback import ModelCardCallback
from .logging_callback import LoggingCallback, TrainingClockCallback
from .statistics_callback import RoutingStatisticsCallback


# What `Trainer.create_model_card` calls the fields of `CardFacts`, and which of them are lists.
_FACTS = {
    "finetuned_from": "base_model",
    "tasks": "task",
    "dataset_tags": "datasets",
    "dataset": "dataset_name",
    "dataset_args": "dataset_config",
}
_LISTS = ("language", "tags", "datasets")


class RoutingTrainerMixin:
    """What a `Trainer`, or a class built upon it, gains with the routing callbacks of this package in its list.

    - Every reporter sees their numbers: with the log that they belong to, and at once what is logged between two logs
      (the transition, `routing_fluctuation`).
    - `save_model` to any folder, `create_model_card` and `push_to_hub` have the filled model card, too.

    It trains like its parent: `class RoutingSFTTrainer(RoutingTrainerMixin, SFTTrainer)`.
    """

    def train(self, *args, **kwargs):
        """Train; arguments and result are those of `Trainer.train`."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LoggingCallback):
                callback.log_by(partial(Trainer.log, self))
        self.callback_handler.callbacks.sort(key=_place)
        return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Save the model and its card; arguments are those of `Trainer.save_model`."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self._card is not None:
            folder = output_dir or self.args.output_dir
            self._card.write(self.model, folder, self.args, self.state, name=self.hub_model_id)

    def create_model_card(self, **known: Any):
        """Write the filled card to the output folder.

        Args:
            **known: arguments of `Trainer.create_model_card`, by name, or fields of `CardFacts`.
        """
        if self._card is None or not self._card.describes(self.model):
            super().create_model_card(**known)
            return
        title = known.pop("model_name", None)
        facts = {_FACTS.get(name, name): value for name, value in known.items() if value is not None}
        for name, value in facts.items():
            items = [value] if isinstance(value, str) else list(value)
            facts[name] = items if name in _LISTS else ", ".join(items)
        options = {"facts": CardFacts(**facts), "name": self.hub_model_id, "title": title}
        self._card.write(self.model, self.args.output_dir, self.args, self.state, **options)

    @property
    def _card(self) -> ModelCardCallback | None:
        """What writes the cards of this run, if anything does."""
        for callback in self.callback_handler.callbacks:
            writer = callback.model_card if isinstance(callback, RoutingStatisticsCallback) else callback
            if isinstance(writer, ModelCardCallback):
                return writer
        return None


class RoutingTrainer(RoutingTrainerMixin, Trainer):
    """`Trainer` with `RoutingTrainerMixin`."""


def _place(callback: TrainerCallback) -> int:
    """Put what decides on logs first, then the clock, whose steps end there, what adds numbers to logs, and who reads them."""
    kinds = (DefaultFlowCallback, TrainingClockCallback, LoggingCallback)
    return next((place for place, kind in enumerate(kinds) if isinstance(callback, kind)), len(kinds))


__all__ = ["RoutingTrainer", "RoutingTrainerMixin"]
