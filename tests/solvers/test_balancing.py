"""The balanced table: bound and limit against scipy and brute force, degenerate tables, and errors."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from modeling_stablemoe.solvers import balancing
from modeling_stablemoe.solvers.balancing import BalancedTable, balanced_table


pytestmark = pytest.mark.pairs


MAX_LOADS = [1.0, 1.05, 1.2, 1.5, 2.0]


@st.composite
def small_problems(draw, most_ids: int = 8, most_experts: int = 4):
    num_ids, num_experts = draw(st.integers(1, most_ids)), draw(st.integers(1, most_experts))
    rows = st.lists(st.integers(0, 12), min_size=num_experts, max_size=num_experts)
    agreement = draw(st.lists(rows, min_size=num_ids, max_size=num_ids))
    counts = draw(st.lists(st.integers(0, 15), min_size=num_ids, max_size=num_ids))
    return torch.tensor(agreement), torch.tensor(counts), draw(st.sampled_from(MAX_LOADS))


def exact_limit(counts: torch.Tensor, num_experts: int, max_load: float) -> Fraction:
    return Fraction(str(max_load)) * int(counts.sum()) / num_experts


def smallest_load(counts: torch.Tensor, num_experts: int) -> int:
    """What the most loaded expert must take at least: the sums of all subsets, one expert after the other."""
    loads = {(0,) * num_experts}
    for count in counts.tolist():
        loads = {
            tuple(sorted(load[:i] + (load[i] + count,) + load[i + 1 :])) for load in loads for i in range(num_experts)
        }
    return min(max(load) for load in loads)


def largest_agreement(agreement: torch.Tensor, counts: torch.Tensor, limit: float, k: int = 1) -> float:
    """The optimum, for whole numbers."""
    num_ids, num_experts = agreement.shape
    once = np.kron(np.eye(num_ids), np.ones(num_experts))
    load = np.kron(counts.numpy(), np.eye(num_experts))
    result = milp(
        -agreement.numpy().ravel().astype(float),
        integrality=np.ones(num_ids * num_experts),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, k, k), LinearConstraint(load, -np.inf, math.floor(limit + 1e-9))],
        options={"mip_rel_gap": 0},
    )
    return round(-result.fun)


def assert_consistent(result: BalancedTable, agreement: torch.Tensor, counts: torch.Tensor, k: int = 1) -> None:
    """What must hold for any result."""
    num_experts = agreement.shape[1]
    assert result.table.shape == ((len(agreement), k) if k > 1 else (len(agreement),))
    table = result.table.view(-1, k)
    load = torch.stack([counts.double()[(table == i).any(-1)].sum() for i in range(num_experts)])
    assert result.table.dtype == torch.long
    torch.testing.assert_close(result.load, load, rtol=1e-12, atol=0)
    shared = torch.ones(num_experts, dtype=torch.bool).index_fill(0, table[result.alone].flatten(), False)
    assert (result.load[shared] <= result.limit).all()
    assert len(result.alone) or shared.all()
    for token in result.alone.tolist():
        assert result.load[table[token]].tolist() == pytest.approx([counts[token].item()] * k, rel=1e-12)
    kept = agreement.double().gather(1, table)
    assert (kept.diff(dim=-1) <= 0).all()  # best first
    assert result.agreement == pytest.approx(kept.sum().item(), rel=1e-12)
    best = agreement.double().topk(k).values.sum().item()
    assert result.best_agreement == pytest.approx(best, rel=1e-12)
    assert result.agreement <= result.bound <= result.best_agreement


def zipf_problem(num_ids: int, num_experts: int, heaviest: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts of a power law, the first `heaviest` times the last, and shares that prefer some experts."""
    generator = torch.Generator().manual_seed(seed)
    counts = (heaviest / torch.arange(1, num_ids + 1)).ceil()[torch.randperm(num_ids, generator=generator)]
    taste = torch.randn(num_experts, generator=generator)
    shares = (2 * torch.randn(num_ids, num_experts, generator=generator) + taste).softmax(-1)
    return shares.double() * counts.unsqueeze(-1), counts


