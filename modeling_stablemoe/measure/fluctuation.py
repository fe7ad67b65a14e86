# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Routing fluctuation: how the experts of the same tokens change during training (StableMoE, figures 2 and 7)."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.model.health_stablemoe import share_in_common

from .figures import save_figure


# Files in the folder of a run.
REPORT_FILE = "routing_fluctuation.json"
FIGURE_FILE = "routing_fluctuation.png"


class RoutingHistory:
    """The experts of the same tokens at several steps of a training run.

    Attributes:
        steps (`list[int]`): optimizer steps of the checks, ascending.
        stages (`list[int]`): routing stage at each check, 1 or 2.
        experts (`list[torch.Tensor]`): one `torch.ShortTensor` of shape `(tokens,)`, or `(tokens, K)` with K > 1 experts per
            token, per check, in which the tokens of several MoE layers follow one another.
    """

    def __init__(self):
        self.steps: list[int] = []
        self.stages: list[int] = []
        self.experts: list[Tensor] = []

    def record(self, step: int, stage: int, experts: Tensor) -> float | None:
        """Add a check of `experts`, a `torch.LongTensor` of shape `(tokens,)` or `(tokens, K)`, the same each time.

        Returns the share of tokens whose expert has changed since the last check, of their experts where there are several;
        `None` at the first one.
        """
        self.steps.append(step)
        self.stages.append(stage)
        self.experts.append(experts.to(torch.int16).cpu())
        return self.changes()[-1]

    def changes(self) -> list[float | None]:
        """Return for each check the share of tokens whose expert changed since the one before; `None` for the first."""
        pairs = zip(self.experts, self.experts[1:], strict=False)
        return [None, *((1 - _share_kept(*pair)).mean().item() for pair in pairs)][: len(self.steps)]

    def stage2_change(self) -> float | None:
        """Return the largest share of tokens that changed between two checks of stage 2; `None` with fewer than two."""
        within = [
            change
            for change, before, after in zip(self.changes()[1:], self.stages, self.stages[1:], strict=False)
            if before == after == 2
        ]
        return max(within, default=None)

    def last_fluctuation_steps(self) -> Tensor:
        """Return for each token the last step at which its experts were not its final ones; 0 if there was none."""
        steps = torch.tensor(self.steps).unsqueeze(-1)
        return torch.where(self._differs(), steps, 0).amax(0)

    def settled_shares(self) -> list[float]:
        """Return for each check the share of tokens that have their final experts there and at all later checks.

        A token whose experts changed between two checks has settled by the second, not by the first: few checks make the
        curve late, never early.
        """
        differs_from_here = self._differs().flip(0).cummax(0).values.flip(0)
        return (~differs_from_here).double().mean(-1).tolist()

    def _differs(self) -> Tensor:
        """Return for each check which tokens do not have their final experts yet, `(checks, tokens)`."""
        return torch.stack([_share_kept(experts, self.experts[-1]) < 1 for experts in self.experts])

    def summary(self) -> dict:
        """Compute what figures 2 and 7 show.

        Returns:
            `dict`, JSON-ready: `tokens`, their number; `steps`, `stages` and `change_since_last_check`, lists with an
                entry per check; `largest_change_in_stage2`; `last_fluctuation` with `steps` and `cumulative_share`,
                that of `settled_shares`; and `share_still_changing_after`, the
                share of tokens not settled by 20, 50 and 80 % of the last step.
        """
        last = self.last_fluctuation_steps()
        total = self.steps[-1]
        return {
            "tokens": int(last.numel()),
            "steps": self.steps,
            "stages": self.stages,
            "change_since_last_check": self.changes(),
            "largest_change_in_stage2": self.stage2_change(),
            "last_fluctuation": {
                "steps": self.steps,
                "cumulative_share": self.settled_shares(),
            },
            "share_still_changing_after": {
                str(share): (last > share * total).float().mean().item() for share in (0.2, 0.5, 0.8)
            },
        }

    def save(self, path: str | os.PathLike):
        """Write the history to a safetensors file, whole or not at all."""
        path = Path(path)
        tensors = {
            "steps": torch.tensor(self.steps),
            "stages": torch.tensor(self.stages),
            "experts": torch.stack(self.experts),
        }
        replace_file(path, lambda partial: save_file(tensors, partial))

    def load(self, path: str | os.PathLike, last_step: int):
        """Read the checks up to `last_step` from a file of `save`; the steps of later ones will be run again."""
        with safe_open(path, framework="pt") as file:
            steps = file.get_tensor("steps")
            kept = int((steps <= last_step).sum())
            self.steps = steps[:kept].tolist()
            self.stages = file.get_tensor("stages")[:kept].tolist()
            self.experts = list(file.get_tensor("experts")[:kept])

    def write_report(self, folder: str | os.PathLike) -> list[Path]:
        """Write the summary as JSON and, where matplotlib is installed, a figure; return the files."""
        summary = self.summary()
        path = Path(folder) / REPORT_FILE
        replace_file(path, lambda partial: Path(partial).write_text(json.dumps(summary, indent=2) + "\n"))
        figure = plot_fluctuation(summary)
        if figure is None:
            return [path]
        return [path, save_figure(figure, path.with_name(FIGURE_FILE))]


def _share_kept(before: Tensor, after: Tensor) -> Tensor:
    """Return which share of the experts of each token is the same, `(tokens,)`."""
    return share_in_common(*(experts.view(len(experts), -1) for experts in (before, after)))


def plot_fluctuation(summary: dict):
    """Draw figures 2 and 7 for the summary of one run; `None` after a single check, or where matplotlib is not installed."""
    if len(summary["steps"]) < 2:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    steps = summary["steps"]
    draw_changes(panels[0], steps, summary["change_since_last_check"])
    draw_settled(panels[1], summary, marker=".")
    panels[1].set_title("Expert settled for good")
    for axes in panels:
        axes.grid(alpha=0.3)
        if 2 in summary["stages"]:
            boundary = steps[summary["stages"].index(2)]
            axes.axvline(boundary, color="tab:red", linestyle="--", label="routing frozen")
            axes.legend(loc="center right")
    return figure


def draw_changes(axes, steps: Sequence[int], changes: Sequence[float | None], **style):
    """Draw the share of tokens, in [0, 1], whose expert changed between checks (figure 2)."""
    points = [(step, 100 * change) for step, change in zip(steps, changes, strict=True) if change is not None]
    # A share is that of the time since the last check: a slope from the last one of stage 1 to zero would be nobody's.
    axes.plot(*zip(*points, strict=True) if points else ([], []), marker=".", drawstyle="steps-pre", **style)
    axes.set(xlabel="step", ylabel="tokens (%)", title="Expert changed since the last check", ylim=(-2, 102))


def draw_settled(axes, summary: dict, **style):
    """Draw the share of tokens whose expert has settled for good, by step (figure 7)."""
    curve = summary["last_fluctuation"]
    # Between two checks it is not known when a token settled.
    shares = [100 * share for share in curve["cumulative_share"]]
    axes.plot(curve["steps"], shares, drawstyle="steps-post", **style)
    axes.set(xlabel="step", ylabel="tokens (%), cumulative", ylim=(-2, 102))
