# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The report of a benchmark: the aims and whether they are met, then a table a part. Times are medians.

A ratio is the median of the ratios of the rounds, with its quartiles in brackets.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.measure.report import format_table

from . import aims
from .layers import own_backend
from .models import DENSE, EQUAL_DENSE
from .records import TABLE_FILE, Records
from .shares import GROUPS, OVERHEAD
from .timing import compare, fastest_of, spread


INTRODUCTION = (
    "Ratios: the median over rounds, in brackets its quartiles; smaller is faster, or less. "
    "All contenders of a row ran by turns in one process."
)


def format_ratio(ratio: aims.Spread | None, limit: float | None = None) -> str:
    """Write a ratio with its spread and, where there is a limit, the verdict."""
    if ratio is None:
        return "-"
    text = f"{ratio['median']:.2f} [{ratio['low']:.2f}-{ratio['high']:.2f}]"
    if limit is None:
        return text
    return f"{text} {'ok' if aims.is_met(ratio, limit) else 'missed'}"


@dataclass
class Report:
    """Writes tables of records.

    Args:
        records (`Records`): what was measured.
    """

    records: Records

    @property
    def own_backend(self) -> str:
        """`str`: see the function of that name."""
        return own_backend(self.records.settings["backends"])

    @property
    def is_gpu(self) -> bool:
        """`bool`: where it ran."""
        return self.records.settings["device"] == "cuda"

    def of(self, part: str) -> list[dict]:
        """Give the records of a part that hold anything."""
        return [record for record in self.records.cells if record["part"] == part and record["arms"]]

    def judge(self, record: dict, *candidates: aims.Aim) -> str:
        """Write a ratio that aims speak of, with the verdict of the one that has a limit for this record."""
        checked = [aim.check(record, self.own_backend, self.is_gpu) for aim in candidates]
        limit = next((limit for _, limit in checked if limit is not None), None)
        return format_ratio(checked[0][0], limit)

    def aims_table(self) -> str:
        """Write the aims: of each its worst cell, and how many met it."""
        checks = aims.check_all(self.records.cells, self.own_backend, self.is_gpu)
        rows = []
        for aim in aims.AIMS:
            row = {"aim": aim.title, "at most": "-", "worst": "not measured", "where": "-", "verdict": "-"}
            found = [check for check in checks if check["aim"] == aim.title]
            if found:
                worst = max(found, key=lambda check: check["ratio"]["median"] / check["at_most"])
                met = sum(check["is_met"] for check in found)
                row |= {"at most": f"{worst['at_most']:.2f}", "worst": format_ratio(worst["ratio"])}
                row |= {"where": describe_cell(worst)}
                row["verdict"] = f"{'ok' if met == len(found) else 'missed'} ({met} of {len(found)})"
            rows.append(row)
        return format_table(rows, {name: name for name in rows[0]})

    def layer_table(self) -> str:
        """Write the layer beside the dense stack, and beside the fastest of transformers' blocks."""
        backends, rows = self.records.settings["backends"], []
        for record in self.of("layer"):
            arms = record["arms"]
            row = {**_cell(record), "dense, ms": _milliseconds(arms, "dense")}
            for backend in backends:
                ratio = format_ratio(compare(arms, f"stablemoe {backend}", "dense"))
                is_own = backend == self.own_backend
                row[f"{backend} / dense"] = (
                    self.judge(record, aims.DENSE_TRAINING, aims.DENSE_FORWARD) if is_own else ratio
                )
            fastest = fastest_of(arms, aims.transformers_arms(list(arms)))
            row[f"{self.own_backend} / fastest block"] = self.judge(record, aims.BLOCKS)
            rows.append({**row, "fastest block": fastest})
        return _table(rows)

    def blocks_table(self) -> str:
        """Write every block of transformers beside the dense stack."""
        rows = []
        names = [name for record in self.of("layer") for name in aims.transformers_arms(list(record["arms"]))]
        for record in self.of("layer"):
            ratios = {name: compare(record["arms"], name, "dense") for name in sorted(set(names))}
            rows.append({**_cell(record), **{name: format_ratio(ratio) for name, ratio in ratios.items()}})
        return _table(rows)

    def experts_table(self) -> str:
        """Write the layer by its number of experts, beside the fewest."""
        rows = []
        for record in self.of("experts"):
            numbers = sorted(record["arms"], key=int)
            row = {**_cell(record), f"{numbers[0]} experts, ms": _milliseconds(record["arms"], numbers[0])}
            for number in numbers[1:]:
                ratio = compare(record["arms"], number, numbers[0])
                is_aim = (number, numbers[0]) == ("512", "8")
                row[f"{number} / {numbers[0]}"] = self.judge(record, aims.EXPERTS) if is_aim else format_ratio(ratio)
            rows.append(row)
        return _table(rows)

    def step_table(self) -> str:
        """Write the steps of whole models."""
        rows = []
        for record in self.of("step"):
            for name in record["arms"]:
                model = record["models"][name]
                beside = {"stage 2": f"{self.judge(record, aims.HASH)}", "stage 1": self.judge(record, aims.STAGE1)}
                ratio = aims.step_over_flops(record, name)
                row = {**_cell(record), "model": name, "ms": _milliseconds(record["arms"], name)}
                row["/ dense"] = format_ratio(compare(record["arms"], name, DENSE))
                row["/ dense x FLOPs"] = self.judge(record, aims.FLOPS) if name == "stage 2" else format_ratio(ratio)
                row["stage 2 / hash, stage 1 / stage 2"] = beside.get(name)
                row["active parameters"] = f"{model['active_parameters'] / 1e6:.2f} M"
                row["all"] = f"{model['parameters'] / 1e6:.2f} M"
                row["FLOPs per token"] = f"{model['flops'] / 1e6:.2f} M"
                rows.append(row)
        return _table(rows)

    def generation_table(self) -> str:
        """Write prefill and tokens, beside the dense model of equal active parameters."""
        rows = []
        for record in self.of("generation"):
            names = [name.removesuffix(", token") for name in record["arms"] if name.endswith(", token")]
            for name in names:
                row = {**_cell(record), "model": name}
                for kind in ("prefill", "token"):
                    arms = record["arms"]
                    is_aim = kind == "token" and name == f"stage 2 {self.own_backend}"
                    ratio = compare(arms, f"{name}, {kind}", f"{EQUAL_DENSE}, {kind}")
                    row[f"{kind}, ms"] = _milliseconds(arms, f"{name}, {kind}")
                    row[f"{kind} / dense"] = self.judge(record, aims.DECODING) if is_aim else format_ratio(ratio)
                rows.append(row)
        return _table(rows)

    def memory_table(self) -> str:
        """Write the peaks of memory, beside the parameters themselves."""
        rows = []
        for record in self.of("memory"):
            for name, peaks in record["arms"].items():
                weights = record["parameter_bytes"][name]
                row = {**_cell(record), "model": name, "parameters, MB": f"{weights / 1e6:.1f}"}
                row["peak, MB"] = f"{median(peaks) / 1e6:.1f}"
                row["peak / parameters"] = format_ratio(spread([peak / weights for peak in peaks]))
                row["peak / dense, equal FLOPs"] = format_ratio(compare(record["arms"], name, EQUAL_DENSE))
                rows.append(row)
        return _table(rows)

    def shares_table(self) -> str:
        """Write what the layer's time goes to, in percent of the time of its operators."""
        rows = []
        for record in self.of("shares"):
            arms = record["arms"]
            together = [sum(values) for values in zip(*(arms[group] for group in OVERHEAD), strict=True)]
            row = {**_cell(record), **{group: f"{100 * median(arms[group]):.1f} %" for group in GROUPS}}
            low, middle, high = (100 * spread(together)[name] for name in ("low", "median", "high"))
            rows.append({**row, " + ".join(OVERHEAD): f"{middle:.1f} % [{low:.1f}-{high:.1f}]"})
        return _table(rows)

    def left_out_table(self) -> str:
        """Write what was not measured: one row for every contender and kind of reason."""
        found: dict[tuple, list[str]] = {}
        for record in self.records.cells:
            for name, reason in record["left_out"].items():
                kind = re.sub(r"[\d.]+", "#", reason)
                found.setdefault((record["part"], name, kind), []).append(reason)
        rows = [
            {"part": part, "contender": name, "cells": len(reasons), "reason, of the first": reasons[0]}
            for (part, name, _), reasons in found.items()
        ]
        return _table(rows)

    def to_markdown(self) -> str:
        """Write everything, the aims first."""
        sections: dict[str, Callable[[], str]] = {
            "The layer": self.layer_table,
            "The layer: transformers' blocks, each beside the dense stack": self.blocks_table,
            "The layer by its number of experts": self.experts_table,
            "A training step": self.step_table,
            "Generation": self.generation_table,
            "Memory": self.memory_table,
            "What the layer's time goes to": self.shares_table,
            "Left out": self.left_out_table,
        }
        written = {title: table for title, table in ((title, make()) for title, make in sections.items()) if table}
        parts = ["# Benchmark", self.describe_machine(), INTRODUCTION, "## Aims", self.aims_table()]
        for title, table in written.items():
            parts += [f"## {title}", table]
        return "\n\n".join(parts) + "\n"

    def describe_machine(self) -> str:
        """Say where it was measured, and by which commands."""
        machine = self.records.machine
        features = f" ({', '.join(machine['features'])})" if machine["features"] else ""
        variables = ", ".join(f"{name}={value}" for name, value in machine["variables"].items())
        versions = f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}"
        where = f"{machine['hardware']}{features}, {machine['threads']} threads, {versions}"
        commands = "\n".join(f"    {command}" for command in self.records.commands)
        return f"{where}{f', {variables}' if variables else ''}.\n\n{commands}"