@given(problem=small_problems())
@settings(max_examples=25, deadline=None)
def test_small_problems_keep_to_limit_and_bound_and_raise_the_limit_to_the_greedy_packing_at_most(problem):
    agreement, counts, max_load = problem
    assume(int(counts.max()) <= exact_limit(counts, agreement.shape[1], max_load))
    result = balanced_table(agreement, counts, max_load)
    assert_consistent(result, agreement, counts)
    num_experts = agreement.shape[1]
    limit, packed = float(exact_limit(counts, num_experts, max_load)), [0] * num_experts
    for count in counts.sort(descending=True).values.tolist():
        packed[packed.index(min(packed))] += count
    if result.limit != pytest.approx(limit, rel=1e-12):
        assert limit < result.limit == pytest.approx(max(packed), rel=1e-12)
    if smallest_load(counts, num_experts) > limit:
        assert result.limit > limit
    best = largest_agreement(agreement, counts, result.limit)
    assert result.agreement <= best <= result.bound * (1 + 1e-9)


def test_small_problems_come_close_to_the_optimum_of_scipy():
    kept = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(1, 16, (12,), generator=generator)
        agreement = (torch.rand(12, 4, generator=generator) * counts.unsqueeze(-1)).round()
        result = balanced_table(agreement, counts, 1.2)
        kept.append(result.agreement / largest_agreement(agreement, counts, result.limit))
    assert np.mean(kept) > 0.98
    assert min(kept) > 0.85


@given(problem=small_problems(most_ids=6, most_experts=3), heavy=st.lists(st.integers(16, 99), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_ids_that_outweigh_the_limit_stand_alone_and_all_others_keep_to_it(problem, heavy):
    agreement, counts, max_load = problem
    counts = torch.cat([counts, torch.tensor(heavy)])[-len(agreement) :]
    limit = exact_limit(counts, agreement.shape[1], max_load)
    result = balanced_table(agreement, counts, max_load)
    assert_consistent(result, agreement, counts)
    if agreement.shape[1] > 1:
        assert sorted(result.alone.tolist()) == [v for v, count in enumerate(counts.tolist()) if count > limit]
    assert counts[result.alone].tolist() == sorted(counts[result.alone].tolist(), reverse=True)


def test_by_hand_the_id_that_loses_least_leaves_the_crowded_expert():
    agreement = torch.tensor([[5.0, 0.0], [5.0, 4.0], [5.0, 1.0], [3.0, 2.5]])
    result = balanced_table(agreement, torch.ones(4), 1.0)
    assert result.table.tolist() == [0, 1, 0, 1]
    assert result[1:5] == (16.5, 18.0, 16.5, 2.0)


def test_greedy_packing_misses_the_limit_but_a_table_within_it_is_found():
    # Heaviest first gives 3 + 2 + 2 on one expert; 3 + 3 and 2 + 2 + 2 fit.
    result = balanced_table(torch.ones(5, 2), torch.tensor([3, 3, 2, 2, 2]), 1.0)
    assert result.limit == 6
    assert result.load.tolist() == [6, 6]


@pytest.mark.parametrize("heaviest", [300.0, 30000.0])
@pytest.mark.parametrize("max_load", [1.05, 1.5])
def test_many_ids_come_close_to_the_bound(heaviest, max_load):
    agreement, counts = zipf_problem(2000, 16, heaviest)
    result = balanced_table(agreement, counts, max_load)
    assert_consistent(result, agreement, counts)
    assert result.limit == pytest.approx(max_load * counts.sum().item() / 16, rel=1e-9)
    # The bound takes ids as divisible, and the heaviest ones are nearly as heavy as an expert may be.
    assert result.bound - result.agreement <= 2e-2 * result.bound
    assert result.bound < result.best_agreement


def test_rebalanced_table_stays_where_the_limit_does_not_bind():
    generator = torch.Generator().manual_seed(0)
    table, counts = torch.randint(4, (300,), generator=generator), torch.randint(1, 99, (300,), generator=generator)
    result = balanced_table(torch.eye(4)[table] * counts.unsqueeze(-1), counts, 4.0)
    assert torch.equal(result.table, table)
    assert result.agreement == result.bound == result.best_agreement == counts.sum()


@given(problem=small_problems(), exponent=st.sampled_from([-40, -3, 5, 60]))
@settings(max_examples=15, deadline=None)
def test_scale_of_the_agreement_changes_nothing(problem, exponent):
    agreement, counts, max_load = problem
    result = balanced_table(agreement, counts, max_load)
    scaled = balanced_table(agreement.double() * 2.0**exponent, counts, max_load)
    assert torch.equal(scaled.table, result.table)
    assert scaled.agreement == result.agreement * 2.0**exponent


@given(problem=small_problems(), factor=st.sampled_from([0.1, 0.25, 3.0, 1e6]))
@settings(max_examples=10, deadline=None)
def test_counts_of_any_scale_keep_to_limit_and_bound(problem, factor):
    agreement, counts, max_load = problem
    # In float32 a tenth is off by more than loads may be.
    scaled = balanced_table(agreement, counts.double() * factor, max_load)
    assert_consistent(scaled, agreement, counts.double() * factor)


def test_ids_that_weigh_nothing_go_to_their_best_expert():
    agreement = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [9.0, 0.0, 1.0], [9.0, 1.0, 0.0], [9.0, 0.0, 0.0]])
    result = balanced_table(agreement, torch.tensor([0, 0, 1, 1, 1]), 1.0)
    assert result.table.tolist() == [0, 1, 2, 1, 0]
    assert (result.agreement, result.bound, result.best_agreement) == (12, 12, 28)


