# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What a result was measured on: hardware by type, and versions."""

import platform
from pathlib import Path

import torch
import transformers


def environment(device: torch.device) -> dict[str, str]:
    """Describe hardware by type, and versions."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "hardware": hardware,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if names:
            return f"CPU, {names[0]}"
    return f"CPU, {platform.processor() or platform.machine()}"


__all__ = ["environment"]
