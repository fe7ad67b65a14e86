# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""StableMoE (Dai et al., ACL 2022) for Hugging Face Transformers: mixture of experts with stable routing.

Importing this package registers the models with transformers' Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from .earlier_checkpoints import register_earlier_names
from .model.configuration_stablemoe import PACKAGE_FUNCTIONS, StableMoEConfig, StableMoESeq2SeqConfig
from .model.modeling_stablemoe import StableMoEForCausalLM, StableMoEForSequenceClassification, StableMoEModel
from .model.modeling_stablemoe_seq2seq import (
    StableMoEForConditionalGeneration,
    StableMoESeq2SeqModel,
    StableMoESeq2SeqPreTrainedModel,
)
from .model.pretrained_stablemoe import StableMoEPreTrainedModel
from .model.routing_stablemoe import register_router
from .solvers.assignment import balanced_assignment
from .solvers.balancing import balanced_table
from .version import __version__


if TYPE_CHECKING:
    from .hub.cards import CardFacts
    from .offload.offloading import experts_on_disk, offload_experts
    from .training import (
        ModelCardCallback,
        RoutingFluctuationCallback,
        RoutingStatisticsCallback,
        StageTransitionCallback,
    )

# Rooms that are imported when one of these names is asked for: with them come transformers' Trainer, datasets and pandas, which
# loading and generating do without.
_LATER = {
    "CardFacts": "hub.cards",
    "ModelCardCallback": "training",
    "RoutingFluctuationCallback": "training",
    "RoutingStatisticsCallback": "training",
    "StageTransitionCallback": "training",
    "experts_on_disk": "offload.offloading",
    "offload_experts": "offload.offloading",
}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)


AutoConfig.register(StableMoEConfig.model_type, StableMoEConfig, exist_ok=True)
AutoModel.register(StableMoEConfig, StableMoEModel, exist_ok=True)
AutoModelForCausalLM.register(StableMoEConfig, StableMoEForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(StableMoEConfig, StableMoEForSequenceClassification, exist_ok=True)
# `transformers serve` asks this registry (of transformers 5.23 and newer), and else takes the class of its own that has
# the name in the config. A decision is read from next-token logits, as of any language model without a head for it.
if hasattr(transformers, "AutoModelForDecision"):
    transformers.AutoModelForDecision.register(StableMoEConfig, StableMoEForCausalLM, exist_ok=True)

AutoConfig.register(StableMoESeq2SeqConfig.model_type, StableMoESeq2SeqConfig, exist_ok=True)
AutoModel.register(StableMoESeq2SeqConfig, StableMoESeq2SeqModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(StableMoESeq2SeqConfig, StableMoEForConditionalGeneration, exist_ok=True)


def _convert_dense(*args):
    from .convert.dense import convert_dense

    return convert_dense(*args)


def _write_code(*args):
    from .hub.bundle import write_code

    return write_code(*args)


PACKAGE_FUNCTIONS.update(
    balanced_assignment=balanced_assignment,
    balanced_table=balanced_table,
    convert_dense=_convert_dense,
    register_earlier_names=register_earlier_names,
    write_code=_write_code,
)

__all__ = [
    "CardFacts",
    "ModelCardCallback",
    "RoutingFluctuationCallback",
    "RoutingStatisticsCallback",
    "StableMoEConfig",
    "StableMoEForCausalLM",
    "StableMoEForConditionalGeneration",
    "StableMoEForSequenceClassification",
    "StableMoEModel",
    "StableMoEPreTrainedModel",
    "StableMoESeq2SeqConfig",
    "StableMoESeq2SeqModel",
    "StableMoESeq2SeqPreTrainedModel",
    "StageTransitionCallback",
    "__version__",
    "experts_on_disk",
    "offload_experts",
    "register_router",
]
