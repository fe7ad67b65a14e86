"""Model cards: what they say, and that everything a Trainer saves has one."""

import logging
import math
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, metadata_eval_result
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from helpers import ROOT
from helpers.models import random_ids, tiny_config, tiny_model, tiny_seq2seq_config, tiny_seq2seq_model
from helpers.trainers import BLOCKS, make_seq2seq_trainer, make_trainer, tiny_tokenizer
from helpers.workplaces import load_script
from modeling_stablemoe import (
    CardFacts,
    ModelCardCallback,
    RoutingFluctuationCallback,
    RoutingStatisticsCallback,
    StableMoEForSequenceClassification,
    StableMoESeq2SeqConfig,
    StageTransitionCallback,
)
from modeling_stablemoe.checkpoints.architectures import MODELS
from modeling_stablemoe.hub.cards import OLDEST_TRANSFORMERS, build_model_card, languages_of_pairs
from modeling_stablemoe.runs.card_arguments import CardArguments
from modeling_stablemoe.training import RoutingTrainer


RESULTS = {
    "perplexity": 12.3456,
    "parameters": 1234567,
    "step": 10,
    "routing_stage": 1,
    "stages": [{"stage": 1, "steps": 10, "perplexity": 20.0, "load_max_over_mean": 1.5, "fluctuation": 0.25}],
    "distillation_agreement_at_transition": None,
}
LLAMA = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 1,
}
EVERY_OTHER_STEP = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def card_of(facts=None, results=RESULTS, config=None, **options) -> ModelCard:
    """The card as the Hub reads it."""
    card = build_model_card(
        model_name="me/model", config=config or tiny_config(), results=results, facts=facts, **options
    )
    return ModelCard(str(card))


def read(folder) -> ModelCard:
    return ModelCard.load(Path(folder) / "README.md")


def perplexity_of(card) -> float:
    [result] = card.data.eval_results
    return result.metric_value


# What a card says


def test_what_is_not_known_is_left_out():
    card = card_of()
    for key in ("license", "language", "datasets", "base_model"):
        assert card.data.get(key) is None
    assert card.data.eval_results[0].dataset_type == "unknown"


def test_experts_are_described_with_their_number_per_token():
    assert "5 of 2 sublayers in 1 MoE layer |" in card_of().content
    assert (
        "5 of 2 sublayers in 1 MoE layer, 2 per token |" in card_of(config=tiny_config(num_experts_per_tok=2)).content
    )


def test_metadata_hold_what_is_known():
    facts = CardFacts(
        "apache-2.0", ["de", "en"], ["wmt/wmt16"], "me/base", "wmt/wmt16", "de-en", "test", tags=["tiny"]
    )
    data = card_of(facts).data
    assert (data.license, data.language, data.datasets, data.base_model) == (
        "apache-2.0",
        ["de", "en"],
        ["wmt/wmt16"],
        "me/base",
    )
    assert data.tags == ["stablemoe", "mixture-of-experts", "custom_code", "tiny"]
    # What `huggingface_hub` makes of the same numbers, but for what only the Hub may verify.
    expected = metadata_eval_result(
        model_pretty_name="me/model",
        task_pretty_name=None,
        task_id="text-generation",
        metrics_pretty_name="Perplexity",
        metrics_id="perplexity",
        metrics_value=12.346,
        metrics_verified=None,
        dataset_pretty_name="wmt/wmt16",
        dataset_id="wmt/wmt16",
        dataset_config="de-en",
        dataset_split="test",
    )
    assert data.to_dict()["model-index"] == expected["model-index"]


def test_a_local_base_model_is_named_in_the_text_alone(tmp_path):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    card = card_of(CardFacts(base_model=str(tmp_path / "runs" / "first")))
    assert card.data.base_model is None
    assert "Trained further from `first`, a local checkpoint." in card.text
    assert str(tmp_path) not in str(card)


@pytest.mark.parametrize("perplexity", [math.nan, math.inf, None])
def test_a_perplexity_that_is_no_number_is_not_in_the_metadata(perplexity):
    card = card_of(results={**RESULTS, "perplexity": perplexity})
    assert not card.data.eval_results
    assert "model-index" not in str(card)
    assert "| validation perplexity | not measured |" in card.text


