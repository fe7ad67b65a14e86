# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Which parameters weight decay is for, in `Trainer` and in loops of one's own. The paper's runs have none."""

import logging

from torch import nn
from torch.optim import Optimizer


logger = logging.getLogger(__name__)


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


class WeightDecayMixin:
    """What a `Trainer` gains that leaves the norms of experts and of distilled routers out of weight decay, too.

    Their names, `norm_weight`, are none that `Trainer` takes for a norm's, and it asks the model for no groups.
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name the parameters that are decayed; see `Trainer.get_decay_parameter_names`."""
        return [name for name in super().get_decay_parameter_names(model) if takes_weight_decay(name)]


def warn_of_decayed_norms(model: nn.Module, optimizer: Optimizer | None):
    """Say so if an optimizer decays a norm that `Trainer` does not know for one.

    Args:
        model (`torch.nn.Module`): a StableMoE model.
        optimizer (`torch.optim.Optimizer`, *optional*): that trains it, as callbacks are given it.
    """
    decayed = {
        id(p) for group in getattr(optimizer, "param_groups", ()) if group.get("weight_decay") for p in group["params"]
    }
    norms = [name for name, p in model.named_parameters() if name.endswith("norm_weight") and id(p) in decayed]
    if norms:
        logger.warning(
            "Weight decay pulls the norms of experts towards zero (%s, ...): Trainer spares those of blocks, and does not know "
            "these by their names. Train with `class MyTrainer(WeightDecayMixin, Trainer)`, or give Trainer an optimizer of "
            "`parameter_groups`, both of `modeling_stablemoe.weight_decay`.",
            norms[0],
        )


__all__ = ["WeightDecayMixin", "parameter_groups", "takes_weight_decay", "warn_of_decayed_norms"]
