# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""StableMoE (Dai et al., ACL 2022) for Hugging Face Transformers: mixture of experts with stable routing.

Importing this package registers the models with transformers' Auto classes.
"""

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from .checkpoints.earlier_checkpoints import register_earlier_names
from .hub.bundle import write_code
from .hub.cards import CardFacts
from .model.configuration_stablemoe import PACKAGE_FUNCTIONS, StableMoEConfig, StableMoESeq2SeqConfig
from .model.modeling_stablemoe import StableMoEForCausalLM, StableMoEForSequenceClassification, StableMoEModel
from .model.modeling_stablemoe_seq2seq import (
    StableMoEForConditionalGeneration,
    StableMoESeq2SeqModel,
    StableMoESeq2SeqPreTrainedModel,
)
from .model.pretrained_stablemoe import StableMoEPreTrainedModel
from .model.routing_stablemoe import register_router
from .offload.offloading import experts_on_disk, offload_experts
from .solvers.assignment import balanced_assignment
from .solvers.balancing import balanced_table
from .training import (
    ModelCardCallback,
    RoutingFluctuationCallback,
    RoutingStatisticsCallback,
    StageTransitionCallback,
)
from .version import __version__


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
    # Not before it is needed: with that room come those of the scripts, a quarter of the time that the import would take.
    from .convert.dense import convert_dense

    return convert_dense(*args)


register_earlier_names()
PACKAGE_FUNCTIONS.update(
    balanced_assignment=balanced_assignment,
    balanced_table=balanced_table,
    convert_dense=_convert_dense,
    write_code=write_code,
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
