# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The benchmark: its cells in order, each written to the folder as soon as it is measured."""

import json
import os
import shlex
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.measure.machine import environment, first_line

from .arguments import BenchmarkArguments
from .parts import cells_of
from .report import check_all, describe_cell, ratios_of, to_markdown


# Of the processor, what decides which kernels there are.
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
# What changes the speed of a process from outside.
VARIABLES = ("OMP", "KMP", "MKL", "GOMP", "MALLOC", "THP", "TORCH", "PYTORCH", "CUDA", "LD_PRELOAD")


def describe_machine(device: torch.device) -> dict:
    """Describe what decides how fast things are: hardware by type, versions, threads and environment variables."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    machine = {**environment(device), "features": [name for name in FEATURES if name in flags]}
    if device.type == "cuda":
        machine["cuda"] = torch.version.cuda
    values = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)}
    # Numbers and words, not the paths of this machine.
    return {**machine, "variables": {name: value for name, value in values.items() if "/" not in value}}


def run_benchmark(args: BenchmarkArguments) -> str:
    """Measure what `output_dir` does not hold yet.

    Args:
        args (`BenchmarkArguments`): of the command line.

    Returns:
        `str`: the report, Markdown.

    Raises:
        OSError: if the folder cannot be written, or the preset is not there.
        ValueError: if the folder holds what was measured otherwise, or the preset cannot be measured.
    """
    total = sum(1 for _ in cells_of(args))
    results = _open(args)
    with tqdm(total=total, unit="cell") as bar:
        for part, cell, measure in cells_of(args):
            bar.set_description(f"{part}: {describe_cell(cell)}")
            same = [each for each in results["cells"] if (each["part"], each["cell"]) == (part, cell)]
            # A cell of which nothing could be measured is tried again.
            if not any(record["arms"] for record in same):
                try:
                    record = {"part": part, "cell": cell, **measure()}
                except RuntimeError as error:  # memory does not suffice, say
                    record = {"part": part, "cell": cell, "arms": {}, "left_out": {"all": first_line(error)}}
                results["cells"] = [each for each in results["cells"] if each not in same] + [record]
                _write(args, results)
            bar.update()
    return _write(args, results)


def _open(args: BenchmarkArguments) -> dict:
    """Go on with the file of the folder, or start one."""
    machine = describe_machine(torch.device(args.device))
    results = {"commands": [], "machine": machine, "settings": args.settings, "aims": [], "cells": []}
    path = Path(args.output_dir) / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not args.overwrite:
        try:
            found = json.loads(path.read_text())
            then = {**found["machine"], **found["settings"]}
            results |= {"commands": found["commands"], "cells": found["cells"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no file of a benchmark; name another `--output_dir`.") from error
        now = json.loads(json.dumps({**machine, **args.settings}))
        names = [name for name in now if then.get(name) != now[name]]
        if names:
            changed = "; ".join(f"{name}: {then.get(name)} there, {now[name]} here" for name in names)
            raise ValueError(
                f"{str(path)!r} was measured otherwise ({changed}). Name another `--output_dir`, or measure all of it again "
                "with `--overwrite`."
            )
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    results["commands"] += [] if command in results["commands"] else [command]
    return results


def _write(args: BenchmarkArguments, results: dict) -> str:
    """Write the numbers and the report; return the report."""
    results["aims"] = check_all(results["cells"], args.own_backend, args.device == "cuda")
    for record in results["cells"]:
        record["ratios"] = ratios_of(record, args.own_backend)
    text, folder = to_markdown(results), Path(args.output_dir)
    replace_file(folder / "benchmark.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    replace_file(folder / "benchmark.md", lambda path: path.write_text(text))
    return text
