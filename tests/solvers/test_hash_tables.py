"""Balanced hash tables with several experts per token; those with one are held by the comparison's tests."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_stablemoe.solvers.hash_tables import balanced_hash_table, count_tokens, least_load


@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=30),
    num_experts=st.integers(2, 8),
    k=st.integers(1, 8),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_experts_are_distinct_and_loads_even_up_to_one_id(counts, num_experts, k, seed):
    k = min(k, num_experts)
    counts = torch.tensor(counts)
    table = balanced_hash_table(counts, num_experts, seed, k)
    assert table.shape == ((len(counts), k) if k > 1 else (len(counts),))
    assert all(len(set(experts)) == k for experts in table.view(-1, k).tolist())
    load = torch.zeros(num_experts, dtype=torch.long)
    load.index_add_(0, table.flatten(), counts.repeat_interleave(k))
    assert load.sum() == k * counts.sum()
    # The fullest grows only by ids of which k - 1 other experts have no more room either.
    assert load.max() <= k * counts.sum() / (num_experts - k + 1) + counts.max()


def test_ids_that_never_occur_are_spread():
    table = balanced_hash_table(torch.zeros(400, dtype=torch.long), 8, k=2)
    assert torch.bincount(table.flatten()).min() > 50


@pytest.mark.parametrize("k", [0, 5])
def test_impossible_number_of_experts_is_refused(k):
    with pytest.raises(ValueError, match=f"`k` is {k}; pass an integer from 1 to the number of experts, 4"):
        balanced_hash_table(torch.ones(3, dtype=torch.long), 4, k=k)


def test_experts_do_not_go_in_pairs_and_layers_differ():
    counts = (10_000 / torch.arange(1, 501)).long()
    tables = [balanced_hash_table(counts, 8, seed, 2) for seed in range(2)]
    assert not torch.equal(*tables)
    assert len({frozenset(experts) for experts in tables[0].tolist()}) == 28
    load = torch.zeros(8).index_add(0, tables[0].flatten(), counts.repeat_interleave(2).float())
    assert load.max() / load.mean() < 1.001


@given(
    rows=st.lists(st.lists(st.integers(0, 6), max_size=8), min_size=1, max_size=4).filter(any),
    split=st.lists(st.integers(0, 6), max_size=3, unique=True),
)
@settings(deadline=None)
def test_split_ids_are_counted_by_the_id_before_them(rows, split):
    expected = torch.zeros(7 * (1 + len(split)), dtype=torch.long)
    for row in rows:
        for place, token_id in enumerate(row):
            follows = token_id in split and place > 0
            expected[(1 + split.index(token_id)) * 7 + row[place - 1] if follows else token_id] += 1
    counted = count_tokens(Dataset.from_dict({"input_ids": rows}), 7, split_token_ids=split)
    assert torch.equal(counted, expected)


@pytest.mark.parametrize("k", [1, 2])
def test_no_table_has_less_load_than_its_bound_and_splitting_lowers_it(k):
    ids = torch.randint(20, (4000,), generator=torch.Generator().manual_seed(0))
    ids[::3] = 5  # a third of all tokens
    rows = Dataset.from_dict({"input_ids": [ids.tolist()]})
    whole, split = count_tokens(rows, 20), count_tokens(rows, 20, split_token_ids=[5])
    assert least_load(whole, 8, k) > 2.0 / k
    assert least_load(split, 8, k) == 1.0
    for counts in (whole, split):
        table = balanced_hash_table(counts, 8, k=k).view(-1, k)
        load = torch.zeros(8).double().index_add_(0, table.flatten(), counts.double().repeat_interleave(k))
        assert least_load(counts, 8, k) - 1e-9 <= load.max() / load.mean() < least_load(counts, 8, k) + 0.05
