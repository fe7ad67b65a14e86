# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The frozen routing of a MoE layer: the table that stage 2 and inference route by (StableMoE, eq. 13)."""

import torch
from torch import Tensor, nn

from .configuration_stablemoe import StableMoEBaseConfig
from .tensors_stablemoe import copy_into, full_tensor


class FrozenRouter(nn.Module):
    """The frozen routing of one MoE layer: a table from vocabulary to expert, -1 while it is not frozen.

    A hash is frozen from the start.

    The table is an integer *parameter* without gradient rather than a buffer: accelerate's memory-efficient loading
    for FSDP2 knows parameters only. No optimizer, weight decay or cast reaches an integer parameter.
    """

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.is_hash = config.router_type == "hash"
        table = torch.full((config.vocab_size,), -1, dtype=torch.int32)
        self.routing_table = nn.Parameter(table, requires_grad=False)
        # Mirrors the table, so that a forward pass need not ask the device for a value.
        self.is_frozen = False

    def initial_table(self) -> Tensor:
        """Make the table of a new model: a random one with a hash, -1 otherwise; `torch.IntTensor` of shape `(V,)`."""
        empty = torch.full(self.routing_table.shape, -1, dtype=torch.int32)
        return empty.random_(self.num_experts) if self.is_hash else empty

    def forward(self, token_ids: Tensor) -> Tensor:
        """Look up the expert of each token.

        Args:
            token_ids (`torch.LongTensor` of any shape): in [0, V).

        Returns:
            `torch.LongTensor` of the shape of `token_ids`: in [0, E).
        """
        return full_tensor(self.routing_table)[token_ids].long()

    @torch.no_grad()
    def freeze(self, table: Tensor):
        """Store `table` and route by it from now on.

        Args:
            table (`torch.LongTensor` of shape `(V,)`): the expert of each token id, in [0, E).
        """
        copy_into(self.routing_table, table.to(self.routing_table.dtype))
        self.refresh()

    def values(self) -> Tensor:
        """Return the whole table, on the CPU: `torch.IntTensor` of shape `(V,)`."""
        table = self.routing_table
        # Read through `forward`, where the hooks of an offloaded model fetch it.
        ids = torch.arange(table.shape[0], device="cpu" if table.is_meta else table.device)
        return self(ids).int().cpu()

    @torch.no_grad()
    def resize(self, vocab_size: int):
        """Keep the rows of the first `vocab_size` ids; a new id v of a frozen table goes to expert v mod N.

        The rule for new ids needs no embedding, which is still noise when a vocabulary grows, and keeps loads even.
        """
        old = self.routing_table
        new_ids = torch.arange(min(old.shape[0], vocab_size), vocab_size, dtype=old.dtype, device=old.device)
        new_rows = new_ids % self.num_experts if self.is_frozen else torch.full_like(new_ids, -1)
        self.routing_table = nn.Parameter(torch.cat([old[:vocab_size], new_rows]), requires_grad=False)

    def refresh(self, name: str = "frozen_router"):
        """Re-derive the stage from the table, after anything has been written to it.

        Args:
            name (`str`): how to call this table in an error.

        Raises:
            ValueError: if the table is neither wholly unfrozen nor wholly a map into [0, N).
        """
        self.is_frozen = is_frozen_table(self.values(), self.num_experts, name)


def is_frozen_table(table: Tensor, num_experts: int, name: str) -> bool:
    """Tell a frozen routing table from one that is not frozen yet.

    Args:
        table (`torch.IntTensor` of shape `(V,)`): expert of each token id, or -1.
        num_experts (`int`): N.
        name (`str`): of the router that holds the table, for the error.

    Raises:
        ValueError: if it is neither wholly -1 nor wholly a map into [0, N).
    """
    low, high = int(table.min()), int(table.max())
    if low == high == -1:
        return False
    if low >= 0 and high < num_experts:
        return True
    row = int(((table < 0) | (table >= num_experts)).nonzero()[0])
    problem = "has no expert" if table[row] == -1 else f"is sent to expert {int(table[row])}"
    raise ValueError(
        f"The routing table `{name}.routing_table` is damaged: token id {row} {problem}, but a frozen table sends every "
        f"id to an expert in [0, {num_experts}). Restore the checkpoint from its source."
    )


__all__ = ["FrozenRouter", "is_frozen_table"]
