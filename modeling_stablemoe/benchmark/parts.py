# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The parts of the benchmark, each a series of cells whose contenders are measured together."""

import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, set_seed

from modeling_stablemoe.measure.machine import ChildError, available_memory, first_line, run_alone

from .arguments import DTYPES, BenchmarkArguments
from .layers import (
    BUILDERS,
    SAME_EXPERTS,
    Contender,
    LayerShape,
    build_contender,
    count_active,
    draw_tokens,
    flops_per_token,
)
from .memory import ARMS, INFERENCE, LOADING, SAVE, TRAINING, measure_memory, too_large
from .models import (
    DENSE,
    EQUAL_DENSE,
    GENERATION_ARMS,
    STEP_ARMS,
    Generation,
    TrainingStep,
    build_model,
    count_parameters,
    describe,
)
from .turns import LEAST_ROUNDS, free_memory, profile_operators, take_turns


FORWARD, BACKWARD = "forward", "forward + backward"
PASSES = (FORWARD, BACKWARD)
# Fresh processes that a measurement of memory or loading is repeated in.
MEMORY_ROUNDS = 3
# Bytes per parameter in training: weight, gradient, and two of AdamW's.
TRAINING_BYTES = 16
# `batched_mm` may take this share of the memory for its copies of a matrix per token; it is not made for more.
MOST_COPIES = 0.25
# Bytes that memory is filled with in a second, in order of magnitude.
BANDWIDTH = {"cpu": 5e9, "cuda": 1e12}
# Contenders share code; past torch's limit of 8 they would run uncompiled and say nothing.
MOST_RECOMPILED = 64
UNROLLED = "loops over its experts, which torch.compile would unroll"


class Cell(NamedTuple):
    """Something to measure; `cell` tells it from the others of its part.

    `measure` returns `arms`, numbers per round by contender (seconds, bytes or shares), `left_out`, the reason by contender,
    and facts.
    """

    part: str
    cell: dict[str, Any]
    measure: Callable[[], dict[str, Any]]


def cells_of(args: BenchmarkArguments) -> Iterator[Cell]:
    """List what there is to measure; nothing is built before it is measured."""
    parts = {
        "layer": (layer_cells, expert_cells),
        "step": (step_cells,),
        "generation": (generation_cells,),
        "memory": (partial(process_cells, part="memory"),),
        "loading": (partial(process_cells, part="loading"),),
        "shares": (share_cells,),
    }
    for part in args.parts:
        for cells in parts[part]:
            yield from cells(args)


def turns(args: BenchmarkArguments, runs: dict[str, Callable], always: tuple[str, ...] = ()):
    """Let contenders take turns, as long as the options say."""
    pace = {"rounds": args.rounds, "seconds": args.seconds_per_cell, "give_up": args.give_up}
    return take_turns(runs, **pace, always=always)


