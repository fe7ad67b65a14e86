# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The frozen routing of a MoE layer, which stage 2 and inference route by (StableMoE, eq. 13).

It is a table where the distilled router sees the token alone, and weights where it looks back at earlier tokens.

Both are persistent integer buffers: no optimizer, weight decay, average of parameters or cast of the model reaches them,
and loops over `parameters()` need not know of them.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import is_torchdynamo_compiling

from .configuration_stablemoe import StableMoEBaseConfig
from .context_stablemoe import Tokens
from .distillation_stablemoe import distilled_router_class, sees_context
from .losses_stablemoe import is_distributed
from .tensors_stablemoe import (
    copy_into,
    from_bits,
    local_tensor,
    resize_rows,
    restore_integers,
    restored_integers,
    split_rows,
    to_bits,
)


class BalancedTable(NamedTuple):
    """A table within a limit of load, and how good it is."""

    table: (
        Tensor  # `torch.LongTensor` of shape (V,): expert of each token id; or (V, k): its k distinct ones, best first
    )
    agreement: float  # tokens kept on the expert that they prefer (expected number)
    best_agreement: float  # the same for the best table without a limit
    bound: float  # no table within the limit keeps more; equal to `agreement` where the table is surely the best
    limit: float  # tokens allowed on one expert, but for one of `alone`
    load: Tensor  # `torch.DoubleTensor` of shape (E,): tokens of each expert
    alone: Tensor  # `torch.LongTensor`: ids that outweigh the limit, heaviest first; each has k experts of its own


class FrozenRouting(nn.Module):
    """What both kinds share: whether they are frozen follows from what they hold, -1 everywhere while they are not.

    Contents may get here without a call to this module: an engine fills a buffer in place, replaces it, or moves
    it. So a forward pass calls `follow`, which reads the contents again if they may have changed: if a buffer says so, and
    when an evaluation begins or ends. A routing that was frozen may become that of stage 1, never another one:
    an average of buffers, say, would move tokens to other experts.
    """

    # What one is called in errors.
    noun: str

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.num_experts, self.num_experts_per_tok = config.num_experts, config.num_experts_per_tok
        # Mirrors the contents, so that a forward pass need not ask the device for a value.
        self.is_frozen = False
        # Whether it is a hash that nothing has been trained by yet: a checkpoint may replace it.
        self.is_initial = False
        # Of the frozen contents that were read last, by `encode`.
        self.digest: str | None = None
        # What `_signature` was then.
        self._seen: tuple | None = None
        self.register_load_state_dict_pre_hook(_check_contents_to_load)
        self.register_load_state_dict_post_hook(_follow_loaded_contents)

    def contents(self) -> dict[str, Tensor]:
        """Return all that is held, on the CPU, by buffer name."""
        return {name: values.cpu() for name, values in self.named_buffers()}

    def check(self, contents: dict[str, Tensor], name: str) -> bool:
        """Return True for frozen contents, False for contents that are not frozen yet, by buffer name.

        Raises:
            ValueError: naming the router, if they are damaged.
        """
        raise NotImplementedError

    def encode(self, contents: dict[str, Tensor]) -> bytes:
        """Write contents as bytes for a checksum: the same on every machine, different for every other routing."""
        raise NotImplementedError

    def refresh(self, name: str = "frozen_router"):
        """Derive the stage from the contents.

        Raises:
            ValueError: naming the router, if the contents are damaged, or were frozen and are another routing now.
        """
        for module_name, module in self.named_modules(prefix=name):
            restore_integers(module, module_name, dict.fromkeys(module._buffers, torch.int32))
        contents = self.contents()
        is_frozen = self.check(contents, name)
        digest = hashlib.sha256(self.encode(contents)).hexdigest() if is_frozen else None
        self._check_digest(digest, name)
        self.is_frozen, self.digest = is_frozen, digest
        self._seen = self._signature()

    def check_replacement(self, contents: dict[str, Tensor], name: str):
        """Refuse contents, by buffer name, that would turn one frozen routing into another.

        Raises:
            ValueError: if they are another routing, or damaged.
        """
        if self.check(contents, name):
            self._check_digest(hashlib.sha256(self.encode(contents)).hexdigest(), name)
        else:
            self.forget()

    def _check_digest(self, digest: str | None, name: str):
        if None not in (self.digest, digest) and self.digest != digest and not self.is_initial:
            raise ValueError(another_routing(self.noun, name))

    def follow(self, name: str = "frozen_router"):
        """Derive the stage again if the contents may have changed; where they have not, no device is asked for a value.

        Contents that are elsewhere, on the meta device, are left alone.

        Raises:
            ValueError: if the contents are damaged, are another routing than before, or a routing of stage 1 has been replaced
                by zeros.
        """
        if is_torchdynamo_compiling():
            return
        signature = self._signature()
        if signature == self._seen or not self.is_here():
            return
        contents = self.contents()
        if not self.is_frozen and self.num_experts > 1 and not any(values.any() for values in contents.values()):
            # 0.9 * -1 + 0.1 * -1 is -0.99999994 in float32, and 0 as an integer.
            raise ValueError(another_routing(self.noun, name))
        self.refresh(name)

    def is_here(self) -> bool:
        """Return True where the buffers can be read: not on the meta device, unless an offloading hook brings them."""
        return all(
            type(values) is Tensor and (not values.is_meta or hasattr(module, "_hf_hook"))
            for module in self.modules()
            for values in module._buffers.values()
        )

    def forget(self):
        """Accept whatever contents come next: they are about to be replaced on purpose."""
        self.digest, self.is_initial = None, False

    def expect(self, is_frozen: bool):
        """Take the stage from elsewhere until the contents change."""
        self.is_frozen, self.digest = is_frozen, None
        self._seen = self._signature()

    def _signature(self) -> tuple:
        """Return what changes when something is written to the buffers, without waiting for an accelerator."""
        traces = [self._trace_of(values) for module in self.modules() for values in module._buffers.values()]
        # A copy into `.data` leaves no trace. Programs swap an average of weights in and out that way to evaluate it: so the
        # first pass of an evaluation, and the first after it, reads the contents again. Lightning trains in eval mode what
        # came in that; in training mode passes without gradients, as of a reference model, alternate with others.
        evaluates = not self.training and not torch.is_grad_enabled()
        return self.training, evaluates, *traces

    def _trace_of(self, values: Tensor) -> tuple:
        if values.is_meta or type(values) is not Tensor:
            return (id(values),)
        version = None if values.is_inference() else values._version
        first = None
        if not self.is_frozen and values.device.type == "cpu":
            # One look tells that a routing is not that of stage 1 any more.
            first = values.flatten()[0].item()
        return id(values), values.data_ptr(), version, first

    def __getstate__(self) -> dict:
        # Where tensors lie means nothing in another process or in a copy.
        return {**self.__dict__, "_seen": None}


