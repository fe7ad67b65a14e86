# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The backbone: embeddings, blocks, the MoE layers between them, and what a forward pass says of its routing."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .blocks_stablemoe import SinusoidalPositions, StableMoEBlock
from .configuration_stablemoe import StableMoEBaseConfig
from .context_stablemoe import TokenContext, cached_context, new_columns, packed_sequences, whole_context
from .distillation_stablemoe import sees_context
from .experts_stablemoe import Parts
from .health_stablemoe import RoutingHealth, routing_health
from .layer_stablemoe import StableMoELayer, dispatch_ahead, token_mask
from .losses_stablemoe import RoutingLosses, routing_losses, token_weights
from .outputs_stablemoe import StableMoEModelOutputWithPast
from .pretrained_stablemoe import StableMoEPreTrainedModel, check_range
from .routing_stablemoe import RoutingTrace


class StableMoEBackbone(StableMoEPreTrainedModel):
    """What a language model, an encoder and a decoder are alike: embeddings, blocks, MoE layers between them, final norm.

    Args:
        config (`StableMoEBaseConfig`).
        blocks (`list[StableMoEBlock]`): in order.
        moe_layer_positions (`list[int]`): where MoE layers stand: k = after block k, 0 = before the first block.
    """

    # Which of the sides of `config.pruned_tokens` it is: 1 is the decoder of an encoder-decoder.
    side = 0

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
        self.moe_layers = Parts([StableMoELayer(config) for _ in moe_layer_positions])
        # Post-norm blocks end with a norm of their own.
        has_norm = config.do_layer_norm_before
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()
        self.sees_context = bool(moe_layer_positions) and sees_context(config)
        self.gradient_checkpointing = False

    @property
    def num_blocks(self) -> int:
        """`int`: blocks that a pass runs: all of them."""
        return len(self.layers)

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
        check_range(
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
        route_by_backbone: bool = False,
        **kwargs,
    ) -> Tensor:
        """Run `num_blocks` blocks, the MoE layers between them and the final norm.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): of `embed`.
            token_ids (`torch.LongTensor` of shape `(batch, sequence)`): what the tokens are routed by.
            token_mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): False on padding.
            context (`TokenContext`, *optional*): what came before, of `context_of`.
            route_by_backbone (`bool`): see `StableMoEModel.forward`.
            **kwargs: for the blocks.

        Returns:
            `torch.Tensor` of shape `(batch, sequence, hidden_size)`.
        """
        for layer in self.moe_layers:
            layer.frozen_router.follow()
            if self.training:
                layer.frozen_router.is_initial = False
        sorts = self.config._experts_implementation == "grouped_mm"
        places = zip(self.moe_layer_positions, self.moe_layers, strict=True)
        reached = {position: layer for position, layer in places if position <= self.num_blocks}
        ahead = dispatch_ahead(list(reached.values()), token_ids, token_mask, context, sorts)
        output_scores = kwargs.get("output_router_logits", getattr(self.config, "output_router_logits", False))
        moe_layers = dict(zip(reached, zip(reached.values(), ahead, strict=True), strict=True))
        for position in range(self.num_blocks + 1):
            if position > 0:
                hidden_states = self.layers[position - 1](hidden_states, **kwargs)
            if position in moe_layers:
                moe_layer, dispatch = moe_layers[position]
                recalled = None if moe_layer.frozen_router.is_frozen else moe_layer.bare_router.recall()
                hidden_states = moe_layer(
                    hidden_states, token_ids, token_mask, context, recalled, dispatch, output_scores, route_by_backbone
                )
        return self.norm(hidden_states)

    def routed_by(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor | None:
        """Give the ids that tokens are routed by; `None` in a dense model. See `nearest_token_ids`."""
        if not self.moe_layer_positions:
            return input_ids
        token_ids = self.nearest_token_ids(inputs_embeds) if input_ids is None else input_ids
        self.warn_of_pruned_tokens(token_ids, self.side)
        return token_ids

    def context_of(
        self,
        token_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
    ) -> TokenContext | None:
        """Give the sequences so far to routers that look back at earlier tokens, and note new tokens in the cache.

        Args:
            token_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): of `routed_by`.
            attention_mask (`torch.Tensor`, *optional*): see `token_mask`.
            cache (`Cache`, *optional*): of the self-attention, before the blocks add these tokens to it.
            position_ids (`torch.LongTensor` of shape `(batch or 1, sequence)`, *optional*): where rows may hold several
                sequences, which is where attention tells them apart: without a mask or earlier tokens in the cache.
            cu_seq_lens (`torch.IntTensor` of shape `(sequences + 1,)`, *optional*): see `packed_sequences`.

        Returns:
            `TokenContext`, or `None` where routers see the token alone.

        Raises:
            ValueError: see `cached_context`; also for packed sequences where `position_ids` are not given.
        """
        if not self.sees_context:
            return None
        if cu_seq_lens is not None and position_ids is None:
            raise ValueError(
                f"A {self.config.distilled_router!r} router looks back at earlier tokens, and tells apart sequences that are "
                "packed into one row (`cu_seq_lens_q`) in a language model alone, without `attention_mask` and cache. Pad "
                "them instead, one per row; for continuous batching train a model with "
                '`distilled_router="word_embedding"`.'
            )
        sequences = packed_sequences(token_ids.shape, position_ids, cu_seq_lens)
        if cache is None:
            return whole_context(token_ids, token_mask(attention_mask, token_ids.shape[1]), sequences)
        whole_mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        ids, mask, positions, _ = cached_context(cache, self.num_blocks, token_ids, whole_mask)
        return ids, mask, positions, sequences

    def routing_losses(
        self,
        outputs: StableMoEModelOutputWithPast,
        attention_mask: Tensor | None,
        is_learning: bool,
        is_target: Tensor | None,
    ) -> RoutingLosses:
        """Compute the routing losses of a forward pass that recorded its routing.

        Args:
            outputs (`StableMoEModelOutputWithPast`): with `expert_indices`, `routing_traces` and, where there are any,
                `router_logits` and `distilled_router_logits`.
            attention_mask (`torch.Tensor`, *optional*): of that pass, see `mask_of_pass`.
            is_learning (`bool`): whether balance counts run over the tokens of all processes, of `is_learning`.
            is_target (`torch.BoolTensor` of shape `(batch, ...)`, *optional*): what the task loss predicts of each sequence,
                by which they weigh; `None` weighs all tokens alike.

        Returns:
            `RoutingLosses`
        """
        traces = [RoutingTrace(*trace) for trace in outputs.routing_traces]
        index, token_weight = outputs.expert_indices[0], None
        if is_target is not None:
            batch, length = index.shape
            targets = is_target.to(index.device).reshape(batch, -1).sum(-1)
            mask = self._flat_mask(outputs, attention_mask, index.device)
            mask = None if mask is None else mask.view(batch, length)
            token_weight = token_weights(targets, mask, length, traces[0].gate.dtype)
        return routing_losses(
            balance_loss_function=self.moe_layers[0].bare_router.balance_loss,
            num_experts=self.config.num_experts,
            router_logits=outputs.router_logits or (),
            distilled_logits=outputs.distilled_router_logits or (),
            expert_indices=[index.flatten() for index in outputs.expert_indices],
            teachers=[trace.teacher_index for trace in traces if trace.teacher_index is not None],
            mask=self._flat_mask(outputs, attention_mask, index.device),
            # Evaluation and sampling may run on one process alone, where a collective would wait for ever.
            training=is_learning,
            token_weight=token_weight,
            windows=[layer.bare_router.memory.load_of_window for layer in self.moe_layers]
            if self.config.balance_window_tokens
            else (),
        )

    def routing_health(
        self, outputs: StableMoEModelOutputWithPast, attention_mask: Tensor | None
    ) -> list[RoutingHealth]:
        """Measure the health of each MoE layer's routing in a forward pass; arguments as of `observe_routing`."""
        layers = []
        scores = outputs.router_logits or [None] * len(outputs.routing_traces)  # a hash has none
        for trace, logits in zip(outputs.routing_traces, scores, strict=True):
            trace = RoutingTrace(*trace)
            mask = self._flat_mask(outputs, attention_mask, trace.gate.device)
            layers.append(
                routing_health(**trace._asdict(), vocab_size=self.config.vocab_size, router_logits=logits, mask=mask)
            )
        return layers

    def observe_routing(self, outputs: StableMoEModelOutputWithPast, attention_mask: Tensor | None):
        """Let the routers follow a pass of stage 1 that learns with what no gradient brings them.

        Every process must call this.

        Args:
            outputs (`StableMoEModelOutputWithPast`): with `expert_indices` and `routing_traces`.
            attention_mask (`torch.Tensor`, *optional*): the mask of that pass.
        """
        for layer, trace in zip(self.moe_layers, outputs.routing_traces, strict=True):
            if not layer.frozen_router.is_frozen:
                device = RoutingTrace(*trace).gate.device
                layer.bare_router.observe(trace, self._flat_mask(outputs, attention_mask, device))

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
        weight = self.embedded_vocabulary(inputs_embeds.device).float()
        squared_norm = weight.square().sum(-1)
        num_candidates = min(num_candidates, weight.shape[0])
        nearest = []
        for vectors in inputs_embeds.flatten(0, 1).float().split(chunk_size):
            rough = squared_norm - 2 * vectors @ weight.T
            candidates = rough.topk(num_candidates, largest=False).indices.sort(-1).values
            exact = (weight[candidates] - vectors.unsqueeze(1)).square().sum(-1)
            nearest.append(candidates.gather(-1, exact.argmin(-1, keepdim=True)).squeeze(-1))
        return torch.cat(nearest).view(inputs_embeds.shape[:2])

    def embedded_vocabulary(self, device: torch.device) -> Tensor:
        """Return what `embed_tokens` makes of every token id: `torch.Tensor` of shape `(vocab_size, hidden_size)`.

        Args:
            device (`torch.device`): where it is asked with ids.
        """
        embedding = self.embed_tokens
        # An adapter, a quantiser or a sharding engine has put another class there, which knows more than its `weight`; hooks
        # bring a weight that is offloaded. They are asked once for all ids, because each call may fetch or gather the weight.
        if type(embedding) is nn.Embedding and not hasattr(embedding, "_hf_hook"):
            return embedding.weight
        ids = torch.arange(self.config.vocab_size, device=device)
        return embedding(ids.unsqueeze(0)).squeeze(0)


def count_positions(inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """Count positions over real tokens, so that padding on either side moves none: `(batch or 1, sequence)`."""
    sequence_length = inputs_embeds.shape[1]
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return new_columns(counted, sequence_length, cache)
    past_length = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(sequence_length, device=inputs_embeds.device) + past_length).unsqueeze(0)


__all__ = ["StableMoEBackbone", "count_positions"]
