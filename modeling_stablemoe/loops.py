# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What a training loop without `Trainer` calls for the routing; `StageTransitionCallback` calls the same."""

from torch import nn

from .balancing_stablemoe import BalancedTable
from .callback_base import find_stablemoe
from .processes import check_same_routing


def freeze_router(model: nn.Module) -> list[BalancedTable]:
    """Freeze the routing after a step, and check that all processes froze the same; every process must call this.

    Args:
        model (`torch.nn.Module`): a StableMoE model, or what wraps it (DistributedDataParallel, PEFT).

    Returns:
        `list[BalancedTable]`: see `TwoStageRoutingMixin.freeze_router`.

    Raises:
        RuntimeError: if the routing is frozen already.
        ValueError: see there; also naming the ranks whose routing is not that of rank 0.
    """
    stablemoe = find_stablemoe(model)
    balanced = stablemoe.freeze_router()
    check_same_routing(stablemoe, "at the transition")
    return balanced


def drop_idle_gradients(model: nn.Module):
    """Take the gradient of zero, which keeps them in the graph of several processes, from D and E^ in stage 2.

    To be called before each step of the optimizer: weight decay and momentum move what has a gradient. In stage 1 it does
    nothing.

    Args:
        model (`torch.nn.Module`): a StableMoE model, or what wraps it.
    """
    for layer in find_stablemoe(model).moe_layers_by_name.values():
        if layer.frozen_router.is_frozen:
            for parameter in layer.bare_router.stage1_parameters():
                parameter.grad = None


__all__ = ["drop_idle_gradients", "freeze_router"]
