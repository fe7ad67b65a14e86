# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Products of tokens that are sorted by expert: one call for all experts, whatever the device.

Accelerators have a grouped kernel (`torch.nn.functional.grouped_mm`). On a CPU a grouped product is one product per expert
in any case, so operators of our own compute them, and do there what a kernel of one call cannot: normalise, multiply and
add the bias while an expert's tokens are in the cache, and write the gradient of all experts into one tensor. They are
custom operators where `torch.compile` looks, so that it sees one node each, forward and backward.

Shape suffixes: T tokens, E experts, X and Y any.
"""

from collections.abc import Callable, Iterator
from itertools import compress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import _grouped_linear
from transformers.utils import is_torchdynamo_compiling


class ExpertOrder(NamedTuple):
    """Tokens sorted by expert: what all sublayers of a MoE layer work in.

    Attributes:
        expert_index (`torch.LongTensor` of shape `(T,)`): the expert of each place, ascending; `E` and so last for
            sentinels, tokens that take no part.
        order (`torch.LongTensor` of shape `(T,)`): the token that stands at each place.
        inverse (`torch.LongTensor` of shape `(T,)`): the place of each token.
        offsets (`torch.IntTensor` of shape `(E,)`): one past the last place of each expert.
        has_sentinels (`bool`): whether there may be any.
    """

    expert_index: Tensor
    order: Tensor
    inverse: Tensor
    offsets: Tensor
    has_sentinels: bool

    def groups(self) -> list[tuple[int, slice]]:
        """List the experts that have tokens, each with its places; asks the device for values."""
        return _groups(self.offsets)


def sort_by_expert(expert_index: Tensor, num_experts: int, has_sentinels: bool = True) -> list[ExpertOrder]:
    """Sort the tokens of MoE layers by expert, all layers at once; nothing here waits for the device.

    Args:
        expert_index (`torch.LongTensor` of shape `(layers, T)`): the expert of each token; `num_experts` or more marks
            a
            sentinel.
        num_experts (`int`): E.
        has_sentinels (`bool`): False promises that there is none.
    """
    if has_sentinels:
        expert_index = expert_index.clamp(max=num_experts)
    index, order = torch.sort(expert_index, dim=-1, stable=True)
    places = torch.arange(index.shape[-1], device=index.device).expand_as(order)
    inverse = torch.empty_like(order).scatter_(-1, order, places)
    experts = torch.arange(num_experts, device=index.device).expand(index.shape[0], num_experts).contiguous()
    offsets = torch.searchsorted(index, experts, right=True, out_int32=True)
    fields = (index.unbind(), order.unbind(), inverse.unbind(), offsets.unbind())
    return [ExpertOrder(*of_layer, has_sentinels) for of_layer in zip(*fields, strict=True)]


class _Permutation(torch.autograd.Function):
    """Rows in another order. Knowing the way back, the backward pass is a gather, too: no zeros to fill, no additions."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        order, inverse = ctx.saved_tensors
        return _Permutation.apply(grad, inverse, order), None, None


# Dynamo would take the function above apart, and lose the derivatives of its gradient on the way.
@torch.compiler.allow_in_graph
def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Put rows in another order, of which `inverse` is the way back."""
    return _Permutation.apply(rows, order, inverse)


def grouped_layer_norm(x_TX: Tensor, weight_EX: Tensor, bias_EX: Tensor, order: ExpertOrder, eps: float) -> Tensor:
    """Normalise each token, sorted, with weight and bias of its expert, `(T, X), (E, X), (E, X) -> (T, X)`.

    In the dtype of the weight; for sentinels 0 on a CPU, anything finite elsewhere.
    """
    if _on_cpu(weight_EX):
        dtype = torch.promote_types(x_TX.dtype, weight_EX.dtype)
        weight, bias = weight_EX.to(dtype), bias_EX.to(dtype)
        inputs = (x_TX.to(dtype), weight, bias, order.offsets, eps)
        if is_torchdynamo_compiling():
            normed_TX = torch.ops.stablemoe.grouped_layer_norm(*inputs)[0]
        else:
            normed_TX = _GroupedLayerNorm.apply(*inputs)
        return normed_TX.to(weight_EX.dtype)
    standardized_TX = F.layer_norm(x_TX, x_TX.shape[-1:], eps=eps).to(weight_EX.dtype)
    return torch.addcmul(_rows(bias_EX, order), standardized_TX, _rows(weight_EX, order))


def grouped_linear(x_TX: Tensor, weight_EYX: Tensor, bias_EY: Tensor, order: ExpertOrder) -> Tensor:
    """Multiply each token, sorted, by its expert's matrix and add the bias, `(T, X), (E, Y, X), (E, Y) -> (T, Y)`.

    In the dtype of the weight or of autocast; for sentinels 0 on a CPU, anything elsewhere.
    """
    device = weight_EYX.device.type
    if torch.is_autocast_enabled(device):  # grouped products are not on autocast's list
        weight_EYX = weight_EYX.to(torch.get_autocast_dtype(device))
    x_TX = x_TX.to(weight_EYX.dtype)
    if _on_cpu(weight_EYX):
        inputs = (x_TX, weight_EYX, bias_EY.to(weight_EYX.dtype), order.offsets)
        return (
            torch.ops.stablemoe.grouped_linear(*inputs)
            if is_torchdynamo_compiling()
            else _GroupedLinear.apply(*inputs)
        )
    odd = any(width * weight_EYX.element_size() % 16 for width in weight_EYX.shape[1:])
    if odd or weight_EYX.dtype == torch.float64:
        # The kernel takes no float64 and rows of whole 16 bytes only; else transformers' own loop over experts.
        product_TY = torch.ops.transformers.grouped_mm_fallback(x_TX, weight_EYX.transpose(-2, -1), order.offsets)
        return product_TY.add(_rows(bias_EY, order))
    return _grouped_linear(x_TX, weight_EYX, order.offsets, bias=_rows(bias_EY, order))


def _rows(parameter_EX: Tensor, order: ExpertOrder) -> Tensor:
    """Return each token's row, that of its expert; zeros for sentinels."""
    if order.has_sentinels:
        parameter_EX = F.pad(parameter_EX, (0, 0, 0, 1))
    return F.embedding(order.expert_index, parameter_EX)


