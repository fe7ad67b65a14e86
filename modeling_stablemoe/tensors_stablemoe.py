# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What routers compute with: scores that are exact and finite, tensors that an engine may have sharded, floats kept as bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import is_torchdynamo_compiling, logging
from transformers.utils.generic import maybe_autocast


logger = logging.get_logger(__name__)


def score(features: Tensor, centroids: Tensor) -> Tensor:
    """Dot products in float32 whatever the autocast (float64 for float64 input), `(..., D) x (E, D) -> (..., E)`."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    with maybe_autocast(device_type=features.device.type, enabled=False):
        return _finite(F.linear(features.to(dtype), centroids.to(dtype)))


def _finite(scores: Tensor) -> Tensor:
    """Let a non-finite score count as the lowest finite one of its token (as 0 where the token has none)."""
    finite = torch.isfinite(scores)
    # Asking for a value makes an accelerator wait, so only the CPU is asked.
    if scores.device.type == "cpu" and not is_torchdynamo_compiling() and not finite.all():
        logger.warning_once(
            "Routing scores are NaN or infinite: they count as the lowest finite score of their token. The hidden "
            "states or the router have diverged; lower the learning rate or clip gradients."
        )
    lowest = torch.where(finite, scores, torch.inf).amin(-1, keepdim=True)
    lowest = torch.where(torch.isfinite(lowest), lowest, 0.0).detach()
    return torch.where(finite, scores, lowest)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that FSDP2 or tensor parallelism has sharded; any other tensor is returned as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Give what this process holds of a tensor that is sharded; any other tensor is returned as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def copy_into(target: Tensor, values: Tensor):
    """Copy whole `values` into `target`, each process its own part where `target` is sharded."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(target.device), target.device_mesh, target.placements)
    target.copy_(values)


def to_bits(values: Tensor) -> Tensor:
    """Give the integers, `int32`, that have the bits of `float32` values: no cast of a model changes them."""
    return values.contiguous().view(torch.int32)


def from_bits(bits: Tensor) -> Tensor:
    """Give the `float32` values that `to_bits` was given."""
    return bits.view(torch.float32)


def resize_rows(parameter: nn.Parameter, num_rows: int) -> nn.Parameter:
    """Keep the first rows of a parameter without gradient, and add rows of zeros where there are to be more."""
    added = parameter.new_zeros((max(num_rows - parameter.shape[0], 0), *parameter.shape[1:]))
    return nn.Parameter(torch.cat([parameter.detach()[:num_rows], added]), requires_grad=False)


__all__ = ["copy_into", "from_bits", "full_tensor", "local_tensor", "resize_rows", "score", "to_bits"]
