"""Publishing a checkpoint and loading it from the Hub."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file, save_file
from transformers import AutoTokenizer

from helpers.checkpoints import CODE_FILES
from helpers.models import tiny_model
from helpers.trainers import BLOCKS, make_trainer, tiny_tokenizer
from helpers.workplaces import content, load_script, refuse
from modeling_stablemoe import RoutingFluctuationCallback, StageTransitionCallback
from modeling_stablemoe.hub import release_checks
from modeling_stablemoe.hub.cards import CardFacts
from modeling_stablemoe.hub.publishing import Shipment, format_shipment, rename, select_files
from modeling_stablemoe.hub.release_checks import check_card, check_weight_files, check_without_package, prepare
from modeling_stablemoe.hub.reload_probe import compute
from modeling_stablemoe.runs.run import evaluate_saved_model, summarize_run, write_results


TABLE = "model.moe_layers.0.frozen_router.routing_table"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a run leaves: model, card, results, figure, checkpoints with optimizers, pickles."""
    folder = tmp_path_factory.mktemp("work") / "run"
    callbacks = (StageTransitionCallback(2), RoutingFluctuationCallback(BLOCKS[:4], 2))
    trainer = make_trainer(folder, *callbacks, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.processing_class = tiny_tokenizer()
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    results = {"perplexity": evaluate_saved_model(trainer), **summarize_run(trainer)}
    write_results(trainer, results, facts=CardFacts(license="apache-2.0", language=["en"], dataset_name="blocks"))
    (folder / "run.json").write_text("{}")
    return folder


@pytest.fixture
def copied(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "copied", ignore=shutil.ignore_patterns("checkpoint-*"))


@pytest.fixture(scope="module")
def fingerprint(run_folder) -> str:
    return json.loads((run_folder / "config.json").read_text())["router_fingerprint"]


# What is checked before anything is sent


def card_of(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def config_of(folder):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def results_of(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def check(folder, card):
    check_card(card, config_of(folder), results_of(folder), set(select_files(folder)[0]))


def test_dry_run_checks_and_lists_what_would_be_sent_and_changes_nothing(run_folder, capsys):
    before = content(run_folder)
    load_script("push_to_hub").main([str(run_folder), "user/name", "--dry_run"])
    printed = capsys.readouterr().out
    assert content(run_folder) == before
    assert "To user/name, branch main, in one commit:" in printed
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md", "results.json", *CODE_FILES):
        assert f"B  {name}\n" in printed
    left_out = next(line for line in printed.splitlines() if line.startswith("Left out:"))
    for name in ("checkpoint-2/", "checkpoint-4/", "training_args.bin", "trainer_state.json", "run.json"):
        assert name in left_out
    assert "Nothing was sent." in printed


def test_no_pickle_and_no_state_of_training_is_ever_sent(run_folder):
    for folder in (run_folder, run_folder / "checkpoint-2", run_folder / "checkpoint-4"):
        names = set(select_files(folder)[0])
        assert {"model.safetensors", "config.json", "configuration_stablemoe.py"} <= names
        assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
        assert {name for name in names if name.endswith(".safetensors")} == {"model.safetensors"}
        assert not {"trainer_state.json", "run.json", "checkpoint_manifest.json"} & names


def test_all_chat_templates_of_a_tokenizer_are_sent(copied, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {
        "default": "{{ messages }}",
        "tool_use": "w3 {{ messages }}",
        "rag": "w4 {{ messages }}",
    }
    tokenizer.save_pretrained(copied)
    (copied / "additional_chat_templates" / "notes.txt").write_text("")
    files, left_out = select_files(copied)
    assert {
        "chat_template.jinja",
        *(f"additional_chat_templates/{name}.jinja" for name in ("tool_use", "rag")),
    } <= set(files)
    assert [name for name in left_out if "chat_template" in name] == ["additional_chat_templates/notes.txt"]
    shipment = Shipment(files, card_of(copied), left_out)
    assert f" {len('w4 {{ messages }}')} B  additional_chat_templates/rag.jinja\n" in format_shipment(
        shipment, "user/name", None
    )
    for operation in shipment.operations():
        target = tmp_path / "repository" / operation.path_in_repo
        target.parent.mkdir(parents=True, exist_ok=True)
        with operation.as_file() as file:
            target.write_bytes(file.read())
    assert AutoTokenizer.from_pretrained(tmp_path / "repository").chat_template == tokenizer.chat_template


def test_a_checkpoint_without_a_card_gets_one_from_the_state_of_its_run(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(release_checks, "check_without_package", lambda *_: None)  # the dry run has it
    folder = shutil.copytree(run_folder / "checkpoint-4", tmp_path / "checkpoint-4")
    (folder / "README.md").unlink()
    card = prepare(folder, "user/name", license="mit", language=["de", "en"]).card
    assert (card.data.license, card.data.language) == ("mit", ["de", "en"])
    assert 'from_pretrained("user/name", trust_remote_code=True)' in card.text
    assert "frozen (stage 2)" in card.text
    assert "| optimizer steps | 4 |" in card.text
    assert not card.data.eval_results  # nothing was evaluated
    assert not (folder / "README.md").exists()


def test_a_card_of_the_run_names_the_repository_when_it_is_sent(run_folder):
    card = rename(card_of(run_folder), "user/name")
    assert "\n# user/name\n" in card.text
    assert card.text.count('from_pretrained("user/name"') == 2
    assert "`transformers serve user/name --trust-remote-code`" in card.text
    assert '"run"' not in card.text
    assert str(card).count("name: user/name") == 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda card: card.data.eval_results[0].__setattr__("metric_value", 1.5),
            "says perplexity = 1.5, results.json",
        ),
        (
            lambda card: card.data.eval_results[0].__setattr__("metric_value", "low"),
            "'low', which is no finite number",
        ),
        (lambda card: card.data.__setitem__("pipeline_tag", "translation"), "`pipeline_tag: translation`"),
        (lambda card: card.data.__setitem__("library_name", "peft"), "`library_name: peft`"),
        (lambda card: card.data.__setitem__("license", "Apache 2"), "`license`: 'Apache 2' is no identifier"),
        (lambda card: card.data.__setitem__("datasets", ["my files"]), "'my files' is no name of a data set"),
        (lambda card: card.data.__setitem__("base_model", "a/b/c"), "'a/b/c' is no name"),
        (lambda card: setattr(card, "text", card.text + "ab" * 32), None),
        (lambda card: setattr(card, "text", "ab" * 32), "The card names the routing abab.*, the model has"),
        (
            lambda card: setattr(card, "text", card.text + "![](other.png)"),
            "The card shows other.png, which is not among",
        ),
    ],
)
def test_a_card_that_does_not_fit_is_refused(run_folder, edit, message):
    card = card_of(run_folder)
    edit(card)
    if message is None:
        check(run_folder, card)
    else:
        with pytest.raises(ValueError, match=message):
            check(run_folder, card)


def test_results_of_another_run_are_refused(run_folder):
    results = {**results_of(run_folder), "router_fingerprint": "ab" * 32}
    with pytest.raises(ValueError, match=r"results\.json names the routing abab"):
        check_card(card_of(run_folder), config_of(run_folder), results, {"routing_fluctuation.png"})


@pytest.mark.parametrize("metadata", ["model-index: [{name: x}]", "tags: [stablemoe", "- a list"])
def test_metadata_that_cannot_be_read_are_refused(copied, metadata):
    (copied / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")
    message = refuse(load_script("push_to_hub").main, [str(copied), "user/name", "--dry_run"])
    assert re.match("error: The metadata of '.*README.md' are wrong: ", message)


def test_what_is_no_model_of_ours_is_refused(copied, tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        check_weight_files(tmp_path / "nowhere")
    (copied / "model.safetensors").rename(copied / "model.bin")
    with pytest.raises(ValueError, match="no weights in safetensors files, and pickles are not published"):
        check_weight_files(copied)
    (copied / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no model: there is no config\.json"):
        check_weight_files(copied)


def test_damaged_routing_and_a_missing_tokenizer_end_in_one_line(copied):
    main = load_script("push_to_hub").main
    for path in copied.glob("tokenizer*"):
        path.unlink()
    assert "does not load" in refuse(main, [str(copied), "user/name", "--dry_run"])
    weights = load_file(copied / "model.safetensors")
    weights[TABLE][3] = (weights[TABLE][3] + 1) % 5
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    message = refuse(main, [str(copied), "user/name", "--dry_run"])
    assert message.startswith("error: ")
    assert "are not those that this checkpoint was saved with" in message


def test_code_files_that_do_not_load_without_the_package_are_refused(copied, forked_probe):
    (copied / "modeling_stablemoe.py").write_text("import modeling_stablemoe.layer_stablemoe\n")
    with pytest.raises(ValueError, match="does not load with `trust_remote_code=True` where the package is not"):
        check_without_package(copied, compute(tiny_model()))


def test_code_files_that_compute_something_else_are_refused(run_folder, forked_probe):
    other = tiny_model(initializer_range=0.3)
    other.freeze_router()
    with pytest.raises(ValueError, match="compute other"):
        check_without_package(run_folder, compute(other.eval()))


@pytest.mark.parametrize("name", ["name", "user/na me", "a/b/c", "user/name.git", ""])
def test_a_name_that_no_repository_can_have_is_refused_first(name):
    message = refuse(load_script("push_to_hub").main, ["nowhere", name])
    assert message.startswith(f"error: {name!r} is no name of a repository")


# Upload


PUSH = """
import io, json, os, sys
from pathlib import Path
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM
import modeling_stablemoe
from modeling_stablemoe.hub import release_checks
from modeling_stablemoe.hub.publishing import NETWORK_ERROR, Shipment, explain, select_files, send
from helpers.workplaces import load_script

folder = sys.argv[1]
release_checks.check_without_package = lambda *_: None  # the dry run has it
main = load_script("push_to_hub").main
main([folder, "user/model", "--private", "--license", "mit", "--commit_message", "First"])

files, left_out = select_files(folder)
shipment = Shipment(files, ModelCard.load(Path(folder) / "README.md"), left_out)
answers = {}
def attempt(key, action):
    try:
        action()
        answers[key] = None
    except (NETWORK_ERROR, OSError, ValueError) as error:
        answers[key] = explain(error, key)
    except SystemExit as stop:
        answers[key] = stop.code

send(shipment, "user/model", revision="tried", commit_message="On a branch")
for name in ("other/taken", "other/new"):
    attempt(name, lambda: send(shipment, name))
attempt("public", lambda: send(shipment, "user/public", private=True))
AutoModelForCausalLM.from_pretrained(folder).push_to_hub("user/direct")
os.environ["HF_TOKEN"] = "hf_wrong"
attempt("wrong token", lambda: main([folder, "user/model"]))
del os.environ["HF_TOKEN"]
attempt("no token", lambda: main([folder, "user/model"]))
os.environ["HF_TOKEN"] = "hf_dummy"
constants.ENDPOINT = "http://127.0.0.1:9"
attempt("no network", lambda: main([folder, "user/model"]))
json.dump(answers, open("answers.json", "w"))
"""


@pytest.fixture(scope="module")
def answers(hub, run_on_hub, run_folder, tmp_path_factory) -> dict:
    """Everything that is pushed; what the client's errors were explained as."""
    work = tmp_path_factory.mktemp("push")
    hub.create("other/taken")
    hub.create("user/public")
    printed = run_on_hub(work, PUSH, str(run_folder))
    assert f"Sent: {hub.url}/user/model/commit/{hub.commits('user/model')[1].oid}" in printed
    return json.loads((work / "answers.json").read_text())


def test_script_sends_what_it_lists_in_one_commit(hub, run_folder, answers, fingerprint):
    assert [commit.title for commit in hub.commits("user/model")] == ["initial commit", "First"]
    assert hub.repository("user/model").private
    files = hub.files("user/model")
    expected = {*select_files(run_folder)[0], "README.md"}
    assert files.keys() == expected
    assert CODE_FILES | {"routing_fluctuation.png", "results.json"} <= expected
    for name in expected - {"README.md"}:
        assert files[name] == (run_folder / name).read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    assert fingerprint in card.text
    assert "![" in card.text
    assert 'from_pretrained("user/model", trust_remote_code=True)' in card.text


def test_a_branch_is_made_and_the_main_one_left_alone(hub, answers):
    assert [commit.title for commit in hub.commits("user/model", "tried")][-1] == "On a branch"
    assert [commit.title for commit in hub.commits("user/model")][-1] == "First"


def test_push_to_hub_of_the_model_sends_weights_and_code(hub, answers, run_folder, fingerprint):
    files = hub.files("user/direct")
    assert CODE_FILES | {"model.safetensors", "config.json"} <= files.keys()
    assert json.loads(files["config.json"])["router_fingerprint"] == fingerprint
    assert torch.equal(load(files["model.safetensors"])[TABLE], load_file(run_folder / "model.safetensors")[TABLE])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("other/taken", "you may not write to 'other/taken'"),
        ("other/new", "you may not write to 'other/new'"),
        ("public", "'user/public' exists and is public"),
        ("wrong token", "error: the Hub got a token that it does not accept: run `hf auth login`"),
        ("no token", "error: the Hub got no token: run `hf auth login`"),
        ("no network", "error: the Hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(hub, answers, key, message):
    assert answers[key].startswith(message)
    assert "\n" not in answers[key]
    assert not hub.files("other/taken")
    assert not hub.files("user/public")


# Download


FIRST_LOAD = """
import os, sys
os.dup2(1, 2)  # warnings too
sys.modules["modeling_stablemoe"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("user/model", trust_remote_code=True, cache_dir="first")
print("fingerprint:", model.router_fingerprint())
"""


def test_a_first_load_without_the_package_takes_two_code_files_few_requests_and_two_warnings(
    hub, run_on_hub, answers, tmp_path, fingerprint
):
    before = len(hub.requests)
    printed = run_on_hub(tmp_path, FIRST_LOAD)
    assert f"fingerprint: {fingerprint}\n" in printed
    requests = hub.requests[before:]
    fetched = {line.split("?")[0].split("/")[-1].split()[0] for line in requests if line.startswith("GET")}
    assert {name for name in fetched if name.endswith(".py")} == CODE_FILES
    assert len(requests) <= 15, requests
    assert printed.count("A new version of the following files was downloaded") <= 2
