# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Gated experts, one SwiGLU FFN each, in the layout of transformers' own MoE models.

Names, shapes and backends are those of Mixtral's experts, so whatever transformers and PEFT do to these (kernels,
quantisation, sharding, adapters) they do to ours.

Shape suffixes: T tokens, K experts per token, D hidden size, E experts, F expert hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from .configuration_stablemoe import StableMoEBaseConfig


@use_experts_implementation
class StableMoEGatedExperts(nn.Module):
    """The gated experts of one MoE layer: FFN_i(x) = W_i (act(G_i x) * U_i x)."""

    # Whether the FFN that they are copies of, if any, computes G x and U x as one product: what is apart in memory may be
    # rounded otherwise, and copies that run as one compute what that FFN did, to the bit.
    has_fused_gate = False

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.expert_size
        # G and U, one above the other.
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute sum_k w_{t,k} FFN_{i(t,k)}(x_t), one expert after the other: the readable reference of the backends.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`): x.
            top_k_index (`torch.LongTensor` of shape `(T, K)`): i, the experts of each token, in [0, E).
            top_k_weights (`torch.Tensor` of shape `(T, K)`): w.

        Returns:
            `torch.Tensor` of shape `(T, D)`.
        """
        summed_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            tokens, places = (top_k_index == expert).nonzero(as_tuple=True)
            inner_RF = self._apply_gate(F.linear(hidden_states[tokens], self.gate_up_proj[expert]))
            out_RD = F.linear(inner_RF, self.down_proj[expert])
            weighted_RD = (out_RD * top_k_weights[tokens, places].unsqueeze(-1)).to(summed_TD.dtype)
            summed_TD = summed_TD.index_add(0, tokens, weighted_RD)
        return summed_TD

    def forward_shared(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute what `forward` does where all experts are equal, and keep them equal while they learn."""
        gate_up_proj = _any_of(self.gate_up_proj)
        if self.has_fused_gate:
            gate_TF, up_TF = F.linear(hidden_states, gate_up_proj).chunk(2, dim=-1)
        else:
            gate_TF, up_TF = (F.linear(hidden_states, matrix) for matrix in gate_up_proj.chunk(2))
        out_TD = F.linear(self.act_fn(gate_TF) * up_TF, _any_of(self.down_proj))
        return (out_TD * top_k_weights.sum(-1, keepdim=True)).to(hidden_states.dtype)


def _any_of(equal: Tensor) -> Tensor:
    """Return one of equal matrices, `(E, X, Y) -> (X, Y)`, whose gradient all get the same share of: a mean may round."""
    mean = equal.mean(0)
    return equal[0].detach() + (mean - mean.detach())


class StableMoESharedExperts(nn.Module):
    """The experts that every token takes, `num_shared_experts` of them side by side: one gated FFN of their width."""

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        width = config.num_shared_experts * config.expert_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.down_proj.starts_at_zero = True  # new experts change nothing
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute the sum of their FFNs, `(T, D) -> (T, D)`."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


__all__ = ["StableMoEGatedExperts", "StableMoESharedExperts"]
