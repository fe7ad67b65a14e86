# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What a training loop without `Trainer` calls for the routing, as `StageTransitionCallback` does."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modeling_stablemoe.checkpoints.finding import find_stablemoe
from modeling_stablemoe.model.frozen_stablemoe import BalancedTable
from modeling_stablemoe.model.tensors_stablemoe import copy_into, full_tensor

from .processes import check_same_routing


def freeze_router(model: nn.Module) -> list[BalancedTable]:
    """Freeze the routing after a step, and check that all processes froze the same; every process must call this.

    Args:
        model (`torch.nn.Module`): a StableMoE model, or what wraps it (DistributedDataParallel, PEFT).

    Returns:
        `list[BalancedTable]`: one per table that was balanced (`max_frozen_load`).

    Raises:
        RuntimeError: if the routing is frozen already.
        ValueError: if it cannot be frozen; naming the ranks whose routing is not that of rank 0.
    """
    stablemoe = find_stablemoe(model)
    balanced = stablemoe.freeze_router()
    check_same_routing(stablemoe, "at the transition")
    return balanced


def drop_idle_gradients(model: nn.Module):
    """Drop the gradients of D and Ê in stage 2: zeros, which keep them in the graph of several processes.

    To be called before each step of the optimizer: weight decay and momentum move what has a gradient. In stage 1 it does
    nothing.

    Args:
        model (`torch.nn.Module`): a StableMoE model, or what wraps it.
    """
    for layer in find_stablemoe(model).moe_layers_by_name.values():
        if layer.frozen_router.is_frozen:
            for parameter in layer.bare_router.stage1_parameters():
                parameter.grad = None


def copy_moe_layers(model: nn.Module) -> dict[str, Tensor]:
    """Copy to the CPU, by name, what freezing and stage 2 change for good; every process must call this.

    These are routers and frozen routers, and the experts where stage 1 keeps them equal.
    """
    return {name: full_tensor(values.detach()).cpu().clone() for name, values in _of_stage1(model).items()}


@torch.no_grad()
def restore_moe_layers(model: nn.Module, copied: dict[str, Tensor], optimizer: Optimizer):
    """Put back what `copy_moe_layers` copied in stage 1, and that stage with it; every process must call this.

    The optimizer forgets its moments of these tensors; all other weights stay as they are.
    """
    stablemoe = find_stablemoe(model)
    for name, values in _of_stage1(stablemoe).items():
        copy_into(values, copied[name])
        optimizer.state.pop(values, None)
    stablemoe.config.router_fingerprint = None
    stablemoe.check_routing()


def _of_stage1(model: nn.Module) -> dict[str, Tensor]:
    stablemoe = find_stablemoe(model)
    parts = ["router", "frozen_router", *(["expert_module"] if stablemoe.config.share_experts_in_stage1 else [])]
    return {
        f"{layer}.{part}.{name}": values
        for layer, module in stablemoe.moe_layers_by_name.items()
        for part in parts
        for tensors in (getattr(module, part).named_parameters(), getattr(module, part).named_buffers())
        for name, values in tensors
    }


__all__ = ["copy_moe_layers", "drop_idle_gradients", "freeze_router", "restore_moe_layers"]
