# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Inference with experts that stay in host memory or on disk and are fetched before they are needed."""

from .offloading import experts_on_disk, offload_experts


__all__ = [
    "experts_on_disk",
    "offload_experts",
]
