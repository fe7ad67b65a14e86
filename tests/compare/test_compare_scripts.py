"""The comparison scripts, run as users run them."""

import json
import re
import shutil
import signal
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from helpers.forks import die, fault, fork_script
from helpers.workplaces import CausalWorkplace, assert_same_saved_weights, load_script, refuse
from modeling_stablemoe.compare import comparison, comparison_report
from modeling_stablemoe.data.text import collate_blocks
from modeling_stablemoe.tables import check_tables, count_routes, installed_tables, load_tables


DENSE = '{"n_embd":16,"n_layer":2,"n_head":2,"n_positions":16,"resid_pdrop":0,"embd_pdrop":0,"attn_pdrop":0}'
COMMON = """--train_files corpus.txt --vocab_size 280 --validation_share 0.05 --systems systems.yaml --max_steps 8
    --per_device_train_batch_size 4 --learning_rate 1e-2 --lr_scheduler_type constant --logging_steps 1
    --save_strategy steps --save_steps 4 --eval_strategy steps --eval_steps 4 --report_to none --use_cpu True
    --disable_tqdm True"""


class CompareWorkplace(CausalWorkplace):
    """The folder of the training script, with a test split and systems."""

    script = "compare_routers.py"
    options = """--model_preset preset.json --config_overrides {"num_experts":3} --test_files test.txt --block_size 16
        --fluctuation_check_steps 3 --fluctuation_tokens 64"""
    systems = """
dense: {config: {moe_layer_positions: []}}
switch: {config: {router_type: switch}}
hash: {config: {router_type: hash}, hash_table: balanced}
stablemoe: {stage1_steps: 0.5}
"""

    def __init__(self, folder: Path):
        super().__init__(folder)
        documents = (folder / "corpus.txt").read_text().strip().split("\n\n")
        (folder / "test.txt").write_text("\n\n".join(reversed(documents[:20])) + "\n")
        (folder / "systems.yaml").write_text(self.systems)

    def arguments(self, output: str, *more: str, **options) -> list[str]:
        text = f"{self.options} {COMMON}".split()
        return [*text, "--document_separator", "", "--output_dir", str(self.folder / output), *more]


class UpcyclingWorkplace(CompareWorkplace):
    script = "compare_upcycling.py"
    options = f"--dense_config {DENSE} --dense_steps 6"
    systems = """
dense: {config: {moe_layer_positions: []}}
one-expert: {config: {num_experts: 1, num_expert_sublayers: 1}, stage1_steps: 0.5}
stablemoe: {config: {num_experts: 3, num_expert_sublayers: 1, moe_layer_positions: [2]}, stage1_steps: 0.5}
"""


class TablesWorkplace(CompareWorkplace):
    script = "compare_tables.py"
    options = "--block_size 16 --count_steps 3 --max_load 1.5"
    systems = """
never: {config: &olmoe {model_type: olmoe, hidden_size: 16, intermediate_size: 8, num_hidden_layers: 2, num_attention_heads: 2,
  num_experts: 6, num_experts_per_tok: 2, max_position_embeddings: 16, output_router_logits: true, router_aux_loss_coef: 0.5}}
after: {config: *olmoe, model_of: never}
any-load: {config: *olmoe, model_of: never, max_load: 6}
middle: {config: *olmoe, stage1_steps: 0.5}
zeros: {config: &v4 {model_type: deepseek_v4, hidden_size: 16, moe_intermediate_size: 8, num_hidden_layers: 2,
  num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8, q_lora_rank: 8, o_lora_rank: 4, o_groups: 2, hc_mult: 2,
  layer_types: [sliding_attention, sliding_attention], mlp_layer_types: [hash_moe, moe], n_routed_experts: 6,
  num_experts_per_tok: 2, max_position_embeddings: 16}}
random: {config: *v4, hash_table: random}
balanced: {config: *v4, hash_table: balanced}
topk: {config: {<<: *v4, mlp_layer_types: [moe, moe]}}
learned: {config: *v4, tables_of: topk}
"""


