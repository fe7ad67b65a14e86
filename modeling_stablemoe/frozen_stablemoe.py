# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The frozen routing of a MoE layer, which stage 2 and inference route by (StableMoE, eq. 13).

It is a table where the distilled router sees the token alone, and weights where it looks back at earlier tokens.

Both are integer *parameters* without gradient rather than buffers: accelerate's memory-efficient loading for FSDP2 knows
parameters only. No optimizer, weight decay or cast reaches an integer parameter.
"""

import torch
from torch import Tensor, nn

from .configuration_stablemoe import StableMoEBaseConfig
from .context_stablemoe import TokenContext
from .distillation_stablemoe import distilled_router_class, sees_context
from .tensors_stablemoe import copy_into, full_tensor, whole_shape


class FrozenRouting(nn.Module):
    """What both kinds share: whether they are frozen follows from what they hold, -1 everywhere while they are not."""

    # What one is called in errors.
    noun: str

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.num_experts = config.num_experts
        # Mirrors the contents, so that a forward pass need not ask the device for a value.
        self.is_frozen = False

    def contents(self) -> dict[str, Tensor]:
        """Return all that is held, whole and on the CPU, by parameter name."""
        raise NotImplementedError

    def check(self, contents: dict[str, Tensor], name: str) -> bool:
        """Tell frozen contents from those that are not frozen yet.

        Args:
            contents (`dict[str, torch.Tensor]`): as of `contents`.
            name (`str`): of the router that holds them, for the error.

        Raises:
            ValueError: if they are damaged.
        """
        raise NotImplementedError

    def encode(self, contents: dict[str, Tensor]) -> bytes:
        """Write contents for a checksum: the same on every machine, another for every other routing."""
        raise NotImplementedError

    def refresh(self, name: str = "frozen_router"):
        """Re-derive the stage from the contents, after anything has been written to them.

        Args:
            name (`str`): how to call this router in an error.

        Raises:
            ValueError: if the contents are damaged.
        """
        self.is_frozen = self.check(self.contents(), name)


class FrozenRouter(FrozenRouting):
    """A table from vocabulary to expert. A hash is frozen from the start."""

    noun = "routing table"

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__(config)
        self.is_hash = config.router_type == "hash"
        table = torch.full((config.vocab_size,), -1, dtype=torch.int32)
        self.routing_table = nn.Parameter(table, requires_grad=False)

    def initial_table(self) -> Tensor:
        """Make the table of a new model: a random one with a hash, -1 otherwise; `torch.IntTensor` of shape `(V,)`."""
        empty = torch.full(self.routing_table.shape, -1, dtype=torch.int32)
        return empty.random_(self.num_experts) if self.is_hash else empty

    def forward(self, token_ids: Tensor, context: TokenContext | None = None) -> Tensor:
        """Look up the expert of each token.

        Args:
            token_ids (`torch.LongTensor` of any shape): in [0, V).
            context (`TokenContext`, *optional*): of no consequence.

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
        ids = torch.arange(whole_shape(table)[0], device="cpu" if table.is_meta else table.device)
        return self(ids).int().cpu()

    def contents(self) -> dict[str, Tensor]:
        """See `FrozenRouting.contents`."""
        return {"routing_table": self.values()}

    def check(self, contents: dict[str, Tensor], name: str) -> bool:
        """See `FrozenRouting.check` and `is_frozen_table`."""
        return is_frozen_table(contents["routing_table"], self.num_experts, name)

    def encode(self, contents: dict[str, Tensor]) -> bytes:
        """See `FrozenRouting.encode`."""
        table = contents["routing_table"]
        header = f"|{self.num_experts} experts, {table.shape[0]} tokens|"
        return header.encode() + _to_bytes(table)

    @torch.no_grad()
    def resize(self, vocab_size: int):
        """Keep the rows of the first `vocab_size` ids; a new id v of a frozen table goes to expert v mod N.

        The rule for new ids needs no embedding, which is still noise when a vocabulary grows, and keeps loads even.
        """
        old = self.routing_table
        new_ids = torch.arange(min(old.shape[0], vocab_size), vocab_size, dtype=old.dtype, device=old.device)
        new_rows = new_ids % self.num_experts if self.is_frozen else torch.full_like(new_ids, -1)
        self.routing_table = nn.Parameter(torch.cat([old[:vocab_size], new_rows]), requires_grad=False)


