# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""How much of a trained model's routing is a function of the token, and what freezing it to a table does to perplexity."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.measure.figures import add_legend, line_style, require_matplotlib
from modeling_stablemoe.measure.meter import evenness
from modeling_stablemoe.measure.report import format_table, perplexity_of

from .installing import facts_of, fingerprint, install_tables, installed_layers, learned_layers, remove_tables
from .making import INPUTS, MadeTables, RouteCounts, count_routes, make_tables


@dataclass(frozen=True)
class LayerFreezing:
    """How one layer routes, and what its table does. Shares are in [0, 1].

    Attributes:
        layer (`int`): index of the block.
        first (`float`): share of the counted tokens whose best expert is the most frequent one of their id.
        chosen (`float`): share of the counted tokens' experts that are among the k most frequent ones of their id: what the
            best table keeps.
        kept (`float`): share that the table keeps.
        bound (`float`): share that no table within the limit of load exceeds.
        held_out (`float`): share of the experts of the held-out tokens that are those of the table.
        load_before (`float`): max/mean load of the experts, as the model routes the counted text.
        load_after (`float`): the same under the table.
        alone (`int`): ids that exceed the limit of load by themselves.
        perplexity_alone (`float`): of the held-out text, with this layer frozen.
        perplexity_up_to (`float`): with this layer and all before it frozen.
    """

    layer: int
    first: float
    chosen: float
    kept: float
    bound: float
    held_out: float
    load_before: float
    load_after: float
    alone: int
    perplexity_alone: float
    perplexity_up_to: float