def test_a_translation_card_holds_bleu():
    config = StableMoESeq2SeqConfig(**tiny_seq2seq_model().config.to_diff_dict())
    scores = {
        "pairs": {"de-en": {"bleu": 30.0, "chrf": 50.0, "num_sentences": 4}},
        "mean_bleu": 30.004,
        "mean_chrf": 50.0,
        "bleu_signature": "case:mixed",
        "chrf_signature": "nc:6",
    }
    card = card_of(results={**RESULTS, "scores": scores, "split": "test"}, config=config)
    assert card.data.pipeline_tag == "translation"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        "perplexity": 12.346,
        "bleu": 30.0,
        "chrf": 50.0,
    }
    assert "| test BLEU | 30.00 |" in card.text
    assert "| de-en | 4" in card.text
    assert "AutoModelForSeq2SeqLM" in card.text
    assert "text2text-generation" in card.text


def test_the_card_of_a_frozen_model_names_its_fingerprint_and_leaves_no_blank():
    results = {**RESULTS, "distillation_agreement_at_transition": 0.5}
    card = card_of(results=results, config=tiny_config(router_fingerprint="ab" * 32), dataset_name="books")
    for text in ("frozen (stage 2)", "ab" * 32, "1,234,567", "| 1     | 10    | 20", "50.0%"):
        assert text in card.text
    assert "{{" not in card.text
    assert card.data.library_name == "transformers"
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("perplexity", 12.346, "books")
    assert "still learned (stage 1)" in card_of().text
    assert "not measured" in card_of().text


def test_a_card_tells_versions_limits_and_load():
    text = card_of(versions={"transformers": "5.17.0"}).text
    assert f"Needs transformers {OLDEST_TRANSFORMERS} or newer. Trained with transformers 5.17.0." in text
    for limit in ("GGUF", "bitsandbytes", "vLLM", "trust_remote_code"):
        assert limit in text
    assert "| load of the experts, busiest over mean | 1.50 |" in text
    assert f'"transformers>={OLDEST_TRANSFORMERS}"' in (ROOT / "pyproject.toml").read_text()


def test_a_card_says_what_the_model_is_not_for():
    facts = CardFacts(language=["de", "en"])
    text = card_of(facts, {**RESULTS, "tokens": 614400}, tiny_config(max_position_embeddings=2048)).text
    assert "| tokens read in this training | about 614,400 |" in text
    for claim in (
        "With 1,234,567\n  parameters and about 614,400 tokens of training it knows the form of its text",
        "Text in other languages than de, en, and sequences of more than 2,048 tokens.",
        "A conversation, unless",
        "as long as it is not frozen",
    ):
        assert claim in text
    text = card_of(results={**RESULTS, "parameters": 2 * 10**9}, config=tiny_config(router_fingerprint="ab" * 32)).text
    assert "languages that its training text does not have" in text
    for word in ("tokens read", "knows the form", "as long as it is not frozen"):
        assert word not in text


def test_a_dense_model_has_no_experts_to_speak_of():
    text = card_of(config=tiny_config(moe_layer_positions=[])).text
    assert "none: a dense model" in text
    for word in ("fingerprint", "load of the experts", "GGUF"):
        assert word not in text


