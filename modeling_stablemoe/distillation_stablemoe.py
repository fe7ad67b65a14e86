# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Distilled routers: what a routing is distilled into while it is learned (StableMoE, eq. 12 and table 6).

Shape suffixes: E experts, V vocabulary, R distilled router width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_stablemoe import StableMoEBaseConfig
from .tensors_stablemoe import full_tensor, score


class DistilledRouter(nn.Module):
    """The router that sees only the token: s^_{t,i} = E^_i . D(X_t) (StableMoE, eq. 12)."""

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.distilled_router_dim))  # D
        self.centroids = nn.Parameter(torch.empty(config.num_experts, config.distilled_router_dim))  # E^

    def forward(self, token_ids: Tensor | None = None) -> Tensor:
        """Score tokens.

        Args:
            token_ids (`torch.LongTensor` of any shape `(...)`, *optional*): in [0, V); `None` is the whole vocabulary.

        Returns:
            `torch.Tensor` of shape `(..., E)`: distilled scores, float32 (float64 in a float64 model).
        """
        embedding, centroids = full_tensor(self.embedding), full_tensor(self.centroids)
        return score(embedding if token_ids is None else F.embedding(token_ids, embedding), centroids)

    def table(self) -> Tensor:
        """Evaluate a^(v) = argmax_i E^_i . D(v) (eq. 13) for the whole vocabulary; ties go to the lowest index.

        Evaluation in stage 1 and the freezing of the router both read this one product, so they agree to the bit.

        Returns:
            `torch.LongTensor` of shape `(V,)`: the expert of each token id.
        """
        with torch.no_grad():
            return self().argmax(-1)

    @torch.no_grad()
    def resize(self, vocab_size: int):
        """Keep the rows of the first `vocab_size` ids; new ids start as the initialisation starts them, at N(0, 1)."""
        old = self.embedding
        new_rows = torch.randn(max(vocab_size - old.shape[0], 0), old.shape[1], dtype=old.dtype, device=old.device)
        self.embedding = nn.Parameter(torch.cat([old[:vocab_size], new_rows]), requires_grad=old.requires_grad)


__all__ = ["DistilledRouter"]
