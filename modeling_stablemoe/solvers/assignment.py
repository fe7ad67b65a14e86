# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The balanced assignment of BASE layers (Lewis et al., ICML 2021): every expert gets the same number of tokens.

A transportation problem. As in Bertsekas' auction (1992) every expert has a price and every token goes where score
minus price is highest. Whatever the prices, nothing beats that assignment among those with the same loads. So
prices need not be exact: they are found roughly, all experts at once, then tokens move one path after another from
crowded experts to idle ones, each time at the least loss, which keeps the assignment optimal for its loads until
the loads are even.

Shape suffixes: T tokens, E experts.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from modeling_stablemoe.model.losses_stablemoe import count_expert_load

from .prices import newton_prices


# Scores are rounded to about 1e-6 of their mean spread. Scores that differ by rounding errors of float32 (a token that
# repeats) become equal, so many tokens move at once, and sums of rounded scores are exact.
GRID_BITS = 20
# At most this many bits above the grid, however far an outlier lies: sums over a path of 4096 experts fit in float64.
RANGE_BITS = 40
# One look costs about as much as one step of the prices, and makes an accelerator wait.
STEPS_PER_LOOK = 4


def round_to_grid(scores_TE: Tensor) -> Tensor:
    """Express scores as whole numbers <= 0 of a common unit, each row relative to its best expert.

    Args:
        scores_TE (`torch.Tensor` of shape `(T, E)`): finite, any float dtype; T and E at least 1.

    Returns:
        `torch.DoubleTensor` of shape `(T, E)`: whole numbers. The unit is a power of two, at most 2^-20 of the mean
        distance of a score (relative to the best of its row) from its column's mean, or 2^-40 of the largest
        distance within a row, whichever is more.

    Raises:
        ValueError: where a score is not finite.
    """
    scores_TE = scores_TE.double()
    # Scale first, by a power of two: differences of huge scores overflow.
    largest = scores_TE.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError("Scores must be finite.")
    scores_TE = scores_TE * 2.0 ** -max(math.frexp(largest)[1], -1000)
    scores_TE = scores_TE - scores_TE.amax(-1, keepdim=True)
    spread, largest = torch.stack([(scores_TE - scores_TE.mean(0)).abs().mean(), -scores_TE.min()]).tolist()
    unit = 2.0 ** (math.frexp(max(spread * 2.0**-GRID_BITS, largest * 2.0**-RANGE_BITS))[1] - 1)
    return (scores_TE / unit).round()


