# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The MoE layer and its contenders of equal FLOPs: a dense stack, and the sparse blocks of transformers.

A StableMoE layer of s sublayers is s pre-norm residual FFNs per token. So is the dense stack. A sparse block of transformers
is one FFN without norm and residual: s of them are stacked, each with its own model's norm and a residual. A gated FFN has
three matrices in place of two, so it is two thirds as wide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig, SwitchTransformersConfig
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm, OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersLayerNorm,
    SwitchTransformersSparseMLP,
)

from modeling_stablemoe.model.configuration_stablemoe import StableMoEConfig
from modeling_stablemoe.model.layer_stablemoe import StableMoELayer


# transformers' names; models that are told nothing get the second.
BACKENDS = ("eager", "grouped_mm", "batched_mm")
DEFAULT_BACKEND = "grouped_mm"
# Tokens of a sequence, where they divide the tokens of a cell.
SEQUENCE_LENGTH = 512
VOCAB_SIZE = 32768


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer: D, F of an FFN of two matrices, E, s, and the most tokens of a batch."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_sublayers: int
    max_tokens: int = 32768

    def expert_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of one expert."""
        return 2 * self.hidden_size * self.intermediate_size * self.num_sublayers * dtype.itemsize

    def activation_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Estimate what a training pass keeps, besides weights and gradients."""
        by_token = 12 * self.hidden_size + 6 * self.intermediate_size
        return tokens * by_token * self.num_sublayers * dtype.itemsize


def equal_gated_size(intermediate_size: float) -> int:
    """Return the inner width at which a gated FFN is nearest to one of two matrices; a multiple of 8, as kernels like it."""
    return max(8, round(intermediate_size * 2 / 3 / 8) * 8)


class DenseStack(nn.Module):
    """A stack of pre-norm residual FFNs: what one expert of a StableMoE layer does, for all tokens alike."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_sublayers: int, hidden_act: str = "relu"):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(hidden_size) for _ in range(num_sublayers)])
        self.up_projs = nn.ModuleList([nn.Linear(hidden_size, intermediate_size) for _ in range(num_sublayers)])
        self.down_projs = nn.ModuleList([nn.Linear(intermediate_size, hidden_size) for _ in range(num_sublayers)])
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, hidden_states: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Map `(..., hidden_size)` to the same; token ids make no difference."""
        for norm, up_proj, down_proj in zip(self.norms, self.up_projs, self.down_projs, strict=True):
            hidden_states = hidden_states + down_proj(self.act_fn(up_proj(norm(hidden_states))))
        return hidden_states