@pytest.fixture(scope="module", autouse=True)
def drawn():
    """The numbers of runs that figures were asked for; drawing them takes longer than the training."""
    numbers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_report, "write_figures", lambda runs, folder: numbers.append(len(runs)))
        patch.setattr("modeling_stablemoe.measure.fluctuation.plot_fluctuation", lambda summary: None)
        yield numbers


@pytest.fixture(scope="module", autouse=True)
def batches():
    """The batches of each run, in the order in which they were made."""
    runs = []
    train_model = comparison.Comparison.train_model

    def begin(*args):
        runs.append([])
        return train_model(*args)

    def collate(features):
        batch = collate_blocks(features)
        runs[-1].append(batch["input_ids"].tolist())
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison.Comparison, "train_model", begin)
        patch.setattr(comparison, "collate_blocks", collate)
        yield runs


@pytest.fixture(scope="module")
def routers(tmp_path_factory):
    return CompareWorkplace(tmp_path_factory.mktemp("routers"))


@pytest.fixture(scope="module")
def printed(routers):
    """What the script printed, for results in the folder `all`."""
    return routers.train_here("all")


@pytest.fixture(scope="module")
def upcycling(tmp_path_factory):
    return UpcyclingWorkplace(tmp_path_factory.mktemp("upcycling"))


@pytest.fixture(scope="module")
def upcycled(upcycling):
    return upcycling.train_here("all", "--speed", "True")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return TablesWorkplace(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def tabulated(tables):
    return tables.train_here("all")


@pytest.fixture(scope="module")
def seen(tabulated, batches):
    """Batches of the run whose output is `tabulated`: training and evaluation of its last system."""
    return batches[-1]


@pytest.fixture
def said(monkeypatch):
    """Return a function that runs a script of a workplace and returns the line that it ends with."""

    def run(workplace, *more: str) -> str:
        monkeypatch.chdir(workplace.folder)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace.folder / "cache")
        main = load_script(workplace.script.removesuffix(".py")).main
        return refuse(main, workplace.arguments("new", *more))

    return run


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# Routers


def test_every_system_is_trained_and_measured(routers, printed, drawn):
    names = ["dense", "switch", "hash", "stablemoe"]
    results = results_of(routers.folder / "all")
    assert [row["system"] for row in results["systems"]] == names
    assert [(run["system"], run["seed"]) for run in results["runs"]] == [(name, 0) for name in names]
    for run in results["runs"]:
        assert [point["step"] for point in run["validation_curve"]] == [4, 8]
        assert run["validation_curve"][-1]["perplexity"] == pytest.approx(run["perplexity"]["validation"])
        assert set(run["perplexity"]) == {"validation", "test"}
        assert run["tokens"] == 8 * 4 * 16
        assert run["tokens_per_second"] == pytest.approx(run["tokens"] / run["seconds"])
        assert [entry["step"] for entry in run["training_curve"]] == list(range(1, 9))
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
    assert str(routers.folder) not in json.dumps(results["environment"])
    table = (routers.folder / "all" / "results.md").read_text()
    assert table in printed
    assert re.search(r"\| stablemoe +\| 1 +\|.*\| \+0\.0 % ", table)
    assert drawn[:4] == [1, 2, 3, 4]


def test_all_systems_see_the_same_batches_in_an_order_of_the_seed(routers, printed, batches, tmp_path):
    first, *others = [run[:8] for run in batches[:4]]
    assert others == [first] * 3
    folder = shutil.copytree(routers.folder / "all", tmp_path / "all")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/model.safetensors")}
    output = routers.train_here(str(folder), "--seeds", "0", "1", "--only", "stablemoe")
    assert batches[-1][:8] != first
    # The finished run is read.
    assert output.count("finished before") == 1
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/model.safetensors")}
    assert after.items() > before.items()
    assert after.keys() - before == {folder / "stablemoe" / "seed-1" / "model.safetensors"}
    assert [(row["system"], row["seeds"]) for row in results_of(folder)["systems"]] == [("stablemoe", 2)]
    assert re.search(r"\| stablemoe +\| 2 +\|.* ± .*\| \+0\.0 ± 0\.0 % ", (folder / "results.md").read_text())


