"""What is pushed to the Hub in each stage."""

import json
import math
import re

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load

from helpers import ROOT
from helpers.checkpoints import BLOCK
from helpers.workplaces import CausalWorkplace, TranslationWorkplace


WATCH = "stage1_watch.safetensors"
CODE_FILES = {"configuration_stablemoe.py"}

# Six steps with the transition after the third and saves at 2, 4 and 6; each push is waited for.
TRAIN = """
import json, sys
from helpers.trainers import make_trainer
from transformers import Trainer, TrainerCallback
from modeling_stablemoe import StageTransitionCallback
from modeling_stablemoe.training import RoutingTrainer

class Wait(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if self.trainer.push_in_progress is not None:
            self.trainer.push_in_progress.wait_until_done()

def train(name, strategy, **arguments):
    wait = Wait()
    trainer = make_trainer(
        name, wait, StageTransitionCallback(3), max_steps=6, save_strategy="steps", save_steps=2, push_to_hub=True,
        hub_strategy=strategy, hub_model_id="user/" + name, hub_always_push=True, **arguments,
    )
    wait.trainer = trainer
    trainer.train()
    return trainer
"""
TRAIN_ALL = f"""{TRAIN}
fingerprints = {{}}
evaluation = {{"eval_strategy": "steps", "eval_steps": 2}}
for strategy in ("end", "every_save", "checkpoint"):
    # `push_to_hub` of the plain one drafts a card.
    kind = RoutingTrainer if strategy == "end" else Trainer
    # A run that is resumed to the same bits below goes without.
    trainer = train(strategy, strategy, trainer_class=kind, **({{}} if strategy == "checkpoint" else evaluation))
    fingerprints[strategy] = trainer.model.config.router_fingerprint
    if strategy == "end":
        trainer.push_to_hub(license="apache-2.0", tags="tiny")
    json.dump(trainer.state.log_history, open(strategy + ".json", "w"))
json.dump(fingerprints, open("fingerprints.json", "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def fingerprints(run_on_hub, folder) -> dict:
    """Runs with every strategy; the fingerprints that they ended with."""
    run_on_hub(folder, TRAIN_ALL)
    return json.loads((folder / "fingerprints.json").read_text())


def commit_of(hub, name, title):
    [commit] = [commit for commit in hub.commits(f"user/{name}") if commit.title == title]
    return commit


def files_of(hub, name, title) -> dict[str, bytes]:
    return hub.files(f"user/{name}", commit_of(hub, name, title).oid)


def assert_model(files: dict[str, bytes], fingerprint: str | None, prefix: str = ""):
    """Check weights, config and code files of a folder against each other."""
    assert json.loads(files[f"{prefix}config.json"]).get("router_fingerprint") == fingerprint
    tables = [v for k, v in load(files[f"{prefix}model.safetensors"]).items() if k.endswith("routing_table")]
    assert tables
    for table in tables:
        assert (table == -1).all() if fingerprint is None else (table >= 0).all()
    modules = {path.split(".")[0] for path in json.loads(files[f"{prefix}config.json"])["auto_map"].values()}
    assert {f"{prefix}{module}.py" for module in modules} | {prefix + name for name in CODE_FILES} <= files.keys()


def perplexity_at(folder, name, step) -> float:
    history = json.loads((folder / f"{name}.json").read_text())
    [loss] = [entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] == step]
    return round(math.exp(loss), 3)


def assert_card(files: dict[str, bytes], fingerprint: str | None, perplexity: float | None, prefix: str = ""):
    """Check that a folder holds the card of its own step, and no draft of Trainer's."""
    card = ModelCard(files[f"{prefix}README.md"].decode())
    assert ("frozen (stage 2)" if fingerprint else "still learned (stage 1)") in card.text
    assert fingerprint is None or fingerprint in card.text
    assert "More information needed" not in card.text
    measured = [result.metric_value for result in card.data.eval_results or []]
    assert measured == ([] if perplexity is None else [perplexity])


def test_the_card_of_each_push_is_of_its_step(hub, folder, fingerprints):
    for step in (2, 4, 6):
        stage = None if step == 2 else fingerprints["every_save"]
        files = files_of(hub, "every_save", f"Training in progress, step {step}")
        assert_card(files, stage, perplexity_at(folder, "every_save", step))
    files = files_of(hub, "checkpoint", "Training in progress, step 2, checkpoint")
    assert_card(files, None, None, "last-checkpoint/")


def test_the_card_of_push_to_hub_names_the_repository_and_takes_its_arguments(hub, folder, fingerprints):
    files = hub.files("user/end")
    assert_card(files, fingerprints["end"], perplexity_at(folder, "end", 6))
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert {"stablemoe", "tiny"} <= set(card.data.tags)
    assert 'from_pretrained("user/end", trust_remote_code=True)' in card.text


def test_end_pushes_the_frozen_model_once_and_nothing_before(hub, fingerprints):
    assert [commit.title for commit in hub.commits("user/end")] == ["initial commit", "End of training"]
    files = hub.files("user/end")
    assert_model(files, fingerprints["end"])
    assert "README.md" in files
    assert not [path for path in files if path.startswith("checkpoint-")]


