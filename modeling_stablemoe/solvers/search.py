# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Tables within a load, from prices by rounding, exchange and branch and bound; see `balancing`, steps 2 to 4.

Shape suffixes: V token ids, E experts, C ids that may change.
"""

import heapq
import math

import torch
from torch import Tensor

from .prices import ROUNDING, Problem, newton_prices, one_price, polish_prices, table_load


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


def pack_greedily(problem: Problem) -> Tensor:
    """Put each id, the heaviest first, on the expert with the least load; return the table, `(V,)`."""
    heap = [(0.0, expert) for expert in range(problem.agreement_VE.shape[1])]
    table = []
    for weight in problem.weight_V.tolist():
        load, expert = heap[0]
        heapq.heapreplace(heap, (load + weight, expert))
        table.append(expert)
    return torch.tensor(table, dtype=torch.long)


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


def solve_or_raise(problem: Problem, num_alone: int, node_limit: int) -> tuple[Tensor, float, float]:
    """Find a table within the capacity, or within what the greedy packing needs where none within it is found.

    Args:
        problem (`Problem`): the ids.
        num_alone (`int`): the first so many weigh as much as an expert can take, whatever it can take.
        node_limit (`int`): of each search.

    Returns:
        The table, `(V,)`; how much more another one may keep at most; the raised capacity, 0 where it is as it was.
    """
    agreement_VE, weight_V, capacity_E = problem
    others = Problem(agreement_VE[num_alone:, num_alone:], weight_V[num_alone:], capacity_E[num_alone:])
    packed_V = pack_greedily(others)
    needed = others.load(packed_V).max().item()
    packed_V = torch.cat([torch.arange(num_alone), packed_V + num_alone])
    if needed <= capacity_E[0]:
        return *Search(problem, packed_V, node_limit).run(), 0.0
    total = weight_V.sum().item()
    if weight_V[0] <= capacity_E[0] and total <= capacity_E.sum():
        table_V, gap = Search(problem, pack_exactly(problem, node_limit), node_limit).run()
        if table_V is not None:
            return table_V, gap, 0.0
    raised = needed * (1 + ROUNDING)
    weight_V = weight_V.index_fill(0, torch.arange(num_alone), raised)
    problem = Problem(agreement_VE, weight_V, torch.full_like(capacity_E, raised))
    return *Search(problem, packed_V, node_limit).run(), needed


__all__ = ["Search", "solve_or_raise"]
