# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of the MoE layer, of steps, of generation and of offloaded experts, beside others."""

from .arguments import BenchmarkArguments
from .offloading import ARMS, combine_rounds, compare_arms, files_of, measure_arm, to_markdown
from .run import run_benchmark


__all__ = [
    "ARMS",
    "BenchmarkArguments",
    "combine_rounds",
    "compare_arms",
    "files_of",
    "measure_arm",
    "run_benchmark",
    "to_markdown",
]
