# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The report of a benchmark: the aims and whether they are met, then per part the ratios and what was measured."""

import re
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

from torch.utils.benchmark import Compare, Measurement, TaskSpec

from modeling_stablemoe.measure.report import format_table

from .layers import DEFAULT_BACKEND, GATED_BLOCKS, TRANSFORMERS_BLOCKS, own_backend_of
from .models import DENSE, EQUAL_DENSE, EQUAL_SIZE
from .parts import BACKWARD, FORWARD
from .turns import Spread, compare, fastest_of, spread


INTRODUCTION = (
    "Ratios: the median over rounds, in brackets its quartiles; smaller is faster, or less. "
    "All contenders of a row ran by turns in one process, those of memory and loading in fresh ones."
)
HEADINGS = {
    "layer": "The layer / the dense stack",
    "experts": "The layer by its number of experts / the fewest",
    "step": "A training step / the dense model",
    "generation": "Generation / the dense model of equal FLOPs",
    "memory": "Peak memory / the dense model of equal FLOPs",
    "loading": "Loading and the first token / the dense model of equal size",
    "shares": "Shares in the time of the layer's operators",
}
FASTEST, FLOPS = "ours / fastest block", "stage 2 / dense x FLOPs"
FASTEST_GATED = "gated / fastest gated block"


class Aim(NamedTuple):
    """How large a ratio may be.

    `ratio` is its name among `ratios_of`, where OWN stands for our own backend. `applies` is asked with a cell and the least
    number of tokens that is large for the device.
    """

    title: str
    part: str
    ratio: str
    on_cpu: float
    on_gpu: float
    applies: Callable[[dict, int], bool] = lambda cell, large: True


def _is_large(direction: str) -> Callable[[dict, int], bool]:
    return lambda cell, large: cell["pass"] == direction and cell["experts"] == 32 and cell["tokens"] >= large


def _is_512_beside_8(cell: dict, large: int) -> bool:
    return cell["tokens"] == 32768 and cell["experts"].startswith("8 ")


# RESULTS.md says how far they are met.
DENSE_TITLE = "layer / dense stack of equal FLOPs, {}, 32 experts, >= 4096 tokens (GPU: 32768)"
AIMS = (
    Aim(DENSE_TITLE.format(BACKWARD), "layer", "stablemoe OWN", 1.25, 1.15, _is_large(BACKWARD)),
    Aim(DENSE_TITLE.format(FORWARD), "layer", "stablemoe OWN", 1.1, 1.1, _is_large(FORWARD)),
    Aim("layer / the fastest of transformers' own blocks", "layer", FASTEST, 1.0, 1.0),
    Aim(
        "gated experts / the fastest of Mixtral's, OLMoE's and Qwen3-MoE's, same backend",
        "layer",
        FASTEST_GATED,
        1.0,
        1.0,
    ),
    Aim("512 experts / 8 experts, 32768 tokens", "experts", "512", 1.3, 1.3, _is_512_beside_8),
    Aim("training step, stage 2 / Hash", "step", "stage 2 / hash", 1.0, 1.0),
    Aim("training step, stage 1 / stage 2", "step", "stage 1 / stage 2", 1.05, 1.05),
    Aim("training step, stage 2 / what its FLOPs cost in the dense model", "step", FLOPS, 1.15, 1.15),
    Aim(
        "a token at batch 1 / the dense model of equal active parameters",
        "generation",
        "stage 2 OWN, token",
        1.1,
        1.1,
        lambda cell, large: cell["batch"] == 1,
    ),
)