def begin_compiling():
    """Forget what was compiled, and let one function be compiled for many contenders."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = MOST_RECOMPILED


# Layers


class Layers:
    """Contenders of one shape, built when the first cell needs them."""

    def __init__(self, args: BenchmarkArguments, dtype: str, experts: int, sublayers: int, names=("stablemoe",)):
        self.args, self.device, self.dtype, self.names = args, torch.device(args.device), DTYPES[dtype], names
        self.shape = LayerShape(args.hidden_size, args.intermediate_size, experts, sublayers, max(args.tokens))
        self.left_out: dict[str, str] = {}
        self.facts: dict[str, dict] = {}

    @cached_property
    def contenders(self) -> dict[str, Contender]:
        """`dict[str, Contender]`: those that fit; the others are in `left_out`."""
        free_memory()
        set_seed(self.args.seed)
        found: dict[str, Contender] = {}
        experts = self.shape.num_experts * self.shape.expert_bytes(self.dtype)
        for name in self.names:
            owner = next((found[other] for other in SAME_EXPERTS if name in SAME_EXPERTS and other in found), None)
            copies = 0 if name == "dense" else 1 if owner is not None else 2  # weights and gradients
            reason = too_large(copies * experts, available_memory(self.device))
            if reason is not None:
                self.left_out[name] = reason
                continue
            found[name] = build_contender(name, self.shape, self.device, self.dtype, owner)
            active, total = count_active(found[name].module, self.shape.num_experts)
            flops = flops_per_token(found[name], self.shape)
            self.facts[name] = {"active_parameters": active, "parameters": total, "flops": flops}
        return found

    def run_of(self, name: str, backend: str | None, tokens: int, direction: str, compiled: bool = False) -> Callable:
        """Return what runs a contender once."""
        set_seed(self.args.seed)
        hidden_states, token_ids = draw_tokens(self.shape, tokens, self.device, self.dtype)
        gradient = torch.randn_like(hidden_states)
        hidden_states.requires_grad_(direction == BACKWARD)
        contender = self.contenders[name]
        contender.module.train(direction == BACKWARD)
        module = torch.compile(contender.module) if compiled else contender.module

        def run():
            contender.use(backend)
            with torch.set_grad_enabled(direction == BACKWARD):
                output = module(hidden_states, token_ids)
            if direction == BACKWARD:
                output.backward(gradient)
                # As a step of training does; and the next contender has the memory.
                contender.module.zero_grad(set_to_none=True)
                hidden_states.grad = None

        return run

    def reason_against(self, name: str, backend: str | None, tokens: int, direction: str) -> str | None:
        """Return why a run would not fit into memory or take too long."""
        free, expert_bytes = available_memory(self.device), self.shape.expert_bytes(self.dtype)
        if backend == "batched_mm":
            copies = tokens * expert_bytes * (2 if direction == BACKWARD else 1 / self.shape.num_sublayers)
            reason = too_large(copies, free, MOST_COPIES)
            return None if reason is None else f"copies a matrix per token: {reason}"
        stack = self.shape.num_experts * expert_bytes
        if name in SAME_EXPERTS and backend == "eager" and direction == BACKWARD:
            filled = self.shape.num_experts * stack
            if filled / BANDWIDTH[self.device.type] > self.args.seconds_per_cell / LEAST_ROUNDS:
                return f"its backward pass fills the gradients of all experts once per expert, {filled / 1e9:.0f} GB"
        needed = self.shape.activation_bytes(tokens, self.dtype) + (stack if direction == BACKWARD else 0)
        return too_large(needed, free)

    def measure(self, tokens: int, compiled: bool, direction: str) -> dict:
        """Measure all contenders, under each backend that they have."""
        if compiled:
            begin_compiling()
        runs, left_out = {}, {}
        for name, contender in self.contenders.items():
            for backend in self.args.backends if contender.config is not None else (None,):
                label = name if backend is None else f"{name} {backend}"
                reason = UNROLLED if compiled and (name == "switch" or backend == "eager") else None
                reason = reason or self.reason_against(name, backend, tokens, direction)
                if reason is None:
                    runs[label] = self.run_of(name, backend, tokens, direction, compiled)
                else:
                    left_out[label] = reason
        times, slow = turns(self.args, runs, always=("dense", f"stablemoe {self.args.own_backend}"))
        return {"arms": times, "left_out": {**self.left_out, **left_out, **slow}, "models": self.facts}

    def own_run(self, tokens: int, direction: str) -> tuple[Callable | None, str | None]:
        """Return what runs our layer once, or the reason why it would not fit."""
        reason = self.reason_against("stablemoe", self.args.own_backend, tokens, direction)
        if reason is None and "stablemoe" in self.contenders:
            return self.run_of("stablemoe", self.args.own_backend, tokens, direction), None
        return None, reason or self.left_out["stablemoe"]

    def measure_shares(self, tokens: int, direction: str) -> dict:
        """Profile our layer."""
        run, reason = self.own_run(tokens, direction)
        if run is None:
            return {"arms": {}, "left_out": {"stablemoe": reason}}
        return {"arms": profile_operators(run, self.device), "left_out": {}}


def layer_cells(args: BenchmarkArguments) -> Iterator[Cell]:
    """List the cells of the layer beside its contenders."""
    for dtype, sublayers, experts in product(args.dtypes, args.sublayers, args.experts):
        layers = Layers(args, dtype, experts, sublayers, tuple(BUILDERS))
        for tokens, compiled, direction in product(args.tokens, args.modes, PASSES):
            cell = {"dtype": dtype, "compiled": compiled, "tokens": tokens, "experts": experts, "sublayers": sublayers}
            yield Cell("layer", {**cell, "pass": direction}, partial(layers.measure, tokens, compiled, direction))


def share_cells(args: BenchmarkArguments) -> Iterator[Cell]:
    """List the cells of what our layer's time goes to."""
    for dtype, sublayers, experts in product(args.dtypes, args.sublayers, args.experts):
        layers = Layers(args, dtype, experts, sublayers)
        for tokens, direction in product(args.tokens, PASSES):
            cell = {"dtype": dtype, "tokens": tokens, "experts": experts, "sublayers": sublayers, "pass": direction}
            yield Cell("shares", cell, partial(layers.measure_shares, tokens, direction))