@pytest.mark.parametrize(
    ("agreement", "counts"),
    [
        (torch.ones(0, 3), torch.ones(0)),
        (torch.ones(1, 1), torch.ones(1)),
        (torch.ones(9, 1), torch.rand(9)),
        (torch.ones(2, 5), torch.tensor([1.0, 7.0])),
        (torch.zeros(40, 5), torch.arange(40)),
        (torch.ones(40, 5), torch.arange(40)),
        (torch.arange(12.0).view(4, 3), torch.zeros(4)),
        (torch.eye(3)[[0, 0, 0, 0]] * 1e9, torch.tensor([1e9, 1, 1, 1])),
        (torch.rand(30, 4, generator=torch.Generator().manual_seed(0)) ** 9, torch.logspace(-9, 9, 30)),
        (torch.ones(4, 2), torch.tensor([1e-300, 1.0, 1.0, 3.0])),
    ],
)
@pytest.mark.parametrize("max_load", [1.0, 1.3])
def test_degenerate_problems_keep_what_can_be_kept(agreement, counts, max_load):
    result = balanced_table(agreement, counts, max_load)
    assert_consistent(result, agreement, counts)


@pytest.mark.parametrize("heaviest", [[5000.0, 9000.0], [9000.0] * 7])
@pytest.mark.parametrize("num_bands", [1, 4])
def test_heavy_ids_do_not_move_the_limit_of_the_others(heaviest, num_bands):
    agreement, counts = zipf_problem(200, 8, 300.0)
    counts[: len(heaviest)] = torch.tensor(heaviest)
    result = balanced_table(agreement, counts, 1.1, num_bands)
    assert_consistent(result, agreement, counts)
    assert result.limit == pytest.approx(1.1 * counts.sum().item() / 8, rel=1e-9)
    heavy = {v for v in range(200) if counts[v] > result.limit}
    assert set(result.alone.tolist()) == heavy
    assert len(heavy) == len(set(result.table[result.alone].tolist()))


def test_same_numbers_give_the_same_table_draw_no_random_numbers_and_stay_as_they_are():
    agreement, counts = zipf_problem(200, 8, 300.0)
    before, state = (agreement.clone(), counts.clone()), torch.get_rng_state()
    first = balanced_table(agreement.requires_grad_(), counts, 1.05)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(agreement.detach(), before[0])
    assert torch.equal(counts, before[1])
    torch.manual_seed(3)
    assert torch.equal(balanced_table(agreement, counts, 1.05).table, first.table)


