"""Half precision and quantised weights: what is stored in few bits, what never is, and that no token is rerouted."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    FineGrainedFP8Config,
    TorchAoConfig,
    TrainingArguments,
)
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from helpers.models import random_ids, tiny_model, tiny_seq2seq_model
from helpers.trainers import BLOCKS
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


@pytest.mark.parametrize("way", ["bfloat16 throughout", "bfloat16 autocast", "float16 autocast"])
def test_training_in_half_precision_learns_and_keeps_the_table(way):
    model, ids = tiny_model(), torch.stack([block["input_ids"] for block in BLOCKS[:4]])
    if way == "bfloat16 throughout":
        model = model.to(torch.bfloat16)
    dtype = torch.float16 if way == "float16 autocast" else torch.bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # As accelerate does on a GPU; on a CPU its Trainer would train in float32.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, enabled=dtype == torch.float16)
    losses = []
    for step in range(16):
        if step == 6:
            model.freeze_router()
            table = model.route(EVERY_ID)
        with torch.autocast("cpu", dtype, enabled="autocast" in way):
            loss = model(ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert dtype == torch.bfloat16 or scaler.get_scale() < 2.0**24, (
        "no step was skipped to show that it leaves no trace"
    )
    assert losses[-1] < losses[6] - 0.3
    assert torch.equal(model.route(EVERY_ID), table)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_float16_training_on_a_cpu_is_refused_for_accelerate_would_ignore_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_recipe([TrainingArguments], "", ["--output_dir", str(tmp_path), "--use_cpu", "true", "--fp16", "true"])
    assert "--fp16 does nothing on a CPU" in capsys.readouterr().err.splitlines()[-1]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patterns", [(), (BLOCK_WEIGHTS, EXPERT_WEIGHTS)], ids=["linear layers", "experts by name"])
def test_torchao_quantises_linear_layers_of_blocks_and_experts_where_they_are_named(
    patterns, backend, dtype, folder, source, tmp_path
):
    options = {"dtype": dtype, "experts_implementation": backend}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=torchao_config(*patterns), **options)
    found = in_8_bits(model)
    assert len([name for name in found if re.fullmatch(BLOCK_WEIGHTS[3:], name)]) == 2 * 6
    assert len([name for name in found if "expert_stack" in name]) == len(found) - 2 * 6 == (2 * 2 if patterns else 0)
    assert_same_routing(model, source)
    # What is computed is what the stored numbers say.
    plain = AutoModelForCausalLM.from_pretrained(folder, **options)
    rounded = {n: p.dequantize() if n in found else p.data for n, p in model.named_parameters()}
    plain.load_state_dict(rounded, strict=False)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(logits(model), logits(plain), rtol=tolerance, atol=tolerance)
    assert 0 < error(logits(model), logits(source)) < SMALL
    assert_generates(model)
    model.save_pretrained(tmp_path)
    assert size(tmp_path) < (0.6 if patterns else 1) * size(folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=backend)
    assert in_8_bits(again) == found
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


def test_fp8_leaves_experts_and_routers_alone():
    # It replaces modules by name, `experts`, which it takes for gated ones; it runs on GPUs only.
    model = tiny_model()
    replace_with_fp8_linear(model, None, FineGrainedFP8Config())
    replaced = {name for name, module in model.named_modules() if "FP8" in type(module).__name__}
    assert len([name for name in replaced if name.startswith("model.layers.")]) == 2 * 6
    assert not [name for name in replaced if "moe_layers" in name]