@dataclass(frozen=True)
class FreezingReport:
    """What freezing the routing of a model does.

    Attributes:
        num_experts (`int`): experts of a layer.
        k (`int`): experts of a token.
        max_load (`float` or `None`): asked limit of load, in mean loads.
        counted_tokens (`int`): tokens that the tables were made of.
        held_out_tokens (`int`): tokens that were predicted.
        perplexity (`float`): of the held-out text, with all routers as they are.
        layers (`list[LayerFreezing]`): those that route by a learned choice.
    """

    num_experts: int
    k: int
    max_load: float | None
    counted_tokens: int
    held_out_tokens: int
    perplexity: float
    layers: list[LayerFreezing]


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> tuple[float, int]:
    """Measure how well a language model in eval mode predicts a text.

    Args:
        model (`PreTrainedModel`): with a language head.
        batches (sequence of mappings): `input_ids` of shape `(batch, sequence)` and, with padding, `attention_mask`.

    Returns:
        `tuple`: the mean loss in nats, and the number of tokens that were predicted.

    Raises:
        ValueError: if there is nothing to predict.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        inputs = {name: batch[name].to(model.device) for name in INPUTS if name in batch}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        targets = inputs["input_ids"][:, 1:]
        if "attention_mask" in inputs:
            targets = targets.masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    model.train(was_training)
    if not count:
        raise ValueError("There is no token to predict: give a longer text.")
    return total / count, count


def measure_freezing(
    model: PreTrainedModel,
    counted: Sequence[Mapping[str, Tensor]],
    held_out: Sequence[Mapping[str, Tensor]],
    max_load: float | None,
    folder: str | Path | None = None,
    show_progress: bool = False,
) -> tuple[FreezingReport, MadeTables]:
    """Make a table for each layer that routes by a learned choice, and freeze the layers one by one, and more and more of them.

    Afterwards the model is as it was.

    Args:
        model (`PreTrainedModel`): a decoder of transformers with experts and a language head, without installed tables.
        counted (sequence of mappings): batches that the tables are made of: `input_ids` of shape `(batch, sequence)` and, with
            padding, `attention_mask`.
        held_out (sequence of mappings): batches on which perplexity is measured.
        max_load (`float` or `None`): tokens allowed on one expert, in mean loads; >= 1. `None`: any number.
        folder (`str` or `Path`, *optional*): that exists; keeps counts, tables and perplexities as they come, so that work which
            was interrupted goes on from there.
        show_progress (`bool`): show progress bars.

    Returns:
        `tuple`: the `FreezingReport`, and the tables with the layers in its order.

    Raises:
        ValueError: for a model whose routers tables cannot stand in for, or that has tables; without tokens to predict.
    """
    if installed_layers(model):
        raise ValueError("Tables are installed in this model already: `remove_tables(model)` first.")
    layers = learned_layers(model)
    facts = [facts_of(model, layer) for layer in layers]
    if not layers:
        raise ValueError(f"No layer of this {type(model).__name__} routes by a learned choice.")
    counts = count_routes(model, counted, layers, folder, show_progress, with_first=True)
    made = make_tables(counts, max_load, facts[0].k, folder, show_progress)
    seen = count_routes(model, held_out, layers, show_progress=show_progress)
    kept = _Losses(model, made.tables, layers, held_out, folder)
    sets = [[], *([layer] for layer in layers), *(layers[: end + 1] for end in range(len(layers)))]
    losses = {}
    for frozen in tqdm(sets, desc="Freezing", unit=" models", disable=not show_progress):
        losses[tuple(frozen)] = kept.loss(frozen)
    rows = [
        LayerFreezing(
            **_agreement(counts, seen, made, place),
            perplexity_alone=perplexity_of(losses[(layer,)][0]),
            perplexity_up_to=perplexity_of(losses[tuple(layers[: place + 1])][0]),
        )
        for place, layer in enumerate(layers)
    ]
    loss, held_out_tokens = losses[()]
    report = FreezingReport(
        num_experts=facts[0].num_experts,
        k=facts[0].k,
        max_load=max_load,
        counted_tokens=int(counts.tokens.sum()),
        held_out_tokens=held_out_tokens,
        perplexity=perplexity_of(loss),
        layers=rows,
    )
    return report, made


def _agreement(counts: RouteCounts, held_out: RouteCounts, made: MadeTables, place: int) -> dict:
    """Compare the table of one layer with the routing."""
    balanced, tokens = made.balanced[place], int(counts.tokens.sum())
    chosen_VE = counts.chosen[place]
    same = held_out.chosen[place].gather(1, made.tables[place]).sum().item()
    load = torch.stack([chosen_VE.sum(0).double(), balanced.load])
    before, after = evenness(load)["load_max_over_mean"].tolist()
    return {
        "layer": counts.layers[place],
        "first": counts.first[place].amax(-1).sum().item() / tokens,
        "chosen": balanced.best_agreement / (counts.k * tokens),
        "kept": balanced.agreement / (counts.k * tokens),
        "bound": balanced.bound / (counts.k * tokens),
        "held_out": same / (counts.k * int(held_out.tokens.sum())),
        "load_before": before,
        "load_after": after,
        "alone": len(balanced.alone),
    }


class _Losses:
    """The losses of a model with some layers frozen, each measured once, in a file if there is a folder."""

    def __init__(self, model, tables: Tensor, layers: list[int], batches: Sequence[Mapping[str, Tensor]], folder):
        self.model, self.tables, self.layers, self.batches = model, tables, layers, batches
        self.file = None if folder is None else Path(folder) / "losses.json"
        digest = hashlib.sha256()
        for batch in batches:
            digest.update(batch["input_ids"].cpu().numpy().tobytes())
        self.of = f"{fingerprint(tables, layers, 0)} {digest.hexdigest()}"
        self.known: dict[str, tuple[float, int]] = {}
        if self.file is not None and self.file.is_file():
            saved = json.loads(self.file.read_text())
            if saved["of"] == self.of:
                self.known = saved["losses"]

    def loss(self, frozen: list[int]) -> tuple[float, int]:
        """Return the mean loss and the number of tokens with these layers frozen."""
        name = " ".join(map(str, frozen))
        if name not in self.known:
            if frozen:
                install_tables(self.model, self.tables[[self.layers.index(layer) for layer in frozen]], frozen)
            try:
                self.known[name] = mean_loss(self.model, self.batches)
            finally:
                remove_tables(self.model)
            if self.file is not None:
                content = json.dumps({"of": self.of, "losses": self.known})
                replace_file(self.file, partial(Path.write_text, data=content))
        return tuple(self.known[name])


def freezing_json(report: FreezingReport) -> str:
    """Write a report as JSON, with all of its numbers under their names.

    Args:
        report (`FreezingReport`): of `measure_freezing`.

    Returns:
        `str`: one object; `layers` is a list of objects.
    """
    return json.dumps(asdict(report), indent=2) + "\n"


def format_freezing(report: FreezingReport) -> str:
    """Format a report as a Markdown table, one row per layer, under a sentence on the model.

    Args:
        report (`FreezingReport`): of `measure_freezing`.

    Returns:
        `str`: Markdown without a newline at the end.
    """
    rows = [
        {
            "layer": row.layer,
            "first": f"{row.first:.1%}",
            "chosen": f"{row.chosen:.1%}",
            "kept": f"{row.kept:.1%}",
            "bound": f"{row.bound:.1%}",
            "held_out": f"{row.held_out:.1%}",
            "load": f"{row.load_before:.2f} / {row.load_after:.2f}",
            "alone": row.alone,
            "perplexity_alone": _with_change(row.perplexity_alone, report.perplexity),
            "perplexity_up_to": _with_change(row.perplexity_up_to, report.perplexity),
        }
        for row in report.layers
    ]
    headings = {
        "layer": "layer",
        "first": "first expert by token",
        "chosen": f"{report.k} experts by token",
        "kept": "table",
        "bound": "at most possible",
        "held_out": "on held-out text",
        "load": "load max/mean before / after",
        "alone": "ids above the limit",
        "perplexity_alone": "perplexity, this layer frozen",
        "perplexity_up_to": "up to this layer",
    }
    limit = "without a limit of load" if report.max_load is None else f"within {report.max_load:g} mean loads"
    return (
        f"{report.k} of {report.num_experts} experts per token; tables of {report.counted_tokens:,} tokens {limit}; "
        f"perplexity {report.perplexity:.4g} on {report.held_out_tokens:,} held-out tokens, no layer frozen.\n\n{format_table(rows, headings)}"
    )


def _with_change(perplexity: float, before: float) -> str:
    return f"{perplexity:.4g} ({perplexity / before - 1:+.1%})"


def freezing_card(report: FreezingReport) -> str:
    """Write the section of a model card on routing by tables.

    Args:
        report (`FreezingReport`): of `measure_freezing`.

    Returns:
        `str`: Markdown that begins with a heading of the second level.
    """
    layers = [row.layer for row in report.layers]
    return f"""## Routing by tables

