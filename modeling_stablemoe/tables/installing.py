# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Tables that choose the experts in models of transformers, whose own gates go on weighing them.

A decoder, its blocks and their routers stay where they are; their classes are extended while tables are installed. The decoder
hands the token ids down to its blocks, as it does with every keyword that it does not know. From a block to its router no
argument leads, as the MoE block between them takes hidden states alone: so the block tells its router the ids of a pass.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.model.decoder_stablemoe import blocks_of
from modeling_stablemoe.version import __version__

from .formulas import PROBED_TOKENS, RouterFacts, probe


TABLES_NAME = "routing_tables.safetensors"
# The table of DeepSeek-V4's routers, a part of its checkpoints: `(V, K)`.
HASH_TABLE = "tid2eid"


class _Extended:
    """What all extended classes share: a copy or a pickle finds them by their own class."""

    def __reduce_ex__(self, protocol):
        return _empty, type(self).__bases__, self.__getstate__()


def _empty(mixin: type, own_class: type[nn.Module]) -> nn.Module:
    return object.__new__(extended(mixin, own_class))


@cache
def extended(mixin: type, own_class: type[nn.Module]) -> type[nn.Module]:
    """Extend a class. It keeps name and module, by which transformers knows what a model records and must not split."""
    names = {"__module__": own_class.__module__, "__qualname__": own_class.__qualname__}
    return type(own_class.__name__, (mixin, own_class), names)


class DecoderWithTables(_Extended):
    """What the class of a decoder gains: it hands the token ids down to its blocks."""

    # Whether the config asked for the balance loss before no layer was left to balance.
    asked_for_balance: bool

    def forward(self, input_ids: Tensor | None = None, *args, **kwargs):
        """Run the decoder.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`): tokens.
            *args: other arguments of the decoder.
            **kwargs: other arguments of the decoder.

        Raises:
            ValueError: without `input_ids`; if router logits are asked for and no router is left that has any.
        """
        if input_ids is None:
            raise ValueError(
                "Some layers of this model route by a table from token ids, which `inputs_embeds` do not tell: pass `input_ids`, "
                "or take the tables out with `remove_tables(model)`."
            )
        if kwargs.get("output_router_logits") and not any(map(is_learned, routers_of(self).values())):
            raise ValueError(
                "`output_router_logits` is True, but all MoE layers route by tables, so there are no logits to balance. Leave it out; "
                "TRL's trainers ask for them unless they are given `router_aux_loss_coef=0.0`."
            )
        return super().forward(input_ids, *args, token_ids=input_ids, **kwargs)


class BlockWithTable(_Extended):
    """What the class of a block gains: it tells its router the token ids of a pass."""

    router_name: str

    def forward(self, hidden_states: Tensor, *args, token_ids: Tensor | None = None, **kwargs):
        """Run the block.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): input of the block.
            *args: other arguments of the block.
            token_ids (`torch.LongTensor` of shape `(batch, sequence)`): tokens.
            **kwargs: other arguments of the block.
        """
        router = self.get_submodule(self.router_name)
        router.token_ids = token_ids
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            router.token_ids = None


class RouterWithTable(_Extended):
    """What the class of a router gains: a table chooses, its own formula weighs.

    In the place of router logits it returns None, which nothing records: so no loss balances the layer.
    """

    routing_table: Tensor  # `(V, K)`, not part of the state dict
    facts: RouterFacts
    token_ids: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[None, Tensor, Tensor]:
        """Return None, weights and indices of the chosen experts, `(T, K)` each."""
        if self.token_ids is None:
            raise ValueError(
                f"This {type(self).__name__} routes by a table and was not told the token ids: call the whole model, with "
                "`input_ids`."
            )
        logits, weights, _ = super().forward(hidden_states, *args, **kwargs)
        index = self.routing_table[self.token_ids.reshape(-1)].long()
        return None, self.facts.formula(logits, index).to(weights.dtype), index


def is_hash(router: nn.Module) -> bool:
    """Return True for a router that has a table of its own, as in DeepSeek-V4's first layers."""
    return HASH_TABLE in router._buffers


