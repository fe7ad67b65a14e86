# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The best table from token ids to experts that keeps every expert within a load.

A generalised assignment problem in which an id weighs the same on every expert: choose the expert of each id so that
most tokens stay where they would go, and no expert gets more than its limit of tokens.

1. Every expert has a price p_i >= 0 per token. Whatever the prices, no table within the limit keeps more than
   D(p) = sum_v max_i (agreement_vi - w_v p_i) + limit * sum_i p_i. Newton's method on the smoothed D, as for the
   prices of `assignment_stablemoe`, then exact steps of one price at a time make that bound small.
2. Ids go to their best expert at these prices, heavy ones first, while there is room; then they change places as long
   as that brings something.
3. An id's regret is what it loses at these prices on another expert than its best one. Any table keeps D(p) less the
   regrets, less the prices of the room left over. So only ids with a regret below D(p) less what is kept can change
   in a better table; a branch and bound over these proves that there is none, where its nodes suffice.
4. Prices cannot tell that an id, if heavy, lies on one expert as a whole. Where a gap is left, the heaviest ids are
   placed in all ways, the most promising first, and 1 to 3 repeated for the others.

Shape suffixes: V token ids, E experts, C ids that may change.
"""

import heapq
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


# Ids per chunk; keeps what is computed for them in the cache.
CHUNK = 8192
# Keeps the equations solvable where few tokens hesitate between experts.
DAMPING = 1e-3
# In temperatures. The temperature halves with every step, so prices can still get anywhere.
LONGEST_STEP = 4.0
# The last temperature blurs the bound by this share of it.
SMALLEST_BLUR = 3e-6
MOST_STEPS = 80
MOST_SWEEPS = 3
# Sums of the same numbers in another order differ by less, relatively.
ROUNDING = 1e-12
# All pairs of so many ids are looked at when places are changed, so often.
MOST_EXCHANGING = 200
MOST_EXCHANGES = 60
# Ids that may change, in a depth-first search that stands a chance.
MOST_SEARCHED = 2000
# Prices are found for so many nodes that their agreements are this many numbers in all, within these limits.
PRICED_NUMBERS = 8_000_000
LEAST_PRICED = 2
MOST_PRICED = 24
# What it costs to drop a node after one sweep, in nodes that are priced.
DROP_COST = 0.2
# Many ids are not searched on where this share of the bound at most is missing.
NEGLIGIBLE = 1e-3


class BalancedTable(NamedTuple):
    """A table within a limit of load, and how good it is; see `balanced_table`."""

    table: Tensor  # `torch.LongTensor` of shape (V,): expert of each token id
    agreement: float  # tokens kept on the expert that they prefer (expected number)
    best_agreement: float  # the same for the best table without a limit
    bound: float  # no table within the limit keeps more; equal to `agreement` where the table is proved optimal
    limit: float  # tokens allowed on one expert
    load: Tensor  # `torch.DoubleTensor` of shape (E,): tokens of each expert


def table_load(table_V: Tensor, weight_V: Tensor, num_experts: int) -> Tensor:
    """Tokens of each expert under a table, `(E,)`."""
    return torch.zeros(num_experts, dtype=torch.float64).index_add(0, table_V, weight_V)


class Problem(NamedTuple):
    """Ids of weight > 0 in descending weight, and the tokens that each expert can take."""

    agreement_VE: Tensor
    weight_V: Tensor
    capacity_E: Tensor

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the agreement and the weight of some ids after the other."""
        return zip(self.agreement_VE.split(CHUNK), self.weight_V.split(CHUNK), strict=True)

    def values(self, price_E: Tensor) -> Tensor:
        """Agreement per token less the prices, `(E, V)`: whole rows of it are needed."""
        value_EV = self.agreement_VE.T.clone(memory_format=torch.contiguous_format)
        return value_EV.div_(self.weight_V).sub_(price_E.unsqueeze(-1))

    def dual(self, price_E: Tensor) -> float:
        """D(p): no table within the capacity keeps more."""
        best = sum(
            (agreement - weight.unsqueeze(-1) * price_E).amax(-1).sum().item() for agreement, weight in self.chunks()
        )
        return best + (self.capacity_E @ price_E).item()

    def without(self, placed: tuple[int, ...]) -> tuple["Problem", float]:
        """Leave out the heaviest ids, which lie on the given experts; return what is left, and what these keep."""
        count, table = len(placed), torch.tensor(placed, dtype=torch.long)
        room_E = self.capacity_E - table_load(table, self.weight_V[:count], len(self.capacity_E))
        kept = self.agreement_VE[:count].gather(1, table.unsqueeze(-1)).sum().item()
        return Problem(self.agreement_VE[count:], self.weight_V[count:], room_E), kept

    def kept(self, table_V: Tensor) -> float:
        """Sum of the agreement under a table."""
        return self.agreement_VE.gather(1, table_V.unsqueeze(-1)).sum().item()

    def load(self, table_V: Tensor) -> Tensor:
        """Tokens of each expert under a table, `(E,)`."""
        return table_load(table_V, self.weight_V, self.agreement_VE.shape[1])


