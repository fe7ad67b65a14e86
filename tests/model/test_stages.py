"""Tests of the two stages of a model: freezing, fingerprints, optimizers, resizing, loading, copying."""

import copy
import io
import logging
import re

import pytest
import torch
from torch.testing import assert_close

from helpers.models import random_ids, tiny_model
from modeling_stablemoe import StableMoEForCausalLM


IDS = random_ids(4, 9)
EVERY_ID = torch.arange(99).unsqueeze(0)


def learning(seed: int = 0, **overrides) -> StableMoEForCausalLM:
    return tiny_model(seed, **{"moe_layer_positions": [0, 2], **overrides})


def frozen(seed: int = 0, **overrides) -> StableMoEForCausalLM:
    model = learning(seed, **overrides)
    model.freeze_router()
    return model


def tables(model) -> list[torch.Tensor]:
    return [layer.frozen_router.routing_table for layer in model.moe_layers_by_name.values()]


def train(model, steps: int, optimizer, set_to_none: bool = True):
    model.train()
    for step in range(steps):
        ids = random_ids(4, 9, seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


# Freezing


def test_the_stage_and_the_fingerprint_follow_freezing():
    model = learning()
    assert (model.routing_stage, model.router_fingerprint(), model.config.router_fingerprint) == (1, None, None)
    assert all(table.unique().tolist() == [-1] for table in tables(model))
    model.freeze_router()
    assert model.routing_stage == model.model.routing_stage == 2
    assert re.fullmatch(r"[0-9a-f]{64}", model.router_fingerprint())
    assert model.config.router_fingerprint == model.router_fingerprint() == model.model.router_fingerprint()


def test_freezing_twice_is_an_error_that_changes_nothing():
    model = frozen()
    fingerprint, before = model.router_fingerprint(), model.route(EVERY_ID)
    with torch.no_grad():
        model.model.moe_layers[0].router.distilled_router.embedding.normal_()
    with pytest.raises(RuntimeError, match=rf"frozen already \(fingerprint {fingerprint}\).*stage-1 checkpoint"):
        model.freeze_router()
    assert torch.equal(model.route(EVERY_ID), before)


def test_the_fingerprint_is_that_of_this_routing_and_no_other():
    model = frozen()
    fingerprints = {model.router_fingerprint()}
    original = torch.stack(tables(model)).clone()
    for layer in range(2):
        for row in (0, 50, 98):
            changed = original.clone()
            changed[layer, row] = (changed[layer, row] + 1) % 5
            model.set_routing_tables(changed)
            fingerprints.add(model.router_fingerprint())
    assert len(fingerprints) == 7
    model.set_routing_tables(original.flip(0))
    fingerprints.add(model.router_fingerprint())
    assert len(fingerprints) == 8


def test_the_fingerprint_of_a_known_table_does_not_change_between_versions():
    model = frozen(moe_layer_positions=[1])
    model.model.moe_layers[0].frozen_router.freeze(torch.arange(99) % 5)
    # sha256 of "stablemoe-routing-1|5 experts, 99 tokens|" and the rows as little-endian int32
    assert model.router_fingerprint() == "e239dd514aa8719ce661fe8814a18d123a70102f89390c5ba7111f32914967d1"


# Optimizers


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("kind", ["word_embedding", "transformer_1"])
@pytest.mark.parametrize(("make_optimizer", "set_to_none"), [(adamw, True), (sgd, False)])
def test_no_optimizer_moves_a_frozen_routing(make_optimizer, set_to_none, kind):
    model = learning(distilled_router=kind)
    optimizer = make_optimizer(model)
    train(model, 5, optimizer, set_to_none)
    model.freeze_router()
    fingerprint, routes = model.router_fingerprint(), model.route(EVERY_ID)
    router = model.model.moe_layers[0].router
    embedding, centroids = router.distilled_router.embedding.detach().clone(), router.centroids.detach().clone()
    train(model, 8, optimizer, set_to_none)
    # Momentum and decay of gradients of zero do move D, which is why routing must not read it any more.
    assert torch.equal(router.distilled_router.embedding, embedding) is set_to_none
    assert not torch.allclose(router.centroids, centroids, atol=1e-3)
    assert torch.equal(model.route(EVERY_ID), routes)
    assert model.router_fingerprint() == fingerprint


# Resizing


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"new_num_tokens": 100, "pad_to_multiple_of": 16}, 112),
        ({"new_num_tokens": 50}, 50),
        ({"new_num_tokens": 99}, 99),
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_resizing_keeps_the_experts_of_old_ids_and_survives_saving(arguments, size, stage, tmp_path):
    model = (learning() if stage == 1 else frozen()).eval()
    kept = min(size, 99)
    before, logits = model.route(EVERY_ID), model(IDS % kept).logits
    old_fingerprint = model.router_fingerprint()
    embeddings = model.resize_token_embeddings(**arguments, mean_resizing=False)
    assert embeddings.weight.shape[0] == model.config.vocab_size == size
    ids = torch.arange(size).unsqueeze(0)
    after = model.route(ids)
    assert torch.equal(after[..., :kept], before[..., :kept])
    assert model.routing_stage == stage
    if stage == 2:
        assert after[0, 0, 99:].tolist() == after[1, 0, 99:].tolist() == [v % 5 for v in range(99, size)]
        assert (model.router_fingerprint() == old_fingerprint) is (size == 99)
    assert model.config.router_fingerprint == model.router_fingerprint()
    assert_close(model(IDS % kept).logits[..., :kept], logits[..., :kept], rtol=1e-6, atol=1e-6)
    assert all(p.requires_grad is p.is_floating_point() for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = StableMoEForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.route(ids), after)
    last = torch.full((1, 3), size - 1)
    assert_close(loaded(last).logits, model(last).logits, rtol=1e-5, atol=1e-5)


