# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The figures of a training run, or of several side by side, from the log histories in their folders."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from modeling_stablemoe.checkpoints.architectures import MODELS
from modeling_stablemoe.checkpoints.folders import checkpoints_in
from modeling_stablemoe.model.health_stablemoe import CLOSED_GATE

from .figures import add_legend, line_style, mark_transitions, require_matplotlib, save_figure
from .fluctuation import REPORT_FILE, RoutingHistory, draw_changes, draw_settled
from .meter import evenness


@dataclass
class RunHistory:
    """The history of a run, read from its folder.

    Args:
        label (`str`): name in the figures.
        log_history (`list[dict]`): of the Trainer.
        fluctuation (`dict`, *optional*): of `RoutingHistory.summary`.
        has_language_head (`bool`): whether the evaluation loss is that of tokens, so that it has a perplexity.
    """

    label: str
    log_history: list[dict]
    fluctuation: dict | None = None
    has_language_head: bool = True

    @property
    def transition_step(self) -> int | None:
        """`int`, *optional*: step at whose end the routing was frozen."""
        return next((entry["transition_step"] for entry in self.log_history if "transition_step" in entry), None)

    def curve(self, name: str) -> tuple[list[int], list]:
        """Return the steps and the values of what was logged under a name."""
        points = [(entry["step"], entry[name]) for entry in self.log_history if entry.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def expert_load(self) -> tuple[list[int], dict[str, list[list[float]]]]:
        """Return steps and, by MoE layer, a list per step of the loads of its experts over their mean."""
        steps, layers = [], {}
        # In metrics of each layer, which are logged if there are several.
        prefixes = ("load_entropy/", "expert_load/")
        logged = (name for entry in self.log_history for name in entry if name.startswith(prefixes))
        names = list(dict.fromkeys(name.split("/")[1] for name in logged))
        for entry in self.log_history:
            by_layer: dict[str, list[float]] = {}
            for name, value in entry.items():
                if name.startswith("expert_load/"):  # "expert_load/layer_0/expert_0"
                    by_layer.setdefault(name.split("/")[1], []).append(value)
            rows = entry.get("expert_load") or list(by_layer.values())
            if rows and not math.isnan(sum(map(sum, rows))):  # a window without tokens
                steps.append(entry["step"])
                for index, row in enumerate(rows):
                    name = names[index] if len(names) == len(rows) else f"layer_{index}"
                    layers.setdefault(name, []).append(row)
        return steps, layers

    def layer_curves(self) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
        """Return steps and values of each number of `evenness` by MoE layer.

        If the loads of layers were not logged, it has the logged numbers of the worst layer under the name "".
        """
        steps, layers = self.expert_load()
        if not layers:
            return {name: {"": self.curve(name)} for name in LOAD_PANELS}
        measured = {layer: evenness(torch.tensor(rows, dtype=torch.double)) for layer, rows in layers.items()}
        return {
            name: {layer: (steps, values[name].tolist()) for layer, values in measured.items()} for name in LOAD_PANELS
        }


# Panels side by side, at most.
MAX_COLUMNS = 3
# Title and unit of the numbers that are drawn of loads.
LOAD_PANELS = {
    "load_max_over_mean": ("Heaviest expert", "tokens / mean"),
    "load_min_over_mean": ("Lightest expert", "tokens / mean"),
    "load_entropy": ("Entropy of the loads", "share of ln(experts)"),
    "dead_experts": ("Experts without a token", "experts"),
}


def read_run(folder: str | Path, label: str | None = None) -> RunHistory:
    """Read the history of a run: of the finished run, or of the last checkpoint with one.

    Args:
        folder (`str` or `Path`): output folder of a run, or a checkpoint.
        label (`str`, *optional*): name in the figures. Default: that of the folder.

    Raises:
        FileNotFoundError: if there is no such folder, or no history in it.
        ValueError: if the history cannot be read, or nothing was logged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}; name the `--output_dir` of a run.")
    path = _state_file(folder)
    history = _read_json(path).get("log_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) and "step" in entry for entry in history):
        raise ValueError(f"{str(path)!r} holds no `log_history`: it is no state of a Trainer.")
    if not history:
        raise ValueError(f"Nothing was logged in {str(path)!r}: train on, or lower `logging_steps`.")
    last_step = max(entry["step"] for entry in history)
    label = label or folder.resolve().name
    return RunHistory(label, history, _read_fluctuation(folder, last_step), _has_language_head(folder, path.parent))


def _has_language_head(*folders: Path) -> bool:
    """Return True if the model of a run predicts tokens, by the first saved config; also if there is none."""
    for folder in folders:
        if (folder / "adapter_config.json").is_file():
            return _read_json(folder / "adapter_config.json").get("task_type") != "SEQ_CLS"
        if (folder / "config.json").is_file():
            for name in _read_json(folder / "config.json").get("architectures") or []:
                return name not in MODELS or MODELS[name].can_generate()
    return True


def _state_file(folder: Path) -> Path:
    for place in (folder, *checkpoints_in(folder)):  # the newest checkpoint first
        if (place / "trainer_state.json").is_file():
            return place / "trainer_state.json"
    raise FileNotFoundError(
        f"{str(folder)!r} holds no log history: neither `trainer_state.json` nor a checkpoint with one. A run "
        "writes it with every checkpoint (`--save_steps`) and at its end, an evaluation does not."
    )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # undecodable bytes, too
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}. It may have been cut off.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is not a JSON object, but a {type(content).__name__}.")
    return content


def _read_fluctuation(folder: Path, last_step: int) -> dict | None:
    """Read what `RoutingFluctuationCallback` keeps while it runs, or else its report."""
    checks, report = folder / "routing_fluctuation.safetensors", folder / REPORT_FILE
    if checks.is_file():
        history = RoutingHistory()
        try:
            history.load(checks, last_step)
        except SafetensorError as error:
            raise ValueError(f"{str(checks)!r} is not a readable safetensors file: {error}.") from error
        return history.summary() if history.steps else None
    return _read_json(report) if report.is_file() else None


def write_run_figures(runs: Sequence[RunHistory], folder: str | Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw the figures for which runs have logged something.

    Args:
        runs (sequence of `RunHistory`): at least one; each with a label of its own.
        folder (`str` or `Path`): where to put the files; created if necessary.
        formats (iterable of `str`): endings: `"png"`, `"svg"`.

    Returns:
        `list[Path]`: `loss` (figure 4), `fluctuation` (figures 2 and 7), `load`, `expert_load`, `distillation` and
            `gates`, as far as there is something to draw, in each format.

    Raises:
        ValueError: if matplotlib is not installed, or labels repeat.
    """
    figure_class = require_matplotlib()
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        raise ValueError(f"Runs need different labels, got {labels}.")
    folder, written = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        figure = figure_class(layout="constrained")
        draw(figure, runs)
        if any(axes.get_visible() for axes in figure.axes):
            written += [save_figure(figure, folder / f"{name}.{ending}") for ending in formats]
    return written


def _plot(axes, run: RunHistory, name: str, scale: float = 1.0, **style):
    steps, values = run.curve(name)
    _plot_line(axes, steps, [scale * value for value in values], **style)


def _plot_line(axes, steps: Sequence[int], values: Sequence[float], **style):
    """Draw a line; a single value, as of a short stage 1, as a point, since a line of it would not show."""
    if any(map(math.isfinite, values)):
        axes.plot(steps, values, **({"marker": "."} if len(values) == 1 else {}) | style)


def _finish(figure, panels: Sequence, runs: Sequence[RunHistory]):
    """Remove the panels in which nothing is drawn, close the gaps, and complete the others."""
    drawn = [axes for axes in panels if any(len(line.get_xdata()) for line in axes.lines)]
    for axes in panels:
        if axes not in drawn:
            axes.remove()
    if 0 < len(drawn) < len(panels):
        rows, columns = panels[0].get_gridspec().get_geometry()
        new_columns = min(len(drawn), columns)
        new_rows = math.ceil(len(drawn) / new_columns)
        width, height = figure.get_size_inches()
        figure.set_size_inches(width * new_columns / columns, height * new_rows / rows)
        grid = figure.add_gridspec(new_rows, new_columns)
        for index, axes in enumerate(drawn):
            axes.set_subplotspec(grid[index])
    panels = drawn
    for axes in panels:
        axes.set_xlabel(axes.get_xlabel() or "step")
        axes.tick_params(labelbottom=True)  # also above a gap
        axes.grid(alpha=0.3)
        mark_transitions(axes, {run.label: run.transition_step for run in runs})
    add_legend(figure, panels)


def _draw_loss(figure, runs: Sequence[RunHistory]):
    """Draw the training loss without routing losses, and validation perplexity, or loss if a head has none."""
    from matplotlib.ticker import LogFormatter

    figure.set_size_inches(10, 4.4)
    panels = figure.subplots(1, 2, sharex=True)
    has_perplexity = all(run.has_language_head for run in runs)
    for index, run in enumerate(runs):
        style = {"label": run.label, **line_style(index)}
        # Without routing statistics, as in runs of dense models, the whole loss is the task loss.
        _plot(panels[0], run, "task_loss" if run.curve("task_loss")[0] else "loss", **style)
        steps, losses = run.curve("eval_loss")
        if losses:
            values = [math.exp(min(loss, 700.0)) for loss in losses] if has_perplexity else losses
            _plot_line(panels[1], steps, values, marker=".", **style)
    panels[0].set(ylabel="task loss (nats per token)" if has_perplexity else "task loss", title="Training")
    panels[1].set(ylabel="perplexity" if has_perplexity else "loss", title="Validation")
    if has_perplexity:
        panels[1].set_yscale("log")
        # Plain numbers, also between powers of ten if the axis spans few of them.
        panels[1].yaxis.set_major_formatter("{x:.4g}")
        panels[1].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
        panels[1].tick_params(axis="y", which="minor", labelsize="small")
    _finish(figure, panels, runs)


def _draw_fluctuation(figure, runs: Sequence[RunHistory]):
    """Draw figures 2 and 7; figure 7 needs the experts of each check."""
    figure.set_size_inches(10, 4.4)
    panels = figure.subplots(1, 2, sharex=True)
    for index, run in enumerate(runs):
        style = {"label": run.label, **line_style(index)}
        if run.curve("routing_fluctuation")[0]:
            draw_changes(panels[0], *run.curve("routing_fluctuation"), **style)
        if run.fluctuation is not None:
            draw_settled(panels[1], run.fluctuation, **style)
    panels[0].set_ylabel("validation tokens (%)")
    panels[1].set(title="Expert settled for good", ylabel="validation tokens (%), cumulative")
    _finish(figure, panels, runs)


def _draw_load(figure, runs: Sequence[RunHistory]):
    """Draw how even the loads are: each layer of one run, or the worst layer of each of several runs."""
    figure.set_size_inches(10, 7)
    panels = list(figure.subplots(2, 2, sharex=True).flat)
    for axes, (name, (title, unit)) in zip(panels, LOAD_PANELS.items(), strict=True):
        if len(runs) == 1:
            curves = {layer or "worst layer": curve for layer, curve in runs[0].layer_curves()[name].items()}
        else:
            curves = {run.label: run.curve(name) for run in runs}
        for index, (label, (steps, values)) in enumerate(curves.items()):
            _plot_line(axes, steps, values, label=label, **line_style(index))
        axes.set(title=title, ylabel=unit)
    panels[1].set_ylim(-0.02, 1.02)
    panels[2].set_ylim(top=1.02)
    panels[3].yaxis.get_major_locator().set_params(integer=True)
    panels[3].set_ylim(bottom=-0.1)  # so that a line at 0 is visible
    _finish(figure, panels, runs)


def _draw_expert_load(figure, runs: Sequence[RunHistory]):
    """Draw the load of each expert over the steps, a panel per MoE layer; each run starts a new row of panels."""
    from matplotlib.colors import TwoSlopeNorm

    rows: list[list] = []
    for run in runs:
        steps, layers = run.expert_load()
        panels_of_run = [(run, f"{run.label}, {layer}", steps, loads) for layer, loads in layers.items()]
        rows += [panels_of_run[start : start + MAX_COLUMNS] for start in range(0, len(panels_of_run), MAX_COLUMNS)]
    if not rows:
        return
    columns = max(len(row) for row in rows)
    figure.set_size_inches(1.5 + 4.5 * columns, 0.6 + 3 * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    heaviest = max((load for row in rows for *_, loads in row for log in loads for load in log), default=0.0)
    # 1 is white. From four times the mean on all is as dark, so that one outlier does not bleach the rest.
    norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(2.0, min(heaviest, 4.0)))
    for row_of_axes, row in zip(grid, rows, strict=True):
        for axes, (run, title, steps, loads) in zip(row_of_axes, row, strict=False):
            image = _draw_heat_map(axes, steps, loads, norm)
            axes.set_title(title)
            if run.transition_step is not None:
                axes.axvline(run.transition_step, color="black", linestyle=(0, (5, 2)), label="routing frozen")
        for axes in row_of_axes[len(row) :]:
            axes.set_visible(False)
    extend = "max" if heaviest > norm.vmax else "neither"
    figure.colorbar(image, ax=grid, label="tokens / mean of the layer", extend=extend)
    add_legend(figure, grid.flat)


def _draw_heat_map(axes, steps: list[int], loads: list[list[float]], norm):
    """Draw the loads of one layer, a list per step; each log covers the steps since the last one."""
    edges = [max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0, *steps]
    experts = [expert - 0.5 for expert in range(len(loads[0]) + 1)]
    axes.set(xlabel="step", ylabel="expert")
    axes.yaxis.get_major_locator().set_params(integer=True)
    return axes.pcolormesh(edges, experts, list(zip(*loads, strict=True)), norm=norm, cmap="RdBu_r")


def _draw_shares(
    panels: Sequence, names: dict[str, tuple[str, str]], runs: Sequence[RunHistory], scale: float = 1.0, **style
):
    """Draw numbers in [0, 1], times `scale`, each on a panel with its title and unit."""
    for axes, (name, (title, unit)) in zip(panels, names.items(), strict=True):
        for index, run in enumerate(runs):
            _plot(axes, run, name, scale, label=run.label, **style, **line_style(index))
        axes.set(title=title, ylabel=unit, ylim=(-0.02 * scale, 1.02 * scale))


def _draw_distillation(figure, runs: Sequence[RunHistory]):
    """Draw how often distilled and backbone router agree, and how fast the table still changes."""
    figure.set_size_inches(13, 4.4)
    panels = figure.subplots(1, 3, sharex=True)
    names = {
        "distillation_agreement": ("Distilled = backbone router", "tokens (%)"),
        "distillation_agreement_by_id": ("The same, every token id alike", "token ids (%)"),
        "table_change": ("Table changed since the last check", "tokens (%)"),
    }
    _draw_shares(panels, names, runs, 100, marker=".")
    sizes = {len(row) for run in runs for rows in run.expert_load()[1].values() for row in rows}
    if len(sizes) == 1:
        for axes in [axes for axes in panels[:2] if axes.lines]:
            axes.axhline(100 / next(iter(sizes)), color="0.6", linestyle=":", label="1 / experts")
    _finish(figure, panels, runs)


def _draw_gates(figure, runs: Sequence[RunHistory]):
    """Draw the signs of a healthy routing: gates, common direction of hidden states, entropy of the scores."""
    figure.set_size_inches(10, 7)
    panels = list(figure.subplots(2, 2, sharex=True).flat)
    names = {
        "mean_gate": ("Mean gate", "gate"),
        "closed_gates": (f"Gates below {CLOSED_GATE:g}", "share of the tokens"),
        "common_direction": ("Common direction of hidden states", "norm of mean / mean norm"),
        "router_entropy": ("Entropy of the router", "share of ln(experts)"),
    }
    _draw_shares(panels, names, runs)
    _finish(figure, panels, runs)


# Each function draws on an empty figure, and leaves no panel if there is nothing to draw.
FIGURES: dict[str, Callable] = {
    "loss": _draw_loss,
    "fluctuation": _draw_fluctuation,
    "load": _draw_load,
    "expert_load": _draw_expert_load,
    "distillation": _draw_distillation,
    "gates": _draw_gates,
}
