# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The backbone: embeddings, blocks, and the MoE layers between them."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .blocks_stablemoe import SinusoidalPositions, StableMoEBlock
from .configuration_stablemoe import StableMoEBaseConfig
from .context_stablemoe import (
    Tokens,
    cached_sequences,
    new_columns,
    packed_sequences,
    token_mask,
    whole_sequences,
    with_rows,
)
from .decoder_stablemoe import blocks_of, build_decoder, moe_layer_at
from .distillation_stablemoe import needs_context
from .experts_stablemoe import Parts
from .layer_stablemoe import StableMoELayer, look_up_ahead
from .pretrained_stablemoe import StableMoEPreTrainedModel, check_range


class StableMoEBackbone(StableMoEPreTrainedModel):
    """What a language model, an encoder and a decoder are alike: embeddings, blocks, MoE layers between them, final norm.

    Args:
        config (`StableMoEBaseConfig`).
        blocks (`list[StableMoEBlock]`, *optional*): in order; `None` where `config.backbone_config` has blocks of its own.
        moe_layer_positions (`list[int]`): where MoE layers stand, ascending: k = after block k, 0 = before the first block.
    """

    # Which of the sides of `config.pruned_tokens` it is: 1 is the decoder of an encoder-decoder.
    side = 0

    def __init__(
        self, config: StableMoEBaseConfig, blocks: list[StableMoEBlock] | None, moe_layer_positions: list[int]
    ):
        super().__init__(config)
        self.moe_layer_positions = moe_layer_positions
        self.gradient_checkpointing = False
        if blocks is None:
            self.decoder = build_decoder(config)
        else:
            self._build(config, blocks)

    def _build(self, config: StableMoEBaseConfig, blocks: list[StableMoEBlock]):
        """Build the paper's model around its blocks."""
        self.embed_scale = config.hidden_size**0.5 if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.embed_positions = SinusoidalPositions(config.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.moe_layers = Parts([StableMoELayer(config) for _ in self.moe_layer_positions])
        # Post-norm blocks end with a norm of their own.
        has_norm = config.do_layer_norm_before
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()

    @property
    def has_decoder(self) -> bool:
        """`bool`: whether the blocks are those of a decoder of transformers, and not the paper's."""
        return "decoder" in self._modules

    @property
    def blocks(self) -> nn.ModuleList:
        """`nn.ModuleList`: the blocks, in order."""
        return blocks_of(self.decoder) if self.has_decoder else self.layers

    @property
    def num_blocks(self) -> int:
        """`int`: blocks that a pass runs: all of them."""
        return len(self.blocks)

    @property
    def moe_layers_in_order(self) -> list[StableMoELayer]:
        """`list[StableMoELayer]`: the MoE layers, in the order of `moe_layer_positions`."""
        if not self.has_decoder:
            return list(self.moe_layers)
        blocks = self.blocks
        return [moe_layer_at(blocks, position) for position in self.moe_layer_positions]

    def check_input(self, input_ids: Tensor | None, inputs_embeds: Tensor | None):
        """Check what a pass is given.

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

    def look_up(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return `inputs_embeds` or, without them, the embeddings of `input_ids`: `(batch, sequence, hidden_size)`."""
        self.check_input(input_ids, inputs_embeds)
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def embed(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Scale token embeddings and add those of positions, `(batch, sequence, hidden_size)`.

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

    def tokens_of(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
    ) -> tuple:
        """Gather what routers see of the tokens, in the order of `Tokens`.

        Without `input_ids` each vector is routed as the token whose embedding is nearest. Where layers look back, new
        ids are noted in the cache. `position_ids` are given where rows may hold several sequences, as attention tells
        them apart: without a mask or earlier tokens in the cache.

        Raises:
            ValueError: for an `attention_mask` that ends before the tokens do. Where a layer looks back at earlier tokens,
                also for a cache that is offloaded or that another model has filled, and for packed sequences without
                `position_ids`.
        """
        token_ids = input_ids
        if self.moe_layer_positions:
            token_ids = self.nearest_token_ids(inputs_embeds) if input_ids is None else input_ids
            self.warn_of_pruned_tokens(token_ids, self.side)
        given = input_ids if inputs_embeds is None else inputs_embeds
        mask = token_mask(attention_mask, given.shape[1], cache)
        if not self.moe_layer_positions or not needs_context(self.config):
            return tuple(Tokens(token_ids, mask))
        if cu_seq_lens is not None and position_ids is None:
            raise ValueError(
                "This model looks back at earlier tokens (`distilled_router`, `split_token_ids`, `num_bigram_embeddings`), and tells apart sequences "
                "that are packed into one row (`cu_seq_lens_q`) in a language model alone, without `attention_mask` and cache. "
                'Pad them instead, one per row; for continuous batching train a model with `distilled_router="word_embedding"` '
                "and without the others."
            )
        sequences = packed_sequences(token_ids.shape, position_ids, cu_seq_lens)
        if cache is None:
            tokens = whole_sequences(token_ids, mask, sequences)
        else:
            whole_mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
            tokens = token_ids, mask, *cached_sequences(cache, self.num_blocks, token_ids, whole_mask), sequences
        return with_rows(tokens, self.config)

    def rows_of(self, token_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None = None) -> Tensor:
        """Find the rows of a batch of whole sequences in tables of routing, `(B, S)`: the ids, but for `split_token_ids`."""
        if not self.config.split_token_ids:
            return token_ids
        tokens = whole_sequences(token_ids, mask, packed_sequences(token_ids.shape, position_ids))
        return Tokens.of(with_rows(tokens, self.config)).table_rows

    def transform(self, hidden_states: Tensor, tokens: tuple, route_by_backbone: bool = False, **kwargs) -> Tensor:
        """Run `num_blocks` blocks, the MoE layers between them and the final norm; `**kwargs` are for the blocks."""
        moe_inputs = self.moe_inputs(tokens, route_by_backbone, **kwargs)
        for position in range(self.num_blocks + 1):
            if position > 0:
                hidden_states = self.layers[position - 1](hidden_states, **kwargs)
            for index, place in enumerate(self.moe_layer_positions):
                if place == position:
                    hidden_states = self.moe_layers[index](hidden_states, *moe_inputs[index])
        return self.norm(hidden_states)

    def moe_inputs(self, tokens: tuple, route_by_backbone: bool = False, **kwargs) -> list[tuple]:
        """Return the arguments of each MoE layer of a pass but the hidden states; `**kwargs` of the pass."""
        moe_layers = self.moe_layers_in_order
        for layer in moe_layers:
            layer.frozen_router.follow()
            if self.training:
                layer.frozen_router.is_initial = False
        # Positions ascend: those past the blocks of a shortened pass are the last.
        num_blocks = self.num_blocks
        moe_layers = moe_layers[: sum(position <= num_blocks for position in self.moe_layer_positions)]
        sorts = self.config._experts_implementation == "grouped_mm" and self.config.expert_type == "stack"
        known = look_up_ahead(moe_layers, tokens, sorts)
        output_router_logits = kwargs.get("output_router_logits", getattr(self.config, "output_router_logits", False))
        return [
            (
                tokens,
                *of_layer,
                None if layer.frozen_router.is_frozen else layer.bare_router.recall(),
                output_router_logits,
                route_by_backbone,
            )
            for layer, of_layer in zip(moe_layers, known, strict=True)
        ]

    @torch.no_grad()
    def nearest_token_ids(self, inputs_embeds: Tensor, chunk_size: int = 1024, num_candidates: int = 16) -> Tensor:
        """Find the token whose embedding is nearest to each vector, exactly the token itself where a vector is one.

        The lowest of equally near ids; any id for a vector that is NaN. `chunk_size` vectors at a time bound memory;
        of a matrix product, which rounds, the `num_candidates` nearest are measured exactly.
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
        """Return what `embed_tokens` makes of every token id, `(vocab_size, hidden_size)`."""
        embedding = self.get_input_embeddings()
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
