"""Tests of the table of results and of the count-based yardsticks."""

import math
from collections import Counter

import pytest
import torch

from modeling_stablemoe.measure.ngram import ngram_perplexities
from modeling_stablemoe.measure.report import format_results, format_table, stage_rows


HISTORY = [
    {"step": 5, "loss": 9.0, "routing_stage": 1, "load_max_over_mean": 3.0},
    {"step": 5, "eval_loss": 3.0},
    {"step": 5, "routing_fluctuation": 0.3},
    {"step": 9, "routing_fluctuation": 0.2},
    # The transition: what is trained and checked at this step is still stage 1's, except the jump to the table.
    {"step": 10, "transition_step": 10, "routing_stage": 2, "transition_load_max_over_mean": 7.0},
    {"step": 10, "routing_fluctuation": 0.9},
    {"step": 10, "loss": 8.0, "routing_stage": 2, "load_max_over_mean": 2.0},
    {"step": 10, "eval_loss": 2.0},
    {"step": 15, "loss": 7.0, "routing_stage": 2, "load_max_over_mean": 1.5},
    {"step": 15, "eval_loss": 1.5},
    {"step": 15, "routing_fluctuation": 0.0},
    {"step": 20, "loss": 6.0, "routing_stage": 2, "load_max_over_mean": 1.25},
    {"step": 17, "routing_fluctuation": 0.01},
    {"step": 20, "routing_fluctuation": 0.0},
    {"step": 20, "eval_loss": 1.0},
    {"step": 20, "train_loss": 7.5},
]


def test_each_stage_is_summed_up_by_its_own_steps():
    names = ("stage", "steps", "perplexity", "load_max_over_mean", "fluctuation")
    expected = [(1, 10, math.exp(2.0), 2.0, 0.2), (2, 20, math.exp(1.0), 1.25, 0.01)]
    assert stage_rows(HISTORY) == [dict(zip(names, row, strict=True)) for row in expected]


def test_run_without_transition_is_one_row_and_unmeasured_values_are_none():
    assert stage_rows([{"step": 4, "loss": 1.0}, {"step": 8, "eval_loss": 0.0}]) == [
        {"stage": 1, "steps": 8, "perplexity": 1.0, "load_max_over_mean": None, "fluctuation": None}
    ]
    assert [row["steps"] for row in stage_rows([])] == [0]


def test_table_is_aligned_markdown():
    rows = [{"stage": 1, "perplexity": 123.456, "other": 3}, {"stage": 2, "perplexity": None}]
    assert format_table(rows, {"stage": "stage", "perplexity": "ppl"}).splitlines() == [
        "| stage | ppl   |",
        "| ----- | ----- |",
        "| 1     | 123.5 |",
        "| 2     | -     |",
    ]


def brute_force(train, validation, vocab_size, em_steps=20) -> dict[str, float]:
    """The same models with dictionaries, one token at a time."""
    words = Counter(word for block in train for word in block)
    pairs = Counter(pair for block in train for pair in zip(block, block[1:], strict=False))
    histories = Counter(word for block in train for word in block[:-1])
    total = sum(words.values())
    models = {"unigram": [], "bigram": []}
    for block in validation:
        for before, word in zip(block, block[1:], strict=False):
            shared = [words[word] / total, 1 / vocab_size]
            bigram = pairs[before, word] / histories[before] if histories[before] else 0.0
            models["unigram"].append(shared)
            models["bigram"].append([bigram, *shared])
    perplexities = {}
    for name, rows in models.items():
        size = len(rows[0])
        weights = [1 / size] * size
        for _ in range(em_steps):
            expected = [0.0] * size
            for row in rows:
                mixture = sum(w * p for w, p in zip(weights, row, strict=True))
                for index in range(size):
                    expected[index] += weights[index] * row[index] / mixture
            weights = [value / len(rows) for value in expected]
        log_likelihood = sum(math.log(sum(w * p for w, p in zip(weights, row, strict=True))) for row in rows)
        perplexities[name] = math.exp(-log_likelihood / len(rows))
    return perplexities


def blocks(rows, length, vocab_size, seed) -> list[list[int]]:
    """Tokens of a Markov chain, so that the last token tells of the next."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 4, (rows, length), generator=generator)
    return ((noise + 3 * torch.arange(length)) % vocab_size).tolist()


def rows_of(blocks) -> list[dict]:
    return [{"input_ids": row} for row in blocks]


@pytest.mark.parametrize("seed", [0, 1])
def test_count_models_equal_dictionaries(seed):
    # The last two ids, and many pairs, occur in the validation part only.
    train, validation = blocks(9, 12, 17, seed), [*blocks(5, 12, 17, seed + 10), [17, 18, 17, 3, *range(8)]]
    actual = ngram_perplexities(rows_of(train), rows_of(validation), 19)
    assert actual == pytest.approx(brute_force(train, validation, 19), rel=1e-9)


def test_bigram_is_no_worse_than_unigram_and_both_no_worse_than_uniform():
    train, validation = blocks(30, 20, 23, 0), blocks(10, 20, 23, 1)
    result = ngram_perplexities(rows_of(train), rows_of(validation), 23, em_steps=100)
    assert 1 < result["bigram"] < result["unigram"] <= 23 * (1 + 1e-6)


def test_pairs_across_blocks_are_not_counted():
    # 0 1 | 2 3: "1 2" is no pair, so its bigram helps nothing.
    train, validation = [[0, 1], [2, 3]] * 5, [[1, 2]]
    result = ngram_perplexities(rows_of(train), rows_of(validation), 4)
    assert result == pytest.approx({"unigram": 4.0, "bigram": 4.0}, rel=1e-6)


def test_results_print_the_table_the_agreement_and_the_baselines_above_the_model():
    results = {
        "stages": stage_rows([{"eval_loss": 1.0, "step": 5}, {"transition_step": 5, "step": 5}]),
        "distillation_agreement_at_transition": 0.25,
        "perplexity": 3.0,
        "baselines": {"unigram": 9.0, "bigram": 5.0},
    }
    lines = format_results(results).splitlines()
    assert lines[2].startswith("| 1     | 5     | 2.718")
    assert lines[-4:] == [
        "agreement when frozen: distilled and backbone router chose alike on 25.0% of the tokens",
        "validation perplexity, unigram: 9.00",
        "validation perplexity, bigram: 5.00",
        "validation perplexity, this model: 3.00",
    ]
    lines = format_results(results | {"perplexity": 6.0}).splitlines()
    assert lines[-2].startswith("The model is behind counts of pairs of tokens")


def test_run_of_a_model_that_was_frozen_before_it_is_all_stage_2():
    history = [{"step": 0, "eval_loss": 1.0}, {"step": 3, "routing_fluctuation": 0.0}, {"step": 5, "eval_loss": 0.5}]
    [row] = stage_rows(history, frozen=True)
    assert (row["stage"], row["steps"], row["fluctuation"]) == (2, 5, 0.0)
    assert row["perplexity"] == pytest.approx(math.exp(0.5))
    [row] = stage_rows(history[:1], frozen=True)
    assert (row["stage"], row["perplexity"]) == (2, pytest.approx(math.e))