def demand(problem: Problem, price_E: Tensor, temperature: float) -> tuple[float, Tensor, Tensor]:
    """What ids ask for when they choose by a softmax of the given temperature.

    Args:
        problem (`Problem`): the ids.
        price_E (`torch.DoubleTensor` of shape `(E,)`): per token.
        temperature (`float`): in agreement per token.

    Returns:
        D(p), exactly; the load of each expert, `(E,)`; the load that two experts share, `(E, E)`.
    """
    best, load_E = 0.0, torch.zeros_like(price_E)
    shared_EE = torch.zeros(len(price_E), len(price_E), dtype=torch.float64)
    for agreement, weight in problem.chunks():
        value = agreement / weight.unsqueeze(-1) - price_E
        largest = value.amax(-1, keepdim=True)
        best += (largest.squeeze(-1) @ weight).item()
        # Only the bound must be exact.
        chosen = ((value - largest) / temperature).float().exp_()
        chosen /= chosen.sum(-1, keepdim=True)
        weighed = chosen * weight.float().unsqueeze(-1)
        load_E += weighed.sum(0)
        shared_EE += chosen.T @ weighed
    return best + (problem.capacity_E @ price_E).item(), load_E, shared_EE


def newton_prices(problem: Problem, price_E: Tensor | None) -> Tensor:
    """Find prices of small D(p) by Newton's method on its smoothed form, at a temperature that halves each step.

    Args:
        problem (`Problem`): the ids.
        price_E (`torch.DoubleTensor` of shape `(E,)`, *optional*): of a similar problem.

    Returns:
        `torch.DoubleTensor` of shape `(E,)`: >= 0, the best seen.
    """
    num_experts, total = len(problem.capacity_E), problem.weight_V.sum().item()
    ranges = ((agreement.amax(-1) - agreement.amin(-1)) / weight for agreement, weight in problem.chunks())
    temperature = max(values.max().item() for values in ranges)
    if price_E is None:
        price_E = torch.zeros(num_experts, dtype=torch.float64)
    else:
        temperature /= 2 * LONGEST_STEP
    best_price_E, least = price_E, problem.dual(price_E)
    for _ in range(MOST_STEPS):
        if temperature * total * math.log(num_experts) <= SMALLEST_BLUR * least:
            break
        dual, load_E, shared_EE = demand(problem, price_E, temperature)
        if dual < least:
            best_price_E, least = price_E, dual
        excess_E = load_E - problem.capacity_E
        # What is free and has room stays free.
        moving = (price_E > 0) | (excess_E > 0)
        # An expert that nobody wants has no curvature: the mean load stands in, and its price falls by a temperature.
        diagonal_E = load_E.clamp(min=total / num_experts) + DAMPING * total / num_experts
        hessian_EE = (torch.diag(diagonal_E) - shared_EE)[moving][:, moving]
        newton = torch.linalg.solve_ex(hessian_EE, excess_E[moving]).result
        price_E = price_E.clone()
        price_E[moving] += temperature * newton.clamp(-LONGEST_STEP, LONGEST_STEP)
        price_E.clamp_(min=0)
        temperature /= 2
    return best_price_E if least <= problem.dual(price_E) else price_E


