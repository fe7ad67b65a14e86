"""What must not matter: padding on either side, the rest of a batch, ids or their embeddings."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import random_ids, tiny_model


pytestmark = pytest.mark.pairs


PAD = 1
# The cross-entropy is taken in float32, whatever the model.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 1e-9, "atol": 1e-9}
STAGES = ["training", "evaluation", "frozen", "frozen training"]


@functools.cache
def model_in(stage: str, **overrides):
    """Two MoE layers, the first before any block; float64, so that only real differences are seen."""
    model = tiny_model(moe_layer_positions=[0, 1], **overrides).double()
    if "frozen" in stage:
        model.freeze_router()
    return model.train("training" in stage)


def pad(ids, left: list[int], right: list[int]):
    """Rows of unequal length from `ids`, each cut by what its padding takes; `(ids, mask, labels)`."""
    width = ids.shape[1]
    padded, mask = torch.full_like(ids, PAD), torch.zeros_like(ids)
    for row, (before, after) in enumerate(zip(left, right, strict=True)):
        padded[row, before : width - after] = ids[row, : width - after - before]
        mask[row, before : width - after] = 1
    labels = padded.masked_fill(mask == 0, -100)
    labels[torch.arange(len(ids)), mask.argmax(-1)] = -100  # else padding on the left would have to predict it
    return padded, mask, labels


def routing_of(outputs):
    return {
        name: outputs[name]
        for name in ("balance_loss", "distillation_loss", "distillation_agreement", "expert_load", "aux_loss")
    }


def assert_same_losses(actual, expected):
    torch.testing.assert_close(actual.loss, expected.loss, **CLOSE)
    for name, value in routing_of(expected).items():
        torch.testing.assert_close(
            actual[name], value, equal_nan=True, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


# Padding


@pytest.mark.parametrize("stage", STAGES)
@given(left=st.integers(0, 5), right=st.integers(0, 5), content=st.sampled_from([PAD, 0, 57]))
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_padding_on_either_side_changes_no_logit_loss_load_or_agreement(stage, left, right, content):
    model = model_in(stage)
    ids = random_ids(batch=3, length=7)
    expected = model(ids, labels=ids, output_router_logits=True)
    widened = torch.full((3, 7 + left + right), content)
    widened[:, left : left + 7] = ids
    mask = torch.zeros_like(widened)
    mask[:, left : left + 7] = 1
    labels = widened.masked_fill(mask == 0, -100)
    labels[:, left] = -100
    actual = model(widened, attention_mask=mask, labels=labels, output_router_logits=True)
    torch.testing.assert_close(actual.logits[:, left : left + 7], expected.logits, **EXACT)
    for index, expected_index in zip(actual.expert_indices, expected.expert_indices, strict=True):
        assert torch.equal(index[:, left : left + 7], expected_index)
    assert_same_losses(actual, expected)
    assert int(actual.expert_load.sum()) == 2 * 21


@pytest.mark.parametrize("stage", STAGES)
@given(
    left=st.lists(st.integers(0, 3), min_size=3, max_size=3), right=st.lists(st.integers(0, 3), min_size=3, max_size=3)
)
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_each_sequence_of_a_ragged_batch_has_the_logits_it_has_alone(stage, left, right):
    model = model_in(stage)
    ids, mask, _ = pad(random_ids(batch=3, length=9), left, right)
    together = model(ids, attention_mask=mask)
    for row, kept in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, kept])
        torch.testing.assert_close(together.logits[row, kept], alone.logits[0], **EXACT)


@pytest.mark.parametrize("stage", ["training", "frozen training"])
def test_a_sequence_of_padding_alone_changes_nothing(stage):
    model = model_in(stage)
    ids = random_ids(batch=3, length=7)
    expected = model(ids[:2], labels=ids[:2])
    mask = torch.ones_like(ids)
    mask[2] = 0
    actual = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    torch.testing.assert_close(actual.logits[:2], expected.logits, **EXACT)
    assert_same_losses(actual, expected)
    actual.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_padding_takes_no_capacity_from_real_tokens():
    model = model_in("training", expert_capacity_factor=1.0)
    ids = random_ids(batch=3, length=7)
    expected = model(ids, labels=ids)
    widened = torch.cat([torch.full((3, 9), PAD), ids], dim=1)
    mask = (torch.arange(16) >= 9).long().expand(3, -1)
    actual = model(widened, attention_mask=mask)
    torch.testing.assert_close(actual.logits[:, 9:], expected.logits, **EXACT)
    unlimited = model_in("training")(ids)
    assert not torch.allclose(unlimited.logits, expected.logits), "the capacity was not reached"


# Batches


@torch.no_grad()
def test_tokens_that_are_not_predicted_are_still_routed_and_counted():
    model = model_in("training")
    ids = random_ids()
    labels = ids.clone()
    labels[:, :5] = -100
    expected, actual = model(ids, labels=ids), model(ids, labels=labels)
    for name, value in routing_of(expected).items():
        assert torch.equal(actual[name], value), name
    assert actual.expert_load.sum(-1).tolist() == [21, 21]
    assert actual.task_loss != expected.task_loss


# Embeddings in place of ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_embeddings_of_tokens_give_the_logits_losses_and_experts_of_their_ids(stage, dtype):
    model = copy.deepcopy(model_in(stage)).to(dtype)
    ids = torch.arange(2, 98).view(3, 32)
    expected = model(ids, labels=ids, output_router_logits=True)
    embeds = model.get_input_embeddings()(ids)
    actual = model(inputs_embeds=embeds, labels=ids, output_router_logits=True)
    assert torch.equal(actual.logits, expected.logits)
    for index, expected_index in zip(actual.expert_indices, expected.expert_indices, strict=True):
        assert torch.equal(index, expected_index)
    assert_same_losses(actual, expected)


@torch.no_grad()
def test_a_vector_near_a_token_is_routed_as_that_token():
    model = model_in("frozen")
    ids = random_ids()
    embeds = model.get_input_embeddings()(ids)
    nudged = embeds + 1e-3 * torch.randn_like(embeds)
    assert torch.equal(
        torch.stack(model(inputs_embeds=nudged, output_router_logits=True).expert_indices), model.route(ids)
    )
    weight = model.get_input_embeddings().weight
    soft_prompts = torch.randn(2, 4, 32, dtype=torch.float64)
    by_brute_force = torch.cdist(soft_prompts, weight.expand(2, -1, -1)).argmin(-1)
    outputs = model(inputs_embeds=soft_prompts, output_router_logits=True)
    assert torch.equal(torch.stack(outputs.expert_indices), model.route(by_brute_force))


@pytest.mark.parametrize("stage", ["evaluation", "frozen"])
@torch.no_grad()
def test_where_ids_and_embeddings_are_given_ids_route_and_embeddings_are_read(stage):
    model = model_in(stage)
    ids, others = random_ids(), random_ids(seed=7)
    embeds = model.get_input_embeddings()(others)
    outputs = model(input_ids=ids, inputs_embeds=embeds, output_router_logits=True)
    assert torch.equal(torch.stack(outputs.expert_indices), model.route(ids))
    assert not torch.equal(model.route(ids), model.route(others))
    read = model(inputs_embeds=embeds, output_router_logits=True)
    torch.testing.assert_close(outputs.router_logits[0], read.router_logits[0], **EXACT)