def test_a_resized_model_trains_and_freezes_with_its_new_ids():
    model = learning()
    model.resize_token_embeddings(110, mean_resizing=False)
    ids = torch.tensor([[105, 109, 3, 99]])
    model.train()(ids, labels=ids).loss.backward()
    grad = model.model.moe_layers[0].router.distilled_router.embedding.grad
    assert grad[[105, 109, 3, 99]].abs().sum(-1).min() > 0
    before = model.route(torch.arange(110).unsqueeze(0))
    model.freeze_router()
    assert torch.equal(model.route(torch.arange(110).unsqueeze(0)), before)


# Loading state dicts


def test_stage_1_weights_bring_a_frozen_model_back_with_a_warning(caplog):
    source, model = learning(seed=7).eval(), frozen().eval()
    logging.getLogger("modeling_stablemoe").propagate = True
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(source.state_dict())
    assert "These weights are from stage 1: the model learns its routing again" in caplog.text
    assert (model.routing_stage, model.config.router_fingerprint) == (1, None)
    assert torch.equal(model.route(EVERY_ID), source.route(EVERY_ID))
    model.freeze_router()
    assert model.routing_stage == 2


TABLE = "model.moe_layers.1.frozen_router.routing_table"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, r"The routing tables of model\.moe_layers\.0, .* are not those .* fingerprint is"),
        (-1, rf"`{re.escape(TABLE)}` is damaged: token id 3 has no expert"),
        (5, rf"`{re.escape(TABLE)}` is damaged: token id 3 is sent to expert 5"),
    ],
    ids=["another routing", "an id without an expert", "an expert that there is not"],
)
def test_weights_that_do_not_fit_are_refused_and_leave_the_model_as_it_was(row, message):
    model = frozen()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = frozen(seed=7).state_dict() if row is None else copy.deepcopy(before)
    if row is not None:
        weights[TABLE][3] = row
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.router_fingerprint == model.router_fingerprint()


def test_the_same_frozen_routing_with_other_weights_is_loaded():
    model = frozen()
    trained = copy.deepcopy(model)
    train(trained, 2, adamw(trained))
    model.load_state_dict(trained.state_dict())
    assert_close(model.eval()(IDS).logits, trained.eval()(IDS).logits, rtol=0, atol=0)


# Copies


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(("stage", "duplicate"), [(1, copy.deepcopy), (2, by_torch)])
def test_copies_keep_the_stage_and_follow_their_own_weights(stage, duplicate):
    model = (learning() if stage == 1 else frozen()).eval()
    twin = duplicate(model)
    assert twin.routing_stage == stage
    assert twin.router_fingerprint() == model.router_fingerprint()
    assert_close(twin(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    # What the copy loads changes the copy alone.
    other = frozen(seed=7) if stage == 1 else learning(seed=7)
    twin.load_state_dict(other.state_dict())
    assert (twin.routing_stage, model.routing_stage) == (3 - stage, stage)
    assert (model.config.router_fingerprint is None) is (stage == 1)