def test_a_killed_comparison_resumes_to_the_same_numbers(routers, printed):
    folder = routers.folder / "cut"
    run = fork_script(routers, "cut", "--only", "hash", before=fault("rotation", 4, die))
    assert run.wait() == [-signal.SIGKILL], run.output[-3000:]
    assert (folder / "hash" / "seed-0" / "checkpoint-4").is_dir()
    assert not (folder / "hash" / "seed-0" / "results.json").exists()
    routers.train_here("cut", "--only", "hash")
    whole, cut = (routers.folder / parent / "hash" / "seed-0" for parent in ("all", "cut"))
    expected, actual = results_of(whole), results_of(cut)
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
def test_bad_input_is_one_line_and_trains_nothing(routers, said, options, message):
    assert re.search(message, said(routers, *options))
    assert not (routers.folder / "new").exists()


def test_other_settings_are_refused_by_name(routers, printed, said):
    shutil.copytree(routers.folder / "all", routers.folder / "new")
    message = said(routers, "--learning_rate", "3e-3")
    shutil.rmtree(routers.folder / "new")
    assert "learning_rate: 0.01 there, 0.003 here" in message


# Conversions of a dense model


def test_all_conversions_begin_as_the_same_gpt2_and_are_measured(upcycling, upcycled):
    names = ["dense", "one-expert", "stablemoe"]
    results = results_of(upcycling.folder / "all")
    [start] = results["dense_models"]
    assert (start["seed"], start["steps"]) == (0, 6)
    assert 1 < start["perplexity"] < 280
    assert f"a gpt2 of 6 steps, validation perplexity {start['perplexity']:.2f}." in upcycled
    assert [row["system"] for row in results["systems"]] == names
    assert results["systems"][0]["above_reference"] == 0
    flops = [row["flops"] for row in results["systems"]]
    assert flops[0] < flops[1] == flops[2]  # frozen, the number of experts costs nothing
    assert [run["transition"] is not None for run in results["runs"]] == [False, True, True]
    # The first step is measured before anything has been learnt.
    first = [run["training_curve"][0] for run in results["runs"]]
    losses = [entry.get("task_loss", entry["loss"]) for entry in first]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    dense = AutoModelForCausalLM.from_pretrained(upcycling.folder / "all/gpt2/seed-0")
    assert isinstance(dense, GPT2LMHeadModel)
    for name in names:
        system = AutoModelForCausalLM.from_pretrained(upcycling.folder / "all" / name / "seed-0")
        assert (system.config.hidden_size, system.config.vocab_size) == (16, 280)
        assert not torch.equal(system.model.embed_tokens.weight, dense.transformer.wte.weight)


def test_speed_is_told_beside_the_operations_it_is_for(upcycling, upcycled):
    speed = json.loads((upcycling.folder / "all" / "speed.json").read_text())
    assert list(speed["systems"]) == ["dense", "one-expert", "stablemoe"]
    dense, expert = speed["systems"]["dense"], speed["systems"]["one-expert"]
    for what in ("step", "token"):
        assert (dense[what]["low"], dense[what]["high"]) == (1, 1)
        assert 0 < expert[what]["low"] <= expert[what]["median"] <= expert[what]["high"]
    assert dense["flops"] == 1 < expert["flops"]
    [line] = [line for line in upcycled.splitlines() if re.match(r"\| one-expert .*\[", line)]
    assert f"{expert['step']['median']:.2f} [" in line
    assert f"| {expert['step']['median'] / expert['flops']:.2f} " in line


