# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The MoE layer beside what it is measured against, at equal work: a dense stack, and the sparse blocks of transformers.

A StableMoE layer of s sublayers is s pre-norm residual FFNs a token. So is the dense stack. A sparse block of transformers
is one FFN without norm and residual: s of them are stacked, each with its own model's norm and a residual. Where an FFN is
gated it has three matrices in place of two, so it is two thirds as wide.
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


# Names of transformers' backends.
BACKENDS = ("eager", "grouped_mm", "batched_mm")
# What models get unless told otherwise.
DEFAULT_BACKEND = "grouped_mm"


# Tokens of a sequence, where they divide the tokens of a cell.
SEQUENCE_LENGTH = 512


def own_backend(backends: Sequence[str]) -> str:
    """Choose the backend that aims are checked with: that of models which are told nothing, if it is measured."""
    return DEFAULT_BACKEND if DEFAULT_BACKEND in backends else backends[0]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer.

    Args:
        hidden_size (`int`): D.
        intermediate_size (`int`): F, of an FFN of two matrices.
        num_experts (`int`): E.
        num_sublayers (`int`): s.
        vocab_size (`int`): tokens ids that are routed.
        max_tokens (`int`): most tokens of a batch, which capacities are set to: nothing is dropped.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_sublayers: int
    vocab_size: int = 32768
    max_tokens: int = 32768

    @property
    def gated_size(self) -> int:
        """`int`: inner width of a gated FFN of as many parameters, a multiple of 8 as kernels like it."""
        return equal_gated_size(self.intermediate_size)


def equal_gated_size(intermediate_size: float) -> int:
    """Give the inner width at which a gated FFN, of three matrices, is nearest to one of two; a multiple of 8."""
    return max(8, round(intermediate_size * 2 / 3 / 8) * 8)


class DenseStack(nn.Module):
    """A stack of pre-norm residual FFNs: what one expert of a StableMoE layer does, for all tokens alike.

    Args:
        hidden_size (`int`): D.
        intermediate_size (`int`): F.
        num_sublayers (`int`): s.
        hidden_act (`str`): activation.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_sublayers: int, hidden_act: str = "relu"):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(hidden_size) for _ in range(num_sublayers)])
        self.up_projs = nn.ModuleList([nn.Linear(hidden_size, intermediate_size) for _ in range(num_sublayers)])
        self.down_projs = nn.ModuleList([nn.Linear(intermediate_size, hidden_size) for _ in range(num_sublayers)])
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, hidden_states: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Map `(..., hidden_size)` to `(..., hidden_size)`; token ids, which a MoE layer takes, make no difference."""
        for norm, up_proj, down_proj in zip(self.norms, self.up_projs, self.down_projs, strict=True):
            hidden_states = hidden_states + down_proj(self.act_fn(up_proj(norm(hidden_states))))
        return hidden_states


class SparseStack(nn.Module):
    """Sparse blocks of transformers with a norm and a residual each.

    Args:
        config (`PreTrainedConfig`): of the blocks.
        block_class (`type`): takes `config`.
        norm_class (`type`): takes the hidden size.
        num_sublayers (`int`): s.
    """

    def __init__(self, config, block_class: type[nn.Module], norm_class: type[nn.Module], num_sublayers: int):
        super().__init__()
        self.config = config
        self.norms = nn.ModuleList([norm_class(config.hidden_size) for _ in range(num_sublayers)])
        self.blocks = nn.ModuleList([block_class(config) for _ in range(num_sublayers)])

    def forward(self, hidden_states: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Map `(batch, sequence, hidden_size)` to the same; token ids make no difference."""
        for norm, block in zip(self.norms, self.blocks, strict=True):
            hidden_states = hidden_states + block(norm(hidden_states))
        return hidden_states


@dataclass
class Contender:
    """A module to measure, under one backend or several.

    Args:
        module (`torch.nn.Module`): maps `(hidden_states, token_ids)` to hidden states.
        config (`PreTrainedConfig`, *optional*): its experts read their backend from it; `None`: it has but one.
    """

    module: nn.Module
    config: object | None = None

    def use(self, backend: str | None):
        """Choose a backend; `None` for a module that has but one."""
        if self.config is not None and backend is not None:
            self.config._experts_implementation = backend


def build_stablemoe(shape: LayerShape) -> Contender:
    """Build a StableMoE layer, to be frozen into a table."""
    config = StableMoEConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_experts=shape.num_experts,
        num_expert_sublayers=shape.num_sublayers,
    )
    config._experts_implementation = DEFAULT_BACKEND
    return Contender(StableMoELayer(config), config)


def build_dense(shape: LayerShape) -> Contender:
    """Build the dense stack of equal work: the limit."""
    return Contender(DenseStack(shape.hidden_size, shape.intermediate_size, shape.num_sublayers))


def _build_sparse(shape: LayerShape, config, block_class, norm_class) -> Contender:
    config._experts_implementation = DEFAULT_BACKEND
    return Contender(SparseStack(config, block_class, norm_class, shape.num_sublayers), config)


def build_mixtral(shape: LayerShape) -> Contender:
    """Build Mixtral's blocks, one expert a token."""
    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.gated_size,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=1,
    )
    return _build_sparse(shape, config, MixtralSparseMoeBlock, MixtralRMSNorm)


