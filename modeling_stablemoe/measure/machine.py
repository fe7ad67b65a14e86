# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The machine that measurements run on: type of hardware, versions, memory, and fresh processes."""

import multiprocessing
import platform
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging


def environment(device: torch.device) -> dict[str, str]:
    """Return the type of the hardware, the number of threads and the versions of Python, torch and transformers."""
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


def available_memory(device: torch.device) -> int:
    """Return how many bytes can be allocated, on a CPU within a container's limit; 0 where that is unknown."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return 0
    free = int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) * 1024
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def peak_memory(device: torch.device) -> int:
    """Return the largest number of bytes that this process has held, on a CUDA device or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # `resource.getrusage` is the second choice: its peak starts from that of the parent process.
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device):
    """Let `peak_memory` start from what is held now; on a CPU this needs Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


class ChildError(RuntimeError):
    """A fresh process failed or died."""


def run_alone(function: Callable, **arguments) -> Any:
    """Call a function in a fresh process, whose memory is then that of this call alone, and return its result.

    Args:
        function (`Callable`): of an importable module; arguments and result are pickled.
        **arguments: of the function.

    Raises:
        ChildError: if the call failed, with the first line of the error, or if the process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])  # otherwise every process would import torch again
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        is_done, answer = receiver.recv()
    except EOFError:
        is_done, answer = False, None
    process.join()
    if answer is None and not is_done:
        raise ChildError(f"the process ended with status {process.exitcode}; it may have run out of memory")
    if not is_done:
        raise ChildError(answer)
    return answer


def _send(sender: Connection, function: Callable, arguments: dict):
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        sender.send((True, function(**arguments)))
    except (OSError, RuntimeError, ValueError) as error:
        sender.send((False, f"{type(error).__name__}: {first_line(error)}"))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
