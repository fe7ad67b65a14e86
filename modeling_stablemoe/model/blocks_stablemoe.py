# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Transformer blocks, all of them dense: attention, FFN, positions. The experts stand between blocks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_stablemoe import StableMoEBaseConfig
from .tensors_stablemoe import sinusoids
from .versions_stablemoe import takes_cache_by_either_name, update_cache


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attend with plain matrix products; `query`, `key`, `value` of shape `(batch, heads, sequence, head_dim)`."""
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class StableMoEAttention(nn.Module):
    """Multi-head attention with biases, through transformers' attention interface.

    Args:
        config (`StableMoEBaseConfig`).
        layer_idx (`int`): place of the block, which finds its keys and values in a cache.
        is_causal (`bool`): whether a position sees only earlier ones.
    """

    def __init__(self, config: StableMoEBaseConfig, layer_idx: int, is_causal: bool = True):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = is_causal
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        # Initialisation asks for it, which is shown one matrix at a time.
        self.q_proj.part_of_block = self.k_proj.part_of_block = self.v_proj.part_of_block = "qkv"
        self.o_proj.part_of_block = "attention_output"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to positions of the same sequence, `(batch, sequence, hidden_size)` in and out."""
        key, value = self.project(hidden_states)
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)
        return self.attend(hidden_states, key, value, attention_mask, **kwargs)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Make keys and values of `(batch, sequence, hidden_size)`: `(batch, heads, sequence, head_dim)` each."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        return key, self.v_proj(hidden_states).view(heads).transpose(1, 2)

    def attend(
        self,
        hidden_states: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `(batch, sequence, hidden_size)` to keys and values of any length."""
        input_shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*input_shape, -1, self.head_dim).transpose(1, 2)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended.reshape(*input_shape, -1).contiguous()), weights


class StableMoEMLP(nn.Module):
    """The FFN of a block: W2 act(W1 x)."""

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.up_proj.part_of_block = self.down_proj.part_of_block = "ffn"
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(..., hidden_size)` to `(..., hidden_size)`."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class StableMoEBlock(GradientCheckpointingLayer):
    """A Transformer block, pre-norm or post-norm; every block is dense, the experts stand between blocks.

    Args:
        config (`StableMoEBaseConfig`).
        layer_idx (`int`): place of the block.
        is_causal (`bool`): whether a position sees only earlier ones.
    """

    def __init__(self, config: StableMoEBaseConfig, layer_idx: int, is_causal: bool = True):
        super().__init__()
        self.dropout = config.dropout
        self.norm_before = config.do_layer_norm_before
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = StableMoEAttention(config, layer_idx, is_causal)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = StableMoEMLP(config)

    @takes_cache_by_either_name
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Map `(batch, sequence, hidden_size)` to `(batch, sequence, hidden_size)`."""

        def attend(normed: Tensor) -> Tensor:
            return self.self_attn(normed, attention_mask, cache, **kwargs)[0]

        hidden_states = self.add(attend, self.input_layernorm, hidden_states)
        return self.add(self.mlp, self.post_attention_layernorm, hidden_states)

    def add(self, sublayer: Callable[[Tensor], Tensor], norm: nn.LayerNorm, hidden_states: Tensor) -> Tensor:
        """Add a sublayer's output to its input, normalised on the side that `do_layer_norm_before` says."""
        change = sublayer(norm(hidden_states) if self.norm_before else hidden_states)
        hidden_states = hidden_states + nn.functional.dropout(change, p=self.dropout, training=self.training)
        return hidden_states if self.norm_before else norm(hidden_states)


class SinusoidalPositions(nn.Module):
    """The sine and cosine of each position at geometrically spaced wavelengths (Vaswani et al., 2017, section 3.5)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, position_ids: Tensor) -> Tensor:
        """Map `(batch, sequence)` to `(batch, sequence, hidden_size)`, float32: all sines, then all cosines."""
        # Computed, not stored: a table would be a buffer, which loading on the meta device leaves empty.
        return sinusoids(position_ids, self.hidden_size, torch.float32)


__all__ = ["SinusoidalPositions", "StableMoEAttention", "StableMoEBlock", "StableMoEMLP", "eager_attention_forward"]
