"""transformers' pipelines on saved checkpoints: by folder, and by the code in the folder where the package is missing."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import pipeline

from helpers.checkpoints import run_without_package
from helpers.models import tiny_classifier
from helpers.trainers import tiny_tokenizer


TEXTS = ["w3 w50 w7", "w9 w10 w11 w12 w13", "w90"]
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "return_full_text": False}


def save(model, folder):
    """Save a model with a tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_text_generation_continues_a_text_as_the_model_does(frozen_model, tmp_path):
    tokenizer = save(frozen_model, tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    assert type(generate.model) is type(frozen_model)
    continued = [answer[0]["generated_text"] for answer in generate(TEXTS, batch_size=3, **GREEDY)]
    for text, continuation in zip(TEXTS, continued, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = frozen_model.generate(ids, do_sample=False, max_new_tokens=5, min_new_tokens=5)
        assert continuation == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def test_feature_extraction_gives_the_last_hidden_state(frozen_model, tmp_path):
    tokenizer = save(frozen_model, tmp_path)
    features = pipeline("feature-extraction", model=str(tmp_path))(TEXTS, return_tensors=True)
    for text, feature in zip(TEXTS, features, strict=True):
        expected = frozen_model.model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state
        assert_close(feature, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_text_classification_names_the_likeliest_label(tmp_path):
    names = ["dull", "fair", "fine"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = tiny_classifier(**labels).eval()
    model.freeze_router()
    tokenizer = save(model, tmp_path)
    answers = pipeline("text-classification", model=str(tmp_path))(TEXTS, batch_size=3)
    for text, answer in zip(TEXTS, answers, strict=True):
        scores = model(tokenizer(text, return_tensors="pt").input_ids).logits[0].softmax(-1)
        assert answer["label"] == names[scores.argmax()]
        assert answer["score"] == pytest.approx(float(scores.max()), abs=1e-5)


def test_pipelines_run_by_the_code_of_the_checkpoint_where_the_package_is_not_installed(frozen_model, tmp_path):
    save(frozen_model, tmp_path / "checkpoint")
    code = """
        import json, sys
        from transformers import pipeline
        checkpoint, results, *texts = sys.argv[1:]
        generate = pipeline("text-generation", model=checkpoint, trust_remote_code=True)
        assert type(generate.model).__module__.startswith("transformers_modules.")
        extract = pipeline("feature-extraction", model=checkpoint, trust_remote_code=True)
        options = json.loads(texts.pop())
        answers = [generate(text, **options)[0]["generated_text"] for text in texts], [extract(text) for text in texts]
        open(results, "w").write(json.dumps(answers))
    """
    results = tmp_path / "results.json"
    run_without_package(code, tmp_path / "elsewhere", tmp_path / "checkpoint", results, *TEXTS, json.dumps(GREEDY))
    continued, features = json.loads(results.read_text())
    generate = pipeline("text-generation", model=str(tmp_path / "checkpoint"))
    extract = pipeline("feature-extraction", model=str(tmp_path / "checkpoint"))
    assert continued == [generate(text, **GREEDY)[0]["generated_text"] for text in TEXTS]
    for text, feature in zip(TEXTS, features, strict=True):
        assert_close(torch.tensor(feature), torch.tensor(extract(text)), rtol=1e-5, atol=1e-6)
