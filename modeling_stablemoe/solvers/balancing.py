# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""A table from token ids to experts that keeps every expert within a load, and most tokens where they would go.

A generalised assignment problem in which an id weighs the same on every expert. With a price per token on every expert
(`prices`), ids go to their best expert, heavy ones first, while there is room. As a heavy id lies on one expert as a
whole, which prices cannot tell, they are found again for the ids that are left, after the first id and then each time
that the number of placed ids has grown by a share of `GROWTHS`; and of a table in which the heaviest ids go where most is left
to be kept by the others, and one in which they do not look ahead, the better one is taken. At last ids move, or two change places, as long as that brings
something. The dual at the first prices bounds what any table can keep.

An id that alone outweighs the limit cannot keep to it on any expert. It counts as heavy as the limit: so it fills an
expert of its own, and the others keep to the limit on theirs.

Shape suffixes: V token ids, E experts, C ids that may change places.
"""

import heapq
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from modeling_stablemoe.model.frozen_stablemoe import BalancedTable

from .prices import newton_prices, table_load


# Ids per chunk; keeps what is computed for them in the cache.
CHUNK = 8192
# The last temperature blurs the dual by this share of it: of the bound, and of prices found again.
BOUND_BLUR, BLUR = 3e-6, 1e-3
MOST_STEPS = 80
# Prices found again change little, so they begin at this temperature, as a share of the first one.
WARM = 1 / 16
# Which is best differs from problem to problem: all are tried.
GROWTHS = (1.1, 1.5)
# Ids heavier than this share of an expert may look ahead on so many experts.
HEAVY, CANDIDATES = 1 / 4, 3
# All pairs of so many ids are looked at when places are changed, so often.
MOST_EXCHANGING = 500
MOST_EXCHANGES = 60
# Sums of the same numbers in another order differ by less, relatively.
ROUNDING = 1e-12


class Problem(NamedTuple):
    """Ids of weight > 0 in descending weight, and the tokens that each expert can take."""

    agreement_VE: Tensor
    weight_V: Tensor
    capacity_E: Tensor

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the agreement and the weight of some ids after the other."""
        return zip(self.agreement_VE.split(CHUNK), self.weight_V.split(CHUNK), strict=True)

    def dual(self, price_E: Tensor) -> float:
        """No table within the capacity keeps more."""
        best = sum(
            (agreement - weight.unsqueeze(-1) * price_E).amax(-1).sum().item() for agreement, weight in self.chunks()
        )
        return best + (self.capacity_E @ price_E).item()

    def kept(self, table_V: Tensor) -> float:
        """Sum of the agreement under a table."""
        return self.agreement_VE.gather(1, table_V.unsqueeze(-1)).sum().item()

    def prices(self, start_E: Tensor, hottest: float, blur: float) -> Iterator[Tensor]:
        """Yield prices, `(E,)`, of ever smaller dual.

        Args:
            start_E (`torch.DoubleTensor` of shape `(E,)`): to begin with.
            hottest (`float`): temperature to begin with, as a share of the largest difference of two values.
            blur (`float`): share of the agreement that the last temperature blurs.
        """
        num_experts, total = len(self.capacity_E), self.weight_V.sum().item()
        # Only the dual must be exact.
        parts = [((agreement / weight.unsqueeze(-1)).float(), weight.float()) for agreement, weight in self.chunks()]

        def demand(price_E: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
            load_E, shared_EE = torch.zeros_like(price_E), torch.zeros(num_experts, num_experts, dtype=torch.float64)
            for value, weight in parts:
                chosen = ((value - price_E.float()) / temperature).softmax(-1)
                weighed = chosen * weight.unsqueeze(-1)
                load_E += weighed.sum(0)
                shared_EE += chosen.T @ weighed
            return load_E, shared_EE

        widest = max((value.amax(-1) - value.amin(-1)).max().item() for value, _ in parts)
        coldest = blur * self.agreement_VE.amax(-1).sum().item() / (total * math.log(num_experts))
        prices = newton_prices(demand, self.capacity_E, total / num_experts, start_E, hottest * widest, True)
        for _, (price_E, temperature) in zip(range(MOST_STEPS), prices, strict=False):
            yield price_E
            if temperature <= coldest:
                break

    def without(self, table_V: Tensor) -> "Problem":
        """Leave out the heaviest ids, which lie on the given experts."""
        room_E = self.capacity_E - table_load(table_V, self.weight_V[: len(table_V)], len(self.capacity_E))
        return Problem(self.agreement_VE[len(table_V) :], self.weight_V[len(table_V) :], room_E)


def place_ahead(problem: Problem, price_E: Tensor) -> tuple[int, Tensor] | None:
    """Return the expert of the heaviest id on which most can be kept in all, and the others' prices; None without room."""
    value_E = problem.agreement_VE[0] - problem.weight_V[0] * price_E
    value_E = value_E.masked_fill(problem.capacity_E < problem.weight_V[0], -math.inf)
    found = []
    for expert in value_E.argsort(descending=True, stable=True)[:CANDIDATES].tolist():
        if value_E[expert] > -math.inf:
            rest = problem.without(torch.tensor([expert]))
            *_, rest_price_E = rest.prices(price_E, WARM, BLUR)
            found.append((problem.agreement_VE[0, expert].item() + rest.dual(rest_price_E), expert, rest_price_E))
    return max(found, key=lambda each: each[0])[1:] if found else None


def fill(problem: Problem, price_E: Tensor, growth: float, num_ahead: int) -> Tensor | None:
    """Place all ids, the heaviest first, each on its best expert with room; return the table, None where one has none.

    Args:
        problem (`Problem`): the ids.
        price_E (`torch.DoubleTensor` of shape `(E,)`): to begin with.
        growth (`float`): of the number of placed ids before prices are found again.
        num_ahead (`int`): ids that look ahead; fewer than all.
    """
    table, num_placed = [torch.zeros(0, dtype=torch.long)], 0
    while num_placed < len(problem.weight_V):
        rest = problem.without(torch.cat(table))
        if num_placed < num_ahead:
            if (ahead := place_ahead(rest, price_E)) is None:
                return None
            expert, price_E = ahead
            table.append(torch.tensor([expert]))
            num_placed += 1
            continue
        if num_placed > num_ahead:
            *_, price_E = rest.prices(price_E, WARM, BLUR)
        count = math.ceil((growth - 1) * num_placed) or 1
        value_VE = rest.agreement_VE[:count] - rest.weight_V[:count].unsqueeze(-1) * price_E
        best = value_VE.topk(2, dim=-1)
        room, chosen, weights = rest.capacity_E.tolist(), best.indices[:, 0].tolist(), rest.weight_V[:count].tolist()
        # Of ids of about one weight, those that would lose most elsewhere choose first.
        regret_V = (best.values[:, 0] - best.values[:, 1]) / rest.weight_V[:count]
        for token in regret_V.argsort(descending=True, stable=True).tolist():
            expert, weight = chosen[token], weights[token]
            if room[expert] < weight:
                roomy = [other for other, left in enumerate(room) if left >= weight]
                if not roomy:
                    return None
                expert = chosen[token] = max(roomy, key=value_VE[token].tolist().__getitem__)
            room[expert] -= weight
        table.append(torch.tensor(chosen))
        num_placed += len(chosen)
    return torch.cat(table)


def improve(problem: Problem, table_V: Tensor, price_E: Tensor) -> Tensor:
    """Let ids move, or two ids change places, as long as that brings something."""
    num_experts = len(problem.capacity_E)
    # Those that lose little at the prices, or lie elsewhere than on their best expert.
    value_VE = problem.agreement_VE - problem.weight_V.unsqueeze(-1) * price_E
    best = value_VE.topk(2, dim=-1)
    regret_V = (best.values[:, 0] - best.values[:, 1]).masked_fill(table_V != best.indices[:, 0], -1.0)
    tokens_C = regret_V.argsort(stable=True)[:MOST_EXCHANGING]
    # An id of no weight on every expert, that stays, makes a move an exchange.
    nothing_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    agreement_CE = torch.cat([problem.agreement_VE[tokens_C], nothing_EE])
    weight_C = torch.cat([problem.weight_V[tokens_C], nothing_EE[0]])
    expert_C = torch.cat([table_V[tokens_C], torch.arange(num_experts)])
    room_E = problem.capacity_E - table_load(table_V, problem.weight_V, num_experts)
    least = ROUNDING * problem.kept(table_V)
    for _ in range(MOST_EXCHANGES):
        if not exchange(agreement_CE, weight_C, expert_C, room_E, least):
            break
    return table_V.index_copy(0, tokens_C, expert_C[:-num_experts])


def exchange(agreement_CE: Tensor, weight_C: Tensor, expert_C: Tensor, room_E: Tensor, least: float) -> bool:
    """Make the best exchanges, each expert in one at most, in place; return True if any brought more than `least`."""
    num_experts = len(room_E)
    gain_CE = agreement_CE - agreement_CE.gather(1, expert_C.unsqueeze(-1))
    gain_CC = gain_CE[:, expert_C]
    gain_CC = gain_CC + gain_CC.T
    # The row goes where the column was.
    more_CC = weight_C.unsqueeze(-1) - weight_C
    fits_CC = more_CC <= room_E[expert_C]
    gain_CC[~(fits_CC & fits_CC.T)] = 0.0
    gains_C, partner_C = gain_CC.max(-1)
    touched = set()
    for token in gains_C.argsort(descending=True, stable=True).tolist():
        if gains_C[token] <= least:
            break
        other = partner_C[token].item()
        source, target = expert_C[token].item(), expert_C[other].item()
        if source in touched or target in touched:
            continue
        touched.update((source, target))
        more = weight_C[token] - weight_C[other]
        room_E[source] += more
        room_E[target] -= more
        expert_C[token], expert_C[other] = target, source
        # The ids of no weight stay.
        expert_C[-num_experts:] = torch.arange(num_experts)
    return bool(touched)


def place(problem: Problem, packed_V: Tensor | None) -> tuple[Tensor, float] | None:
    """Find a table within the capacity that keeps much.

    Args:
        problem (`Problem`): the ids.
        packed_V (`torch.LongTensor` of shape `(V,)`, *optional*): a table within the capacity, to fall back on.

    Returns:
        The table, `(V,)`, and how much more another one may keep at most; None where no table is found.
    """
    table_V = problem.agreement_VE.argmax(-1)
    if (table_load(table_V, problem.weight_V, len(problem.capacity_E)) <= problem.capacity_E).all():
        return table_V, 0.0
    price_E = min(problem.prices(torch.zeros_like(problem.capacity_E), 1.0, BOUND_BLUR), key=problem.dual)
    num_heavy = int((problem.weight_V[:-1] > HEAVY * problem.capacity_E.max()).sum())
    ways = [(growth, num_ahead) for growth in GROWTHS for num_ahead in {0, num_heavy}]
    tables = [table_V for way in ways if (table_V := fill(problem, price_E, *way)) is not None]
    tables = tables or ([] if packed_V is None else [packed_V])
    if not tables:
        return None
    table_V = max((improve(problem, table_V, price_E) for table_V in tables), key=problem.kept)
    return table_V, max(0.0, problem.dual(price_E) - problem.kept(table_V))


def pack_greedily(weight_V: Tensor, load_E: Tensor, num_alone: int) -> tuple[Tensor, float]:
    """Put each id, the heaviest first, on the expert with the least load, the first `num_alone` on one of their own.

    Returns:
        The table, `(V,)`, and the largest load of the experts that ids share.
    """
    heap = [(tokens, expert) for expert, tokens in enumerate(load_E.tolist())]
    heapq.heapify(heap)
    table, needed = [], 0.0
    for token, weight in enumerate(weight_V.tolist()):
        load, expert = heap[0]
        table.append(expert)
        if token < num_alone:  # on an empty expert: no heavier id can have shared one
            heapq.heapreplace(heap, (math.inf, expert))
        else:
            heapq.heapreplace(heap, (load + weight, expert))
            needed = max(needed, load + weight)
    return torch.tensor(table, dtype=torch.long), needed


def place_band(
    agreement_VE: Tensor, weight_V: Tensor, load_E: Tensor, limit: float, whole: bool
) -> tuple[Tensor, float, float]:
    """Place ids in descending weight beside the loads that are there.

    Returns:
        Their table, `(V,)`; how much more another one may keep at most; the limit, raised to what the greedy packing
        needs where no table is found within it.
    """
    num_alone = int((weight_V > limit * (1 + ROUNDING)).sum())
    packed_V, needed = pack_greedily(weight_V, load_E, num_alone)
    while True:
        capacity = limit * (1 + ROUNDING)
        if whole:
            capacity = float(math.floor(capacity)) or capacity  # below 1 every id is alone
        weight_V = weight_V.index_fill(0, torch.arange(num_alone), capacity)
        problem = Problem(agreement_VE, weight_V, (capacity - load_E).clamp(min=0.0))
        placed = place(problem, packed_V if needed <= capacity else None)
        if placed is not None:
            return *placed, limit
        limit = needed


@torch.no_grad()
def balanced_table(agreement: Tensor, token_counts: Tensor, max_load: float, num_bands: int = 1) -> BalancedTable:
    """Choose the expert of each token id so that most tokens agree, and no expert gets too many.

    The limit is `max_load` times the mean load. An id that alone outweighs it, of which there are fewer than experts,
    gets an expert of its own. Where no table is found in which the others keep to the limit, it is raised to what the
    greedy packing of them needs: heaviest id first, each to the expert with the least load. Ids that weigh nothing go to
    their best expert, the first among equals. The same numbers give the same table.

    A few ids are a large part of any text. A load within its limit says nothing of how they are spread: an expert that
    serves several of them has little left for rare ids. So ids can be cut into bands, each with as many tokens, and
    placed band by band, the most frequent first. After every band no expert has more than `max_load` times the mean
    of the tokens placed so far, but for one of an id that alone is more: that shares its expert with nothing until the
    others have caught up.

    Args:
        agreement (`torch.Tensor` of shape `(V, E)`): how many tokens of the id agree if it goes to the expert; >= 0.
        token_counts (`torch.Tensor` of shape `(V,)`): how often each id occurs; >= 0, whole numbers or not.
        max_load (`float`): tokens allowed on one expert, in mean loads; >= 1.
        num_bands (`int`): >= 1; with 1 frequent and rare ids are placed together.

    Returns:
        `BalancedTable`, on the CPU. Its `bound` is of tables that hold the same ids of heavier bands.

    Raises:
        ValueError: where shapes do not match, there are no experts, a number is negative or not finite, `max_load` is
            below 1, or there are fewer bands than one.
    """
    _check(agreement, token_counts, max_load, num_bands)
    agreement_VE, count_V = agreement.detach().cpu().double(), token_counts.detach().cpu().double()
    (num_ids, num_experts), total = agreement_VE.shape, count_V.sum().item()
    order_V = count_V.argsort(descending=True, stable=True)
    # The weight of lighter ids is lost in the rounding of the loads.
    heavy_V = order_V[: int((count_V > 1e-16 * total / max(1, num_ids)).sum()) if num_experts > 1 else 0]
    band_V = (count_V[heavy_V].cumsum(0) / total * num_bands).ceil().clamp(1, num_bands)
    table_V, load_E = agreement_VE.argmax(-1), torch.zeros(num_experts, dtype=torch.float64)
    placed, gap, limit = 0.0, 0.0, max_load * total / num_experts
    for band in band_V.unique().tolist():
        ids = heavy_V[band_V == band]
        placed += count_V[ids].sum().item()
        share = max_load * placed / num_experts if num_bands > 1 else limit
        table_V[ids], more, limit = place_band(
            agreement_VE[ids], count_V[ids], load_E, share, torch.equal(count_V, count_V.floor())
        )
        load_E, gap = load_E + table_load(table_V[ids], count_V[ids], num_experts), gap + more
    alone_V = order_V[
        : int((count_V > max_load * total / num_experts * (1 + ROUNDING)).sum()) if num_experts > 1 else 0
    ]
    kept, best = agreement_VE.gather(1, table_V.unsqueeze(-1)).sum().item(), agreement_VE.amax(-1).sum().item()
    load_E = table_load(table_V, count_V, num_experts)
    # Loads may be above the limit by rounding errors.
    limit = max(limit, load_E.index_fill(0, table_V[alone_V], 0.0).max().item())
    return BalancedTable(table_V, kept, best, max(kept, min(kept + gap, best)), limit, load_E, alone_V)


def _check(agreement: Tensor, token_counts: Tensor, max_load: float, num_bands: int) -> None:
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
    if num_bands < 1:
        raise ValueError(f"`num_bands` is {num_bands}; pass an integer >= 1.")


__all__ = ["BalancedTable", "balanced_table"]
