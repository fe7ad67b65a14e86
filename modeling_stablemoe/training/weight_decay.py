# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Which parameters weight decay is for in loops without `Trainer`, the same as in `Trainer`. The paper's runs have none."""

from torch import nn


def takes_weight_decay(name: str) -> bool:
    """Return True unless `name` is of a bias or a norm, by the name: those of stacked experts have two dimensions."""
    return "bias" not in name and "norm" not in name


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Group the parameters that learn for an optimizer, as `Trainer` does: biases and norms are not decayed.

    Args:
        model (`torch.nn.Module`): a StableMoE model, or what wraps it.
        weight_decay (`float`): of the first group: matrices, experts, embeddings, centroids.

    Returns:
        `list[dict]`: two groups of `params` and `weight_decay`.
    """
    learned = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in learned if takes_weight_decay(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in learned if not takes_weight_decay(name)], "weight_decay": 0.0},
    ]


__all__ = ["parameter_groups", "takes_weight_decay"]