def test_every_save_pushes_the_stage_of_the_step_with_the_code_that_loads_it(hub, fingerprints):
    name = "every_save"
    titles = [commit.title for commit in hub.commits(f"user/{name}")]
    assert titles == ["initial commit", *(f"Training in progress, step {step}" for step in (2, 4, 6))]
    assert_model(files_of(hub, name, titles[1]), None)
    for title in titles[2:]:
        assert_model(files_of(hub, name, title), fingerprints[name])
    assert not [path for path in hub.files(f"user/{name}") if "checkpoint" in path]


def test_checkpoint_pushes_one_that_can_be_resumed(hub, fingerprints):
    stage1 = files_of(hub, "checkpoint", "Training in progress, step 2, checkpoint")
    assert_model(stage1, None, "last-checkpoint/")
    assert {f"last-checkpoint/{name}" for name in ("optimizer.pt", "trainer_state.json", WATCH)} <= stage1.keys()
    stage2 = files_of(hub, "checkpoint", "Training in progress, step 4, checkpoint")
    assert_model(stage2, fingerprints["checkpoint"], "last-checkpoint/")
    assert json.loads(stage2["last-checkpoint/trainer_state.json"])["global_step"] == 4


LOAD = """
import json
from transformers import AutoModelForCausalLM
def load(name, revision, trust):
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=trust)
    print(json.dumps([type(model).__module__.split(".")[0], model.routing_stage, model.router_fingerprint()]))
"""


def test_pushed_models_load_where_the_package_is_not_installed(hub, run_on_hub, folder, fingerprints):
    early = commit_of(hub, "every_save", "Training in progress, step 2").oid
    hub.repository("user/every_save").branches["tried"] = early
    code = f"""{LOAD}
try:
    load("user/every_save", "main", False)
except ValueError as error:
    print("trust_remote_code" in str(error))
load("user/every_save", "main", True)
load("user/every_save", "{early}", True)
load("user/every_save", "tried", True)
load("user/end", "main", True)
"""
    refused, *loaded = run_on_hub(folder, BLOCK + code).splitlines()
    assert refused == "True"
    remote = "transformers_modules"
    assert [json.loads(line) for line in loaded] == [
        [remote, 2, fingerprints["every_save"]],
        [remote, 1, None],
        [remote, 1, None],
        [remote, 2, fingerprints["end"]],
    ]


def test_pushed_models_load_without_remote_code_and_resume_to_the_same_bits(hub, run_on_hub, folder, fingerprints):
    early = commit_of(hub, "checkpoint", "Training in progress, step 2, checkpoint").oid
    late = commit_of(hub, "checkpoint", "Training in progress, step 4, checkpoint").oid
    code = f"""{TRAIN}{LOAD}
load("user/every_save", "main", False)
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
import torch
expected = load_file("checkpoint/checkpoint-6/model.safetensors")
entries = []
for revision in ("{early}", "{late}"):
    path = snapshot_download("user/checkpoint", revision=revision) + "/last-checkpoint"
    name = "resumed-" + revision
    trainer = make_trainer(name, StageTransitionCallback(3), max_steps=6, resume_from_checkpoint=path)
    trainer.train(resume_from_checkpoint=path)
    trainer.save_model()
    actual = load_file(name + "/model.safetensors")
    print(actual.keys() == expected.keys() and all(torch.equal(actual[k], expected[k]) for k in expected))
    entries.append([entry for entry in trainer.state.log_history if "transition_step" in entry])
print(entries[0] == entries[1])
"""
    # Trainer prints its logs, too.
    printed = [line for line in run_on_hub(folder, code).splitlines() if line.startswith(("[", "True", "False"))]
    loaded, *same = printed
    assert json.loads(loaded) == ["modeling_stablemoe", 2, fingerprints["every_save"]]
    assert same == ["True"] * 3


# The scripts


@pytest.fixture(
    params=[CausalWorkplace, pytest.param(TranslationWorkplace, marks=pytest.mark.slow)], ids=["clm", "translation"]
)
def workplace(request, tmp_path):
    return request.param(tmp_path)


def test_script_pushes_its_own_card_and_neither_pickles_nor_settings_of_the_machine(hub, run_on_hub, workplace):
    name = type(workplace).__name__
    options = f"--push_to_hub True --hub_model_id user/{name} --hub_strategy every_save --hub_always_push True"
    script = ROOT / "scripts" / workplace.script
    cache = {"HF_DATASETS_CACHE": str(workplace.folder / "cache")}
    run_on_hub(workplace.folder, script, *workplace.arguments("run", *options.split(), max_steps=6), **cache)
    run_folder = workplace.folder / "run"
    commits = hub.commits(f"user/{name}")
    assert [commit.title for commit in commits][-1] == "End of training"
    assert len(commits) >= 3
    for commit in commits:
        assert not {"training_args.bin", "run.json"} & commit.files.keys()
        assert not [path for path in commit.files if path.endswith((".pt", ".pth", ".bin", ".pkl"))]
    files = hub.files(f"user/{name}")
    results = json.loads(files["results.json"])
    assert_model(files, results["router_fingerprint"])
    assert results["router_fingerprint"] is not None
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results[0].metric_value == round(results["perplexity"], 3)
    assert results["router_fingerprint"] in card.text
    assert re.search(rf'from_pretrained\("user/{name}", trust_remote_code=True\)', card.text)
    for file in ("model.safetensors", "config.json", "README.md"):
        assert files[file] == (run_folder / file).read_bytes()
    assert (run_folder / "run.json").exists()
