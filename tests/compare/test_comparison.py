"""The parts of a comparison: systems, hash tables, sizes, summaries, figures."""

import re
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from helpers import ROOT
from helpers.backbones import dense_model
from helpers.models import tiny_model, tiny_seq2seq_model
from helpers.trainers import BLOCKS, make_trainer, training_logs
from modeling_stablemoe import RoutingStatisticsCallback, StableMoEForCausalLM
from modeling_stablemoe.compare.comparison import measure_routing, read_systems
from modeling_stablemoe.compare.comparison_report import format_comparison, summarize_systems, write_figures
from modeling_stablemoe.compare.tables import mean_report
from modeling_stablemoe.compare.upcycling import mixtral_config, mixtral_of
from modeling_stablemoe.measure.flops import count_parameters, forward_flops
from modeling_stablemoe.runs.recipes import RoutingArguments, load_preset
from modeling_stablemoe.runs.run import set_hash_tables
from modeling_stablemoe.solvers.hash_tables import balanced_hash_table, count_tokens
from modeling_stablemoe.tables import FreezingReport, LayerFreezing
from modeling_stablemoe.training import TrainingClockCallback


# Those of a conversion, and of models of transformers, are tried with their recipes.
OTHERS = {*ROOT.glob("configuration/systems/upcycling*"), ROOT / "configuration/systems/tables-cpu.yaml"}
SYSTEMS = sorted(set(ROOT.glob("configuration/systems/*.yaml")) - OTHERS)


# Systems


def systems_file(tmp_path, text: str) -> Path:
    path = tmp_path / "systems.yaml"
    path.write_text(text)
    return path


def test_systems_are_read_in_order_with_their_families(tmp_path):
    path = systems_file(
        tmp_path, "b: {config: {num_experts: 8}, stage1_steps: 0.1, family: x}\na:\nc: {stage1_steps: 5}\n"
    )
    systems = read_systems(path)
    assert [(s.name, s.family, s.stage1_steps, s.config) for s in systems] == [
        ("b", "x", "0.1", {"num_experts": 8}),
        ("a", "a", None, {}),
        ("c", "c", "5", {}),
    ]
    assert [s.routing(0, 1).stage1 for s in systems] == [0.1, None, 5]
    assert [s.name for s in read_systems(path, ["c", "b"])] == ["b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("a: {nope: 1}", "'a'.*unknown settings.*nope"),
        ("a: {config: 3}", "`config` of the system 'a'"),
        ("a: {stage1_steps: ten}", "System 'a': `--stage1_steps`"),
        ("a: {hash_table: even}", "System 'a': `--hash_table` must be one of"),
        ("a/b: {}", "name of a folder"),
        ("a: {learning_rate: fast}", "`learning_rate` of the system 'a' must be a number > 0, got 'fast'"),
        ("a: {}", "no system .'z'. in"),
    ],
)
def test_bad_systems_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_systems(systems_file(tmp_path, text), ["z"] if "z" in message else [])
    with pytest.raises(FileNotFoundError, match="configuration/systems/"):
        read_systems(tmp_path / "nothing.yaml")


def test_a_system_takes_the_tables_of_its_seed(tmp_path):
    (tmp_path / "teacher-1").mkdir()
    (system,) = read_systems(systems_file(tmp_path, f'a: {{hash_table: "{tmp_path}/teacher-{{seed}}"}}'))
    assert system.of_seed(1).routing(0, 0).hash_table == f"{tmp_path}/teacher-1"
    with pytest.raises(ValueError, match="System 'a': `--hash_table` must be one of .*teacher-2"):
        system.of_seed(2)


@pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)
def test_every_system_that_is_shipped_fits_its_preset(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in re.findall(r'hash_table: "(runs/[^"]*)"', path.read_text()):  # of another run
        Path(folder.format(seed=3)).mkdir(parents=True)
    preset = "compare-cpu" if "cpu" in path.stem else "paper-base"
    for system in read_systems(path):
        system.of_seed(3)
        config = load_preset(ROOT / "configuration" / "models" / f"{preset}.json", **system.config)
        assert (system.stage1_steps is None) or config.distilled_router is not None
        assert config.balance_loss_coef == (0.01 if config.router_type == "switch" else config.balance_loss_coef)


@pytest.mark.parametrize(("path", "preset"), [("table2-paper", "paper-base"), ("table2-dense-cpu", "compare-cpu")])
def test_deeper_and_wider_models_have_as_many_parameters_as_the_experts_bring(path, preset):
    preset = ROOT / "configuration" / "models" / f"{preset}.json"
    size = {}
    for system in read_systems(ROOT / "configuration" / "systems" / f"{path}.yaml"):
        with torch.device("meta"):
            model = StableMoEForCausalLM(load_preset(preset, **system.config))
        size[system.name] = count_parameters(model)
    whole = sum(size["stablemoe"].values())
    for name in ("deeper", "wider"):
        assert size[name]["experts"] == 0
        assert abs(size[name]["shared"] / whole - 1) < 0.03


# Tables in models of transformers


def test_freezing_is_averaged_over_seeds_layer_by_layer():
    def report(perplexity: float) -> dict:
        shares = [perplexity / 100] * 7
        layers = [LayerFreezing(layer, *shares, 3 * layer, perplexity, 2 * perplexity) for layer in (0, 2)]
        return asdict(FreezingReport(8, 2, 1.2, 100, 50, perplexity, layers))

    averaged, expected = asdict(mean_report([report(10.0), report(14.0)])), report(12.0)
    for row, rows in zip(averaged.pop("layers"), expected.pop("layers"), strict=True):
        assert row == pytest.approx(rows)
    assert averaged == expected


# Hash tables


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=80), st.integers(1, 9), st.integers(0, 3))
def test_a_balanced_table_is_as_even_as_its_most_frequent_tokens_let_it_be(counts, num_experts, seed):
    counts = torch.tensor(counts)
    table = balanced_hash_table(counts, num_experts, seed)
    assert table.shape == counts.shape
    assert 0 <= table.min() <= table.max() < num_experts
    load = torch.zeros(num_experts, dtype=torch.long).scatter_add_(0, table, counts)
    # The last id given to the heaviest expert found it the lightest.
    heaviest = int(load.argmax())
    smallest = counts[table == heaviest].min() if (table == heaviest).any() else 0
    assert load.max() <= counts.sum() / num_experts + smallest
    assert torch.equal(table, balanced_hash_table(counts, num_experts, seed))
    if not counts.any():
        assert table.bincount(minlength=num_experts).max() - table.bincount(minlength=num_experts).min() <= 1


