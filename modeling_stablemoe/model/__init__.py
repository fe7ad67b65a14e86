# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The models: configuration, routers, experts, losses, the two stages. These files travel with every checkpoint."""

from .configuration_stablemoe import StableMoEConfig, StableMoESeq2SeqConfig
from .health_stablemoe import RoutingHealth
from .layer_stablemoe import moe_layers_of
from .losses_stablemoe import balance_loss, distillation_loss, switch_balance_loss
from .modeling_stablemoe import StableMoEForCausalLM, StableMoEForSequenceClassification, StableMoEModel
from .modeling_stablemoe_seq2seq import (
    StableMoEForConditionalGeneration,
    StableMoESeq2SeqModel,
    StableMoESeq2SeqPreTrainedModel,
)
from .pretrained_stablemoe import StableMoEPreTrainedModel
from .routing_stablemoe import LearnedRouter, register_router


__all__ = [
    "LearnedRouter",
    "RoutingHealth",
    "StableMoEConfig",
    "StableMoEForCausalLM",
    "StableMoEForConditionalGeneration",
    "StableMoEForSequenceClassification",
    "StableMoEModel",
    "StableMoEPreTrainedModel",
    "StableMoESeq2SeqConfig",
    "StableMoESeq2SeqModel",
    "StableMoESeq2SeqPreTrainedModel",
    "balance_loss",
    "distillation_loss",
    "moe_layers_of",
    "register_router",
    "switch_balance_loss",
]
