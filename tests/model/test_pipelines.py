"""transformers' pipelines on saved checkpoints: by folder, and by the code in the folder where the package is missing."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, pipeline

import modeling_stablemoe
from helpers.checkpoints import run_without_package
from helpers.models import shaken, tiny_config, tiny_model


TEXTS = ["w3 w50 w7", "w9 w10 w11 w12 w13", "w98"]
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "return_full_text": False}
CLASSIFIER = "StableMoEForSequenceClassification"


def save(model, folder):
    """Save a model with a tokenizer that knows words w3 to w98."""
    vocabulary = {"<eos>": 0, "<pad>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 99)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(params=[1, 2], ids=["stage 1", "stage 2"])
def model(request):
    model = tiny_model().eval()
    if request.param == 2:
        model.freeze_router()
    return model


def test_text_generation_continues_a_text_as_the_model_does(model, tmp_path):
    tokenizer = save(model, tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    assert type(generate.model) is type(model)
    continued = [answer[0]["generated_text"] for answer in generate(TEXTS, batch_size=3, **GREEDY)]
    for text, continuation in zip(TEXTS, continued, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = model.generate(ids, do_sample=False, max_new_tokens=5, min_new_tokens=5)[0, ids.shape[1] :]
        assert continuation == tokenizer.decode(expected, skip_special_tokens=True)


def test_feature_extraction_gives_the_last_hidden_state(model, tmp_path):
    tokenizer = save(model, tmp_path)
    features = pipeline("feature-extraction", model=str(tmp_path))(TEXTS, return_tensors=True)
    for text, feature in zip(TEXTS, features, strict=True):
        with torch.no_grad():
            expected = model.model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state
        assert_close(feature, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(modeling_stablemoe, CLASSIFIER), reason="there is no classifier in this version")
@pytest.mark.parametrize("stage", [1, 2])
def test_text_classification_names_the_likeliest_label(stage, tmp_path):
    labels = {"id2label": {0: "dull", 1: "fair", 2: "fine"}, "label2id": {"dull": 0, "fair": 1, "fine": 2}}
    model = shaken(getattr(modeling_stablemoe, CLASSIFIER)(tiny_config(**labels))).eval()
    if stage == 2:
        model.freeze_router()
    tokenizer = save(model, tmp_path)
    answers = pipeline("text-classification", model=str(tmp_path))(TEXTS, batch_size=3)
    for text, answer in zip(TEXTS, answers, strict=True):
        with torch.no_grad():
            scores = model(tokenizer(text, return_tensors="pt").input_ids).logits[0].softmax(-1)
        assert answer["label"] == labels["id2label"][int(scores.argmax())]
        assert answer["score"] == pytest.approx(float(scores.max()), abs=1e-5)


def test_pipelines_run_by_the_code_of_the_checkpoint_where_the_package_is_not_installed(tmp_path):
    model = tiny_model().eval()
    model.freeze_router()
    save(model, tmp_path / "checkpoint")
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
