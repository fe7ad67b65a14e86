# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Batches of about equally many tokens for sequence-to-sequence training, and their padding.

As in fairseq, batches are formed once, from pairs of similar length, and only their order changes from epoch to epoch.
They are the items of a data set, so that the Trainer samples, shards, accumulates and resumes them like rows.
"""

from bisect import bisect_right
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import BatchEncoding, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from .text import check_counts


_MODEL_COLUMNS = ("input_ids", "attention_mask", "labels")
# Rows whose lengths are read at once.
_ROWS_PER_READ = 10_000


class TokenBatches(torch.utils.data.Dataset):
    """A data set whose items are whole batches: pairs of similar length, up to a number of tokens.

    Train on it with `per_device_train_batch_size=1` and `TokenBatchCollator`; what the Trainer then counts as examples
    are batches. Pairs are sorted by their longer side, then by how much longer it is, and cut greedily.

    Attributes:
        num_pairs (`int`): pairs in all batches together.
        num_tokens (`int`): source and target tokens in all batches together, without padding.
        padding_share (`float`): share of padding, in [0, 1), among the tokens of all batches, where each batch pads its
            sources to the longest source and its targets to the longest target.
    """

    def __init__(self, dataset: Dataset, max_tokens: int, seed: int = 0, max_pairs: int | None = None) -> None:
        """Form the batches.

        Args:
            dataset (`datasets.Dataset`): pairs, with the columns `input_ids` (source) and `labels` (target), token ids.
            max_tokens (`int`): most tokens per batch, at least 1: pairs times the longest source or target among them,
                padding included.
            seed (`int`): orders pairs of equal lengths; the same seed gives the same batches.
            max_pairs (`int`, *optional*): most pairs per batch, at least 1; default: no limit but `max_tokens`.

        Raises:
            ValueError: if a limit is below 1, the data set is empty or lacks a column, or a pair exceeds `max_tokens`.
        """
        check_counts({"max_tokens": max_tokens, "max_pairs": max_pairs})
        source_lengths, target_lengths = (row_lengths(dataset, column) for column in ("input_ids", "labels"))
        sizes = np.maximum(source_lengths, target_lengths)
        if len(sizes) == 0:
            raise ValueError("The data set is empty: batches need pairs. Check its split and what was filtered out.")
        longest_pair = int(np.argmax(sizes))
        if sizes[longest_pair] > max_tokens:
            raise ValueError(
                f"max_tokens is {max_tokens}, but pair {longest_pair} has a side of {sizes[longest_pair]} tokens; raise "
                f"max_tokens to at least {sizes[longest_pair]}, or drop or truncate longer pairs."
            )
        ties = np.random.default_rng(seed).permutation(len(sizes))
        # Pairs of one size run from longer sources to longer targets, those of the next size back again.
        excess = np.where(sizes % 2 == 0, 1, -1) * (target_lengths - source_lengths)
        order = np.lexsort((ties, excess, sizes))
        starts = _batch_starts(sizes[order], max_tokens, max_pairs or len(order))

        self.num_pairs = len(order)
        self.num_tokens = int(source_lengths.sum() + target_lengths.sum())
        pairs_per_batch = np.diff(starts, append=len(order))
        longest = [np.maximum.reduceat(lengths[order], starts) for lengths in (source_lengths, target_lengths)]
        self.padding_share = 1 - self.num_tokens / max(1, int((pairs_per_batch * sum(longest)).sum()))
        self._rows = dataset.select_columns(["input_ids", "labels"]).with_format(None)
        self._batches = np.split(order, starts[1:])

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __getitem__(self, index: int) -> list[dict[str, list[int]]]:
        """Return the rows of one batch, each with `input_ids` and `labels`."""
        columns = self._rows[self._batches[index]]
        return [
            {"input_ids": source, "labels": target}
            for source, target in zip(columns["input_ids"], columns["labels"], strict=True)
        ]


class TokenBatchCollator:
    """Pad the rows of batches from `TokenBatches`, or rows of a plain data set, to tensors for a model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> None:
        """Prepare the padding.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): has a padding token; its `padding_side` holds for both sides.
            pad_to_multiple_of (`int`, *optional*): round the padded lengths up to a multiple of this number of tokens
                (8 suits tensor cores), beyond what `TokenBatches` counts; default: pad to the longest.
        """
        self._pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=pad_to_multiple_of)

    def __call__(self, features: list[list[dict[str, Any]]] | list[dict[str, Any]]) -> BatchEncoding:
        """Collate what a DataLoader took from its data set.

        Args:
            features (`list`): items of `TokenBatches` (their rows are joined to one batch), or rows; columns that the
                model does not take, such as texts, are left out.

        Returns:
            `BatchEncoding`: `input_ids`, padded with the padding token, `attention_mask`, 1 on real tokens, and
            `labels`, padded with -100; each a `torch.LongTensor` of shape `(pairs, longest of its side)`.
        """
        rows = [row for item in features for row in ([item] if isinstance(item, dict) else item)]
        return self._pad([{key: row[key] for key in _MODEL_COLUMNS if key in row} for row in rows])


def sort_by_length(dataset: Dataset) -> tuple[Dataset, np.ndarray]:
    """Sort rows for evaluation, so that a batch of neighbours has little padding.

    The longest source comes first: if memory does not suffice, the first batch shows it.

    Args:
        dataset (`datasets.Dataset`): rows with the column `input_ids`; others are kept.

    Returns:
        `tuple`: the sorted rows, and for each its index in `dataset` (`np.ndarray` of shape `(rows,)`), by which
        predictions are put back into the original order: `restored[order] = predictions`.

    Raises:
        ValueError: if the data set lacks the column.
    """
    order = np.argsort(-row_lengths(dataset, "input_ids"), kind="stable")
    return dataset.select(order), order


def row_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """Return the number of tokens in a column of each row, int64, without making Python lists of them."""
    if column not in dataset.column_names:
        raise ValueError(
            f"The data set has no column {column!r} of token ids; it has: {', '.join(dataset.column_names)}."
        )
    tables = dataset.select_columns([column]).with_format("arrow").iter(_ROWS_PER_READ)
    lengths = [pc.list_value_length(table[column]).to_numpy() for table in tables]
    return np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)


def _batch_starts(sizes: np.ndarray, max_tokens: int, max_pairs: int) -> np.ndarray:
    """Return the first place of each batch, given sizes in ascending order."""
    starts = []
    start = 0
    while start < len(sizes):
        starts.append(start)
        # The cost of a batch grows with its end, since sizes ascend.
        ends = range(start + 1, min(start + max_pairs, len(sizes)) + 1)
        start += bisect_right(ends, max_tokens, key=lambda end: (end - starts[-1]) * sizes[end - 1])
    return np.array(starts)
