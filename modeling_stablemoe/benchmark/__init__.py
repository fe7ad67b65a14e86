# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of the MoE layer, of steps and of generation, by turns with other models."""

from .arguments import BenchmarkArguments
from .run import run_benchmark


__all__ = [
    "BenchmarkArguments",
    "run_benchmark",
]