def clearing_prices(scores_TE: Tensor) -> Tensor:
    """Find prices at which about T/E tokens prefer each expert.

    Such prices minimise sum_t max_e (s_te - p_e) + T/E sum_e p_e, the dual of the assignment. Newton's method on its
    smoothed form, with a log-sum-exp of temperature tau for the max; tau halves with every step, from the range of
    the scores to their unit. Ends early once at most E / 2 tokens are too many where they are: prices alone cannot
    even out the last ones, which like two experts equally.

    Args:
        scores_TE (`torch.DoubleTensor` of shape `(T, E)`): whole numbers; see `round_to_grid`.

    Returns:
        `torch.DoubleTensor` of shape `(E,)`: whole numbers.
    """
    num_tokens, num_experts = scores_TE.shape
    quota = num_tokens / num_experts
    # What all tokens share of an expert's score belongs to its price, and would cost float32 its precision.
    mean_E = scores_TE.mean(0)
    values_TE = (scores_TE - mean_E).float()

    def demand(price_E: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        share_TE = ((values_TE - price_E) / temperature).softmax(-1)
        return share_TE.sum(0), share_TE.T @ share_TE

    temperature = values_TE.abs().max().item()
    prices = newton_prices(demand, quota, quota, torch.zeros_like(values_TE[0]), temperature)
    for step, (price_E, _) in zip(range(math.frexp(temperature)[1] + 1), prices, strict=False):
        if step % STEPS_PER_LOOK == 0:
            expert_T = (values_TE - price_E).argmax(-1)
            load_E = count_expert_load(expert_index=expert_T, mask=None, num_experts=num_experts)
            if (load_E - math.ceil(quota)).clamp(min=0).sum() <= num_experts / 2:
                break
    return (mean_E + price_E.double()).round()


def best_paths(gain_EE: Tensor, excess_E: Tensor) -> list[int]:
    """Find the path of largest gain from the crowded experts to every expert (Bellman-Ford).

    Args:
        gain_EE (`torch.DoubleTensor` of shape `(E, E)`): what it brings to move one token from row to column; whole
            numbers without cycles of positive gain, or -inf.
        excess_E (`torch.LongTensor` of shape `(E,)`): tokens above quota; paths start where it is positive.

    Returns:
        `list[int]`: the expert before each one on its path; -1 at starts.
    """
    best_E = torch.where(excess_E > 0, 0.0, -torch.inf).double()
    previous_E = torch.full_like(excess_E, -1)
    # Only paths over experts whose own path has just become better can do better than those found before.
    changed = (excess_E > 0).nonzero().squeeze(-1)
    while len(changed):
        through = best_E[changed].unsqueeze(-1) + gain_EE[changed]
        through_E = through.amax(0)
        better = (through_E > best_E).nonzero().squeeze(-1)
        previous_E[better] = changed[through[:, better].argmax(0)]
        best_E[better] = through_E[better]
        changed = better
    return previous_E.tolist()


class Market:
    """An assignment that is optimal for its loads, and moves that keep it so.

    Every expert has floor(T/E) places; T mod E of them have one more, which they may hand on.

    Args:
        scores_TE (`torch.DoubleTensor` of shape `(T, E)`): whole numbers, on the CPU.
        price_E (`torch.DoubleTensor` of shape `(E,)`): whole numbers, on the CPU.
    """

    def __init__(self, scores_TE: Tensor, price_E: Tensor):
        num_tokens, num_experts = scores_TE.shape
        self.scores_TE = scores_TE
        expert_T = (scores_TE - price_E).argmax(-1)
        load_E = count_expert_load(expert_index=expert_T, mask=None, num_experts=num_experts)
        # The tokens of each expert.
        self.tokens = list(expert_T.argsort(stable=True).split(load_E.tolist()))
        self.places, num_extra = divmod(num_tokens, num_experts)
        # The dearest experts are those worth one more place.
        self.has_extra_E = torch.zeros(num_experts, dtype=torch.bool)
        self.has_extra_E[price_E.argsort(descending=True, stable=True)[:num_extra]] = True
        # What the best token of the row gains, or loses, by moving to the column.
        self.token_gain_EE = torch.full((num_experts, num_experts), -torch.inf, dtype=torch.float64)
        self.refresh(range(num_experts))

    def refresh(self, experts: Iterable[int]) -> None:
        """Recompute the gains of tokens that leave these experts."""
        for expert in experts:
            scores = self.scores_TE[self.tokens[expert]]
            gains = scores - scores[:, expert : expert + 1]
            self.token_gain_EE[expert] = gains.amax(0) if len(gains) else -torch.inf

    def gain(self) -> Tensor:
        """Gain of moving one token from row to column, or one place from column to row, `(E, E)`."""
        hand_on_EE = ~self.has_extra_E.unsqueeze(-1) & self.has_extra_E
        return torch.where(hand_on_EE, self.token_gain_EE.clamp(min=0.0), self.token_gain_EE)

    def push(self, path: list[int], gain_EE: Tensor, amount: int) -> int:
        """Move up to `amount` tokens, as many as bring the gain, along each edge of `path`; return how many."""
        moves = []
        for source, target in zip(path, path[1:], strict=False):
            bringing = None
            if gain_EE[source, target] == self.token_gain_EE[source, target]:
                tokens = self.tokens[source]
                gains = self.scores_TE[tokens, target] - self.scores_TE[tokens, source]
                bringing = (gains == gain_EE[source, target]).nonzero().squeeze(-1)
                amount = min(amount, len(bringing))
            else:
                amount = min(amount, int(self.has_extra_E[target] & ~self.has_extra_E[source]))
            if not amount:
                return 0
            moves.append((source, target, bringing))
        # What arrives is put at the end, so the positions found above hold.
        for source, target, bringing in moves:
            if bringing is None:
                self.has_extra_E[source], self.has_extra_E[target] = True, False
            else:
                stays = torch.ones(len(self.tokens[source]), dtype=torch.bool)
                stays[bringing[:amount]] = False
                self.tokens[target] = torch.cat([self.tokens[target], self.tokens[source][~stays]])
                self.tokens[source] = self.tokens[source][stays]
        return amount

    def clear(self) -> Tensor:
        """Move tokens until every expert has its quota; return the expert of each token, `(T,)`."""
        while True:
            load_E = torch.tensor([len(tokens) for tokens in self.tokens])
            excess_E = load_E - self.places - self.has_extra_E.long()
            if not excess_E.any():
                break
            # At prices that count these gains in, all paths lose nothing: all may be used, until their tokens run out.
            gain_EE = self.gain()
            previous = best_paths(gain_EE, excess_E)
            excess, touched = excess_E.tolist(), set()
            for idle in (excess_E < 0).nonzero().squeeze(-1).tolist():
                path = [idle]
                while previous[path[0]] >= 0:
                    path.insert(0, previous[path[0]])
                if excess[path[0]] and (amount := self.push(path, gain_EE, min(excess[path[0]], -excess[idle]))):
                    excess[path[0]] -= amount
                    touched.update(path)
            self.refresh(touched)
        expert_T = torch.empty(len(self.scores_TE), dtype=torch.long)
        expert_T[torch.cat(self.tokens)] = torch.arange(len(load_E)).repeat_interleave(load_E)
        return expert_T


@torch.no_grad()
def balanced_assignment(scores: Tensor) -> Tensor:
    """Assign tokens to experts, as many to each, at the largest sum of scores.

    Source: BASE layers (Lewis et al., 2021), eq. 1, there solved by Bertsekas' auction. Where E does not divide T,
    every expert gets floor(T/E) or ceil(T/E) tokens, whichever brings more. The assignment is optimal for scores
    rounded to a grid (see `round_to_grid`): the sum of scores falls short of the largest by at most T units of that
    grid, by nothing where the scores are multiples of it (small integers). The same scores give the same assignment
    on the same device; ties go to either.

    Args:
        scores (`torch.Tensor` of shape `(T, E)`): finite, any float dtype and device with float64; a constant added
            to a row changes nothing. At most 4096 experts.

    Returns:
        `torch.LongTensor` of shape `(T,)`: the expert of each token, on the device of the scores.

    Raises:
        ValueError: where the scores are not a matrix, or not finite, or there are tokens but no experts.
    """
    if scores.dim() != 2 or (len(scores) and not scores.shape[1]):
        raise ValueError(f"Scores of shape (tokens, experts) are needed, these have {tuple(scores.shape)}.")
    if not len(scores):
        return torch.zeros(0, dtype=torch.long, device=scores.device)
    # Half precision would spoil the curvature.
    with torch.autocast(scores.device.type, enabled=False):
        scores_TE = round_to_grid(scores)
        price_E = clearing_prices(scores_TE)
    return Market(scores_TE.cpu(), price_E.cpu()).clear().to(scores.device)


__all__ = ["balanced_assignment"]
