# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Count-based language models over the same blocks of tokens: baselines that a neural model must beat."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def ngram_perplexities(
    train: Iterable[Mapping], validation: Iterable[Mapping], vocab_size: int, em_steps: int = 20
) -> dict[str, float]:
    """Measure a unigram and an interpolated bigram model on the targets that a causal language model predicts.

    The bigram model is p(w | v) = a c(v, w) / c(v) + b c(w) / n + c / V (Jelinek and Mercer 1980); the unigram model
    lacks its first term. The weights are fitted by expectation maximisation to the validation tokens themselves, which
    favours the count models.

    Args:
        train (iterable of `Mapping`): blocks with `input_ids`, to count.
        validation (iterable of `Mapping`): blocks with `input_ids`; in each all tokens but the first are predicted.
        vocab_size (`int`): V.
        em_steps (`int`): iterations of the fit.

    Returns:
        `dict[str, float]`: perplexities `unigram` and `bigram`, per token.
    """
    train_ids, ids = (torch.tensor([block["input_ids"] for block in blocks]) for blocks in (train, validation))
    previous, target = ids[:, :-1].flatten(), ids[:, 1:].flatten()
    counts = torch.bincount(train_ids.flatten(), minlength=vocab_size).double()
    unigram = counts[target] / counts.sum()

    train_codes = (train_ids[:, :-1] * vocab_size + train_ids[:, 1:]).flatten()
    pairs, pair_counts = torch.unique(train_codes, return_counts=True)
    histories = torch.bincount(train_ids[:, :-1].flatten(), minlength=vocab_size).double()
    codes = previous * vocab_size + target
    place = torch.searchsorted(pairs, codes).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[place] == codes, pair_counts[place].double(), 0.0)
    bigram = seen / histories[previous].clamp(min=1)

    uniform = torch.full_like(unigram, 1 / vocab_size)
    return {
        "unigram": _interpolated_perplexity([unigram, uniform], em_steps),
        "bigram": _interpolated_perplexity([bigram, unigram, uniform], em_steps),
    }


def _interpolated_perplexity(models: list[Tensor], em_steps: int) -> float:
    """Fit the weights of a mixture to the tokens and return its perplexity."""
    probabilities = torch.stack(models)
    weights = torch.full((len(models), 1), 1 / len(models), dtype=torch.double)
    for _ in range(em_steps):
        joint = weights * probabilities
        weights = (joint / joint.sum(0)).mean(1, keepdim=True)
    return math.exp(-(weights * probabilities).sum(0).log().mean().item())