def test_each_seed_has_a_dense_model_of_its_own(upcycling, upcycled, tmp_path):
    folder = shutil.copytree(upcycling.folder / "all", tmp_path / "all")
    output = upcycling.train_here(str(folder), "--only", "dense", "--seeds", "0", "1")
    assert output.count("finished before") == 2
    assert [(run["system"], run["seed"]) for run in results_of(folder)["runs"]] == [("dense", 0), ("dense", 1)]
    weights = [load_file(folder / f"gpt2/seed-{seed}/model.safetensors") for seed in (0, 1)]
    assert not torch.equal(*(tensors["transformer.wte.weight"] for tensors in weights))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_steps", "-1"], "set `--max_steps`"),
        (["--block_size", "17"], "Sequences of 17 tokens do not fit"),
        (["--systems", "shape.yaml"], "System 'wide': hidden_size: no options of a conversion"),
        (["--systems", "taken.yaml"], "A system cannot be called 'gpt2'"),
        (["--dense_config", '{"n_positions": 16, "resid_pdrop": 0.3}'], r"`resid_pdrop` \(0.3\) and `embd_pdrop`"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_trains_nothing(upcycling, said, options, message):
    (upcycling.folder / "shape.yaml").write_text("wide: {config: {hidden_size: 32}}")
    (upcycling.folder / "taken.yaml").write_text("gpt2: {config: {num_experts: 3}}")
    assert re.search(message, said(upcycling, *options))
    assert not (upcycling.folder / "new").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("routers", ["--seeds", "1", "1"], "must be different numbers"),
        ("upcycling", ["--seeds", "1", "1"], "must be different numbers"),
        ("upcycling", ["--dense_config", "{3"], "is not valid JSON"),
        ("upcycling", ["--dense_config", '{"n_layers": 3}'], "n_layers: no fields of GPT2Config"),
        ("upcycling", ["--dense_config", '{"model_type": "lama"}'], "transformers knows no `model_type` 'lama'"),
        ("upcycling", ["--dense_steps", "0"], "must be at least 1"),
    ],
)
def test_bad_command_line_ends_with_status_2(request, capsys, name, options, message):
    workplace = request.getfixturevalue(name)
    with pytest.raises(SystemExit) as stop:
        load_script(workplace.script.removesuffix(".py")).main(workplace.arguments("new", *options))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


# Tables in models of transformers


def tables_of(folder: Path) -> torch.Tensor:
    """The tables of a run: beside its model, or of DeepSeek-V4 a part of it."""
    beside = folder / "routing_tables.safetensors"
    if beside.is_file():
        return load_file(beside)["tables"]
    return AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.gate.tid2eid.unsqueeze(0)


def test_models_are_compared_within_their_family(tables, tabulated):
    results = results_of(tables.folder / "all")
    families = {
        "olmoe": ["never", "after", "any-load", "middle"],
        "deepseek_v4": ["zeros", "random", "balanced", "topk", "learned"],
    }
    assert [row["system"] for row in results["systems"]] == sum(families.values(), [])
    page = (tables.folder / "all" / "results.md").read_text()
    for family, names in families.items():
        assert f"## {family}\n" in page
        rows = [row for row in results["systems"] if row["system"] in names]
        assert [row["above_reference"] for row in rows][0] == 0
        first = rows[0]["validation_mean"]
        assert [row["above_reference"] for row in rows] == pytest.approx(
            [row["validation_mean"] / first - 1 for row in rows]
        )
    for run in results["runs"]:
        assert 1 < run["perplexity"]["validation"] < 280
        assert run["validation_curve"][-1]["perplexity"] == pytest.approx(run["perplexity"]["validation"])


def test_perplexity_leaves_the_balance_loss_out(tables, tabulated):
    never, after = (results_of(tables.folder / "all" / name / "seed-0") for name in ("never", "after"))
    # Measured from logits, by another function.
    assert after["freezing"]["perplexity"] == pytest.approx(never["perplexity"]["validation"], rel=1e-5)