def expert_cells(args: BenchmarkArguments) -> Iterator[Cell]:
    """List the cells of our layer by its number of experts."""
    numbers = sorted(args.experts)
    for dtype, sublayers, tokens in product(args.dtypes, args.sublayers, args.tokens if len(numbers) > 1 else ()):
        cell = {"dtype": dtype, "tokens": tokens, "experts": " ".join(map(str, numbers)), "sublayers": sublayers}
        measure = partial(_measure_experts, args, dtype, tokens, numbers, sublayers)
        yield Cell("experts", {**cell, "pass": BACKWARD}, measure)


def _measure_experts(args: BenchmarkArguments, dtype: str, tokens: int, numbers: list[int], sublayers: int) -> dict:
    runs, left_out = {}, {}
    for number in numbers:
        run, reason = Layers(args, dtype, number, sublayers).own_run(tokens, BACKWARD)
        if run is None:
            left_out[str(number)] = reason
        else:
            runs[str(number)] = run
    times, slow = turns(args, runs, always=tuple(runs))
    return {"arms": times, "left_out": {**left_out, **slow}}


# Whole models


class Models:
    """Whole models in one dtype, compiled or not; those that generate are built when the first cell needs them."""

    def __init__(self, args: BenchmarkArguments, dtype: str, compiled: bool):
        self.args, self.device, self.dtype, self.compiled = args, torch.device(args.device), DTYPES[dtype], compiled
        self.preset = args.preset
        self.config = self.preset.config()
        self.left_out: dict[str, str] = {}
        self.facts: dict[str, dict] = {}

    def _draw(self, batch_size: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.args.seed)
        return torch.randint(self.config.vocab_size, (batch_size, length), generator=generator).to(self.device)

    def _build(
        self, names: tuple[str, ...], bytes_each: float, tokens: int, length: int
    ) -> dict[str, PreTrainedModel]:
        """Build the models that fit into memory together, with what they will take; the others go to `left_out`."""
        free_memory()
        models: dict[str, PreTrainedModel] = {}
        config = self.config
        # What a training pass keeps of so many tokens.
        by_block = 16 * config.hidden_size + 3 * config.intermediate_size + config.max_position_embeddings
        blocks = config.num_hidden_layers + config.num_moe_layers * config.num_expert_sublayers
        planned = 4.0 * tokens * (blocks * by_block + 4 * config.vocab_size)
        available = available_memory(self.device)
        for name in names:
            needed = bytes_each * count_parameters(self.preset, name)
            reason = too_large(planned + needed, available)
            if reason is not None:
                self.left_out[name] = reason
                continue
            planned += needed
            models[name] = build_model(self.preset, name, self.device, self.args.seed)
            self.facts[name] = describe(models[name], config.num_experts, length)
        return models

    def measure_step(self) -> dict:
        """Measure training steps."""
        length = self.config.max_position_embeddings
        ids = self._draw(self.args.batch_size, length)
        models = self._build(STEP_ARMS, TRAINING_BYTES, ids.numel(), length)
        if "stage 1" in self.facts and "stage 2" in self.facts:
            # As inference makes it, a stage-1 model evaluates its distilled router for all of the vocabulary.
            self.facts["stage 1"]["flops"] = self.facts["stage 2"]["flops"]
        if self.compiled:
            begin_compiling()
        runs = {name: TrainingStep(model, ids, self.dtype, self.compiled).run for name, model in models.items()}
        times, slow = turns(self.args, runs, always=("stage 1", "stage 2", "hash", DENSE, EQUAL_DENSE))
        return {"arms": times, "left_out": {**self.left_out, **slow}, "models": self.facts, "tokens": ids.numel()}

    @cached_property
    def generating(self) -> dict[str, PreTrainedModel]:
        """`dict[str, PreTrainedModel]`: those that generate."""
        args = self.args
        tokens = max(args.generation_batches) * args.prompt_length
        models = self._build(GENERATION_ARMS, self.dtype.itemsize + 4, tokens, args.prompt_length)
        models = {name: model.to(self.dtype) for name, model in models.items()}
        if self.compiled:
            begin_compiling()
            # As `generate` compiles on a GPU by itself: into CUDA graphs.
            mode = "reduce-overhead" if args.device == "cuda" else None
            for model in models.values():
                model.forward = torch.compile(model.forward, mode=mode)
        return models

    def measure_generation(self, batch: int) -> dict:
        """Measure prompts, which is generation of one token, and each token after it."""
        args = self.args
        ids = self._draw(batch, args.prompt_length)
        static_length = args.prompt_length + args.new_tokens if self.compiled else None
        generations, left_out = {}, {}
        for name, model in self.generating.items():
            for backend in args.backends if name != EQUAL_DENSE else (None,):
                label = name if backend is None else f"{name} {backend}"
                if self.compiled and backend == "eager":
                    left_out[label] = UNROLLED
                else:
                    generations[label] = Generation(model, ids, backend, static_length)
        always = (EQUAL_DENSE, f"stage 2 {args.own_backend}")
        seconds = {}
        for length in (1, args.new_tokens):
            runs = {label: partial(generation.run, length) for label, generation in generations.items()}
            seconds[length], slow = turns(args, runs, always)
            left_out |= slow
        measured = {}
        for label in generations:
            if label in seconds[1] and label in seconds[args.new_tokens]:
                prompt, whole = seconds[1][label], seconds[args.new_tokens][label]
                measured[f"{label}, prefill"] = prompt
                measured[f"{label}, token"] = [(each - median(prompt)) / (args.new_tokens - 1) for each in whole]
        return {"arms": measured, "left_out": {**self.left_out, **left_out}, "models": self.facts}


