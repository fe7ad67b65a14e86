# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The parts of the benchmark that measure one layer: beside its rivals, by its experts, and what its time goes to."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor
from transformers import set_seed

from .arguments import DTYPES, BenchmarkArguments
from .cells import Cell, Result
from .layers import (
    BUILDERS,
    GATED_BLOCKS,
    Contender,
    LayerShape,
    build_contenders,
    clear_gradients,
    count_active,
    draw_tokens,
    flops_per_token,
    run_forward,
    run_training,
)
from .memory import available_memory, too_large
from .shares import measure_shares
from .timing import LEAST_ROUNDS, Arm, begin_compiling, free_memory, take_turns


FORWARD, TRAINING = "forward", "forward + backward"
PASSES = (FORWARD, TRAINING)
# Passes under the profiler, which is slow.
PROFILED_PASSES = 3
# What `batched_mm` may take of the memory for its copies of a matrix a token; more is not what it is for.
MOST_COPIES = 0.25
# Bytes a second that memory is filled with, in order of magnitude.
BANDWIDTH = {"cpu": 5e9, "cuda": 1e12}


class LayerParts:
    """Measures layers; keeps the modules of the last cell for the next one of the same shape.

    Args:
        args (`BenchmarkArguments`): what to measure.
    """

    def __init__(self, args: BenchmarkArguments):
        self.args, self.device = args, torch.device(args.device)
        self.key, self.contenders = None, {}

    def layer_cells(self) -> Iterator[Cell]:
        """Give the cells of the layer beside its rivals, then those of the layer by its number of experts."""
        args = self.args
        for dtype, sublayers, experts, tokens, is_compiled, direction in product(
            args.dtypes, args.sublayers, args.experts, args.tokens, args.modes, PASSES
        ):
            cell = {"dtype": dtype, "compiled": is_compiled, "tokens": tokens, "experts": experts}
            cell |= {"sublayers": sublayers, "pass": direction}
            yield Cell("layer", cell, partial(self._measure_layer, **_arguments(cell)))
        if len(args.experts) < 2:
            return
        numbers = " ".join(str(number) for number in sorted(args.experts))
        for dtype, sublayers, tokens in product(args.dtypes, args.sublayers, args.tokens):
            cell = {"dtype": dtype, "tokens": tokens, "experts": numbers, "sublayers": sublayers, "pass": TRAINING}
            yield Cell("experts", cell, partial(self._measure_experts, **_arguments(cell)))

    def share_cells(self) -> Iterator[Cell]:
        """Give the cells of what the layer's time goes to."""
        args = self.args
        for dtype, sublayers, experts, tokens, direction in product(
            args.dtypes, args.sublayers, args.experts, args.tokens, PASSES
        ):
            cell = {"dtype": dtype, "tokens": tokens, "experts": experts, "sublayers": sublayers, "pass": direction}
            yield Cell("shares", cell, partial(self._measure_shares, **_arguments(cell)))

    def release(self):
        """Forget the modules of the last cell."""
        self.key, self.contenders = None, {}
        free_memory(self.device)

    def shape(self, experts: int, sublayers: int) -> LayerShape:
        """Give the shape of a layer."""
        args = self.args
        return LayerShape(args.hidden_size, args.intermediate_size, experts, sublayers, max_tokens=max(args.tokens))

    def _prepare(self, dtype: str, experts: int, sublayers: int, names: Sequence[str]) -> dict[str, str]:
        """Build the modules of a cell, unless they are there; return those that do not fit, and why."""
        key = dtype, experts, sublayers, tuple(names)
        if key != self.key:
            self.release()
            set_seed(self.args.seed)
            shape = self.shape(experts, sublayers)
            fitting, self.left_out = fit_weights(shape, names, DTYPES[dtype], available_memory(self.device))
            self.contenders = build_contenders(shape, fitting, self.device, DTYPES[dtype])
            self.facts = {}
            for name, contender in self.contenders.items():
                active, total = count_active(contender.module, experts)
                flops = flops_per_token(contender, shape)
                self.facts[name] = {"active_parameters": active, "parameters": total, "flops": flops}
            self.key = key
        return dict(self.left_out)

    def _draw(self, tokens: int, dtype: str, direction: str, shape: LayerShape) -> tuple[Tensor, Tensor, Tensor]:
        set_seed(self.args.seed)
        hidden_states, token_ids = draw_tokens(shape, tokens, self.device, DTYPES[dtype])
        gradient = torch.randn_like(hidden_states)
        return hidden_states.requires_grad_(direction == TRAINING), token_ids, gradient

    def _measure_layer(
        self, on_round: Callable, dtype: str, compiled: bool, tokens: int, experts: int, sublayers: int, direction: str
    ) -> Result:
        left_out = self._prepare(dtype, experts, sublayers, list(BUILDERS))
        shape = self.shape(experts, sublayers)
        data = self._draw(tokens, dtype, direction, shape)
        if compiled:
            begin_compiling()
        arms = []
        for name, contender in self.contenders.items():
            for backend in self.args.backends if contender.config is not None else (None,):
                label = name if backend is None else f"{name} {backend}"
                reason = _loops(name, backend) if compiled else None
                reason = reason or self._needs_too_much(shape, backend, tokens, direction, DTYPES[dtype])
                if name in GATED_BLOCKS and backend == "eager" and direction == TRAINING:
                    reason = reason or self._takes_too_long(shape, DTYPES[dtype])
                if reason is not None:
                    left_out[label] = reason
                    continue
                is_kept = name == "dense" or label == f"stablemoe {self.args.own_backend}"
                arms.append(make_arm(label, contender, backend, data, direction, compiled, is_kept))
        turns = take_turns(arms, self.args.pace(compiled), self.device, on_round)
        return Result(turns.seconds, {**left_out, **turns.left_out}, {"models": self.facts})

    def _needs_too_much(
        self, shape: LayerShape, backend: str | None, tokens: int, direction: str, dtype: torch.dtype
    ) -> str | None:
        free = available_memory(self.device)
        size = dtype.itemsize
        if backend == "batched_mm":
            copies = 2 * tokens * shape.hidden_size * shape.intermediate_size * size
            copies *= 2 * shape.num_sublayers if direction == TRAINING else 1
            reason = too_large(copies, free, MOST_COPIES)
            return None if reason is None else f"copies a matrix a token: {reason}"
        needed = activation_bytes(shape, tokens, size)
        if direction == TRAINING:
            needed += weight_bytes(shape, "stablemoe", size)
        return too_large(needed, free)

    def _takes_too_long(self, shape: LayerShape, dtype: torch.dtype) -> str | None:
        """Say why transformers' loop over experts cannot be trained: each expert fills a gradient of all of them."""
        filled = shape.num_experts * weight_bytes(shape, "stablemoe", dtype.itemsize)
        if filled / BANDWIDTH[self.device.type] <= self.args.seconds_per_cell / LEAST_ROUNDS:
            return None
        return f"its backward pass fills the gradients of all experts once an expert, {filled / 1e9:.0f} GB"

    def _measure_experts(
        self, on_round: Callable, dtype: str, tokens: int, experts: str, sublayers: int, direction: str
    ) -> Result:
        self.release()
        set_seed(self.args.seed)
        size, left_out, arms = DTYPES[dtype].itemsize, {}, []
        for number in map(int, experts.split()):
            shape = self.shape(number, sublayers)
            needed = 2 * weight_bytes(shape, "stablemoe", size) + activation_bytes(shape, tokens, size)
            reason = too_large(needed, available_memory(self.device))
            if reason is not None:
                left_out[str(number)] = reason
                continue
            contender = build_contenders(shape, ["stablemoe"], self.device, DTYPES[dtype])["stablemoe"]
            data = self._draw(tokens, dtype, direction, shape)
            arms.append(make_arm(str(number), contender, self.args.own_backend, data, direction, is_kept=True))
        turns = take_turns(arms, self.args.pace(), self.device, on_round)
        return Result(turns.seconds, {**left_out, **turns.left_out})

    def _measure_shares(
        self, on_round: Callable, dtype: str, tokens: int, experts: int, sublayers: int, direction: str
    ) -> Result:
        left_out = self._prepare(dtype, experts, sublayers, ["stablemoe"])
        shape = self.shape(experts, sublayers)
        reason = self._needs_too_much(shape, self.args.own_backend, tokens, direction, DTYPES[dtype])
        if left_out or reason is not None:
            return Result({}, left_out or {"stablemoe": reason})
        contender = self.contenders["stablemoe"]
        data = self._draw(tokens, dtype, direction, shape)
        arm = make_arm("stablemoe", contender, self.args.own_backend, data, direction)

        def run():
            arm.reset()
            arm.run()

        shares = measure_shares(contender.module, run, self.device, PROFILED_PASSES)
        arm.reset()
        return Result(shares)