def build_olmoe(shape: LayerShape) -> Contender:
    """Build OLMoE's blocks, one expert a token."""
    config = OlmoeConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.gated_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=1,
    )
    return _build_sparse(shape, config, OlmoeSparseMoeBlock, OlmoeRMSNorm)


def build_qwen3_moe(shape: LayerShape) -> Contender:
    """Build Qwen3-MoE's blocks, one expert a token."""
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.gated_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=1,
    )
    return _build_sparse(shape, config, Qwen3MoeSparseMoeBlock, Qwen3MoeRMSNorm)


def build_switch(shape: LayerShape) -> Contender:
    """Build the blocks of Switch Transformers, which loop over their experts whatever the backend."""
    config = SwitchTransformersConfig(
        d_model=shape.hidden_size,
        d_ff=shape.intermediate_size,
        num_experts=shape.num_experts,
        expert_capacity=shape.max_tokens,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
    )
    module = SparseStack(config, SwitchTransformersSparseMLP, SwitchTransformersLayerNorm, shape.num_sublayers)
    return Contender(module)


# In the order in which they get memory.
BUILDERS: dict[str, Callable[[LayerShape], Contender]] = {
    "stablemoe": build_stablemoe,
    "dense": build_dense,
    "mixtral": build_mixtral,
    "olmoe": build_olmoe,
    "qwen3_moe": build_qwen3_moe,
    "switch": build_switch,
}
TRANSFORMERS_BLOCKS = ("mixtral", "olmoe", "qwen3_moe", "switch")
# Experts of one shape, which the gated blocks share: three times as many would not fit.
GATED_BLOCKS = ("mixtral", "olmoe", "qwen3_moe")


def build_contenders(
    shape: LayerShape, names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, Contender]:
    """Build modules with random weights, zero nowhere; gated blocks share their experts.

    Args:
        shape (`LayerShape`): of all.
        names (sequence of `str`): keys of `BUILDERS`.
        device (`torch.device`): where.
        dtype (`torch.dtype`): of all weights.

    Returns:
        `dict[str, Contender]`
    """
    contenders: dict[str, Contender] = {}
    for name in names:
        with torch.device("meta"):
            contender = BUILDERS[name](shape)
        owner = next((other for other in contenders if other in GATED_BLOCKS), None)
        if name in GATED_BLOCKS and owner is not None:
            _share_experts(contender.module, contenders[owner].module)
        _fill(contender.module, device, dtype)
        if isinstance(contender.module, StableMoELayer):
            contender.module.frozen_router.freeze(torch.randint(shape.num_experts, (shape.vocab_size,), device=device))
        contenders[name] = contender
    return contenders


def _share_experts(module: SparseStack, owner: SparseStack):
    for block, other in zip(module.blocks, owner.blocks, strict=True):
        block.experts.gate_up_proj, block.experts.down_proj = other.experts.gate_up_proj, other.experts.down_proj


