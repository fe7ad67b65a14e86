"""The benchmark script, run as users run it, and what it rests on."""

import itertools
import json
import os
import subprocess
import sys
import time
from statistics import median

import pytest
import torch

from helpers import ROOT
from helpers.workplaces import load_script, refuse
from modeling_stablemoe.benchmark import memory, parts, turns
from modeling_stablemoe.benchmark.layers import (
    BUILDERS,
    LayerShape,
    build_contender,
    count_active,
    draw_tokens,
    flops_per_token,
)
from modeling_stablemoe.benchmark.memory import measure_memory, too_large
from modeling_stablemoe.benchmark.models import (
    EQUAL_DENSE,
    EQUAL_SIZE,
    STEP_ARMS,
    Preset,
    build_model,
    count_parameters,
    describe,
)
from modeling_stablemoe.benchmark.report import AIMS, HEADINGS, check_all, ratios_of, to_markdown
from modeling_stablemoe.benchmark.turns import compare, profile_operators, spread, take_turns
from modeling_stablemoe.measure.machine import ChildError, available_memory, run_alone


CPU = torch.device("cpu")
TINY = str(ROOT / "configuration" / "models" / "tiny.json")
SIZES = f"""--device cpu --tokens 32 --experts 2 3 --sublayers 2 --hidden_size 16 --intermediate_size 24 --rounds 2
    --model_preset {TINY} --batch_size 2 --generation_batches 1 --prompt_length 8 --new_tokens 3""".split()
script = load_script("benchmark")


def run(folder, *options: str) -> dict:
    script.main([*SIZES, "--output_dir", str(folder), *options])
    return json.loads((folder / "benchmark.json").read_text())


def cells_of(results: dict, part: str) -> list[dict]:
    return [cell for cell in results["cells"] if cell["part"] == part]


