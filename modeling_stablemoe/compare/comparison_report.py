# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The results of a comparison: a table like the paper's table 2, and figures like its figures 2, 4, 5 and 7."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.measure.figures import save_figure
from modeling_stablemoe.measure.fluctuation import draw_settled
from modeling_stablemoe.measure.machine import environment
from modeling_stablemoe.measure.report import format_table

from .comparison import RESULTS_FILE, Comparison, settings_of


def group_by_system(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """Group runs by system, in the order of each system's first run."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["system"], []).append(run)
    return groups


def summarize_systems(runs: Sequence[dict], reference: str | None = None) -> list[dict]:
    """Average the runs of each system over seeds.

    Args:
        runs (sequence of `dict`): of `Comparison.run`.
        reference (`str`, *optional*): name of the system that the others are compared with.

    Returns:
        `list[dict]`: one row per system, `None` for what is missing: `system`; `seeds`, their number; `shared` and
            `experts`, parameters; `flops` of one sequence; `tokens_per_second`; `validation_mean`, `validation_std`
            and so on, mean and standard deviation of the perplexity of each split; `above_reference` and
            `above_reference_std`, of the ratio of validation perplexities minus 1, over the seeds of both systems;
            `load_max_over_mean`, `mean_gate` and `closed_gates` of inference on the validation text; `stage2_load`,
            max/mean in the training logs of stage 2; and at the transition `agreement` of the distilled router,
            `kept_agreement`, the share of tokens that a balanced table keeps at the backbone's expert (of choices, with several
            per token), and `transition_closed_gates`.
    """
    groups = group_by_system(runs)
    rows = []
    for name, group in groups.items():
        row = {
            "system": name,
            "seeds": len(group),
            **group[0]["parameters"],
            "flops": group[0]["forward_flops"],
            "tokens_per_second": mean(run["tokens_per_second"] for run in group),
            "load_max_over_mean": _mean_of(run["load_max_over_mean"] for run in group),
            "mean_gate": _mean_of(run["mean_gate"] for run in group),
            "closed_gates": _mean_of(run.get("closed_gates") for run in group),
            "stage2_load": _mean_of(_stage2_load(run) for run in group),
        }
        for column, *logged in (
            ("agreement", "transition_agreement"),
            ("kept_agreement", "transition_expected_agreement", "table_agreement"),
            ("transition_closed_gates", "transition_closed_gates"),
        ):
            row[column] = _mean_of((run["transition"] or {}).get(name) for run in group for name in logged)
        for split in group[0]["perplexity"]:
            row[f"{split}_mean"], row[f"{split}_std"] = _spread([run["perplexity"][split] for run in group])
        if reference in groups:
            row |= _against(group, groups[reference])
        rows.append(row)
    return rows


def _spread(values: list[float]) -> tuple[float, float | None]:
    return mean(values), stdev(values) if len(values) > 1 else None


def _mean_of(values) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _stage2_load(run: dict) -> float | None:
    """Average max/mean over the training logs that cover steps of stage 2 only."""
    first = (run["transition"] or {}).get("transition_step", 0)
    return _mean_of(
        entry["load_max_over_mean"]
        for entry in run.get("training_curve", ())
        if entry.get("routing_stage") == 2 and entry["step"] > first
    )


def _against(group: list[dict], reference: list[dict]) -> dict:
    """Compare runs of equal seed, which share data and order of batches."""
    of_seed = {run["seed"]: run["perplexity"]["validation"] for run in reference}
    ratios = [run["perplexity"]["validation"] / of_seed[run["seed"]] - 1 for run in group if run["seed"] in of_seed]
    if not ratios:
        return {}
    average, deviation = _spread(ratios)
    return {"above_reference": average, "above_reference_std": deviation}


def format_comparison(rows: Sequence[dict], reference: str | None = None) -> str:
    """Format rows of `summarize_systems` as a Markdown table like the paper's table 2."""
    headings = {
        "system": "system",
        "seeds": "seeds",
        "parameters": "shared / expert params",
        "flops": "FLOPs per sequence",
    }
    splits = [
        name.removesuffix("_mean") for name in rows[0] if name.endswith("_mean") and f"{name[:-5]}_std" in rows[0]
    ]
    headings |= {split: f"{split} PPL" for split in splits}
    if any("above_reference" in row for row in rows):
        headings["above_reference"] = f"against {reference}"
    headings |= {
        "stage2_load": "load max/mean, stage 2",
        "load_max_over_mean": "validation",
        "agreement": "agreement",
        "closed": "closed gates at transition -> end",
        "mean_gate": "mean gate",
        "tokens_per_second": "tokens/s",
    }
    return format_table([_cells(row, splits) for row in rows], headings)


