# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The best table from token ids to experts that keeps every expert within a load.

A generalised assignment problem in which an id weighs the same on every expert: choose the expert of each id so that
most tokens stay where they would go, and no expert gets more than its limit of tokens.

1. Every expert has a price p_i >= 0 per token. Whatever the prices, no table within the limit keeps more than
   D(p) = sum_v max_i (agreement_vi - w_v p_i) + limit * sum_i p_i. Newton's method on the smoothed D, as for the
   prices of `assignment`, then exact steps of one price at a time make that bound small.
2. Ids go to their best expert at these prices, heavy ones first, while there is room; then they change places as long
   as that brings something.
3. An id's regret is what it loses at these prices on another expert than its best one. Any table keeps D(p) less the
   regrets, less the prices of the room left over. So only ids with a regret below D(p) less what is kept can change
   in a better table; a branch and bound over these proves that there is none, where its nodes suffice.
4. Prices cannot tell that an id, if heavy, lies on one expert as a whole. Where a gap is left, the heaviest ids are
   placed in all ways, the most promising first, and 1 to 3 repeated for the others.

An id that alone outweighs the limit cannot keep to it on any expert. It counts as heavy as the limit: so it fills an
expert of its own, and the others keep to the limit on theirs.

Step 1 stands in `prices`, the others in `search`.

