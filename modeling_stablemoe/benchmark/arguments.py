# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The options of the benchmark."""

from dataclasses import dataclass, field
from typing import Any

import torch

from modeling_stablemoe.runs.command_line import parse_overrides

from .layers import BACKENDS, own_backend_of
from .models import Preset
from .turns import LEAST_ROUNDS


PARTS = ("layer", "step", "generation", "memory", "loading", "shares")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class BenchmarkArguments:
    """What to measure, how large and how long."""

    output_dir: str = field(
        default="runs/benchmark",
        metadata={"help": "Folder of benchmark.json and benchmark.md. A run with the same settings goes on there."},
    )
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"Any of {', '.join(PARTS)}."})
    overwrite: bool = field(
        default=False, metadata={"help": "Forget what the folder holds, and measure all of it again."}
    )
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; default: cuda where there is one."})
    dtypes: list[str] | None = field(
        default=None,
        metadata={
            "help": "float32 and/or bfloat16, of all weights. Training steps keep theirs in float32 and run under "
            "autocast. Default: float32 on a CPU, both on a GPU."
        },
    )
    compile: bool = field(default=False, metadata={"help": "Measure with torch.compile, too."})
    rounds: int = field(default=7, metadata={"help": "Turns of each contender."})
    seconds_per_cell: float = field(
        default=60.0,
        metadata={"help": f"Start no further round of a cell after so long; {LEAST_ROUNDS} there are in any case."},
    )
    give_up: float = field(
        default=10.0, metadata={"help": "Leave out what takes this many times as long as the fastest of its cell."}
    )
    tokens: list[int] = field(default_factory=lambda: [512, 4096, 32768], metadata={"help": "Of a layer's batch."})
    experts: list[int] = field(default_factory=lambda: [8, 32, 128, 512], metadata={"help": "Of a layer."})
    sublayers: list[int] = field(default_factory=lambda: [1, 3], metadata={"help": "Of an expert, of a layer."})
    backends: list[str] = field(
        default_factory=lambda: list(BACKENDS), metadata={"help": f"Of the experts: any of {', '.join(BACKENDS)}."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Width of a layer."})
    intermediate_size: int = field(default=1024, metadata={"help": "Inner width of an expert of a layer."})
    model_preset: str = field(
        default="configuration/models/cpu-small.json", metadata={"help": "Shape of the whole models."}
    )
    config_overrides: str = field(
        default="{}", metadata={"help": """Fields of the preset to change, as JSON: '{"num_experts": 32}'."""}
    )
    batch_size: int = field(
        default=8, metadata={"help": "Sequences of a step and of memory, as long as the model takes."}
    )
    generation_batches: list[int] = field(default_factory=lambda: [1, 8, 64], metadata={"help": "Prompts at a time."})
    prompt_length: int = field(default=64, metadata={"help": "Tokens of a prompt."})
    new_tokens: int = field(default=32, metadata={"help": "Tokens that are generated."})
    seed: int = field(default=0, metadata={"help": "Of weights, routing and tokens."})

    def __post_init__(self):
        """Check every option, before anything is measured."""
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"--device must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: there is no CUDA device, or torch was built without; measure with cpu")
        if self.dtypes is None:
            self.dtypes = ["float32"] if self.device == "cpu" else list(DTYPES)
        for name, choices in (("parts", PARTS), ("dtypes", tuple(DTYPES)), ("backends", BACKENDS)):
            given = getattr(self, name)
            if not given or not set(given) <= set(choices):
                listed = " ".join(given) or "none"
                raise ValueError(f"--{name} must be one or more of {', '.join(choices)}; got {listed}")
        for name in ("tokens", "experts", "sublayers", "generation_batches"):
            given = getattr(self, name)
            if not given or min(given) < 1 or len(set(given)) < len(given):
                raise ValueError(f"--{name} must be different numbers >= 1, at least one; got {given}")
        least = {"rounds": 1, "hidden_size": 8, "intermediate_size": 8, "batch_size": 1, "prompt_length": 1}
        for name, bound in {**least, "new_tokens": 2, "seconds_per_cell": 0, "give_up": 1}.items():
            if getattr(self, name) < bound:
                raise ValueError(f"--{name} must be >= {bound}, got {getattr(self, name)}")
        if not {"step", "generation", "memory", "loading"}.isdisjoint(self.parts):
            self._check_model()

    def _check_model(self):
        positions, length = self.preset.config().max_position_embeddings, self.prompt_length + self.new_tokens
        if "generation" in self.parts and length > positions:
            raise ValueError(
                f"--prompt_length and --new_tokens come to {length}, but the model has {positions} positions; lower them, "
                "or raise `max_position_embeddings` with --config_overrides"
            )

    @property
    def preset(self) -> Preset:
        """`Preset`: the shape of whole models."""
        return Preset(self.model_preset, parse_overrides(self.config_overrides))

    @property
    def own_backend(self) -> str:
        """`str`: the backend that aims are checked with."""
        return own_backend_of(self.backends)

    @property
    def modes(self) -> tuple[bool, ...]:
        """`tuple[bool, ...]`: whether cells are compiled."""
        return (False, True) if self.compile else (False,)

    @property
    def settings(self) -> dict[str, Any]:
        """`dict`: what cells do not name themselves, and what all in one file have in common."""
        names = """hidden_size intermediate_size model_preset config_overrides batch_size prompt_length new_tokens rounds
            seconds_per_cell give_up backends seed device"""
        return {name: getattr(self, name) for name in names.split()}