def step_cells(args: BenchmarkArguments) -> Iterator[Cell]:
    """List the cells of a training step."""
    for dtype, compiled in product(args.dtypes, args.modes):
        models = Models(args, dtype, compiled)
        yield Cell("step", {"dtype": dtype, "compiled": compiled}, models.measure_step)


def generation_cells(args: BenchmarkArguments) -> Iterator[Cell]:
    """List the cells of generation."""
    for dtype, compiled in product(args.dtypes, args.modes):
        models = Models(args, dtype, compiled)
        for batch in args.generation_batches:
            cell = {"dtype": dtype, "compiled": compiled, "batch": batch}
            yield Cell("generation", cell, partial(models.measure_generation, batch))


def process_cells(args: BenchmarkArguments, part: str) -> Iterator[Cell]:
    """List the cells of memory or of loading, measured in fresh processes."""
    for dtype, what in product(args.dtypes, (TRAINING, INFERENCE, LOADING) if part == "memory" else (LOADING,)):
        cell = {"dtype": dtype, **({"what": what} if part == "memory" else {})}
        number = "peak" if part == "memory" else "seconds"
        yield Cell(part, cell, partial(_measure_processes, args, dtype, what, number))


def _measure_processes(args: BenchmarkArguments, dtype: str, what: str, number: str) -> dict:
    free_memory()
    arms, parameters, left_out = {}, {}, {}
    task = {"preset": args.preset, "batch_size": args.batch_size}
    task |= {"dtype": DTYPES[dtype], "device": torch.device(args.device)}
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: str(Path(folder, str(index))) for index, name in enumerate(ARMS[what])}
        for turn, name in product(range(MEMORY_ROUNDS), ARMS[what]):
            if name in left_out:
                continue
            alone = partial(run_alone, measure_memory, **task, name=name, folder=folders[name])
            try:
                if what == LOADING and turn == 0:
                    alone(what=SAVE)
                answer = alone(what=what)
            except ChildError as error:
                left_out[name] = first_line(error)
                arms.pop(name, None)
                continue
            arms.setdefault(name, []).append(answer[number])
            parameters[name] = answer["parameters"]
    return {"arms": arms, "left_out": left_out, "parameter_bytes": parameters}