def test_tables_of_other_seeds_differ_and_leave_the_random_state():
    counts = torch.ones(60, dtype=torch.long)
    state = torch.get_rng_state()
    assert not torch.equal(balanced_hash_table(counts, 4, 0), balanced_hash_table(counts, 4, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_are_counted_in_rows_of_any_length():
    rows = Dataset.from_dict({"input_ids": [[1, 2, 2], [5], []], "labels": [[0], [0, 3], [3]]})
    assert count_tokens(rows, 6).tolist() == [0, 1, 2, 0, 0, 1]
    assert count_tokens(rows, 6, "labels").tolist() == [2, 0, 0, 2, 0, 0]
    stream = IterableDataset.from_generator(lambda: iter([{"input_ids": [1]}]))
    with pytest.raises(ValueError, match="streamed corpus cannot be counted"):
        count_tokens(stream, 6)


@pytest.mark.parametrize("k", [1, 2])
def test_a_model_is_routed_by_the_hash_table_that_is_asked_for(k):
    rows = Dataset.from_dict({"input_ids": [[token % 40 for token in range(start, start + 16)] for start in range(9)]})
    for overrides in ({"router_type": "hash"}, {}):
        model = tiny_model(**overrides, moe_layer_positions=[0, 2], num_experts_per_tok=k)
        before = model.router_fingerprint()
        set_hash_tables(model, RoutingArguments(), rows)
        assert model.router_fingerprint() == before
        set_hash_tables(model, RoutingArguments(hash_table="balanced"), rows)
        assert model.routing_stage == 2
        assert model.config.router_fingerprint == model.router_fingerprint() != before
        ids = torch.tensor(rows["input_ids"])
        for route in model.route(ids):
            load = route.flatten().bincount(minlength=5)
            assert load.sum() == 144 * k
            assert load.max() - load.min() <= 6  # of 144, spread over 24 ids of up to 9
        assert not torch.equal(*model.route(torch.arange(99).unsqueeze(0)[:, :60]))
        set_hash_tables(model, RoutingArguments(hash_table="random"), rows)
        assert model.routing_stage == 2
    with pytest.raises(ValueError, match="there is no stage 1, unset `--stage1_steps`"):
        set_hash_tables(model, RoutingArguments(stage1_steps="0.1", hash_table="random"), rows)


@pytest.mark.parametrize("k", [1, 2])
def test_a_model_is_routed_by_the_tables_of_a_checkpoint(tmp_path, k):
    source, model = tiny_model(num_experts_per_tok=k), tiny_model(seed=1, num_experts_per_tok=k)
    source.save_pretrained(tmp_path / "learning")
    source.freeze_router()
    source.save_pretrained(tmp_path / "frozen")
    rows = Dataset.from_dict({"input_ids": [[1, 2]]})
    set_hash_tables(model, RoutingArguments(hash_table=str(tmp_path / "frozen")), rows)
    assert model.router_fingerprint() == source.router_fingerprint()
    with pytest.raises(ValueError, match="has no frozen routing tables"):
        set_hash_tables(model, RoutingArguments(hash_table=str(tmp_path / "learning")), rows)
    with pytest.raises(ValueError, match=r"must be one of .* or the folder of a frozen checkpoint"):
        RoutingArguments(hash_table=str(tmp_path / "nothing"))


@pytest.mark.parametrize("hash_table", [None, "random", "balanced"])
@pytest.mark.parametrize("router_type", ["hash", "stable"])
def test_the_heaviest_ids_are_split_and_spread(hash_table, router_type, tmp_path, caplog):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 40, (20, 50), generator=draw)
    ids[torch.rand(ids.shape, generator=draw) < 0.4] = 3
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    torch.manual_seed(0)
    model = tiny_model(router_type=router_type, vocab_size=40, moe_layer_positions=[0, 2]).eval()
    arguments = RoutingArguments(split_tokens=1, hash_table=hash_table)
    with caplog.at_level("INFO", "modeling_stablemoe.runs.run"):
        set_hash_tables(model, arguments, rows)
    assert "1 most frequent token ids, 4" in caplog.text
    assert "least load max/mean that a table can have goes from 2." in caplog.text
    assert caplog.text.rstrip().endswith("to 1.00.")
    assert model.config.split_token_ids == [3]
    is_learned = router_type == "stable" and hash_table is None
    assert model.routing_stage == (1 if is_learned else 2)
    if is_learned:
        return
    load = torch.stack([route.flatten().bincount(minlength=5) for route in model.route(ids)]).double()
    assert load.max() / load.mean() < (1.05 if hash_table == "balanced" else 1.95)
    fingerprint = model.router_fingerprint()
    model.save_pretrained(tmp_path)
    other = tiny_model(router_type=router_type, vocab_size=40, moe_layer_positions=[0, 2], seed=1)
    with pytest.raises(
        ValueError, match="split other token ids than this model: train it with the `--split_tokens` of that"
    ):
        set_hash_tables(other, RoutingArguments(hash_table=str(tmp_path)), rows)
    set_hash_tables(other, RoutingArguments(split_tokens=1, hash_table=str(tmp_path)), rows)
    assert other.router_fingerprint() == fingerprint
    again = StableMoEForCausalLM.from_pretrained(tmp_path)
    set_hash_tables(again, RoutingArguments(split_tokens=1, hash_table=str(tmp_path)), rows)  # they are split already
    assert again.router_fingerprint() == fingerprint
    with pytest.raises(ValueError, match="`--split_tokens` is a number of token ids, 0 or more, got -1"):
        RoutingArguments(split_tokens=-1)


def test_encoder_and_decoder_are_balanced_by_their_own_tokens():
    model = tiny_seq2seq_model(router_type="hash")
    sources, targets = torch.arange(2, 42), torch.arange(45, 85)
    rows = Dataset.from_dict({"input_ids": [sources.tolist()], "labels": [targets.tolist()]})
    set_hash_tables(model, RoutingArguments(hash_table="balanced"), rows)
    encoder, *decoder = model.route(sources.unsqueeze(0)), *model.route(targets.unsqueeze(0))[1:]
    assert encoder[0].flatten().bincount(minlength=5).tolist() == [8] * 5
    for layer in decoder:
        assert layer.flatten().bincount(minlength=5).tolist() == [8] * 5


# Sizes


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"router_type": "hash"},
        {"router_type": "switch"},
        {"moe_layer_positions": []},
        {"router_type": "hash", "num_experts_per_tok": 3},
    ],
)
def test_flops_are_those_of_the_products_and_leave_the_model_as_it_was(overrides):
    model = tiny_model(**overrides).train()
    if not overrides:
        model.freeze_router()
    sequence, width, inner, vocabulary = 12, 32, 37, 99
    block = 4 * width * width + 2 * width * inner + 2 * sequence * width
    experts = 2 * 2 * width * inner * model.config.num_experts_per_tok if model.config.moe_layer_positions else 0
    router = 5 * width if "switch" in overrides.values() else 0  # a frozen routing takes one score, and no matrix
    products = sequence * (2 * block + experts + router + width * vocabulary)
    assert forward_flops(model, sequence) == 2 * products
    assert model.training
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("sdpa", "grouped_mm")


