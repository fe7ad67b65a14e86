# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The size of a model in parameters and floating-point operations."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


# What the routed experts of a layer are called here and in transformers.
_EXPERTS = {"expert_stack", "experts"}


def forward_flops(model: PreTrainedModel, sequence_length: int) -> int:
    """Count the floating-point operations of a forward pass over one sequence at inference.

    These are matrix products only, with two operations per multiply-accumulate; the paper counts multiply-accumulates
    (table 2), half as many. As in the paper, attention counts all pairs of positions.

    Args:
        model (`PreTrainedModel`): a language model of this package or of transformers.
        sequence_length (`int`): tokens.
    """
    # The counter does not know all fused kernels.
    implementations = model.config._attn_implementation, model.config._experts_implementation
    training = model.training
    input_ids = torch.zeros((1, sequence_length), dtype=torch.long, device=model.device)
    counter = FlopCounterMode(display=False)
    try:
        model.eval().set_attn_implementation("eager")
        model.set_experts_implementation("eager")
        with torch.no_grad(), counter:
            model(input_ids, use_cache=False)
    finally:
        model.train(training).set_attn_implementation(implementations[0])
        model.set_experts_implementation(implementations[1])
    return counter.get_total_flops()


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Count parameters as table 2 of the paper does; routing tables are not parameters.

    Returns:
        `dict[str, int]`: `shared` by all tokens, routers included, and `experts`, of all experts of all MoE layers.
    """
    experts = sum(
        parameter.numel() for name, parameter in model.named_parameters() if _EXPERTS.intersection(name.split("."))
    )
    learned = sum(p.numel() for p in model.parameters())
    return {"shared": learned - experts, "experts": experts}
