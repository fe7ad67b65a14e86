# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What routers compute with: scores that are exact and finite, tensors that an engine may have sharded, floats kept as bits."""

import base64
import importlib
import math
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import is_torchdynamo_compiling, logging
from transformers.utils.generic import maybe_autocast


logger = logging.get_logger(__name__)

# How far from a whole number an average of equal whole numbers may be, by rounding.
WHOLE_TOLERANCE = 1e-3


def score(features: Tensor, centroids: Tensor) -> Tensor:
    """Dot products in float32 whatever the autocast (float64 for float64 input), `(..., D) x (E, D) -> (..., E)`.

    A score that is NaN or infinite counts as the lowest finite one of its token, as 0 where the token has none, and is
    reported once, on the CPU. It has no gradient of its own. But 0 * NaN is NaN: of features or centroids that are not
    finite themselves the gradient is not either, so that a gradient norm tells and a loss scaler skips the step.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    with maybe_autocast(device_type=features.device.type, enabled=False):
        return _finite(F.linear(features.to(dtype), centroids.to(dtype)))


def score_chosen(features: Tensor, centroids: Tensor, index: Tensor) -> Tensor:
    """Score each token against some centroids, `(T, D), (E, D), (T, K) -> (T, K)`: what `score` gives up to rounding.

    It costs what K centroids do, and the bits of a score depend on nothing but the token and its centroid. A score that is
    NaN or infinite counts as 0: no other one of the token is looked at.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    with maybe_autocast(device_type=features.device.type, enabled=False):
        features, centroids = features.to(dtype), centroids.to(dtype)
        scores = [
            _finite((features * F.embedding(index_T, centroids)).sum(-1, keepdim=True)) for index_T in index.unbind(-1)
        ]
        return scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)


def best_experts(scores: Tensor, num_experts_per_tok: int) -> Tensor:
    """Choose the experts of the highest scores, best first, ties to the lowest index: all different.

    Of finite scores, `(..., E) -> (..., K)`; `(..., E) -> (...)` for K = 1, where it is the argmax.
    """
    best = [scores.argmax(-1)]
    if num_experts_per_tok == 1:
        return best[0]
    scores = scores.detach().clone()
    while len(best) < num_experts_per_tok:  # `topk` leaves open which of equal scores it takes
        best.append(scores.scatter_(-1, best[-1].unsqueeze(-1), -torch.inf).argmax(-1))
    return torch.stack(best, dim=-1)


def _finite(scores: Tensor) -> Tensor:
    """Let a non-finite score count as the lowest finite one of its token (as 0 where the token has none)."""
    if may_ask(scores):
        if _all_finite(scores):
            return scores
        logger.warning_once(
            "Routing scores are NaN or infinite: they count as the lowest finite score of their token. The hidden "
            "states or the router have diverged; lower the learning rate or clip gradients."
        )
    values = scores.detach()
    finite = values.abs() < torch.inf  # as `isfinite`, in half the passes
    lowest = torch.where(finite, values, torch.inf).amin(-1, keepdim=True)
    return torch.where(finite, scores, lowest.masked_fill(lowest == torch.inf, 0.0))


def may_ask(values: Tensor) -> bool:
    """Return True where reading a value costs nothing: on the CPU, outside of traces and of `torch.func`'s transforms.

    An accelerator would have to be waited for, compiled code would break, a trace would keep the answer, and `vmap` has none.
    """
    return not isinstance(values, torch.fx.Proxy) and values.device.type == "cpu" and not is_transformed()


def is_transformed() -> bool:
    """Return True inside `torch.compile`, `torch.export`, `torch.jit.trace` and the transforms of `torch.func`."""
    return is_torchdynamo_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def _all_finite(values: Tensor) -> bool:
    # A sum is finite only where all it adds up is, and several times as fast as asking each. It may overflow.
    return math.isfinite(values.detach().sum().item()) or bool(torch.isfinite(values).all())


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Compute the sines, then the cosines of positions at geometrically spaced wavelengths, `(...) -> (..., width)`."""
    exponent = torch.arange(0, width, 2, dtype=dtype, device=positions.device) / width
    angle = positions.unsqueeze(-1) * 10000.0**-exponent
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :width]


def finite_tokens(hidden_states: Tensor, mask: Tensor | None) -> Tensor | None:
    """Mask tokens whose hidden state holds NaN or infinity, as if they were padding."""
    if may_ask(hidden_states) and _all_finite(hidden_states):
        return mask
    finite = torch.isfinite(hidden_states).all(-1)
    return finite if mask is None else finite & mask


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that FSDP2, tensor parallelism or ZeRO-3 has sharded; any other tensor is returned as it is."""
    if _is_elsewhere(tensor):
        with _deepspeed().zero.GatheredParameters(tensor):
            return tensor.detach().clone()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_at_hand(tensor: Tensor, device: torch.device) -> bool:
    """Return True if a tensor can be read here and now: on this device, whole, and not on its way from elsewhere."""
    return tensor.device == device and not hasattr(tensor, "device_mesh") and tensor.numel() > 0