def one_price(value_EV: Tensor, weight_V: Tensor, expert: int, capacity: float) -> tuple[float, float]:
    """Find where one price makes D(p) least while the others stay.

    Args:
        value_EV (`torch.DoubleTensor` of shape `(E, V)`): agreement per token less the prices, but for this expert's.
        weight_V (`torch.DoubleTensor` of shape `(V,)`): tokens of each id.
        expert (`int`): whose price; there are others.
        capacity (`float`): tokens that it can take.

    Returns:
        The price; D(p) less what the capacity of the other experts costs.
    """
    own_V = value_EV[expert].clone()
    value_EV[expert] = -math.inf
    other_V = value_EV.amax(0)
    value_EV[expert] = own_V
    # Below this price the id wants the expert: the price at which just too many would do so is the best one.
    threshold_V, price = own_V - other_V, 0.0
    wanting = (threshold_V > 0).nonzero().squeeze(-1)
    threshold, order = threshold_V[wanting].sort(descending=True, stable=True)
    too_many = weight_V[wanting[order]].cumsum(0) > capacity
    if too_many.any():
        price = threshold[too_many.long().argmax()].item()
    return price, (torch.maximum(own_V - price, other_V) @ weight_V).item() + capacity * price


def polish_prices(problem: Problem, price_E: Tensor, most_sweeps: int = MOST_SWEEPS) -> Tensor:
    """Put one price after the other where D(p) is least while the others stay.

    Args:
        problem (`Problem`): the ids; at least two experts.
        price_E (`torch.DoubleTensor` of shape `(E,)`): prices to start from.
        most_sweeps (`int`, *optional*): over all experts.

    Returns:
        `torch.DoubleTensor` of shape `(E,)`: prices of no larger D(p).
    """
    least, price_E = problem.dual(price_E), price_E.clone()
    value_EV = problem.values(price_E)
    for _ in range(most_sweeps):
        before_E = price_E.clone()
        for expert, capacity in enumerate(problem.capacity_E.tolist()):
            value_EV[expert] += price_E[expert]
            price_E[expert], _ = one_price(value_EV, problem.weight_V, expert, capacity)
            value_EV[expert] -= price_E[expert]
        dual = problem.dual(price_E)
        if not dual < least:
            return before_E
        if least - dual <= SMALLEST_BLUR * least:
            break
        least = dual
    return price_E


def pack_greedily(problem: Problem) -> Tensor:
    """Put each id, the heaviest first, on the expert with the least load; return the table, `(V,)`."""
    heap = [(0.0, expert) for expert in range(problem.agreement_VE.shape[1])]
    table = []
    for weight in problem.weight_V.tolist():
        load, expert = heap[0]
        heapq.heapreplace(heap, (load + weight, expert))
        table.append(expert)
    return torch.tensor(table)


def pack_exactly(problem: Problem, node_limit: int) -> Tensor | None:
    """Search, depth first, for any table within the capacity.

    Args:
        problem (`Problem`): the ids.
        node_limit (`int`): ids that may be put somewhere, in all.

    Returns:
        The table, `(V,)`; None where there is none, or where the nodes ran out.
    """
    weights, num_experts = problem.weight_V.tolist(), len(problem.capacity_E)
    capacity = problem.capacity_E[0].item()
    waste = capacity * num_experts - math.fsum(weights)
    if weights[0] > capacity or waste < 0 or node_limit < len(weights):
        return None
    load, chosen = [0.0] * num_experts, [-1] * len(weights)
    depth = 0
    for _ in range(node_limit):
        while depth >= 0:
            if chosen[depth] >= 0:
                load[chosen[depth]] -= weights[depth]
            chosen[depth] = next_room(load, chosen[depth] + 1, capacity - weights[depth])
            if chosen[depth] >= 0:
                load[chosen[depth]] += weights[depth]
                break
            depth -= 1
        if depth < 0:
            return None
        if depth == len(weights) - 1:
            return torch.tensor(chosen)
        # Room that even the lightest id does not fit in is lost.
        rooms = (capacity - tokens for tokens in load)
        if sum(room for room in rooms if room < weights[-1]) <= waste:
            depth += 1
    return None


def next_room(load: list[float], start: int, most: float) -> int:
    """First expert from `start` on with a load of at most `most`, unless one as loaded comes before it; -1 if none."""
    for expert in range(start, len(load)):
        if load[expert] <= most and load[expert] not in load[:expert]:
            return expert
    return -1