def ratios_of(record: dict, own_backend: str = DEFAULT_BACKEND) -> dict[str, Spread]:
    """Compare the contenders of a cell with the one that its part measures them by, and with others that aims name."""
    part, arms = record["part"], record["arms"]
    if part == "shares":
        return {name: spread(values) for name, values in arms.items()}

    def base_of(name: str) -> str:
        if part == "experts":
            return min(arms, key=int)
        if part == "generation":
            return f"{EQUAL_DENSE}, {name.rpartition(', ')[2]}"
        if "loading" in (part, record["cell"].get("what")):
            return EQUAL_SIZE
        return EQUAL_DENSE if part == "memory" else DENSE

    ratios = {name: compare(arms, name, base_of(name)) for name in arms}
    if part == "layer":
        fastest = fastest_of(arms, [name for name in arms if name.split()[0] in TRANSFORMERS_BLOCKS])
        ratios[FASTEST] = fastest and compare(arms, f"stablemoe {own_backend}", fastest)
        gated = [name for name in arms if name.split()[0] in GATED_BLOCKS and name.split()[1] == own_backend]
        fastest = fastest_of(arms, gated)
        ratios[FASTEST_GATED] = fastest and compare(arms, f"stablemoe_gated {own_backend}", fastest)
    if part == "step":
        ratios |= {
            f"{one} / {other}": compare(arms, one, other)
            for one, other in (("stage 2", "hash"), ("stage 1", "stage 2"))
        }
        models, ratio = record.get("models", {}), ratios.get("stage 2")
        if ratio and DENSE in models and "stage 2" in models:
            flops = models["stage 2"]["flops"] / models[DENSE]["flops"]
            ratios[FLOPS] = {key: value / flops for key, value in ratio.items()}
    if part == "memory":
        weights = record["parameter_bytes"]
        for name, peaks in arms.items():
            ratios[f"{name} / parameters"] = spread([peak / weights[name] for peak in peaks])
    return {name: ratio for name, ratio in ratios.items() if ratio}


def check_all(cells: Sequence[dict], own_backend: str, is_gpu: bool) -> list[dict]:
    """Check every cell by every aim that applies: `aim`, `part`, `cell`, `name`, `ratio`, `at_most` and `is_met` of each."""
    checks = []
    for aim in AIMS:
        name, limit = aim.ratio.replace("OWN", own_backend), aim.on_gpu if is_gpu else aim.on_cpu
        for record in cells:
            if record["part"] != aim.part or not aim.applies(record["cell"], 32768 if is_gpu else 4096):
                continue
            ratio = ratios_of(record, own_backend).get(name)
            if ratio is not None:
                check = {"aim": aim.title, "part": aim.part, "cell": record["cell"], "name": name, "ratio": ratio}
                checks.append({**check, "at_most": limit, "is_met": ratio["median"] <= limit})
    return checks


def format_ratio(ratio: Spread, is_met: bool | None = None) -> str:
    """Write a ratio with its spread and, where there is an aim, the verdict."""
    text = f"{ratio['median']:.2f} [{ratio['low']:.2f}-{ratio['high']:.2f}]"
    return text if is_met is None else f"{text} {'ok' if is_met else 'missed'}"


def describe_cell(cell: dict) -> str:
    """Name a cell by what tells it from others."""
    values = {name: value for name, value in cell.items() if value is not False}
    plain = ("dtype", "pass", "what")
    return ", ".join(
        name if value is True else str(value) if name in plain else f"{value} {name}" for name, value in values.items()
    )


def _aims_table(checks: list[dict]) -> str:
    rows = []
    for aim in AIMS:
        row = {"aim": aim.title, "at most": "-", "worst": "not measured", "where": "-", "verdict": "-"}
        found = [check for check in checks if check["aim"] == aim.title]
        if found:
            worst = max(found, key=lambda check: check["ratio"]["median"] / check["at_most"])
            met = sum(check["is_met"] for check in found)
            row |= {"at most": f"{worst['at_most']:.2f}", "worst": format_ratio(worst["ratio"])}
            row |= {"where": describe_cell(worst["cell"])}
            row["verdict"] = f"{'ok' if met == len(found) else 'missed'} ({met} of {len(found)})"
        rows.append(row)
    return _table(rows)


def _ratio_table(records: list[dict], checks: list[dict], own_backend: str) -> str:
    rows = []
    for record in records:
        verdicts = {check["name"]: check["is_met"] for check in checks if check["cell"] == record["cell"]}
        ratios = ratios_of(record, own_backend)
        texts = {name: format_ratio(ratio, verdicts.get(name)) for name, ratio in ratios.items()}
        rows.append({"cell": describe_cell(record["cell"]), **texts})
    return _table(rows)