MATRIX = {"agreement": torch.ones(3, 2), "token_counts": torch.ones(3), "max_load": 1.0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"agreement": torch.ones(3)}, r"`agreement` has shape .* one row per token id"),
        ({"agreement": torch.ones(3, 0)}, r"`agreement` has shape .* one row per token id"),
        ({"token_counts": torch.ones(4)}, r"`token_counts` has shape .* one count per row"),
        ({"token_counts": torch.ones(())}, r"`token_counts` has shape .* one count per row"),
        ({"agreement": -torch.ones(3, 2)}, r"`agreement` .*holds -1.0; pass numbers >= 0"),
        ({"token_counts": torch.tensor([1, math.nan, 1])}, r"`token_counts` .*nan; pass finite"),
        ({"max_load": 0.99}, r"`max_load` is 0.99; pass a finite number >= 1"),
        ({"max_load": math.nan}, r"`max_load` is nan; pass a finite number >= 1"),
        ({"num_bands": 0}, "`num_bands` is 0; pass an integer >= 1"),
        ({"k": 0}, "`k` is 0; pass an integer from 1 to the number of experts, 2"),
        ({"k": 3}, "`k` is 3; pass an integer from 1 to the number of experts, 2"),
    ],
)
def test_what_makes_no_problem_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        balanced_table(**MATRIX | wrong)


# In bands of frequency


def test_bands_of_frequency_spread_frequent_ids_more_evenly_for_some_agreement():
    agreement, counts = zipf_problem(300, 8, 3000)
    plain, banded = (balanced_table(agreement, counts, 1.02, num_bands) for num_bands in (1, 6))
    assert_consistent(banded, agreement, counts)
    order = counts.argsort(descending=True, stable=True)
    frequent = order[counts[order].cumsum(0) <= 4 / 6 * counts.sum()]
    loads = [torch.bincount(result.table[frequent], counts[frequent].double(), 8) for result in (plain, banded)]
    assert loads[1].std() < loads[0].std()
    assert banded.agreement <= plain.agreement
    assert banded.limit == plain.limit


# Prices of a sample


@pytest.mark.parametrize("k", [1, 2, 8])
def test_prices_of_a_sample_keep_nearly_what_those_of_all_ids_keep(k, monkeypatch):
    agreement, counts = zipf_problem(3000, 16, 30_000.0, seed=k)
    whole = balanced_table(agreement, counts, 1.2, k=k)
    monkeypatch.setattr(balancing, "PRICED", 1000 * 16)
    sampled, again = (balanced_table(agreement, counts, 1.2, k=k) for _ in range(2))
    assert_consistent(sampled, agreement, counts, k)
    assert torch.equal(sampled.table, again.table)
    assert not torch.equal(sampled.table, whole.table)
    assert sampled.limit == pytest.approx(whole.limit)
    assert sampled.agreement >= (1 - 2e-3) * whole.agreement
    assert sampled.bound == pytest.approx(whole.bound, rel=2e-3)


def test_sample_weighs_what_all_ids_weigh_and_begins_with_the_heaviest(monkeypatch):
    agreement, counts = zipf_problem(6000, 16, 30_000.0)
    counts, order = counts.double().sort(descending=True)
    problem = balancing.Problem(agreement[order], counts, torch.ones(16, dtype=torch.double), 2)
    monkeypatch.setattr(balancing, "PRICED", 2000 * 16)
    sampled = problem.sampled()
    assert torch.equal(sampled.agreement_VE[:1000], problem.agreement_VE[:1000])
    assert sampled.weight_V.sum().item() == pytest.approx(counts.sum().item())
    total = problem.agreement_VE.sum(0)
    torch.testing.assert_close(sampled.agreement_VE.sum(0), total, rtol=0.1, atol=0)
    monkeypatch.setattr(balancing, "PRICED", 6000 * 16)
    assert problem.sampled() is problem


# Several experts per token