def _on_cpu(parameter: Tensor) -> bool:
    return parameter.device.type == "cpu"


def _bounds(offsets: Tensor) -> list[tuple[int, int]]:
    """Return the first place of each expert, and one past its last."""
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _groups(offsets: Tensor) -> list[tuple[int, slice]]:
    """List the experts that have tokens, with their places."""
    return [(expert, slice(*bounds)) for expert, bounds in enumerate(_bounds(offsets)) if bounds[0] < bounds[1]]


def _parts(offsets: Tensor, by_place: list[Tensor], by_expert: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Take tensors apart by expert: rows of tokens by place, stacks by expert; experts without tokens are left out.

    Each tensor is taken apart in one call: with hundreds of experts that is what a product costs beside its arithmetic.
    """
    bounds = _bounds(offsets)
    sizes = [end - start for start, end in bounds]
    num_sentinels = len(by_place[0]) - bounds[-1][1]
    rows = [tensor.split([*sizes, num_sentinels])[:-1] for tensor in by_place]
    stacks = [tensor.unbind(0) for tensor in by_expert]
    return (parts for size, *parts in zip(sizes, *rows, *stacks, strict=True) if size)


def _clear_idle(offsets: Tensor, by_place: list[Tensor], by_expert: list[Tensor]):
    """Write zeros where `_parts` does not come: to sentinels and to experts without tokens."""
    for tensor in by_place:
        tensor[int(offsets[-1]) :].zero_()
    idle = (offsets.diff(prepend=offsets.new_zeros(1)) == 0).nonzero().flatten().tolist()
    for expert in idle:
        for tensor in by_expert:
            tensor[expert].zero_()


def _linear(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    product = x.new_empty(x.shape[0], weight.shape[1])
    for x_e, product_e, weight_e, bias_e in _parts(offsets, [x, product], [weight.transpose(1, 2), bias]):
        torch.addmm(bias_e, x_e, weight_e, out=product_e)
    _clear_idle(offsets, [product], [])
    return product


def _linear_backward_input(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    grad_x = grad.new_empty(grad.shape[0], weight.shape[2])
    for grad_e, grad_x_e, weight_e in _parts(offsets, [grad, grad_x], [weight]):
        torch.mm(grad_e, weight_e, out=grad_x_e)
    _clear_idle(offsets, [grad_x], [])
    return grad_x


def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(weight.shape[:2])
    stacks = [weight, grad_weight, grad_bias]
    for grad_e, x_e, grad_x_e, weight_e, grad_weight_e, grad_bias_e in _parts(offsets, [grad, x, grad_x], stacks):
        torch.mm(grad_e, weight_e, out=grad_x_e)
        torch.mm(grad_e.t(), x_e, out=grad_weight_e)
        torch.sum(grad_e, 0, out=grad_bias_e)
    _clear_idle(offsets, [grad_x], [grad_weight, grad_bias])
    return grad_x, grad_weight, grad_bias


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wholes = torch.empty_like(x), _statistics_like(x), _statistics_like(x)
    for x_e, normed_e, mean_e, rstd_e, weight_e, bias_e in _parts(offsets, [x, *wholes], [weight, bias]):
        results = torch.native_layer_norm(x_e, x.shape[-1:], weight_e, bias_e, eps)
        for whole, part in zip((normed_e, mean_e, rstd_e), results, strict=True):
            whole.copy_(part)
    _clear_idle(offsets, list(wholes), [])
    return wholes


def _layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    backward, shape, wanted = torch.ops.aten.native_layer_norm_backward, x.shape[-1:], [True, True, True]
    rows, stacks = [grad, x, mean, rstd, grads[0]], [weight, bias, *grads[1:]]
    for grad_e, x_e, mean_e, rstd_e, grad_x_e, weight_e, bias_e, *grads_e in _parts(offsets, rows, stacks):
        results = backward(grad_e, x_e, shape, mean_e, rstd_e, weight_e, bias_e, wanted)
        for whole, part in zip((grad_x_e, *grads_e), results, strict=True):
            whole.copy_(part)
    _clear_idle(offsets, [grads[0]], list(grads[1:]))
    return grads


def _statistics_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 1)


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    """Compute `_linear` with operators that PyTorch can differentiate any number of times."""
    return _plain(F.linear, x, weight, bias, offsets)


def _plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, eps: float) -> Tensor:
    """Compute `_layer_norm` with such operators."""
    return _plain(lambda x_e, *own: F.layer_norm(x_e, x_e.shape[-1:], *own, eps), x, weight, bias, offsets)


def _plain(function: Callable, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    """Apply a function of tokens, weight and bias to the tokens of each expert; sentinels get zeros."""
    sizes = [end - start for start, end in _bounds(offsets)]
    *rows, sentinels = x.split([*sizes, len(x) - sum(sizes)])
    results = [function(*parts) for parts in zip(rows, weight.unbind(0), bias.unbind(0), strict=True)]
    return torch.cat([*results, sentinels.new_zeros(len(sentinels), results[0].shape[-1])])


def _plain_backward(function: Callable, grad: Tensor, inputs: tuple) -> tuple[Tensor | None, ...]:
    """Return the gradients of a plain function's inputs, which have derivatives, too; `None` for what needs no gradient."""
    is_wanted = [isinstance(value, Tensor) and value.requires_grad for value in inputs]
    wanted = list(compress(inputs, is_wanted))
    grads = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return tuple(next(grads) if has_gradient else None for has_gradient in is_wanted)


class _GroupedLinear(torch.autograd.Function):
    """The operator where nothing is compiled: the same functions, without the cost of a custom operator's call."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias, offsets)
        return _linear(x, weight, bias, offsets)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias, offsets = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            return _plain_backward(_plain_linear, grad, ctx.saved_tensors)
        if any(ctx.needs_input_grad[1:3]):
            return *_linear_backward(grad.contiguous(), x, weight, offsets), None
        return _linear_backward_input(grad.contiguous(), weight, offsets), None, None, None  # frozen experts


class _GroupedLayerNorm(torch.autograd.Function):
    """The operator of the norm, in the same way."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, eps: float) -> Tensor:
        normed, mean, rstd = _layer_norm(x, weight, bias, offsets, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias, offsets)
        ctx.eps = eps
        return normed

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, _, _, *others = saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            return _plain_backward(_plain_layer_norm, grad, (x, *others, ctx.eps))
        return *_layer_norm_backward(grad.contiguous(), *saved), None, None


def _register():
    """Register the operators, once in a process: a checkpoint's code may be imported beside the package's."""
    if hasattr(torch.ops.stablemoe, "grouped_linear"):
        return
    for name, function, fake in (
        ("grouped_linear", _linear, lambda x, weight, bias, offsets: x.new_empty(x.shape[0], weight.shape[1])),
        (
            "grouped_linear_backward",
            _linear_backward,
            lambda grad, x, weight, offsets: (
                torch.empty_like(x),
                torch.empty_like(weight, memory_format=torch.contiguous_format),
                weight.new_empty(weight.shape[:2]),
            ),
        ),
        (
            "grouped_layer_norm",
            _layer_norm,
            lambda x, weight, bias, offsets, eps: (torch.empty_like(x), _statistics_like(x), _statistics_like(x)),
        ),
        (
            "grouped_layer_norm_backward",
            _layer_norm_backward,
            lambda grad, x, mean, rstd, weight, bias, offsets: (
                torch.empty_like(x),
                torch.empty_like(weight),
                torch.empty_like(bias),
            ),
        ),
    ):
        torch.library.custom_op(f"stablemoe::{name}", function, mutates_args=()).register_fake(fake)
    torch.library.register_autograd("stablemoe::grouped_linear", _grad_linear, setup_context=_save_linear)
    torch.library.register_autograd("stablemoe::grouped_layer_norm", _grad_layer_norm, setup_context=_save_layer_norm)


def _save_linear(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grad_linear(ctx, grad):
    x, weight, _, offsets = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _plain_backward(_plain_linear, grad, ctx.saved_tensors)
    return *torch.ops.stablemoe.grouped_linear_backward(grad.contiguous(), x, weight, offsets), None


def _save_layer_norm(ctx, inputs, output):
    x, weight, bias, offsets, ctx.eps = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias, offsets)


def _grad_layer_norm(ctx, grad, *_):
    x, _, _, *others = saved = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _plain_backward(_plain_layer_norm, grad, (x, *others, ctx.eps))
    return *torch.ops.stablemoe.grouped_layer_norm_backward(grad.contiguous(), *saved), None, None


_register()


__all__ = ["ExpertOrder", "grouped_layer_norm", "grouped_linear", "permute", "sort_by_expert"]