class FrozenRouter(FrozenRouting):
    """A table from vocabulary to expert, `(V,)`, or to several different ones, `(V, K)`. A hash is frozen from the start.

    With `split_token_ids` it has R rows in place of V: those of all ids, then for each split id those of the ids before it.
    """

    noun = "routing table"

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__(config)
        self.is_hash = config.router_type == "hash"
        self.split_token_ids = list(config.split_token_ids or ())
        several = () if config.num_experts_per_tok == 1 else (config.num_experts_per_tok,)
        shape = (config.num_routing_rows, *several)
        self.register_buffer("routing_table", torch.full(shape, -1, dtype=torch.int32))

    def initial_table(self) -> Tensor:
        """Return the table of a new model: a random one with a hash, -1 otherwise."""
        if not self.is_hash:
            return torch.full(self.routing_table.shape, -1, dtype=torch.int32)
        return random_table(len(self.routing_table), self.num_experts, self.num_experts_per_tok)

    def forward(self, tokens: tuple | Tensor) -> Tensor:
        """Look up the experts of each token: in [0, E), of the shape of the ids, with a last dimension K where K > 1."""
        return self.routing_table[Tokens.of(tokens).table_rows].long()

    def follow(self, name: str = "frozen_router"):
        """Follow the contents, except for a hash on several processes.

        DistributedDataParallel gives all processes the table of the first one, and writes it again before every pass.
        """
        if not (self.is_hash and is_distributed()):
            super().follow(name)

    @torch.no_grad()
    def freeze(self, table: Tensor):
        """Store the experts of each token id and route by them from now on."""
        self.forget()
        copy_into(self.routing_table, table.to(self.routing_table.dtype))
        self.refresh()

    def values(self) -> Tensor:
        """Return the whole table, on the CPU: `torch.IntTensor` of shape `(V,)`, or `(V, K)` where K > 1."""
        table = self.routing_table
        # Read through `forward`, where the hooks of an offloaded model fetch it.
        rows = torch.arange(table.shape[0], device="cpu" if table.is_meta else table.device)
        return self(rows).int().cpu()

    def contents(self) -> dict[str, Tensor]:
        """Return the table, which may be offloaded, on the CPU."""
        return {"routing_table": self.values()}

    def check(self, contents: dict[str, Tensor], name: str) -> bool:
        """Return True for a frozen table, False for one that is not frozen yet, or raise a `ValueError`."""
        return is_frozen_table(contents["routing_table"], self.num_experts, name)

    def encode(self, contents: dict[str, Tensor]) -> bytes:
        """Write the table as bytes, for a checksum."""
        table = contents["routing_table"]
        several = f", {table.shape[1]} per token" if table.dim() > 1 else ""
        split = f", split {self.split_token_ids}" if self.split_token_ids else ""
        header = f"|{self.num_experts} experts, {table.shape[0]} tokens{several}{split}|"
        return header.encode() + _to_bytes(table)

    @torch.no_grad()
    def split(self, token_ids: list[int]):
        """Add rows for the ids that may stand before these; they begin as those of these ids, so no token moves."""
        self.forget()
        self.split_token_ids = list(token_ids)
        self.routing_table = split_rows(self.routing_table, token_ids)
        self.refresh()

    @torch.no_grad()
    def resize(self, vocab_size: int):
        """Keep the rows of the first `vocab_size` ids; a new id v of a frozen table goes to expert v mod N.

        With several per token the j-th of them, j = 0, ..., is v + j floor(N / K) mod N. A split id has such a row for what
        stands before it, too. The rule for new ids needs no embedding, which is still noise when a vocabulary grows, and keeps loads even.
        """
        old = self.routing_table
        num_parts = 1 + len(self.split_token_ids)
        old_size = old.shape[0] // num_parts
        new_ids = torch.arange(min(old_size, vocab_size), vocab_size, dtype=old.dtype, device=old.device)
        step = self.num_experts // self.num_experts_per_tok
        places = torch.arange(self.num_experts_per_tok, dtype=old.dtype, device=old.device)
        new_rows = ((new_ids.unsqueeze(-1) + places * step) % self.num_experts).squeeze(-1)
        if not self.is_frozen:
            new_rows = torch.full_like(new_rows, -1)
        self.forget()
        self.routing_table = resize_rows(old, vocab_size, num_parts, new_rows)
        self.refresh()


