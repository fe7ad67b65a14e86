"""The script that compares conversions with their dense model, run as users run it."""

import json
import re
import shutil

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from helpers.workplaces import CausalWorkplace, load_script, refuse


SYSTEMS = """
dense: {config: {moe_layer_positions: []}}
one-expert: {config: {num_experts: 1, num_expert_sublayers: 1}, stage1_steps: 0.5}
stablemoe: {config: {num_experts: 3, num_expert_sublayers: 1, moe_layer_positions: [2]}, stage1_steps: 0.5}
"""
NAMES = ["dense", "one-expert", "stablemoe"]
DENSE = '{"n_embd":16,"n_layer":2,"n_head":2,"n_positions":16,"resid_pdrop":0,"embd_pdrop":0,"attn_pdrop":0}'


class UpcyclingWorkplace(CausalWorkplace):
    """The folder of the training script, with systems."""

    script = "compare_upcycling.py"

    def arguments(self, output: str, *more: str, **options) -> list[str]:
        (self.folder / "systems.yaml").write_text(SYSTEMS)
        text = f"""--dense_config {DENSE} --dense_steps 6 --train_files corpus.txt --vocab_size 280
            --validation_share 0.1 --systems systems.yaml --max_steps 8 --per_device_train_batch_size 4
            --learning_rate 1e-2 --lr_scheduler_type constant --logging_steps 2 --save_strategy steps --save_steps 2
            --eval_strategy steps --eval_steps 4 --report_to none --use_cpu True --disable_tqdm True"""
        return [*text.split(), "--document_separator", "", "--output_dir", str(self.folder / output), *more]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return UpcyclingWorkplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def printed(workplace):
    """What the script printed, for results in the folder `all`."""
    return workplace.train_here("all")


@pytest.fixture
def script(workplace, monkeypatch):
    module = load_script("compare_upcycling")
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace.folder / "cache")
    return module.main


def test_all_systems_begin_as_the_same_gpt2_and_are_measured(workplace, printed):
    results = json.loads((workplace.folder / "all" / "results.json").read_text())
    [start] = results["dense_models"]
    assert (start["seed"], start["steps"]) == (0, 6)
    assert 1 < start["perplexity"] < 280
    assert f"a GPT-2 of 6 steps, validation perplexity {start['perplexity']:.2f}." in printed
    assert [row["system"] for row in results["systems"]] == NAMES
    assert results["systems"][0]["above_reference"] == 0
    flops = [row["flops"] for row in results["systems"]]
    assert flops[0] < flops[1] == flops[2]  # frozen, the number of experts costs nothing
    assert [run["transition"] is not None for run in results["runs"]] == [False, True, True]
    for run in results["runs"]:
        assert [point["step"] for point in run["validation_curve"]] == [4, 8]
        assert run["tokens"] == 8 * 4 * 16
    dense = AutoModelForCausalLM.from_pretrained(workplace.folder / "all/gpt2/seed-0")
    assert isinstance(dense, GPT2LMHeadModel)
    for name in NAMES:
        system = AutoModelForCausalLM.from_pretrained(workplace.folder / "all" / name / "seed-0")
        assert (system.config.hidden_size, system.config.vocab_size) == (16, 280)
        assert not torch.equal(system.model.embed_tokens.weight, dense.transformer.wte.weight)


def test_all_systems_begin_with_the_loss_of_the_dense_model(workplace, script):
    script(workplace.arguments("short", "--max_steps", "2", "--eval_strategy", "no", "--learning_rate", "1e-30"))
    short = json.loads((workplace.folder / "short" / "results.json").read_text())
    losses = [run["training_curve"][0].get("task_loss", run["training_curve"][0]["loss"]) for run in short["runs"]]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    perplexities = [run["perplexity"]["validation"] for run in short["runs"]]
    assert perplexities == pytest.approx([short["dense_models"][0]["perplexity"]] * 3, rel=1e-6)


def test_finished_runs_are_kept_and_more_seeds_added(workplace, printed, script, tmp_path):
    shutil.copytree(workplace.folder / "all", tmp_path / "all")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("model.safetensors")}
    arguments = workplace.arguments("all", "--only", "dense", "--seeds", "0", "1")
    arguments[arguments.index("--output_dir") + 1] = str(tmp_path / "all")
    script(arguments)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    results = json.loads((tmp_path / "all" / "results.json").read_text())
    assert [(run["system"], run["seed"]) for run in results["runs"]] == [("dense", 0), ("dense", 1)]
    weights = [load_file(tmp_path / f"all/gpt2/seed-{seed}/model.safetensors") for seed in (0, 1)]
    assert not torch.equal(*(tensors["transformer.wte.weight"] for tensors in weights))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--systems", "nothing.yaml"], "There is no file of systems"),
        (["--only", "moe"], "There is no system"),
        (["--max_steps", "-1"], "set `--max_steps`"),
        (["--resume_from_checkpoint", "latest"], "always resumes"),
        (["--block_size", "17"], "Sequences of 17 tokens do not fit"),
        (["--systems", "shape.yaml"], "System 'wide': hidden_size: no options of a conversion"),
        (["--systems", "taken.yaml"], "A system cannot be called 'gpt2'"),
        (["--dense_config", '{"n_positions": 16, "resid_pdrop": 0.3}'], r"`resid_pdrop` \(0.3\) and `embd_pdrop`"),
    ],
)
def test_bad_input_is_one_line_and_makes_no_folder(workplace, printed, script, options, message):
    (workplace.folder / "shape.yaml").write_text("wide: {config: {hidden_size: 32}}")
    (workplace.folder / "taken.yaml").write_text("gpt2: {config: {num_experts: 3}}")
    assert re.search(message, refuse(script, workplace.arguments("new", *options)))
    assert not (workplace.folder / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dense_config", "{3"], "is not valid JSON"),
        (["--dense_config", '{"n_layers": 3}'], "must be a JSON object of GPT2Config fields"),
        (["--dense_steps", "0"], "must be at least 1"),
        (["--seeds", "1", "1"], "must be different numbers"),
    ],
)
def test_bad_command_line_ends_with_status_2(workplace, script, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        script(workplace.arguments("new", *options))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
