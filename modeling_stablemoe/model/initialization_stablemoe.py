# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What the parts of an MoE layer start from, in whatever model it stands."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .bigram_stablemoe import BigramEmbedding
from .configuration_stablemoe import EXPERT_PARAMETERS, GATED_EXPERT_PARAMETERS, StableMoEBaseConfig
from .distillation_stablemoe import CountRouter, DistilledRouter
from .experts_stablemoe import ExpertSublayer
from .frozen_stablemoe import FrozenRouter, FrozenWeights
from .gated_stablemoe import StableMoEGatedExperts
from .layer_stablemoe import StableMoEFeedForward
from .routing_stablemoe import LearnedRouter
from .running_stablemoe import RouterMemory


def init_as_linear(parameter: Tensor, in_features: int):
    """Draw a weight or bias of `in_features` inputs from U(-1/sqrt(n), 1/sqrt(n)), as `torch.nn.Linear` does."""
    bound = in_features**-0.5
    init.uniform_(parameter, -bound, bound)


@torch.no_grad()
def init_routing_weights(module: nn.Module, config: StableMoEBaseConfig) -> bool:
    """Initialise a module's own tensors if it is a part of an MoE layer, and return True if it is one."""
    if hasattr(module, "starts_at_zero"):
        init.zeros_(module.weight)
        return True
    for part, initialize in _PARTS.items():
        if isinstance(module, part):
            initialize(module, config)
            return True
    return False


def _init_experts(module: ExpertSublayer, config: StableMoEBaseConfig):
    is_fairseq = config.initialization == "fairseq"
    init.ones_(module.layernorm_weight)
    init.zeros_(module.layernorm_bias)
    # W2 at zero: a new expert changes nothing (released code).
    init.zeros_(module.down_proj)
    if is_fairseq:
        init_as_linear(module.up_proj, module.up_proj.shape[-1])
        init_as_linear(module.up_proj_bias, module.up_proj.shape[-1])
        init_as_linear(module.down_proj_bias, module.down_proj.shape[-1])
    else:
        init.normal_(module.up_proj, mean=0.0, std=config.initializer_range)
        init.zeros_(module.up_proj_bias)
        init.zeros_(module.down_proj_bias)
    if is_fairseq or config.share_experts_in_stage1:
        _make_equal(module, EXPERT_PARAMETERS)


def _init_gated_experts(module: StableMoEGatedExperts, config: StableMoEBaseConfig):
    is_fairseq = config.initialization == "fairseq"
    for parameter in (module.gate_up_proj, module.down_proj):
        if is_fairseq:
            init_as_linear(parameter, parameter.shape[-1])
        else:
            init.normal_(parameter, mean=0.0, std=config.initializer_range)
    if getattr(config, "moe_placement", "between") == "between":  # a new expert changes nothing here, too
        init.zeros_(module.down_proj)
    if is_fairseq or config.share_experts_in_stage1:
        _make_equal(module, GATED_EXPERT_PARAMETERS)


def _make_equal(module: nn.Module, names: Sequence[str]):
    """Give all experts what the first one has."""
    for name in names:
        parameter = getattr(module, name)
        init.copy_(parameter, parameter[:1].expand_as(parameter).clone())


def _init_feed_forward(module: StableMoEFeedForward, config: StableMoEBaseConfig):
    if module.gate_scale is not None:
        init.zeros_(module.gate_scale)


def _init_bigram_embedding(module: BigramEmbedding, config: StableMoEBaseConfig):
    init.zeros_(module.gate)


def _init_learned_router(module: LearnedRouter, config: StableMoEBaseConfig):
    init.orthogonal_(module.centroids, gain=0.1)


def _init_memory(module: RouterMemory, config: StableMoEBaseConfig):
    for values in module.buffers():
        init.zeros_(values)


def _init_distilled_router(module: DistilledRouter, config: StableMoEBaseConfig):
    init.normal_(module.embedding, mean=0.0, std=1.0)
    init.orthogonal_(module.centroids, gain=0.1)
    if isinstance(module, CountRouter):
        init.zeros_(module.expert_counts)
    for name, parameter in module.named_parameters():
        if name.endswith("norm_weight"):
            init.ones_(parameter)
        elif name.endswith("_bias"):
            init.zeros_(parameter)
        elif name.endswith("_weight"):  # features of the size of the embedding's
            init.normal_(parameter, mean=0.0, std=parameter.shape[-1] ** -0.5)


def _init_frozen_router(module: FrozenRouter, config: StableMoEBaseConfig):
    init.copy_(module.routing_table, module.initial_table())


def _init_frozen_weights(module: FrozenWeights, config: StableMoEBaseConfig):
    for bits in module.buffers():
        init.copy_(bits, torch.full_like(bits, -1))


_PARTS = {
    ExpertSublayer: _init_experts,
    StableMoEGatedExperts: _init_gated_experts,
    StableMoEFeedForward: _init_feed_forward,
    BigramEmbedding: _init_bigram_embedding,
    LearnedRouter: _init_learned_router,
    RouterMemory: _init_memory,
    DistilledRouter: _init_distilled_router,
    FrozenRouter: _init_frozen_router,
    FrozenWeights: _init_frozen_weights,
}


__all__ = ["init_as_linear", "init_routing_weights"]
