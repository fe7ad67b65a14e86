# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Where the rows of offloaded experts lie: tensors in host memory, or safetensors files that are read row by row.

Loading with a `device_map` leaves on accelerate's hooks in which file each offloaded tensor stands; it is taken from there.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn

from modeling_stablemoe.model.configuration_stablemoe import EXPERT_PARAMETERS


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MemoryRows:
    """The rows of a tensor `(num_experts, ...)` in host memory; pinned, a CUDA device copies from it on its own."""

    def __init__(self, tensor: Tensor, pinned: bool):
        self.tensor = tensor.detach().pin_memory() if pinned else tensor.detach()
        self.row_bytes = self.tensor[0].numel() * self.tensor.element_size()
        self.in_memory = True

    def read(self, row: int, target: Tensor):
        """Copy a row into `target`; to a CUDA device without waiting for it."""
        target.copy_(self.tensor[row], non_blocking=target.is_cuda)

    def whole(self) -> Tensor:
        """Return all rows."""
        return self.tensor


class CheckpointFile:
    """A safetensors file, open for reading parts of tensors into memory that is there already.

    A mapped file would count as this process's memory, page by page, and end the process where it was cut off meanwhile.

    Args:
        path (`str` or `Path`): of the file.

    Raises:
        ValueError: if it is no safetensors file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # Stays open: whoever deletes or replaces the file leaves this one readable.
        self.file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        self.state = self._state()
        try:
            # The format: eight bytes with the length of a JSON header, the header, the tensors.
            length = int.from_bytes(self.file.read(8), "little")
            self.header = json.loads(self.file.read(length) if length < self.state[0] else b"")
        except ValueError as error:
            raise ValueError(f"{self.path} is not a safetensors file: restore it from its source.") from error
        self.start = 8 + length

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def read(self, offset: int, target: Tensor):
        """Read bytes, from `offset` after the start of the first tensor, into a contiguous tensor on the CPU.

        Raises:
            OSError: where the file was written to or cut off since it was opened.
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
        torch.autograd.graph.increment_version(target)  # a backward pass through the former expert must not run


class FileRows:
    """The rows of a tensor in a safetensors file.

    Args:
        file (`CheckpointFile`): of the checkpoint.
        name (`str`): of the tensor in it.
        dtype (`torch.dtype`): what the model computes in, whatever the file holds.

    Raises:
        ValueError: for a tensor that is missing, or holds no floating point numbers.
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
        """Read a row into `target`.

        Raises:
            OSError: naming file and remedy.
        """
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
            # torch keeps pinned memory until the copy out of it is done, and then uses it again.
            buffer = torch.empty(target.shape, dtype=self.stored, pin_memory=target.is_cuda)
            self.file.read(offset, buffer)
            target.copy_(buffer, non_blocking=target.is_cuda)
        except OSError as error:
            raise OSError(
                f"The expert weights `{self.name}` cannot be read from {self.file.path}: {error}. Restore the checkpoint and "
                "load the model again."
            ) from error


def find_rows(name: str, stack: nn.Module, files: dict[str, CheckpointFile], pinned: bool) -> dict[str, MemoryRows]:
    """Find where the experts of a MoE layer lie, by the parameter's name in its stack.

    Args:
        name (`str`): of the stack, for the error.
        stack (`StableMoEExperts`): with its parameters in memory, or offloaded by accelerate's hooks.
        files (`dict[str, CheckpointFile]`): the files that are open already; others are added.
        pinned (`bool`): whether rows in host memory are pinned.

    Raises:
        ValueError: for parameters that are nowhere.
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
            parameter.data = rows[key].tensor  # so that no layer is in memory twice for longer than this
    return rows


def expert_parameters(stack: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List the parameters of a stack of experts with their names in it, in one order for all stacks."""
    for index, sublayer in enumerate(stack.sublayers):
        for name in EXPERT_PARAMETERS:
            yield f"sublayers.{index}.{name}", getattr(sublayer, name)


def offloaded_value(module: nn.Module, name: str) -> Tensor | None:
    """Fetch a parameter that accelerate has offloaded, as its hook would; `None` where no hook has it."""
    weights_map, key = _weights_map(module, name)
    return None if weights_map is None else weights_map[key]


def _file_of(module: nn.Module, name: str) -> dict[str, str] | None:
    """Return the safetensors file that an offloaded parameter stands in, and its name there."""
    weights_map, key = _weights_map(module, name)
    prefix = ""
    if isinstance(weights_map, PrefixedDataset):
        weights_map, prefix = weights_map.dataset, weights_map.prefix
    if not isinstance(weights_map, OffloadedWeightsLoader) or prefix + key in weights_map.state_dict:
        return None
    entry = weights_map.index.get(prefix + key, {})
    return entry if "safetensors_file" in entry else None


def _weights_map(module: nn.Module, name: str):
    """Find the values that a hook has for a parameter: the map, and the parameter's name in it."""
    owner_name, _, key = name.rpartition(".")
    hook = getattr(module.get_submodule(owner_name), "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        if getattr(each, "offload", False) and each.weights_map is not None:
            return each.weights_map, key
    return None, key
