# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Judging a stage 1: whether the routing has settled, and whether it is worth freezing."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.model.frozen_stablemoe import BalancedTable, FrozenRouter
from modeling_stablemoe.model.health_stablemoe import CLOSED_GATE, share_in_common
from modeling_stablemoe.model.losses_stablemoe import is_distributed
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin
from modeling_stablemoe.solvers.prices import table_load

from .meter import RoutingMeter, imbalance, is_first_process


# How far the agreement must be on the way from chance, which is K of E experts, to 1. A fixed share would say nothing
# with 4 experts, where chance alone gives a quarter, and much with 64. This wants 36 % with 4 experts, 25 % with 8 (twice
# chance) and 17 % with 32.
LEAST_AGREEMENT_OVER_CHANCE = 1 / 7
# A random hash has 1.5 to 1.9 on natural text; with a larger load stage 2 would stay unbalanced to its end.
LARGEST_TABLE_LOAD = 2.0
# With a larger share of closed gates an expert learns next to nothing.
MOST_CLOSED_GATES = 0.5


def tables_of(model: TwoStageRoutingMixin) -> Tensor | None:
    """Return the tables that would be frozen now, on the CPU; `None` if weights would be frozen.

    `(moe layers, V)`, or `(moe layers, V, K)` where a token has K > 1 experts.
    """
    layers = list(model.moe_layers_by_name.values())
    if any(layer.bare_router.distilled_router.sees_context for layer in layers):
        return None
    # The parameters of a router may be sharded: every process has to ask for its table.
    return torch.stack([layer.bare_router.distilled_router.table().int().cpu() for layer in layers])


class SettlingWatch:
    """Watches the tables settle: measures at each check the share of tokens whose expert has changed since the last.

    Where a token has several experts it is the share of these.

    Args:
        meter (`RoutingMeter`): of the model; counts how often each token id was routed.
    """

    def __init__(self, meter: RoutingMeter):
        self._meter = meter
        self._tables: Tensor | None = None
        self.changes: list[float] = []

    def check(self) -> float | None:
        """Return the share of stage 1's tokens, over all layers, whose expert has changed since the last check.

        It is `None` at the first check, and if there are no tables. Every process must call this.
        """
        tables, counts = tables_of(self._meter.model), self._meter.counted_tokens()
        if tables is None or counts is None:
            return None
        before, self._tables = self._tables, tables
        if before is None:
            return None
        kept = share_in_common(*(experts.view(*counts.shape, -1) for experts in (before, tables)))
        changed = ((1 - kept) * counts.cpu()).sum() / counts.sum().cpu().clamp(min=1)
        self.changes.append(changed.item())
        return self.changes[-1]

    def has_settled(self, largest_change: float, checks: int = 2) -> bool:
        """Return True if the last `checks` changes were at most `largest_change`."""
        return len(self.changes) >= checks and max(self.changes[-checks:]) <= largest_change

    def save(self, path: str | os.PathLike):
        """Write what a resumed run needs to go on watching, whole or not at all; every process must call this.

        Nothing is written if the folder does not exist.
        """
        counts, recent = self._meter.counted_tokens(), self._meter.recent_steps()
        if counts is None or recent is None:
            return
        tensors = {
            "changes": torch.tensor(self.changes, dtype=torch.double),
            "token_counts": counts.long().cpu(),
            **{f"recent_{name}": values for name, values in recent.items()},
            **({} if self._tables is None else {"tables": self._tables}),
        }
        if is_first_process() and Path(path).parent.is_dir():
            replace_file(Path(path), lambda partial: save_file(tensors, partial))

    def load(self, path: str | os.PathLike) -> bool:
        """Restore what `save` wrote, and return True if there is such a file; every process must call this."""
        found = [load_file(path) if is_first_process() and Path(path).is_file() else None]
        if is_distributed():
            # Other processes may not see the file, but all must decide alike.
            dist.broadcast_object_list(found, src=0)
        (tensors,) = found
        if tensors is None:
            return False
        self._tables = tensors.get("tables")
        self.changes = tensors["changes"].tolist()
        self._meter.resume_counts(tensors["token_counts"])
        self._meter.resume_recent({name: tensors[f"recent_{name}"] for name in ("sums", "load")})
        return True


