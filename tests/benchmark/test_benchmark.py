"""The benchmark script, run as users run it, and what it rests on."""

import json
import time
from statistics import median

import pytest
import torch

from helpers import ROOT
from helpers.workplaces import load_script, refuse
from modeling_stablemoe.benchmark import layer_parts as benchmark_layer_parts
from modeling_stablemoe.benchmark import model_parts as benchmark_model_parts
from modeling_stablemoe.benchmark.aims import AIMS, check_all
from modeling_stablemoe.benchmark.layers import (
    BUILDERS,
    LayerShape,
    build_contenders,
    count_active,
    draw_tokens,
    flops_per_token,
    run_training,
)
from modeling_stablemoe.benchmark.memory import ChildError, MemoryTask, available_memory, run_alone, too_large
from modeling_stablemoe.benchmark.models import EQUAL_DENSE, STEP_ARMS, Preset, build_model, describe
from modeling_stablemoe.benchmark.report import Report
from modeling_stablemoe.benchmark.shares import group_of
from modeling_stablemoe.benchmark.timing import Arm, Pace, compare, spread, take_turns


CPU = torch.device("cpu")
TINY = str(ROOT / "configuration" / "models" / "tiny.json")
SIZES = f"""--device cpu --tokens 32 --experts 2 3 --sublayers 2 --hidden_size 16 --intermediate_size 24 --rounds 3
    --model_preset {TINY} --batch_size 2 --generation_batches 1 2 --prompt_length 8 --new_tokens 3""".split()
script = load_script("benchmark")


def run(folder, *options: str) -> dict:
    script.main([*SIZES, "--output_dir", str(folder), *options])
    return json.loads((folder / "benchmark.json").read_text())


def cells_of(results: dict, part: str) -> list[dict]:
    return [cell for cell in results["cells"] if cell["part"] == part]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def results(folder):
    """What the script wrote, of all parts."""
    return run(folder)


def test_every_part_is_measured(results):
    expected = {"layer": 4, "experts": 1, "step": 1, "generation": 2, "memory": 3, "shares": 4}
    assert {part: len(cells_of(results, part)) for part in expected} == expected
    for cell in cells_of(results, "layer"):
        # Slow ones may have been left out: these never are.
        assert {"dense", "stablemoe grouped_mm"} <= set(cell["arms"])
        backends = {f"{name} {b}" for name in BUILDERS for b in ("eager", "grouped_mm", "batched_mm")}
        assert set(cell["arms"]) | set(cell["left_out"]) == {
            name for name in backends if name.split()[0] not in ("dense", "switch")
        } | {"dense", "switch"}
    assert set(cells_of(results, "experts")[0]["arms"]) == {"2", "3"}
    assert cells_of(results, "experts")[0]["cell"]["experts"] == "2 3"
    step = cells_of(results, "step")[0]
    assert set(step["arms"]) | set(step["left_out"]) == set(STEP_ARMS)
    assert [cell["cell"]["batch"] for cell in cells_of(results, "generation")] == [1, 2]
    assert {cell["cell"]["what"] for cell in cells_of(results, "memory")} == {"training", "inference", "loading"}
    assert set(results["machine"]) >= {
        "hardware",
        "features",
        "threads",
        "python",
        "torch",
        "transformers",
        "variables",
    }


def test_ratios_are_those_of_the_rounds(results):
    for cell in cells_of(results, "layer"):
        assert cell["ratios"]["dense"]["median"] == 1
        dense, ours = cell["arms"]["dense"], cell["arms"]["stablemoe grouped_mm"]
        assert len(dense) == len(ours) == 3
        ratio = cell["ratios"]["stablemoe grouped_mm"]
        assert ratio["median"] == median(one / other for one, other in zip(ours, dense, strict=True))
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
    for cell in cells_of(results, "memory"):
        assert all(len(peaks) == 3 for peaks in cell["arms"].values())
        assert cell["cell"]["what"] != "training" or min(map(min, cell["arms"].values())) > 0
    for cell in cells_of(results, "shares"):
        assert [sum(shares) for shares in zip(*cell["arms"].values(), strict=True)] == pytest.approx([1, 1, 1])
        assert all(0 < share < 1 for group in ("routing", "products") for share in cell["arms"][group])


def test_the_report_begins_with_the_aims(results, folder):
    text = (folder / "benchmark.md").read_text()
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings[0] == "Aims"
    assert headings[1:6] == [
        "The layer",
        "The layer: transformers' blocks, each beside the dense stack",
        "The layer by its number of experts",
        "A training step",
        "Generation",
    ]
    assert headings[6:8] == ["Memory", "What the layer's time goes to"]
    for aim in AIMS:
        assert aim.title in text
    judged = {check["aim"] for check in results["aims"]}
    assert "training step, stage 2 / Hash" in judged
    assert str(folder) not in text.replace(f"--output_dir {folder}", "")


