# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The JSON file of a benchmark: what was measured so far, cell by cell, so that a run goes on where it was."""

import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.measure.machine import environment


JSON_FILE, TABLE_FILE = "benchmark.json", "benchmark.md"
# Of the processor, what decides which kernels there are.
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
# What changes the speed of a process from outside.
VARIABLES = ("OMP", "KMP", "MKL", "GOMP", "MALLOC", "THP", "TORCH", "PYTORCH", "CUDA", "LD_PRELOAD")


def describe_machine(device: torch.device) -> dict:
    """Describe what decides how fast things are: hardware by type, versions, threads and environment variables.

    Args:
        device (`torch.device`): that is measured.

    Returns:
        `dict`: JSON-ready.
    """
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    machine = {**environment(device), "features": [name for name in FEATURES if name in flags]}
    if device.type == "cuda":
        machine["cuda"] = torch.version.cuda
    names = sorted(name for name in os.environ if name.startswith(VARIABLES))
    return {**machine, "variables": {name: os.environ[name] for name in names if _is_setting(os.environ[name])}}


def _is_setting(value: str) -> bool:
    """Tell numbers and words from the paths of this machine."""
    return "/" not in value


def describe_command() -> str:
    """Give the command of this process."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


@dataclass
class Records:
    """What was measured.

    Args:
        folder (`Path`): of the JSON file.
        machine (`dict`): of `describe_machine`.
        settings (`dict`): what all cells share, JSON-ready.
        commands (`list[str]`): that measured.
        cells (`list[dict]`): `part`, `cell` (what tells it from the others of its part) and what came of it.
        aims (`list[dict]`): of `check_all`.
    """

    folder: Path
    machine: dict
    settings: dict
    commands: list[str] = field(default_factory=list)
    cells: list[dict] = field(default_factory=list)
    aims: list[dict] = field(default_factory=list)

    @classmethod
    def open(cls, folder: str | Path, machine: dict, settings: dict, is_anew: bool = False) -> "Records":
        """Go on with the file of a folder, or begin one.

        Args:
            folder (`str` or `Path`): made if it is not there.
            machine (`dict`): see the class.
            settings (`dict`): see the class.
            is_anew (`bool`): forget what was measured.

        Raises:
            OSError: if the folder cannot be made.
            ValueError: if it holds what was measured otherwise, or a damaged file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        records = cls(folder, machine, settings)
        path = folder / JSON_FILE
        if path.is_file() and not is_anew:
            records._continue(path)
        command = describe_command()
        if command not in records.commands:
            records.commands.append(command)
        return records

    def _continue(self, path: Path):
        try:
            found = json.loads(path.read_text())
            then = {**found["machine"], **found["settings"]}
            self.commands, self.cells = found["commands"], found["cells"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no file of a benchmark; name another `--output_dir`.") from error
        now = json.loads(json.dumps({**self.machine, **self.settings}))
        changed = [
            f"{name}: {then.get(name)} there, {now.get(name)} here" for name in now if then.get(name) != now[name]
        ]
        if changed:
            raise ValueError(
                f"{str(path)!r} was measured otherwise ({'; '.join(changed)}). Name another `--output_dir`, or measure anew "
                "with `--overwrite`."
            )

    def find(self, part: str, cell: dict) -> dict | None:
        """Find a cell that was measured; one of which nothing could be measured is tried again."""
        for record in self.cells:
            if record["part"] == part and record["cell"] == cell and record["arms"]:
                return record
        return None

    def add(self, record: dict):
        """Add a cell, in the place of one of the same name."""
        same = [old for old in self.cells if (old["part"], old["cell"]) == (record["part"], record["cell"])]
        self.cells = [old for old in self.cells if old not in same] + [record]

    def write(self):
        """Write the file whole."""
        names = ("commands", "machine", "settings", "aims", "cells")
        text = json.dumps({name: getattr(self, name) for name in names}, indent=1) + "\n"
        replace_file(self.folder / JSON_FILE, lambda path: path.write_text(text))


__all__ = ["JSON_FILE", "TABLE_FILE", "Records", "describe_command", "describe_machine"]