class Rounding:
    """A table within the capacity, near the prices, and the steps that make it better.

    Args:
        problem (`Problem`): the ids.
        price_E (`torch.DoubleTensor` of shape `(E,)`): prices of small D(p).
    """

    def __init__(self, problem: Problem, price_E: Tensor):
        self.problem, self.price_E = problem, price_E
        self.dual = problem.dual(price_E)
        self.tolerance = ROUNDING * self.dual
        tops = [(agreement - weight.unsqueeze(-1) * price_E).topk(2, dim=-1) for agreement, weight in problem.chunks()]
        self.best_V = torch.cat([top.indices[:, 0] for top in tops])
        # What the id loses at these prices on its second best expert.
        self.regret_V = torch.cat([top.values[:, 0] - top.values[:, 1] for top in tops])

    def fill(self, order: Tensor) -> Tensor | None:
        """Put ids one after the other on their best expert with room; return the table, or None where one has none."""
        room, best = self.problem.capacity_E.tolist(), self.best_V.tolist()
        weights = self.problem.weight_V.tolist()
        for token in order.tolist():
            weight = weights[token]
            expert = best[token]
            if room[expert] < weight:
                values = (self.problem.agreement_VE[token] - weight * self.price_E).tolist()
                roomy = [other for other, left in enumerate(room) if left >= weight]
                if not roomy:
                    return None
                expert = best[token] = max(roomy, key=values.__getitem__)
            room[expert] -= weight
        return torch.tensor(best)

    def start(self) -> Tensor | None:
        """The best of a few ways to fill; None where none succeeds."""
        by_weight = torch.arange(len(self.best_V))
        by_margin = (self.regret_V / self.problem.weight_V).argsort(descending=True, stable=True)
        by_regret = self.regret_V.argsort(descending=True, stable=True)
        tables = [self.fill(order) for order in (by_weight, by_margin, by_regret)]
        return max((table for table in tables if table is not None), key=self.problem.kept, default=None)

    def changeable(self, beaten: float) -> Tensor:
        """Ids that may lie elsewhere than at their best in a table that keeps more than `beaten`."""
        return (self.regret_V <= self.dual - beaten + self.tolerance).nonzero().squeeze(-1)

    def improve(self, table_V: Tensor) -> Tensor:
        """Let ids move, or two ids change places, as long as that brings something."""
        tokens_C = self.changeable(self.problem.kept(table_V))
        if len(tokens_C) > MOST_EXCHANGING:
            hesitation_C = self.regret_V[tokens_C].masked_fill(table_V[tokens_C] != self.best_V[tokens_C], -1.0)
            tokens_C = tokens_C[hesitation_C.argsort(stable=True)[:MOST_EXCHANGING]]
        num_experts = len(self.price_E)
        # An id of no weight on every expert, that stays, makes a move an exchange.
        nothing_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        agreement_CE = torch.cat([self.problem.agreement_VE[tokens_C], nothing_EE])
        weight_C = torch.cat([self.problem.weight_V[tokens_C], nothing_EE[0]])
        expert_C = torch.cat([table_V[tokens_C], torch.arange(num_experts)])
        room_E = self.problem.capacity_E - self.problem.load(table_V)
        for _ in range(MOST_EXCHANGES):
            if not self.exchange(agreement_CE, weight_C, expert_C, room_E):
                break
        return table_V.index_copy(0, tokens_C, expert_C[:-num_experts])

    def exchange(self, agreement_CE: Tensor, weight_C: Tensor, expert_C: Tensor, room_E: Tensor) -> bool:
        """Make the best exchanges, each expert in one at most; change `expert_C` and `room_E`, tell if any was made."""
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
            if gains_C[token] <= self.tolerance:
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

    def finish(self, beaten: float, node_limit: int) -> tuple[Tensor | None, bool]:
        """Search, by branch and bound, for the best table that keeps more than `beaten`; return it and if that is it.

        Args:
            beaten (`float`): sum of the agreement of a known table.
            node_limit (`int`): see `Tree.search`.

        Returns:
            The table, `(V,)`, None where none was found; whether all were looked at.
        """
        problem, gap = self.problem, self.dual - beaten
        if gap <= self.tolerance:
            return None, True
        tokens_C = self.changeable(beaten)
        if len(tokens_C) > MOST_SEARCHED:
            return None, False
        fixed_V = torch.ones(len(self.best_V), dtype=torch.bool).index_fill(0, tokens_C, False)
        load_E = table_load(self.best_V[fixed_V], problem.weight_V[fixed_V], len(self.price_E))
        if (load_E > problem.capacity_E).any():
            return None, True
        value_CE = problem.agreement_VE[tokens_C] - problem.weight_V[tokens_C].unsqueeze(-1) * self.price_E
        regret_CE = value_CE.amax(-1, keepdim=True) - value_CE
        options = []
        for regrets in regret_CE.tolist():
            options.append(sorted((regret, expert) for expert, regret in enumerate(regrets) if regret <= gap))
        room_E = problem.capacity_E - load_E
        tree = Tree(options, problem.weight_V[tokens_C].tolist(), room_E.tolist(), self.price_E.tolist())
        chosen, proved = tree.search(gap - self.tolerance, self.tolerance, node_limit)
        # Ids that no better table may put elsewhere lie on their best expert in it.
        table_V = self.best_V.index_copy(0, tokens_C, torch.tensor(chosen)) if chosen else None
        return table_V, proved