def local_tensor(tensor: Tensor) -> Tensor:
    """Give what this process holds of a tensor that is sharded; any other tensor is returned as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def take_local_buffers(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args):
    """Load buffers that come replicated, as accelerate's FSDP2 brings them, as plain tensors: a hook before loading."""
    for name in module._buffers:
        if prefix + name in state_dict:
            state_dict[prefix + name] = local_tensor(state_dict[prefix + name])


def is_quantized(tensor: Tensor) -> bool:
    """Return True for a tensor that a quantiser stores in few bits: torchao's are subclasses that say how to write them out."""
    kind = type(tensor)
    return kind is not Tensor and kind is not nn.Parameter and kind.dequantize is not Tensor.dequantize


def dequantized(tensor: Tensor) -> Tensor:
    """Write out a tensor that a quantiser stores in few bits; any other tensor is returned as it is."""
    return tensor.dequantize() if is_quantized(tensor) else tensor


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape that a tensor has when nothing is sharded; ZeRO-3 leaves an empty one behind."""
    return getattr(tensor, "ds_shape", tensor.shape)


@torch.no_grad()
def copy_into(target: Tensor, values: Tensor):
    """Copy whole `values` into a parameter or buffer, each process its own part where that is sharded.

    Raises:
        ValueError: if `target` is offloaded: hooks bring its values before a forward pass, and would not keep these.
    """
    if target.is_meta:
        raise ValueError(
            "What a router has learned is offloaded, so nothing can be added to it. To train the model or to freeze its "
            "routing, load it without `device_map` (or hooks of accelerate) that offload it."
        )
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(target.device), target.device_mesh, target.placements)
    if not _is_elsewhere(target):
        target.copy_(values)
    if hasattr(target, "ds_id"):  # ZeRO-3 keeps a shard, and may or may not have gathered the whole at the moment
        shard, rank = target.ds_tensor, dist.get_rank(target.ds_process_group)
        own = values.flatten()[rank * shard.numel() : (rank + 1) * shard.numel()]
        shard[: own.numel()].copy_(own)
    # DeepSpeed steps a copy of its own of what it trains, and would write that over these values.
    if hasattr(target, "_hp_mapping") or hasattr(target, "_z3_optimizer"):
        _deepspeed().utils.safe_set_full_fp32_param(target, values.to(target.device, torch.float32))


def zero_through(parameters: list[nn.Parameter], module: nn.Module) -> Tensor:
    """Return a 0 that gives parameters, at least one, a gradient of zero in the forward pass of `module`."""
    # Once gathered for a module, DeepSpeed brings them before each of its passes, forward and backward.
    missing = [parameter for parameter in parameters if _is_elsewhere(parameter)]
    with _deepspeed().zero.GatheredParameters(missing, fwd_module=module) if missing else nullcontext():
        return sum(parameter.flatten()[:1].sum() for parameter in parameters) * 0.0


def _is_elsewhere(tensor: Tensor) -> bool:
    """Return True for a parameter that ZeRO-3 has taken apart, as it does outside of its module's forward pass."""
    return hasattr(tensor, "ds_id") and tensor.numel() != tensor.ds_numel


def _deepspeed():
    # By name: an import statement would make transformers ask for it wherever this file is loaded from the Hub.
    return importlib.import_module("deepspeed")