@given(problem=small_problems(most_ids=7, most_experts=5), k=st.integers(2, 5), num_bands=st.sampled_from([1, 3]))
@settings(max_examples=40, deadline=None)
def test_several_experts_per_token_are_distinct_and_keep_to_limit_and_bound(problem, k, num_bands):
    agreement, counts, max_load = problem
    num_experts = agreement.shape[1]
    assume(k <= num_experts)
    result = balanced_table(agreement, counts, max_load, num_bands, k)
    assert all(len(set(experts)) == k for experts in result.table.tolist())
    assert_consistent(result, agreement, counts, k)
    asked = float(exact_limit(counts, num_experts, max_load)) * k
    assert result.limit >= asked * (1 - 1e-12)
    if num_bands == 1 and not len(result.alone):
        best = largest_agreement(agreement, counts, result.limit, k)
        assert result.agreement <= best <= result.bound * (1 + 1e-9)


def test_several_experts_per_token_come_close_to_the_optimum_of_scipy():
    kept = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(1, 16, (12,), generator=generator)
        agreement = (torch.rand(12, 6, generator=generator) * counts.unsqueeze(-1)).round()
        result = balanced_table(agreement, counts, 1.2, k=2)
        assert result.limit == pytest.approx(float(exact_limit(counts, 6, 1.2)) * 2)
        kept.append(result.agreement / largest_agreement(agreement, counts, result.limit, 2))
    assert np.mean(kept) > 0.98
    assert min(kept) > 0.95


@pytest.mark.parametrize("heaviest", [300.0, 30000.0])
@pytest.mark.parametrize("max_load", [1.05, 1.5])
def test_many_ids_with_several_experts_come_close_to_the_bound(heaviest, max_load):
    agreement, counts = zipf_problem(1000, 16, heaviest)
    result = balanced_table(agreement, counts, max_load, k=4)
    assert_consistent(result, agreement, counts, 4)
    assert result.limit == pytest.approx(max_load * 4 * counts.sum().item() / 16, rel=1e-9)
    assert result.bound - result.agreement <= 1e-2 * result.bound
    assert result.bound < result.best_agreement


def test_few_of_many_experts_per_token_come_close_to_the_bound():
    agreement, counts = zipf_problem(1000, 128, 100.0)
    result = balanced_table(agreement, counts, 1.05, k=2)
    assert_consistent(result, agreement, counts, 2)
    assert result.bound - result.agreement <= 5e-2 * result.bound
    assert result.bound < result.best_agreement


def test_where_too_few_experts_have_room_for_the_last_ids_prices_are_found_more_often():
    agreement, counts = zipf_problem(600, 16, 1200.0, seed=4)
    result = balanced_table(agreement, counts, 1.02, k=12)
    assert_consistent(result, agreement, counts, 12)
    assert result.bound - result.agreement <= 2e-2 * result.bound


def test_heavy_ids_have_as_many_experts_of_their_own_and_do_not_move_the_limit_of_the_others():
    agreement, counts = zipf_problem(200, 8, 300.0)
    counts[:2] = torch.tensor([9000.0, 8000.0])
    result = balanced_table(agreement, counts, 1.1, k=2)
    assert_consistent(result, agreement, counts, 2)
    assert result.alone.tolist() == [0, 1]
    assert result.limit == pytest.approx(1.1 * 2 * counts.sum().item() / 8, rel=1e-9)
    assert len(set(result.table[:2].flatten().tolist())) == 4


def test_heavy_id_shares_where_its_own_experts_would_leave_too_few_for_the_others():
    agreement, counts = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([80, 4, 4, 4, 4, 4])
    result = balanced_table(agreement, counts, 1.0, k=3)
    assert_consistent(result, agreement, counts, 3)
    assert not len(result.alone)
    assert 80 < result.limit < 100


def test_as_many_experts_per_token_as_there_are_is_all_of_them_best_first():
    result = balanced_table(torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 5.0]]), torch.tensor([1, 2]), 1.0, k=3)
    assert result.table.tolist() == [[1, 2, 0], [0, 2, 1]]
    assert result.limit == 3
