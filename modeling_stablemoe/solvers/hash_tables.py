# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Tables for Hash Layer (Roller et al., 2021) that are balanced by how often tokens occur."""

import heapq
import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor


if TYPE_CHECKING:
    from datasets import Dataset


def count_tokens(
    rows: "Dataset", vocab_size: int, column: str = "input_ids", split_token_ids: Sequence[int] = ()
) -> Tensor:
    """Count how often each token id occurs, some of them by the id before them.

    Args:
        rows (`Dataset`): lists of token ids, of any lengths.
        vocab_size (`int`): V.
        column (`str`): that holds them.
        split_token_ids (sequence of `int`): ids that are counted by the id before them, where there is one.

    Returns:
        `torch.LongTensor` of shape `(V (1 + H),)`, with H split ids: the rows of a routing table (`StableMoEConfig.num_routing_rows`).

    Raises:
        ValueError: for a stream, which may have no end.
    """
    from datasets import IterableDataset  # not with the package, whose users may have models alone

    if isinstance(rows, IterableDataset):
        raise ValueError("A streamed corpus cannot be counted: leave --streaming out, or take --hash_table random.")
    part_of = np.zeros(vocab_size, dtype=np.int64)
    part_of[list(split_token_ids)] = np.arange(1, len(split_token_ids) + 1)
    counts = torch.zeros(vocab_size * (1 + len(split_token_ids)), dtype=torch.long)
    for batch in rows.select_columns(column).iter(batch_size=1000):
        sequences = [np.asarray(row, dtype=np.int64) for row in batch[column]]
        ids = np.concatenate(sequences)
        before = np.concatenate([np.concatenate([[-1], sequence[:-1]])[: len(sequence)] for sequence in sequences])
        is_split = (part_of[ids] > 0) & (before >= 0)
        table_rows = np.where(is_split, part_of[ids] * vocab_size + before, ids)
        counts += torch.bincount(torch.from_numpy(table_rows), minlength=len(counts))
    return counts


def least_load(token_counts: Tensor, num_experts: int, k: int = 1) -> float:
    """Compute the load max/mean that no table can go below: of an expert that has the most frequent row alone.

    Args:
        token_counts (`torch.LongTensor` of shape `(R,)`): how often each row of a table is looked up.
        num_experts (`int`): N.
        k (`int`): experts of a row.

    Returns:
        `float`: at least 1.
    """
    share = (token_counts.max() / token_counts.sum().clamp(min=1)).item()
    return max(1.0, share * num_experts / k)


def balanced_hash_table(token_counts: Tensor, num_experts: int, seed: int = 0, k: int = 1) -> Tensor:
    """Send each token id to the experts that have the fewest tokens so far, the most frequent ids first.

    Roller et al. (2021), section 3.1, "balanced assignment". No expert gets more than the mean load or its most
    frequent token alone, up to one further token id. With several experts per id the first is the one with the fewest tokens,
    the others are drawn from those that stay below the fullest: the ones with the fewest would go in pairs.

    Args:
        token_counts (`torch.LongTensor` of shape `(V,)`): how often each id occurs.
        num_experts (`int`): N.
        seed (`int`): orders ids that are equally frequent and, with several experts per id, draws these.
        k (`int`): experts of an id, all different, in [1, N].

    Returns:
        `torch.LongTensor` of shape `(V,)`, with more than one expert `(V, k)`: the experts of each id, in [0, N).

    Raises:
        ValueError: if there are not `k` experts.
    """
    if not 1 <= k <= num_experts:
        raise ValueError(f"`k` is {k}; pass an integer from 1 to the number of experts, {num_experts}.")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(token_counts), generator=generator)
    order = shuffled[token_counts[shuffled].argsort(descending=True, stable=True)]
    ids_and_counts = zip(order.tolist(), token_counts[order].tolist(), strict=True)
    if k > 1:
        return _draw_experts(ids_and_counts, len(token_counts), num_experts, seed, k)
    # An id that never occurs weighs nothing, so the number of ids decides between experts of equal load.
    loads = [(0, 0, expert) for expert in torch.randperm(num_experts, generator=generator).tolist()]
    heapq.heapify(loads)
    table = torch.empty(len(token_counts), dtype=torch.long)
    for token_id, count in ids_and_counts:
        load, num_ids, expert = heapq.heappop(loads)
        table[token_id] = expert
        heapq.heappush(loads, (load + count, num_ids + 1, expert))
    return table


def _draw_experts(
    ids_and_counts: Iterable[tuple[int, int]], vocab_size: int, num_experts: int, seed: int, k: int
) -> Tensor:
    """Give each id the expert with the least load and others at random that stay below the fullest; return `(V, k)`."""
    draw = random.Random(seed)
    loads, table = [0] * num_experts, torch.empty(vocab_size, k, dtype=torch.long)
    for token_id, count in ids_and_counts:
        others = draw.sample(range(num_experts), num_experts)
        experts = [min(others, key=loads.__getitem__)]
        others.remove(experts[0])
        most = max(loads) - count
        roomy = [expert for expert in others if loads[expert] <= most]
        # Without enough room, those with the least load.
        experts += (roomy if len(roomy) >= k - 1 else sorted(others, key=loads.__getitem__))[: k - 1]
        for expert in experts:
            loads[expert] += count
        table[token_id] = torch.tensor(experts)
    return table


__all__ = ["balanced_hash_table", "count_tokens", "least_load"]
