"""Only a step that learns moves counts and running statistics: sampling and other passes between steps leave no trace."""

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainerCallback

from helpers.models import (
    COUNTING,
    gradients,
    random_ids,
    shaken,
    switch_checkpointing,
    tiny_config,
    tiny_model,
    tiny_seq2seq_model,
)
from helpers.trainers import assert_same_weights, make_trainer, training_logs, weights
from modeling_stablemoe import StableMoEForSequenceClassification, StageTransitionCallback


pytestmark = pytest.mark.pairs


IDS = random_ids(high=90, low=3)
SETTINGS = {"router_type": "switch", "balance_loss_coef": 0.1, **COUNTING}


def tiny_classifier(**settings):
    return shaken(StableMoEForSequenceClassification(tiny_config(num_labels=3, **settings)))


FAMILIES = {
    "language model": (tiny_model, {"input_ids": IDS, "labels": IDS}),
    "classifier": (tiny_classifier, {"input_ids": IDS, "labels": torch.tensor([0, 2, 1])}),
    "translation": (tiny_seq2seq_model, {"input_ids": IDS, "labels": IDS[:, :4]}),
}


def under_no_grad(model, batch):
    with torch.no_grad():
        model(**batch)


def under_inference_mode(model, batch):
    with torch.inference_mode():
        model(**batch)


def sampling(model, batch):
    if model.can_generate():
        model.generate(IDS[:1], max_new_tokens=4, do_sample=True, pad_token_id=2)


def without_parameters_that_learn(model, batch):
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad = False
    model(**batch)
    for parameter in learned:
        parameter.requires_grad = True


FOLLOWED = set("expert_counts tokens feature_mean feature_variance expert_bias recent_load token_counts".split())
PASSES = [under_no_grad, under_inference_mode, sampling, without_parameters_that_learn]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("between", PASSES, ids=lambda function: function.__name__)
def test_a_pass_without_gradients_leaves_a_model_in_training_mode_as_it_is(family, between):
    build, batch = FAMILIES[family]
    model = build(**SETTINGS).train()
    before = weights(model)
    between(model, batch)
    assert model.training
    assert_same_weights(weights(model), before)
    model(**batch)  # a pass that has a gradient is one that learns
    moved = {name.rsplit(".", 1)[-1] for name, now in weights(model).items() if not torch.equal(now, before[name])}
    assert moved == FOLLOWED


@pytest.mark.parametrize("family", ["language model", "translation"])
def test_a_step_that_trains_what_comes_after_the_routers_counts(family):
    build, batch = FAMILIES[family]
    model = build(**SETTINGS).train().requires_grad_(False)
    last = model.model.decoder if family == "translation" else model.model
    last.layers[-1].mlp.down_proj.weight.requires_grad = True
    model(**batch)
    assert all(layer.router.distilled_router.counts().sum() > 0 for layer in model.moe_layers_by_name.values())


def test_a_step_on_encoder_outputs_made_without_gradients_counts_both_sides():
    model = tiny_seq2seq_model(**SETTINGS).train()
    recorded = ("router_logits", "expert_indices", "distilled_router_logits", "routing_traces")
    with torch.no_grad():
        encoded = model.model.encoder(IDS, **{f"output_{name}": True for name in recorded})
    assert not any(layer.router.memory()["tokens"] for layer in model.moe_layers_by_name.values())
    model(encoder_outputs=encoded, labels=IDS[:, :4])
    assert [int(layer.router.memory()["tokens"]) for layer in model.moe_layers_by_name.values()] == [21, 12, 12]


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_counts_every_token_once(family):
    build, batch = FAMILIES[family]
    plain, checkpointed = (build(**SETTINGS).train() for _ in range(2))
    checkpointed.load_state_dict(plain.state_dict())
    switch_checkpointing(checkpointed)
    for model in (plain, checkpointed):
        for _ in range(2):  # the second routes by the statistics of the first, recomputed or not
            model(**batch).loss.backward()
    assert_same_weights(weights(checkpointed), weights(plain))
    assert_close(gradients(checkpointed), gradients(plain), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["language model", "translation"])
def test_one_process_may_sample_alone(family, monkeypatch):
    # Another process that takes no part: to ask it would be to wait for ever.
    asked = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", asked.append)
    build, batch = FAMILIES[family]
    model = build(**SETTINGS).train()
    for between in (sampling, under_no_grad):
        between(model, batch)
    assert not asked
    model(**batch)
    assert asked


class Sample(TrainerCallback):
    """Looks at the model between the steps, which Trainer hands out in training mode."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert model.training
        sampling(model, None)
        under_no_grad(model, {"input_ids": IDS, "labels": IDS})


def test_a_run_with_sampling_ends_as_one_without(tmp_path):
    runs = []
    for callbacks in ([], [Sample()]):
        trainer = make_trainer(
            tmp_path,
            StageTransitionCallback(4),
            *callbacks,
            model=tiny_model(**SETTINGS),
            max_steps=6,
            logging_steps=1,
        )
        trainer.train()
        logs = [
            {name: value for name, value in entry.items() if name != "tokens_per_second"}
            for entry in training_logs(trainer.state.log_history)
        ]
        runs.append((weights(trainer.model), trainer.model.config.router_fingerprint, logs))
    (without, fingerprint, logs), (sampled, sampled_fingerprint, sampled_logs) = runs
    assert_same_weights(sampled, without)
    assert sampled_fingerprint == fingerprint
    assert sampled_logs == logs