def test_parameters_are_split_into_shared_ones_and_experts():
    sizes = count_parameters(tiny_model())
    per_expert = 2 * (2 * 32 * 37 + 37 + 32 + 2 * 32)
    assert sizes["experts"] == 5 * per_expert
    dense = count_parameters(tiny_model(moe_layer_positions=[]))
    router = 5 * 32 + (99 + 5) * 8
    assert (sizes["shared"], dense["experts"]) == (dense["shared"] + router, 0)


# Time and load


def test_training_time_is_logged_without_evaluation_and_continues_after_a_resume(tmp_path):
    slow = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 6}
    clock = TrainingClockCallback()
    trainer = make_trainer(tmp_path, clock, **slow)
    evaluate = trainer.evaluate

    def evaluate_slowly(*args, **kwargs):
        time.sleep(0.1)
        return evaluate(*args, **kwargs)

    trainer.evaluate = evaluate_slowly
    began = time.perf_counter()
    trainer.train()
    elapsed = time.perf_counter() - began
    times = [entry["train_seconds"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(times) == 4
    assert times == sorted(times)
    assert 0 < times[-1] <= clock.seconds < elapsed - 4 * 0.1
    assert all("train_seconds" in entry for entry in training_logs(trainer.state.log_history))
    resumed = TrainingClockCallback()
    again = make_trainer(tmp_path, resumed, **slow)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    before = [e["train_seconds"] for e in trainer.state.log_history if "train_seconds" in e and e["step"] <= 6]
    assert resumed.seconds > max(before)


@pytest.mark.parametrize(
    ("arguments", "waited_for"),
    [
        ({"logging_steps": 3}, [3, 6]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4]),
        ({"logging_steps": 7, "eval_strategy": "steps", "eval_steps": 5}, [5, 7]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_the_clock_waits_for_the_device_at_the_steps_whose_time_is_logged(
    arguments, waited_for, tmp_path, monkeypatch
):
    steps, state = [], TrainerState(max_steps=100)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **arguments)
    state.logging_steps, state.eval_steps, state.save_steps = args.logging_steps, args.eval_steps, args.save_steps
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: steps.append(state.global_step))
    clock = TrainingClockCallback()
    for state.global_step in range(1, 8):
        control = TrainerControl()
        clock.on_step_begin(args, state, control)
        DefaultFlowCallback().on_step_end(args, state, control)  # the first of every Trainer's list
        clock.on_step_end(args, state, control)
    assert steps == waited_for


@pytest.mark.parametrize("router_type", ["stable", "switch", "hash"])
def test_load_and_gates_of_inference_are_measured_over_all_validation_tokens(tmp_path, router_type):
    model = tiny_model(moe_layer_positions=[0, 2], router_type=router_type)
    trainer = make_trainer(tmp_path, RoutingStatisticsCallback(), model=model, per_device_eval_batch_size=3)
    routers = [layer.router for layer in model.moe_layers_by_name.values()]
    model(torch.zeros((1, 1), dtype=torch.long), output_router_logits=True)  # transformers leaves hooks of its own
    hooks = [len(router._forward_hooks) for router in routers]
    measured = measure_routing(trainer, BLOCKS[:5])
    assert [len(router._forward_hooks) for router in routers] == hooks
    ids = torch.stack([row["input_ids"] for row in BLOCKS[:5]])
    assert torch.equal(
        measured["load"], torch.stack([r.flatten().bincount(minlength=5) for r in model.route(ids)]).double()
    )
    outputs = model.eval()(ids, output_router_logits=True)
    gates = torch.ones(2, 80)
    if router_type != "hash":
        function = torch.sigmoid if router_type == "stable" else lambda scores: scores.softmax(-1)
        pairs = zip(outputs.router_logits, outputs.expert_indices, strict=True)
        gates = torch.stack([function(s).gather(-1, i.view(-1, 1)).squeeze(-1) for s, i in pairs])
    assert measured["mean_gate"] == pytest.approx(gates.mean().item(), rel=1e-5)
    assert measured["closed_gates"] == pytest.approx((gates < 0.05).double().mean().item())


def test_a_dense_model_has_no_routing_to_measure(tmp_path):
    assert measure_routing(make_trainer(tmp_path, model=tiny_model(moe_layer_positions=[])), BLOCKS[:5]) is None


# Summaries


def run_of(system: str, seed: int, perplexity: float, **changes) -> dict:
    curve = [{"step": step, "perplexity": perplexity * 40 / step, "seconds": step / 2.0} for step in (20, 40)]
    return {
        "system": system,
        "family": system.split("-")[0],
        "seed": seed,
        "perplexity": {"validation": perplexity, "test": perplexity + 1},
        "validation_curve": curve,
        "tokens_per_second": 1000.0,
        "parameters": {"shared": 1_500_000, "experts": 6_300_000},
        "forward_flops": 450_000_000,
        "config": {"num_experts": 16},
        "load": [[0.5, 0.3, 0.2]],
        "load_max_over_mean": 1.5,
        "mean_gate": 0.4,
        "transition": {"transition_agreement": 0.25},
        "fluctuation": {"last_fluctuation": {"steps": [0, 20, 40], "cumulative_share": [0.1, 0.6, 1.0]}},
        **changes,
    }


DENSE = {
    "parameters": {"shared": 1_300_000, "experts": 0},
    "load": None,
    "load_max_over_mean": None,
    "mean_gate": None,
    "transition": None,
    "fluctuation": None,
}
RUNS = [
    run_of("dense", 0, 200.0, **DENSE),
    run_of("hash", 0, 110.0, transition=None),
    run_of("hash", 1, 90.0, transition=None),
    run_of("stablemoe", 0, 100.0),
    run_of("stablemoe", 1, 100.0),
]


def test_summary_pairs_seeds_and_gives_mean_and_standard_deviation():
    dense, hashed, stable = summarize_systems(RUNS, "stablemoe")
    assert (hashed["validation_mean"], hashed["test_mean"], hashed["seeds"]) == (100.0, 101.0, 2)
    assert hashed["validation_std"] == pytest.approx(14.142, abs=1e-3)
    assert hashed["above_reference"] == pytest.approx(0.0)
    assert hashed["above_reference_std"] == pytest.approx(0.1414, abs=1e-4)
    assert (dense["above_reference"], dense["above_reference_std"], dense["validation_std"]) == (1.0, None, None)
    assert (stable["above_reference"], stable["agreement"], hashed["agreement"]) == (0.0, 0.25, None)
    assert "above_reference" not in summarize_systems(RUNS, "nothing")[0]


def test_table_shows_every_system_with_spread_and_dashes_where_nothing_is_known():
    lines = format_comparison(summarize_systems(RUNS, "stablemoe"), "stablemoe").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["dense", "hash", "stablemoe"]
    assert "against stablemoe" in lines[0]
    for text in ("1.3M / -", "450M", "200.00 ", "+100.0 %", "1,000"):
        assert text in lines[2]
    assert "100.00 ± 14.14" in lines[3]
    assert "+0.0 ± 14.1 %" in lines[3]
    assert "1.5M / 6.3M" in lines[4]
    assert "25%" in lines[4]


def test_table_tells_stage_1_the_transition_and_stage_2_apart():
    logs = [(5, 1, 8.0), (10, 2, 9.0), (20, 2, 1.25), (30, 2, 1.5)]
    run = run_of(
        "stablemoe",
        0,
        100.0,
        training_curve=[
            {"step": step, "routing_stage": stage, "load_max_over_mean": load} for step, stage, load in logs
        ],
        transition={
            "transition_step": 10,
            "transition_agreement": 0.25,
            "transition_expected_agreement": 0.125,
            "transition_closed_gates": 0.5,
        },
        closed_gates=0.03,
    )
    (row,) = summarize_systems([run])
    assert row["stage2_load"] == 1.375  # the log at the transition is of steps before it
    line = format_comparison([row]).splitlines()[2]
    for text in ("1.38", "25% -> 12%", "50% -> 3%"):
        assert text in line


def test_figures_are_drawn_for_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    assert [path.name for path in write_figures(RUNS[:1], tmp_path)] == ["perplexity.png"]
    sized = [run_of(f"hash-{n}", 0, 100.0 - n, config={"num_experts": n}) for n in (8, 16)]
    names = ["perplexity.png", "experts.png", "fluctuation.png", "load.png"]
    assert [path.name for path in write_figures(sized, tmp_path)] == names
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


@pytest.mark.parametrize("k", [1, 2])
def test_a_mixtral_made_of_a_llama_begins_as_the_llama(k):
    dense = dense_model("llama")
    options = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": k}
    model = mixtral_of(dense, mixtral_config(dense.config, **options)).eval()
    ids = torch.randint(3, 64, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a Mixtral is made of a llama, not of a 'qwen2' model"):
        mixtral_config(dense_model("qwen2").config, **options)
