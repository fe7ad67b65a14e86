"""Tests of what weights start from: `initialization="fairseq"` is what the released code does, tensor by tensor."""

import re

import pytest
import torch
from torch import nn
from transformers import set_seed

from helpers.models import tiny_config
from modeling_stablemoe import (
    StableMoEConfig,
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoEForSequenceClassification,
    StableMoESeq2SeqConfig,
)


D, F = 48, 112
SIZES = {"vocab_size": 401, "hidden_size": D, "intermediate_size": F, "num_attention_heads": 4, "num_experts": 6}
SIZES |= {"num_expert_sublayers": 2, "distilled_router_dim": 30, "max_position_embeddings": 64, "pad_token_id": 1}
FAIRSEQ = {**SIZES, "initialization": "fairseq"}
XAVIER_DD = (6 / (D + D)) ** 0.5
# The released code, module by module: `Embedding` and `PositionalEmbedding` draw from N(0, 1/d); `MultiheadAttention` draws
# q, k and v by Xavier with a gain of 1/sqrt(2), its output with 1, and sets that bias alone to 0; `fc1`, `fc2` and the
# sublayers of experts keep what `torch.nn.Linear` starts from, but for `ff2.weight`, which is 0.
DISTRIBUTIONS = {
    r"(embed_tokens|embed_positions|lm_head)\.weight": ("normal", D**-0.5),
    r"(self|cross)_attn\.[qkv]_proj\.weight": ("uniform", XAVIER_DD * 2**-0.5),
    r"(self|cross)_attn\.[qkv]_proj\.bias": ("uniform", D**-0.5),
    r"(self|cross)_attn\.o_proj\.weight": ("uniform", XAVIER_DD),
    r"(self|cross)_attn\.o_proj\.bias": ("constant", 0),
    r"mlp\.up_proj\.(weight|bias)": ("uniform", D**-0.5),
    r"mlp\.down_proj\.(weight|bias)": ("uniform", F**-0.5),
    r"[a-z_]*norm\.weight": ("constant", 1),
    r"[a-z_]*norm\.bias": ("constant", 0),
    r"sublayers\.\d\.layernorm_weight": ("constant", 1),
    r"sublayers\.\d\.layernorm_bias": ("constant", 0),
    r"sublayers\.\d\.up_proj(_bias)?": ("uniform", D**-0.5),
    r"sublayers\.\d\.down_proj": ("constant", 0),
    r"sublayers\.\d\.down_proj_bias": ("uniform", F**-0.5),
    r"distilled_router\.embedding": ("normal", 1),
    r"centroids": ("orthogonal", 0.1),
    r"score\.weight": ("normal", 0.02),  # a classifier's head is none of the paper's
}


def build(kind: str, **settings) -> nn.Module:
    set_seed(0)
    if kind == "translation":
        depths = {"encoder_layers": 2, "decoder_layers": 2, "eos_token_id": 0, "decoder_start_token_id": 0}
        return StableMoEForConditionalGeneration(StableMoESeq2SeqConfig(**{**FAIRSEQ, **depths, **settings}))
    model_class = StableMoEForCausalLM if kind == "language model" else StableMoEForSequenceClassification
    return model_class(StableMoEConfig(**{**FAIRSEQ, "num_hidden_layers": 2, **settings}))


def assert_distributed(name: str, values: torch.Tensor, kind: str, scale: float) -> None:
    """Compare mean, spread, bounds and form; the tolerances are of five standard errors."""
    n = values.numel()
    if kind == "constant":
        assert values.unique().tolist() == [scale], name
        return
    if kind == "orthogonal":
        torch.testing.assert_close(values @ values.mT, scale**2 * torch.eye(len(values)), rtol=0, atol=1e-6)
        return
    spread = scale if kind == "normal" else scale / 3**0.5
    assert abs(values.mean()) < 5 * spread / n**0.5, name
    assert abs(values.std() / spread - 1) < 5 / (2 * n) ** 0.5, name
    if kind == "uniform":
        assert scale * (1 - 12 / n) < values.abs().max() <= scale, name
    else:
        assert values.abs().max() > 1.8 * spread, name  # no uniform distribution of this spread reaches so far


UNTIED = {"tie_word_embeddings": False, "position_embedding_type": "learned"}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *[(kind, {}) for kind in ("language model", "classifier", "translation")],
        *[(kind, UNTIED) for kind in ("language model", "translation")],
        *[("language model", {"router_type": router}) for router in ("switch", "base", "hash")],
        ("language model", {"moe_layer_positions": []}),
    ],
)
def test_every_tensor_starts_from_the_distribution_of_the_released_code(kind, settings):
    model = build(kind, **settings)
    seen = set()
    for name, parameter in model.named_parameters():
        found = [pattern for pattern in DISTRIBUTIONS if re.search(rf"(^|\.){pattern}$", name)]
        assert len(found) == 1, (name, found)
        seen.add(found[0])
        values = parameter.detach()
        if "sublayers" in name:
            assert torch.equal(values, values[:1].expand_as(values)), name  # all experts are equal
            values = values[0]
        elif name.endswith("embed_tokens.weight"):
            assert not values[model.config.pad_token_id].any()
            values = values[torch.arange(len(values)) != model.config.pad_token_id]
        assert_distributed(name, values, *DISTRIBUTIONS[found[0]])
    absent = set() if kind == "classifier" else {r"score\.weight"}
    if settings and settings is not UNTIED:  # other routers, or none
        absent |= {pattern for pattern in DISTRIBUTIONS if re.search("router|centroids|sublayers", pattern)}
    assert seen >= DISTRIBUTIONS.keys() - absent


def test_sublayers_and_layers_start_apart():
    model = build("language model", moe_layer_positions=[0, 1])
    stacks = [layer.expert_stack.sublayers[k].up_proj[0] for layer in model.model.moe_layers for k in range(2)]
    assert len({float(matrix[0, 0].detach()) for matrix in stacks}) == 4


def test_the_default_is_the_normal_distribution_and_leaves_experts_apart():
    model = build("language model", initialization="normal", initializer_range=0.3)
    assert StableMoEConfig().initialization == StableMoESeq2SeqConfig().initialization == "normal"
    for name in ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "embed_tokens"):
        assert_distributed(name, model.get_parameter(f"model.{name}.weight").detach(), "normal", 0.3)
    assert not model.model.layers[0].mlp.up_proj.bias.any()
    up_proj = model.model.moe_layers[0].expert_stack.sublayers[0].up_proj
    assert not torch.equal(up_proj[0], up_proj[1])


def test_what_a_checkpoint_lacks_starts_from_the_same_distribution_and_the_rest_is_kept():
    # transformers shows code that is not its own the modules alone whose tensors are missing, not what holds them.
    model = build("language model")
    state_dict = model.state_dict()
    lacking = [name for name in state_dict if ".q_proj." in name or ".up_proj" in name]
    set_seed(1)
    kept = {name: values for name, values in state_dict.items() if name not in lacking}
    loaded = StableMoEForCausalLM.from_pretrained(None, config=model.config, state_dict=kept)
    assert len(lacking) > 4
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)) == (name not in lacking), name
    for name, matrix in (("self_attn.q_proj", XAVIER_DD * 2**-0.5), ("mlp.up_proj", D**-0.5)):
        assert_distributed(name, loaded.get_parameter(f"model.layers.0.{name}.weight").detach(), "uniform", matrix)


def test_an_unknown_initialization_is_refused():
    with pytest.raises(ValueError, match="`initialization` 'xavier' is unknown"):
        tiny_config(initialization="xavier")
