# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Where the weights of offloaded experts are kept: in host memory, or in safetensors files read one expert at a time.

A model loaded with a `device_map` has accelerate's hooks, which know the file of each offloaded tensor.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MemoryRows:
    """The rows of a tensor `(num_experts, ...)` in host memory; from pinned memory a CUDA device copies by itself."""

    def __init__(self, tensor: Tensor, pinned: bool):
        self.tensor = tensor.detach().pin_memory() if pinned else tensor.detach()
        self.row_bytes = self.tensor[0].numel() * self.tensor.element_size()
        self.in_memory = True

    def read(self, row: int, target: Tensor):
        """Copy a row into `target`, without waiting for it if that is on a CUDA device."""
        target.copy_(self.tensor[row], non_blocking=target.is_cuda)

    def whole(self) -> Tensor:
        """Return all rows."""
        return self.tensor


class CheckpointFile:
    """A safetensors file, open for reading parts of its tensors into existing memory.

    It is not mapped: mapped pages count as the process's memory, and a file that is cut off would kill the process.

    Raises:
        ValueError: if the file is not a safetensors file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # Stays open, and so readable even if the file is deleted or replaced.
        self.file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        self.state = self._state()
        try:
            # Eight bytes with the length of the JSON header, then the header, then the tensors.
            length = int.from_bytes(self.file.read(8), "little")
            self.header = json.loads(self.file.read(length) if length < self.state[0] else b"")
        except ValueError as error:
            raise ValueError(f"{self.path} is not a safetensors file: restore it from its source.") from error
        self.start = 8 + length

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def read(self, offset: int, target: Tensor):
        """Fill a contiguous CPU tensor from the bytes at `offset`, counted from the start of the first tensor.

        Raises:
            OSError: if the file has been written to or cut off since it was opened.
        """
        if self._state() != self.state:
            raise OSError("it has been written to or cut off since the model was loaded")
        rest = memoryview(target.view(-1).view(torch.uint8).numpy())
        self.file.seek(self.start + offset)
        while rest:
            count = self.file.readinto(rest)
            if not count:
                raise OSError("it ends too early")
            rest = rest[count:]
        torch.autograd.graph.increment_version(target)  # so that a backward pass through the previous expert fails


class FileRows:
    """The rows of a tensor `name` in a safetensors file, converted to the model's `dtype`.

    Raises:
        ValueError: if the tensor is missing or not of a floating-point dtype.
    """

    def __init__(self, file: CheckpointFile, name: str, dtype: torch.dtype):
        entry = file.header.get(name)
        if entry is None or entry["dtype"] not in _DTYPES:
            kind = "no such tensor" if entry is None else f"dtype {entry['dtype']}"
            raise ValueError(
                f"`{name}` of {file.path}: {kind}. Experts are offloaded from float32, float16, bfloat16 or float64: load a "
                "checkpoint that is not quantised."
            )
        self.file, self.name, self.dtype, self.stored = file, name, dtype, _DTYPES[entry["dtype"]]
        self.shape, self.offset = entry["shape"], entry["data_offsets"][0]
        self.row_bytes = (entry["data_offsets"][1] - self.offset) // self.shape[0]
        self.in_memory = False

    def read(self, row: int, target: Tensor):
        """Read a row into `target`; raises `OSError` with the file and the remedy."""
        self._read(self.offset + row * self.row_bytes, target)

    def whole(self) -> Tensor:
        """Read all rows into memory."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._read(self.offset, tensor)
        return tensor

    def _read(self, offset: int, target: Tensor):
        try:
            if target.device.type == "cpu" and target.dtype == self.stored:
                return self.file.read(offset, target)
            # torch reuses pinned memory only after the copy out of it is done.
            buffer = torch.empty(target.shape, dtype=self.stored, pin_memory=target.is_cuda)
            self.file.read(offset, buffer)
            target.copy_(buffer, non_blocking=target.is_cuda)
        except OSError as error:
            raise OSError(
                f"The expert weights `{self.name}` cannot be read from {self.file.path}: {error}. Restore the checkpoint and "
                "load the model again."
            ) from error


def find_rows(name: str, stack: nn.Module, files: dict[str, CheckpointFile], pinned: bool) -> dict[str, MemoryRows]:
    """Find where the weights of a layer's experts are, by parameter name.

    Args:
        name (`str`): name of the experts, for the error.
        stack (`StableMoEExperts` or `StableMoEGatedExperts`): their parameters are in memory or offloaded by accelerate's hooks.
        files (`dict[str, CheckpointFile]`): open files by path; newly opened ones are added.
        pinned (`bool`): whether to pin rows in host memory.

    Raises:
        ValueError: if a parameter is on the meta device and no hook has its values.
    """
    rows = {}
    for key, parameter in expert_parameters(stack):
        entry = _file_of(stack, key) if parameter.is_meta else None
        if entry is not None:
            path = entry["safetensors_file"]
            file = files.get(path) or files.setdefault(path, CheckpointFile(path))
            rows[key] = FileRows(file, entry["weight_name"], parameter.dtype)
            continue
        value = offloaded_value(stack, key) if parameter.is_meta else parameter
        if value is None:
            raise ValueError(
                f"`{name}.{key}` is on the meta device and no hook says where its values are. Load the model with "
                "`from_pretrained(name, device_map=experts_on_disk(name))`, or without a `device_map`."
            )
        rows[key] = MemoryRows(value.cpu(), pinned)
        if parameter.device.type == "cpu":
            parameter.data = rows[key].tensor  # or the layer would stay in memory twice
    return rows


def expert_parameters(stack: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of the experts of a layer by name, in the same order for every layer."""
    yield from stack.named_parameters()


def offloaded_value(module: nn.Module, name: str) -> Tensor | None:
    """Return the values of a parameter that accelerate has offloaded, or `None` if no hook has them."""
    weights_map, key = _weights_map(module, name)
    return None if weights_map is None else weights_map[key]


def _file_of(module: nn.Module, name: str) -> dict[str, str] | None:
    """Return the safetensors file of an offloaded parameter and its name there, or `None`."""
    weights_map, key = _weights_map(module, name)
    prefix = ""
    if isinstance(weights_map, PrefixedDataset):
        weights_map, prefix = weights_map.dataset, weights_map.prefix
    if not isinstance(weights_map, OffloadedWeightsLoader) or prefix + key in weights_map.state_dict:
        return None
    entry = weights_map.index.get(prefix + key, {})
    return entry if "safetensors_file" in entry else None


def _weights_map(module: nn.Module, name: str):
    """Return the map in which accelerate's hook keeps a parameter's values, and the parameter's name in it."""
    owner_name, _, key = name.rpartition(".")
    hook = getattr(module.get_submodule(owner_name), "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        if getattr(each, "offload", False) and each.weights_map is not None:
            return each.weights_map, key
    return None, key
