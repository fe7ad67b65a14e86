# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Callbacks of the plain Trainer, a Trainer that works with them, loops without one, and exact evaluation."""

from .card_callback import ModelCardCallback
from .exact_evaluation import BlockTrainer, TranslationTrainer
from .fluctuation_callback import RoutingFluctuationCallback
from .logging_callback import TrainingClockCallback, refuse_label_smoother
from .loops import drop_idle_gradients, freeze_router
from .processes import check_same_routing
from .progress_callback import show_progress
from .routing_trainer import RoutingTrainer, RoutingTrainerMixin
from .statistics_callback import RoutingStatisticsCallback
from .transition import StageTransitionCallback
from .weight_decay import parameter_groups, takes_weight_decay


__all__ = [
    "BlockTrainer",
    "ModelCardCallback",
    "RoutingFluctuationCallback",
    "RoutingStatisticsCallback",
    "RoutingTrainer",
    "RoutingTrainerMixin",
    "StageTransitionCallback",
    "TrainingClockCallback",
    "TranslationTrainer",
    "check_same_routing",
    "drop_idle_gradients",
    "freeze_router",
    "parameter_groups",
    "refuse_label_smoother",
    "show_progress",
    "takes_weight_decay",
]