def describe_cell(record: dict) -> str:
    """Name a cell by what tells it from others."""
    values = {name: value for name, value in record["cell"].items() if value is not False}
    plain = ("dtype", "pass", "what")
    return ", ".join(str(value) if name in plain else f"{value} {name}" for name, value in values.items())


def _cell(record: dict) -> dict:
    cell = dict(record["cell"])
    if "compiled" in cell:
        cell["compiled"] = "yes" if cell["compiled"] else "no"
    return cell


def _milliseconds(arms: dict[str, list[float]], name: str) -> str:
    return f"{1000 * median(arms[name]):.3g}" if name in arms else "-"


def _table(rows: list[dict]) -> str:
    headings = {name: name for row in rows for name in row}
    return format_table(rows, headings) if rows else ""


def write_report(records: Records) -> str:
    """Write the report into the folder of the records, and the aims into their JSON file.

    Args:
        records (`Records`): what was measured.

    Returns:
        `str`: it, Markdown.
    """
    report = Report(records)
    records.aims = aims.check_all(records.cells, report.own_backend, report.is_gpu)
    records.write()
    text = report.to_markdown()
    replace_file(records.folder / TABLE_FILE, lambda path: path.write_text(text))
    return text


__all__ = ["Report", "describe_cell", "format_ratio", "write_report"]
