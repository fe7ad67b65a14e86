"""A model is pickled and copied at any moment, after a training step too, and goes on as the original does."""

import copy
import io
import pickle

import pytest
import torch
from transformers.utils import output_capturing

from helpers.models import COUNTING, random_ids, tiny_classifier, tiny_model, tiny_seq2seq_model
from helpers.trainers import assert_same_weights, weights


pytestmark = pytest.mark.pairs


IDS = random_ids(low=3, high=90)
FAMILIES = {
    "language model": (lambda: tiny_model(**COUNTING), {"input_ids": IDS, "labels": IDS}),
    "bigram": (lambda: tiny_model(distilled_router="bigram"), {"input_ids": IDS, "labels": IDS}),
    "classifier": (tiny_classifier, {"input_ids": IDS, "labels": torch.tensor([0, 2, 1])}),
    "translation": (lambda: tiny_seq2seq_model(**COUNTING), {"input_ids": IDS, "labels": IDS[:, :4]}),
}


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch": through_torch, "deepcopy": copy.deepcopy}


def step(model, batch):
    """The loss, what is recorded and the gradients of a step."""
    model.zero_grad()
    outputs = model(**batch, output_router_logits=True, output_hidden_states=True)
    outputs.loss.backward()
    recorded = {
        name: [layer.detach() for layer in value]
        for name, value in outputs.items()
        if isinstance(value, tuple) and value
    }
    recorded.pop("routing_health")
    assert any("router_logits" in name for name in recorded)
    assert any("hidden_states" in name for name in recorded)
    return (
        outputs.loss.detach(),
        recorded,
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_goes_on_after_a_training_step_as_the_original_does(family, way):
    build, batch = FAMILIES[family]
    model = build().train()
    step(model, batch)
    twin = WAYS[way](model)
    assert twin.training
    assert_same_weights(weights(twin), weights(model))
    for _ in range(2):
        torch.testing.assert_close(step(twin, batch), step(model, batch), rtol=0, atol=0)
    if family == "translation":
        assert twin.model.decoder.embed_tokens is twin.model.encoder.embed_tokens
        assert twin.lm_head.weight is twin.model.encoder.embed_tokens.weight
    model.freeze_router(), twin.freeze_router()
    assert WAYS[way](twin).router_fingerprint() == model.router_fingerprint()


def test_hooks_of_one_s_own_are_kept_and_the_model_stays_as_it_is():
    model = tiny_model().train()
    step(model, {"input_ids": IDS, "labels": IDS})
    model.model.layers[0].register_forward_hook(print)  # a function that can be pickled
    modules = dict(model.named_modules())
    hooks = {name: dict(module._forward_hooks) for name, module in modules.items()}
    twin = pickle.loads(pickle.dumps(model))
    assert dict(model.named_modules()) == modules
    assert {name: dict(module._forward_hooks) for name, module in modules.items()} == hooks
    assert {name: len(module._forward_hooks) for name, module in twin.named_modules()} == {
        name: len(own) for name, own in hooks.items()
    }
    assert print in twin.model.layers[0]._forward_hooks.values()


def test_a_layer_alone_is_copied_with_its_hooks():
    # It may come back into its model, which takes it for hooked.
    model = tiny_model().train()
    expected = step(model, {"input_ids": IDS, "labels": IDS})[1]["hidden_states"]
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    assert len(step(model, {"input_ids": IDS, "labels": IDS})[1]["hidden_states"]) == len(expected) == 3


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_interpreter_that_has_built_no_model_trains_a_pickled_one(family, steps, monkeypatch):
    build, batch = FAMILIES[family]
    model = build().train()
    for _ in range(steps):
        step(model, batch)
    content = pickle.dumps(model)
    monkeypatch.setattr(output_capturing, "_CAN_RECORD_REGISTRY", type(output_capturing._CAN_RECORD_REGISTRY)())
    torch.testing.assert_close(step(pickle.loads(content), batch)[0], step(model, batch)[0], rtol=0, atol=0)
