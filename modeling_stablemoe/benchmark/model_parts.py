# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The parts of the benchmark that measure whole models: a training step, generation, memory."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from statistics import median

import torch
from transformers import PreTrainedModel

from .arguments import DTYPES, BenchmarkArguments
from .cells import Cell, Result
from .memory import (
    ARMS,
    INFERENCE,
    LOADING,
    SAVE,
    TRAINING,
    ChildError,
    MemoryTask,
    available_memory,
    run_alone,
    too_large,
)
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
from .timing import Arm, begin_compiling, first_line, free_memory, take_turns


# Bytes a parameter takes in training: weight, gradient, and two of AdamW's.
TRAINING_BYTES = 16
# Fresh processes a measurement of memory is repeated in.
MEMORY_ROUNDS = 3
# What is always measured to the end.
KEPT = ("stage 1", "stage 2", "hash", DENSE, EQUAL_DENSE)


class ModelParts:
    """Measures whole models; keeps those that generate for the next cell.

    Args:
        args (`BenchmarkArguments`): what to measure.
    """

    def __init__(self, args: BenchmarkArguments):
        self.args, self.device, self.preset = args, torch.device(args.device), args.preset
        self.config = self.preset.config()
        self.key, self.models = None, {}

    def step_cells(self) -> Iterator[Cell]:
        """Give the cells of a training step."""
        for dtype, is_compiled in product(self.args.dtypes, self.args.modes):
            cell = {"dtype": dtype, "compiled": is_compiled}
            yield Cell("step", cell, partial(self._measure_step, **cell))

    def generation_cells(self) -> Iterator[Cell]:
        """Give the cells of generation."""
        args = self.args
        for dtype, is_compiled, batch_size in product(args.dtypes, args.modes, args.generation_batches):
            cell = {"dtype": dtype, "compiled": is_compiled, "batch": batch_size}
            yield Cell("generation", cell, partial(self._measure_generation, **cell))

    def memory_cells(self) -> Iterator[Cell]:
        """Give the cells of memory."""
        for dtype, what in product(self.args.dtypes, (TRAINING, INFERENCE, LOADING)):
            cell = {"dtype": dtype, "what": what}
            yield Cell("memory", cell, partial(self._measure_memory, **cell))

    def release(self):
        """Forget the models of the last cell."""
        self.key, self.models = None, {}
        free_memory(self.device)

    def _draw(self, batch_size: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.args.seed)
        return torch.randint(self.config.vocab_size, (batch_size, length), generator=generator).to(self.device)

    def _build(self, names: tuple[str, ...], bytes_each: float, extra: float) -> tuple[dict, dict[str, str]]:
        """Build the models that fit into memory together; return them, and the others with the reason."""
        self.release()
        models: dict[str, PreTrainedModel] = {}
        left_out, planned = {}, 0.0
        available = available_memory(self.device)
        for name in names:
            needed = bytes_each * count_parameters(self.preset, name)
            reason = too_large(planned + needed + extra, available)
            if reason is not None:
                left_out[name] = reason
                continue
            planned += needed
            models[name] = build_model(self.preset, name, self.device)
        return models, left_out

    def _activation_bytes(self, tokens: int) -> float:
        """Estimate what a training pass keeps of so many tokens."""
        config = self.config
        by_block = 16 * config.hidden_size + 3 * config.intermediate_size + config.max_position_embeddings
        blocks = config.num_hidden_layers + config.num_moe_layers * config.num_expert_sublayers
        return 4.0 * tokens * (blocks * by_block + 4 * config.vocab_size)

    def _measure_step(self, on_round: Callable, dtype: str, compiled: bool) -> Result:
        length = self.config.max_position_embeddings
        ids = self._draw(self.args.batch_size, length)
        models, left_out = self._build(STEP_ARMS, TRAINING_BYTES, self._activation_bytes(ids.numel()))
        facts = {name: describe(model, self.config.num_experts, length) for name, model in models.items()}
        if "stage 1" in facts and "stage 2" in facts:
            # Counted as inference makes it, where a stage-1 model evaluates its distilled router for all of the vocabulary.
            facts["stage 1"]["flops"] = facts["stage 2"]["flops"]
        if compiled:
            begin_compiling()
        arms = []
        for name, model in models.items():
            step = TrainingStep(model, ids, DTYPES[dtype], compiled)
            arms.append(Arm(name, step.run, is_kept=name in KEPT))
        turns = take_turns(arms, self.args.pace(compiled), self.device, on_round)
        return Result(turns.seconds, {**left_out, **turns.left_out}, {"models": facts, "tokens": ids.numel()})

    def _prepare_generation(self, dtype: str, compiled: bool, tokens: int):
        if self.key == (dtype, compiled):
            return
        self.release()
        size = DTYPES[dtype].itemsize
        models, self.left_out = self._build(GENERATION_ARMS, size + 4, self._activation_bytes(tokens))
        length = self.args.prompt_length
        self.facts = {name: describe(model, self.config.num_experts, length) for name, model in models.items()}
        self.models = {name: model.to(DTYPES[dtype]) for name, model in models.items()}
        self.key = dtype, compiled
        if compiled:
            begin_compiling()
            for model in self.models.values():
                model.forward = torch.compile(model.forward)

    def _generations(self, ids: torch.Tensor, compiled: bool, left_out: dict[str, str]) -> dict[str, Generation]:
        generations = {}
        static_length = self.args.prompt_length + self.args.new_tokens if compiled else None
        for name, model in self.models.items():
            for backend in self.args.backends if name != EQUAL_DENSE else (None,):
                label = name if backend is None else f"{name} {backend}"
                if compiled and backend == "eager":
                    left_out[label] = "loops over its experts, which torch.compile would unroll"
                else:
                    generations[label] = Generation(model, ids, backend, static_length)
        return generations

    def _measure_generation(self, on_round: Callable, dtype: str, compiled: bool, batch: int) -> Result:
        args = self.args
        self._prepare_generation(dtype, compiled, max(args.generation_batches) * args.prompt_length)
        left_out = dict(self.left_out)
        generations = self._generations(self._draw(batch, args.prompt_length), compiled, left_out)
        seconds = {}
        for length in (1, args.new_tokens):
            arms = []
            for label, generation in generations.items():
                is_kept = label in (EQUAL_DENSE, f"stage 2 {args.own_backend}")
                arms.append(Arm(label, partial(generation.run, length), generation.reset, is_kept))
            turns = take_turns(arms, args.pace(compiled), self.device, on_round)
            seconds[length] = turns.seconds
            left_out |= turns.left_out
        measured = {}
        for label, whole in seconds[args.new_tokens].items():
            if label not in seconds[1]:
                continue
            prefill = median(seconds[1][label])
            measured[f"{label}, prefill"] = seconds[1][label]
            measured[f"{label}, token"] = [(value - prefill) / (args.new_tokens - 1) for value in whole]
        return Result(measured, left_out, {"models": self.facts})

    def _measure_memory(self, on_round: Callable, dtype: str, what: str) -> Result:
        self.release()
        peaks, parameters, left_out = {}, {}, {}
        for name in ARMS[what]:
            with tempfile.TemporaryDirectory() as folder:
                task = partial(MemoryTask, self.preset, name, batch_size=self.args.batch_size, folder=folder)
                task = partial(task, dtype=DTYPES[dtype], device=self.device)
                try:
                    if what == LOADING:
                        run_alone(task(what=SAVE))
                    answers = [run_alone(task(what=what)) for _ in range(MEMORY_ROUNDS)]
                except ChildError as error:
                    left_out[name] = first_line(error)
                    continue
            peaks[name] = [float(answer["peak"]) for answer in answers]
            parameters[name] = answers[0]["parameters"]
            on_round()
        return Result(peaks, left_out, {"parameter_bytes": parameters})


__all__ = ["ModelParts"]