def _cells(row: dict, splits: Sequence[str]) -> dict:
    cells = {
        "system": row["system"],
        "seeds": row["seeds"],
        "parameters": f"{_short(row['shared'])} / {_short(row['experts']) if row['experts'] else '-'}",
        "flops": _short(row["flops"]),
        "tokens_per_second": f"{row['tokens_per_second']:,.0f}",
    }
    for split in splits:
        cells[split] = _plus_minus(row[f"{split}_mean"], row[f"{split}_std"], "{:.2f}")
    if row.get("above_reference") is not None:
        deviation = row["above_reference_std"]
        cells["above_reference"] = _plus_minus(
            100 * row["above_reference"], None if deviation is None else 100 * deviation, "{:+.1f}", " %"
        )
    for name in ("stage2_load", "load_max_over_mean", "mean_gate"):
        if row[name] is not None:
            cells[name] = f"{row[name]:.2f}"
    for name, parts in (
        ("agreement", ("agreement", "kept_agreement")),
        ("closed", ("transition_closed_gates", "closed_gates")),
    ):
        known = [f"{row[part]:.0%}" for part in parts if row[part] is not None]
        if known:
            cells[name] = " -> ".join(known)
    return cells


def _plus_minus(value: float, deviation: float | None, pattern: str, unit: str = "") -> str:
    spread = "" if deviation is None else f" ± {pattern.format(deviation).lstrip('+')}"
    return f"{pattern.format(value)}{spread}{unit}"


def _short(count: float) -> str:
    """Format a count with three digits and the letter of its magnitude."""
    for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"


