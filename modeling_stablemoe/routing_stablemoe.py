# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Routers: hidden states and token ids in, which expert and which gate out.

`StableRouter` is the paper's backbone router with its distilled router, `FrozenRouter` the table that both become.
A router knows nothing of experts, masks or losses.

Shape suffixes: B batch, S sequence, T = B * S tokens, D hidden size, E experts, V vocabulary, R distilled router width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import is_torchdynamo_compiling, logging
from transformers.utils.generic import maybe_autocast

from .configuration_stablemoe import StableMoEBaseConfig


logger = logging.get_logger(__name__)


class RoutingDecision(NamedTuple):
    """What a router decides for T tokens.

    Attributes:
        router_logits (`torch.Tensor` of shape `(T, E)`): backbone scores s, float32 (float64 in a float64 model).
        expert_index (`torch.LongTensor` of shape `(B, S)`): the expert of each token, in [0, E).
        gate (`torch.Tensor` of shape `(B, S)`): sigmoid(s) of that expert, in (0, 1), dtype of `router_logits`.
        distilled_logits (`torch.Tensor` of shape `(T, E)`, *optional*): distilled scores while the router is learned.
    """

    router_logits: Tensor
    expert_index: Tensor
    gate: Tensor
    distilled_logits: Tensor | None


def _score(features: Tensor, centroids: Tensor) -> Tensor:
    """Dot products in float32 whatever the autocast (float64 for float64 input), `(..., D) x (E, D) -> (..., E)`."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    with maybe_autocast(device_type=features.device.type, enabled=False):
        return _finite(F.linear(features.to(dtype), centroids.to(dtype)))


def _finite(scores: Tensor) -> Tensor:
    """Let a non-finite score count as the lowest finite one of its token (as 0 where the token has none)."""
    finite = torch.isfinite(scores)
    # Asking for a value makes an accelerator wait, so only the CPU is asked.
    if scores.device.type == "cpu" and not is_torchdynamo_compiling() and not finite.all():
        logger.warning_once(
            "Routing scores are NaN or infinite: they count as the lowest finite score of their token. The hidden "
            "states or the router have diverged; lower the learning rate or clip gradients."
        )
    lowest = torch.where(finite, scores, torch.inf).amin(-1, keepdim=True)
    lowest = torch.where(torch.isfinite(lowest), lowest, 0.0).detach()
    return torch.where(finite, scores, lowest)


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
        return _score(embedding if token_ids is None else F.embedding(token_ids, embedding), centroids)

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


class StableRouter(nn.Module):
    """StableMoE's router, row by row of paper table 1.

    Stage 1, training: greedy on the backbone scores, a_t = argmax_i s_{t,i} (eqs. 5 and 6). Stage 1, evaluation: the
    distilled router, as in the released code. Stage 2: the expert is given, frozen. The gate is the sigmoid of the
    backbone score in every case (eqs. 7 and 14), so the centroids E keep learning.
    """

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.centroids = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))  # E
        self.distilled_router = DistilledRouter(config)

    def forward(self, hidden_states: Tensor, token_ids: Tensor, frozen_index: Tensor | None = None) -> RoutingDecision:
        """Decide for each token.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, S, D)`): input h of the MoE layer.
            token_ids (`torch.LongTensor` of shape `(B, S)`): X, in [0, V).
            frozen_index (`torch.LongTensor` of shape `(B, S)`, *optional*): the frozen expert of each token (eq. 13);
                `None` in stage 1.

        Returns:
            `RoutingDecision`
        """
        router_logits = _score(hidden_states.reshape(-1, hidden_states.shape[-1]), self.centroids)
        distilled_logits = None
        if frozen_index is not None:
            expert_index = frozen_index
        else:
            distilled_logits = self.distilled_router(token_ids).flatten(0, -2)
            expert_index = router_logits.argmax(-1).view_as(token_ids) if self.training else self.assign(token_ids)
        gate = torch.sigmoid(router_logits.gather(-1, expert_index.view(-1, 1))).view_as(expert_index)
        return RoutingDecision(router_logits, expert_index, gate, distilled_logits)

    def assign(self, token_ids: Tensor) -> Tensor:
        """Give the experts that inference would use now, in stage 1.

        Args:
            token_ids (`torch.LongTensor` of any shape): in [0, V).

        Returns:
            `torch.LongTensor` of the shape of `token_ids`: in [0, E).
        """
        return self.distilled_router.table()[token_ids]

    def stage1_parameters(self) -> list[nn.Parameter]:
        """List the parameters that learn in stage 1 only, D and E^: the frozen table stands for them in stage 2."""
        return list(self.distilled_router.parameters())

    def resize(self, vocab_size: int):
        """Follow the vocabulary to a new size; see `DistilledRouter.resize`."""
        self.distilled_router.resize(vocab_size)

    def freeze(self) -> Tensor:
        """Decide what stage 2 will route by (eq. 13), for the whole vocabulary.

        Returns:
            `torch.LongTensor` of shape `(V,)`: the expert of each token id.
        """
        return self.distilled_router.table()


class FrozenRouter(nn.Module):
    """The frozen routing of one MoE layer: a table from vocabulary to expert, -1 while it is not frozen.

    The table is an integer *parameter* without gradient rather than a buffer: accelerate's memory-efficient loading
    for FSDP2 knows parameters only. No optimizer, weight decay or cast reaches an integer parameter.
    """

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.num_experts = config.num_experts
        table = torch.full((config.vocab_size,), -1, dtype=torch.int32)
        self.routing_table = nn.Parameter(table, requires_grad=False)
        # Mirrors the table, so that a forward pass need not ask the device for a value.
        self.is_frozen = False

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


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that FSDP2 or tensor parallelism has sharded; any other tensor is returned as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copy_into(target: Tensor, values: Tensor):
    """Copy whole `values` into `target`, each process its own part where `target` is sharded."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(target.device), target.device_mesh, target.placements)
    target.copy_(values)


# The names of `router_type`; the one place where a strategy is chosen.
ROUTERS: dict[str, Callable[[StableMoEBaseConfig], nn.Module]] = {"stable": StableRouter}


def build_router(config: StableMoEBaseConfig) -> nn.Module:
    """Build the router that `config.router_type` names.

    Raises:
        ValueError: if the name is unknown.
    """
    if config.router_type not in ROUTERS:
        raise ValueError(f"`router_type` {config.router_type!r} is unknown; choose one of {sorted(ROUTERS)}.")
    return ROUTERS[config.router_type](config)


__all__ = ["DistilledRouter", "FrozenRouter", "RoutingDecision", "StableRouter", "build_router", "is_frozen_table"]
