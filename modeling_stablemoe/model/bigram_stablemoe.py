# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Parameters that are looked up and no experts: embeddings of a token and the one before it.

Shape suffixes: B batch, S sequence, T = B * S tokens, D hidden size, R rows.
"""

import torch
from torch import Tensor, nn

from .configuration_stablemoe import StableMoEBaseConfig
from .context_stablemoe import Tokens, previous_ids


# Odd numbers of 31 bits, so that products with ids stay integers of 64 bits.
MULTIPLIERS = (0x5BD1E995, 0x2C1B3C6D)


class BigramEmbedding(nn.Module):
    """What an MoE layer adds beside its experts: sigmoid(w . h_t) P e, e the row that token t and the one before are hashed to."""

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.num_bigram_embeddings, config.hidden_size)
        self.gate = nn.Parameter(torch.empty(config.hidden_size))  # w
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)  # P
        self.proj.starts_at_zero = True  # a new one changes nothing

    def forward(self, hidden_states: Tensor, tokens: tuple) -> Tensor:
        """Compute what is added to each token, `(T, D) -> (T, D)`.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`): h.
            tokens (`tuple`): in the order of `Tokens`; a token whose predecessor is not known counts as the first.
        """
        gate_T1 = torch.sigmoid((hidden_states * self.gate).sum(-1, keepdim=True))
        return gate_T1 * self.proj(self.embedding(self.rows(tokens).flatten()))

    def rows(self, tokens: tuple) -> Tensor:
        """Hash each token and the one before it, `(B, S)`: in [0, R)."""
        first, second = MULTIPLIERS
        mixed = (previous_ids(tokens) + 1) * first + Tokens.of(tokens).token_ids * second
        return (mixed ^ (mixed >> 15)) % self.embedding.num_embeddings


__all__ = ["BigramEmbedding"]
