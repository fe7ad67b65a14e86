"""Every script, as `python` starts it."""

import ast
import json
import runpy
import sys

import datasets
import pytest
from transformers import TrainingArguments

import modeling_stablemoe
from helpers import ROOT
from helpers.workplaces import load_script
from modeling_stablemoe import cli
from modeling_stablemoe.runs import COMMANDS, ModelArguments, cannot_load, describe_next, parse_recipe, read_preset


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_every_script_starts_and_says_what_it_is_for(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    purpose = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    shown = capsys.readouterr().out
    assert purpose in " ".join(shown.split())
    assert len(shown.splitlines()) < 60
    # The first sentence of each option fits into a line.
    options = [line for line in shown.splitlines() if line.startswith("  --")]
    assert [line for line in options if len(line) > 119 or line.endswith("...")] == []


def test_the_whole_help_has_all_options_of_trainer(capsys):
    with pytest.raises(SystemExit):
        load_script("run_clm").main(["--help_all"])
    assert "--adam_beta1" in capsys.readouterr().out


def test_a_model_that_was_only_evaluated_stays_where_it_is():
    assert describe_next("runs/b", "generate", model="runs/a").splitlines()[0].endswith("the model is runs/a. Next:")
    assert "generate.py runs/a" in describe_next("runs/b", "generate", model="runs/a")
    assert "Model, card and results are in runs/b" in describe_next("runs/b", "generate")


def test_a_checkpoint_that_does_not_load_is_told_apart_from_none(tmp_path):
    error = OSError("no network")
    assert "there is no folder of that name, so it was looked for on the Hub. no network" in cannot_load("mine", error)
    assert cannot_load(str(tmp_path), error).endswith("that folder holds no model: there is no config.json")
    (tmp_path / "config.json").write_text("{}")
    assert cannot_load(str(tmp_path), error).endswith("no network")
    error = ValueError("Couldn't instantiate the backend tokenizer from one of ...")
    assert "that folder holds no tokenizer: save the one of its training there" in cannot_load(str(tmp_path), error)


def test_scripts_train_unless_they_are_told_not_to():
    model = ["--model_name_or_path", "runs/a"]
    arguments = parse_recipe((ModelArguments, TrainingArguments), "a", model)[1]
    assert arguments.do_train
    assert arguments.logging_steps == 25
    assert not parse_recipe((ModelArguments, TrainingArguments), "a", [*model, "--do_train", "false"])[1].do_train


def test_no_memory_is_pinned_on_a_cpu_of_which_torch_would_warn():
    model = ["--model_name_or_path", "runs/a", "--use_cpu", "true"]
    assert not parse_recipe((ModelArguments, TrainingArguments), "a", model)[1].dataloader_pin_memory


def test_a_new_model_is_not_evaluated(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_recipe((ModelArguments, TrainingArguments), "a", ["--model_preset", "a.json", "--do_train", "false"])
    assert "name it with --model_name_or_path" in capsys.readouterr().err


RECIPE = str(ROOT / "configuration" / "recipes" / "embedded-cpu.yaml")
MULTI30K = str(ROOT / "configuration" / "recipes" / "multi30k-cpu.yaml")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("run_clm", [RECIPE, "--epochs", "3"], "there is no option --epochs; here it is --num_train_epochs"),
        ("run_clm", [RECIPE, "--output", "a"], "there is no option --output; here it is --output_dir"),
        (
            "run_clm",
            [RECIPE, "--max_steps", "3", "my.csv"],
            "'my.csv' belongs to no option: write the name of one before it",
        ),
        ("run_clm", [RECIPE, "--learning_rat", "1"], "no option --learning_rat; did you mean --learning_rate?"),
        (
            "run_clm",
            [RECIPE, "--language_pairs", "de-en"],
            "no option --language_pairs here; it is one of run_translation",
        ),
        ("run_translation", ["--document_separator", ""], "no option --document_separator here; it is one of run_clm"),
        ("run_clm", ["bad.yaml"], "did you mean --learning_rate? (the recipe bad.yaml has it)"),
        (
            "run_translation",
            [MULTI30K, "--train_files", "own.tsv"],
            f"which --test_files names (the recipe {MULTI30K} has it); name yours, or unset it: --test_files ''",
        ),
        ("run_translation", ["--source_lang", "de"], "here it is --language_pairs source-target, such as"),
        ("generate", ["model", "--max_tokens", "3"], "no option --max_tokens; did you mean --max_new_tokens?"),
        ("inspect_routing", ["model", "--prompt", "x"], "no option --prompt here; it is one of generate"),
        ("generate", ["model", "--qqq"], "no option --qqq; see --help"),
    ],
)
def test_a_wrong_option_is_answered_by_the_one_that_was_meant(
    script, arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("learning_rat: 1e-3\n")
    (tmp_path / "own.tsv").write_text("de\ten\na\tb\n")
    with pytest.raises(SystemExit, match="2"):
        load_script(script).main(arguments)
    assert message in capsys.readouterr().err


def test_an_empty_string_unsets_files_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.tsv").write_text("de\ten\na\tb\n")
    options = ["--train_files", "own.tsv", "--validation_files", "", "--test_files", "", "--bf16", "False"]
    _, data, *_ = load_script("run_translation").parse_arguments([MULTI30K, *options])
    assert (data.train_files, data.validation_files, data.test_files) == (["own.tsv"], [], [])


def test_a_reporter_that_is_not_installed_is_named_at_once(monkeypatch, capsys):
    # `comet_ml` is in none of the environments.
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(SystemExit, match="2"):
        load_script("run_clm").main([RECIPE, "--report_to", "comet_ml"])
    assert "--report_to comet_ml needs its package" in capsys.readouterr().err


def test_recipes_and_presets_of_the_project_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_args, *_ = load_script("run_clm").parse_arguments(["configuration/recipes/embedded-cpu.yaml"])
    assert read_preset(model_args.model_preset)[1]["num_experts"] > 1


def stablemoe(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr("sys.argv", ["/usr/bin/stablemoe", *arguments])
    cli.main()
    return capsys.readouterr().out


def test_the_console_command_starts_the_scripts_under_its_own_name(monkeypatch, capsys):
    shown = stablemoe(monkeypatch, capsys, "--help")
    assert all(
        (ROOT / "scripts" / f"{script}.py").is_file() and f"  {name} " in shown for name, script in COMMANDS.items()
    )
    with pytest.raises(SystemExit) as stop:
        stablemoe(monkeypatch, capsys, "generate", "--help")
    assert stop.value.code == 0
    assert "usage: stablemoe generate" in capsys.readouterr().out
    assert "Continue a text with a StableMoE language model" in shown
    with pytest.raises(SystemExit, match="there is no command 'tran'; did you mean train?"):
        stablemoe(monkeypatch, capsys, "tran")
    with pytest.raises(SystemExit, match="there is no command 'nonsense'; usage: stablemoe"):
        stablemoe(monkeypatch, capsys, "nonsense")
    assert stablemoe(monkeypatch, capsys, "--version").strip() == modeling_stablemoe.__version__


def test_the_console_command_trains_on_a_text_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "my.txt").write_text(
        " ".join(f"{number} is a number and {number + 1} the next." for number in range(900))
    )
    options = """--train_files my.txt --model_preset configuration/models/tiny.json --block_size 32 --max_steps 4
        --stage1_steps 2 --warmup_steps 1 --eval_steps 2 --save_steps 2 --use_cpu True --fluctuation_check_steps 0"""
    shown = stablemoe(monkeypatch, capsys, "train", *options.split())
    assert (tmp_path / "runs" / "stablemoe" / "model.safetensors").is_file()
    assert "  stablemoe generate runs/stablemoe --prompt" in shown
    assert "  stablemoe inspect runs/stablemoe --text" in shown
    evaluated = stablemoe(
        monkeypatch,
        capsys,
        "train",
        "--do_train",
        "false",
        "--model_name_or_path",
        "runs/stablemoe",
        "--use_cpu",
        "true",
    )
    results = [
        json.loads((tmp_path / "runs" / run / "results.json").read_text()) for run in ("stablemoe", "evaluated")
    ]
    # Of the text that was held out, by the record of the run; in batches of another size.
    assert results[1]["perplexity"] == pytest.approx(results[0]["perplexity"], rel=1e-4)
    assert "bigram" in shown
    assert "bigram" not in evaluated
