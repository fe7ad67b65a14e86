# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What distinguishes a healthy routing from a sick one: gates, the hidden states that are scored, agreement on rare tokens.

Nothing here has a gradient or waits for the device.

Shape suffixes: T tokens, K experts per token, D hidden size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .losses_stablemoe import masked_mean


# Below it a gate leaves next to nothing of what its expert does, and next to no gradient for the expert.
CLOSED_GATE = 0.05


class RoutingHealth(NamedTuple):
    """The health of a routing in one forward pass, of one MoE layer or the mean over several.

    Each a `torch.Tensor` of shape `()`.

    Attributes:
        mean_gate: mean gate of the real tokens, in [0, 1]; with several experts per token, over all gates of all tokens.
        closed_gates: share of these gates below 0.05.
        common_direction: norm of the tokens' mean hidden state over their mean norm, at the input of the layer, in [0, 1].
            Near 1 they all point the same way, and so all prefer the same expert.
        distillation_agreement: share of them that the distilled router sends where the backbone router does, with several
            experts per token the share of these in common; NaN where nothing is distilled.
        distillation_agreement_by_id: the same where every token id that occurs counts once, so that rare ones weigh as
            much as frequent ones.
        router_entropy: mean entropy of the softmax of their backbone scores, over ln(num_experts), in [0, 1]: 1 where all
            experts score alike, 0 where one stands out; NaN where there are no scores (a hash).
    """

    mean_gate: Tensor
    closed_gates: Tensor
    common_direction: Tensor
    distillation_agreement: Tensor
    distillation_agreement_by_id: Tensor
    router_entropy: Tensor


@torch.no_grad()
def routing_health(
    *,
    hidden_states: Tensor,
    token_ids: Tensor,
    gate: Tensor,
    teacher_index: Tensor | None,
    distilled_index: Tensor | None,
    vocab_size: int,
    router_logits: Tensor | None = None,
    mask: Tensor | None = None,
) -> RoutingHealth:
    """Measure the health of one MoE layer's routing, of what its router decided: gates and experts are `(T, K)`."""
    agreement = agreement_by_id = torch.full((), torch.nan, device=gate.device)
    if teacher_index is not None and distilled_index is not None:
        agreed = share_in_common(teacher_index, distilled_index)
        agreement, agreement_by_id = masked_mean(agreed, mask), mean_by_id(agreed, token_ids, vocab_size, mask)
    return RoutingHealth(
        masked_mean(gate.float().mean(-1), mask),
        masked_mean((gate < CLOSED_GATE).float().mean(-1), mask),
        common_direction(hidden_states, mask),
        agreement,
        agreement_by_id,
        agreement.new_full((), torch.nan) if router_logits is None else router_entropy(router_logits, mask),
    )


def mean_health(layers: Sequence[RoutingHealth], num_tokens: Tensor) -> RoutingHealth:
    """Average the health of several layers, on any devices, over the tokens that each routed, `(layers,)`."""
    weight = num_tokens / num_tokens.sum().clamp(min=1)
    values = torch.stack([torch.stack(layer).to(weight.device) for layer in layers])
    return RoutingHealth(*(values * weight.unsqueeze(-1)).sum(0).unbind())


def share_in_common(experts: Tensor, others: Tensor) -> Tensor:
    """Return which share of a token's experts are among its others, `(..., K), (..., K) -> (...)`, float32."""
    return (experts.unsqueeze(-1) == others.unsqueeze(-2)).any(-1).float().mean(-1)


def common_direction(hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compare the norm of the mean with the mean norm, `(T, D) -> ()`: in [0, 1]; 0 where all are zero."""
    hidden_states = hidden_states.float()
    if mask is not None:
        hidden_states = torch.where(mask.unsqueeze(-1), hidden_states, 0.0)
    mean_norm = hidden_states.norm(dim=-1).sum()
    return hidden_states.sum(0).norm() / mean_norm.clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def router_entropy(router_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average the entropy of softmax(scores) over real tokens, `(T, E) -> ()`, over ln E: in [0, 1]; 0 with one expert."""
    log_probability = torch.log_softmax(router_logits, dim=-1)
    # Where the difference of two scores overflows, a probability of 0 has a logarithm of -inf: it adds 0, too.
    log_probability = log_probability.clamp_(min=torch.finfo(log_probability.dtype).min)
    # Products of logarithms, for `entr` takes another one, and slowly.
    entropy = -log_probability.exp().mul_(log_probability).sum(-1)
    return masked_mean(entropy, mask) / math.log(max(router_logits.shape[-1], 2))


def mean_by_id(values: Tensor, token_ids: Tensor, vocab_size: int, mask: Tensor | None = None) -> Tensor:
    """Average values over the tokens of each id, then over the ids that occur; 0 where no token is real."""
    real = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    occurrences = values.new_zeros(vocab_size).scatter_add_(0, token_ids, real)
    weight = real / occurrences[token_ids].clamp(min=1)
    return (weight * values).sum() / weight.sum().clamp(min=1)


__all__ = [
    "CLOSED_GATE",
    "RoutingHealth",
    "common_direction",
    "mean_by_id",
    "mean_health",
    "router_entropy",
    "routing_health",
    "share_in_common",
]
