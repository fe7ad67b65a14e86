"""What tells a healthy routing from a sick one, against loops over tokens."""

import math
from collections import defaultdict

import pytest
import torch

from helpers.models import random_ids, tiny_model
from modeling_stablemoe.model.health_stablemoe import (
    common_direction,
    mean_health,
    router_entropy,
    routing_health,
)


IDS = torch.tensor([3, 3, 3, 5, 5, 7, 7, 3])
MASK = torch.tensor([True, True, True, True, True, True, False, False])


def health_of(mask=None, **changes):
    torch.manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(8, 4) + 2,
        "token_ids": IDS,
        "gate": torch.tensor([0.0, 0.04, 0.06, 0.5, 1.0, 0.5, 0.01, 0.01]).unsqueeze(-1),
        "teacher_index": torch.tensor([0, 1, 2, 0, 1, 2, 0, 0]).unsqueeze(-1),
        "distilled_index": torch.tensor([0, 1, 1, 0, 0, 0, 0, 0]).unsqueeze(-1),
        "vocab_size": 9,
    }
    return routing_health(**(arguments | changes), mask=mask)


@pytest.mark.parametrize("mask", [None, MASK])
def test_each_number_is_what_a_loop_over_the_real_tokens_gives(mask):
    health = health_of(mask)
    torch.manual_seed(0)
    hidden = torch.randn(8, 4) + 2
    real = [t for t in range(8) if mask is None or mask[t]]
    gates = [[0.0, 0.04, 0.06, 0.5, 1.0, 0.5, 0.01, 0.01][t] for t in real]
    assert float(health.mean_gate) == pytest.approx(sum(gates) / len(gates))
    assert float(health.closed_gates) == pytest.approx(sum(gate < 0.05 for gate in gates) / len(gates))
    mean = sum(hidden[t] for t in real) / len(real)
    assert float(health.common_direction) == pytest.approx(
        float(mean.norm()) / (sum(float(hidden[t].norm()) for t in real) / len(real)), rel=1e-5
    )
    agreed = {0, 1, 3, 6, 7}
    assert float(health.distillation_agreement) == pytest.approx(sum(t in agreed for t in real) / len(real))
    by_id = defaultdict(list)
    for t in real:
        by_id[int(IDS[t])].append(t in agreed)
    expected = sum(sum(values) / len(values) for values in by_id.values()) / len(by_id)
    assert float(health.distillation_agreement_by_id) == pytest.approx(expected)


def test_padding_may_hold_anything():
    hidden = torch.ones(8, 4)
    hidden[~MASK] = torch.nan
    gate = torch.where(MASK, 0.5, torch.nan).unsqueeze(-1)
    health = health_of(MASK, hidden_states=hidden, gate=gate)
    assert float(health.common_direction) == pytest.approx(1.0)
    assert float(health.mean_gate) == pytest.approx(0.5)


def test_a_batch_of_padding_has_zeros_and_no_nan():
    nothing = torch.zeros(8, dtype=torch.bool)
    assert [float(value) for value in health_of(nothing, router_logits=torch.randn(8, 3))] == [0.0] * 6


def test_opposite_states_have_no_common_direction():
    hidden = torch.randn(6, 4)
    assert float(common_direction(torch.cat([hidden, -hidden]))) == pytest.approx(0.0, abs=1e-6)
    assert float(common_direction(torch.zeros(3, 4))) == 0.0


def test_entropy_is_that_of_the_shares_however_far_scores_lie_apart():
    assert float(router_entropy(torch.tensor([[2.0, 2.0, 2.0]]))) == pytest.approx(1.0)
    shares = [0.5, 0.25, 0.25]
    expected = -sum(share * math.log(share) for share in shares) / math.log(3)
    assert float(router_entropy(torch.tensor([shares]).log() + 40)) == pytest.approx(expected, rel=1e-5)
    # Shares of 0, and a difference past the largest number.
    far = torch.tensor([[0.0, -1e3, 0.0], [3e38, -3e38, 3e38]])
    assert float(router_entropy(far)) == pytest.approx(math.log(2) / math.log(3))
    assert float(router_entropy(torch.randn(4, 1))) == 0.0


def test_layers_weigh_as_many_tokens_as_they_route():
    first, second = health_of(), health_of(gate=torch.ones(8))
    mean = mean_health([first, second], torch.tensor([1, 3]))
    assert float(mean.mean_gate) == pytest.approx((float(first.mean_gate) + 3) / 4)
    torch.testing.assert_close(mean.distillation_agreement, first.distillation_agreement)


def test_a_model_reports_the_health_of_its_routing_in_both_stages():
    model, ids = tiny_model(), random_ids()
    output = model.train()(ids, labels=ids)
    assert 0 < float(output.routing_health.mean_gate) < 1
    assert float(output.distillation_agreement) == float(output.routing_health.distillation_agreement)
    assert not output.routing_health.mean_gate.requires_grad
    model.freeze_router()
    output = model(ids, labels=ids)
    assert math.isnan(output.routing_health.distillation_agreement)
    assert 0 < float(output.routing_health.common_direction) <= 1
