# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Tables of several layers: from token counts, from the routing of a teacher, from other tables.

Shape suffixes: L layers, V token ids, E experts, K experts of an id, T tokens.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.model.context_stablemoe import final_token_mask
from modeling_stablemoe.model.frozen_stablemoe import BalancedTable
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin
from modeling_stablemoe.solvers.balancing import balanced_table
from modeling_stablemoe.solvers.hash_tables import balanced_hash_table

from .installing import check_tables, routers_of
from .recording import RoutedPass, RouteRecorder


COUNTS_NAME = "route_counts.safetensors"
# Batches between two writes of the counts.
SAVE_EVERY = 200
# What a batch may hold that decides on its routes.
INPUTS = ("input_ids", "attention_mask")


@dataclass
class RouteCounts:
    """Where the tokens of a text were routed.

    Attributes:
        layers (`list[int]`): indices of the blocks, L of them; of a StableMoE the numbers of its MoE layers.
        tokens (`torch.LongTensor` of shape `(V,)`): how often each token id occurs.
        chosen (`torch.IntTensor` of shape `(L, V, E)`): how many of its tokens had the expert among their k.
        first (`torch.IntTensor` of shape `(L, V, E)`, *optional*): how many gave it the largest weight.
        k (`int`): experts of a token.
    """

    layers: list[int]
    tokens: Tensor
    chosen: Tensor
    first: Tensor | None
    k: int


class MadeTables(NamedTuple):
    """Tables, and how good they are.

    Attributes:
        tables (`torch.LongTensor` of shape `(L, V, k)`): experts of each token id, best first.
        balanced (`list[BalancedTable]`): one per layer: agreement, what was possible, loads and heavy ids.
    """

    tables: Tensor
    balanced: list[BalancedTable]