@dataclass
class Verdict:
    """How good the routing of stage 1 is.

    Args:
        metrics (`dict[str, float]`): of the last steps, by their logged names.
        table_load (`float`, *optional*): max/mean load of stage 1's tokens under the table that would be frozen;
            `None` if there is no table.
        is_balanced_later (`bool`): whether freezing limits that load.
        is_counted (`bool`): whether the distilled router goes by counts already.
        chance (`float`): the agreement of a random table, K of E experts.
    """

    metrics: dict[str, float]
    table_load: float | None
    is_balanced_later: bool
    is_counted: bool = False
    chance: float = 0.0

    def problems(self) -> list[str]:
        """Return what speaks against freezing, each behind its remedy; nothing for a routing that is worth it."""
        problems = []
        agreement = self.metrics.get("distillation_agreement", 1.0)
        wanted = self.chance + LEAST_AGREEMENT_OVER_CHANCE * (1 - self.chance)
        if agreement < wanted:
            other = "" if self.is_counted else ', or take `distilled_router="counts"`'
            problems.append(
                f"Lengthen stage 1 (`stage1_steps`; `hold_until_ready` does so by itself){other}: the distilled router agrees with the backbone on "
                f"{agreement:.1%} of the tokens only (wanted: {wanted:.0%}, chance: {self.chance:.0%}), and what it freezes is hardly more than a hash"
            )
        if self.table_load is not None and not self.is_balanced_later and self.table_load > LARGEST_TABLE_LOAD:
            problems.append(
                f"Set `max_frozen_load`, 1.05 say: the table's load max/mean is {self.table_load:.2f} (wanted: "
                f"{LARGEST_TABLE_LOAD:g}), and nothing evens it out in stage 2"
            )
        closed = self.metrics.get("closed_gates", 0.0)
        if closed > MOST_CLOSED_GATES:
            problems.append(
                f"Centre the balance loss (`center_balance_loss`), or lower `balance_loss_coef`: {closed:.0%} of the gates are below "
                f"{CLOSED_GATE:g}, so their experts do and learn next to nothing"
            )
        return problems


def judge(meter: RoutingMeter) -> Verdict:
    """Judge the routing that a model has learned, by its last steps; every process must call this."""
    recent = meter.recent()
    tables, counts = tables_of(meter.model), meter.counted_tokens()
    load = None
    if tables is not None and counts is not None:
        load = imbalance(load_of(tables, counts, meter.model.config.num_experts))
    metrics = {} if recent is None else recent.metrics(stage=1)
    config = meter.model.config
    chance = config.num_experts_per_tok / config.num_experts
    return Verdict(metrics, load, config.max_frozen_load is not None, config.distilled_router == "counts", chance)


def load_of_frozen(model: TwoStageRoutingMixin, token_counts: Tensor | None) -> Tensor | None:
    """Return the load of counted tokens under the frozen tables, `(moe layers, experts)`; `None` without either."""
    layers = model.moe_layers_by_name.values()
    if token_counts is None or not all(isinstance(layer.frozen_router, FrozenRouter) for layer in layers):
        return None
    tables = torch.stack([layer.frozen_router.values() for layer in layers])
    return load_of(tables, token_counts, model.config.num_experts)


def load_of(tables: Tensor, token_counts: Tensor, num_experts: int) -> Tensor:
    """Return the tokens that tables send to each expert, `(moe layers, num_experts)`.

    `tables` has the expert of each token id and `token_counts` how often each occurs, both `(moe layers, V)`; with K experts
    per token `tables` is `(moe layers, V, K)`.
    """
    layers = zip(tables.long().cpu(), token_counts.double().cpu(), strict=True)
    return torch.stack([table_load(table, counts, num_experts) for table, counts in layers])