def _fill(module: nn.Module, device: torch.device, dtype: torch.dtype):
    """Give every parameter and buffer that is on the meta device values on another one."""
    for path, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            values = torch.empty(parameter.shape, device=device, dtype=dtype)
            randomize(values, is_norm="norm" in f"{path}.{name}" and name.endswith("weight"))
            setattr(owner, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
        for name, values in list(owner.named_buffers(recurse=False)):
            if values.is_meta:
                setattr(owner, name, randomize(torch.empty_like(values, device=device)))


@torch.no_grad()
def randomize(values: Tensor, is_norm: bool = False) -> Tensor:
    """Fill a parameter as training leaves one: no kernel is to see zeros.

    Args:
        values (`torch.Tensor`): to fill. Matrices of experts, of three dimensions, are all alike, which no kernel sees
            and which takes a fraction of the time; integers become -1.
        is_norm (`bool`): whether it is the weight of a norm, which is 1.

    Returns:
        `torch.Tensor`: `values`.
    """
    if not values.is_floating_point():
        return values.fill_(-1)
    if is_norm:
        return values.fill_(1.0)
    if values.dim() == 3:
        return values.copy_(torch.empty_like(values[0]).normal_(std=0.02).expand_as(values))
    return values.normal_(std=0.02)


def draw_tokens(shape: LayerShape, num_tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw what a layer sees: hidden states `(batch, sequence, D)` and token ids `(batch, sequence)`, all equally likely."""
    length = SEQUENCE_LENGTH if num_tokens % SEQUENCE_LENGTH == 0 else num_tokens
    size = (num_tokens // length, length)
    hidden_states = torch.randn(*size, shape.hidden_size, device=device).to(dtype)
    return hidden_states, torch.randint(shape.vocab_size, size, device=device)


def run_forward(module: nn.Module, hidden_states: Tensor, token_ids: Tensor):
    """Run a module as inference does."""
    with torch.no_grad():
        module(hidden_states, token_ids)


def run_training(module: nn.Module, hidden_states: Tensor, token_ids: Tensor, gradient: Tensor):
    """Run a module forward and backward, to all its weights and to `hidden_states`."""
    module(hidden_states, token_ids).backward(gradient)


def clear_gradients(module: nn.Module, hidden_states: Tensor):
    """Forget the gradients of `run_training`."""
    module.zero_grad(set_to_none=True)
    hidden_states.grad = None


def is_expert_weight(name: str) -> bool:
    """Tell by its qualified name whether a parameter belongs to experts, ours or transformers'."""
    return "expert_stack." in name or ".experts." in name


def count_active(module: nn.Module, num_experts: int) -> tuple[int, int]:
    """Count parameters.

    Args:
        module (`torch.nn.Module`): a layer or a model whose experts serve one token each.
        num_experts (`int`): E of every layer.

    Returns:
        `tuple[int, int]`: those that a token meets, and all. What a router was distilled into is a table then, not counted.
    """
    counted = [(n, p.numel()) for n, p in module.named_parameters() if p.is_floating_point()]
    counted = [(name, count) for name, count in counted if "distilled_router" not in name]
    experts = sum(count for name, count in counted if is_expert_weight(name))
    total = sum(count for _, count in counted)
    return total - experts + experts // num_experts, total


def flops_per_token(contender: Contender, shape: LayerShape, num_tokens: int = 16) -> float:
    """Count the floating-point operations of the matrix products of a forward pass, by token."""
    weight = next(parameter for parameter in contender.module.parameters() if parameter.is_floating_point())
    hidden_states, token_ids = draw_tokens(shape, num_tokens, weight.device, weight.dtype)
    contender.use("eager")  # fused kernels are not all known to the counter
    with FlopCounterMode(display=False) as counter:
        run_forward(contender.module, hidden_states, token_ids)
    contender.use(DEFAULT_BACKEND)
    return counter.get_total_flops() / num_tokens


__all__ = [
    "BACKENDS",
    "BUILDERS",
    "DEFAULT_BACKEND",
    "GATED_BLOCKS",
    "TRANSFORMERS_BLOCKS",
    "Contender",
    "DenseStack",
    "LayerShape",
    "SparseStack",
    "build_contenders",
    "clear_gradients",
    "count_active",
    "draw_tokens",
    "equal_gated_size",
    "flops_per_token",
    "is_expert_weight",
    "own_backend",
    "randomize",
    "run_forward",
    "run_training",
]
