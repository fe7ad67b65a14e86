# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Memory: how much of it there is, and the peak that a model takes in a process of its own."""

import gc
import multiprocessing
import resource
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from .models import DENSE, EQUAL_DENSE, Preset, TrainingStep, build_model


# What is measured, and of which models. `SAVE` makes the checkpoint that others load.
TRAINING, INFERENCE, LOADING, SAVE = "training", "inference", "loading", "save"
ARMS = {
    TRAINING: ("stage 1", "stage 2", "hash", EQUAL_DENSE, "olmoe"),
    INFERENCE: ("stage 2", EQUAL_DENSE, "olmoe"),
    LOADING: ("stage 2", DENSE, "olmoe"),
}
# Steps of the optimizer: its state comes with the first.
STEPS = 2


def available_memory(device: torch.device) -> int:
    """Tell how many bytes may be taken.

    Args:
        device (`torch.device`): a GPU, or the CPU, where the limit of a container counts, too.

    Returns:
        `int`: 0 where nothing tells.
    """
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


def too_large(needed: float, available: int, share: float = 0.8) -> str | None:
    """Say why something does not fit into memory.

    Args:
        needed (`float`): bytes, estimated.
        available (`int`): bytes; 0 is unknown, where everything fits.
        share (`float`): of what is available, that may be taken.

    Returns:
        `str`, or `None`: it fits.
    """
    if not available or needed <= share * available:
        return None
    return f"needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"


@dataclass
class MemoryTask:
    """What a process does while its memory is watched.

    Args:
        preset (`Preset`): the shape.
        arm (`str`): see `build_model`.
        what (`str`): `TRAINING`, `INFERENCE`, `LOADING` or `SAVE`.
        batch_size (`int`): sequences, as long as the model takes.
        dtype (`torch.dtype`): of weights; in training, of autocast.
        device (`torch.device`): where.
        folder (`str`): the checkpoint to load or to save.
    """

    preset: Preset
    arm: str
    what: str
    batch_size: int
    dtype: torch.dtype
    device: torch.device
    folder: str = ""


class ChildError(RuntimeError):
    """What a process could not do, or that it died."""


def run_alone(task: MemoryTask) -> dict[str, int]:
    """Run a task in a fresh process.

    Args:
        task (`MemoryTask`): what to do.

    Returns:
        `dict[str, int]`: `peak`, bytes above what Python and its libraries take, and `parameters`, the bytes of those.

    Raises:
        ChildError: if it failed, or was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # else every process would import torch anew
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(task, sender))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = None
    process.join()
    if answer is None:
        raise ChildError(f"the process ended with status {process.exitcode}; it may have run out of memory")
    if isinstance(answer, str):
        raise ChildError(answer)
    return answer


def _run(task: MemoryTask, sender: Connection):
    logging.disable_progress_bar()
    try:
        sender.send(_measure(task))
    except (OSError, RuntimeError, ValueError) as error:
        sender.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _measure(task: MemoryTask) -> dict[str, int]:
    if task.device.type == "cuda":
        torch.cuda.init()
    _forget_peak(task.device)
    base = _peak(task.device)
    if task.what == LOADING:
        model = AutoModelForCausalLM.from_pretrained(task.folder, dtype=task.dtype).to(task.device)
        return _answer(model, base, task.device)
    model = build_model(task.preset, task.arm, torch.device("cpu"))
    if task.what == SAVE:
        model.to(task.dtype).save_pretrained(task.folder)
        return _answer(model, base, task.device)
    model = model.to(task.device, torch.float32 if task.what == TRAINING else task.dtype)
    length = task.preset.config().max_position_embeddings
    ids = torch.randint(task.preset.config().vocab_size, (task.batch_size, length)).to(task.device)
    gc.collect()
    _forget_peak(task.device)
    if task.what == TRAINING:
        step = TrainingStep(model, ids, task.dtype)
        for _ in range(STEPS):
            step.run()
    else:
        with torch.no_grad():
            model.eval()(ids)
    return _answer(model, base, task.device)


def _answer(model: PreTrainedModel, base: int, device: torch.device) -> dict[str, int]:
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"peak": _peak(device) - base, "parameters": parameters}


def _peak(device: torch.device) -> int:
    """Give the most bytes that this process held, on the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak(device: torch.device):
    """Begin anew with what is held now, so that building the model does not count. Linux alone can on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


__all__ = [
    "ARMS",
    "INFERENCE",
    "LOADING",
    "SAVE",
    "TRAINING",
    "ChildError",
    "MemoryTask",
    "available_memory",
    "run_alone",
    "too_large",
]