Shape suffixes: V token ids, E experts.
"""

import heapq
import math

import torch
from torch import Tensor

from modeling_stablemoe.model.frozen_stablemoe import BalancedTable

from .prices import ROUNDING, Problem, table_load
from .search import Search, solve_or_raise


def check(agreement: Tensor, token_counts: Tensor, max_load: float) -> None:
    """Refuse what is no problem of this kind.

    Args:
        agreement (`torch.Tensor`): see `balanced_table`.
        token_counts (`torch.Tensor`): see `balanced_table`.
        max_load (`float`): see `balanced_table`.

    Raises:
        ValueError: see `balanced_table`.
    """
    if agreement.dim() != 2 or not agreement.shape[1]:
        shape = tuple(agreement.shape)
        raise ValueError(f"`agreement` has shape {shape}; pass one row per token id, one column per expert.")
    if token_counts.shape != agreement.shape[:1]:
        shape = tuple(token_counts.shape)
        raise ValueError(f"`token_counts` has shape {shape}; pass one count per row of `agreement`: {len(agreement)}.")
    for name, values in (("agreement", agreement), ("token_counts", token_counts)):
        if not math.isfinite(total := values.sum(dtype=torch.float64).item()):
            raise ValueError(f"`{name}` sums to {total}; pass finite numbers.")
        if len(values) and (least := values.min().item()) < 0:
            raise ValueError(f"`{name}` holds {least}; pass numbers >= 0.")
    if not 1 <= max_load < math.inf:
        raise ValueError(f"`max_load` is {max_load}; pass a finite number >= 1, 1 being the mean load.")


@torch.no_grad()
def balanced_table(agreement: Tensor, token_counts: Tensor, max_load: float, node_limit: int = 20000) -> BalancedTable:
    """Choose the expert of each token id so that most tokens agree, and no expert gets too many.

    The limit is `max_load` times the mean load. An id that alone outweighs it, of which there are fewer than experts,
    gets an expert of its own. Where no table is found in which the others keep to the limit, it is raised to what the
    greedy packing of them needs: heaviest id first, each to the expert with the least load. Ids that weigh nothing go to
    their best expert, the first among equals. The same numbers give the same table. Sums are compared up to 1e-12 of
    them.

    Args:
        agreement (`torch.Tensor` of shape `(V, E)`): how many tokens of the id agree if it goes to the expert; >= 0.
        token_counts (`torch.Tensor` of shape `(V,)`): how often each id occurs; >= 0, whole numbers or not.
        max_load (`float`): tokens allowed on one expert, in mean loads; >= 1.
        node_limit (`int`, *optional*, defaults to 20000): steps that a search may take; there are two at most.

    Returns:
        `BalancedTable`, on the CPU.

    Raises:
        ValueError: where shapes do not match, there are no experts, a number is negative or not finite, or `max_load`
            is below 1.
    """
    check(agreement, token_counts, max_load)
    agreement_VE, count_V = agreement.detach().cpu().double(), token_counts.detach().cpu().double()
    (num_ids, num_experts), total = agreement_VE.shape, count_V.sum().item()
    limit = max_load * total / num_experts
    capacity = limit * (1 + ROUNDING)
    if torch.equal(count_V, count_V.floor()):
        capacity = float(math.floor(capacity)) or capacity  # below 1 every id is alone
    table_V = agreement_VE.argmax(-1)
    order_V, gap = count_V.argsort(descending=True, stable=True), 0.0
    alone = order_V[: int((count_V > capacity).sum()) if num_experts > 1 else 0]
    weight_V = count_V.index_fill(0, alone, capacity)
    if num_experts > 1 and table_load(table_V, weight_V, num_experts).max() > capacity:
        # The weight of lighter ids is lost in the rounding of the loads.
        heavy_V = order_V[: int((count_V > 1e-16 * total / num_ids).sum())]
        capacity_E = torch.full((num_experts,), capacity, dtype=torch.float64)
        problem = Problem(agreement_VE[heavy_V], weight_V[heavy_V], capacity_E)
        solved_V, gap, raised = solve_or_raise(problem, len(alone), node_limit)
        table_V, limit = table_V.index_copy(0, heavy_V, solved_V), max(limit, raised)
    return _describe(agreement_VE, count_V, table_V, gap, limit, alone)


def _describe(
    agreement_VE: Tensor, count_V: Tensor, table_V: Tensor, gap: float, limit: float, alone: Tensor
) -> BalancedTable:
    kept, best = agreement_VE.gather(1, table_V.unsqueeze(-1)).sum().item(), agreement_VE.amax(-1).sum().item()
    load_E = table_load(table_V, count_V, agreement_VE.shape[1])
    # Loads may be above the limit by rounding errors.
    limit = max(limit, load_E.index_fill(0, table_V[alone], 0.0).max().item())
    return BalancedTable(table_V, kept, best, max(kept, min(kept + gap, best)), limit, load_E, alone)


@torch.no_grad()
def balanced_table_in_bands(
    agreement: Tensor, token_counts: Tensor, max_load: float, num_bands: int, node_limit: int = 20000
) -> BalancedTable:
    """Choose a table that is balanced among the frequent ids, among the less frequent ones, and so on to the rarest.

    A few ids are a large part of any text. A load within its limit says nothing of how they are spread: an expert that
    serves several of them has little left for rare ids. So ids are cut into bands, each with as many tokens, and
    placed band by band, the most frequent first. After every band no expert has more than `max_load` times the mean
    of the tokens placed so far, but for one of an id that alone is more: that shares its expert with nothing until the
    others have caught up. Within a band the table is chosen as in `balanced_table`, given those before.

    Args:
        agreement (`torch.Tensor` of shape `(V, E)`): see `balanced_table`.
        token_counts (`torch.Tensor` of shape `(V,)`): see `balanced_table`.
        max_load (`float`): see `balanced_table`.
        num_bands (`int`): >= 1; with 1 this is `balanced_table`.
        node_limit (`int`, *optional*, defaults to 20000): see `balanced_table`; for each band.

    Returns:
        `BalancedTable`, on the CPU. Its `bound` is of tables that hold the same ids of heavier bands.

    Raises:
        ValueError: see `balanced_table`; also for fewer than one band.
    """
    if num_bands < 1:
        raise ValueError(f"`num_bands` is {num_bands}; pass an integer >= 1.")
    count_V = token_counts.detach().cpu().double()
    if num_bands == 1 or agreement.shape[-1:] == (1,) or not count_V.sum() > 0:
        return balanced_table(agreement, token_counts, max_load, node_limit)
    check(agreement, token_counts, max_load)
    agreement_VE, num_experts = agreement.detach().cpu().double(), agreement.shape[1]
    order_V = count_V.argsort(descending=True, stable=True)
    share_V = count_V[order_V].cumsum(0) / count_V.sum()
    band_V = (share_V * num_bands).ceil().clamp(1, num_bands).long()
    table_V, load_E = agreement_VE.argmax(-1), torch.zeros(num_experts, dtype=torch.float64)
    placed, gaps, limit = 0.0, 0.0, 0.0
    for band in band_V.unique().tolist():
        ids = order_V[(band_V == band) & (count_V[order_V] > 0)]
        placed += count_V[ids].sum().item()
        band_table, gap, limit = place_band(
            agreement_VE[ids], count_V[ids], load_E, max_load * placed / num_experts, node_limit
        )
        table_V[ids] = band_table
        load_E, gaps = load_E + table_load(band_table, count_V[ids], num_experts), gaps + gap
    alone = order_V[: int((count_V > max_load * placed / num_experts * (1 + ROUNDING)).sum())]
    return _describe(agreement_VE, count_V, table_V, gaps, limit, alone)


def place_band(
    agreement_VE: Tensor, weight_V: Tensor, load_E: Tensor, limit: float, node_limit: int
) -> tuple[Tensor, float, float]:
    """Place ids in descending weight beside the loads that are there.

    Returns:
        Their table, `(V,)`; how much more another one may keep at most; the limit, raised to what the greedy packing
        needs where that is more, but for ids that alone outweigh it.
    """
    heap = [(tokens, expert) for expert, tokens in enumerate(load_E.tolist())]
    heapq.heapify(heap)
    num_alone = int((weight_V > limit * (1 + ROUNDING)).sum())
    packed, needed = [], 0.0
    for token, weight in enumerate(weight_V.tolist()):
        tokens, expert = heap[0]
        packed.append(expert)
        if token < num_alone:  # on an empty expert: no heavier id can have shared one
            heapq.heapreplace(heap, (math.inf, expert))
        else:
            heapq.heapreplace(heap, (tokens + weight, expert))
            needed = max(needed, tokens + weight)
    limit = max(limit, needed)
    capacity = limit * (1 + ROUNDING)
    alone = torch.arange(num_alone)
    problem = Problem(agreement_VE, weight_V.index_fill(0, alone, capacity), (capacity - load_E).clamp(min=0.0))
    table_V, gap = Search(problem, torch.tensor(packed), node_limit).run()
    return table_V, gap, limit


__all__ = ["BalancedTable", "balanced_table", "balanced_table_in_bands"]
