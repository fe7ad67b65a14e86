"""Half precision and quantised weights: what is stored in few bits, what never is, and that no token is rerouted."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    TorchAoConfig,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from helpers.models import random_ids, tiny_model, tiny_seq2seq_model
from helpers.trainers import BLOCKS, make_trainer, training_logs
from modeling_stablemoe import StageTransitionCallback
from modeling_stablemoe.runs.recipes import parse_recipe


pytestmark = pytest.mark.pairs


HALF = [torch.float16, torch.bfloat16]
BACKENDS = ["eager", "grouped_mm", "batched_mm"]
IDS = random_ids(3, 9)
EVERY_ID = torch.arange(99).unsqueeze(0)
BLOCK_WEIGHTS = r"re:model\.layers\..*_proj\.weight"
EXPERT_WEIGHTS = r"re:.*\.expert_stack\.sublayers\.\d+\.(up|down)_proj"
# Of all logits of a tiny model, as a share of their variance.
SMALL = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A frozen model on disk."""
    path = tmp_path_factory.mktemp("frozen")
    model = tiny_model()
    model.freeze_router()
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def source(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def error(actual, expected) -> float:
    return (mse_loss(actual, expected) / expected.var()).item()


def assert_same_routing(model, source):
    assert model.routing_stage == source.routing_stage == 2
    assert model.router_fingerprint() == model.config.router_fingerprint == source.router_fingerprint()
    assert torch.equal(model.route(EVERY_ID), source.route(EVERY_ID))
    with torch.no_grad():
        used = model(IDS, output_router_logits=True).expert_indices
    assert torch.equal(torch.stack(used), source.route(IDS))


def assert_generates(model):
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert generated.shape[0] == 3
    assert torch.equal(generated[:, :9], IDS)


# Half precision


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_inference_routes_and_generates_as_float32_does(dtype, backend, folder, source, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=backend)
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert_same_routing(half, source)
    assert error(logits(half), logits(source)) < SMALL
    assert_generates(half)
    half.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=backend)
    assert again.dtype == dtype
    assert_same_routing(again, source)
    assert torch.equal(logits(again), logits(half))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_freezes_what_it_evaluates_by(dtype, tmp_path):
    # The distilled router is rounded like all weights, so a few tokens may go elsewhere than in float32.
    tiny_model().save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    before = half.route(EVERY_ID)
    half.freeze_router()
    assert torch.equal(half.route(EVERY_ID), before)


class RouteRecorder(TrainerCallback):
    """Keeps the routing of every token id after each step."""

    def __init__(self):
        self.routes = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        training = model.training
        self.routes.append(model.eval().route(EVERY_ID))
        model.train(training)


def test_bfloat16_autocast_learns_through_the_transition_and_never_moves_the_table(tmp_path):
    recorder = RouteRecorder()
    trainer = make_trainer(tmp_path, StageTransitionCallback(5), recorder, max_steps=36, bf16=True)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.model.routing_stage == 2
    assert all(torch.equal(routes, recorder.routes[-1]) for routes in recorder.routes[4:])
    assert not torch.equal(recorder.routes[0], recorder.routes[-1])
    losses = [float(entry["task_loss"]) for entry in training_logs(trainer.state.log_history)]
    assert losses[-1] < losses[0] - 0.2


