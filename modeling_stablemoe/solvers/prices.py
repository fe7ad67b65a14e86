# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Newton's method for the prices of experts, at which demand meets capacity.

Whatever the prices p, no assignment within the capacities brings more than the dual

    D(p) = sum_v max_i (value_vi - weight_v p_i) + sum_i capacity_i p_i,

so the prices of least D are those at which everyone's best expert has just enough room. D has kinks; a log-sum-exp of
a temperature in the place of the max makes it smooth, and the temperature halves with every step.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


# Keeps the equations solvable where few tokens hesitate between experts.
DAMPING = 1e-3
# In temperatures. The temperature halves with every step, so prices can still get anywhere.
LONGEST_STEP = 4.0
THRESHOLD_STEPS = 3
# From between the k-th and the next value: where all shares are small, a step goes a temperature of the log(E / k) that are to go.
FIRST_THRESHOLD_STEPS = 12


def newton_prices(
    demand: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    capacity_E: Tensor | float,
    mean_load: float,
    price_E: Tensor,
    temperature: float,
    at_least_zero: bool = False,
) -> Iterator[tuple[Tensor, float]]:
    """Yield prices of ever smaller dual, without end and without waiting for the device.

    Args:
        demand (`Callable`): gives, of prices and a temperature, the load of each expert `(E,)` and the load that two
            experts share `(E, E)`, when everyone chooses by a softmax: what the load loses if prices rise by a temperature
            is diag(load) - shared.
        capacity_E (`torch.Tensor` of shape `(E,)` or `float`): what each expert takes.
        mean_load (`float`): of an expert.
        price_E (`torch.Tensor` of shape `(E,)`): to begin with.
        temperature (`float`): to begin with, in units of the prices.
        at_least_zero (`bool`): whether room may be left over, which is free: no price is negative then.

    Yields:
        `tuple`: the prices, and the temperature of the step that follows.
    """
    while True:
        yield price_E, temperature
        load_E, shared_EE = demand(price_E, temperature)
        excess_E = (load_E - capacity_E).double()
        # An expert that nobody wants has no curvature: the mean load stands in, and its price falls by a temperature.
        diagonal_E = load_E.clamp(min=mean_load) + DAMPING * mean_load
        hessian_EE = torch.diag(diagonal_E).double() - shared_EE.double()
        if at_least_zero:
            # What is free and has room stays free.
            moving_E = (price_E > 0) | (excess_E > 0)
            excess_E = excess_E * moving_E
            hessian_EE = torch.where(moving_E & moving_E.unsqueeze(-1), hessian_EE, torch.diag(diagonal_E))
        step_E = torch.linalg.solve_ex(hessian_EE, excess_E).result.clamp(-LONGEST_STEP, LONGEST_STEP)
        price_E = price_E + temperature * step_E.to(price_E.dtype)
        if at_least_zero:
            price_E = price_E.clamp(min=0)
        temperature /= 2


def soft_top_k(value_TE: Tensor, k: int, threshold_T1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Share k choices among experts: the sigmoids of a row, less a threshold of its own, sum to k.

    The largest sum of shares in [0, 1], each with its entropy: what a softmax is for one choice.

    Args:
        value_TE (`torch.Tensor` of shape `(T, E)`): in temperatures.
        k (`int`): choices of a row, fewer than E.
        threshold_T1 (`torch.Tensor` of shape `(T, 1)`, *optional*): to begin with, a few temperatures off at most.

    Returns:
        The shares, `(T, E)`, and the thresholds, `(T, 1)`.
    """
    num_steps = THRESHOLD_STEPS
    if threshold_T1 is None:
        num_steps = FIRST_THRESHOLD_STEPS
        highest = value_TE.topk(k + 1).values
        threshold_T1 = (highest[:, k - 1] + highest[:, k]).unsqueeze(-1) / 2
    for _ in range(num_steps):
        share_TE = (value_TE - threshold_T1).sigmoid()
        sum_T = share_TE.sum(-1)
        slope_T = sum_T - torch.linalg.vecdot(share_TE, share_TE)
        step_T = (sum_T - k) / slope_T.clamp(min=torch.finfo(slope_T.dtype).tiny)
        threshold_T1 = threshold_T1 + step_T.clamp(-LONGEST_STEP, LONGEST_STEP).unsqueeze(-1)
    return (value_TE - threshold_T1).sigmoid(), threshold_T1


def table_load(table_V: Tensor, weight_V: Tensor, num_experts: int) -> Tensor:
    """Tokens of each expert under a table, `(V,)` or `(V, K)`: `(E,)`."""
    weight = weight_V if table_V.dim() == 1 else weight_V.repeat_interleave(table_V.shape[1])
    return torch.zeros(num_experts, dtype=torch.float64).index_add(0, table_V.flatten(), weight)


__all__ = ["newton_prices", "soft_top_k", "table_load"]
