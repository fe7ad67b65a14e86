"""Tests of the training script, run as users run it."""

import json
import os
import re
import shutil
import signal

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, TrainerCallback

from helpers import ROOT
from helpers.forks import LATEST
from helpers.workplaces import CausalWorkplace, assert_same_saved_weights, content, load_script, refuse, run_here
from modeling_stablemoe.checkpoints.folder_lock import FolderLock


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return CausalWorkplace(tmp_path_factory.mktemp("work"))


@pytest.fixture
def script(workplace, monkeypatch):
    """The script's `main`, in this process: for command lines that go no further than the start."""
    module = load_script("run_clm")
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace.folder / "cache")
    return module.main


def test_script_trains_through_both_stages_and_writes_its_results(trained_clm):
    folder, printed = trained_clm.folder, trained_clm.output
    results = json.loads((folder / "results.json").read_text())
    assert [(row["stage"], row["steps"]) for row in results["stages"]] == [(1, 6), (2, 16)]
    assert results["perplexity"] == results["stages"][1]["perplexity"]
    assert 1 < results["perplexity"] < 280
    assert results["stages"][1]["fluctuation"] == 0
    assert results["stages"][0]["fluctuation"] > 0
    assert results["tokens"] == 16 * 4 * 16  # steps, rows, tokens of a row
    config = json.loads((folder / "config.json").read_text())
    assert results["router_fingerprint"] == config["router_fingerprint"]
    assert len(config["router_fingerprint"]) == 64
    assert (config["num_experts"], config["vocab_size"]) == (3, 280)
    assert "routing frozen after step 6 of 16" in printed
    assert re.search(r"^\| 2 +\| 16 +\|", printed, re.MULTILINE)
    assert f"this model: {results['perplexity']:.2f}" in printed
    assert (folder / "routing_fluctuation.json").exists()
    shared = {path.suffix for path in folder.iterdir() if path.is_file()}
    assert shared <= {".json", ".md", ".png", ".py", ".safetensors"}
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].metric_value == round(results["perplexity"], 3)
    assert config["router_fingerprint"] in card.text


def test_trained_model_continues_a_text_in_a_new_interpreter(workplace, trained_clm):
    options = ["--prompt", "the quick", "--max_new_tokens", "5", "--temperature", "0"]
    output = workplace.run(ROOT / "scripts" / "generate.py", trained_clm.folder, *options)
    assert "frozen routing]" in output
    assert re.search(r"^the quick.", output, re.MULTILINE)