def test_float16_autocast_with_a_loss_scaler_learns_and_keeps_the_table():
    # As accelerate does on a GPU; on a CPU its Trainer would train in float32.
    model, ids = tiny_model(), torch.stack([block["input_ids"] for block in BLOCKS[:6]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    losses = []
    for step in range(26):
        if step == 10:
            model.freeze_router()
            table = model.route(EVERY_ID)
        with torch.autocast("cpu", torch.float16):
            loss = model(ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert scaler.get_scale() < 2.0**24, (
        "no step was skipped: the scale was too small to show that one leaves no trace"
    )
    assert losses[-1] < losses[10] - 0.5
    assert torch.equal(model.route(EVERY_ID), table)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_float16_training_on_a_cpu_is_refused_for_accelerate_would_ignore_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_recipe([TrainingArguments], "", ["--output_dir", str(tmp_path), "--use_cpu", "true", "--fp16", "true"])
    assert "--fp16 does nothing on a CPU" in capsys.readouterr().err.splitlines()[-1]


def test_training_in_bfloat16_throughout_learns_and_keeps_the_table():
    model = tiny_model().to(torch.bfloat16)
    ids = torch.stack([block["input_ids"] for block in BLOCKS[:6]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(20):
        if step == 6:
            model.freeze_router()
            table = model.route(EVERY_ID)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[6] - 0.5
    assert torch.equal(model.route(EVERY_ID), table)


# Quantised with torchao


def torchao_config(*patterns: str, **options) -> TorchAoConfig:
    """8-bit weights: of all linear layers, or of what the patterns name."""
    quantization = pytest.importorskip("torchao.quantization")
    # Without the settings of the compiler that it would change for every test after.
    int8 = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    if patterns:
        return TorchAoConfig(quantization.FqnToConfig(dict.fromkeys(patterns, int8)), **options)
    return TorchAoConfig(int8, **options)


def in_8_bits(model) -> set[str]:
    return {name for name, p in model.named_parameters() if type(p).__name__ == "Int8Tensor"}


def size(path: Path) -> int:
    return (path / "model.safetensors").stat().st_size


def test_torchao_quantises_the_linear_layers_of_blocks_and_nothing_of_the_moe_layers(folder, source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=torchao_config())
    found = in_8_bits(model)
    assert len(found) == 2 * 6
    assert all(re.fullmatch(BLOCK_WEIGHTS[3:], name) for name in found)
    assert_same_routing(model, source)
    assert 0 < error(logits(model), logits(source)) < SMALL
    assert_generates(model)
    model.save_pretrained(tmp_path)
    assert size(tmp_path) < size(folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert in_8_bits(again) == found
    assert_same_routing(again, source)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_torchao_quantises_the_experts_where_they_are_named(backend, dtype, folder, source, tmp_path):
    options = {"dtype": dtype, "experts_implementation": backend}
    config = torchao_config(BLOCK_WEIGHTS, EXPERT_WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)
    experts = {name for name in in_8_bits(model) if "expert_stack" in name}
    assert len(experts) == 2 * 2
    assert_same_routing(model, source)
    # What is computed is what the stored numbers say.
    plain = AutoModelForCausalLM.from_pretrained(folder, **options)
    rounded = {n: p.dequantize() if n in in_8_bits(model) else p.data for n, p in model.named_parameters()}
    plain.load_state_dict(rounded, strict=False)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(logits(model), logits(plain), rtol=tolerance, atol=tolerance)
    assert 0 < error(logits(model), logits(source)) < SMALL
    assert_generates(model)
    model.save_pretrained(tmp_path)
    assert size(tmp_path) < 0.6 * size(folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=backend)
    assert in_8_bits(again) == in_8_bits(model)
    assert_same_routing(again, source)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_experts_product_of_8_bits_compiles_and_runs_under_autocast(backend, folder):
    config = torchao_config(EXPERT_WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, experts_implementation=backend)
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(logits(model), expected) < SMALL
    if backend != "eager":  # which depends on the data
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"re:.*\.centroids", ["router.centroids", "router.distilled_router.centroids"]),
        (r"re:.*\.routing_table", ["frozen_router.routing_table"]),
        (r"re:.*moe_layers\..*", ["router.centroids", "frozen_router.routing_table"]),
    ],
)
def test_quantised_routers_are_refused_naming_them_and_the_remedy_works(pattern, named, folder, source):
    with pytest.raises((ValueError, RuntimeError)) as refused:
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=torchao_config(pattern))
    if isinstance(refused.value, RuntimeError):  # transformers 5.15 casts no integers, which torchao refuses itself
        assert "centroids" not in pattern
        return
    assert "routing is exact only" in str(refused.value)
    assert all(f"model.moe_layers.0.{name}" in str(refused.value) for name in named)
    [remedy] = re.findall(r"modules_to_not_convert=\[r'(.*?)'\]", str(refused.value))
    config = torchao_config(pattern, EXPERT_WEIGHTS, modules_to_not_convert=[remedy, ".*_bias", ".*norm.*"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert len(in_8_bits(model)) == 4
    assert_same_routing(model, source)


@pytest.mark.parametrize("kind", ["word_embedding", "counts", "cnn", "transformer_1"])
def test_a_quantised_model_of_stage_1_freezes_the_routing_that_the_whole_one_would(kind, tmp_path):
    model = tiny_model(distilled_router=kind)
    model.save_pretrained(tmp_path)
    model.freeze_router()
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=torchao_config())
    assert quantised.routing_stage == 1
    quantised.freeze_router()
    assert quantised.router_fingerprint() == model.router_fingerprint()


def test_torchao_quantises_encoder_and_decoder(tmp_path):
    model = tiny_seq2seq_model()
    model.freeze_router()
    model.save_pretrained(tmp_path / "whole")
    config = torchao_config(r"re:model\.(encoder|decoder)\.layers\..*_proj\.weight", EXPERT_WEIGHTS)
    quantised = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole", quantization_config=config)
    assert len({name for name in in_8_bits(quantised) if "expert_stack" in name}) == 3 * 2 * 2
    assert len({name for name in in_8_bits(quantised) if "expert_stack" not in name}) == 2 * 6 + 3 * 10
    assert quantised.router_fingerprint() == model.router_fingerprint()
    ids = random_ids(2, 6, low=3, high=91)
    generated = quantised.generate(ids, max_new_tokens=5, do_sample=False)
    quantised.save_pretrained(tmp_path / "quantised")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "quantised")
    assert again.router_fingerprint() == model.router_fingerprint()
    assert torch.equal(again.generate(ids, max_new_tokens=5, do_sample=False), generated)


# Quantised otherwise


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_quantises_the_linear_layers_of_blocks_alone(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    source = tiny_model(hidden_size=64, intermediate_size=128)  # whole blocks of 64
    source.freeze_router()
    source.eval().save_pretrained(tmp_path / "whole")
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=config)
    model.save_pretrained(
        tmp_path / "quantised"
    )  # before it runs: in 4 bits bitsandbytes 0.50 then damages on a CPU what it saves
    found = {name for name, p in model.named_parameters() if p.dtype in (torch.int8, torch.uint8)}
    assert len(found) == 2 * 6
    assert all(re.fullmatch(BLOCK_WEIGHTS[3:], name) for name in found)
    assert_same_routing(model, source)
    assert 0 < error(logits(model), logits(source)) < (SMALL if bits == 8 else 0.1)
    assert_generates(model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    assert_same_routing(again, source)
    assert torch.equal(logits(again), logits(model))


def test_fp8_leaves_experts_and_routers_alone():
    # It replaces modules by name, `experts`, which it takes for gated ones; it runs on GPUs only.
    model = tiny_model()
    replace_with_fp8_linear(model, None, FineGrainedFP8Config())
    replaced = {name for name, module in model.named_modules() if "FP8" in type(module).__name__}
    assert len([name for name in replaced if name.startswith("model.layers.")]) == 2 * 6
    assert not [name for name in replaced if "moe_layers" in name]