def restored_integers(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return the integers that other code has stored in another dtype, undoing the rounding of averages.

    Raises:
        ValueError: naming the tensor, for values that are not whole numbers, or larger than those that their dtype
            tells apart.
    """
    if values.dtype == dtype:
        return values
    if not values.is_floating_point():
        return values.to(dtype)
    whole = values.double().round()
    # Above 2 / eps neighbours are two apart, so that a whole number may have been another one.
    exact = (values.double() - whole).abs().le(WHOLE_TOLERANCE) & whole.abs().le(2 / torch.finfo(values.dtype).eps)
    if not exact.all():
        raise ValueError(
            f"`{name}` holds integers, but what it was given is {values.dtype}, in which {float(values[~exact].flatten()[0]):g} "
            "is no whole number or not told from its neighbours. Averages of different routings mean nothing, and a cast loses "
            "digits: leave integers out of both, or restore the checkpoint from its source."
        )
    return whole.to(dtype)


def restore_integers(module: nn.Module, name: str, dtypes: dict[str, torch.dtype]):
    """Convert buffers that an engine has made in the dtype of the model back to integers, by name in `dtypes`."""
    for key, dtype in dtypes.items():
        values = getattr(module, key)
        if values.dtype != dtype and not values.is_meta:
            setattr(module, key, restored_integers(values, dtype, f"{name}.{key}"))


def to_bits(values: Tensor) -> Tensor:
    """Return the integers, `int32`, that have the bits of `float32` values: no cast of a model changes them."""
    return values.contiguous().view(torch.int32)


def from_bits(bits: Tensor) -> Tensor:
    """Return the `float32` values that `to_bits` was given.

    Raises:
        ValueError: for other numbers than those, which a cast to another dtype leaves; in `torch.jit.trace`, which cannot
            read bits.
    """
    if torch.jit.is_tracing():
        raise ValueError(
            "`torch.jit.trace` cannot read what this router keeps as bits (running statistics, counts, frozen weights of a router "
            "that looks back at earlier tokens). Use `torch.export.export`; or trace a model whose frozen routing is a table."
        )
    if bits.dtype != torch.int32:
        raise ValueError(
            f"Bit patterns of float32 are int32, these are {bits.dtype}: something has cast integers. Load the checkpoint "
            "with `from_pretrained`, which leaves them alone."
        )
    return bits.view(torch.float32)


def pack_ids(is_in_set: Tensor) -> str:
    """Write a set of ids for a config: one bit per id, the lowest in the lowest bit of the first byte, in base 64."""
    bits = F.pad(is_in_set.cpu().int(), (0, -len(is_in_set) % 8)).view(-1, 8)
    values = (bits << torch.arange(8)).sum(-1)
    return base64.b64encode(bytes(values.tolist())).decode()


@lru_cache(maxsize=8)
def unpack_ids(packed: str) -> Tensor:
    """Read what `pack_ids` wrote: a `torch.BoolTensor`, on the CPU, with up to seven ids more, that are not in the set."""
    values = torch.tensor(list(base64.b64decode(packed)), device="cpu")
    return ((values.unsqueeze(-1) >> torch.arange(8, device="cpu")) & 1).flatten().bool()


def resize_rows(values: Tensor, num_rows: int, num_parts: int = 1, added: Tensor | None = None) -> Tensor:
    """Keep the first rows of each of equal parts, and add rows where there are to be more, of zeros by default."""
    parts = values.unflatten(0, (num_parts, -1))
    if added is None:
        added = values.new_zeros((max(num_rows - parts.shape[1], 0), *values.shape[1:]))
    return torch.cat([parts[:, :num_rows], added.expand(num_parts, *added.shape)], dim=1).flatten(0, 1)


def split_rows(values: Tensor, rows: list[int], copies: bool = True) -> Tensor:
    """Add for each of some rows as many as there are: copies of it, or zeros."""
    parts = [values[row].expand_as(values) if copies else torch.zeros_like(values) for row in rows]
    return torch.cat([values, *parts])


__all__ = [
    "best_experts",
    "copy_into",
    "dequantized",
    "finite_tokens",
    "from_bits",
    "full_tensor",
    "is_at_hand",
    "is_quantized",
    "is_transformed",
    "local_tensor",
    "may_ask",
    "pack_ids",
    "resize_rows",
    "restore_integers",
    "restored_integers",
    "score",
    "score_chosen",
    "sinusoids",
    "split_rows",
    "take_local_buffers",
    "to_bits",
    "unpack_ids",
    "whole_shape",
    "zero_through",
]
