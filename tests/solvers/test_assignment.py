"""The balanced assignment: against scipy's exact one, its loads, degenerate scores, and what it leaves alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from modeling_stablemoe.solvers import assignment
from modeling_stablemoe.solvers.assignment import (
    balanced_assignment,
    best_paths,
    clearing_prices,
    round_to_grid,
)


pytestmark = pytest.mark.pairs


def largest_sum(scores: torch.Tensor) -> float:
    """The optimum: floor(T/E) columns per expert that must be filled, and one more each for T mod E of them."""
    (num_tokens, num_experts), scores = scores.shape, scores.double().numpy()
    places, num_extra = divmod(num_tokens, num_experts)
    columns = np.repeat(scores, places, axis=1)
    if num_extra:
        # Rows that stand for no token fill the extra columns that stay empty, and may fill no others.
        nobody = np.zeros((num_experts - num_extra, (places + 1) * num_experts))
        nobody[:, : places * num_experts] = -1e3 * (1 + np.abs(scores).max()) * num_tokens
        columns = np.concatenate([np.concatenate([columns, scores], axis=1), nobody])
    return columns[linear_sum_assignment(columns, maximize=True)].sum()


def sum_of(scores: torch.Tensor, expert: torch.Tensor) -> float:
    return scores.double().gather(1, expert.unsqueeze(-1)).sum().item()


def allowed_loss(scores: torch.Tensor) -> float:
    """T units of the grid, and rounding errors of the sums that are compared."""
    relative = scores.double() - scores.double().amax(-1, keepdim=True)
    spread = (relative - relative.mean(0)).abs().mean().item()
    return len(scores) * (
        max(spread * 2.0**-20, -relative.min().item() * 2.0**-40) + 1e-14 * scores.abs().max().item()
    )


def assert_balanced(expert: torch.Tensor, num_experts: int) -> None:
    places, num_extra = divmod(len(expert), num_experts)
    load = torch.bincount(expert, minlength=num_experts)
    assert sorted(load.tolist()) == [places] * (num_experts - num_extra) + [places + 1] * num_extra


def normal(*shape):
    return torch.randn(*shape)


def repeated(distinct: int, num_tokens: int, num_experts: int):
    return normal(distinct, num_experts)[torch.randint(distinct, (num_tokens,))]


# Scores of T tokens on E experts.
KINDS = {
    "normal": normal,
    "common direction": lambda T, E: normal(T, E) + 30 * normal(1, E),
    "one direction": lambda T, E: normal(T, 1) * normal(1, E),
    "heavy tails": lambda T, E: normal(T, E) / normal(T, E),
    "integers": lambda T, E: torch.randint(-2, 3, (T, E)).float(),
    "two rows": lambda T, E: repeated(2, T, E),
    "repeated rows": lambda T, E: repeated(1 + T // 8, T, E),
    "nearly repeated rows": lambda T, E: repeated(1 + T // 8, T, E) * (1 + 1e-7 * normal(T, 1)),
    "noisy repeated rows": lambda T, E: repeated(2, T, E) + 1e-4 * normal(T, E),
    "saturated": lambda T, E: torch.sigmoid(20 * normal(T, E)),
    "zeros": torch.zeros,
    "equal": lambda T, E: torch.full((T, E), 0.1),
    "constant columns": lambda T, E: normal(1, E).repeat(T, 1),
    "one wanted": lambda T, E: torch.eye(E)[-1].repeat(T, 1),
}


def make_scores(kind: str, num_tokens: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return KINDS[kind](num_tokens, num_experts)


def test_by_hand_the_token_that_loses_least_leaves_the_crowded_expert():
    scores = torch.tensor([[5.0, 0.0], [5.0, 4.0], [5.0, 1.0], [3.0, 2.5]])
    assert balanced_assignment(scores).tolist() == [0, 1, 0, 1]


def test_by_hand_tokens_move_over_an_expert_between():
    # Token 1 leaves expert 0 for expert 1, which token 3 leaves for expert 2; nobody goes from 0 to 2.
    scores = torch.tensor([[9.0, 0, 0], [9, 8, 0], [9, 0, 0], [0, 9, 8], [0, 9, 0], [0, 0, 9]])
    assert balanced_assignment(scores).tolist() == [0, 1, 0, 2, 1, 2]


def test_by_hand_the_odd_token_goes_where_it_brings_most():
    assert balanced_assignment(torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 3.0]])).bincount().tolist() == [1, 2]
    assert balanced_assignment(torch.tensor([[2.0, 1.0], [2.0, 1.0], [0.0, 3.0]])).tolist() == [0, 0, 1]


@given(
    kind=st.sampled_from(sorted(KINDS)),
    num_tokens=st.integers(1, 60),
    num_experts=st.integers(1, 11),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None)
def test_loads_are_even_and_the_sum_is_that_of_scipy(kind, num_tokens, num_experts, seed):
    scores = make_scores(kind, num_tokens, num_experts, seed)
    expert = balanced_assignment(scores)
    assert_balanced(expert, num_experts)
    missing = largest_sum(scores) - sum_of(scores, expert)
    assert missing <= (0 if kind == "integers" else allowed_loss(scores))


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(600, 16), (517, 16), (100, 130)])
@pytest.mark.parametrize("kind", ["normal", "common direction", "integers", "repeated rows"])
def test_sum_of_scipy_with_prices_that_need_steps(kind, num_tokens, num_experts):
    scores = make_scores(kind, num_tokens, num_experts)
    expert = balanced_assignment(scores)
    assert_balanced(expert, num_experts)
    assert largest_sum(scores) - sum_of(scores, expert) <= allowed_loss(scores)


@pytest.mark.parametrize("num_tokens", [2048, 2045])
@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_need_few_rounds_and_no_exchange_would_pay(kind, num_tokens, monkeypatch):
    num_experts, rounds = 16, []

    def count(*args):
        rounds.append(1)
        return best_paths(*args)

    monkeypatch.setattr(assignment, "best_paths", count)
    scores = make_scores(kind, num_tokens, num_experts)
    expert = balanced_assignment(scores)
    assert_balanced(expert, num_experts)
    # One token at a time they would be thousands.
    assert len(rounds) <= 2 * num_experts
    assert best_exchange(scores, expert) <= allowed_loss(scores) * num_experts / num_tokens


def best_exchange(scores: torch.Tensor, expert: torch.Tensor) -> float:
    """The most that tokens can win by at most E moves around a ring of experts, or to an expert with fewer tokens."""
    scores, num_experts = scores.double(), scores.shape[1]
    step = torch.stack(
        [(scores[expert == i] - scores[expert == i, i].unsqueeze(-1)).amax(0) for i in range(num_experts)]
    )
    gain = step
    for _ in range(num_experts - 1):
        gain = torch.maximum(gain, (gain.unsqueeze(-1) + step).amax(1))
    load = torch.bincount(expert, minlength=num_experts)
    allowed = (load.unsqueeze(-1) > load) | torch.eye(num_experts, dtype=torch.bool)
    return gain[allowed].max().item()


@pytest.mark.parametrize("kind", ["common direction", "noisy repeated rows"])
def test_prices_leave_few_tokens_to_move(kind):
    scores = round_to_grid(make_scores(kind, 4096, 16))
    load = torch.bincount((scores - clearing_prices(scores)).argmax(-1), minlength=16)
    assert (load - 256).clamp(min=0).sum() <= 2 * 16


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(0, 4), (1, 1), (1, 7), (5, 1), (3, 512)])
def test_few_tokens_or_experts(num_tokens, num_experts):
    scores = make_scores("normal", num_tokens, num_experts)
    expert = balanced_assignment(scores)
    assert expert.dtype == torch.long
    assert expert.shape == (num_tokens,)
    assert_balanced(expert, num_experts)
    if num_tokens == 1:
        assert expert.item() == scores.argmax().item()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(3), "tokens, experts"),
        (torch.zeros(3, 0), "tokens, experts"),
        (torch.tensor([[0.0, torch.nan]]), "finite"),
        (torch.tensor([[0.0, -torch.inf]]), "finite"),
    ],
)
def test_scores_that_are_no_matrix_of_finite_numbers_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        balanced_assignment(scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_reaches_its_largest_sum(dtype):
    # In bfloat16 many of these scores are equal.
    scores = make_scores("common direction", 90, 7).to(dtype)
    expert = balanced_assignment(scores)
    assert_balanced(expert, 7)
    assert largest_sum(scores) - sum_of(scores, expert) <= allowed_loss(scores.double())


@pytest.mark.parametrize("exponent", [-1040, -100, 1016])
def test_scale_changes_nothing(exponent):
    # Whole numbers, so that the smallest scales lose no bits.
    scores = torch.randint(-99, 100, (60, 5), generator=torch.Generator().manual_seed(0)).double()
    scaled = scores * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
    assert torch.equal(balanced_assignment(scaled), balanced_assignment(scores))


def test_a_constant_added_to_a_row_changes_nothing():
    scores = make_scores("integers", 200, 6) + make_scores("normal", 200, 6).round(decimals=1)
    offset = torch.randint(-500, 500, (200, 1), generator=torch.Generator().manual_seed(1)).double()
    assert torch.equal(balanced_assignment(scores.double() + offset), balanced_assignment(scores))


def test_order_of_tokens_and_experts_does_not_matter():
    scores = make_scores("common direction", 203, 6).double()
    expert = balanced_assignment(scores)
    tokens = torch.randperm(203, generator=torch.Generator().manual_seed(2))
    experts = torch.tensor([3, 5, 0, 2, 1, 4])
    assert torch.equal(balanced_assignment(scores[tokens]), expert[tokens])
    assert torch.equal(experts[balanced_assignment(scores[:, experts])], expert)


def test_same_scores_give_the_same_experts_and_draw_no_random_numbers():
    scores = make_scores("two rows", 500, 8)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = balanced_assignment(scores)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(balanced_assignment(scores.clone()), first)


def test_scores_stay_as_they_are_and_prices_have_no_graph_and_are_not_blurred_by_autocast(monkeypatch):
    prices = []

    def record(scores):
        prices.append(clearing_prices(scores))
        return prices[-1]

    monkeypatch.setattr(assignment, "clearing_prices", record)
    scores = make_scores("common direction", 500, 8).requires_grad_()
    before = scores.detach().clone()
    balanced_assignment(scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        balanced_assignment(scores)
    assert not prices[0].requires_grad
    assert torch.equal(prices[0], prices[1])
    assert torch.equal(scores.detach(), before)