How much of the routing of this model is a function of the token, and what perplexity becomes when layers route by a table from token
ids to experts, without further training. {format_freezing(report)}

With `routing_tables.safetensors` of this repository layers {", ".join(map(str, layers))} route by tables; their gates go on weighing
the chosen experts:

```python
from modeling_stablemoe.tables import load_tables, remove_tables

load_tables(model, "routing_tables.safetensors")
remove_tables(model)  # the model as it was
```
"""


def plot_freezing(report: FreezingReport):
    """Draw agreement by layer, and perplexity with this layer and up to this layer frozen.

    Args:
        report (`FreezingReport`): of `measure_freezing`.

    Returns:
        `matplotlib.figure.Figure`: that `save_figure` writes.

    Raises:
        ValueError: without matplotlib.
    """
    figure = require_matplotlib()(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers = [row.layer for row in report.layers]
    shares = {
        "first": "first expert by token",
        "chosen": f"{report.k} experts by token",
        "held_out": "table, held-out text",
    }
    for index, (name, label) in enumerate(shares.items()):
        left.plot(layers, [getattr(row, name) for row in report.layers], marker="o", label=label, **line_style(index))
    left.set(title="Routing that a table keeps", xlabel="layer", ylabel="share of the choices", ylim=(0, 1))
    perplexities = {"perplexity_alone": "this layer frozen", "perplexity_up_to": "all up to this layer frozen"}
    for index, (name, label) in enumerate(perplexities.items(), start=len(shares)):
        right.plot(layers, [getattr(row, name) for row in report.layers], marker="o", label=label, **line_style(index))
    right.axhline(report.perplexity, color="0.35", linewidth=1.2, label="no layer frozen")
    right.set(title="Held-out text", xlabel="layer", ylabel="perplexity")
    add_legend(figure, [left, right])
    return figure


__all__ = [
    "FreezingReport",
    "LayerFreezing",
    "format_freezing",
    "freezing_card",
    "freezing_json",
    "mean_loss",
    "measure_freezing",
    "plot_freezing",
]
