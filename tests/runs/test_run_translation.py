"""Tests of the translation scripts, run as users run them."""

import json
import math
import re
import signal
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import modeling_stablemoe  # noqa: F401 - registers the models
from helpers import ROOT
from helpers.forks import LATEST, die, fault, finish, fork_script
from helpers.workplaces import TranslationWorkplace, assert_same_saved_weights, load_script, refuse, run_here


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return TranslationWorkplace(tmp_path_factory.mktemp("work"))


@pytest.fixture
def script(workplace, monkeypatch):
    """The script's `main`, in this process: for command lines that go no further than the start."""
    module = load_script("run_translation")
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace.folder / "cache")
    return module.main


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_script_trains_through_both_stages_and_scores_every_pair(trained_translation):
    folder, printed = trained_translation.folder, trained_translation.output
    results = results_of(folder)
    assert [(row["stage"], row["steps"]) for row in results["stages"]] == [(1, 6), (2, 16)]
    assert results["stages"][0]["fluctuation"] > 0
    assert results["stages"][1]["fluctuation"] == 0
    scores = results["scores"]
    assert {pair: score["num_sentences"] for pair, score in scores["pairs"].items()} == {"back-en": 13, "twice-en": 13}
    assert scores["mean_bleu"] == pytest.approx(sum(score["bleu"] for score in scores["pairs"].values()) / 2)
    assert scores["bleu_signature"] in printed
    assert scores["chrf_signature"] in printed
    assert "routing frozen after step 6 of 16" in printed
    config = json.loads((folder / "config.json").read_text())
    assert results["router_fingerprint"] == config["router_fingerprint"]
    assert len(config["router_fingerprint"]) == 64
    assert {path.suffix for path in folder.iterdir() if path.is_file()} <= {
        ".json",
        ".jsonl",
        ".md",
        ".png",
        ".py",
        ".safetensors",
    }


def test_every_translation_of_the_test_split_is_kept_beside_its_reference(trained_translation):
    folder, workplace = trained_translation.folder, trained_translation.workplace
    rows = [json.loads(line) for line in (folder / "translations.jsonl").read_text().splitlines()]
    written = {(row["pair"], row["source"], row["reference"]) for row in rows}
    test = [json.loads(line) for line in (workplace.folder / "test.jsonl").read_text().splitlines()]
    assert written == {(f"{language}-en", row[language], row["en"]) for row in test for language in ("back", "twice")}
    assert len(rows) == 26


def test_card_says_what_the_model_translates_like(trained_translation):
    card = ModelCard.load(trained_translation.folder / "README.md")
    results = results_of(trained_translation.folder)
    assert card.data.pipeline_tag == "translation"
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["bleu"] == round(results["scores"]["mean_bleu"], 2)
    assert measured["perplexity"] == round(results["perplexity"], 3)
    assert f"| test perplexity | {results['perplexity']:.2f} |" in card.text
    assert "AutoModelForSeq2SeqLM" in card.text
    assert "AutoModelForCausalLM" not in card.text
    assert results["scores"]["bleu_signature"] in card.text