class Tree:
    """Depth-first search over the experts of some ids, heavy ids first.

    Args:
        options (`list[list[tuple[float, int]]]`): the regret and the expert of what each id may choose, ascending.
        weights (`list[float]`): of each id.
        room (`list[float]`): tokens that each expert can take.
        price (`list[float]`): of each expert, per token.
    """

    def __init__(
        self, options: list[list[tuple[float, int]]], weights: list[float], room: list[float], price: list[float]
    ):
        self.options, self.weights, self.room, self.price = options, weights, room, price
        self.position = [-1] * len(weights)
        # Regret of the ids before.
        self.spent = [0.0] * (len(weights) + 1)

    def advance(self, depth: int, most: float) -> bool:
        """Put the id on its next expert with room and a loss below `most`; where there is none, take it away."""
        options, weight, position = self.options[depth], self.weights[depth], self.position[depth]
        if position >= 0:
            self.room[options[position][1]] += weight
        while (position := position + 1) < len(options):
            regret, expert = options[position]
            if self.spent[depth] + regret >= most:
                break
            if self.room[expert] >= weight:
                self.position[depth] = position
                self.room[expert] -= weight
                self.spent[depth + 1] = self.spent[depth] + regret
                return True
        self.position[depth] = -1
        return False

    def search(self, most: float, tolerance: float, node_limit: int) -> tuple[list[int], bool]:
        """Find the table that loses least against D(p).

        Args:
            most (`float`): what the table must lose less than.
            tolerance (`float`): a better table must lose less by this.
            node_limit (`int`): ids that may be put somewhere, in all.

        Returns:
            The expert of each id, empty where no table loses less than `most`; whether all were looked at.
        """
        if not self.weights:
            return [], True
        best, depth, last = [], 0, len(self.weights) - 1
        for _ in range(node_limit):
            while not self.advance(depth, most):
                depth -= 1
                if depth < 0:
                    return best, True
            if depth < last:
                depth += 1
                continue
            loss = self.spent[-1] + sum(p * left for p, left in zip(self.price, self.room, strict=True))
            if loss < most:
                best = [options[position][1] for options, position in zip(self.options, self.position, strict=True)]
                most = loss - tolerance
        return best, False


