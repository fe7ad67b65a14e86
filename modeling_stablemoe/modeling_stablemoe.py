# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Transformer blocks with MoE layers between them, and the decoder-only language model made of them."""

from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_stablemoe import StableMoEBaseConfig, StableMoEConfig
from .context_stablemoe import TokenContext, cached_context, whole_context
from .dense_stablemoe import convert_dense
from .distillation_stablemoe import CountRouter, DistilledRouter, sees_context
from .experts_stablemoe import ExpertSublayer
from .frozen_stablemoe import FrozenRouter, FrozenWeights
from .health_stablemoe import RoutingHealth, mean_health, routing_health
from .integration_stablemoe import IntegrationMixin
from .layer_stablemoe import StableMoELayer, token_mask
from .losses_stablemoe import (
    RoutingLosses,
    combine_routing_losses,
    count_causal_targets,
    divisor_of,
    routing_losses,
)
from .outputs_stablemoe import StableMoECausalLMOutputWithPast, StableMoEModelOutputWithPast
from .routing_stablemoe import LearnedRouter, Router
from .running_stablemoe import RouterMemory
from .stages_stablemoe import TwoStageRoutingMixin


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

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to positions of the same sequence, `(batch, sequence, hidden_size)` in and out."""
        key, value = self.project(hidden_states)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
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

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Map `(batch, sequence, hidden_size)` to `(batch, sequence, hidden_size)`."""

        def attend(normed: Tensor) -> Tensor:
            return self.self_attn(normed, attention_mask, past_key_values, **kwargs)[0]

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
        exponent = torch.arange(0, self.hidden_size, 2, device=position_ids.device) / self.hidden_size
        angle = position_ids.unsqueeze(-1) * 10000.0**-exponent
        return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., : self.hidden_size]