def _times(records: list[dict], threads: int) -> str:
    """Lay out times as `torch.utils.benchmark` does: a row per cell, a column per contender."""
    measurements = []
    for record in records:
        for name, values in record["arms"].items():
            spec = TaskSpec("", "", sub_label=describe_cell(record["cell"]), description=name, num_threads=threads)
            # Of a generated token, the difference of two times, chance may make one negative.
            measurements.append(Measurement(1, [max(value, 1e-9) for value in values], spec))
    table = Compare(measurements)
    table.highlight_warnings()
    # Without the line that would hold a label, and without spaces at the ends of lines.
    lines = [line.rstrip() for line in str(table).strip().splitlines()[1:]]
    return "\n".join(["```", *lines, "```"])


def _memory_table(records: list[dict]) -> str:
    rows = []
    for record in records:
        for name, peaks in record["arms"].items():
            weights = record["parameter_bytes"][name]
            row = {"cell": describe_cell(record["cell"]), "model": name}
            rows.append({**row, "peak, MB": f"{median(peaks) / 1e6:.1f}", "parameters, MB": f"{weights / 1e6:.1f}"})
    return _table(rows)


def _share_table(records: list[dict]) -> str:
    rows = []
    for record in records:
        shares = {name: median(values) for name, values in record["arms"].items()}
        text = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
        rows.append({"cell": describe_cell(record["cell"]), "operators": text})
    return _table(rows)


def _size_table(models: dict[str, dict]) -> str:
    headings = {"active_parameters": "active parameters", "parameters": "all", "flops": "FLOPs per token"}
    return _table(
        [
            {"model": name, **{heading: f"{size[key] / 1e6:.2f} M" for key, heading in headings.items()}}
            for name, size in models.items()
        ]
    )


def _left_out_table(cells: list[dict]) -> str:
    """Write what was not measured: one row for every contender and kind of reason."""
    found: dict[tuple, list[str]] = {}
    for record in cells:
        for name, reason in record["left_out"].items():
            found.setdefault((record["part"], name, re.sub(r"[\d.]+", "#", reason)), []).append(reason)
    return _table(
        [
            {"part": part, "contender": name, "cells": len(reasons), "reason, of the first": reasons[0]}
            for (part, name, _), reasons in found.items()
        ]
    )


def _table(rows: list[dict]) -> str:
    return format_table(rows, {name: name for row in rows for name in row})


def _describe_machine(machine: dict, commands: list[str]) -> str:
    features = f" ({', '.join(machine['features'])})" if machine["features"] else ""
    variables = ", ".join(f"{name}={value}" for name, value in machine["variables"].items())
    versions = f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}"
    where = f"{machine['hardware']}{features}, {machine['threads']} threads, {versions}"
    lines = "\n".join(f"    {command}" for command in commands)
    return f"{where}{f', {variables}' if variables else ''}.\n\n{lines}"


def to_markdown(results: dict) -> str:
    """Write everything that benchmark.json holds, the aims first."""
    settings, cells = results["settings"], results["cells"]
    own_backend = own_backend_of(settings["backends"])
    checks = check_all(cells, own_backend, settings["device"] == "cuda")
    machine = _describe_machine(results["machine"], results["commands"])
    texts = ["# Benchmark", machine, INTRODUCTION, "## Aims", _aims_table(checks)]
    for part, heading in HEADINGS.items():
        records = [record for record in cells if record["part"] == part and record["arms"]]
        if not records:
            continue
        judged = [check for check in checks if check["part"] == part]
        texts.append(f"## {heading}")
        texts.append(_share_table(records) if part == "shares" else _ratio_table(records, judged, own_backend))
        if part == "memory":
            texts.append(_memory_table(records))
        elif part != "shares":
            texts.append(_times(records, int(results["machine"]["threads"])))
        if part == "step":
            texts.append(_size_table(records[0]["models"]))
    if any(record["left_out"] for record in cells):
        texts += ["## Left out", _left_out_table(cells)]
    return "\n\n".join(texts) + "\n"