class FrozenWeights(nn.Module):
    """The weights of a distilled router, float32, as the integers that have the same bits; -1, a NaN, is none yet."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name, shape in shapes.items():
            bits = torch.full(shape, -1, dtype=torch.int32)
            self.register_parameter(name, nn.Parameter(bits, requires_grad=False))

    def forward(self) -> dict[str, Tensor]:
        """Return the whole weights by name, `torch.IntTensor`s: a module of its own, for the hooks of offloading."""
        return {name: full_tensor(bits) for name, bits in self.named_parameters()}


class FrozenContextRouter(FrozenRouting):
    """A copy of the weights of a distilled router that looks back at earlier tokens; see `ContextRouter`.

    Copied as bits, they are the same after a cast of the model to any dtype, and so is the routing.
    """

    noun = "frozen router"

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__(config)
        self.kind = config.distilled_router
        self.distilled_router_class = distilled_router_class(config)
        self.weights = FrozenWeights(self.distilled_router_class.shapes(config))

    def forward(self, token_ids: Tensor, context: TokenContext) -> Tensor:
        """Compute the expert of each token, in float64.

        Args:
            token_ids (`torch.LongTensor` of shape `(B, S)`): the context holds them too.
            context (`TokenContext`): what came before them.

        Returns:
            `torch.LongTensor` of shape `(B, S)`: in [0, E).
        """
        weights = {name: bits.view(torch.float32) for name, bits in self.weights().items()}
        return self.distilled_router_class.assign_by(weights, context)

    @torch.no_grad()
    def freeze(self, weights: dict[str, Tensor]):
        """Store weights and route by them from now on.

        Args:
            weights (`dict[str, torch.Tensor]`): of the distilled router by name, finite, float32.
        """
        for name, bits in self.weights.named_parameters():
            copy_into(bits, weights[name].contiguous().view(torch.int32))
        self.refresh()

    def contents(self) -> dict[str, Tensor]:
        """See `FrozenRouting.contents`."""
        return {f"weights.{name}": bits.cpu() for name, bits in self.weights().items()}

    def check(self, contents: dict[str, Tensor], name: str) -> bool:
        """See `FrozenRouting.check`: frozen weights are finite, all others -1."""
        for key, bits in contents.items():
            if bits.dtype != torch.int32:
                raise ValueError(
                    f"The frozen router `{name}.{key}` is stored as {bits.dtype}, but its weights are bit patterns, int32. "
                    "Restore the checkpoint from its source; a cast of the model leaves integers alone."
                )
        if all(bool((bits == -1).all()) for bits in contents.values()):
            return False
        for key, bits in contents.items():
            bad = ~bits.view(torch.float32).isfinite()
            if bad.any():
                row = int(bad.flatten().nonzero()[0])
                problem = "is missing" if int(bits.flatten()[row]) == -1 else "is NaN or infinite"
                raise ValueError(
                    f"The frozen router `{name}.{key}` is damaged: its number {row} {problem}, but frozen weights are all "
                    "finite. Restore the checkpoint from its source."
                )
        return True

    def encode(self, contents: dict[str, Tensor]) -> bytes:
        """See `FrozenRouting.encode`."""
        parts = [f"|{self.kind}, {self.num_experts} experts|".encode()]
        for name, bits in sorted(contents.items()):
            parts += [f"|{name} {list(bits.shape)}|".encode(), _to_bytes(bits)]
        return b"".join(parts)

    @torch.no_grad()
    def resize(self, vocab_size: int):
        """Keep the rows of the first `vocab_size` ids; a new id v of V old ones is embedded as id v mod V is.

        The rule needs no embedding of the new ids, which is still noise when a vocabulary grows.
        """
        old = self.weights.embedding
        rows = torch.arange(vocab_size, device=old.device) % old.shape[0]
        self.weights.embedding = nn.Parameter(old[rows], requires_grad=False)


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


def _to_bytes(values: Tensor) -> bytes:
    return values.cpu().numpy().astype("<i4").tobytes()


def build_frozen_router(config: StableMoEBaseConfig) -> FrozenRouting:
    """Build what the routing of a layer is frozen into: weights where it depends on earlier tokens, else a table."""
    return FrozenContextRouter(config) if sees_context(config) else FrozenRouter(config)


__all__ = [
    "FrozenContextRouter",
    "FrozenRouter",
    "FrozenRouting",
    "FrozenWeights",
    "build_frozen_router",
    "is_frozen_table",
]
