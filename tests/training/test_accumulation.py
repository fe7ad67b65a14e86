"""Equal batches give equal training, however they are cut up."""

import pytest
import torch

from helpers.models import random_ids, tiny_model
from helpers.trainers import BLOCKS, Gradients, make_trainer


def train(folder, batch_size, accumulation, *, max_steps=4, blocks=None, frozen=False, **config):
    """Train with plain SGD; return the gradients of every step and the final weights."""
    model = tiny_model(moe_layer_positions=[0, 2], **config)
    if frozen:
        model.freeze_router()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gradients = Gradients()
    make_trainer(
        folder,
        gradients,
        model=model,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        train_dataset=BLOCKS if blocks is None else blocks,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=max_steps,
        max_grad_norm=0.0,
        logging_strategy="no",
    ).train()
    return gradients.steps, model.state_dict()


@pytest.mark.parametrize(("batch_size", "accumulation", "frozen"), [(3, 2, False), (1, 6, True)])
def test_one_batch_equals_the_same_blocks_by_accumulation(tmp_path, batch_size, accumulation, frozen):
    options = {"balance_loss_coef": 0.0, "frozen": frozen}
    whole, whole_weights = train(tmp_path, 6, 1, **options)
    cut, cut_weights = train(tmp_path, batch_size, accumulation, **options)
    assert len(whole) == len(cut) == 4
    for expected, actual in zip(whole, cut, strict=True):
        assert any("distilled_router" in name for name in actual) == (not frozen)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cut_weights, whole_weights, rtol=1e-4, atol=1e-5)


def test_micro_batch_repeated_gives_exactly_its_own_gradient(tmp_path):
    # With every coefficient: the loss of n equal micro-batches is the loss of one. Quarters are exact.
    same = [{"input_ids": random_ids(1, 16)[0]}] * 16
    (once,), _ = train(tmp_path, 2, 1, max_steps=1, blocks=same)
    (repeated,), _ = train(tmp_path, 2, 4, max_steps=1, blocks=same)
    assert once.keys() == repeated.keys()
    assert not [name for name in once if not torch.equal(once[name], repeated[name])]


def balance_gradient(folder, batch_size, accumulation) -> torch.Tensor:
    """What the balance loss adds to the gradient of the first router."""
    blocks = [{"input_ids": row} for row in random_ids(32, 64, seed=2)]
    sides = [
        train(folder, batch_size, accumulation, max_steps=1, blocks=blocks, balance_loss_coef=coefficient)[0][0]
        for coefficient in (1.0, 0.0)
    ]
    name = next(name for name in sides[0] if name.endswith("router.centroids") and "distilled" not in name)
    return sides[0][name] - sides[1][name]


def test_balance_loss_does_not_grow_with_the_number_of_micro_batches(tmp_path):
    whole = balance_gradient(tmp_path, 32, 1)
    cut = balance_gradient(tmp_path, 8, 4)
    coefficient = (cut * whole).sum() / whole.square().sum()
    # Not exactly 1: loads are counted in each micro-batch. A sum over micro-batches would give 4.
    assert coefficient.item() == pytest.approx(1.0, abs=0.05)