def test_a_rerun_measures_what_is_missing(results, folder, capsys):
    path = folder / "benchmark.json"
    cut = dict(results)
    cut["cells"] = [cell for cell in results["cells"] if cell["part"] != "experts"]
    path.write_text(json.dumps(cut))
    again = run(folder)
    assert "## Aims" in capsys.readouterr().out
    assert [cell for cell in again["cells"] if cell["part"] != "experts"] == cut["cells"]
    assert [set(cell["arms"]) for cell in cells_of(again, "experts")] == [{"2", "3"}]
    assert cells_of(again, "experts") != cells_of(results, "experts")


def test_other_settings_are_refused_and_overwritten(results, folder, tmp_path):
    (tmp_path / "benchmark.json").write_text((folder / "benchmark.json").read_text())
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
    shape = LayerShape(64, 192, 4, 2, vocab_size=100, max_tokens=64)
    contenders = build_contenders(shape, list(BUILDERS), CPU, dtype)
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
            run_training(contender.module, hidden_states, token_ids, torch.ones_like(hidden_states))
        weights = [p for n, p in contender.module.named_parameters() if p.dim() > 1 and p.is_floating_point()]
        worked = [p for p in weights if p.grad is not None]
        assert len(worked) >= 4, name
        assert all(p.grad.abs().sum() > 0 for p in worked), name
        contender.module.zero_grad()


def test_switch_drops_no_token():
    shape = LayerShape(16, 24, 2, 1, max_tokens=64)
    contender = build_contenders(shape, ["switch"], CPU, torch.float32)["switch"]
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
    assert models["stage 1"].routing_stage == 1
    ids = torch.arange(config.vocab_size).unsqueeze(0)
    assert torch.equal(models["stage 2"].route(ids), models["hash"].route(ids))


def layer_record(tokens: int, ours: float, mixtral: float, direction="forward + backward", experts=32) -> dict:
    cell = {
        "dtype": "float32",
        "compiled": False,
        "tokens": tokens,
        "experts": experts,
        "sublayers": 3,
        "pass": direction,
    }
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
    cell = {"dtype": "float32", "tokens": 32768, "sublayers": 1, "pass": "forward + backward"}
    experts = {"part": "experts", "cell": cell, "arms": {"8": [1.0], "512": [1.25]}, "left_out": {}}
    assert verdicts([experts]) == {("512 experts / 8 experts", 1.3): True}
    arms = {"stage 2 grouped_mm, token": [1.2], f"{EQUAL_DENSE}, token": [1.0]}
    decoding = [{"part": "generation", "cell": {"batch": batch}, "arms": arms, "left_out": {}} for batch in (1, 8)]
    assert verdicts(decoding) == {("a token at batch 1 / the dense model of equal active parameters", 1.1): False}


class Handmade:
    """Records that nobody measured."""

    settings = {"backends": ["eager", "grouped_mm"], "device": "cpu"}
    cells = [layer_record(4096, 1.2, 1.3), layer_record(4096, 1.4, 1.6, "forward"), step_record()]


def test_the_report_writes_the_verdict_beside_the_ratio():
    report = Report(Handmade())
    aims = report.aims_table().splitlines()
    rows = {line.split("|")[1].strip(): [part.strip() for part in line.split("|")[2:-1]] for line in aims[2:]}
    training, forward = AIMS[0].title, AIMS[1].title
    assert rows[training][:2] == ["1.25", "1.20 [1.20-1.20]"]
    assert rows[training][-1] == "ok (1 of 1)"
    assert rows[forward][-1] == "missed (0 of 1)"
    assert rows["512 experts / 8 experts, 32768 tokens"][1] == "not measured"
    first, second = report.layer_table().splitlines()[2:]
    assert "1.20 [1.20-1.20] ok" in first
    assert "1.40 [1.40-1.40] missed" in second
    assert "0.92 [0.92-0.92] ok" in first
    assert "mixtral grouped_mm" in first
    assert "1.00 [1.00-1.00] ok" in report.step_table()  # 2.0 times the time for twice the FLOPs


