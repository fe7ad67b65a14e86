# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""How routers of transformers weigh the experts that they have chosen, so that another choice is weighed the same way.

Shape suffixes: T tokens, E experts, K chosen experts.
"""

from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


SCORES = {
    "softmax": lambda logits: logits.softmax(-1, dtype=torch.float32),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}
# Added to the sum that weights are divided by: less than any sum of the chosen ones' own weights, so it changes no bit of theirs.
LEAST_SUM = 1e-20
PROBED_TOKENS = 64


class Formula(NamedTuple):
    """From logits and chosen experts to weights."""

    score: str | None  # key of `SCORES`; None for a softmax over the chosen experts
    sums_to_one: bool  # before it is scaled
    scale: float

    def __call__(self, logits_TE: Tensor, index_TK: Tensor) -> Tensor:
        """Weigh the chosen experts, `(T, K)`."""
        if self.score is None:
            weight_TK = logits_TE.gather(1, index_TK).softmax(-1)
        else:
            weight_TK = SCORES[self.score](logits_TE).gather(1, index_TK)
        if self.sums_to_one:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + LEAST_SUM)
        return weight_TK * self.scale


class RouterFacts(NamedTuple):
    """What a router does, as seen from outside."""

    formula: Formula
    num_experts: int
    k: int  # experts of a token


@torch.no_grad()
def probe(router: nn.Module, hidden_size: int, *args) -> RouterFacts | None:
    """Find the formula of a router: the one that gives its weights, to the bit, for hidden states and a gate drawn at random.

    Args:
        router (`nn.Module`): returns logits, weights and indices of the chosen experts.
        hidden_size (`int`): of a token.
        *args: what else its `forward` takes, for 64 tokens.

    Returns:
        `RouterFacts`, or None where no formula that is known here gives its weights.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(weight.shape, generator=generator) * 2 * weight.shape[-1] ** -0.5).to(weight)
        for name, weight in router.named_parameters()
    }
    some = next(iter(weights.values()))
    hidden_states = torch.randn(PROBED_TOKENS, hidden_size, generator=generator).to(some)
    outputs = torch.func.functional_call(router, weights, (hidden_states, *args))
    if not isinstance(outputs, tuple) or len(outputs) != 3:
        return None
    logits_TE, weight_TK, index_TK = outputs
    if not logits_TE.is_floating_point() or index_TK.is_floating_point():
        return None
    # Not every router scales its weights.
    scale = float(vars(router).get("routed_scaling_factor", 1.0))
    for score, sums_to_one in product((*SCORES, None), (False, True)):
        formula = Formula(score, sums_to_one, scale)
        if torch.equal(formula(logits_TE, index_TK).to(weight_TK.dtype), weight_TK):
            return RouterFacts(formula, logits_TE.shape[-1], index_TK.shape[-1])
    return None


__all__ = ["Formula", "RouterFacts", "probe"]
