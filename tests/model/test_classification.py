"""Tests of the sequence classifier."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DataCollatorWithPadding

from helpers.checkpoints import EVERY_ID
from helpers.matrices import one_fast
from helpers.models import padded, random_ids, tiny_classifier, tiny_model
from helpers.trainers import STATISTICS, Gradients, make_trainer, tiny_tokenizer, training_logs
from modeling_stablemoe import StableMoEForCausalLM, StableMoEForSequenceClassification, StageTransitionCallback


pytestmark = pytest.mark.pairs


ROWS = [random_ids(1, length, seed=length)[0] for length in (3, 7, 5)]
LABELS = {
    "single_label_classification": lambda index: index % 3,
    "multi_label_classification": lambda index: [float(index % 2), float(index % 3 == 0), 1.0],
    "regression": lambda index: index / 8 - 1.0,
}


def build(problem="single_label_classification", frozen=False, **overrides):
    labels = 1 if problem == "regression" else 3
    model = tiny_classifier(num_labels=labels, problem_type=problem, moe_layer_positions=[0, 2], **overrides)
    if frozen:
        model.freeze_router()
    return model


def pad(rows, side="right"):
    mask = [torch.ones_like(row) for row in rows]
    return {"input_ids": padded(rows, 1, side), "attention_mask": padded(mask, 0, side)}


def test_logits_are_those_of_the_last_token_whatever_the_padding():
    model = build(frozen=True).eval()
    with torch.no_grad():
        alone = [model.model(row[None]).last_hidden_state[0, -1] @ model.score.weight.T for row in ROWS]
        for side in ("left", "right"):
            batch = pad(ROWS, side)
            assert_close(model(**batch).logits, torch.stack(alone), rtol=1e-4, atol=1e-5)
            # Embeddings hide which tokens are padding; the mask tells.
            embeds = model.get_input_embeddings()(batch["input_ids"])
            logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
            assert_close(logits, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_without_a_padding_token_the_mask_tells_and_else_it_is_an_error():
    model = build(frozen=True, pad_token_id=None).eval()
    with torch.no_grad():
        alone = torch.cat([model(row[None]).logits for row in ROWS])
        assert_close(model(**pad(ROWS)).logits, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"3 sequences, and neither `pad_token_id` nor `attention_mask`"):
        model(pad(ROWS)["input_ids"])


@pytest.mark.parametrize("problem", LABELS)
def test_the_problem_is_told_by_the_labels(problem):
    model = build(problem, frozen=True)
    model.config.problem_type = None
    labels = torch.tensor([LABELS[problem](index) for index in range(3)])
    outputs = model.eval()(**pad(ROWS), labels=labels)
    assert model.config.problem_type == problem
    assert outputs.logits.shape == (3, 1 if problem == "regression" else 3)
    logits = outputs.logits.double()
    expected = {
        "single_label_classification": lambda: -logits.log_softmax(-1)[torch.arange(3), labels].mean(),
        "multi_label_classification": lambda: (logits.exp().add(1).log() - labels * logits).mean(),
        "regression": lambda: (logits[:, 0] - labels).square().mean(),
    }[problem]()
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert outputs.loss is outputs.task_loss


def test_only_unlabelled_sequences_have_a_loss_of_zero():
    model = build(frozen=True).train()
    outputs = model(**pad(ROWS), labels=torch.full((3,), -100))
    assert outputs.loss.item() == 0.0
    outputs.loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is not None and p.grad.isnan().any()]


def examples(problem, count=24, length=6):
    rows = random_ids(count, length, seed=3).tolist()
    return [{"input_ids": row, "labels": LABELS[problem](index)} for index, row in enumerate(rows)]


def trainer_of(folder, model, *callbacks, data=None, **arguments):
    data = examples(model.config.problem_type) if data is None else data
    collator = DataCollatorWithPadding(tiny_tokenizer(), return_tensors="pt")
    return make_trainer(folder, *callbacks, model=model, train_dataset=data, collator=collator, **arguments)


@pytest.mark.parametrize("frozen", [False, True], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("problem", one_fast(*LABELS))
def test_one_batch_has_the_gradients_of_the_same_sequences_by_accumulation(tmp_path, problem, frozen):
    steps = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = build(problem, frozen=frozen, balance_loss_coef=0.0)
        gradients = Gradients()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        options |= {"optim": "sgd", "max_grad_norm": 0.0}
        trainer_of(tmp_path, model, gradients, **options).train()
        steps.append(gradients.steps)
    for whole, cut in zip(*steps, strict=True):
        assert any("distilled_router" in name for name in cut) == (not frozen)
        assert_close(cut, whole, rtol=1e-4, atol=1e-6)


def test_a_classifier_passes_the_transition_and_is_logged(tmp_path):
    model = build()
    options = {"max_steps": 6, "max_grad_norm": 0.0, "gradient_checkpointing": True}
    trainer = trainer_of(tmp_path, model, StageTransitionCallback(3), **options)
    trainer.train()
    first, second = training_logs(trainer.state.log_history)
    assert first.keys() >= STATISTICS
    # What is trained is the task's loss and the routing losses, as the log tells them.
    parts = first["task_loss"] + 0.3 * first["balance_loss"] + first["distillation_loss"]
    assert first["loss"] == pytest.approx(parts, rel=1e-4)
    assert second["loss"] == pytest.approx(second["task_loss"], rel=1e-4)
    assert model.routing_stage == 2
    assert model.router_fingerprint() == model.config.router_fingerprint


def test_metrics_see_the_logits_alone(tmp_path):
    trainer = trainer_of(tmp_path, build(frozen=True))
    prediction = trainer.predict(examples("single_label_classification", 5))
    assert prediction.predictions.shape == (5, 3)
    assert prediction.metrics["test_loss"] > 0


def test_a_language_model_becomes_a_classifier_with_its_frozen_routing(tmp_path):
    source = tiny_model(moe_layer_positions=[0, 2])
    source.freeze_router()
    source.save_pretrained(tmp_path / "lm")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "lm", num_labels=4, output_loading_info=True
    )
    assert type(model) is StableMoEForSequenceClassification
    assert info["missing_keys"] == {"score.weight"}
    assert not info["unexpected_keys"]
    data = examples("single_label_classification")
    trainer = trainer_of(tmp_path / "run", model, data=data, max_steps=4, weight_decay=0.5)
    before = model.score.weight.clone()
    trainer.train()
    trainer.save_model(tmp_path / "classifier")
    assert not torch.equal(model.score.weight, before)
    for loaded in (model, AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")):
        assert loaded.router_fingerprint() == loaded.config.router_fingerprint == source.router_fingerprint()
        assert torch.equal(loaded.route(EVERY_ID), source.route(EVERY_ID))
    config = json.loads((tmp_path / "classifier" / "config.json").read_text())
    assert config["architectures"] == ["StableMoEForSequenceClassification"]
    # And back: the head is left out, the language model's is its embedding.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "classifier")
    assert type(again) is StableMoEForCausalLM
    assert again.router_fingerprint() == source.router_fingerprint()


@pytest.mark.parametrize("frozen", [False, True], ids=["stage 1", "stage 2"])
def test_a_classifier_takes_other_labels_with_a_new_head(tmp_path, frozen):
    source = build(frozen=frozen)
    source.save_pretrained(tmp_path)
    misfit = r"score\.weight is \[3, 32\] in the weights, \[5, 32\] by the config.*pass `ignore_mismatched_sizes=True`"
    for kind in (ValueError, RuntimeError):  # as transformers' own models raise
        with pytest.raises(kind, match=misfit):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(**pad(ROWS)).logits.shape == (3, 5)
    assert_close(model.model.state_dict(), source.model.state_dict(), rtol=0, atol=0)
    assert model.router_fingerprint() == source.router_fingerprint()
