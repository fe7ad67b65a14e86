"""Tiny decoders of transformers' own families, and StableMoEs of them."""

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from helpers.models import shaken
from modeling_stablemoe import StableMoEConfig, StableMoEForCausalLM


VOCAB = 64
_WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHARED = {**_WIDTHS, **_TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 128}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

# By `model_type`, what is not the family's default.
FAMILIES = {
    "llama": _SHARED,
    "qwen2": _SHARED,
    "qwen3": {**_SHARED, "head_dim": 8},
    "mistral": {**_SHARED, "head_dim": 8, "sliding_window": 8},
    "olmo2": _SHARED,
    "gemma2": {
        **_SHARED,
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 1.0,
    },
    "gemma3_text": {**_SHARED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "smollm3": _SHARED,
    "phi": _SHARED,
    "phi3": _SHARED,
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **_TOKENS},
    "gpt_neox": {name: value for name, value in _SHARED.items() if name != "num_key_value_heads"},
    "granite": {**_SHARED, "logits_scaling": 3.0},
    "starcoder2": _SHARED,
    "cohere": {**_SHARED, "logit_scale": 0.5},
    "cohere2": {**_SHARED, "sliding_window": 8},
    "stablelm": _SHARED,
    "glm4": {**_SHARED, "head_dim": 8},
    "exaone4": {**_SHARED, "sliding_window": 8},
    "nemotron": _SHARED,
    "olmoe": {**_SHARED, **_EXPERTS},
    "mixtral": {**_SHARED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_SHARED, **_EXPERTS, "head_dim": 8, "moe_intermediate_size": 16},
    "gpt_oss": {**_SHARED, "head_dim": 8, "num_local_experts": 4},
    "deepseek_v3": {
        **_SHARED,
        **_MLA,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
    },
}
# Blocks without an FFN that gated experts could be copies of: not gated, with biases, or experts already.
NOT_IN_PLACE = {
    "gpt2",
    "gpt_neox",
    "phi",
    "starcoder2",
    "nemotron",
    "olmoe",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
}
# What stands where, behind the family and a slash.
_KINDS = {
    "": {},
    "stack": {"expert_type": "stack", "num_expert_sublayers": 2},
    "ffn": {"moe_placement": "ffn", "num_experts_per_tok": 2},
}
CASES = [
    *FAMILIES,
    *(f"{family}/ffn" for family in FAMILIES if family not in NOT_IN_PLACE),
    "llama/stack",
    "olmoe/stack",
]
# Experts in place of the FFN; a soft cap, scaled embeddings and sliding windows; the paper's experts, beside others.
REPRESENTATIVES = ("llama/ffn", "gemma2", "olmoe/stack")


def backbone_config(family: str, **overrides) -> PreTrainedConfig:
    family = family.partition("/")[0]
    return transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **overrides})


def dense_model(family: str, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(backbone_config(family, **overrides), dtype=dtype).eval()


def backed_config(family: str, vocab_size: int = VOCAB, **overrides) -> StableMoEConfig:
    kind = family.partition("/")[2]
    where = (
        {"moe_layer_positions": [1, 3]} if kind == "ffn" else {"moe_layer_positions": [0, 2], "intermediate_size": 16}
    )
    backbone = overrides.pop("backbone_config", None) or backbone_config(family, vocab_size=vocab_size)
    return StableMoEConfig(backbone_config=backbone, **{"num_experts": 4, **where, **_KINDS[kind], **overrides})


def backed_model(family: str, **overrides) -> StableMoEForCausalLM:
    """A model whose experts do something."""
    torch.manual_seed(0)
    model = StableMoEForCausalLM(backed_config(family, **overrides))
    for layer in model.moe_layers_by_name.values():
        shaken(layer)
    return model.eval()