class RouteCounter:
    """Counts the routes of the passes of a model, by forward hooks, while it is used as a context.

    Args:
        model (`PreTrainedModel`): a decoder of transformers with experts, with any head.
        layers (sequence of `int`, *optional*): indices of blocks. Default: all with experts.
        in_training (`bool`): count passes in training mode alone, or in eval mode alone.
        with_first (`bool`): count the experts of the largest weight, too.

    Attributes:
        counts (`RouteCounts`): so far, on the CPU.
        is_counting (`bool`): whether passes are counted now.

    Raises:
        ValueError: for a model without experts, or `layers` that it does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[int] | None = None,
        in_training: bool = False,
        with_first: bool = False,
    ):
        routers = routers_of(model)
        layers = list(routers if layers is None else layers)
        if not set(layers) <= routers.keys():
            raise ValueError(f"`layers` is {layers}; pass some of those with experts: {list(routers)}.")
        self._places = [list(routers).index(index) for index in layers]
        num_experts = routers[layers[0]].weight.shape[0]
        self.counts = _no_counts(layers, model.config.vocab_size, num_experts, with_first)
        self.in_training, self.is_counting = in_training, False
        self._decoder, self._recorder = model.base_model, RouteRecorder(model, self._count)

    def __enter__(self) -> "RouteCounter":
        self._recorder.__enter__()
        self.is_counting = True
        return self

    def __exit__(self, *error):
        self._recorder.__exit__()
        self.is_counting = False

    def _count(self, routed: RoutedPass):
        if self._decoder.training != self.in_training:
            return
        mask = final_token_mask(routed.arguments.get("attention_mask"), routed.input_ids.shape[1])
        _add(self.counts, routed.input_ids, mask, routed.routes[self._places], routed.first[self._places])


def _no_counts(layers: list[int], vocab_size: int, num_experts: int, with_first: bool) -> RouteCounts:
    tokens = torch.zeros(vocab_size, dtype=torch.long)
    chosen = torch.zeros(len(layers), vocab_size, num_experts, dtype=torch.int32)
    return RouteCounts(layers, tokens, chosen, torch.zeros_like(chosen) if with_first else None, 1)


def _add(counts: RouteCounts, input_ids: Tensor, mask: Tensor | None, routes_LBSK: Tensor, first_LBS: Tensor):
    ids_BS, counts.k = input_ids.to(routes_LBSK.device), routes_LBSK.shape[-1]
    is_real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask is None else mask.to(ids_BS.device)
    ids_T1 = ids_BS[is_real_BS].unsqueeze(-1)
    counts.tokens += torch.bincount(ids_T1.flatten().cpu(), minlength=len(counts.tokens))
    for counts_LVE, chosen_LBSK in ((counts.chosen, routes_LBSK), (counts.first, first_LBS.unsqueeze(-1))):
        if counts_LVE is None:
            continue
        for counts_VE, chosen_BSK in zip(counts_LVE, chosen_LBSK, strict=True):
            places = (ids_T1 * counts_VE.shape[1] + chosen_BSK[is_real_BS]).flatten().cpu()
            counts_VE.view(-1).index_add_(0, places, torch.ones(len(places), dtype=torch.int32))


@torch.no_grad()
def count_routes(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    layers: Sequence[int] | None = None,
    folder: str | Path | None = None,
    show_progress: bool = False,
    with_first: bool = False,
) -> RouteCounts:
    """Count where a model in eval mode routes the tokens of a text.

    This takes 4 bytes of memory per layer, token id and expert, twice as much `with_first`: 3.7 GB for 48 layers of 128 experts
    and 150 000 ids. Count fewer `layers` at a time where that is too much.

    Args:
        model (`PreTrainedModel`): a decoder of transformers with experts, with any head, or a StableMoE without encoder.
        batches (sequence of mappings): `input_ids` of shape `(batch, sequence)` and, with padding, `attention_mask`.
        layers (sequence of `int`, *optional*): indices of blocks; of a StableMoE the numbers of its MoE layers. Default: all
            with experts.
        folder (`str` or `Path`, *optional*): that exists; keeps the counts every 200 batches and at the end, so that a count
            which was interrupted goes on from there, with the same model and batches.
        show_progress (`bool`): show a progress bar.
        with_first (`bool`): count the experts of the largest weight, too; tables are not made of them.

    Returns:
        `RouteCounts`, on the CPU.

    Raises:
        ValueError: for a model without experts, `layers` that it does not have, or counts in the folder that do not fit.
    """
    file = None if folder is None else Path(folder) / COUNTS_NAME
    was_training = model.training
    model.eval()
    with ExitStack() as stack:
        if isinstance(model, TwoStageRoutingMixin):
            layers = list(range(model.config.num_moe_layers) if layers is None else layers)
            counts = _no_counts(layers, model.config.vocab_size, model.config.num_experts, with_first)
            run = partial(_count_stable, model, counts)
        else:
            counts = stack.enter_context(RouteCounter(model, layers, with_first=with_first)).counts
            run = partial(model.base_model, use_cache=False)
        digest = hashlib.sha256()
        done = _resume(counts, file, batches, digest)
        progress = tqdm(total=len(batches), initial=done, desc="Counting routes", disable=not show_progress)
        for number in range(done, len(batches)):
            inputs = _inputs(batches[number])
            run(**{name: values.to(model.device) for name, values in inputs.items()})
            progress.update()
            _update(digest, inputs)
            if file is not None and ((number + 1) % SAVE_EVERY == 0 or number + 1 == len(batches)):
                save_counts(counts, file, {"done": str(number + 1), "batches": digest.hexdigest()})
        progress.close()
    model.train(was_training)
    return counts


def _count_stable(
    model: TwoStageRoutingMixin, counts: RouteCounts, input_ids: Tensor, attention_mask: Tensor | None = None
):
    mask = final_token_mask(attention_mask, input_ids.shape[1])
    routes = model.route(input_ids, attention_mask)[counts.layers]
    routes_LBSK = routes.view(len(routes), *input_ids.shape, -1)
    _add(counts, input_ids, mask, routes_LBSK, routes_LBSK[..., 0])


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in INPUTS if name in batch}


def _update(digest, inputs: dict[str, Tensor]):
    for values in inputs.values():
        digest.update(f"|{list(values.shape)}|".encode() + values.cpu().numpy().tobytes())


def save_counts(counts: RouteCounts, file: Path, metadata: dict[str, str]):
    """Write counts to a file, whole or not at all."""
    metadata = {"layers": json.dumps(counts.layers), "k": str(counts.k), **metadata}
    tensors = _tensors(counts)
    replace_file(file, lambda partial_file: save_file(tensors, partial_file, metadata=metadata))


def _tensors(counts: RouteCounts) -> dict[str, Tensor]:
    tensors = {"tokens": counts.tokens, "chosen": counts.chosen, "first": counts.first}
    return {name: values for name, values in tensors.items() if values is not None}


def load_counts(counts: RouteCounts, file: Path):
    """Fill counts with those of a file.

    Raises:
        ValueError: if they are of other layers, or of a model of another shape.
    """
    with safe_open(file, "pt") as kept:
        metadata, tensors = kept.metadata(), _tensors(counts)
        if json.loads(metadata["layers"]) != counts.layers or any(
            name not in kept.keys() or kept.get_slice(name).get_shape() != list(values.shape)
            for name, values in tensors.items()
        ):
            raise ValueError(
                f"{file} holds counts of another model or other layers. Remove it, or name another folder."
            )
        for name, values in tensors.items():
            values.copy_(kept.get_tensor(name))
    counts.k = int(metadata["k"])


def _resume(counts: RouteCounts, file: Path | None, batches: Sequence[Mapping[str, Tensor]], digest) -> int:
    """Fill counts with those of a file, if there is one; return the number of batches that they are of."""
    if file is None or not file.is_file():
        return 0
    with safe_open(file, "pt") as kept:
        metadata = kept.metadata()
    done = int(metadata["done"])
    for number in range(min(done, len(batches))):
        _update(digest, _inputs(batches[number]))
    if metadata["batches"] != digest.hexdigest():
        raise ValueError(f"{file} holds counts of another text. Remove it, or name another folder.")
    load_counts(counts, file)
    return done


def counts_of_tables(tables: Tensor, token_counts: Tensor, num_experts: int) -> RouteCounts:
    """Write tables as the counts of a text that they have routed, to make others of them.

    Args:
        tables (`torch.Tensor` of shape `(L, V, k)`): integers; in [0, num_experts).
        token_counts (`torch.Tensor` of shape `(V,)`): how often each id occurs; whole numbers.
        num_experts (`int`): of the tables that will be made, as many as these have or more.

    Returns:
        `RouteCounts`: of layers 0 to L - 1.
    """
    tables = tables.long().cpu()
    counts = _no_counts(list(range(len(tables))), tables.shape[1], num_experts, False)
    count_V = token_counts.to("cpu", torch.int32).unsqueeze(-1)
    for chosen, table in zip(counts.chosen, tables, strict=True):
        chosen.scatter_(1, table, count_V.expand(table.shape))
    counts.tokens.copy_(token_counts)
    counts.k = tables.shape[2]
    return counts


def make_tables(
    counts: RouteCounts,
    max_load: float | None,
    k: int | None = None,
    folder: str | Path | None = None,
    show_progress: bool = False,
) -> MadeTables:
    """Choose the experts of each token id so that most routes that were counted stay, and no expert gets too many tokens.

    Each layer is a `balanced_table`: it has the agreement, what was possible, and the ids that outweigh the limit. An id v that
    the text does not have goes to the experts v, v + 1, ..., v + k - 1 modulo their number.

    Args:
        counts (`RouteCounts`): of a teacher, or of other tables.
        max_load (`float` or `None`): tokens allowed on one expert, in mean loads; >= 1. `None`: any number, each id keeps the
            experts that it had most often.
        k (`int`, *optional*): experts of a token. Default: as many as were counted.
        folder (`str` or `Path`, *optional*): that exists; keeps the table of each layer as soon as it is made, so that work
            which was interrupted goes on from there.
        show_progress (`bool`): show a progress bar.

    Returns:
        `MadeTables`: the same for the same counts.

    Raises:
        ValueError: for a `max_load` below 1, or more experts per token than there are.
    """
    k = counts.k if k is None else k
    if max_load is None:
        max_load = float(counts.chosen.shape[-1])  # all tokens on one expert
    made = []
    for layer in tqdm(range(len(counts.layers)), desc="Balancing", unit=" layers", disable=not show_progress):
        file = None if folder is None else Path(folder) / f"table-{counts.layers[layer]}.safetensors"
        made.append(_make_table(counts.chosen[layer], counts.tokens, max_load, k, file))
    return MadeTables(torch.stack([each.table.view(-1, k) for each in made]), made)


def _make_table(chosen_VE: Tensor, tokens_V: Tensor, max_load: float, k: int, file: Path | None) -> BalancedTable:
    digest = hashlib.sha256(f"{max_load} {k} {list(chosen_VE.shape)}|".encode())
    for values in (chosen_VE, tokens_V):
        digest.update(values.numpy().tobytes())
    if file is not None and file.is_file():
        with safe_open(file, "pt") as kept:
            if kept.metadata()["made_of"] == digest.hexdigest():
                numbers = kept.get_tensor("numbers").tolist()
                return BalancedTable(
                    kept.get_tensor("table"), *numbers, kept.get_tensor("load"), kept.get_tensor("alone")
                )
    made = balanced_table(chosen_VE, tokens_V, max_load, k=k)
    unseen = (tokens_V == 0).nonzero()
    made.table.view(-1, k)[unseen.squeeze(-1)] = (unseen + torch.arange(k)) % chosen_VE.shape[1]
    if file is not None:
        numbers = torch.tensor([made.agreement, made.best_agreement, made.bound, made.limit], dtype=torch.float64)
        tensors = {"table": made.table, "numbers": numbers, "load": made.load, "alone": made.alone}
        metadata = {"made_of": digest.hexdigest()}
        replace_file(file, lambda partial_file: save_file(tensors, partial_file, metadata=metadata))
    return made


def hash_tables(token_counts: Tensor, num_layers: int, num_experts: int, k: int, seed: int = 0) -> Tensor:
    """Make tables that spread the tokens of a text evenly and know nothing else of them.

    Source: Roller et al. (2021), section 3.1, "balanced assignment", with k distinct experts per id.

    Args:
        token_counts (`torch.LongTensor` of shape `(V,)`): how often each id occurs.
        num_layers (`int`): tables to make; they differ in how ids of equal frequency are spread.
        num_experts (`int`): experts of a layer.
        k (`int`): experts of a token, all different, in [1, num_experts].
        seed (`int`): of the first layer.

    Returns:
        `torch.LongTensor` of shape `(num_layers, V, k)`.
    """
    tables = [balanced_hash_table(token_counts, num_experts, seed + layer, k) for layer in range(num_layers)]
    return torch.stack(tables).view(num_layers, -1, k)


def remap_tables(
    tables: Tensor,
    num_experts: int,
    kept_experts: Sequence[int] | None = None,
    vocab_size: int | None = None,
    token_ids: Tensor | None = None,
) -> Tensor:
    """Carry tables over to a model with another vocabulary, or from which experts were pruned.

    A new id v has the experts v, v + 1, ..., v + k - 1 modulo their number. In the place of an expert that is gone comes the first
    of these that the id does not have yet.

    Args:
        tables (`torch.Tensor` of shape `(L, V, k)`): integers.
        num_experts (`int`): experts of a layer from now on.
        kept_experts (sequence of `int`, *optional*): old numbers of the experts, in their new order. Default: all stay.
        vocab_size (`int`, *optional*): keep the first so many ids, and append new ones where there are fewer.
        token_ids (`torch.LongTensor` of shape `(new V,)`, *optional*): for each id of another tokenizer the id whose experts it
            takes over, -1 for a new one. Instead of `vocab_size`.

    Returns:
        `torch.LongTensor` of shape `(L, new V, k)`.

    Raises:
        ValueError: if `kept_experts` are not `num_experts` different ones, both `vocab_size` and `token_ids` are given, an id is
            outside the tables, or they do not fit the number of experts.
    """
    num_old, k = tables.shape[1:]
    tables = tables.long().cpu()
    if kept_experts is not None:
        if len(kept_experts) != num_experts or len(set(kept_experts)) != num_experts or min(kept_experts) < 0:
            raise ValueError(f"`kept_experts` is {list(kept_experts)}; pass {num_experts} different old numbers >= 0.")
        new_number = torch.full((max(int(tables.max()), *kept_experts) + 1,), -1)
        new_number[torch.tensor(kept_experts)] = torch.arange(num_experts)
        tables = new_number[tables]
    if vocab_size is not None:
        if token_ids is not None:
            raise ValueError("`vocab_size` and `token_ids` are both given; pass one of them.")
        token_ids = torch.arange(vocab_size)
        token_ids[num_old:] = -1
    if token_ids is not None:
        if len(token_ids) and not -1 <= int(token_ids.min()) <= int(token_ids.max()) < num_old:
            raise ValueError(
                f"`token_ids` go from {token_ids.min()} to {token_ids.max()}; pass ids below {num_old}, or -1."
            )
        tables = tables[:, token_ids].masked_fill((token_ids == -1).view(1, -1, 1), -1)
    if k > num_experts:
        raise ValueError(f"`num_experts` is {num_experts}, but a token has {k}; keep as many at least.")
    for layer in tables:
        _fill_in(layer, num_experts)
    check_tables(tables, tables.shape[1], num_experts, k)
    return tables


def _fill_in(table_VK: Tensor, num_experts: int):
    """Replace each -1 by the first of the experts v, v + 1, ... that its id v does not have, in place."""
    for ids in (table_VK == -1).any(-1).nonzero().squeeze(-1).split(8192):
        rows = table_VK[ids]
        is_taken = torch.zeros(len(ids), num_experts + 1, dtype=torch.bool).scatter(1, rows % (num_experts + 1), True)
        order = (ids.unsqueeze(-1) + torch.arange(num_experts)) % num_experts
        for column in rows.unbind(1):
            # The first that is free; `max` finds the first of equals.
            found = order.gather(1, (~is_taken.gather(1, order)).int().max(1, keepdim=True).indices)
            is_gone = column == -1
            column[is_gone] = found.squeeze(1)[is_gone]
            is_taken.scatter_(1, column.unsqueeze(1), True)
        table_VK[ids] = rows


__all__ = [
    "COUNTS_NAME",
    "MadeTables",
    "RouteCounter",
    "RouteCounts",
    "count_routes",
    "counts_of_tables",
    "hash_tables",
    "load_counts",
    "make_tables",
    "remap_tables",
    "save_counts",
]
