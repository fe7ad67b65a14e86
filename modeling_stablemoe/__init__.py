# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""StableMoE (Dai et al., ACL 2022) for Hugging Face Transformers: mixture of experts with stable routing.

Importing this package registers the models with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .callbacks import RoutingFluctuationCallback, StageTransitionCallback
from .configuration_stablemoe import StableMoEConfig
from .modeling_stablemoe import StableMoEForCausalLM, StableMoEModel, StableMoEPreTrainedModel
from .version import __version__


AutoConfig.register(StableMoEConfig.model_type, StableMoEConfig, exist_ok=True)
AutoModel.register(StableMoEConfig, StableMoEModel, exist_ok=True)
AutoModelForCausalLM.register(StableMoEConfig, StableMoEForCausalLM, exist_ok=True)

__all__ = [
    "RoutingFluctuationCallback",
    "StableMoEConfig",
    "StableMoEForCausalLM",
    "StableMoEModel",
    "StableMoEPreTrainedModel",
    "StageTransitionCallback",
    "__version__",
]