def test_a_finished_model_is_frozen_without_training(tables, tabulated):
    folder = tables.folder / "all" / "after" / "seed-0"
    assert not (folder / "model.safetensors").exists()
    result, never = results_of(folder), results_of(tables.folder / "all/never/seed-0")
    assert result["seconds"] == never["seconds"]
    assert [row["layer"] for row in result["freezing"]["layers"]] == [0, 1]
    model = AutoModelForCausalLM.from_pretrained(tables.folder / "all/never/seed-0")
    load_tables(model, folder)
    assert torch.equal(installed_tables(model), tables_of(folder).int())
    assert "### after, by layer" in tabulated
    free = results_of(tables.folder / "all" / "any-load" / "seed-0")["freezing"]
    assert all(row["kept"] == row["chosen"] for row in free["layers"])  # no token is sent elsewhere
    assert any(row["kept"] < row["chosen"] for row in result["freezing"]["layers"])


def test_models_have_the_tables_that_their_systems_name(tables, tabulated, seen):
    folder = tables.folder / "all"
    found = {
        name: tables_of(folder / name / "seed-0") for name in ("middle", "zeros", "random", "balanced", "learned")
    }
    assert found["middle"].shape == (2, 280, 2)
    assert not found["zeros"].any()
    for name in ("random", "balanced", "learned", "middle"):
        check_tables(found[name], 280, 6, 2)
    runs = {run["system"]: run for run in results_of(folder)["runs"]}
    loads = {name: max(run["load"][0]) * 6 for name, run in runs.items()}
    assert loads["zeros"] == 6
    assert loads["balanced"] < min(loads["random"], 1.5)
    assert loads["learned"] < 2
    assert runs["middle"]["transition"]["transition_step"] == 4
    teacher = AutoModelForCausalLM.from_pretrained(folder / "topk" / "seed-0")
    text = [{"input_ids": torch.tensor(batch)} for batch in seen]
    kept = count_routes(teacher, text, [0]).chosen[0]
    same = {name: kept.gather(1, found[name][0].long()).sum() for name in ("random", "balanced", "learned")}
    assert same["learned"] > 1.3 * max(same["random"], same["balanced"])


@pytest.mark.parametrize("step", [4, 8])
def test_a_killed_run_resumes_with_its_tables_and_experts(tables, tabulated, step):
    folder = tables.folder / f"cut-{step}"
    run = fork_script(tables, folder.name, "--only", "middle", before=fault("rotation", step, die))
    assert run.wait() == [-signal.SIGKILL], run.output[-3000:]
    assert not (folder / "middle" / "seed-0" / "results.json").exists()
    tables.train_here(folder.name, "--only", "middle")
    whole, cut = (tables.folder / parent / "middle" / "seed-0" for parent in ("all", folder.name))
    assert results_of(cut)["perplexity"] == results_of(whole)["perplexity"]
    assert torch.equal(tables_of(cut), tables_of(whole))
    assert_same_saved_weights(cut, whole)


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ("a: {config: {hidden_size: 16}}", "System 'a': transformers knows no `model_type` None"),
        ("a: {config: {model_type: olmoe, nope: 3}}", "System 'a': nope: no fields of OlmoeConfig"),
        (
            "a: {config: {model_type: olmoe}, hash_table: balanced, stage1_steps: 0.5}",
            "'a' has stage1_steps and hash_table",
        ),
        ("a: {config: {model_type: olmoe}, stage1_steps: 0.5, settled_change: 0.1}", "'a' has `settled_change` or"),
        ("a: {config: {model_type: olmoe}, hash_table: .}", "`hash_table` of the system 'a' must be one of"),
        ("a: {config: {model_type: olmoe}, model_of: b}", "System 'a' needs 'b' trained"),
        ("a: {config: {model_type: olmoe}, max_load: 0.5}", "`max_load` of the system 'a' must be at least 1"),
    ],
)
def test_tables_that_cannot_be_compared_are_one_line_and_train_nothing(tables, said, systems, message):
    (tables.folder / "bad.yaml").write_text(systems)
    assert re.search(message, said(tables, "--systems", "bad.yaml"))
    assert not (tables.folder / "new").exists()