def write_figures(runs: Sequence[dict], folder: str | Path) -> list[Path]:
    """Draw the figures that the runs have data for; none where matplotlib is not installed.

    Returns:
        `list[Path]`: `perplexity.png` (figure 4), `experts.png` (figure 5, where a family has several numbers of
            experts), `fluctuation.png` (figures 2 and 7) and `load.png`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    groups = group_by_system(runs)
    written = []
    for name, draw, num_panels in (
        ("perplexity", _draw_perplexity, 2),
        ("experts", _draw_experts, 1),
        ("fluctuation", _draw_fluctuation, 1),
        ("load", _draw_load, 1),
    ):
        figure = Figure(figsize=(6 * num_panels, 4.2), layout="constrained")
        panels = figure.subplots(1, num_panels, squeeze=False)[0]
        if not draw(panels, groups):
            continue
        for axes in panels:
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        written.append(save_figure(figure, Path(folder) / f"{name}.png", dpi=110))
    return written


def _color(name: str, groups: dict[str, list[dict]]) -> str:
    """Return the colour of a system, the same in every figure."""
    return f"C{list(groups).index(name) % 10}"


def _draw_perplexity(panels, groups: dict[str, list[dict]]) -> bool:
    """Draw validation perplexity over steps and over training time, with the range over seeds."""
    over_steps, over_time = panels
    for name, group in groups.items():
        curves = [[point["perplexity"] for point in run["validation_curve"]] for run in group]
        steps = [point["step"] for point in group[0]["validation_curve"]]
        length = min(len(curve) for curve in curves)
        columns = list(zip(*(curve[:length] for curve in curves), strict=True))
        means = [mean(column) for column in columns]
        times = zip(*([point["seconds"] for point in run["validation_curve"][:length]] for run in group), strict=True)
        color = _color(name, groups)
        over_steps.plot(steps[:length], means, marker=".", label=name, color=color)
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        over_steps.fill_between(steps[:length], low, high, color=color, alpha=0.15)
        over_time.plot([mean(column) / 60 for column in times], means, marker=".", label=name, color=color)
    over_steps.set(xlabel="step", ylabel="validation perplexity")
    over_time.set(xlabel="training time (min)", ylabel="validation perplexity")
    for axes in panels:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter("{x:.0f}")
    return any(group[0]["validation_curve"] for group in groups.values())


def _draw_experts(panels, groups: dict[str, list[dict]]) -> bool:
    """Draw validation perplexity over the number of experts, one line per family."""
    families: dict[str, dict[int, list[float]]] = {}
    for group in groups.values():
        for run in group:
            if run["parameters"]["experts"]:
                by_size = families.setdefault(run["family"], {})
                by_size.setdefault(run["config"]["num_experts"], []).append(run["perplexity"]["validation"])
    lines = {family: by_size for family, by_size in families.items() if len(by_size) > 1}
    for family, by_size in lines.items():
        sizes = sorted(by_size)
        values = [_spread(by_size[size]) for size in sizes]
        panels[0].errorbar(sizes, [v for v, _ in values], [s or 0 for _, s in values], marker=".", label=family)
    panels[0].set_xscale("log", base=2)
    panels[0].set(xlabel="experts", ylabel="validation perplexity")
    return bool(lines)


def _draw_fluctuation(panels, groups: dict[str, list[dict]]) -> bool:
    """Draw the share of validation tokens whose expert has settled for good, by step; the first seed of each system."""
    drawn = False
    for name, group in groups.items():
        if group[0]["fluctuation"] is None:
            continue
        draw_settled(panels[0], group[0]["fluctuation"], label=name, color=_color(name, groups))
        drawn = True
    panels[0].set_ylabel("validation tokens (%), cumulative")
    return drawn


def _draw_load(panels, groups: dict[str, list[dict]]) -> bool:
    """Draw the share of each expert at inference, heaviest first; first MoE layer, first seed of each system."""
    drawn = False
    for name, group in groups.items():
        if group[0]["load"] is None:
            continue
        shares = sorted((100 * share for share in group[0]["load"][0]), reverse=True)
        panels[0].plot(range(1, len(shares) + 1), shares, marker=".", label=name, color=_color(name, groups))
        drawn = True
    panels[0].set(xlabel="expert, by load", ylabel="validation tokens (%)", ylim=(0, None))
    return drawn


def write_report(comparison: Comparison, runs: Sequence[dict], reference: str, **more) -> str:
    """Write `results.json`, `results.md` and the figures of the runs so far to the output folder of the comparison.

    Args:
        comparison (`Comparison`): of the runs.
        runs (sequence of `dict`): of `Comparison.run`.
        reference (`str`): name of the system that the others are compared with.
        **more: further entries of `results.json`, JSON-ready.

    Returns:
        `str`: the results as a Markdown table, without a newline at the end.
    """
    rows = summarize_systems(runs, reference)
    table = format_comparison(rows, reference)
    write_results(comparison, runs, rows, table, **more)
    write_figures(runs, comparison.training_args.output_dir)
    return table


def write_results(comparison: Comparison, runs: Sequence[dict], rows: Sequence[dict], page: str, **more):
    """Write `results.json`, and the page as `results.md`."""
    folder = Path(comparison.training_args.output_dir)
    results = {
        "environment": environment(comparison.training_args.device),
        "settings": settings_of(comparison),
        **more,
        "systems": rows,
        "runs": runs,
    }
    replace_file(folder / RESULTS_FILE, lambda partial: partial.write_text(json.dumps(results, indent=1) + "\n"))
    replace_file(folder / "results.md", lambda partial: partial.write_text(page + "\n"))