class StableMoEPreTrainedModel(TwoStageRoutingMixin, IntegrationMixin, PreTrainedModel):
    """What all StableMoE models share: initialisation, loading, and the two stages of the routing."""

    config: StableMoEConfig
    config_class = StableMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StableMoEBlock", "StableMoELayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _auto_map = {
        "AutoConfig": "configuration_stablemoe.StableMoEConfig",
        "AutoModel": "modeling_stablemoe.StableMoEModel",
        "AutoModelForCausalLM": "modeling_stablemoe.StableMoEForCausalLM",
    }
    _can_record_outputs = {
        "hidden_states": StableMoEBlock,
        "attentions": StableMoEAttention,
        "router_logits": OutputRecorder(Router, index=0),
        "expert_indices": OutputRecorder(Router, index=1),
        "distilled_router_logits": OutputRecorder(Router, index=3),
        "routing_traces": OutputRecorder(Router, index=4),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ExpertSublayer):
            # W2 and its bias at zero: a new expert changes nothing (released code).
            init.ones_(module.norm_weight)
            init.zeros_(module.norm_bias)
            init.normal_(module.up_proj, mean=0.0, std=self.config.initializer_range)
            if self.config.share_experts_in_stage1:
                init.copy_(module.up_proj, module.up_proj[:1].expand_as(module.up_proj).clone())
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj)
            init.zeros_(module.down_proj_bias)
        elif isinstance(module, LearnedRouter):
            init.orthogonal_(module.centroids, gain=0.1)
        elif isinstance(module, RouterMemory):
            for values in module.parameters():
                init.zeros_(values)
        elif isinstance(module, DistilledRouter):
            self._init_distilled_router(module)
        elif isinstance(module, FrozenRouter):
            init.copy_(module.routing_table, module.initial_table())
        elif isinstance(module, FrozenWeights):
            for bits in module.parameters():
                init.copy_(bits, torch.full_like(bits, -1))

    def _init_distilled_router(self, module: DistilledRouter):
        init.normal_(module.embedding, mean=0.0, std=1.0)
        init.orthogonal_(module.centroids, gain=0.1)
        if isinstance(module, CountRouter):
            init.zeros_(module.expert_counts)
        for name, parameter in module.named_parameters():
            if name.endswith("norm_weight"):
                init.ones_(parameter)
            elif name.endswith("_bias"):
                init.zeros_(parameter)
            elif name.endswith("_weight"):  # features of the size of the embedding's
                init.normal_(parameter, mean=0.0, std=parameter.shape[-1] ** -0.5)

    def create_masks_for_generate(self, *, attention_mask: Tensor | None, **kwargs) -> Tensor | dict | None:
        """Make the mask that `generate` gives with a static cache, as `transformers.masking_utils` does.

        A router that looks back at earlier tokens must know which of them are padding, which the ready mask of four
        dimensions hides: there the mask stays as it is.
        """
        if sees_context(self.config):
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)

    def check_token_ids(self, token_ids: Tensor):
        """Refuse ids outside the vocabulary, on the CPU and outside compiled code.

        Raises:
            ValueError: naming an offending id.
        """
        _check_range(
            token_ids,
            self.config.vocab_size,
            "token id",
            "`vocab_size`; use the model's own tokenizer, or `resize_token_embeddings` after adding tokens",
        )

    @staticmethod
    def describe_routing(sides: list[RoutingLosses], health: list[RoutingHealth]) -> dict[str, Any]:
        """Gather the fields of an output that tell how the routing fares.

        Args:
            sides (`list[RoutingLosses]`): of the backbone, or of encoder and decoder.
            health (`list[RoutingHealth]`): of all MoE layers, in the same order.

        Returns:
            `dict`: `balance_loss`, `distillation_loss`, `expert_load`, `distillation_agreement` and `routing_health`.
        """
        losses = combine_routing_losses(sides)
        mean = mean_health(health, losses.expert_load.sum(-1))
        return {
            **losses._asdict(),
            "distillation_agreement": mean.distillation_agreement,
            "routing_health": mean,
        }

    def _balance_weight(self) -> Tensor | float:
        """Give the share of the balance loss that counts by now, of `balance_loss_warmup_tokens`."""
        if not self.config.balance_loss_warmup_tokens:
            return 1.0
        first = next(iter(self.moe_layers_by_name.values()))
        return (first.router.memory()["tokens"][0] / self.config.balance_loss_warmup_tokens).clamp(max=1.0)

    def auxiliary_loss(
        self, routing: RoutingLosses, targets: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Weigh the routing losses as they enter the loss, up to `router_aux_loss_coef` (eq. 11).

        The task loss is divided by `num_items_in_batch`, so the auxiliary loss of each micro-batch, a mean, must count
        for its share of it: else it would grow with the number of micro-batches and processes.

        Args:
            routing (`RoutingLosses`): of this micro-batch.
            targets (`torch.LongTensor` of shape `()`, *optional*): target tokens of this micro-batch, if it has labels.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): those of the whole batch.

        Returns:
            `torch.Tensor` of shape `()`: 0 where there are labels but no target tokens, and `num_items_in_batch` is
                given.
        """
        aux_loss = self.config.distillation_loss_coef * routing.distillation_loss
        if self.config.balance_loss_coef:
            weight = self.config.balance_loss_coef * self._balance_weight()
            aux_loss = aux_loss + weight * routing.balance_loss
        if num_items_in_batch is None or targets is None:
            return aux_loss
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(aux_loss.device)
        targets = targets.to(aux_loss.device)
        return aux_loss * (targets / divisor_of(num_items_in_batch, targets))


class StableMoEBackbone(StableMoEPreTrainedModel):
    """What a language model, an encoder and a decoder are alike: embeddings, blocks, MoE layers between them, final norm.

    Args:
        config (`StableMoEBaseConfig`).
        blocks (`list[StableMoEBlock]`): in order.
        moe_layer_positions (`list[int]`): where MoE layers stand: k = after block k, 0 = before the first block.
    """

    def __init__(self, config: StableMoEBaseConfig, blocks: list[StableMoEBlock], moe_layer_positions: list[int]):
        super().__init__(config)
        self.moe_layer_positions = moe_layer_positions
        self.embed_scale = config.hidden_size**0.5 if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.embed_positions = SinusoidalPositions(config.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.moe_layers = nn.ModuleList([StableMoELayer(config) for _ in moe_layer_positions])
        # Post-norm blocks end with a norm of their own.
        has_norm = config.do_layer_norm_before
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()
        self.sees_context = bool(moe_layer_positions) and sees_context(config)
        self.gradient_checkpointing = False

    def look_up(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Give `inputs_embeds` or, without them, the embeddings of `input_ids`: `(batch, sequence, hidden_size)`.

        Raises:
            ValueError: without both, for input without any token, or for a token id outside the vocabulary.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("Pass `input_ids` or `inputs_embeds`.")
        name, given = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        if 0 in given.shape[:2]:
            raise ValueError(
                f"There is no token: `{name}` has shape {tuple(given.shape)}. Pass one sequence at least, of one token at "
                "least; leave empty texts out of the batch, or begin them with a special token."
            )
        if input_ids is not None:
            self.check_token_ids(input_ids)
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def embed(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Scale the token embeddings and add those of positions: what the first block sees.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): token embeddings.
            position_ids (`torch.LongTensor` of shape `(batch or 1, sequence)`): in [0, max_position_embeddings).

        Returns:
            `torch.Tensor` of shape `(batch, sequence, hidden_size)`.

        Raises:
            ValueError: for a position past `max_position_embeddings`.
        """
        _check_range(
            position_ids,
            self.config.max_position_embeddings,
            "position",
            "`max_position_embeddings`; shorten the input, or the generation (`max_new_tokens`)",
        )
        positions = self.embed_positions(position_ids).to(inputs_embeds.dtype)
        hidden_states = inputs_embeds * self.embed_scale + positions
        return nn.functional.dropout(hidden_states, p=self.config.dropout, training=self.training)

    def transform(
        self,
        hidden_states: Tensor,
        *,
        token_ids: Tensor,
        token_mask: Tensor | None,
        context: TokenContext | None,
        **kwargs,
    ) -> Tensor:
        """Run the blocks, the MoE layers between them and the final norm.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): of `embed`.
            token_ids (`torch.LongTensor` of shape `(batch, sequence)`): what the tokens are routed by.
            token_mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): False on padding.
            context (`TokenContext`, *optional*): what came before, of `context_of`.
            **kwargs: for the blocks.

        Returns:
            `torch.Tensor` of shape `(batch, sequence, hidden_size)`.
        """
        moe_layers = dict(zip(self.moe_layer_positions, self.moe_layers, strict=True))
        for position in range(len(self.layers) + 1):
            if position > 0:
                hidden_states = self.layers[position - 1](hidden_states, **kwargs)
            if position in moe_layers:
                moe_layer = moe_layers[position]
                recalled = None if moe_layer.frozen_router.is_frozen else moe_layer.router.recall()
                hidden_states = moe_layer(hidden_states, token_ids, token_mask, context, recalled)
        return self.norm(hidden_states)

    def routed_by(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor | None:
        """Give the ids that tokens are routed by; `None` in a dense model. See `nearest_token_ids`."""
        if input_ids is not None or not self.moe_layer_positions:
            return input_ids
        return self.nearest_token_ids(inputs_embeds)

    def context_of(
        self,
        token_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        is_packed: bool = False,
    ) -> TokenContext | None:
        """Give the sequences so far to routers that look back at earlier tokens, and note new tokens in the cache.

        Args:
            token_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): of `routed_by`.
            attention_mask (`torch.Tensor`, *optional*): see `token_mask`.
            cache (`Cache`, *optional*): of the self-attention, before the blocks add these tokens to it.
            is_packed (`bool`): whether a row holds several sequences.

        Returns:
            `TokenContext`, or `None` where routers see the token alone.

        Raises:
            ValueError: see `cached_context`; also for packed sequences.
        """
        if not self.sees_context:
            return None
        if is_packed:
            raise ValueError(
                f"A {self.config.distilled_router!r} router looks back at earlier tokens and cannot tell apart sequences that "
                "are packed into one row. Pad them instead, one a row; for continuous batching train a model with "
                '`distilled_router="word_embedding"`.'
            )
        if cache is None:
            return whole_context(token_ids, token_mask(attention_mask, token_ids.shape[1]))
        whole_mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        return cached_context(cache, len(self.layers), token_ids, whole_mask)

    def routing_losses(self, outputs: StableMoEModelOutputWithPast, attention_mask: Tensor | None) -> RoutingLosses:
        """Compute the routing losses of a forward pass that recorded its routing.

        Args:
            outputs (`StableMoEModelOutputWithPast`): with `expert_indices`, `routing_traces` and, where there are any,
                `router_logits` and `distilled_router_logits`.
            attention_mask (`torch.Tensor`, *optional*): the mask of that pass.

        Returns:
            `RoutingLosses`
        """
        return routing_losses(
            router_type=self.config.router_type,
            num_experts=self.config.num_experts,
            router_logits=outputs.router_logits or (),
            distilled_logits=outputs.distilled_router_logits or (),
            expert_indices=[index.flatten() for index in outputs.expert_indices],
            teachers=[t.teacher_index for t in outputs.routing_traces if t.teacher_index is not None],
            mask=self._flat_mask(outputs, attention_mask, outputs.expert_indices[0].device),
            # Evaluation may run on one process alone, where a collective would wait for ever.
            training=self.training,
        )

    def routing_health(
        self, outputs: StableMoEModelOutputWithPast, attention_mask: Tensor | None
    ) -> list[RoutingHealth]:
        """Measure the health of each MoE layer's routing in a forward pass; arguments as of `routing_losses`."""
        layers = []
        for trace in outputs.routing_traces:
            mask = self._flat_mask(outputs, attention_mask, trace.gate.device)
            layers.append(routing_health(**trace._asdict(), vocab_size=self.config.vocab_size, mask=mask))
        return layers

    def observe_routing(self, outputs: StableMoEModelOutputWithPast, attention_mask: Tensor | None):
        """Let the routers follow a training pass of stage 1 with what no gradient brings them.

        Every process must call this; arguments as of `routing_losses`.
        """
        for layer, trace in zip(self.moe_layers, outputs.routing_traces, strict=True):
            if not layer.frozen_router.is_frozen:
                layer.router.observe(trace, self._flat_mask(outputs, attention_mask, trace.gate.device))

    @staticmethod
    def _flat_mask(outputs, attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
        mask = token_mask(attention_mask, outputs.expert_indices[0].shape[-1])
        return None if mask is None else mask.flatten().to(device)

    @torch.no_grad()
    def nearest_token_ids(self, inputs_embeds: Tensor, chunk_size: int = 1024, num_candidates: int = 16) -> Tensor:
        """Find the tokens whose embeddings are nearest, exactly the token itself where a vector is one.

        Args:
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, hidden_size)`): vectors to look up.
            chunk_size (`int`): vectors compared with the vocabulary at a time, which bounds memory.
            num_candidates (`int`): how many of the nearest by a matrix product, which rounds, are measured exactly.

        Returns:
            `torch.LongTensor` of shape `(batch, sequence)`: in [0, vocab_size); the lowest of equally near ids, any id
            for a vector that is NaN. An embedding that is NaN is near to nothing.
        """
        weight = self.embed_tokens.weight.float()
        squared_norm = weight.square().sum(-1)
        num_candidates = min(num_candidates, weight.shape[0])
        nearest = []
        for vectors in inputs_embeds.flatten(0, 1).float().split(chunk_size):
            rough = squared_norm - 2 * vectors @ weight.T
            candidates = rough.topk(num_candidates, largest=False).indices.sort(-1).values
            exact = (weight[candidates] - vectors.unsqueeze(1)).square().sum(-1)
            nearest.append(candidates.gather(-1, exact.argmin(-1, keepdim=True)).squeeze(-1))
        return torch.cat(nearest).view(inputs_embeds.shape[:2])


class StableMoEModel(StableMoEBackbone):
    """The backbone of the language model.

    Args:
        config ([`StableMoEConfig`]): `moe_layer_positions` says where MoE layers stand.
    """

    def __init__(self, config: StableMoEConfig):
        self.check_config(config)
        blocks = [StableMoEBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        super().__init__(config, blocks, config.moe_layer_positions)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableMoEModelOutputWithPast:
        """Run the backbone.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): in [0, vocab_size).
            attention_mask (`torch.Tensor`, *optional*): of shape `(batch, past + sequence)`, 0 on padding, which is
                not routed; or a mask that the attention implementation takes as it is, where every token is routed.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): default: counted over the
                tokens that `attention_mask` shows.
            past_key_values (`Cache`, *optional*): keys and values of earlier positions; and their ids, which this
                model adds, where the distilled router looks back at them.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, hidden_size)`, *optional*): in place of
                token embeddings. Without `input_ids` each vector is routed as the token whose embedding is nearest.
            use_cache (`bool`, *optional*): return `past_key_values`.
            **kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, `output_expert_indices`,
                `output_distilled_router_logits`, and what attention implementations take.

        Returns:
            `StableMoEModelOutputWithPast`

        Raises:
            ValueError: without `input_ids` and `inputs_embeds`; for input without any token; for a token id outside
                the vocabulary or a position past `max_position_embeddings` (on an accelerator the embedding's own
                device assertion fires); see `context_of` for a distilled router that looks back.
        """
        inputs_embeds = self.look_up(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = count_positions(inputs_embeds, attention_mask, past_key_values)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        token_ids = self.routed_by(input_ids, inputs_embeds)
        hidden_states = self.transform(
            self.embed(inputs_embeds, position_ids),
            token_ids=token_ids,
            token_mask=token_mask(attention_mask, inputs_embeds.shape[1]),
            context=self.context_of(token_ids, attention_mask, past_key_values, "cu_seq_lens_q" in kwargs),
            attention_mask=causal_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return StableMoEModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class StableMoEForCausalLM(StableMoEPreTrainedModel, GenerationMixin):
    """The language model of StableMoE: the backbone and a head that shares the token embedding.

    Args:
        config ([`StableMoEConfig`]).
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: StableMoEConfig):
        super().__init__(config)
        self.model = StableMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_dense(
        cls,
        dense: PreTrainedModel | str | PathLike,
        *,
        num_experts: int | None = None,
        moe_layer_positions: list[int] | None = None,
        **options: Any,
    ) -> "StableMoEForCausalLM":
        """Make a StableMoE of a dense GPT-2 or OPT, with the same logits, ready for both stages of training.

        MoE layers are put between its blocks, and their new experts add nothing until they are trained. Weights, dtype,
        device, generation settings and attention implementation are those of the dense model. So is its rate of dropout
        (`resid_pdrop` and `embd_pdrop` of GPT-2; that of OPT falls on the embeddings here, too).

        Args:
            dense (`GPT2LMHeadModel`, `OPTForCausalLM`, `str` or `PathLike`): the model, or its Hub name or folder.
            num_experts (`int`, *optional*): of each MoE layer; default 32, as the paper's base model.
            moe_layer_positions (`list[int]`, *optional*): k = after block k, 0 = before the first block; default: one
                layer in the middle, the best place in table 4. `[]` adds nothing.
            **options: every other field of `StableMoEConfig` that the dense model does not determine:
                `num_expert_sublayers` (3), those of routing and stage 1, `dropout`, `attention_dropout`,
                `initializer_range` (of the experts), `use_cache` and special token ids. `attn_implementation` and
                `experts_implementation` as in `from_pretrained`; with a name or folder also `revision`, `token`,
                `cache_dir`, `dtype` and the like (see `LOADING_OPTIONS`).

        Returns:
            `StableMoEForCausalLM`: in stage 1, and in the dense model's mode: evaluation, if it was loaded here.

        Raises:
            OSError: if there is no such checkpoint.
            ValueError: for another architecture, a setting of the dense model that these blocks do not have, a tensor too
                many or missing, or an option that is none; the message names it.
        """
        options |= {"num_experts": num_experts, "moe_layer_positions": moe_layer_positions}
        return convert_dense(cls, dense, options)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableMoECausalLMOutputWithPast:
        """Predict the next token of each position; see `StableMoEModel.forward` for what they share.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): see there.
            attention_mask (`torch.Tensor`, *optional*): see there.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): see there.
            past_key_values (`Cache`, *optional*): see there.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, hidden_size)`, *optional*): see there.
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): token ids, not shifted; -100 is
                routed but not predicted. Without anything to predict, as in sequences of one token, `task_loss` is 0.
            use_cache (`bool`, *optional*): see there.
            output_router_logits (`bool`, *optional*): return `router_logits`, `expert_indices` and, in eval mode too,
                `aux_loss`; default `config.output_router_logits`.
            logits_to_keep (`int` or `torch.Tensor`): compute logits for the last positions only, or for these.
            **kwargs: `num_items_in_batch`, the target tokens of the whole (accumulated, world-wide) batch that the
                loss is divided by, `shift_labels`, and those of `StableMoEModel.forward`.

        Returns:
            `StableMoECausalLMOutputWithPast`
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        with_routing = self.training or output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=with_routing,
            output_expert_indices=with_routing,
            output_distilled_router_logits=with_routing,
            output_routing_traces=with_routing,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])

        loss = task_loss = None
        if labels is not None:
            task_loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            # A mean over no targets is NaN: 0 / 0.
            has_targets = self.count_targets(labels, kwargs.get("shift_labels")).to(task_loss.device) > 0
            loss = task_loss = torch.where(has_targets, task_loss, 0.0)
        routing, aux_loss = {}, None
        if with_routing and self.config.moe_layer_positions:
            losses = self.model.routing_losses(outputs, attention_mask)
            routing = self.describe_routing([losses], self.model.routing_health(outputs, attention_mask))
            shifted = kwargs.get("shift_labels")
            targets = None if labels is None and shifted is None else self.count_targets(labels, shifted)
            # Layers may stand on several devices.
            aux_loss = self.auxiliary_loss(losses, targets, kwargs.get("num_items_in_batch")).to(logits.device)
            if self.training:
                self.model.observe_routing(outputs, attention_mask)
                loss = None if loss is None else loss + self.config.router_aux_loss_coef * aux_loss
        elif with_routing:
            aux_loss = torch.zeros((), device=logits.device)
        return StableMoECausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=(outputs.router_logits or None) if output_router_logits else None,
            expert_indices=outputs.expert_indices if output_router_logits else None,
            task_loss=task_loss,
            **routing,
        )

    def count_targets(self, labels: Tensor | None = None, shift_labels: Tensor | None = None) -> Tensor:
        """Count the tokens that the task loss predicts; see `losses_stablemoe.count_causal_targets`.

        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): not shifted.
            shift_labels (`torch.LongTensor`, *optional*): shifted already; used where given.

        Returns:
            `torch.LongTensor` of shape `()`.
        """
        return count_causal_targets(labels, shift_labels)

    def routed_tokens(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Tell what each MoE layer routes of a batch, for statistics.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): as given to `forward`.
            attention_mask (`torch.Tensor`, *optional*): as given to `forward`.
            **kwargs: the other arguments of `forward`, which change nothing here.

        Returns:
            `list[tuple]`: one a MoE layer: token ids, `None` where embeddings were given instead, and the mask of real
            tokens, `None` where all are real; of shape `(batch, sequence)` each.
        """
        mask = None if input_ids is None else token_mask(attention_mask, input_ids.shape[-1])
        return [(input_ids, mask)] * self.config.num_moe_layers


def count_positions(inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
    """Count positions over real tokens, so that padding on either side moves none: `(batch or 1, sequence)`."""
    sequence_length = inputs_embeds.shape[1]
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return counted[:, -sequence_length:]
    past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
    return (torch.arange(sequence_length, device=inputs_embeds.device) + past_length).unsqueeze(0)


def _check_range(ids: Tensor, limit: int, what: str, remedy: str):
    # Only where looking costs nothing: an accelerator would have to be waited for, compiled code would break.
    if ids.device.type != "cpu" or is_torchdynamo_compiling() or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise ValueError(f"There is a {what} {low if low < 0 else high}, outside 0..{limit - 1} of {remedy}.")


StableMoEConfig.register_for_auto_class()
StableMoEModel.register_for_auto_class("AutoModel")
StableMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")


__all__ = [
    "StableMoEAttention",
    "StableMoEBackbone",
    "StableMoEBlock",
    "StableMoEForCausalLM",
    "StableMoEModel",
    "StableMoEPreTrainedModel",
    "count_positions",
]