def test_arms_take_turns():
    order, resets = [], []

    def arm(name: str, seconds: float = 0.02, **options) -> Arm:
        def work():
            order.append(name)
            time.sleep(seconds)

        return Arm(name, work, lambda: resets.append(name), **options)

    def fail():
        raise RuntimeError("no memory\nat all")

    arms = [arm("a"), arm("b"), arm("slow", 0.3), arm("kept", 0.3, is_kept=True), Arm("broken", fail)]
    turns = take_turns(arms, Pace(rounds=4, warm_up=1, give_up=5), CPU)
    assert order[4:] == "a b kept b kept a kept a b a b kept".split()
    assert resets == order
    assert {name: len(values) for name, values in turns.seconds.items()} == {"a": 4, "b": 4, "kept": 4}
    assert turns.left_out["broken"] == "RuntimeError: no memory"
    assert "times as long as the fastest" in turns.left_out["slow"]
    assert compare(turns.seconds, "kept", "a")["median"] > 5
    assert compare(turns.seconds, "slow", "a") is None


def test_a_slow_cell_ends_after_three_rounds():
    turns = take_turns([Arm("a", lambda: time.sleep(0.02))], Pace(rounds=9, warm_up=1, seconds=0.01), CPU)
    assert len(turns.seconds["a"]) == 3


def test_spread_is_median_and_quartiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_what_does_not_fit_is_left_out_with_the_reason(tmp_path, monkeypatch):
    for module in (benchmark_layer_parts, benchmark_model_parts):
        monkeypatch.setattr(module, "available_memory", lambda device: 200_000)
    results = run(tmp_path, "--parts", "layer", "step", "--experts", "2", "30")
    by_experts = {cell["cell"]["experts"]: cell for cell in cells_of(results, "layer")}
    assert "GB are free" in by_experts[30]["left_out"]["stablemoe"]
    assert "copies a matrix a token" in by_experts[2]["left_out"]["stablemoe batched_mm"]
    assert "dense" in by_experts[2]["arms"]
    assert "30" in cells_of(results, "experts")[0]["left_out"]
    assert cells_of(results, "step")[0]["arms"] == {}
    assert "| reason" in (tmp_path / "benchmark.md").read_text()
    monkeypatch.setattr(benchmark_layer_parts, "BANDWIDTH", {"cpu": 1.0})
    results = run(tmp_path, "--parts", "layer", "--experts", "4")
    left_out = [cell["left_out"] for cell in cells_of(results, "layer") if cell["cell"]["experts"] == 4]
    assert ["once an expert" in reasons.get("olmoe eager", "") for reasons in left_out] == [False, True]
    assert too_large(80, 100) is None
    assert too_large(1e12, 0) is None  # unknown
    assert available_memory(CPU) > 1e6


def test_a_process_that_fails_says_why():
    task = MemoryTask(Preset(TINY), "stage 2", "loading", 2, torch.float32, CPU, str(ROOT / "nowhere"))
    with pytest.raises(ChildError, match="nowhere"):
        run_alone(task)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::sort", "sorting"),
        ("aten::index_select", "gathering"),
        ("aten::embedding_dense_backward", "gathering"),
        ("aten::addmm", "products"),
        ("aten::_grouped_mm", "products"),
        ("transformers::grouped_mm_fallback", "products"),
        ("another::kernel", "products"),
        ("aten::relu", "other"),
    ],
)
def test_operators_have_groups(name, group):
    assert group_of(name) == group


def test_half_precision_has_cells_of_its_own(tmp_path):
    results = run(tmp_path, "--parts", "step", "generation", "--dtypes", "bfloat16", "--generation_batches", "1")
    for part, ours in (("step", "stage 1"), ("generation", "stage 2 grouped_mm, token")):
        (cell,) = cells_of(results, part)
        assert cell["cell"]["dtype"] == "bfloat16"
        assert ours in cell["ratios"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_part_is_measured_on_a_gpu(tmp_path):
    results = run(tmp_path, "--device", "cuda")
    for part in ("layer", "experts", "step", "generation", "memory", "shares"):
        cells = cells_of(results, part)
        assert {cell["cell"]["dtype"] for cell in cells} == {"float32", "bfloat16"}
        assert all(cell["arms"] for cell in cells), part
    assert results["machine"]["cuda"]


@pytest.mark.slow
def test_compiled_contenders_are_measured_beside_each_other(tmp_path):
    options = ["--parts", "layer", "generation", "--compile", "true", "--experts", "2", "--generation_batches", "1"]
    results = run(tmp_path, *options)
    for part, ours in (("layer", "stablemoe grouped_mm"), ("generation", "stage 2 grouped_mm, token")):
        cells = [cell for cell in cells_of(results, part) if cell["cell"]["compiled"]]
        assert cells
        for cell in cells:
            assert ours in cell["ratios"]
            assert all("unroll" in reason for name, reason in cell["left_out"].items() if "eager" in name)
