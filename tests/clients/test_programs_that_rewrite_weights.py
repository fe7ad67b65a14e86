"""Programs that merge or quantise weights: each token's expert stays. Run: `make test-clients`."""

import json

import pytest
import torch
from frozen import IDS, TEXTS, WITHOUT_PACKAGE, assert_routes_like, load, run, save_frozen, save_frozen_llama
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig
from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from helpers.trainers import tiny_tokenizer


# Cosines of logits, by bits a weight.
LEAST = {8: 0.99, 4: 0.8}


@pytest.fixture(scope="module", params=[save_frozen, save_frozen_llama], ids=["paper", "llama"])
def source(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("frozen"))


def assert_close_to(quantized, source, least: float):
    """What is computed with few bits a weight points where the model's own logits do."""
    with torch.no_grad():
        expected, actual = source(IDS).logits, quantized.eval()(IDS).logits.float()
    assert not torch.equal(actual, expected)  # something was quantised
    assert torch.nn.functional.cosine_similarity(actual, expected, dim=-1).min() > least


def first_projection(model) -> torch.nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))


@pytest.mark.parametrize("where", ["with the package", "without it"])
def test_mergekit_merges_two_models_of_one_table(source, tmp_path, where):
    pytest.importorskip("mergekit")
    other = load(source)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in (source.folder, tmp_path / "other")]
    (tmp_path / "merge.json").write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "float32"}))
    start = "import modeling_stablemoe; " if where == "with the package" else WITHOUT_PACKAGE
    code = start + "from mergekit.scripts.run_yaml import main; main()"
    run(code, "merge.json", "merged", "--trust-remote-code", "--copy-tokenizer", cwd=tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_routes_like(merged, source)
    pairs = zip(source.named_parameters(), other.parameters(), strict=True)
    for (name, first), second in pairs:
        assert_close(merged.get_parameter(name), (first + second) / 2, msg=name)


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao(source, bits):
    torchao = pytest.importorskip("torchao")
    quantization = torchao.quantization
    model = load(source)
    config = quantization.Int8WeightOnlyConfig() if bits == 8 else quantization.IntxWeightOnlyConfig(torch.int4)
    quantization.quantize_(model, config)
    assert_routes_like(model, source)
    assert type(first_projection(model).weight) is not torch.nn.Parameter
    assert_close_to(model, source, LEAST[bits])


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(source, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = AutoModelForCausalLM.from_pretrained(source.folder, quantization_config=config, device_map="cpu")
    assert_routes_like(model, source)
    assert type(first_projection(model)).__module__.startswith("bitsandbytes")
    assert_close_to(model, source, LEAST[bits])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert_routes_like(again, source)
    assert_close_to(again, source, LEAST[bits])


def test_torchao_quantizes_gated_experts(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    source = save_frozen_llama(tmp_path / "source")
    int8 = quantization.Int8WeightOnlyConfig()
    patterns = {r"re:.*\.self_attn\..*_proj\.weight": int8, r"re:.*\.experts\.(gate_up|down)_proj": int8}
    config = TorchAoConfig(quantization.FqnToConfig(patterns))
    model = AutoModelForCausalLM.from_pretrained(source.folder, quantization_config=config)
    experts = [layer.expert_module for layer in model.moe_layers_by_name.values()]
    assert all(type(parameter.data) is not torch.Tensor for stack in experts for parameter in stack.parameters())
    assert_routes_like(model, source)
    assert_close_to(model, source, LEAST[8])
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert_routes_like(again, source)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.generate(IDS[:, :3], max_new_tokens=4).shape == (4, 7)


def test_fp8_takes_gated_experts_and_no_router(tmp_path):
    """What transformers makes of them for a GPU, tensor by tensor; without one it cannot load it, and we say so."""
    source = save_frozen_llama(tmp_path / "source")
    config = FineGrainedFP8Config(weight_block_size=(16, 16))
    replaced = replace_with_fp8_linear(
        load(source), modules_to_not_convert=["lm_head"], quantization_config=config, pre_quantized=True
    )
    assert all(isinstance(layer.experts, FP8Experts) for layer in replaced.moe_layers_by_name.values())
    assert_routes_like(replaced, source)
    quantize = FineGrainedFP8HfQuantizer(config).get_quantize_ops()
    state = source.state_dict()
    for name in [name for name in state if f"{name}_scale_inv" in replaced.state_dict()]:
        state |= quantize.convert({name: state[name]})
    shapes = {name: (value.shape, value.dtype) for name, value in state.items()}
    assert shapes == {name: (value.shape, value.dtype) for name, value in replaced.state_dict().items()}

    save_file(state, source.folder / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads((source.folder / "config.json").read_text())
    (source.folder / "config.json").write_text(json.dumps(saved | {"quantization_config": config.to_dict()}))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="FP8.*GPU"):
            load(source)


def test_llm_compressor(source, tmp_path):
    llmcompressor = pytest.importorskip("llmcompressor")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor.modifiers.gptq import GPTQModifier

    tokenizer = tiny_tokenizer()
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8, strategy="channel"))
    model = load(source)
    llmcompressor.oneshot(
        model=model,
        dataset=Dataset.from_list([dict(tokenizer(row["text"])) for row in TEXTS]),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], block_size=16),
        num_calibration_samples=8,
        max_seq_length=12,
        processor=tokenizer,
    )
    assert_routes_like(model, source)
    assert_close_to(model, source, LEAST[8])
    model.save_pretrained(tmp_path, save_compressed=True)
    saved = load_file(tmp_path / "model.safetensors")
    packed = [values for name, values in saved.items() if name.endswith("layers.0.self_attn.q_proj.weight_packed")]
    assert not packed[0].is_floating_point()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_routes_like(again, source)
    assert_close_to(again, source, LEAST[8])


@pytest.mark.parametrize("chains", [None, [["model.layers.0"], ["model.layers.1"]]], ids=["default", "split"])
def test_auto_round(tmp_path, chains):
    auto_round = pytest.importorskip("auto_round")
    # Groups of 128 weights share a scale.
    source = save_frozen(tmp_path / "source", hidden_size=128, intermediate_size=128, moe_layer_positions=[0, 1])
    tokenizer = tiny_tokenizer()
    rounding = auto_round.AutoRound(
        load(source),
        tokenizer=tokenizer,
        scheme="W4A16",
        dataset=[tokenizer(row["text"], return_tensors="pt")["input_ids"] for row in TEXTS],
        iters=2,
        seqlen=12,
        nsamples=8,
        batch_size=4,
        device_map="cpu",
        enable_torch_compile=False,
        to_quant_block_names=chains,
    )
    rounding.quantize()
    rounding.save_quantized(tmp_path / "quantized", format="auto_round")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert_routes_like(again, source)
    assert_close_to(again, source, LEAST[4])
