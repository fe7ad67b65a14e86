# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Experts that stay in host memory or on disk and are fetched ahead of use."""

from .offloading import experts_on_disk, offload_experts
from .offloading_report import ARMS, combine_rounds, files_of, measure_arm, to_markdown


__all__ = [
    "ARMS",
    "combine_rounds",
    "experts_on_disk",
    "files_of",
    "measure_arm",
    "offload_experts",
    "to_markdown",
]
