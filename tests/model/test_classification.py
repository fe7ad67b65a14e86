"""Tests of the sequence classifier."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from helpers.checkpoints import EVERY_ID, run_without_package
from helpers.models import padded, random_ids, shaken, tiny_config, tiny_model
from helpers.trainers import STATISTICS, tiny_tokenizer, training_logs
from modeling_stablemoe import StableMoEForCausalLM, StableMoEForSequenceClassification, StageTransitionCallback


pytestmark = pytest.mark.pairs


ROWS = [random_ids(1, length, seed=length)[0] for length in (3, 7, 5)]
LABELS = {
    "single_label_classification": lambda index: index % 3,
    "multi_label_classification": lambda index: [float(index % 2), float(index % 3 == 0), 1.0],
    "regression": lambda index: index / 8 - 1.0,
}


def tiny_classifier(problem="single_label_classification", seed=0, frozen=False, **overrides):
    torch.manual_seed(seed)
    labels = 1 if problem == "regression" else 3
    config = tiny_config(num_labels=labels, problem_type=problem, moe_layer_positions=[0, 2], **overrides)
    model = shaken(StableMoEForSequenceClassification(config))
    if frozen:
        model.freeze_router()
    return model


def pad(rows, side="right"):
    mask = [torch.ones_like(row) for row in rows]
    return {"input_ids": padded(rows, 1, side), "attention_mask": padded(mask, 0, side)}


def test_logits_are_those_of_the_last_token_whatever_the_padding():
    model = tiny_classifier(frozen=True).eval()
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
    model = tiny_classifier(frozen=True, pad_token_id=None).eval()
    with torch.no_grad():
        alone = torch.cat([model(row[None]).logits for row in ROWS])
        assert_close(model(**pad(ROWS)).logits, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"3 sequences, and neither `pad_token_id` nor `attention_mask`"):
        model(pad(ROWS)["input_ids"])


@pytest.mark.parametrize("problem", LABELS)
def test_the_problem_is_told_by_the_labels(problem):
    model = tiny_classifier(problem, frozen=True)
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
    model = tiny_classifier(frozen=True).train()
    outputs = model(**pad(ROWS), labels=torch.full((3,), -100))
    assert outputs.loss.item() == 0.0
    outputs.loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is not None and p.grad.isnan().any()]


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def examples(problem, count=24, length=6):
    rows = random_ids(count, length, seed=3).tolist()
    return [{"input_ids": row, "labels": LABELS[problem](index)} for index, row in enumerate(rows)]


def make_trainer(folder, model, *callbacks, data=None, **arguments):
    options = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0.0,
        **arguments,
    }
    data = examples(model.config.problem_type) if data is None else data
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **options),
        train_dataset=data,
        eval_dataset=data[:5],
        data_collator=DataCollatorWithPadding(tiny_tokenizer(), return_tensors="pt"),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("problem", LABELS)
def test_one_batch_has_the_gradients_of_the_same_sequences_by_accumulation(tmp_path, problem, frozen):
    steps = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = tiny_classifier(problem, frozen=frozen, balance_loss_coef=0.0)
        gradients = Gradients()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        make_trainer(tmp_path, model, gradients, **options).train()
        steps.append(gradients.steps)
    for whole, cut in zip(*steps, strict=True):
        assert any("distilled_router" in name for name in cut) == (not frozen)
        assert_close(cut, whole, rtol=1e-4, atol=1e-6)


def test_balance_loss_does_not_grow_with_the_number_of_micro_batches(tmp_path):
    same = [examples("single_label_classification")[0]] * 16
    steps = []
    for accumulation in (1, 4):
        gradients = Gradients()
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        make_trainer(tmp_path, tiny_classifier(), gradients, data=same, **options).train()
        steps.append(gradients.steps[0])
    assert_close(steps[1], steps[0], rtol=1e-5, atol=1e-7)


def test_a_classifier_passes_the_transition_and_is_logged(tmp_path):
    model = tiny_classifier()
    trainer = make_trainer(
        tmp_path, model, StageTransitionCallback(3), max_steps=6, logging_steps=3, gradient_checkpointing=True
    )
    trainer.train()
    first, second = training_logs(trainer.state.log_history)
    assert first.keys() >= STATISTICS
    # What is trained is the task's loss and the routing losses, as the log tells them.
    parts = first["task_loss"] + 0.3 * first["balance_loss"] + first["distillation_loss"]
    assert first["loss"] == pytest.approx(parts, rel=1e-4)
    assert second["loss"] == pytest.approx(second["task_loss"], rel=1e-4)
    assert model.routing_stage == 2
    assert model.router_fingerprint() == model.config.router_fingerprint


def test_checkpointed_activations_have_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = tiny_classifier().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(**pad(ROWS), labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_close(*gradients)


def test_metrics_see_the_logits_alone(tmp_path):
    trainer = make_trainer(tmp_path, tiny_classifier(frozen=True))
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
    trainer = make_trainer(
        tmp_path / "run", model, data=examples("single_label_classification"), max_steps=4, weight_decay=0.5
    )
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
    source = tiny_classifier(frozen=frozen)
    source.save_pretrained(tmp_path)
    misfit = r"score\.weight is \[3, 32\] in the weights, \[5, 32\] by the config.*pass `ignore_mismatched_sizes=True`"
    for kind in (ValueError, RuntimeError):  # as transformers' own models raise
        with pytest.raises(kind, match=misfit):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(**pad(ROWS)).logits.shape == (3, 5)
    assert_close(model.model.state_dict(), source.model.state_dict(), rtol=0, atol=0)
    assert model.router_fingerprint() == source.router_fingerprint()


def test_remote_code_classifies_where_the_package_is_not_installed(tmp_path):
    # Of a language model's checkpoint, and of a classifier's.
    source = tiny_model(moe_layer_positions=[0, 2])
    source.freeze_router()
    source.save_pretrained(tmp_path / "lm")
    model = tiny_classifier(frozen=True).eval()
    model.save_pretrained(tmp_path / "classifier")
    torch.save(pad(ROWS), tmp_path / "batch.pt")
    code = """
        import sys, torch
        from transformers import AutoModelForSequenceClassification
        folder = sys.argv[1]
        batch, facts = torch.load(folder + "/batch.pt"), []
        for path in (folder + "/lm", folder + "/classifier", folder + "/resaved"):
            model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            facts.append((model.router_fingerprint(), model(**batch).logits.detach()))
            if path.endswith("classifier"):
                model.save_pretrained(folder + "/resaved")
        torch.save(facts, folder + "/facts.pt")
    """
    run_without_package(code, tmp_path / "elsewhere", tmp_path)
    of_lm, *of_classifier = torch.load(tmp_path / "facts.pt")
    assert of_lm[0] == source.router_fingerprint()
    for fingerprint, logits in of_classifier:
        assert fingerprint == model.router_fingerprint()
        assert_close(logits, model(**pad(ROWS)).logits, rtol=1e-5, atol=1e-5)


def test_the_pipeline_classifies_texts(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_classifier(frozen=True, pad_token_id=2, id2label={0: "dull", 1: "fair", 2: "fine"}).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["w5 w6 w7 w8", "w9", "w11 w12"]
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    for text, result in zip(texts, classify(texts, batch_size=3), strict=True):
        scores = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert result["label"] == ["dull", "fair", "fine"][scores.argmax()]
        assert result["score"] == pytest.approx(scores.max().item(), rel=1e-4)