class Search:
    """Best-first search over the experts of the heaviest ids, with prices anew for the others at every node.

    One price per expert cannot tell that a heavy id lies on one expert as a whole; once it is placed, the bound does.

    Args:
        problem (`Problem`): the ids.
        table_V (`torch.LongTensor` of shape `(V,)`, *optional*): a table within the capacity.
        node_limit (`int`): of the depth-first search in each node.
    """

    def __init__(self, problem: Problem, table_V: Tensor | None, node_limit: int):
        self.problem, self.table_V, self.node_limit = problem, table_V, node_limit
        self.kept = -math.inf if table_V is None else problem.kept(table_V)
        # The bound (negative), a running number, experts of the heaviest ids, prices, and if these are for the node.
        self.open = [(-math.inf, 0, (), None, False)]
        self.num_nodes = 1

    def push(self, bound: float, placed: tuple[int, ...], price_E: Tensor, priced: bool) -> None:
        """Remember a node."""
        heapq.heappush(self.open, (-bound, self.num_nodes, placed, price_E, priced))
        self.num_nodes += 1

    def run(self) -> tuple[Tensor | None, float]:
        """Return the best table found, `(V,)`, None where none was; and how much more another may keep at most."""
        left = max(LEAST_PRICED, min(MOST_PRICED, PRICED_NUMBERS // self.problem.agreement_VE.numel()))
        while self.open:
            bound, _, placed, price_E, priced = self.open[0]
            if -bound <= self.kept * (1 + ROUNDING):
                return self.table_V, 0.0
            many = len(self.problem.weight_V) > MOST_EXCHANGING
            close = many and -bound <= self.kept * (1 + NEGLIGIBLE)
            if close or left <= 0 or (priced and len(placed) == len(self.problem.weight_V) - 1):
                return self.table_V, -bound - self.kept
            heapq.heappop(self.open)
            if priced:
                self.branch(-bound, placed, price_E)
            else:
                left -= self.price(placed, price_E)
        return self.table_V, 0.0

    def branch(self, bound: float, placed: tuple[int, ...], price_E: Tensor) -> None:
        """Put the heaviest id that is left on each expert with room, at a price that makes this room suffice."""
        rest, _ = self.problem.without(placed)
        weight, weight_V = rest.weight_V[0].item(), rest.weight_V[1:]
        value_EV = Problem(rest.agreement_VE[1:], weight_V, rest.capacity_E).values(price_E)
        for expert in (rest.capacity_E >= weight).nonzero().squeeze(-1).tolist():
            value_EV[expert] += price_E[expert]
            left_E, changed_E = rest.capacity_E.clone(), price_E.clone()
            left_E[expert] -= weight
            changed_E[expert], dual = one_price(value_EV, weight_V, expert, left_E[expert].item())
            value_EV[expert] -= price_E[expert]
            dual += (left_E @ price_E - left_E[expert] * price_E[expert]).item()
            _, kept = self.problem.without((*placed, expert))
            if min(bound, kept + dual) > self.kept:
                self.push(min(bound, kept + dual), (*placed, expert), changed_E, False)

    def price(self, placed: tuple[int, ...], price_E: Tensor | None) -> float:
        """Find prices for the ids that are left, and tables near them; return the cost, 1 or less.

        The node stays open unless no table in it can keep more than the best one.
        """
        rest, kept = self.problem.without(placed)
        if price_E is not None:
            price_E = polish_prices(rest, price_E, 1)
            if kept + rest.dual(price_E) <= self.kept:
                return DROP_COST
        rounding = Rounding(rest, polish_prices(rest, newton_prices(rest, price_E)))
        if kept + rounding.dual <= self.kept:
            return 1.0
        table_V = rounding.start()
        if table_V is None and not placed:
            table_V = self.table_V
        if table_V is not None:
            self.offer(placed, rounding.improve(table_V))
        table_V, proved = rounding.finish(self.kept - kept, self.node_limit)
        if table_V is not None:
            self.offer(placed, table_V)
        if not proved:
            self.push(kept + rounding.dual, placed, rounding.price_E, True)
        return 1.0

    def offer(self, placed: tuple[int, ...], table_V: Tensor) -> None:
        """Remember the best table."""
        table_V = torch.cat([torch.tensor(placed, dtype=torch.long), table_V])
        kept = self.problem.kept(table_V)
        if kept > self.kept:
            self.table_V, self.kept = table_V, kept


def solve_or_raise(problem: Problem, node_limit: int) -> tuple[Tensor, float, float]:
    """Find a table within the capacity, or within what the greedy packing needs where none within it is found.

    Args:
        problem (`Problem`): the ids.
        node_limit (`int`): of each search.

    Returns:
        The table, `(V,)`; how much more another one may keep at most; the raised capacity, 0 where it is as it was.
    """
    packed_V = pack_greedily(problem)
    needed = problem.load(packed_V).max().item()
    capacity_E = problem.capacity_E
    if needed <= capacity_E[0]:
        return *Search(problem, packed_V, node_limit).run(), 0.0
    total = problem.weight_V.sum().item()
    if problem.weight_V[0] <= capacity_E[0] and total <= capacity_E.sum():
        table_V, gap = Search(problem, pack_exactly(problem, node_limit), node_limit).run()
        if table_V is not None:
            return table_V, gap, 0.0
    problem = problem._replace(capacity_E=torch.full_like(capacity_E, needed * (1 + ROUNDING)))
    return *Search(problem, packed_V, node_limit).run(), needed


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

    The limit is `max_load` times the mean load. Where one id alone outweighs it, or no table within it was found, it
    is raised to what the greedy packing needs: heaviest id first, each to the expert with the least load. Ids that
    weigh nothing go to their best expert, the first among equals. The same numbers give the same table. Sums are
    compared up to 1e-12 of them.

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
        capacity = float(math.floor(capacity))
    table_V = agreement_VE.argmax(-1)
    best_agreement = agreement_VE.amax(-1).sum().item()
    load_E, gap = table_load(table_V, count_V, num_experts), 0.0
    if num_experts > 1 and load_E.max() > capacity:
        # The weight of lighter ids is lost in the rounding of the loads.
        num_heavy = int((count_V > 1e-16 * total / num_ids).sum())
        heavy_V = count_V.argsort(descending=True, stable=True)[:num_heavy]
        problem = Problem(agreement_VE[heavy_V], count_V[heavy_V], torch.full_like(load_E, capacity))
        solved_V, gap, raised = solve_or_raise(problem, node_limit)
        table_V = table_V.index_copy(0, heavy_V, solved_V)
        load_E, limit = table_load(table_V, count_V, num_experts), max(limit, raised)
    kept = agreement_VE.gather(1, table_V.unsqueeze(-1)).sum().item()
    bound = max(kept, min(kept + gap, best_agreement))
    # Rounding errors of the loads.
    limit = max(limit, load_E.max().item())
    return BalancedTable(table_V, kept, best_agreement, bound, limit, load_E)


@torch.no_grad()
def balanced_table_in_bands(
    agreement: Tensor, token_counts: Tensor, max_load: float, num_bands: int, node_limit: int = 20000
) -> BalancedTable:
    """Choose a table that is balanced among the frequent ids, among the less frequent ones, and so on to the rarest.

    A few ids are a large part of any text. A load within its limit says nothing of how they are spread: an expert that
    serves several of them has little left for rare ids. So ids are cut into bands, each with as many tokens, and
    placed band by band, the most frequent first. After every band no expert has more than `max_load` times the mean
    of the tokens placed so far, but for an id that alone is more: that shares its expert with nothing until the others
    have caught up. Within a band the table is chosen as in `balanced_table`, given those before.

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
    placed, gaps, capacity = 0.0, 0.0, 0.0
    for band in band_V.unique().tolist():
        ids = order_V[(band_V == band) & (count_V[order_V] > 0)]
        placed += count_V[ids].sum().item()
        band_table, gap, capacity = place_band(
            agreement_VE[ids], count_V[ids], load_E, max_load * placed / num_experts, node_limit
        )
        table_V[ids] = band_table
        load_E, gaps = load_E + table_load(band_table, count_V[ids], num_experts), gaps + gap
    kept = agreement_VE.gather(1, table_V.unsqueeze(-1)).sum().item()
    best = agreement_VE.amax(-1).sum().item()
    return BalancedTable(
        table_V, kept, best, max(kept, min(kept + gaps, best)), max(capacity, load_E.max().item()), load_E
    )


def place_band(
    agreement_VE: Tensor, weight_V: Tensor, load_E: Tensor, limit: float, node_limit: int
) -> tuple[Tensor, float, float]:
    """Place ids in descending weight beside the loads that are there.

    Returns:
        Their table, `(V,)`; how much more another one may keep at most; the limit, raised to what the greedy packing
        needs where that is more.
    """
    heap = [(tokens, expert) for expert, tokens in enumerate(load_E.tolist())]
    heapq.heapify(heap)
    packed, needed = [], 0.0
    for weight in weight_V.tolist():
        tokens, expert = heap[0]
        heapq.heapreplace(heap, (tokens + weight, expert))
        packed.append(expert)
        needed = max(needed, tokens + weight)
    limit = max(limit, needed)
    problem = Problem(agreement_VE, weight_V, (limit * (1 + ROUNDING) - load_E).clamp(min=0.0))
    table_V, gap = Search(problem, torch.tensor(packed), node_limit).run()
    return table_V, gap, limit


__all__ = ["BalancedTable", "balanced_table", "balanced_table_in_bands"]