class SparseStack(nn.Module):
    """Sparse blocks of transformers, each with a norm and a residual."""

    def __init__(self, config, block_class: type[nn.Module], norm_class: type[nn.Module], num_sublayers: int):
        super().__init__()
        self.norms = nn.ModuleList([norm_class(config.hidden_size) for _ in range(num_sublayers)])
        self.blocks = nn.ModuleList([block_class(config) for _ in range(num_sublayers)])

    def forward(self, hidden_states: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Map `(batch, sequence, hidden_size)` to the same; token ids make no difference."""
        for norm, block in zip(self.norms, self.blocks, strict=True):
            hidden_states = hidden_states + block(norm(hidden_states))
        return hidden_states


@dataclass
class Contender:
    """A module that maps `(hidden_states, token_ids)` to hidden states, and the config that its experts read."""

    module: nn.Module
    config: object | None = None

    def use(self, backend: str | None):
        """Choose a backend of the experts; a module without config has but one."""
        if self.config is not None:
            self.config._experts_implementation = backend or DEFAULT_BACKEND


def _build_stablemoe(shape: LayerShape) -> Contender:
    config = StableMoEConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_experts=shape.num_experts,
        num_expert_sublayers=shape.num_sublayers,
    )
    layer = StableMoELayer(config)
    layer.frozen_router.freeze(torch.randint(shape.num_experts, (VOCAB_SIZE,)))
    return Contender(layer, config)


class GatedStack(nn.Module):
    """StableMoE layers of gated experts, norm and residual inside, one after the other."""

    def __init__(self, config: StableMoEConfig, num_sublayers: int):
        super().__init__()
        self.blocks = nn.ModuleList([StableMoELayer(config) for _ in range(num_sublayers)])
        for layer in self.blocks:
            layer.frozen_router.freeze(torch.randint(config.num_experts, (config.vocab_size,)))

    def forward(self, hidden_states: Tensor, token_ids: Tensor) -> Tensor:
        """Map `(batch, sequence, hidden_size)` to the same."""
        for layer in self.blocks:
            hidden_states = layer(hidden_states, token_ids)
        return hidden_states


def _build_gated_stablemoe(shape: LayerShape) -> Contender:
    config = StableMoEConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=equal_gated_size(shape.intermediate_size),
        hidden_act="silu",
        num_hidden_layers=1,
        num_attention_heads=1,
        num_experts=shape.num_experts,
        expert_type="gated",
    )
    return Contender(GatedStack(config, shape.num_sublayers), config)


def _build_dense(shape: LayerShape) -> Contender:
    return Contender(DenseStack(shape.hidden_size, shape.intermediate_size, shape.num_sublayers))


def _build_gated(config_class, block_class, norm_class, size_name: str, experts_name: str) -> Callable:
    def build(shape: LayerShape) -> Contender:
        sizes = {size_name: equal_gated_size(shape.intermediate_size), experts_name: shape.num_experts}
        config = config_class(hidden_size=shape.hidden_size, num_experts_per_tok=1, **sizes)
        return Contender(SparseStack(config, block_class, norm_class, shape.num_sublayers), config)

    return build


def _build_switch(shape: LayerShape) -> Contender:
    config = SwitchTransformersConfig(
        d_model=shape.hidden_size,
        d_ff=shape.intermediate_size,
        num_experts=shape.num_experts,
        expert_capacity=shape.max_tokens,  # no token is dropped
        router_jitter_noise=0.0,
        dropout_rate=0.0,
    )
    stack = SparseStack(config, SwitchTransformersSparseMLP, SwitchTransformersLayerNorm, shape.num_sublayers)
    return Contender(stack)  # loops over its experts whatever the backend


# In the order in which they get memory.
BUILDERS: dict[str, Callable[[LayerShape], Contender]] = {
    "stablemoe": _build_stablemoe,
    "stablemoe_gated": _build_gated_stablemoe,
    "dense": _build_dense,
    "mixtral": _build_gated(
        MixtralConfig, MixtralSparseMoeBlock, MixtralRMSNorm, "intermediate_size", "num_local_experts"
    ),
    "olmoe": _build_gated(OlmoeConfig, OlmoeSparseMoeBlock, OlmoeRMSNorm, "intermediate_size", "num_experts"),
    "qwen3_moe": _build_gated(
        Qwen3MoeConfig, Qwen3MoeSparseMoeBlock, Qwen3MoeRMSNorm, "moe_intermediate_size", "num_experts"
    ),
    "switch": _build_switch,
}
TRANSFORMERS_BLOCKS = ("mixtral", "olmoe", "qwen3_moe", "switch")
GATED_BLOCKS = ("mixtral", "olmoe", "qwen3_moe")
# Those that may have the same experts, as memory has no room for each one's own.
SAME_EXPERTS = ("stablemoe_gated", *GATED_BLOCKS)


def own_backend_of(backends: Sequence[str]) -> str:
    """Return the backend that aims are checked with: the default, if it is measured."""
    return DEFAULT_BACKEND if DEFAULT_BACKEND in backends else backends[0]


def build_contender(
    name: str, shape: LayerShape, device: torch.device, dtype: torch.dtype, owner: Contender | None = None
) -> Contender:
    """Build one of `BUILDERS` with random weights, zero nowhere: no kernel is to see zeros.

    A gated block may share the experts of another one, `owner`: three times as many would not fit.
    """
    with torch.device(device):
        contender = BUILDERS[name](shape)
    if owner is not None:
        for block, other in zip(contender.module.blocks, owner.module.blocks, strict=True):
            block.experts.gate_up_proj, block.experts.down_proj = other.experts.gate_up_proj, other.experts.down_proj
    contender.module.to(dtype)
    randomize(contender.module)
    contender.use(DEFAULT_BACKEND)
    return contender


@torch.no_grad()
def randomize(module: nn.Module, experts_only: bool = False):
    """Fill parameters as training leaves them; the matrices of experts are all alike, which no kernel sees and is fast."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 3:
            parameter.copy_(torch.empty_like(parameter[0]).normal_(std=0.02).expand_as(parameter))
        elif parameter.is_floating_point() and not experts_only:
            is_scale = "norm" in name and name.endswith("weight")
            parameter.fill_(1.0) if is_scale else parameter.normal_(std=0.02)


def draw_tokens(shape: LayerShape, num_tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw hidden states `(batch, sequence, D)` and token ids `(batch, sequence)`, all ids equally likely."""
    length = SEQUENCE_LENGTH if num_tokens % SEQUENCE_LENGTH == 0 else num_tokens
    size = (num_tokens // length, length)
    hidden_states = torch.randn(*size, shape.hidden_size, device=device).to(dtype)
    return hidden_states, torch.randint(VOCAB_SIZE, size, device=device)


def count_active(module: nn.Module, num_experts: int) -> tuple[int, int]:
    """Count the parameters that a token meets, and all, of a module whose experts serve one token each.

    What a router was distilled into is a table at inference, and not counted.
    """
    counted = [(n, p.numel()) for n, p in module.named_parameters() if p.is_floating_point()]
    counted = [(name, count) for name, count in counted if "distilled_router" not in name]
    experts = sum(count for name, count in counted if "expert_stack." in name or ".experts." in name)
    total = sum(count for _, count in counted)
    return total - experts + experts // num_experts, total


def flops_per_token(contender: Contender, shape: LayerShape, num_tokens: int = 16) -> float:
    """Count the floating-point operations of the matrix products of a forward pass, per token."""
    weight = next(parameter for parameter in contender.module.parameters() if parameter.is_floating_point())
    hidden_states, token_ids = draw_tokens(shape, num_tokens, weight.device, weight.dtype)
    contender.use("eager")  # fused kernels are not all known to the counter
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        contender.module(hidden_states, token_ids)
    contender.use(DEFAULT_BACKEND)
    return counter.get_total_flops() / num_tokens
