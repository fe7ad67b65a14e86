"""The routing losses as pure functions: values by hand, gradients, padding, counts over processes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import random_ids, tiny_model
from modeling_stablemoe.model.losses_stablemoe import (
    balance_loss,
    count_causal_targets,
    count_expert_load,
    distillation_loss,
    routing_losses,
    switch_balance_loss,
)


pytestmark = pytest.mark.pairs


CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def double(value) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("centered", "expected"),
    [
        # Loads 3 and 1, fair share 2: overloads +1/2 and -1/2. (1/2 (0.5 + 0.8 + 0.6) - 1/2 * 0.9) / 4
        (False, 0.125),
        # Of mean 1/4 over tokens: (1/4 (0.5 + 0.8 + 0.6) - 3/4 * 0.9) / 4
        (True, -0.05),
    ],
)
def test_balance_loss_by_hand_weighs_gates_by_overload(centered, expected):
    router_logits = torch.full((4, 2), -5.0)
    for token, (expert, gate) in enumerate([(0, 0.5), (0, 0.8), (0, 0.6), (1, 0.9)]):
        router_logits[token, expert] = math.log(gate / (1 - gate))
    loss = balance_loss(router_logits=router_logits, expert_index=torch.tensor([0, 0, 0, 1]), centered=centered)
    torch.testing.assert_close(loss, torch.tensor(expected), **CLOSE)


@given(repeats=st.integers(1, 5), num_experts=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_balance_loss_and_its_gradient_are_zero_where_every_expert_has_the_same_load(repeats, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(num_experts).repeat(repeats)[torch.randperm(num_experts * repeats, generator=generator)]
    router_logits = torch.randn(len(index), num_experts, generator=generator).requires_grad_()
    loss = balance_loss(router_logits=router_logits, expert_index=index)
    loss.backward()
    assert loss == 0
    assert not router_logits.grad.any()


@given(seed=st.integers(0, 999), num_tokens=st.integers(1, 20), num_experts=st.integers(1, 7))
@settings(max_examples=20, deadline=None)
def test_balance_loss_stays_between_minus_1_and_the_number_of_experts(seed, num_tokens, num_experts):
    generator = torch.Generator().manual_seed(seed)
    router_logits = torch.randn(num_tokens, num_experts, generator=generator) * 3
    index = torch.randint(num_experts, (num_tokens,), generator=generator)
    assert -1 < balance_loss(router_logits=router_logits, expert_index=index) < num_experts


@given(seed=st.integers(0, 999), num_tokens=st.integers(1, 20), num_experts=st.integers(1, 7), masked=st.booleans())
@settings(max_examples=20, deadline=None)
def test_centered_factors_sum_to_zero_and_keep_the_push_of_expert_against_expert(
    seed, num_tokens, num_experts, masked
):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(num_experts, (num_tokens,), generator=generator)
    mask = torch.rand(num_tokens, generator=generator) < 0.7 if masked else torch.ones(num_tokens, dtype=torch.bool)
    # With all gates at 1/2 the loss of a token is half its factor.
    even = {"router_logits": torch.zeros(num_tokens, num_experts).double(), "expert_index": index, "mask": mask}
    plain = balance_loss(**even, reduction="none")[mask]
    centered = balance_loss(**even, reduction="none", centered=True)[mask]
    assert float(centered.sum()) == pytest.approx(0, abs=1e-12)
    if len(plain):
        torch.testing.assert_close(centered, plain - plain.mean(), **CLOSE)
        load = torch.bincount(index[mask], minlength=num_experts).double()
        variance = (load * num_experts / len(plain)).var(correction=0)
        torch.testing.assert_close(plain.mean() * 2, variance, **CLOSE)


@pytest.mark.parametrize("centered", [False, True])
def test_losses_with_loads_of_two_halves_average_to_the_loss_of_the_whole(centered):
    router_logits = torch.randn(12, 3, dtype=torch.float64)
    index = router_logits.argmax(-1)
    load = count_expert_load(expert_index=index, mask=None, num_experts=3)
    halves = [
        balance_loss(router_logits=half, expert_index=half.argmax(-1), expert_load=load, centered=centered)
        for half in router_logits.chunk(2)
    ]
    whole = balance_loss(router_logits=router_logits, expert_index=index, centered=centered)
    torch.testing.assert_close(torch.stack(halves).mean(), whole, **CLOSE)


def test_distillation_loss_by_hand_is_cross_entropy_in_nats():
    distilled_logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    loss = distillation_loss(distilled_logits=distilled_logits, teacher_index=torch.tensor([1, 1]))
    torch.testing.assert_close(loss, torch.tensor((math.log(4 / 3) + math.log(5)) / 2), **CLOSE)


def losses_of(router_logits, distilled_logits, mask=None):
    index = router_logits.detach().argmax(-1)
    return (
        balance_loss(router_logits=router_logits, expert_index=index, mask=mask),
        distillation_loss(distilled_logits=distilled_logits, teacher_index=index, mask=mask),
    )


@given(mask=st.lists(st.booleans(), min_size=1, max_size=12).filter(any), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_losses_of_a_padded_batch_are_those_of_its_real_tokens(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(mask)
    scores = [torch.randn(len(mask), 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    for padded, unpadded in zip(losses_of(*scores, mask), losses_of(*(x[mask] for x in scores)), strict=True):
        torch.testing.assert_close(padded, unpadded, **CLOSE)


def test_nan_on_padding_changes_no_loss_and_no_gradient_of_real_tokens():
    mask = torch.tensor([True, True, False, True])
    clean = [torch.randn(4, 3) for _ in range(2)]
    dirty = [scores.masked_fill(~mask.unsqueeze(-1), torch.nan) for scores in clean]
    losses, gradients = [], []
    for scores in (clean, dirty):
        for x in scores:
            x.requires_grad_()
        losses.append(losses_of(*scores, mask))
        sum(losses[-1]).backward()
        gradients.append([x.grad[mask] for x in scores])
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_a_batch_of_padding_alone_has_losses_of_zero_and_gradients_of_zero():
    scores = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    losses = losses_of(*scores, torch.zeros(4, dtype=torch.bool))
    sum(losses).backward()
    assert [loss.item() for loss in losses] == [0.0, 0.0]
    for x in scores:
        assert torch.equal(x.grad, torch.zeros(4, 3))


@given(
    tokens=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=30),
    masked=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_expert_load_counts_the_real_tokens_of_each_expert(tokens, masked):
    index = torch.tensor([expert for expert, _ in tokens], dtype=torch.long)
    mask = torch.tensor([real for _, real in tokens], dtype=torch.bool) if masked else None
    expected = [sum(e == expert and (real or not masked) for e, real in tokens) for expert in range(5)]
    assert count_expert_load(expert_index=index, mask=mask, num_experts=5).tolist() == expected


STABLE = {"balance_loss_function": balance_loss, "num_experts": 3}


def test_routing_losses_sum_over_layers():
    router_logits = [torch.randn(6, 3) for _ in range(2)]
    distilled_logits = [router_logits[0].clone(), -router_logits[1]]  # agree everywhere, agree nowhere
    indices = [logits.argmax(-1) for logits in router_logits]
    losses = routing_losses(
        **STABLE,
        router_logits=router_logits,
        distilled_logits=distilled_logits,
        selected_experts=[index.unsqueeze(-1) for index in indices],
        teacher_experts=[index.unsqueeze(-1) for index in indices],
    )
    parts = [losses_of(*scores) for scores in zip(router_logits, distilled_logits, strict=True)]
    torch.testing.assert_close(losses["balance_loss"], parts[0][0] + parts[1][0], **CLOSE)
    torch.testing.assert_close(losses["distillation_loss"], parts[0][1] + parts[1][1], **CLOSE)
    assert losses["expert_load"].tolist() == [torch.bincount(index, minlength=3).tolist() for index in indices]


def test_evaluation_measures_the_losses_of_the_backbone_router_and_the_loads_of_the_distilled_one():
    router_logits = torch.randn(8, 3)
    distilled_logits = torch.randn(8, 3)
    losses = routing_losses(
        **STABLE,
        router_logits=[router_logits],
        distilled_logits=[distilled_logits],
        selected_experts=[distilled_logits.argmax(-1, keepdim=True)],
        teacher_experts=[router_logits.argmax(-1, keepdim=True)],
    )
    balance, distillation = losses_of(router_logits, distilled_logits)
    torch.testing.assert_close(losses["balance_loss"], balance, **CLOSE)
    torch.testing.assert_close(losses["distillation_loss"], distillation, **CLOSE)
    assert losses["expert_load"][0].tolist() == torch.bincount(distilled_logits.argmax(-1), minlength=3).tolist()


def test_in_stage_2_both_losses_are_zero_and_loads_are_still_counted():
    losses = routing_losses(
        **STABLE,
        router_logits=[torch.randn(4, 3)],
        distilled_logits=[None],
        selected_experts=[torch.tensor([[0], [2], [2], [2]])],
        teacher_experts=[None],
    )
    assert float(losses["balance_loss"]) == float(losses["distillation_loss"]) == 0.0
    assert losses["expert_load"].tolist() == [[1, 0, 3]]


def test_in_training_the_loss_is_task_plus_weighted_balance_and_distillation():
    model = tiny_model(
        balance_loss_coef=0.2, distillation_loss_coef=0.7, router_aux_loss_coef=0.5, moe_layer_positions=[0, 2]
    )
    ids = random_ids()
    outputs = model.train()(ids, labels=ids)
    aux_loss = 0.2 * outputs.balance_loss + 0.7 * outputs.distillation_loss
    torch.testing.assert_close(outputs.aux_loss, aux_loss, **CLOSE)
    torch.testing.assert_close(outputs.loss, outputs.task_loss + 0.5 * aux_loss, **CLOSE)
    assert outputs.balance_loss.abs() > 1e-3


@pytest.mark.parametrize(
    ("function", "alone", "together"),
    # Four tokens at a score of 1 beside 0: all here on expert 1, over two processes as many on each.
    [(balance_loss, 1 / (1 + math.exp(-1)), 0.0), (switch_balance_loss, 2 / (1 + math.exp(-1)), 1.0)],
)
def test_routing_losses_ask_other_processes_only_when_told_to(monkeypatch, function, alone, together):
    asked = []

    def all_reduce(load):  # a second process with every token on expert 0
        asked.append(load.clone())
        load += torch.tensor([4, 0])

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    router_logits = double([[0.0, 1.0]] * 4)
    chosen = [router_logits.argmax(-1, keepdim=True)]
    arguments = {
        "balance_loss_function": function,
        "num_experts": 2,
        "router_logits": [router_logits],
        "distilled_logits": [router_logits],
        "selected_experts": chosen,
        "teacher_experts": chosen,
    }
    torch.testing.assert_close(routing_losses(**arguments)["balance_loss"], double(alone), **CLOSE)
    assert not asked
    losses = routing_losses(**arguments, across_processes=True)
    assert [load.tolist() for load in asked] == [[0, 4]]
    torch.testing.assert_close(losses["balance_loss"], double(together), **CLOSE)
    assert losses["expert_load"].tolist() == [[0, 4]], "the reported load is this process's own"


@pytest.mark.parametrize(
    ("labels", "shift_labels", "expected"),
    [
        ([[5, 6, -100, 7], [-100, 8, 9, -100]], None, 4),
        ([[5, 6, 7]], [[6, 7, -100]], 2),
        (None, [[6, 7, 8]], 3),
        ([[-100, -100]], None, 0),
    ],
)
def test_targets_are_counted_after_the_shift(labels, shift_labels, expected):
    labels, shift_labels = (None if x is None else torch.tensor(x) for x in (labels, shift_labels))
    assert int(count_causal_targets(labels, shift_labels)) == expected
