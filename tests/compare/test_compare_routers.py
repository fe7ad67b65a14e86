"""The comparison script, run as users run it."""

import json
import re
import shutil
import signal
from pathlib import Path

import datasets
import pytest

from helpers.forks import die, fault, fork_script
from helpers.workplaces import CausalWorkplace, assert_same_saved_weights, load_script, refuse
from modeling_stablemoe.compare import comparison
from modeling_stablemoe.data.text import collate_blocks


SYSTEMS = """
dense: {config: {moe_layer_positions: []}}
switch: {config: {router_type: switch}}
hash: {config: {router_type: hash}, hash_table: balanced}
stablemoe: {stage1_steps: 0.5}
"""
NAMES = ["dense", "switch", "hash", "stablemoe"]


class CompareWorkplace(CausalWorkplace):
    """The folder of the training script, with a test split and systems."""

    script = "compare_routers.py"

    def __init__(self, folder: Path):
        super().__init__(folder)
        documents = (folder / "corpus.txt").read_text().strip().split("\n\n")
        (folder / "test.txt").write_text("\n\n".join(reversed(documents[:40])) + "\n")
        (folder / "systems.yaml").write_text(SYSTEMS)

    def arguments(self, output: str, *more: str, **options) -> list[str]:
        text = """--model_preset preset.json --config_overrides {"num_experts":3} --train_files corpus.txt
            --test_files test.txt --vocab_size 280 --block_size 16 --validation_share 0.1 --fluctuation_check_steps 3
            --fluctuation_tokens 64 --systems systems.yaml --max_steps 8 --per_device_train_batch_size 4
            --learning_rate 1e-2 --lr_scheduler_type constant --logging_steps 2 --save_strategy steps --save_steps 2
            --eval_strategy steps --eval_steps 4 --report_to none --use_cpu True --disable_tqdm True"""
        return [*text.split(), "--document_separator", "", "--output_dir", str(self.folder / output), *more]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return CompareWorkplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def printed(workplace):
    """What the script printed, for results in the folder `all`."""
    return workplace.train_here("all")


@pytest.fixture
def script(workplace, monkeypatch):
    module = load_script("compare_routers")
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace.folder / "cache")
    return module.main


def test_every_system_is_trained_and_measured(workplace, printed):
    results = json.loads((workplace.folder / "all" / "results.json").read_text())
    assert [row["system"] for row in results["systems"]] == NAMES
    assert [(run["system"], run["seed"]) for run in results["runs"]] == [(name, 0) for name in NAMES]
    for run in results["runs"]:
        assert [point["step"] for point in run["validation_curve"]] == [4, 8]
        assert run["validation_curve"][-1]["perplexity"] == pytest.approx(run["perplexity"]["validation"])
        assert set(run["perplexity"]) == {"validation", "test"}
        assert run["tokens"] == 8 * 4 * 16
        assert run["tokens_per_second"] == pytest.approx(run["tokens"] / run["seconds"])
        assert [entry["step"] for entry in run["training_curve"]] == [2, 4, 6, 8]
        frozen = run["system"] == "stablemoe"
        assert (run["transition"] is not None) == frozen
        assert (run["router_fingerprint"] is not None) == (frozen or run["system"] == "hash")
        if run["system"] == "dense":
            assert run["load"] is run["fluctuation"] is None
            assert run["parameters"]["experts"] == 0
        else:
            assert sum(run["load"][0]) == pytest.approx(1)
            assert run["fluctuation"]["steps"][0] == 0
            assert run["parameters"]["experts"] > 0
    flops = {run["system"]: run["forward_flops"] for run in results["runs"]}
    # A frozen routing takes one score a token, no product with all centroids.
    assert flops["dense"] < flops["hash"] == flops["stablemoe"] < flops["switch"]
    assert set(results["environment"]) == {"hardware", "threads", "python", "torch", "transformers"}
    assert results["settings"]["training"]["max_steps"] == 8
    assert str(workplace.folder) not in json.dumps(results["environment"])
    for name in ("perplexity.png", "fluctuation.png", "load.png", "results.md"):
        assert (workplace.folder / "all" / name).is_file()
    table = (workplace.folder / "all" / "results.md").read_text()
    assert table in printed
    assert re.search(r"\| stablemoe +\| 1 +\|.*\| \+0\.0 % ", table)