def is_learned(router: nn.Module) -> bool:
    """Return True for a router that chooses experts by its logits."""
    return not is_hash(router) and not isinstance(router, RouterWithTable)


def routers_of(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Find the routers of a decoder with any head, by the index of their block; dense blocks have none.

    A router stands beside its experts, as `gate` or `router`.

    Raises:
        ValueError: for a model without any.
    """
    found = {}
    for index, block in enumerate(blocks_of(model.base_model)):
        for module in block.modules():
            children = dict(module.named_children())
            if "experts" in children and (router := children.get("gate", children.get("router"))) is not None:
                found[index] = router
    if not found:
        raise ValueError(
            f"A {type(model).__name__} has no routers beside experts, as Mixtral and Qwen3-MoE have, so no table can choose in their "
            "place."
        )
    return found


def facts_of(model: PreTrainedModel, index: int) -> RouterFacts:
    """Find out how the router of a block weighs experts, and how many it has and chooses.

    Raises:
        ValueError: naming the router, if its weights follow from no formula that is known here.
    """
    router = routers_of(model)[index]
    if isinstance(router, RouterWithTable):
        return router.facts
    ids = [torch.zeros(PROBED_TOKENS, dtype=torch.long)] if is_hash(router) else []
    facts = probe(router, model.config.hidden_size, *ids)
    if facts is None:
        raise ValueError(
            f"How a {type(router).__name__} (layer {index}) weighs its experts cannot be told from its logits and its choice, so no "
            "table can choose in its place. Leave its layer out of `layers`."
        )
    return facts


def moe_layers(model: PreTrainedModel) -> list[int]:
    """List the blocks of a model that have experts, by index.

    Args:
        model (`PreTrainedModel`): a decoder, with any head.

    Returns:
        `list[int]`: in ascending order.

    Raises:
        ValueError: for a model without any.
    """
    return list(routers_of(model))


def learned_layers(model: PreTrainedModel) -> list[int]:
    """List the blocks whose routers choose experts by hidden states, by index: not those with a table.

    Args:
        model (`PreTrainedModel`): a decoder, with any head.

    Returns:
        `list[int]`: in ascending order.
    """
    return [index for index, router in routers_of(model).items() if is_learned(router)]


def check_tables(tables: Tensor, vocab_size: int, num_experts: int, k: int):
    """Check that tables name, for every layer and token id, `k` different experts that there are.

    Args:
        tables (`torch.Tensor` of shape `(layers, V, k)`): integers.
        vocab_size (`int`): V.
        num_experts (`int`): experts of a layer.
        k (`int`): experts of a token.

    Raises:
        ValueError: naming the first id that is wrong, or the shape.
    """
    if tables.dim() != 3 or tables.shape[1:] != (vocab_size, k) or tables.dtype.is_floating_point:
        raise ValueError(
            f"Tables of {tables.dtype} and shape {tuple(tables.shape)} do not fit: this model takes integers of shape "
            f"(layers, {vocab_size}, {k}), that is (layers, vocabulary, experts of a token). `remap_tables` changes the "
            "vocabulary and the experts."
        )
    ordered = tables.sort(-1).values
    wrong = (ordered[..., 0] < 0) | (ordered[..., -1] >= num_experts) | (ordered.diff(dim=-1) == 0).any(-1)
    if wrong.any():
        layer, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"Table {layer} sends token id {token} to the experts {tables[layer, token].tolist()}; pass {k} different ones in "
            f"[0, {num_experts})."
        )


@torch.no_grad()
def install_tables(model: PreTrainedModel, tables: Tensor, layers: Sequence[int] | None = None):
    """Let tables choose the experts of layers; the model's own gates go on weighing the chosen ones, and learning to.

    In DeepSeek-V4's `hash_moe` layers the table is written to `tid2eid`, which its checkpoints hold. Elsewhere it
    is beside the weights, not in the state dict, and `save_tables` saves it. Tables that are there already are replaced.
    A layer with a table returns no router logits, so the model's balance loss leaves it out; once no layer has any,
    `config.output_router_logits` is set to False, for there is nothing to balance.

    Args:
        model (`PreTrainedModel`): a decoder of transformers whose routers return logits, weights and chosen experts, with any
            head. Not one that is compiled or wrapped.
        tables (`torch.Tensor` of shape `(len(layers), V, k)`): integers, for every token id its k experts, all different.
        layers (sequence of `int`, *optional*): indices of blocks. Default: all `hash_moe` layers of a model that has such,
            else all with experts.

    Raises:
        ValueError: for a model or layer that tables cannot be installed in, or tables that do not fit.
    """
    decoder, routers = model.base_model, routers_of(model)
    if layers is None:
        layers = [index for index, router in routers.items() if is_hash(router)] or list(routers)
    unknown = [index for index in layers if index not in routers]
    if unknown or len(set(layers)) != len(layers):
        raise ValueError(f"`layers` is {list(layers)}; pass different ones of those with experts: {list(routers)}.")
    if len(tables) != len(layers):
        raise ValueError(
            f"There are {len(tables)} tables for {len(layers)} layers ({list(layers)}); pass one for each."
        )
    facts = {index: facts_of(model, index) for index in layers}
    for table, index in zip(tables, layers, strict=True):
        check_tables(table[None], decoder.config.vocab_size, facts[index].num_experts, facts[index].k)
    for table, index in zip(tables, layers, strict=True):
        router = routers[index]
        if is_hash(router):
            if not hasattr(router, "table_before"):
                router.table_before = router.tid2eid.clone()
            router.tid2eid.copy_(table)
        elif isinstance(router, RouterWithTable):
            router.routing_table.copy_(table)
        else:
            block = blocks_of(decoder)[index]
            block.router_name = next(name for name, module in block.named_modules() if module is router)
            block.__class__ = extended(BlockWithTable, type(block))
            router.facts = facts[index]
            table = table.to(next(router.parameters()).device, torch.int32, copy=True)
            router.register_buffer("routing_table", table, persistent=False)
            router.__class__ = extended(RouterWithTable, type(router))
    _settle(decoder)


@torch.no_grad()
def remove_tables(model: PreTrainedModel, layers: Sequence[int] | None = None):
    """Take installed tables out again: the model is what it was, to the bit, but for weights that were trained since.

    Args:
        model (`PreTrainedModel`): with or without tables.
        layers (sequence of `int`, *optional*): indices of blocks. Default: all that tables were installed in.

    Raises:
        ValueError: if no table was installed in one of the layers.
    """
    decoder = model.base_model
    routers, installed = routers_of(model), installed_layers(model)
    for index in installed if layers is None else layers:
        if index not in installed:
            raise ValueError(f"No table was installed in layer {index}, only in {installed}.")
        router, block = routers[index], blocks_of(decoder)[index]
        if is_hash(router):
            router.tid2eid.copy_(router.table_before)
            del router.table_before
            continue
        router.__class__ = type(router).__bases__[1]
        del router.facts, router.routing_table
        router.__dict__.pop("token_ids", None)  # there since the first pass
        block.__class__ = type(block).__bases__[1]
        del block.router_name
    _settle(decoder)


def _settle(decoder: PreTrainedModel):
    """Extend the decoder while any router needs token ids, and ask for the balance loss while there is something to balance."""
    routers = routers_of(decoder).values()
    needs_ids = any(isinstance(router, RouterWithTable) for router in routers)
    if needs_ids and not isinstance(decoder, DecoderWithTables):
        decoder.asked_for_balance = getattr(decoder.config, "output_router_logits", False)
        decoder.__class__ = extended(DecoderWithTables, type(decoder))
    if not isinstance(decoder, DecoderWithTables):
        return
    if decoder.asked_for_balance:
        decoder.config.output_router_logits = any(map(is_learned, routers))
    if not needs_ids:
        decoder.__class__ = type(decoder).__bases__[1]
        del decoder.asked_for_balance


def installed_layers(model: PreTrainedModel) -> list[int]:
    """List the blocks that tables have been installed in, by index.

    Args:
        model (`PreTrainedModel`): a decoder, with any head.

    Returns:
        `list[int]`: in ascending order.
    """
    routers = routers_of(model)
    return [
        index
        for index, router in routers.items()
        if isinstance(router, RouterWithTable) or hasattr(router, "table_before")
    ]


def installed_tables(model: PreTrainedModel) -> Tensor:
    """Return the tables that have been installed, in the order of `installed_layers`.

    Args:
        model (`PreTrainedModel`): with tables.

    Returns:
        `torch.IntTensor` of shape `(layers, V, k)`, on the CPU.

    Raises:
        ValueError: if there are none.
    """
    routers = routers_of(model)
    tables = [routers[index].get_buffer(_table_name(routers[index])) for index in installed_layers(model)]
    if not tables:
        raise ValueError("No tables have been installed in this model: `install_tables(model, tables)`.")
    return torch.stack([table.int().cpu() for table in tables])


def _table_name(router: nn.Module) -> str:
    return HASH_TABLE if is_hash(router) else "routing_table"


def fingerprint(tables: Tensor, layers: Sequence[int], num_experts: int) -> str:
    """Return a checksum of tables: the same on every machine, different for every other routing.

    Args:
        tables (`torch.Tensor` of shape `(layers, V, k)`): integers.
        layers (sequence of `int`): indices of their blocks.
        num_experts (`int`): experts of a layer.

    Returns:
        `str`: a sha256, in hexadecimal digits.
    """
    header = f"{list(tables.shape)} of {num_experts} experts in layers {list(layers)}|"
    return hashlib.sha256(header.encode() + tables.cpu().numpy().astype("<i4").tobytes()).hexdigest()


def save_tables(model: PreTrainedModel, path: str | Path) -> Path:
    """Save the installed tables beside a model, whole or not at all: one safetensors file with a fingerprint in its metadata.

    Args:
        model (`PreTrainedModel`): with tables.
        path (`str` or `Path`): a folder that exists, in which the file is `routing_tables.safetensors`.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: if no tables are installed.
    """
    tables, layers = installed_tables(model), installed_layers(model)
    (num_experts,) = {facts_of(model, index).num_experts for index in layers}
    metadata = {
        "format": "pt",
        "modeling_stablemoe": __version__,
        "model_type": model.config.model_type,
        "layers": json.dumps(layers),
        "num_experts": str(num_experts),
        "fingerprint": fingerprint(tables, layers, num_experts),
    }
    path = Path(path) / TABLES_NAME
    replace_file(path, lambda partial: save_file({"tables": tables}, partial, metadata=metadata))
    return path


def load_tables(model: PreTrainedModel, path: str | Path):
    """Install tables that `save_tables` has saved.

    Args:
        model (`PreTrainedModel`): of the shape that they were saved from.
        path (`str` or `Path`): the folder, or the file.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is damaged or holds no tables, or they do not fit the model.
    """
    path = Path(path)
    path = path / TABLES_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"There are no routing tables {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "fingerprint" not in metadata or "tables" not in file.keys():
                raise ValueError(f"{path} holds no routing tables: it was not written by `save_tables`.")
            tables = file.get_tensor("tables")
    except SafetensorError as error:
        raise ValueError(f"{path} is no file of routing tables, or a damaged one ({error}).") from error
    layers, num_experts = json.loads(metadata["layers"]), int(metadata["num_experts"])
    if fingerprint(tables, layers, num_experts) != metadata["fingerprint"]:
        raise ValueError(f"The routing tables {path} are damaged: restore the file from its source.")
    for index in layers:
        if index in routers_of(model) and (found := facts_of(model, index).num_experts) != num_experts:
            raise ValueError(
                f"The tables {path} are of {num_experts} experts, layer {index} has {found}: `remap_tables`."
            )
    install_tables(model, tables, layers)


__all__ = [
    "check_tables",
    "facts_of",
    "fingerprint",
    "install_tables",
    "installed_layers",
    "installed_tables",
    "learned_layers",
    "load_tables",
    "moe_layers",
    "remove_tables",
    "routers_of",
    "save_tables",
]