@pytest.mark.parametrize(
    ("name", "task", "kind", "config"),
    [
        ("StableMoEForCausalLM", "text-generation", "language model", {}),
        ("StableMoEForConditionalGeneration", "translation", "translation model", {}),
        ("StableMoEForSequenceClassification", "text-classification", "text classifier", {"num_labels": 3}),
        (
            "StableMoEForSequenceClassification",
            "text-classification",
            "text classifier",
            {"num_labels": 3, "problem_type": "multi_label_classification"},
        ),
        ("StableMoEForSequenceClassification", "text-classification", "model that scores texts", {"num_labels": 1}),
        (
            "StableMoEForSequenceClassification",
            "text-classification",
            "model that scores texts",
            {"num_labels": 2, "problem_type": "regression"},
        ),
        ("StableMoEModel", "feature-extraction", "language model without a head", {}),
        ("StableMoESeq2SeqModel", "feature-extraction", "translation model without a head", {}),
    ],
)
def test_a_card_says_what_the_model_is_and_its_code_runs(name, task, kind, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = tiny_seq2seq_config if "Seq2Seq" in name or "Conditional" in name else tiny_config
    model = MODELS[name](base(**config)).eval()
    model.save_pretrained("model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained("model")
    results = {**RESULTS, "perplexity": None}
    card = build_model_card(model_name="model", config=model.config, results=results, model_class=type(model))
    assert card.data.pipeline_tag == task
    assert f"A [StableMoE](https://arxiv.org/abs/2204.08396) {kind}:" in card.text
    # The same card from what was saved alone.
    saved = type(model.config).from_pretrained("model")
    assert str(build_model_card(model_name="model", config=saved, results=results)) == str(card)
    [code] = re.findall(r"```python\n(.+?)```", card.text, re.DOTALL)
    assert code.count("trust_remote_code=True") == code.count("from_pretrained") == 2
    names = {}
    capsys.readouterr()
    exec(code, names)
    assert type(names["model"]) is type(model)
    printed = capsys.readouterr().out
    if task == "text-classification":
        logits = model(**tokenizer("A text to classify.", return_tensors="pt")).logits[0]
        expected = {
            None: f"{model.config.id2label[logits.argmax().item()]}",
            "multi_label_classification": str(
                dict(zip(model.config.label2id, logits.sigmoid().tolist(), strict=True))
            ),
            "regression": f"{logits.tolist()}",
        }
        problem = "regression" if config["num_labels"] == 1 else config.get("problem_type")
        assert printed == expected[problem] + "\n"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"datasets": ["my files"]}, r"`datasets`: 'my files' is no name"),
        ({"language": ["German"]}, r"`language`: 'German' is no ISO 639 code"),
        ({"license": "Apache License 2.0"}, r"`license`: 'Apache License 2\.0' is no identifier"),
    ],
)
def test_facts_that_the_hub_would_refuse_are_refused(facts, message):
    with pytest.raises(ValueError, match=message):
        CardFacts(**facts)


def test_languages_are_those_with_a_code():
    assert languages_of_pairs(["de-en", "zh_Hans-en"]) == ["de", "en", "zh"]
    assert languages_of_pairs(["code-summary"]) == ["code"]


def test_scripts_tell_hub_data_from_files(tmp_path):
    file = tmp_path / "corpus.txt"
    file.touch()
    facts = CardArguments(license="mit", language=["en"]).facts([str(file)], None)
    assert (facts.datasets, facts.dataset_name) == ([], "corpus.txt")
    facts = CardArguments().facts(["wmt/wmt16"], "me/base", dataset_config="de-en", languages=["de", "en"])
    assert (facts.datasets, facts.dataset_name, facts.dataset_config) == (["wmt/wmt16"], "wmt/wmt16", "de-en")
    assert (facts.license, facts.language) == (None, ["de", "en"])


def test_scripts_refuse_a_license_that_is_none(capsys, tmp_path):
    options = ["configuration/recipes/embedded-cpu.yaml", "--output_dir", str(tmp_path), "--license", "My own"]
    with pytest.raises(SystemExit):
        load_script("run_clm").main([str(ROOT / options[0]), *options[1:]])
    assert "`license`: 'My own' is no identifier of a license" in capsys.readouterr().err


# What a Trainer saves