def test_perplexity_is_that_of_all_target_tokens(trained_translation):
    folder, workplace = trained_translation.folder, trained_translation.workplace
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total = tokens = 0
    for line in (workplace.folder / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        for language in ("back", "twice"):
            labels = tokenizer(row["en"], return_tensors="pt").input_ids
            with torch.no_grad():
                loss = model(**tokenizer(row[language], return_tensors="pt"), labels=labels).loss
            total, tokens = total + loss.item() * labels.numel(), tokens + labels.numel()
    assert results_of(folder)["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_two_processes_train_through_both_stages(workplace):
    options = "--eval_strategy no --gradient_accumulation_steps 2 --max_steps 6 --logging_steps 1"
    finish(workplace, "pair", *options.split(), engine="ddp")
    results = results_of(workplace.folder / "pair")
    assert [(row["stage"], row["steps"]) for row in results["stages"]] == [(1, 2), (2, 6)]
    assert results["stages"][1]["fluctuation"] == 0
    history = json.loads((workplace.folder / "pair/trainer_state.json").read_text())["log_history"]
    losses = [entry["task_loss"] for entry in history if "task_loss" in entry]
    assert losses[-1] < losses[0]


def test_two_processes_score_every_sentence_once(workplace, trained_translation):
    # 26 sentences in batches of 4 on two processes: the last batches are filled up with sentences that are there already.
    trained = str(trained_translation.folder)
    start = ["--model_name_or_path", trained, "--tokenizer_name", trained, "--model_preset", "", "--stage1_steps", ""]
    finish(workplace, "two", *start, "--do_train", "False", "--fluctuation_check_steps", "0", engine="ddp")
    actual, expected = results_of(workplace.folder / "two"), results_of(trained_translation.folder)
    assert actual["scores"] == expected["scores"]
    assert actual["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)


def test_test_files_alone_are_scored_by_a_trained_model(workplace, trained_translation, script):
    model, test = str(trained_translation.folder), str(trained_translation.workplace.folder / "test.jsonl")
    options = ["--use_cpu", "True", "--report_to", "none"]
    evaluate = ["--do_train", "false", "--model_name_or_path", model, "--test_files", test, *options]
    script([*evaluate, "--per_device_eval_batch_size", "4", "--output_dir", "tested"])
    actual, expected = results_of(workplace.folder / "tested"), results_of(trained_translation.folder)
    assert actual["scores"] == expected["scores"]
    assert "Evaluated here, not trained further: it is" in (workplace.folder / "tested/README.md").read_text()


def test_translate_gives_a_line_for_a_line(workplace, trained_translation):
    lines = ["eht xof spmuj", "", "a yzal god", "eht eht"]
    (workplace.folder / "source.txt").write_text("\n".join(lines) + "\n")
    folder, options = trained_translation.folder, ["--batch_size", "2", "--input", "source.txt"]
    workplace.run(ROOT / "scripts/translate.py", folder, *options, "--output", "target.txt")
    translated = (workplace.folder / "target.txt").read_text().split("\n")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (model.generation_config.num_beams, model.generation_config.max_length) == (2, 20)
    for line, translation in zip(lines, translated, strict=False):
        if line:
            [ids] = model.generate(**tokenizer(line, return_tensors="pt"))
            assert translation == " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
    assert len(translated) == len(lines) + 1
    assert translated[1] == ""


def test_translate_cuts_off_a_line_that_is_too_long_and_says_which(workplace, trained_translation):
    (workplace.folder / "long.txt").write_text("xof\n" + "eht " * 60 + "\n")
    options = ["--input", "long.txt", "--output", "cut.txt"]
    output = run_here("translate", trained_translation.folder, *options, folder=workplace.folder)
    assert re.search(r"line 2 has \d+ tokens; only the first 64 are translated", output)
    assert len((workplace.folder / "cut.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["trained", "--target_language", "de"], "has no target-language tokens"),
        (["trained", "--input", "nothing.txt"], "nothing.txt"),
        (["trained", "--max_length", "65"], "--max_length exceeds the model's 64 positions"),
        (["nowhere/at-all"], "cannot load 'nowhere/at-all'"),
    ],
)
def test_translate_refuses_bad_input_with_one_line_and_keeps_the_old_file(
    workplace, trained_translation, monkeypatch, options, message
):
    monkeypatch.chdir(workplace.folder)
    (workplace.folder / "xof.txt").write_text("xof\n")
    (workplace.folder / "kept.txt").write_text("old\n")
    arguments = [option.replace("trained", str(trained_translation.folder)) for option in options]
    arguments += ["--output", "kept.txt"]
    if "--input" not in options:
        arguments += ["--input", "xof.txt"]
    assert message in refuse(load_script("translate").main, arguments)
    assert (workplace.folder / "kept.txt").read_text() == "old\n"


def test_several_target_languages_are_told_by_a_token(workplace):
    workplace.train_here("many", "--language_pairs", "en-back", "en-twice", "--eval_strategy", "no", max_steps=4)
    tokenizer = AutoTokenizer.from_pretrained(workplace.folder / "many")
    assert {">>back<<", ">>twice<<"} <= set(tokenizer.get_vocab())
    (workplace.folder / "fox.txt").write_text("fox\n")
    translate = load_script("translate").main
    arguments = [str(workplace.folder / "many"), "--input", str(workplace.folder / "fox.txt")]
    message = refuse(translate, [*arguments, "--target_language", "de"])
    assert "de" in message
    assert "back" in message
    translate([*arguments, "--target_language", "back", "--output", str(workplace.folder / "xof.out")])
    assert (workplace.folder / "xof.out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--language_pairs", "back-en", "de-en"], "de"),
        (["--train_files", "nothing.jsonl"], "nothing.jsonl"),
        (["--max_source_length", "65"], "Sequences of 65 tokens do not fit the model's 64 positions"),
        (["--generation_max_length", "65"], "--generation_max_length 65"),
        (["--per_device_train_batch_size", "8"], "--batch_tokens"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing"),
        (["--predict_with_generate", "False"], "--predict_with_generate true"),
        (["--batch_tokens", "3"], "max_tokens"),
        (["--config_overrides", '{"label_smoothing": 1.5}'], "label_smoothing"),
        (["--config_overrides", '{"num_hidden_layers": 3}'], "unknown fields"),
        (["--config_overrides", '{"vocab_size": 20}'], "the model's vocabulary 20"),
        (["--model_preset", "causal.json"], "'stablemoe' model"),
        (["--stage1_steps", "100"], "longer than training"),
    ],
)
def test_bad_input_is_one_line_and_claims_no_folder(workplace, script, options, message):
    causal = {"source": "made up", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (workplace.folder / "causal.json").write_text(json.dumps(causal))
    assert message in refuse(script, workplace.arguments("new", *options))
    assert not (workplace.folder / "new").exists()


def test_a_pair_that_is_none_ends_with_status_2(workplace, script, capsys):
    with pytest.raises(SystemExit) as stop:
        script(workplace.arguments("new", "--language_pairs", "german"))
    assert stop.value.code == 2
    assert "german" in capsys.readouterr().err.splitlines()[-1]


def test_a_language_model_is_no_translation_model(workplace, script):
    folder = workplace.folder / "causal"
    config = modeling_stablemoe.StableMoEConfig(
        vocab_size=300, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_experts=2
    )
    modeling_stablemoe.StableMoEForCausalLM(config).save_pretrained(folder)
    start = ["--model_name_or_path", str(folder), "--model_preset", "", "--stage1_steps", ""]
    message = refuse(script, workplace.arguments("new", *start))
    assert "is of a 'stablemoe' model" in message
    assert not (workplace.folder / "new").exists()


def test_killed_run_resumes_across_the_transition_to_the_same_bits(workplace, trained_translation):
    # In stage 1, while the checkpoint before the transition is written; then in stage 2.
    for step, more in ((4, ()), (10, LATEST)):
        run = fork_script(workplace, "killed", *more, before=fault("optimizer", step, die))
        assert run.wait() == [-signal.SIGKILL], run.output[-3000:]
    workplace.train_here("killed", *LATEST)
    folders = (workplace.folder / "killed", trained_translation.folder)
    assert_same_saved_weights(*folders)
    actual, expected = map(results_of, folders)
    assert actual["scores"] == expected["scores"]
    assert [row["fluctuation"] for row in actual["stages"]] == [row["fluctuation"] for row in expected["stages"]]