@pytest.fixture(scope="module", autouse=True)
def short_turns():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "SHORTEST_TURN", 1e-4)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def results(folder):
    """What the script wrote, of all parts; where fresh processes would be, it measures few models in this one."""
    peaks = itertools.count()
    few = {"training": ("stage 2", EQUAL_DENSE), "inference": ("stage 2",), "loading": (EQUAL_SIZE,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MEMORY_ROUNDS", 1)
        patch.setattr(parts, "ARMS", few)
        patch.setattr(parts, "run_alone", lambda function, **arguments: function(**arguments))
        patch.setattr(memory, "peak_memory", lambda device: next(peaks))  # what is free already would serve
        return run(folder)


def test_every_part_is_measured(results):
    expected = {"layer": 4, "experts": 1, "step": 1, "generation": 1, "memory": 3, "loading": 1, "shares": 4}
    assert {part: len(cells_of(results, part)) for part in expected} == expected
    backends = {f"{name} {b}" for name in BUILDERS for b in ("eager", "grouped_mm", "batched_mm")}
    backends = {name for name in backends if name.split()[0] not in ("dense", "switch")} | {"dense", "switch"}
    for cell in cells_of(results, "layer"):
        # Slow ones may have been left out: these never are.
        assert {"dense", "stablemoe grouped_mm"} <= set(cell["arms"])
        assert set(cell["arms"]) | set(cell["left_out"]) == backends
    assert set(cells_of(results, "experts")[0]["arms"]) == {"2", "3"}
    step = cells_of(results, "step")[0]
    assert set(step["arms"]) | set(step["left_out"]) == set(STEP_ARMS)
    assert "stage 2 grouped_mm, token" in cells_of(results, "generation")[0]["ratios"]
    assert set(results["machine"]) >= {"hardware", "features", "threads", "torch", "transformers", "variables"}


def test_ratios_are_those_of_the_rounds(results):
    for cell in cells_of(results, "layer"):
        dense, ours = cell["arms"]["dense"], cell["arms"]["stablemoe grouped_mm"]
        assert len(dense) == len(ours) == 2
        ratio = cell["ratios"]["stablemoe grouped_mm"]
        assert ratio["median"] == median(one / other for one, other in zip(ours, dense, strict=True))
        assert cell["ratios"]["dense"]["median"] == 1
    for cell in cells_of(results, "memory"):
        assert cell["arms"].keys() == cell["parameter_bytes"].keys()
        assert [peaks for peaks in cell["arms"].values() if peaks != [1]] == []
    for cell in cells_of(results, "shares"):
        assert [sum(shares) for shares in zip(*cell["arms"].values(), strict=True)] == pytest.approx([1, 1, 1])
        assert any("mm" in name for name in cell["arms"])


def test_the_report_begins_with_the_aims(results, folder):
    text = (folder / "benchmark.md").read_text()
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert [heading for heading in headings if heading != "Left out"] == ["Aims", *HEADINGS.values()]
    assert "Times are in" in text  # torch's own table
    assert all(aim.title in text for aim in AIMS)
    assert "training step, stage 2 / Hash" in {check["aim"] for check in results["aims"]}
    assert str(folder) not in text.replace(f"--output_dir {folder}", "")


def test_a_rerun_measures_what_is_missing_and_refuses_other_settings(results, tmp_path, capsys):
    cut = {**results, "cells": [cell for cell in results["cells"] if cell["part"] != "experts"]}
    (tmp_path / "benchmark.json").write_text(json.dumps(cut))
    again = run(tmp_path)
    assert "## Aims" in capsys.readouterr().out
    assert [cell for cell in again["cells"] if cell["part"] != "experts"] == cut["cells"]
    assert [set(cell["arms"]) for cell in cells_of(again, "experts")] == [{"2", "3"}]
    assert cells_of(again, "experts") != cells_of(results, "experts")
    options = [*SIZES, "--output_dir", str(tmp_path), "--parts", "shares", "--hidden_size", "24"]
    assert "hidden_size: 16 there, 24 here" in refuse(script.main, options)
    script.main([*options, "--overwrite"])
    assert {cell["part"] for cell in json.loads((tmp_path / "benchmark.json").read_text())["cells"]} == {"shares"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "layers"], "--parts must be one or more of layer, step"),
        (["--dtypes", "float16"], "--dtypes must be one or more of float32, bfloat16"),
        (["--backends", "sonic"], "--backends must be one or more of eager"),
        (["--tokens", "0"], "--tokens must be different numbers >= 1"),
        (["--experts", "4", "4"], "--experts must be different numbers"),
        (["--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--new_tokens", "60"], "but the model has 64 positions"),
        (["--config_overrides", "3"], "must be a JSON object"),
        (["--model_preset", "nowhere.json"], "There is no model preset"),
        (["--config_overrides", '{"moe_layer_positions": []}'], "has no MoE layer to measure"),
        (["--config_overrides", '{"distilled_router": "cnn"}'], "distilled into one of"),
        (["--model_preset", TINY.replace("tiny", "translation-cpu-small")], "is of another kind"),
    ],
)
def test_bad_options_are_one_line(options, message, tmp_path):
    assert message in refuse(script.main, [*SIZES, "--output_dir", str(tmp_path / "new"), *options])
    assert not (tmp_path / "new").exists()


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "benchmark.json").write_text("{}")
    assert "is no file of a benchmark" in refuse(script.main, [*SIZES, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_do_equal_work(dtype):
    shape = LayerShape(64, 192, 4, 2, max_tokens=64)
    contenders = {name: build_contender(name, shape, CPU, dtype) for name in BUILDERS}
    hidden_states, token_ids = draw_tokens(shape, 64, CPU, dtype)
    hidden_states.requires_grad_()
    dense = contenders["dense"]
    active, flops = count_active(dense.module, 4)[0], flops_per_token(dense, shape)
    assert flops == 2 * 2 * 2 * 64 * 192
    for name, contender in contenders.items():
        assert count_active(contender.module, 4)[0] == pytest.approx(active, rel=0.02), name
        assert flops_per_token(contender, shape) == pytest.approx(flops, rel=0.02), name
        for backend in ("eager", "grouped_mm", "batched_mm"):
            contender.use(backend)
            contender.module(hidden_states, token_ids).backward(torch.ones_like(hidden_states))
        weights = [p for n, p in contender.module.named_parameters() if p.dim() > 1 and p.is_floating_point()]
        worked = [p for p in weights if p.grad is not None]
        assert len(worked) >= 4, name
        assert all(p.grad.abs().sum() > 0 for p in worked), name


def test_gated_blocks_share_experts():
    shape = LayerShape(16, 24, 2, 1)
    owner = build_contender("mixtral", shape, CPU, torch.float32)
    other = build_contender("olmoe", shape, CPU, torch.float32, owner)
    assert other.module.blocks[0].experts.down_proj is owner.module.blocks[0].experts.down_proj


def test_switch_drops_no_token():
    shape = LayerShape(16, 24, 2, 1, max_tokens=64)
    contender = build_contender("switch", shape, CPU, torch.float32)
    hidden_states, token_ids = draw_tokens(shape, 64, CPU, torch.float32)
    changed = (contender.module(hidden_states, token_ids) - hidden_states).abs().sum(-1) > 0
    assert changed.all()


def test_models_have_equal_active_parameters():
    preset = Preset(TINY)
    config = preset.config()
    models = {name: build_model(preset, name, CPU) for name in STEP_ARMS}
    sizes = {name: describe(model, config.num_experts, 32) for name, model in models.items()}
    equal = sizes[EQUAL_DENSE]
    assert sizes["dense"]["flops"] < equal["flops"]
    for name in ("stage 2", "hash", "switch", "base"):
        assert sizes[name]["flops"] == pytest.approx(equal["flops"], rel=0.01), name
    for name in ("stage 2", "olmoe", "mixtral"):
        assert sizes[name]["active_parameters"] == pytest.approx(equal["active_parameters"], rel=0.06), name
    assert count_parameters(preset, EQUAL_SIZE) == pytest.approx(sizes["stage 2"]["parameters"], rel=0.06)
    assert models["stage 1"].routing_stage == 1
    ids = torch.arange(config.vocab_size).unsqueeze(0)
    assert torch.equal(models["stage 2"].route(ids), models["hash"].route(ids))


def layer_record(tokens: int, ours: float, mixtral: float, direction="forward + backward", experts=32) -> dict:
    cell = {"dtype": "float32", "tokens": tokens, "experts": experts, "sublayers": 3, "pass": direction}
    arms = {"stablemoe grouped_mm": [ours] * 3, "dense": [1.0] * 3, "mixtral eager": [9.0] * 3}
    arms["mixtral grouped_mm"] = [mixtral] * 3
    return {"part": "layer", "cell": cell, "arms": arms, "left_out": {}}


def step_record() -> dict:
    arms = {"stage 1": [2.2], "stage 2": [2.0], "hash": [1.9], "dense": [1.0]}
    models = {name: {"flops": 2.0, "parameters": 1, "active_parameters": 1} for name in arms}
    models["dense"]["flops"] = 1.0
    return {"part": "step", "cell": {"dtype": "float32"}, "arms": arms, "left_out": {}, "models": models}


def verdicts(cells: list[dict], is_gpu: bool = False) -> dict:
    return {
        (check["aim"].split(",")[0], check["at_most"]): check["is_met"]
        for check in check_all(cells, "grouped_mm", is_gpu)
    }


def test_verdicts():
    blocks = ("layer / the fastest of transformers' own blocks", 1.0)
    dense = "layer / dense stack of equal FLOPs"
    assert verdicts([layer_record(4096, 1.2, 1.3)]) == {(dense, 1.25): True, blocks: True}
    assert verdicts([layer_record(4096, 1.3, 1.2)]) == {(dense, 1.25): False, blocks: False}
    assert verdicts([layer_record(4096, 1.2, 1.3)], is_gpu=True) == {blocks: True}
    assert verdicts([layer_record(32768, 1.2, 1.3)], is_gpu=True) == {(dense, 1.15): False, blocks: True}
    assert verdicts([layer_record(4096, 1.05, 1.0, "forward")]) == {(dense, 1.1): True, blocks: False}
    assert (
        verdicts([layer_record(512, 5.0, 6.0)])
        == verdicts([layer_record(4096, 5.0, 6.0, experts=8)])
        == {blocks: True}
    )
    assert verdicts([step_record()]) == {
        ("training step", 1.0): False,  # stage 2 / hash
        ("training step", 1.05): False,  # stage 1 / stage 2
        ("training step", 1.15): True,  # stage 2: twice the time, twice the FLOPs
    }
    cell = {"dtype": "float32", "tokens": 32768, "experts": "8 512", "sublayers": 1, "pass": "forward + backward"}
    experts = {"part": "experts", "cell": cell, "arms": {"8": [1.0], "512": [1.25]}, "left_out": {}}
    assert verdicts([experts]) == {("512 experts / 8 experts", 1.3): True}
    arms = {"stage 2 grouped_mm, token": [1.2], f"{EQUAL_DENSE}, token": [1.0]}
    decoding = [{"part": "generation", "cell": {"batch": batch}, "arms": arms, "left_out": {}} for batch in (1, 8)]
    assert verdicts(decoding) == {("a token at batch 1 / the dense model of equal active parameters", 1.1): False}


def test_the_report_writes_the_verdict_beside_the_ratio():
    machine = {"hardware": "none", "features": [], "threads": "1", "variables": {}}
    machine |= dict.fromkeys(("python", "torch", "transformers"), "0")
    settings = {"backends": ["eager", "grouped_mm"], "device": "cpu"}
    cells = [layer_record(4096, 1.2, 1.3), layer_record(4096, 1.4, 1.6, "forward"), step_record()]
    lines = to_markdown({"machine": machine, "settings": settings, "commands": [], "cells": cells}).splitlines()
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    aims = {row[0]: row[1:] for row in rows}
    assert aims[AIMS[0].title][:2] == ["1.25", "1.20 [1.20-1.20]"]
    assert aims[AIMS[0].title][-1] == "ok (1 of 1)"
    assert aims[AIMS[1].title][-1] == "missed (0 of 1)"
    assert aims["512 experts / 8 experts, 32768 tokens"][1] == "not measured"
    first = aims["float32, 4096 tokens, 32 experts, 3 sublayers, forward + backward"]
    assert {"1.20 [1.20-1.20] ok", "0.92 [0.92-0.92] ok"} < set(first)
    assert "1.40 [1.40-1.40] missed" in aims["float32, 4096 tokens, 32 experts, 3 sublayers, forward"]
    assert "1.00 [1.00-1.00] ok" in aims["float32"]  # 2.0 times the time for twice the FLOPs


def test_what_was_measured_earlier_is_reported_alike():
    kept = ROOT / "results" / "benchmark-cpu.json"
    results = json.loads(kept.read_text())
    for record in results["cells"]:
        earlier = record["ratios"]
        assert {name: ratio for name, ratio in ratios_of(record).items() if name in earlier} == earlier
    assert to_markdown(results).split("## ")[1] == kept.with_suffix(".md").read_text().split("## ")[1]


def test_contenders_take_turns():
    order = []

    def contender(name: str, seconds: float = 0.005):
        def work():
            order.append(name)
            time.sleep(seconds)

        return work

    def fail():
        raise RuntimeError("no memory\nat all")

    runs = {"a": contender("a"), "b": contender("b"), "slow": contender("slow", 0.1), "kept": contender("kept", 0.1)}
    times, left_out = take_turns({**runs, "broken": fail}, rounds=4, give_up=5, always=("kept",))
    rounds = order[order.index("kept") :]
    changes = [name for last, name in zip([None, *rounds], rounds, strict=False) if name != last]
    assert changes == "kept a b kept b kept a kept a b a b kept".split()
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "kept": 4}
    assert left_out["broken"] == "RuntimeError: no memory"
    assert "times as long as the fastest" in left_out["slow"]
    assert compare(times, "kept", "a")["median"] > 5
    assert compare(times, "slow", "a") is None


def test_a_slow_cell_ends_after_three_rounds():
    times, _ = take_turns({"a": lambda: time.sleep(0.02)}, rounds=9, seconds=0.01)
    assert len(times["a"]) == 3


def test_a_profile_names_operators():
    left, right = torch.ones(64, 64), torch.ones(64, 64)
    shares = profile_operators(lambda: (left @ right).sort(), CPU, passes=2)
    assert shares["aten::mm"][0] > 0
    assert "aten::sort" in shares
    assert [sum(each) for each in zip(*shares.values(), strict=True)] == pytest.approx([1, 1])


def test_spread_is_median_and_quartiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_what_does_not_fit_is_left_out_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "available_memory", lambda device: 200_000)
    monkeypatch.setattr(parts, "BANDWIDTH", {"cpu": 1.0})
    options = ["--parts", "layer", "step", "--experts", "2", "30", "--backends", "eager", "batched_mm"]
    results = run(tmp_path, *options)
    forward, backward, large, _ = cells_of(results, "layer")
    assert "GB are free" in large["left_out"]["stablemoe"]
    assert "copies a matrix per token" in forward["left_out"]["stablemoe batched_mm"]
    assert "dense" in forward["arms"]
    assert ["once per expert" in cell["left_out"].get("olmoe eager", "") for cell in (forward, backward)] == [0, 1]
    assert "30" in cells_of(results, "experts")[0]["left_out"]
    assert cells_of(results, "step")[0]["arms"] == {}
    assert "| reason" in (tmp_path / "benchmark.md").read_text()
    assert too_large(80, 100) is None
    assert too_large(1e12, 0) is None  # unknown
    assert available_memory(CPU) > 1e6