def test_a_chat_is_answered_by_the_template_of_the_tokenizer(workplace, trained_clm_copy):
    def generate(*options):
        options = [*options, "--max_new_tokens", "5", "--temperature", "0"]
        return run_here("generate", trained_clm_copy, *options, folder=workplace.folder)

    line = refuse(load_script("generate").main, [str(trained_clm_copy), "--prompt", "fox", "--chat"])
    assert "no chat template: leave out --chat" in line
    tokenizer = AutoTokenizer.from_pretrained(trained_clm_copy)
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }} {{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(trained_clm_copy)
    plain, answer = generate("--prompt", "user fox"), generate("--prompt", "fox", "--chat")
    assert "has a chat template: --chat answers" in plain
    assert plain.partition("\nuser fox")[2] == answer.partition("frozen routing]\n")[2]


def test_a_model_is_evaluated_on_what_its_training_held_out_without_being_told_again(workplace, trained_clm, script):
    batches = ["--per_device_eval_batch_size", "4", "--use_cpu", "True", "--report_to", "none"]
    evaluate = ["--do_train", "false", "--model_name_or_path", str(trained_clm.folder), *batches]
    script([*evaluate, "--output_dir", "again"])
    again, trained = (
        json.loads((folder / "results.json").read_text())
        for folder in (workplace.folder / "again", trained_clm.folder)
    )
    assert again["perplexity"] == pytest.approx(trained["perplexity"], rel=1e-5)


def test_text_is_read_by_the_column_of_the_training(workplace, trained_clm_copy, script):
    run = json.loads((trained_clm_copy / "run.json").read_text())
    (trained_clm_copy / "run.json").write_text(json.dumps({**run, "text_column": "body"}))
    (workplace.folder / "body.csv").write_text(
        "id,body\n" + "".join(f"{i},the quick brown fox jumps {i} times\n" for i in range(40))
    )
    shown = run_here("inspect_routing", trained_clm_copy, "--text_files", "body.csv", folder=workplace.folder)
    assert "Agreement on this text: on" in shown
    cut = ["--text_files", "body.csv", "--max_tokens", "9"]
    output = workplace.run(ROOT / "scripts/inspect_routing.py", trained_clm_copy, *cut)
    assert "warning: only the first 9 tokens are read" in output
    evaluate = ["--do_train", "false", "--model_name_or_path", str(trained_clm_copy), "--train_files", "body.csv"]
    batches = ["--validation_share", "0.9", "--block_size", "4", "--use_cpu", "True", "--report_to", "none"]
    script([*evaluate, *batches, "--output_dir", "by-body"])
    assert "perplexity" in json.loads((workplace.folder / "by-body/results.json").read_text())
    shutil.copytree(trained_clm_copy / "checkpoint-16", trained_clm_copy / "alone")  # no record is here, nor one above
    line = refuse(load_script("inspect_routing").main, [str(trained_clm_copy / "alone"), "--text_files", "body.csv"])
    assert "set --text_column to one of: id, body" in line


def test_training_a_frozen_checkpoint_further_leaves_its_routing(workplace, trained_clm, script):
    trained = trained_clm.folder
    start = ["--model_name_or_path", str(trained), "--tokenizer_name", str(trained)]
    unset = ["--model_preset", "", "--config_overrides", "", "--stage1_steps", ""]
    script(workplace.arguments("tuned", *start, *unset, "--max_steps", "3", "--fluctuation_check_steps", "0"))
    before, after = load_file(trained / "model.safetensors"), load_file(workplace.folder / "tuned/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.embed_tokens.weight" in changed
    assert not [name for name in changed if "routing_table" in name or "distilled_router" in name]
    fingerprints = [
        json.loads((path / "config.json").read_text())["router_fingerprint"]
        for path in (trained, workplace.folder / "tuned")
    ]
    assert fingerprints[0] == fingerprints[1]
    [row] = json.loads((workplace.folder / "tuned" / "results.json").read_text())["stages"]
    assert (row["stage"], row["steps"]) == (2, 3)


def test_resuming_a_finished_run_changes_no_weight(workplace, trained_clm, trained_clm_copy):
    # A run that was killed after its last step, before it wrote its results.
    for name in ("model.safetensors", "results.json", "routing_fluctuation.json"):
        (trained_clm_copy / name).unlink()
    workplace.train_here(str(trained_clm_copy), *LATEST)
    assert_same_saved_weights(trained_clm_copy, trained_clm.folder)
    # One step more than `max_steps`, as `Trainer` does it, would show here.
    for name in ("results.json", "routing_fluctuation.json"):
        assert (trained_clm_copy / name).read_text() == (trained_clm.folder / name).read_text()


@pytest.mark.parametrize("how", [(), ("--overwrite_output_dir",), ("--resume_from_checkpoint", "latest")])
def test_a_second_start_is_told_of_the_first_and_changes_nothing(workplace, trained_clm_copy, script, how):
    lock = FolderLock(trained_clm_copy)
    lock.acquire()
    before = content(trained_clm_copy)
    line = refuse(script, workplace.arguments(str(trained_clm_copy), *how))
    assert f"is being written by process {os.getpid()} on" in line
    assert content(trained_clm_copy) == before
    lock.release()


def test_a_resumed_run_says_from_which_step_it_goes_on(workplace, trained_clm_copy):
    shutil.rmtree(trained_clm_copy / "checkpoint-16")
    options = [str(trained_clm_copy), *LATEST]
    resumed = workplace.train_here(*options)
    assert "checkpoint-14: the run goes on from step 14." in resumed
    assert "missing keys" not in resumed  # the head is tied to the embedding
    for checkpoint in trained_clm_copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert "There is no whole checkpoint in" in workplace.train_here(*options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_one_line_and_goes_on_from_its_checkpoint(workplace, tmp_path, number):
    module = load_script("run_clm")

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                os.kill(os.getpid(), number)

    # A shell starts what it runs in the background with Ctrl-C ignored.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    handler = signal.getsignal(signal.SIGTERM)
    build = module.build_callbacks
    module.build_callbacks = lambda *args, **options: [*build(*args, **options), Interrupt()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace.folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace.folder / "cache")
        message = refuse(module.main, workplace.arguments(str(tmp_path / "stopped")))
    signal.signal(signal.SIGINT, interrupt)
    assert message == (
        "interrupted at step 5 of 16. checkpoint-4 is whole: go on by the same command with `--resume_from_checkpoint latest` at its end."
    )
    assert signal.getsignal(signal.SIGTERM) is handler


def test_existing_output_folder_is_an_error_and_stays_as_it_is(workplace, trained_clm_copy, script):
    before = content(trained_clm_copy)
    message = refuse(script, workplace.arguments(str(trained_clm_copy)))
    assert "holds a run already, saved up to step 16. Continue it with `--resume_from_checkpoint latest`" in message
    # Nor is it resumed with other settings.
    message = refuse(script, workplace.arguments(str(trained_clm_copy), *LATEST, "--learning_rate", "3e-3"))
    assert "learning_rate: 0.01 there, 0.003 here" in message
    assert "seed" not in message
    assert content(trained_clm_copy) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_files", "nothing.txt"], "There is no file or folder"),
        (["--train_files", "empty.txt"], "There is no text in"),
        (
            ["--block_size", "90000", "--config_overrides", '{"max_position_embeddings": 90000}'],
            "too few for one block",
        ),
        (
            ["--resume_from_checkpoint", "lastest"],
            "'lastest' cannot be resumed: there is no such folder; name a checkpoint of",
        ),
        (["--model_preset", "nothing.json"], "There is no model preset"),
        (["--config_overrides", '{"num_expert": 3}'], "unknown fields"),
        (["--config_overrides", '{"num_experts": 0}'], "num_experts"),
        (["--stage1_steps", "ten"], "must be a number of steps"),
        (["--stage1_steps", "1.5"], "must lie inside"),
        (["--stage1_steps", "100"], "longer than training"),
        (["--hold_until_ready", "1"], "before the transition at step"),
        (["--settled_change", "2"], "`settled_change` is a share of tokens"),
        (["--hash_table", "balanced"], "there is no stage 1, unset `--stage1_steps`"),
        (["--block_size", "17"], "Sequences of 17 tokens do not fit the model's 16 positions"),
        (["--config_overrides", '{"vocab_size": 270}'], "The tokenizer has 280 tokens, the model's vocabulary 270"),
        (
            ["--resume_from_checkpoint", "nowhere/checkpoint-3"],
            "The checkpoint 'nowhere/checkpoint-3' cannot be resumed",
        ),
    ],
)
def test_bad_input_is_one_line_and_claims_or_deletes_nothing(workplace, trained_clm_copy, script, options, message):
    (workplace.folder / "empty.txt").write_text("\n \n")
    assert message in refuse(script, workplace.arguments("new", *options))
    assert not (workplace.folder / "new").exists()
    # A slip in a command that replaces a run must not cost the run.
    before = content(trained_clm_copy)
    refuse(script, workplace.arguments(str(trained_clm_copy), "--overwrite_output_dir", "True", *options))
    assert content(trained_clm_copy) == before


def test_a_dense_model_is_refused_with_the_way_to_experts(workplace, script, tmp_path, trained_clm):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=280)).save_pretrained(tmp_path)
    start = [
        "--model_name_or_path",
        str(tmp_path),
        "--model_preset",
        "",
        "--config_overrides",
        "",
        "--stage1_steps",
        "",
    ]
    tokenizer = ["--tokenizer_name", str(trained_clm.folder)]
    message = refuse(script, workplace.arguments("new", *start, *tokenizer))
    assert "is a 'gpt2' model, not one of this package" in message
    assert "scripts/convert_dense.py" in message


