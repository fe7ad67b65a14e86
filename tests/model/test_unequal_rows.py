"""Rows of unequal length: k + k of them give the routing losses and gradients of the 2k together."""

import pytest
import torch
from torch.testing import assert_close

from helpers.models import padded, random_ids, tiny_classifier, tiny_model, tiny_seq2seq_model
from modeling_stablemoe.model.losses_stablemoe import token_weights


pytestmark = pytest.mark.pairs


LENGTHS = (12, 11, 3, 2)
ROWS = [random_ids(1, length, seed=length, low=3, high=90)[0] for length in LENGTHS]
ROUTERS = {
    "stable": {},
    "switch": {"router_type": "switch", "distilled_router": "word_embedding", "balance_loss_coef": 0.3},
    "counts": {"distilled_router": "counts"},
    "bigram": {"distilled_router": "bigram"},
    "cnn": {"distilled_router": "cnn"},
    "transformer": {"distilled_router": "transformer_1"},
}


def language_model(prompts=(0, 0, 0, 0), **settings):
    labels = [row.clone() for row in ROWS]
    for row, prompt in zip(labels, prompts, strict=True):
        row[:prompt] = -100
    batch = {"input_ids": padded(ROWS, 1), "attention_mask": padded([torch.ones_like(row) for row in ROWS], 0)}
    batch["labels"] = padded(labels, -100)
    return tiny_model(**settings), batch, int(batch["labels"][:, 1:].ne(-100).sum())


def instruction_model(**settings):
    # Of 11 tokens 10 are a prompt; the last row has nothing to predict.
    return language_model((4, 10, 0, 2), **settings)


def classifier(**settings):
    _, batch, _ = language_model()
    return tiny_classifier(**settings), {**batch, "labels": torch.tensor([0, 2, 1, 0])}, 4


def translation_model(**settings):
    _, batch, _ = language_model()
    return tiny_seq2seq_model(**settings), {**batch, "labels": padded(ROWS[::-1], -100)}, sum(LENGTHS)


FAMILIES = [language_model, instruction_model, classifier, translation_model]


def gradients(model, batch, items, parts):
    """The gradient of a step in some micro-batches; the sum of their auxiliary losses. Task losses are float32 in any model."""
    model.zero_grad()
    aux_loss = 0.0
    for rows in torch.arange(4).split(parts):
        outputs = model(**{name: values[rows] for name, values in batch.items()}, num_items_in_batch=items)
        outputs.loss.backward()
        aux_loss = aux_loss + outputs.aux_loss.detach()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, aux_loss


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_micro_batches_add_up_to_the_gradient_of_the_whole(family, router):
    # Loads are counted in each micro-batch, so the balance loss stays out here.
    model, batch, items = family(**{**ROUTERS[router], "balance_loss_coef": 0.0})
    model.double().train()
    whole, aux_loss = gradients(model, batch, items, 4)
    assert any("distilled_router" in name and gradient.any() for name, gradient in whole.items())
    for parts in (2, 1, (3, 1)):
        cut, aux_losses = gradients(model, batch, items, parts if isinstance(parts, int) else list(parts))
        assert_close(cut, whole, rtol=1e-4, atol=1e-6)
        assert_close(aux_losses, aux_loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("router", ["stable", "switch"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_processes_that_count_loads_together_add_up_with_the_balance_loss_too(family, router, monkeypatch):
    model, batch, items = family(**ROUTERS[router])
    model.double().train()
    loads = []  # of all processes, layer by layer
    monkeypatch.setattr(
        "modeling_stablemoe.model.losses_stablemoe.sum_across_processes", lambda load: loads.append(load)
    )
    whole, aux_loss = gradients(model, batch, items, 4)
    of_layers = [load.clone() for load in loads]

    def of_all_processes(load):
        load.copy_(of_layers[len(loads) % len(of_layers)])
        loads.append(load)

    loads.clear()
    monkeypatch.setattr("modeling_stablemoe.model.losses_stablemoe.sum_across_processes", of_all_processes)
    halves, aux_losses = gradients(model, batch, items, 2)
    assert len(loads) == 2 * len(of_layers)
    assert_close(halves, whole, rtol=1e-4, atol=1e-6)
    assert_close(aux_losses, aux_loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_equal_halves_add_up_with_the_balance_loss_too(family):
    model, batch, _ = family()
    model.double().train()
    batch = {name: values[:2].repeat(2, *[1] * (values.dim() - 1)) for name, values in batch.items()}
    items = model.count_targets(batch["labels"])
    (whole, aux_loss), (halves, aux_losses) = (gradients(model, batch, items, parts) for parts in (4, 2))
    assert_close(halves, whole, rtol=1e-4, atol=1e-6)
    assert_close(aux_losses, aux_loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_each_row_counts_for_its_share_of_the_targets(family):
    model, batch, items = family(balance_loss_coef=0.0)
    model.double().train()
    shares = []
    for row in range(4):
        alone = {name: values[row : row + 1] for name, values in batch.items()}
        labels = alone["labels"]
        targets = (labels[:, 1:] if labels.dim() == 2 and family is not translation_model else labels).ne(-100).sum()
        shares.append(model(**alone).aux_loss * targets / items)
    assert sum(shares) > 0.1
    assert_close(model(**batch, num_items_in_batch=items).aux_loss, sum(shares), rtol=1e-6, atol=0)


def test_weights_by_hand():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    weights = token_weights(torch.tensor([3, 1, 0]), mask, 4, torch.float64)
    # Rows count for 3/4, 1/4 and nothing of the 7 tokens, spread over 4, 2 and 1 of them.
    expected = torch.tensor([3 / 4 * 7 / 4] * 4 + [1 / 4 * 7 / 2] * 4 + [0.0] * 4, dtype=torch.float64)
    assert_close(weights, expected)
    assert_close(weights[mask.flatten()].mean(), torch.tensor(1.0, dtype=torch.float64))
    assert not token_weights(torch.tensor([0, 0, 0]), mask, 4, torch.float32).any()


@pytest.mark.parametrize("length", [3, 1023, 4099])
def test_equal_shares_weigh_exactly_one(length):
    targets = torch.full((7,), length - 1)
    assert torch.equal(token_weights(targets, None, length, torch.float32), torch.ones(7 * length))
    mask = torch.arange(length + 2).repeat(7, 1) < length
    assert torch.equal(token_weights(targets, mask, length + 2, torch.float32), torch.ones(7 * (length + 2)))
