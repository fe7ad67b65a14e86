# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""A table from token ids to experts that keeps every expert within a load, and most tokens where they would go.

An id has one expert, or K distinct ones.

A generalised assignment problem in which an id weighs the same on every expert. With a price per token on every expert
(`prices`), ids go to their best expert, heavy ones first, while there is room. As a heavy id lies on one expert as a
whole, which prices cannot tell, they are found again for the ids that are left, after the first id and then each time
that the number of placed ids has grown by a share of `GROWTHS`; and of a table in which the heaviest ids go where most is left
to be kept by the others, and one in which they do not look ahead, the better one is taken. At last ids move, or two change places, as long as that brings
something. The dual at the first prices bounds what any table can keep.

An id that alone outweighs the limit cannot keep to it on any expert. It counts as heavy as the limit: so it fills an
expert of its own, or K of them, and the others keep to the limit on theirs.

Shape suffixes: V token ids, E experts, K experts of an id, C ids on one of their experts, that may change places.
"""

import heapq
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from modeling_stablemoe.model.frozen_stablemoe import BalancedTable
from modeling_stablemoe.model.tensors_stablemoe import best_experts

from .prices import newton_prices, soft_top_k, table_load


# Ids per chunk; keeps what is computed for them in the cache.
CHUNK = 8192
# The last temperature blurs the dual by this share of it: of the bound, and of prices found again.
BOUND_BLUR, BLUR = 3e-6, 1e-3
MOST_STEPS = 80
# Prices found again change little, so they begin at this temperature, as a share of the first one.
WARM = 1 / 16
# Which is best differs from problem to problem: all are tried. With several experts, or so many ids that prices are found of a
# sample, the last loses 0.1 % of the agreement at most and takes a fourth of the time; the other is for when it finds no table.
GROWTHS = (1.1, 1.5)
# Ids heavier than this share of an expert may look ahead on so many experts.
HEAVY, CANDIDATES = 1 / 4, 3
# All pairs of so many places of ids are looked at when places are changed, so often.
MOST_EXCHANGING = 500
MOST_EXCHANGES = 60
# Prices are found for so many agreements at most: half of them the heaviest ids', and a sample of the others'. That is all up to
# 16 384 ids of 128 experts, or 131 072 of 16; with more the many rare ids would take nearly all the time, and move prices little.
PRICED = 2**21
# ... or so many ids for each expert, where that is more: the demand for it is told from its share of them.
PRICED_PER_EXPERT = 64
# Stands in for the hesitation of an id that has none.
TINY = 1e-30
# Sums of the same numbers in another order differ by less, relatively.
ROUNDING = 1e-12


class Problem(NamedTuple):
    """Ids of weight > 0 in descending weight, and the tokens that each expert can take."""

    agreement_VE: Tensor
    weight_V: Tensor
    capacity_E: Tensor
    k: int  # experts of an id; fewer than there are

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the agreement and the weight of some ids after the other."""
        return zip(self.agreement_VE.split(CHUNK), self.weight_V.split(CHUNK), strict=True)

    def dual(self, price_E: Tensor) -> float:
        """No table within the capacity keeps more."""
        best = sum(
            best_agreement(agreement - weight.unsqueeze(-1) * price_E, self.k) for agreement, weight in self.chunks()
        )
        return best + (self.capacity_E @ price_E).item()

    def kept(self, table_VK: Tensor) -> float:
        """Sum of the agreement under a table."""
        return self.agreement_VE.gather(1, table_VK).sum().item()

    def prices(self, start_E: Tensor, hottest: float, blur: float) -> Iterator[Tensor]:
        """Yield prices, `(E,)`, of ever smaller dual.

        Args:
            start_E (`torch.DoubleTensor` of shape `(E,)`): to begin with.
            hottest (`float`): temperature to begin with, as a share of the largest difference of two values.
            blur (`float`): share of the agreement that the last temperature blurs.
        """
        num_experts, total = len(self.capacity_E), self.k * self.weight_V.sum().item()
        # Only the dual must be exact.
        parts = [((agreement / weight.unsqueeze(-1)).float(), weight.float()) for agreement, weight in self.chunks()]
        # Of the last step: to begin anew with every step would take longer than all the rest.
        thresholds: list[Tensor | None] = [None] * len(parts)

        def demand(price_E: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
            load_E, shared_EE = torch.zeros_like(price_E), torch.zeros(num_experts, num_experts, dtype=torch.float64)
            for number, (value, weight) in enumerate(parts):
                reduced = (value - price_E.float()) / temperature
                if self.k == 1:
                    chosen = reduced.softmax(-1)
                else:
                    last = thresholds[number]
                    chosen, found = soft_top_k(reduced, self.k, None if last is None else last / temperature)
                    thresholds[number] = found * temperature
                weighed = chosen * weight.unsqueeze(-1)
                load_E += weighed.sum(0)
                if self.k == 1:
                    shared_EE += chosen.T @ weighed
                    continue
                hesitant = chosen * (1 - chosen)
                moved = hesitant * (weight / hesitant.sum(-1).clamp(min=TINY)).unsqueeze(-1)
                shared_EE += hesitant.T @ moved + (chosen * weighed).sum(0).diag()
            return load_E, shared_EE

        widest = max((value.amax(-1) - value.amin(-1)).max().item() for value, _ in parts)
        coldest = blur * best_agreement(self.agreement_VE, self.k) / (total * math.log(num_experts))
        prices = newton_prices(demand, self.capacity_E, total / num_experts, start_E, hottest * widest, True)
        for _, (price_E, temperature) in zip(range(MOST_STEPS), prices, strict=False):
            yield price_E
            if temperature <= coldest:
                break

    def sampled(self) -> "Problem":
        """Keep the heaviest ids, and let some of the lighter ones stand for all, each for as many tokens."""
        num_experts = len(self.capacity_E)
        num_kept = max(PRICED // num_experts, PRICED_PER_EXPERT * num_experts) // 2
        if len(self.weight_V) <= 2 * num_kept:
            return self
        passed_V = self.weight_V[num_kept:].cumsum(0)
        weight = passed_V[-1] / num_kept
        ids = num_kept + torch.searchsorted(passed_V, (torch.arange(num_kept) + 0.5) * weight)
        share_VE = self.agreement_VE[ids] * (weight / self.weight_V[ids]).unsqueeze(-1)
        agreement_VE = torch.cat([self.agreement_VE[:num_kept], share_VE])
        weight_V = torch.cat([self.weight_V[:num_kept], weight.expand(num_kept)])
        return Problem(agreement_VE, weight_V, self.capacity_E, self.k)

    def without(self, table_VK: Tensor) -> "Problem":
        """Leave out the heaviest ids, which lie on the given experts."""
        placed = len(table_VK)
        room_E = self.capacity_E - table_load(table_VK, self.weight_V[:placed], len(self.capacity_E))
        return Problem(self.agreement_VE[placed:], self.weight_V[placed:], room_E, self.k)


def best_agreement(agreement_VE: Tensor, k: int) -> float:
    """Sum of the k best of each row."""
    best_V = agreement_VE.amax(-1) if k == 1 else agreement_VE.topk(k).values.sum(-1)
    return best_V.sum().item()


def place_ahead(problem: Problem, price_E: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the experts of the heaviest id, `(K,)`, on which most can be kept in all, and the others' prices.

    None without room.
    """
    value_E = problem.agreement_VE[0] - problem.weight_V[0] * price_E
    value_E = value_E.masked_fill(problem.capacity_E < problem.weight_V[0], -math.inf)
    found = []
    first, last = value_E.argsort(descending=True, stable=True)[: problem.k - 1 + CANDIDATES].tensor_split(
        [problem.k - 1]
    )
    for expert in last.tolist():
        if value_E[expert] > -math.inf:
            expert_K = torch.cat([first, last.new_tensor([expert])])
            rest = problem.without(expert_K.unsqueeze(0))
            *_, rest_price_E = rest.prices(price_E, WARM, BLUR)
            kept = problem.agreement_VE[0, expert_K].sum().item() + rest.dual(rest_price_E)
            found.append((kept, expert_K, rest_price_E))
    return max(found, key=lambda each: each[0])[1:] if found else None


def place_heavy(problem: Problem, price_E: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Place the heaviest ids with `place_ahead`; return their table, `(count, K)`, and the others' prices.

    None where one has no room.
    """
    table_VK = torch.zeros(0, problem.k, dtype=torch.long)
    for _ in range(count):
        ahead = place_ahead(problem.without(table_VK).sampled(), price_E)
        if ahead is None:
            return None
        expert_K, price_E = ahead
        table_VK = torch.cat([table_VK, expert_K.unsqueeze(0)])
    return table_VK, price_E


def fill(problem: Problem, placed_VK: Tensor, price_E: Tensor, growth: float) -> Tensor | None:
    """Place all other ids, the heaviest first, each on its best experts with room; return the table, None where one has none.

    Args:
        problem (`Problem`): the ids.
        placed_VK (`torch.LongTensor` of shape `(C, K)`): experts of the heaviest, that are placed; fewer than all.
        price_E (`torch.DoubleTensor` of shape `(E,)`): to begin with.
        growth (`float`): of the number of placed ids before prices are found again.
    """
    k = problem.k
    table, num_placed = [placed_VK], len(placed_VK)
    while num_placed < len(problem.weight_V):
        rest = problem.without(torch.cat(table))
        if len(table) > 1:
            *_, price_E = rest.sampled().prices(price_E, WARM, BLUR)
        count = math.ceil((growth - 1) * num_placed) or 1
        value_VE = rest.agreement_VE[:count] - rest.weight_V[:count].unsqueeze(-1) * price_E
        best = value_VE.topk(k + 1, dim=-1)
        room, chosen, weights = rest.capacity_E.tolist(), best.indices[:, :k].tolist(), rest.weight_V[:count].tolist()
        # Of ids of about one weight, those that would lose most elsewhere choose first.
        regret_V = (best.values[:, k - 1] - best.values[:, k]) / rest.weight_V[:count]
        for token in regret_V.argsort(descending=True, stable=True).tolist():
            weight = weights[token]
            if any(room[expert] < weight for expert in chosen[token]):
                roomy = [other for other, left in enumerate(room) if left >= weight]
                if len(roomy) < k:
                    return None
                chosen[token] = heapq.nlargest(k, roomy, key=value_VE[token].tolist().__getitem__)
            for expert in chosen[token]:
                room[expert] -= weight
        table.append(torch.tensor(chosen))
        num_placed += len(chosen)
    return torch.cat(table)


def improve(problem: Problem, table_VK: Tensor, price_E: Tensor) -> Tensor:
    """Let ids move from one expert to another, or two ids change places, as long as that brings something."""
    num_experts, k = len(problem.capacity_E), problem.k
    # Those that lose little at the prices, or lie elsewhere than on their best experts.
    value_VE = problem.agreement_VE - problem.weight_V.unsqueeze(-1) * price_E
    best = value_VE.topk(k + 1, dim=-1)
    is_best_VK = (table_VK.unsqueeze(-1) == best.indices[:, None, :k]).any(-1)
    regret_VK = (value_VE.gather(1, table_VK) - best.values[:, k:]).masked_fill(~is_best_VK, -1.0)
    places_C = regret_VK.flatten().argsort(stable=True)[:MOST_EXCHANGING]
    tokens_C = places_C // k
    # An id of no weight on every expert, that stays, makes a move an exchange.
    nothing_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    agreement_CE = torch.cat([problem.agreement_VE[tokens_C], nothing_EE])
    weight_C = torch.cat([problem.weight_V[tokens_C], nothing_EE[0]])
    room_E = problem.capacity_E - table_load(table_VK, problem.weight_V, num_experts)
    least = ROUNDING * problem.kept(table_VK)
    table_VK = table_VK.clone()
    for _ in range(MOST_EXCHANGES):
        # The experts that an id already has.
        taken_CE = torch.zeros(len(tokens_C), num_experts, dtype=torch.bool).scatter(1, table_VK[tokens_C], True)
        taken_CE = torch.cat([taken_CE, nothing_EE.bool()])
        expert_C = torch.cat([table_VK.flatten()[places_C], torch.arange(num_experts)])
        is_better = exchange(agreement_CE, weight_C, expert_C, taken_CE, room_E, least)
        table_VK.view(-1)[places_C] = expert_C[:-num_experts]
        if not is_better:
            break
    return table_VK


def exchange(
    agreement_CE: Tensor, weight_C: Tensor, expert_C: Tensor, taken_CE: Tensor, room_E: Tensor, least: float
) -> bool:
    """Make the best exchanges, each expert in one at most, in place; return True if any brought more than `least`."""
    num_experts = len(room_E)
    gain_CE = agreement_CE - agreement_CE.gather(1, expert_C.unsqueeze(-1))
    gain_CE = gain_CE.masked_fill(taken_CE, -math.inf)
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


def place(problem: Problem, packed_VK: Tensor | None) -> tuple[Tensor, float] | None:
    """Find a table within the capacity that keeps much.

    Args:
        problem (`Problem`): the ids.
        packed_VK (`torch.LongTensor` of shape `(V, K)`, *optional*): a table within the capacity, to fall back on.

    Returns:
        The table, `(V, K)`, and how much more another one may keep at most; None where no table is found.
    """
    table_VK = best_experts(problem.agreement_VE, problem.k).view(-1, problem.k)
    if (table_load(table_VK, problem.weight_V, len(problem.capacity_E)) <= problem.capacity_E).all():
        return table_VK, 0.0
    priced = problem.sampled()
    price_E = min(priced.prices(torch.zeros_like(problem.capacity_E), 1.0, BOUND_BLUR), key=priced.dual)
    num_heavy = int((problem.weight_V[:-1] > HEAVY * problem.capacity_E.max()).sum())
    starts = [start for count in {0, num_heavy} if (start := place_heavy(problem, price_E, count)) is not None]
    tables = []
    for growth in reversed(GROWTHS):
        tables = [table_VK for start in starts if (table_VK := fill(problem, *start, growth)) is not None] + tables
        if tables and (problem.k > 1 or priced is not problem):
            break
    tables = tables or ([] if packed_VK is None else [packed_VK])
    if not tables:
        return None
    table_VK = max((improve(problem, table_VK, price_E) for table_VK in tables), key=problem.kept)
    return table_VK, max(0.0, problem.dual(price_E) - problem.kept(table_VK))


def pack_greedily(weight_V: Tensor, load_E: Tensor, num_alone: int, k: int) -> tuple[Tensor, float]:
    """Put each id, the heaviest first, on the k experts with the least load, the first `num_alone` on some of their own.

    Returns:
        The table, `(V, K)`, and the largest load of the experts that ids share.
    """
    heap = [(tokens, expert) for expert, tokens in enumerate(load_E.tolist())]
    heapq.heapify(heap)
    table, needed = [], 0.0
    for token, weight in enumerate(weight_V.tolist()):
        least = [heapq.heappop(heap) for _ in range(k)]
        table.append([expert for _, expert in least])
        is_alone = token < num_alone  # on empty experts: no heavier id can have shared one
        for load, expert in least:
            heapq.heappush(heap, (math.inf if is_alone else load + weight, expert))
        if not is_alone:
            needed = max(needed, least[-1][0] + weight)
    return torch.tensor(table, dtype=torch.long), needed


def place_band(
    agreement_VE: Tensor, weight_V: Tensor, load_E: Tensor, limit: float, whole: bool, k: int
) -> tuple[Tensor, float, float]:
    """Place ids in descending weight beside the loads that are there.

    Returns:
        Their table, `(V, K)`; how much more another one may keep at most; the limit, raised to what the greedy packing
        needs where no table is found within it.
    """
    num_alone = int((weight_V > limit * (1 + ROUNDING)).sum())
    # With few experts those of an id's own may leave the others fewer than k: so many ids cannot be alone.
    num_alone = min(num_alone, max(0, int((load_E == 0).sum()) // k - (num_alone < len(weight_V))))
    packed_VK, needed = pack_greedily(weight_V, load_E, num_alone, k)
    while True:
        capacity = limit * (1 + ROUNDING)
        if whole:
            capacity = float(math.floor(capacity)) or capacity  # below 1 every id is alone
        weight_V = weight_V.index_fill(0, torch.arange(num_alone), capacity)
        problem = Problem(agreement_VE, weight_V, (capacity - load_E).clamp(min=0.0), k)
        placed = place(problem, packed_VK if needed <= capacity else None)
        if placed is not None:
            return *placed, limit
        limit = needed


@torch.no_grad()
def balanced_table(
    agreement: Tensor, token_counts: Tensor, max_load: float, num_bands: int = 1, k: int = 1
) -> BalancedTable:
    """Choose the experts of each token id so that most tokens agree, and no expert gets too many.

    The limit is `max_load` times the mean load, a token counting on each of its `k` experts. An id that alone outweighs
    it gets `k` experts of its own, as long as that leaves `k` for the others, as it always does with one. Where no table is found in which the others keep to the limit, it is raised to what the
    greedy packing of them needs: heaviest id first, each to the experts with the least load. Ids that weigh nothing go to
    their best experts, the first among equals. The same numbers give the same table.

    A few ids are a large part of any text. A load within its limit says nothing of how they are spread: an expert that
    serves several of them has little left for rare ids. So ids can be cut into bands, each with as many tokens, and
    placed band by band, the most frequent first. After every band no expert has more than `max_load` times the mean
    of the tokens placed so far, but for one of an id that alone is more: that shares its expert with nothing until the
    others have caught up.

    Args:
        agreement (`torch.Tensor` of shape `(V, E)`): how many tokens of the id agree if it goes to the expert; >= 0. That
            of several experts is the sum.
        token_counts (`torch.Tensor` of shape `(V,)`): how often each id occurs; >= 0, whole numbers or not.
        max_load (`float`): tokens allowed on one expert, in mean loads; >= 1.
        num_bands (`int`): >= 1; with 1 frequent and rare ids are placed together.
        k (`int`): experts of a token, all different, in [1, E].

    Returns:
        `BalancedTable`, on the CPU, with a table `(V,)` for one expert, `(V, k)`, best first, for more. Its `bound` is of tables that hold the same ids of heavier bands.

    Raises:
        ValueError: where shapes do not match, there are no experts, a number is negative or not finite, `max_load` is
            below 1, there are fewer bands than one, or `k` is not in [1, E].
    """
    _check(agreement, token_counts, max_load, num_bands, k)
    agreement_VE, count_V = agreement.detach().cpu().double(), token_counts.detach().cpu().double()
    (num_ids, num_experts), total = agreement_VE.shape, count_V.sum().item()
    order_V = count_V.argsort(descending=True, stable=True)
    # The weight of lighter ids is lost in the rounding of the loads.
    heavy_V = order_V[: int((count_V > 1e-16 * total / max(1, num_ids)).sum()) if num_experts > k else 0]
    band_V = (count_V[heavy_V].cumsum(0) / total * num_bands).ceil().clamp(1, num_bands)
    table_VK, load_E = best_experts(agreement_VE, k).view(-1, k), torch.zeros(num_experts, dtype=torch.float64)
    placed, gap, limit = 0.0, 0.0, max_load * k * total / num_experts
    above_V = order_V[: int((count_V > limit * (1 + ROUNDING)).sum()) if num_experts > k else 0]
    for band in band_V.unique().tolist():
        ids = heavy_V[band_V == band]
        placed += count_V[ids].sum().item()
        share = max_load * k * placed / num_experts if num_bands > 1 else limit
        table_VK[ids], more, limit = place_band(
            agreement_VE[ids], count_V[ids], load_E, share, torch.equal(count_V, count_V.floor()), k
        )
        load_E, gap = load_E + table_load(table_VK[ids], count_V[ids], num_experts), gap + more
    kept, best = agreement_VE.gather(1, table_VK).sum().item(), best_agreement(agreement_VE, k)
    load_E = table_load(table_VK, count_V, num_experts)
    shares_V = load_E[table_VK[above_V]].amax(-1) > count_V[above_V] * (1 + ROUNDING)
    alone_V = above_V[~shares_V]
    # Loads may be above the limit by rounding errors.
    limit = max(limit, load_E.index_fill(0, table_VK[alone_V].flatten(), 0.0).max().item())
    if k == 1:
        table = table_VK.squeeze(-1)
    else:
        table = table_VK.gather(1, best_experts(agreement_VE.gather(1, table_VK), k).view(-1, k))
    return BalancedTable(table, kept, best, max(kept, min(kept + gap, best)), limit, load_E, alone_V)


def _check(agreement: Tensor, token_counts: Tensor, max_load: float, num_bands: int, k: int) -> None:
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
    if not 1 <= k <= agreement.shape[1]:
        raise ValueError(f"`k` is {k}; pass an integer from 1 to the number of experts, {agreement.shape[1]}.")


__all__ = ["BalancedTable", "balanced_table"]