def _arguments(cell: dict) -> dict:
    """Give a cell as keyword arguments: `pass` is no name of Python's."""
    return {"direction" if name == "pass" else name: value for name, value in cell.items()}


def _loops(name: str, backend: str | None) -> str | None:
    if name == "switch" or backend == "eager":
        return "loops over its experts, which torch.compile would unroll"
    return None


def make_arm(
    label: str,
    contender: Contender,
    backend: str | None,
    data: tuple[Tensor, Tensor, Tensor],
    direction: str,
    is_compiled: bool = False,
    is_kept: bool = False,
) -> Arm:
    """Make an arm of a module.

    Args:
        label (`str`): its name.
        contender (`Contender`): the module.
        backend (`str`, *optional*): of its experts.
        data (`tuple`): hidden states, token ids, and the gradient of the output.
        direction (`str`): one of `PASSES`.
        is_compiled (`bool`): whether `torch.compile` makes the forward pass.
        is_kept (`bool`): see `Arm`.

    Returns:
        `Arm`
    """
    hidden_states, token_ids, gradient = data
    module = torch.compile(contender.module) if is_compiled else contender.module

    def run():
        contender.use(backend)
        contender.module.train(direction == TRAINING)
        if direction == TRAINING:
            run_training(module, hidden_states, token_ids, gradient)
        else:
            run_forward(module, hidden_states, token_ids)

    return Arm(label, run, partial(clear_gradients, contender.module, hidden_states), is_kept)


