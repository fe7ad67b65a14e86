"""Tiny models with odd sizes, and tokens for them."""

from typing import NamedTuple

import torch

from modeling_stablemoe import (
    StableMoEConfig,
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoEForSequenceClassification,
    StableMoESeq2SeqConfig,
)
from modeling_stablemoe.model.routing_stablemoe import Routing


# Odd and all different, so that swapped axes fail.
TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_experts": 5,
    "num_expert_sublayers": 2,
    "moe_layer_positions": [1],
    "distilled_router_dim": 8,
    "eos_token_id": 0,
    "pad_token_id": 1,
}

# The two sides differ in depth and in where their experts stand.
TINY_SEQ2SEQ = {
    "vocab_size": 91,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_moe_layer_positions": [1],
    "decoder_moe_layer_positions": [0, 2],
    "initializer_range": 0.2,
    "dropout": 0.0,
    "num_experts": 5,
    "num_expert_sublayers": 2,
    "distilled_router_dim": 7,
    "pad_token_id": 2,
    "eos_token_id": 0,
    "decoder_start_token_id": 1,
}


# Routers that remember the tokens of stage 1.
FOLLOWING = {
    "router_normalization": "standardize",
    "expert_bias_rate": 0.1,
    "balance_loss_warmup_tokens": 50,
    "balance_window_tokens": 100,
    "max_frozen_load": 1.3,
}
COUNTING = {"distilled_router": "counts", **FOLLOWING}


def tiny_config(**overrides) -> StableMoEConfig:
    return StableMoEConfig(**{**TINY, **overrides})


def tiny_model(seed: int = 0, **overrides) -> StableMoEForCausalLM:
    """A model whose experts do something: the zero-initialised outputs are filled, the router's scores spread out."""
    torch.manual_seed(seed)
    return shaken(StableMoEForCausalLM(tiny_config(**overrides)))


def tiny_seq2seq_config(**overrides) -> StableMoESeq2SeqConfig:
    return StableMoESeq2SeqConfig(**{**TINY_SEQ2SEQ, **overrides})


def tiny_seq2seq_model(seed: int = 0, **overrides) -> StableMoEForConditionalGeneration:
    """The same with an encoder and a decoder."""
    torch.manual_seed(seed)
    return shaken(StableMoEForConditionalGeneration(tiny_seq2seq_config(**overrides)))


def tiny_classifier(seed: int = 0, **overrides) -> StableMoEForSequenceClassification:
    """The same with the head of a classifier of three labels."""
    torch.manual_seed(seed)
    return shaken(StableMoEForSequenceClassification(tiny_config(**{"num_labels": 3, **overrides})))


def shaken(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                noise = torch.randn_like(parameter)
                parameter.add_(noise * (0.5 if "router" in name else 0.1))
    return model


def padded(rows: list[torch.Tensor], value: int, side: str = "right") -> torch.Tensor:
    """Stack rows of different lengths."""
    length = max(len(row) for row in rows)
    fill = [row.new_full((length - len(row),), value) for row in rows]
    pairs = zip(fill, rows, strict=True) if side == "left" else zip(rows, fill, strict=True)
    return torch.stack([torch.cat(pair) for pair in pairs])


def random_ids(batch: int = 3, length: int = 7, seed: int = 0, low: int = 2, high: int = 99) -> torch.Tensor:
    return torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(seed))


class Decision(NamedTuple):
    """What a router returns, by name: the package passes plain tuples between modules."""

    router_logits: torch.Tensor | None
    expert_index: torch.Tensor
    gate: torch.Tensor
    distilled_logits: torch.Tensor | None
    trace: Routing

    @classmethod
    def of(cls, output: tuple) -> "Decision":
        routing, expert_index = Routing(*output[-1]), output[1]
        gate = routing.routing_weights.view_as(expert_index)
        return cls(routing.router_logits, expert_index, gate, routing.distilled_logits, routing)


def gradients(model: StableMoEForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def switch_checkpointing(model: StableMoEForCausalLM, kwargs: dict | None = None):
    """By the name that the installed transformers does not deprecate."""
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch(kwargs)
