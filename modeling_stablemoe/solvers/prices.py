# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Prices of experts, which bound how much a table within a load can keep; see `balancing`, step 1.

Shape suffixes: V token ids, E experts, C ids that may change.
"""

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


__all__ = ["ROUNDING", "Problem", "newton_prices", "one_price", "polish_prices", "table_load"]