def test_all_systems_see_the_same_batches_in_an_order_of_the_seed(workplace, script, monkeypatch):
    seen = []

    def collate(features):
        batch = collate_blocks(features)
        seen.append(batch["input_ids"].tolist())
        return batch

    monkeypatch.setattr(comparison, "collate_blocks", collate)
    options = ["--only", "hash", "switch", "--seeds", "0", "1", "--max_steps", "3", "--save_strategy", "no"]
    arguments = workplace.arguments("same", *options, "--eval_strategy", "no", "--fluctuation_check_steps", "0")
    script(arguments)
    results = json.loads((workplace.folder / "same" / "results.json").read_text())
    steps, per_run = 3, len(seen) // 4
    runs = [seen[start : start + steps] for start in range(0, len(seen), per_run)]
    assert [(run["system"], run["seed"]) for run in results["runs"]] == [
        ("switch", 0),
        ("hash", 0),
        ("switch", 1),
        ("hash", 1),
    ]
    assert runs[0] == runs[1]
    assert runs[2] == runs[3]
    assert runs[0] != runs[2]
    assert results["runs"][0]["perplexity"] != results["runs"][1]["perplexity"]


def test_a_finished_comparison_is_read_and_a_new_seed_added(workplace, printed, tmp_path):
    folder = shutil.copytree(workplace.folder / "all", tmp_path / "all")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/model.safetensors")}
    output = workplace.train_here(str(folder), "--seeds", "0", "1", "--only", "stablemoe")
    assert output.count("finished before") == 1
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/model.safetensors")}
    assert after.items() > before.items()
    assert after.keys() - before == {folder / "stablemoe" / "seed-1" / "model.safetensors"}
    rows = json.loads((folder / "results.json").read_text())["systems"]
    assert [(row["system"], row["seeds"]) for row in rows] == [("stablemoe", 2)]
    assert re.search(r"\| stablemoe +\| 2 +\|.* ± .*\| \+0\.0 ± 0\.0 % ", (folder / "results.md").read_text())


def test_a_killed_comparison_resumes_to_the_same_numbers(workplace, printed):
    folder, names = workplace.folder / "cut", ["switch", "hash"]
    shutil.copytree(workplace.folder / "all" / "switch", folder / "switch")  # the first has ended
    run = fork_script(workplace, "cut", "--only", *names, before=fault("rotation", 4, die))
    assert run.wait() == [-signal.SIGKILL], run.output[-3000:]
    assert (folder / "hash" / "seed-0" / "checkpoint-4").is_dir()
    assert not (folder / "hash" / "seed-0" / "results.json").exists()
    workplace.train_here("cut", "--only", *names)
    whole, cut = (workplace.folder / parent / "hash" / "seed-0" for parent in ("all", "cut"))
    expected, actual = (json.loads((path / "results.json").read_text()) for path in (whole, cut))
    assert actual["perplexity"] == expected["perplexity"]
    assert actual["fluctuation"] == expected["fluctuation"]
    assert_same_saved_weights(cut, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--systems", "nothing.yaml"], "There is no file of systems"),
        (["--only", "nope"], "There is no system"),
        (["--model_preset", "", "--config_overrides", "", "--model_name_or_path", "x"], "name a `--model_preset`"),
        (["--max_steps", "-1"], "set `--max_steps`"),
        (["--resume_from_checkpoint", "latest"], "always resumes"),
        (["--config_overrides", '{"num_expert": 3}'], "System 'dense'.*unknown fields"),
        (["--block_size", "17"], "Sequences of 17 tokens do not fit"),
        (["--test_files", "nothing.txt"], "There is no file or folder"),
    ],
)
def test_bad_input_is_one_line_and_trains_nothing(workplace, script, options, message):
    assert re.search(message, refuse(script, workplace.arguments("new", *options)))
    assert not (workplace.folder / "new").exists()


def test_other_settings_are_refused_by_name(workplace, printed, script, tmp_path):
    shutil.copytree(workplace.folder / "all", tmp_path / "all")
    message = refuse(script, workplace.arguments(str(tmp_path / "all"), "--learning_rate", "3e-3"))
    assert "learning_rate: 0.01 there, 0.003 here" in message


def test_seeds_must_differ(script, capsys, workplace):
    with pytest.raises(SystemExit) as stop:
        script(workplace.arguments("new", "--seeds", "1", "1"))
    assert stop.value.code == 2
    assert "must be different numbers" in capsys.readouterr().err.splitlines()[-1]
