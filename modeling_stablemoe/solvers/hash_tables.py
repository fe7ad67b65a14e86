# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Tables for Hash Layer (Roller et al., 2021) that are balanced by how often tokens occur."""

import heapq

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor


def count_tokens(rows: Dataset, vocab_size: int, column: str = "input_ids") -> Tensor:
    """Count how often each token id occurs.

    Args:
        rows (`Dataset`): lists of token ids, of any lengths.
        vocab_size (`int`): V.
        column (`str`): that holds them.

    Returns:
        `torch.LongTensor` of shape `(V,)`.

    Raises:
        ValueError: for a stream, which may have no end.
    """
    if isinstance(rows, IterableDataset):
        raise ValueError("A streamed corpus cannot be counted: leave --streaming out, or take --hash_table random.")
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for batch in rows.select_columns(column).iter(batch_size=1000):
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in batch[column]])
        counts += torch.bincount(torch.from_numpy(ids), minlength=vocab_size)
    return counts


def balanced_hash_table(token_counts: Tensor, num_experts: int, seed: int = 0, k: int = 1) -> Tensor:
    """Send each token id to the experts that have the fewest tokens so far, the most frequent ids first.

    Roller et al. (2021), section 3.1, "balanced assignment". No expert gets more than the mean load or its most
    frequent token alone, up to one further token id.

    Args:
        token_counts (`torch.LongTensor` of shape `(V,)`): how often each id occurs.
        num_experts (`int`): N.
        seed (`int`): orders ids that are equally frequent, and names the experts.
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
    # An id that never occurs weighs nothing, so the number of ids decides between experts of equal load.
    loads = [(0, 0, expert) for expert in torch.randperm(num_experts, generator=generator).tolist()]
    heapq.heapify(loads)
    table = [[0] * k] * len(token_counts)
    for token_id, count in zip(order.tolist(), token_counts[order].tolist(), strict=True):
        least = [heapq.heappop(loads) for _ in range(k)]
        table[token_id] = [expert for _, _, expert in least]
        for load, num_ids, expert in least:
            heapq.heappush(loads, (load + count, num_ids + 1, expert))
    table_VK = torch.tensor(table, dtype=torch.long).view(-1, k)
    return table_VK.squeeze(-1) if k == 1 else table_VK


__all__ = ["balanced_hash_table", "count_tokens"]
