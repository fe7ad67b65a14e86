# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What all figures share: colours, the boundary between the stages, files that are written whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from modeling_stablemoe.checkpoints.atomic_files import replace_file


# Distinct for all kinds of colour vision (Okabe and Ito, 2008), the strongest contrasts first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")


def require_matplotlib() -> type:
    """Return `matplotlib.figure.Figure`, which needs no display; without matplotlib a ValueError names the extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            'Figures need matplotlib, which is not installed: `pip install "modeling_stablemoe[plots]"`, or '
            "`pip install matplotlib`."
        ) from error
    return Figure


def save_figure(figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure, whole or not at all, in the format that the path ends in; return the path."""
    path = Path(path)
    replace_file(path, lambda partial: figure.savefig(partial, format=path.suffix.removeprefix("."), dpi=dpi))
    return path


def line_style(index: int) -> dict[str, str]:
    """Return a colour and a dash for the n-th line of a figure."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": LINE_STYLES[index // len(PALETTE) % len(LINE_STYLES)],
    }


def mark_transitions(axes, steps: Mapping[str, int | None]):
    """Draw where the routing was frozen: one line if all runs agree, otherwise one per run in its colour.

    `steps` maps each run, in the order of colours, to the step of its transition, or to `None`.
    """
    known = {step for step in steps.values() if step is not None}
    if len(known) == 1:
        (step,) = known
        lines = [(step, "0.35", "routing frozen")]
    else:
        lines = [
            (step, line_style(index)["color"], f"{name}: frozen") for index, (name, step) in enumerate(steps.items())
        ]
    for step, color, label in lines:
        if step is not None:
            axes.axvline(step, color=color, linestyle=(0, (5, 2)), linewidth=1.2, label=label)


def add_legend(figure, panels: Sequence):
    """Put one legend for all panels below them, where it hides nothing; none if no line has a name."""
    entries = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = min(len(entries), 4)
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)