def weight_bytes(shape: LayerShape, name: str, itemsize: int) -> int:
    """Estimate the weights of a contender."""
    experts = 1 if name == "dense" else shape.num_experts
    return 2 * shape.hidden_size * shape.intermediate_size * experts * shape.num_sublayers * itemsize


def activation_bytes(shape: LayerShape, tokens: int, itemsize: int) -> int:
    """Estimate what a training pass keeps, beside the weights and their gradients."""
    return tokens * (12 * shape.hidden_size + 6 * shape.intermediate_size) * shape.num_sublayers * itemsize


def fit_weights(
    shape: LayerShape, names: Sequence[str], dtype: torch.dtype, available: int
) -> tuple[list[str], dict[str, str]]:
    """Choose the contenders whose weights, and the gradients of one of them at a time, fit into memory.

    Args:
        shape (`LayerShape`): of all.
        names (sequence of `str`): in the order in which they are chosen; gated blocks share their experts.
        dtype (`torch.dtype`): of the weights.
        available (`int`): bytes; 0 is unknown.

    Returns:
        `tuple`: the names that fit, and the others with the reason.
    """
    fitting, left_out, held = [], {}, 0
    for name in names:
        is_shared = name in GATED_BLOCKS and any(other in GATED_BLOCKS for other in fitting)
        weights = 0 if is_shared else weight_bytes(shape, name, dtype.itemsize)
        gradients = weight_bytes(shape, "stablemoe", dtype.itemsize)
        reason = too_large(held + weights + gradients, available)
        if reason is None:
            fitting.append(name)
            held += weights
        else:
            left_out[name] = reason
    return fitting, left_out


__all__ = ["FORWARD", "PASSES", "TRAINING", "LayerParts", "fit_weights", "make_arm"]