@pytest.fixture(scope="module", params=[Trainer, RoutingTrainer], ids=["Trainer", "RoutingTrainer"])
def trained(request, tmp_path_factory):
    """A Trainer after both stages: `StageTransitionCallback` alone brings the cards."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    callbacks = (StageTransitionCallback(3), RoutingFluctuationCallback(BLOCKS[:4], 2))
    trainer = make_trainer(folder, *callbacks, trainer_class=request.param, **EVERY_OTHER_STEP)
    trainer.train()
    trainer.save_model()
    return trainer, folder


def logged_perplexity(trainer, step) -> float:
    history = trainer.state.log_history
    return round(math.exp(next(e["eval_loss"] for e in history if "eval_loss" in e and e["step"] == step)), 3)


def test_every_checkpoint_has_the_card_of_its_step(trained):
    trainer, folder = trained
    fingerprint = trainer.model.router_fingerprint()
    for step in (2, 4, 6):
        card = read(folder / f"checkpoint-{step}")
        assert f"| optimizer steps | {step} |" in card.text
        assert perplexity_of(card) == logged_perplexity(trainer, step)
        assert (fingerprint in card.text) == (step > 2)
        assert ("**not frozen yet**" in card.text) == (step == 2)
        assert "![" not in card.text  # the figure is drawn at the end


def assert_final_card(folder):
    card = read(folder)
    figure = re.search(r"!\[.+\]\((.+)\)", card.text)[1]
    assert (folder / figure).read_bytes()[1:4] == b"PNG"
    assert 'from_pretrained("first", trust_remote_code=True)' in card.text


def test_the_model_that_training_leaves_has_a_card_with_the_figure(trained, tmp_path):
    trainer, folder = trained
    assert_final_card(folder)
    trainer.save_model(str(tmp_path / "elsewhere"))
    if isinstance(trainer, RoutingTrainer):
        assert_final_card(tmp_path / "elsewhere")
    else:  # `Trainer` asks no callback when it saves elsewhere
        assert not (tmp_path / "elsewhere" / "README.md").exists()
    ModelCardCallback().write(trainer.model, tmp_path, trainer.args, trainer.state)
    assert trainer.model.router_fingerprint() in read(tmp_path).text


def test_only_the_main_process_writes_a_card(tmp_path):
    trainer = make_trainer(tmp_path, ModelCardCallback(), trainer_class=RoutingTrainer, max_steps=1)
    trainer.train()
    trainer.state.is_world_process_zero = False
    trainer.save_model(str(tmp_path / "not main"))
    assert not (tmp_path / "not main" / "README.md").exists()


def test_create_model_card_takes_the_arguments_of_trainer(tmp_path):
    trainer = make_trainer(tmp_path, RoutingStatisticsCallback(), trainer_class=RoutingTrainer, max_steps=1)
    trainer.evaluate()
    trainer.create_model_card(
        language="en",
        license="mit",
        tags="tiny",
        model_name="My model",
        finetuned_from="me/base",
        tasks="text-generation",
        dataset_tags=["me/books"],
        dataset="Books",
        dataset_args="all",
    )
    card = read(tmp_path)
    assert (card.data.language, card.data.license, card.data.base_model) == (["en"], "mit", "me/base")
    assert card.data.datasets == ["me/books"]
    assert "tiny" in card.data.tags
    [result] = card.data.eval_results
    assert (result.dataset_name, result.dataset_config) == ("Books", "all")
    assert "\n# My model\n" in card.text
    with pytest.raises(TypeError, match="no_such_argument"):
        trainer.create_model_card(no_such_argument="en")


def test_create_model_card_is_that_of_the_parent_without_a_card_of_ours(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=RoutingTrainer, max_steps=1)
    trainer.train()
    trainer.create_model_card(tags="tiny")
    assert "generated_from_trainer" in read(tmp_path).data.tags


def test_a_card_that_somebody_wrote_stays(tmp_path, caplog):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("# My project\n")
    trainer = make_trainer(folder, RoutingStatisticsCallback(), trainer_class=RoutingTrainer, max_steps=1)
    trainer.train()
    with caplog.at_level(logging.WARNING):
        trainer.save_model()
        trainer.create_model_card()
    assert (folder / "README.md").read_text() == "# My project\n"
    assert "it stays" in caplog.text


@pytest.mark.parametrize(("trainer_class", "order"), [(Trainer, 1), (RoutingTrainer, -1)])
def test_a_callback_of_ones_own_says_more_wherever_it_stands(tmp_path, order, trainer_class):
    facts = CardFacts(license="mit", dataset_name="blocks", language=["en"])
    callbacks = [StageTransitionCallback(1), ModelCardCallback(facts)][::order]
    trainer = make_trainer(
        tmp_path, *callbacks, trainer_class=trainer_class, max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        assert (read(folder).data.license, read(folder).data.language) == ("mit", ["en"])
    assert read(tmp_path).data.eval_results[0].dataset_name == "blocks"


def test_a_run_takes_up_a_card_of_its_own_when_it_is_resumed(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, RoutingStatisticsCallback(), max_steps=1, **saving).train()
    callbacks = ModelCardCallback(CardFacts(license="mit")), RoutingStatisticsCallback()
    for step in (2, 3):
        options = {"max_steps": step, "restore_callback_states_from_checkpoint": step == 3, **saving}
        resumed = make_trainer(tmp_path, *callbacks, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step - 1}"))
        assert read(tmp_path / f"checkpoint-{step}").data.license == "mit"


def test_callbacks_added_later_bring_the_card_unless_they_are_told_not_to(tmp_path):
    trainer = make_trainer(tmp_path / "later", max_steps=1)
    trainer.add_callback(RoutingStatisticsCallback())
    trainer.train()
    trainer.save_model()
    assert "still learned" in read(tmp_path / "later").text
    without = (RoutingStatisticsCallback(model_card=False), StageTransitionCallback(1, model_card=False))
    for callback in without:
        trainer = make_trainer(tmp_path / "without", callback, max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model()
    assert not list((tmp_path / "without").rglob("README.md"))


def test_a_model_that_was_trained_further_names_its_start(tmp_path):
    start = tiny_model()
    start.freeze_router()
    start.save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    trainer = make_trainer(
        tmp_path / "run", RoutingStatisticsCallback(), model=model, max_steps=1, trainer_class=RoutingTrainer
    )
    trainer.train()
    trainer.save_model()
    card = read(tmp_path / "run")
    assert card.data.base_model is None
    assert "Trained further from `start`, a local checkpoint." in card.text
    trainer.create_model_card(finetuned_from="me/start")
    assert read(tmp_path / "run").data.base_model == "me/start"


def test_the_card_of_a_best_checkpoint_is_of_that(tmp_path):
    # The largest loss counts as the best: that of the first evaluation, in stage 1.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, StageTransitionCallback(3), **EVERY_OTHER_STEP, **best)
    trainer.train()
    trainer.save_model()
    card, step = read(tmp_path), trainer.state.best_global_step
    assert step < 6
    assert f"best checkpoint, of step {step} of 6" in card.text
    assert perplexity_of(card) == logged_perplexity(trainer, step)


def test_a_translation_trainer_saves_the_scores_it_logs(tmp_path):
    trainer = make_seq2seq_trainer(tmp_path, StageTransitionCallback(1), max_steps=2)
    trainer.compute_metrics = lambda predictions: {"bleu": 31.234, "other": 1.0}
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    values = {result.metric_type: result.metric_value for result in read(tmp_path).data.eval_results}
    assert values.keys() == {"perplexity", "bleu"}
    assert values["bleu"] == 31.23


def classify(folder, *callbacks, num_labels, **arguments):
    """A Trainer on rows with a label each, which is a class or, with one label, a number."""
    torch.manual_seed(0)
    model = StableMoEForSequenceClassification(tiny_config(num_labels=num_labels))
    rows = [{"input_ids": row, "labels": index % 2} for index, row in enumerate(random_ids(16, 8))]

    def collate(rows):
        labels = torch.tensor([row["labels"] for row in rows])
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": labels if num_labels > 1 else labels.float()}

    trainer = make_trainer(
        folder,
        *callbacks,
        model=model,
        trainer_class=RoutingTrainer,
        train_dataset=rows,
        collator=collate,
        max_steps=4,
        eval_steps=2,
        **arguments,
    )
    trainer.eval_dataset = rows[:6]
    trainer.compute_metrics = lambda predictions: {
        "accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean()),
        "matthews_correlation": 0.123456,
        "confusion": [[1, 2], [3, 4]],
    }
    return trainer


@pytest.mark.parametrize(
    ("callback", "num_labels"),
    [(lambda: StageTransitionCallback(2), 1), (ModelCardCallback, 2)],
)
def test_a_classifier_has_the_metrics_that_were_logged_and_no_perplexity(callback, num_labels, tmp_path):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 2}
    trainer = classify(tmp_path, callback(), num_labels=num_labels, **options)
    trainer.train()
    trainer.save_model()
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}
    for folder, step in ((tmp_path, 4), (tmp_path / "checkpoint-2", 2)):
        card = read(folder)
        assert (card.data.pipeline_tag, "perplexity" in str(card).lower()) == ("text-classification", False)
        assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
            "loss": round(logged[step]["eval_loss"], 4),
            "accuracy": round(logged[step]["eval_accuracy"], 4),
            "matthews_correlation": 0.1235,
        }
        assert "Matthews correlation" in {result.metric_name for result in card.data.eval_results}
        assert f"| evaluation loss | {logged[step]['eval_loss']:.4f} |" in card.text
        assert f"| evaluation accuracy | {logged[step]['eval_accuracy']:.4f} |" in card.text
        assert "| validation loss |" in card.text
        assert f"| {logged[step]['eval_loss']:.4g}" in card.text.split("| validation loss |")[1]
    trainer.create_model_card(tasks="text-classification")
    assert read(tmp_path).data.pipeline_tag == "text-classification"


def test_a_classifier_that_was_not_evaluated_has_no_metric(tmp_path):
    trainer = classify(tmp_path, RoutingStatisticsCallback(), num_labels=3)
    trainer.train()
    trainer.create_model_card()  # before anything is saved, which tells the config of the class
    card = read(tmp_path)
    assert (card.data.pipeline_tag, card.data.eval_results) == ("text-classification", None)
    assert "| validation loss | not measured |" in card.text


def test_a_model_of_ones_own_is_what_it_is_made_of(tmp_path):
    class Own(StableMoEForSequenceClassification):
        pass

    model = Own(tiny_config(num_labels=3))
    assert build_model_card(
        model_name="me/own", config=model.config, results=RESULTS, model_class=Own
    ).data.pipeline_tag == ("text-classification")


def test_adapters_keep_the_card_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.freeze_router()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = make_trainer(tmp_path, RoutingStatisticsCallback(), model=adapted, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert read(tmp_path).data.library_name == "peft"


def test_a_model_that_is_evaluated_only_is_saved_with_its_card(tmp_path):
    trainer = make_trainer(tmp_path, RoutingStatisticsCallback(), trainer_class=RoutingTrainer)
    loss = trainer.evaluate()["eval_loss"]
    assert not (tmp_path / "README.md").exists()
    trainer.save_model()
    assert perplexity_of(read(tmp_path)) == round(math.exp(loss), 3)


@pytest.mark.parametrize("crashes", [False, True])
def test_another_run_without_our_callbacks_leaves_no_card_of_an_earlier_one(tmp_path, crashes):
    class Crash(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if crashes and state.global_step == 3:
                raise KeyboardInterrupt

    model = tiny_model()
    options = {"model": model, "trainer_class": RoutingTrainer}
    first = make_trainer(tmp_path / "first", StageTransitionCallback(2), Crash(), max_steps=4, **options)
    with pytest.raises(KeyboardInterrupt) if crashes else nullcontext():
        first.train()
    first.save_model()
    assert (tmp_path / "first" / "README.md").exists()
    second = make_trainer(tmp_path / "second", max_steps=2, **options)
    second.train()
    second.save_model()
    model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "second").glob("README.md")) + list((tmp_path / "saved").glob("README.md"))
    # The next run with a callback has a card again, of its own steps.
    third = make_trainer(tmp_path / "third", RoutingStatisticsCallback(), max_steps=3, **options)
    third.train()
    third.save_model()
    assert (tmp_path / "third" / "README.md").exists()


def test_another_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, ModelCardCallback(), model=LlamaForCausalLM(LlamaConfig(**LLAMA)), max_steps=1)
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM is not a StableMoE model: ModelCardCallback needs"):
        trainer.train()


# The template


@pytest.mark.parametrize(
    "page", ["hub_card.md", "README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_code_without_the_package_trusts_what_it_loads_or_a_terminal_is_asked(page):
    for code in re.findall(r"^```\w*\n(.+?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        if "trust_remote_code=True" in code and "import modeling_stablemoe" not in code:
            calls = [line for line in code.splitlines() if "from_pretrained(" in line]
            assert not [line for line in calls if "trust_remote_code=True" not in line]


@pytest.mark.slow
def test_an_installed_package_has_the_template_the_scripts_and_what_they_read(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "hub_card.md"):
        shutil.copy(ROOT / name, source)
    for name in ("modeling_stablemoe", "configuration", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=300)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "from modeling_stablemoe.hub.cards import card_template; print(card_template())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout.splitlines()[-1]
    assert Path(found) == tmp_path / "installed" / "modeling_stablemoe" / "card" / "hub_card.md"
    assert Path(found).read_text() == (ROOT / "hub_card.md").read_text()
    for name in ("configuration", "scripts"):
        installed = tmp_path / "installed" / "modeling_stablemoe" / name
        files = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
        assert {path.relative_to(source / name) for path in (source / name).rglob("*") if path.is_file()} == files