@dataclass
class FrozenReport:
    """What was frozen, in numbers and words.

    Args:
        verdict (`Verdict`): on stage 1.
        num_steps (`int`): number of last steps that its metrics cover.
        load (`torch.Tensor` of shape `(moe layers, num_experts)`, *optional*): tokens of stage 1 under the frozen
            tables.
        balanced (`list[BalancedTable]`): the balanced tables; empty if they were not balanced.
        token_counts (`torch.Tensor` of shape `(moe layers, V)`, *optional*): how often each token id occurred in stage 1.
        num_experts_per_tok (`int`): experts of each token.
    """

    verdict: Verdict
    num_steps: int
    load: Tensor | None
    balanced: list[BalancedTable]
    token_counts: Tensor | None = None
    num_experts_per_tok: int = 1

    def metrics(self) -> dict[str, float]:
        """Return what is logged as `transition_*`: metrics of the last steps, load of the tables, price of balance."""
        names = (
            "load_max_over_mean",
            "mean_gate",
            "closed_gates",
            "common_direction",
            "distillation_agreement",
            "distillation_agreement_by_id",
        )
        metrics = {
            f"transition_{name.removeprefix('distillation_')}": self.verdict.metrics[name]
            for name in names
            if name in self.verdict.metrics
        }
        if self.load is not None:
            metrics["transition_table_load_max_over_mean"] = imbalance(self.load)
        if self.balanced:
            tokens = sum(layer.load.sum().item() for layer in self.balanced)
            kept = sum(layer.agreement for layer in self.balanced) / tokens
            metrics["transition_unbalanced_load_max_over_mean"] = self.verdict.table_load
            metrics["transition_expected_agreement"] = kept
            metrics["transition_agreement_given_up"] = (
                sum(layer.best_agreement for layer in self.balanced) / tokens - kept
            )
            metrics["transition_agreement_gap"] = sum(layer.bound for layer in self.balanced) / tokens - kept
            metrics["transition_largest_shared_load"] = max(
                (layer.limit / layer.load.mean()).item() for layer in self.balanced
            )
            metrics["transition_ids_above_limit"] = sum(len(layer.alone) for layer in self.balanced)
        return metrics

    def lines(self) -> list[str]:
        """Describe in plain words how well what was frozen agrees with stage 1, and how even it is."""
        metrics, said = self.metrics(), []
        if "transition_agreement" in metrics:
            said.append(
                f"agreement when frozen: over the last {self.num_steps} steps the distilled router sent "
                f"{metrics['transition_agreement']:.1%} of the tokens where the backbone router did "
                f"({metrics['transition_agreement_by_id']:.1%} where every token id counts the same; chance: "
                f"{self.verdict.chance:.1%})"
            )
        if self.load is not None:
            before = metrics.get("transition_load_max_over_mean")
            tokens = self.load[0].sum().item() / self.num_experts_per_tok
            said.append(
                "load of the heaviest expert over the mean: "
                + (f"{before:.2f} in the last steps of stage 1, " if before is not None else "")
                + f"{imbalance(self.load):.2f} by the frozen table for the {tokens:,.0f} tokens seen in stage 1 "
                f"(lightest: {self._lightest():.2f})"
            )
            if self.token_counts is not None:
                said.append(self._bound_of_the_corpus())
        heavy = sorted({token_id for layer in self.balanced for token_id in layer.alone.tolist()})
        if self.balanced:
            said.append(
                f"the table that agrees most with stage 1 would have had {metrics['transition_unbalanced_load_max_over_mean']:.2f}; within "
                f"{metrics['transition_largest_shared_load']:.2f}{', but for the heaviest ids,' if heavy else ''} it keeps {metrics['transition_expected_agreement']:.1%} of the choices of "
                f"all of stage 1, {metrics['transition_agreement_given_up']:.1%} fewer"
            )
        if heavy:
            named = ", ".join(map(str, heavy[:5])) + (f" and {len(heavy) - 5} more" if len(heavy) > 5 else "")
            own = "an expert" if self.num_experts_per_tok == 1 else f"{self.num_experts_per_tok} experts"
            said.append(
                f"Token id(s) {named} alone outweigh the limit: each has {own} of its own, and the others keep to it"
            )
        return said

    def _bound_of_the_corpus(self) -> str:
        """Say how uneven any table must be: all tokens of an id go to the same experts."""
        k, num_experts = self.num_experts_per_tok, self.load.shape[-1]
        share = (self.token_counts.amax(-1) / self.token_counts.sum(-1).clamp(min=1)).max().item()

        def allowed(experts_per_token: int) -> str:
            bound = share * num_experts / experts_per_token
            return "an even load" if bound <= 1 else f"no max/mean below {bound:.2f}"

        with_one = "" if k == 1 else f"; with one per token, {allowed(1)}"
        return (
            f"The most frequent token id is {share:.1%} of all: with {num_experts} experts, {k} per token, that allows "
            f"{allowed(k)}{with_one}"
        )

    def _lightest(self) -> float:
        return (self.load.amin(-1) / self.load.mean(-1)).min().item()