@pytest.mark.slow
def test_a_process_that_fails_says_why():
    task = {"preset": Preset(TINY), "name": "stage 2", "what": "loading", "batch_size": 2, "dtype": torch.float32}
    with pytest.raises(ChildError, match="nowhere"):
        run_alone(measure_memory, **task, device=CPU, folder=str(ROOT / "nowhere"))


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)])
def test_every_part_is_measured_in_both_dtypes(tmp_path, device):
    results = run(tmp_path, "--device", device, "--dtypes", "float32", "bfloat16")
    for part in ("layer", "experts", "step", "generation", "memory", "loading", "shares"):
        cells = cells_of(results, part)
        assert {cell["cell"]["dtype"] for cell in cells} == {"float32", "bfloat16"}
        assert all(cell["arms"] for cell in cells), part
    for cell in cells_of(results, "memory"):
        assert all(len(peaks) == 3 for peaks in cell["arms"].values())
        assert cell["cell"]["what"] != "training" or min(map(min, cell["arms"].values())) > 0
    assert ("cuda" in results["machine"]) == (device == "cuda")


@pytest.mark.slow
def test_compiled_contenders_are_measured_beside_each_other(tmp_path):
    options = "--parts layer generation --compile true --experts 2 --sublayers 1 --backends eager grouped_mm".split()
    results = run(tmp_path, *options)
    for part, ours in (("layer", "stablemoe grouped_mm"), ("generation", "stage 2 grouped_mm, token")):
        cells = [cell for cell in cells_of(results, part) if cell["cell"]["compiled"]]
        assert cells
        for cell in cells:
            assert ours in cell["ratios"]
            assert all("unroll" in reason for name, reason in cell["left_out"].items() if "eager" in name)


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_whole_at_toy_size(tmp_path):
    script = ROOT / "tests/helpers/scripts/check_gpu.sh"
    environment = os.environ | {"DEVICE": "cpu", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(["bash", script, tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count(": passed") == 6