def test_bad_input_ends_the_process_with_an_error_and_no_traceback(workplace):
    arguments = workplace.arguments("new", "--model_preset", "nothing.json")
    finished = workplace.attempt(ROOT / "scripts" / "run_clm.py", *arguments)
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    assert re.fullmatch(
        r"error: There is no model preset 'nothing.json'; .*", finished.stderr.strip().splitlines()[-1]
    )


def test_a_stream_resumed_in_a_later_pass_goes_on_to_the_same_bits(workplace, script):
    source = workplace.folder / "source"
    source.mkdir()
    documents = (workplace.folder / "corpus.txt").read_text().split("\n\n")
    for name, few in (("train", documents[:4]), ("validation", documents[-4:])):
        (source / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in few))
    arguments = workplace.arguments("whole-stream", "--dataset_name", str(source), "--streaming", "True")
    for name in ("--train_files", "--validation_share", "--document_separator"):
        index = arguments.index(name)
        del arguments[index : index + 2]
    arguments += ["--ngram_baselines", "False", "--save_total_limit", "9", "--eval_strategy", "no"]
    script(arguments)
    resumed = workplace.folder / "resumed-stream"
    shutil.copytree(workplace.folder / "whole-stream", resumed)
    shutil.rmtree(resumed / "checkpoint-16")
    # By step 14 of 4 blocks of 16 tokens, none longer than its characters, all has been read at least once.
    assert sum(len(text) + 1 for text in documents[:4]) < 14 * 4 * 16
    arguments[arguments.index("--output_dir") + 1] = str(resumed)
    script([*arguments, "--resume_from_checkpoint", "latest"])
    assert_same_saved_weights(workplace.folder / "whole-stream", resumed)


def test_generating_from_a_folder_that_is_no_model_is_one_line():
    assert refuse(load_script("generate").main, ["nowhere/at-all"]).startswith("error: cannot load 'nowhere/at-all'")