class FrozenWeights(nn.Module):
    """The weights of a distilled router, float32, as the integers that have the same bits; -1, a NaN, is none yet."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.full(shape, -1, dtype=torch.int32))

    def forward(self) -> dict[str, Tensor]:
        """Return the weights by name, as integers: a `forward`, for the hooks of offloading."""
        return dict(self.named_buffers())


class FrozenContextRouter(FrozenRouting):
    """A copy of the weights of a distilled router that looks back at earlier tokens.

    Copied as bits, they are the same after a cast of the model to any dtype, and so is the routing.
    """

    noun = "frozen router"

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__(config)
        self.kind = config.distilled_router
        self.distilled_router_class = distilled_router_class(config)
        self.weights = FrozenWeights(self.distilled_router_class.shapes(config))

    def forward(self, tokens: tuple) -> Tensor:
        """Compute the experts of each token, `(B, S)`, or `(B, S, K)` where K > 1, in float64."""
        weights = {name: from_bits(bits) for name, bits in self.weights().items()}
        return self.distilled_router_class.assign_by(weights, tokens, self.num_experts_per_tok)

    @torch.no_grad()
    def freeze(self, weights: dict[str, Tensor]):
        """Store finite float32 weights of the distilled router by name, and route by them from now on."""
        self.forget()
        for name, bits in self.weights.named_buffers():
            copy_into(bits, to_bits(weights[name]))
        self.refresh()

    def contents(self) -> dict[str, Tensor]:
        """Return the weights, which may be offloaded, on the CPU."""
        return {f"weights.{name}": bits.cpu() for name, bits in self.weights().items()}

    def check(self, contents: dict[str, Tensor], name: str) -> bool:
        """Return True for frozen weights, which are finite, False where all are -1, or raise a `ValueError`."""
        if all(bool((bits == -1).all()) for bits in contents.values()):
            return False
        for key, bits in contents.items():
            bad = ~from_bits(bits).isfinite()
            if bad.any():
                row = int(bad.flatten().nonzero()[0])
                problem = "is missing" if int(bits.flatten()[row]) == -1 else "is NaN or infinite"
                raise ValueError(
                    f"The frozen router `{name}.{key}` is damaged: its number {row} {problem}, but frozen weights are all "
                    "finite. Restore the checkpoint from its source."
                )
        return True

    def encode(self, contents: dict[str, Tensor]) -> bytes:
        """Write the weights as bytes, for a checksum."""
        several = f", {self.num_experts_per_tok} per token" if self.num_experts_per_tok > 1 else ""
        parts = [f"|{self.kind}, {self.num_experts} experts{several}|".encode()]
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
        self.forget()
        self.weights.embedding = old[rows]
        self.refresh()


def another_routing(noun: str, name: str) -> str:
    """Return the error for frozen contents that have been replaced, naming what does that by accident."""
    return (
        f"What has been written to the {noun} of `{name}` is not the routing of this model: tokens would go to experts that have "
        "not learned them. Leave buffers out of averages of models (`use_buffers=False`), load the weights of one run only, "
        "or start from the other run's checkpoint."
    )


def contents_to_load(router: FrozenRouting, state_dict: dict[str, Tensor], name: str) -> dict[str, Tensor] | None:
    """Find the contents of a frozen router in a state dict, by buffer name, as integers on the CPU.

    A merge or an average of checkpoints may have written them as floats, a sharding engine as replicated tensors: the
    state dict gets integers in their place. `None` where some are missing or of another shape.

    Raises:
        ValueError: if they are not whole numbers.
    """
    contents = {}
    for key, own in router.named_buffers():
        value = state_dict.get(f"{name}.{key}" if name else key)
        if value is None or value.is_meta or value.shape != own.shape:
            return None
        contents[key] = restored_integers(local_tensor(value), torch.int32, f"{name}.{key}")
    state_dict.update({f"{name}.{key}" if name else key: values for key, values in contents.items()})
    return {key: values.cpu() for key, values in contents.items()}


def _check_contents_to_load(router: FrozenRouting, state_dict: dict, prefix: str, *args):
    """Refuse another frozen routing than the present one, loaded alone or with a model that holds this router."""
    name = prefix.removesuffix(".")
    contents = contents_to_load(router, state_dict, name)
    if contents is not None:
        router.check_replacement(contents, name or "frozen_router")


def _follow_loaded_contents(router: FrozenRouting, incompatible_keys):
    if router.is_here():
        router.refresh()


def is_frozen_table(table: Tensor, num_experts: int, name: str) -> bool:
    """Return True for a frozen routing table, `(V,)` or `(V, K)`, False for one that is not frozen yet.

    Raises:
        ValueError: naming the router, if it is neither wholly -1 nor wholly a map into [0, num_experts), to different
            experts where there are several.
    """
    if int(table.min()) == int(table.max()) == -1:
        return False
    experts_VK = table.view(len(table), -1)
    repeated_VK = repeated_experts(experts_VK)
    bad_VK = (experts_VK < 0) | (experts_VK >= num_experts) | repeated_VK
    if not bad_VK.any():
        return True
    row, place = bad_VK.nonzero()[0].tolist()
    expert = int(experts_VK[row, place])
    problem = "has no expert" if expert == -1 else f"is sent to expert {expert}"
    if expert in range(num_experts):
        problem += " twice"
    wanted = "an expert" if table.dim() == 1 else f"{table.shape[1]} different experts"
    raise ValueError(
        f"The routing table `{name}.routing_table` is damaged: token id {row} {problem}, but a frozen table sends every "
        f"id to {wanted} in [0, {num_experts}). Restore the checkpoint from its source."
    )


def repeated_experts(table: Tensor) -> Tensor:
    """Mark the experts that stand in their row once already, `(..., K) -> (..., K)`."""
    ordered, order = table.sort(dim=-1, stable=True)
    again = F.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
    return torch.zeros_like(again).scatter_(-1, order, again)


def random_table(vocab_size: int, num_experts: int, num_experts_per_tok: int) -> Tensor:
    """Draw the experts of each token id, `(V,)`, or `(V, K)`, all different, where K > 1: `torch.IntTensor`."""
    if num_experts_per_tok == 1:
        return torch.randint(num_experts, (vocab_size,), dtype=torch.int32)
    return torch.rand(vocab_size, num_experts).topk(num_experts_per_tok).indices.int()


def _to_bytes(values: Tensor) -> bytes:
    return values.cpu().numpy().astype("<i4").tobytes()


def build_frozen_router(config: StableMoEBaseConfig) -> FrozenRouting:
    """Build what the routing of a layer is frozen into: weights where it depends on earlier tokens, else a table."""
    return FrozenContextRouter(config) if sees_context(config) else FrozenRouter(config)


__all__ = [
    "BalancedTable",
    "FrozenContextRouter",
    "FrozenRouter",
    "FrozenRouting",
    "FrozenWeights",
    "another_routing",
    "build_frozen_router",
    "contents_to_load",
    "is_frozen_table",
    "random_table",
    "repeated_experts",
]
