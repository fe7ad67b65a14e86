# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The benchmark: its cells in order, each written to the folder as soon as it is measured."""

import torch
from tqdm.auto import tqdm

from .aims import ratios_of
from .arguments import BenchmarkArguments
from .cells import Cell, Result
from .layer_parts import LayerParts
from .model_parts import ModelParts
from .records import Records, describe_machine
from .report import write_report
from .timing import first_line


def cells_of(args: BenchmarkArguments) -> list[tuple[object, Cell]]:
    """List what there is to measure.

    Args:
        args (`BenchmarkArguments`): of the command line.

    Returns:
        `list[tuple]`: what measures it and holds its modules, and the cell.

    Raises:
        OSError, ValueError: see `Preset`.
    """
    cells, models = [], None
    if {"step", "generation", "memory"} & set(args.parts):
        models = ModelParts(args)
    layers = LayerParts(args)
    sources = {"layer": layers.layer_cells, "shares": layers.share_cells}
    if models is not None:
        sources |= {
            "step": models.step_cells,
            "generation": models.generation_cells,
            "memory": models.memory_cells,
        }
    for part in args.parts:
        owner = layers if part in ("layer", "shares") else models
        cells += [(owner, cell) for cell in sources[part]()]
    return cells


def run_benchmark(args: BenchmarkArguments) -> str:
    """Measure what was not measured before.

    Args:
        args (`BenchmarkArguments`): of the command line.

    Returns:
        `str`: the report, Markdown.

    Raises:
        OSError, ValueError: see `Preset` and `Records.open`.
    """
    cells = cells_of(args)
    machine = describe_machine(torch.device(args.device))
    records = Records.open(args.output_dir, machine, args.settings, args.overwrite)
    owner = None
    with tqdm(total=len(cells), unit="cell") as bar:
        for source, cell in cells:
            if owner not in (None, source):
                owner.release()
            owner = source
            bar.set_description(cell.label)
            if records.find(cell.part, cell.cell) is None:
                result = measure(cell, bar.refresh)
                record = {"part": cell.part, "cell": cell.cell, "arms": result.arms, "left_out": result.left_out}
                records.add({**record, "ratios": ratios_of(record), **result.facts})
                write_report(records)
            bar.update()
    return write_report(records)


def measure(cell: Cell, on_round) -> Result:
    """Measure a cell; one that cannot be, because memory does not suffice, say, is left out as a whole."""
    try:
        return cell.measure(on_round)
    except RuntimeError as error:
        return Result({}, {"all": first_line(error)})


__all__ = ["cells_of", "run_benchmark"]
