# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Callbacks of the plain Trainer, loops without one, and evaluation that no batch size changes."""

from .exact_evaluation import BlockTrainer, TranslationTrainer
from .logging_callback import refuse_label_smoother
from .loops import drop_idle_gradients, freeze_router
from .processes import check_same_routing
from .transition import (
    ModelCardCallback,
    RoutingFluctuationCallback,
    RoutingStatisticsCallback,
    StageTransitionCallback,
    TrainingClockCallback,
)
from .weight_decay import parameter_groups, takes_weight_decay


__all__ = [
    "BlockTrainer",
    "ModelCardCallback",
    "RoutingFluctuationCallback",
    "RoutingStatisticsCallback",
    "StageTransitionCallback",
    "TrainingClockCallback",
    "TranslationTrainer",
    "check_same_routing",
    "drop_idle_gradients",
    "freeze_router",
    "parameter_groups",
    "refuse_label_smoother",
    "takes_weight_decay",
]
