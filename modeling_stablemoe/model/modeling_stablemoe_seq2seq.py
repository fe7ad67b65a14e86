# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The sequence-to-sequence StableMoE: encoder, decoder with cross-attention, and the model with its head."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backbone_stablemoe import StableMoEBackbone, count_positions
from .blocks_stablemoe import StableMoEAttention, StableMoEBlock
from .configuration_stablemoe import StableMoESeq2SeqConfig
from .context_stablemoe import count_real_tokens, final_token_mask, mask_of_pass
from .head_stablemoe import RoutingHeadMixin
from .losses_stablemoe import label_smoothed_loss
from .outputs_stablemoe import (
    StableMoEDecoderOutput,
    StableMoEModelOutputWithPast,
    StableMoESeq2SeqLMOutput,
    StableMoESeq2SeqModelOutput,
)
from .pretrained_stablemoe import StableMoEPreTrainedModel
from .routing_stablemoe import RECORDED
from .versions_stablemoe import CACHE_NAME, StableMoEGenerationMixin, takes_cache_by_either_name


def may_look_at(attention_mask: Tensor | None) -> bool:
    """Return True if checking whether a mask hides anything costs no wait: masks of sentences hide something as a rule."""
    return not isinstance(attention_mask, Tensor) or attention_mask.device.type == "cpu"


class StableMoECrossAttention(StableMoEAttention):
    """Attention from the decoder to the encoder's output, whose keys and values are computed once per generation."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `(batch, target, hidden_size)` to `(batch, source, hidden_size)`."""
        if cache is None:
            key, value = self.project(encoder_hidden_states)
        elif cache.is_updated.get(self.layer_idx):
            cached = cache.cross_attention_cache.layers[self.layer_idx]
            key, value = cached.keys, cached.values
        else:
            key, value = self.project(encoder_hidden_states)
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return self.attend(hidden_states, key, value, attention_mask, **kwargs)


class StableMoECrossAttentionBlock(StableMoEBlock):
    """A decoder block that attends to the encoder's output between self-attention and FFN."""

    def __init__(self, config: StableMoESeq2SeqConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.cross_attn_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = StableMoECrossAttention(config, layer_idx, is_causal=False)

    @takes_cache_by_either_name
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Map `(batch, target, hidden_size)` to `(batch, target, hidden_size)`."""

        def attend(normed: Tensor) -> Tensor:
            own = None if cache is None else cache.self_attention_cache
            return self.self_attn(normed, attention_mask, own, **kwargs)[0]

        def attend_to_source(normed: Tensor) -> Tensor:
            return self.cross_attn(normed, encoder_hidden_states, encoder_attention_mask, cache, **kwargs)[0]

        hidden_states = self.add(attend, self.input_layernorm, hidden_states)
        hidden_states = self.add(attend_to_source, self.cross_attn_layernorm, hidden_states)
        return self.add(self.mlp, self.post_attention_layernorm, hidden_states)


class StableMoEEncoder(StableMoEBackbone):
    """The encoder: every position sees the whole source.

    Args:
        config ([`StableMoESeq2SeqConfig`]): `encoder_layers` and `encoder_moe_layer_positions` shape it.
    """

    config: StableMoESeq2SeqConfig
    config_class = StableMoESeq2SeqConfig

    def __init__(self, config: StableMoESeq2SeqConfig):
        self.check_config(config)
        blocks = [StableMoEBlock(config, layer_idx, is_causal=False) for layer_idx in range(config.encoder_layers)]
        super().__init__(config, blocks, config.encoder_moe_layer_positions)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableMoEModelOutputWithPast:
        """Encode a source.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, source)`, *optional*): in [0, vocab_size).
            attention_mask (`torch.Tensor` of shape `(batch, source)`, *optional*): 0 on padding, on either side.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, source, hidden_size)`, *optional*): in place of
                token embeddings; routed by `input_ids` too where given, else as the nearest tokens.
            **kwargs: what to record (`output_hidden_states`, `output_router_logits`, ...) and how to route, as for
                `StableMoEModel`.

        Returns:
            `StableMoEModelOutputWithPast`

        Raises:
            ValueError: without input or any token; for an id outside the vocabulary, or a source that is too long.
        """
        inputs_embeds = self.look_up(input_ids, inputs_embeds)
        hidden_states = self.transform(
            self.embed(inputs_embeds, count_positions(inputs_embeds, attention_mask, None)),
            self.tokens_of(input_ids, inputs_embeds, attention_mask, cu_seq_lens=kwargs.get("cu_seq_lens_q")),
            attention_mask=create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                allow_is_bidirectional_skip=may_look_at(attention_mask),
            ),
            **kwargs,
        )
        return StableMoEModelOutputWithPast(last_hidden_state=hidden_states)


class StableMoEDecoder(StableMoEBackbone):
    """The decoder: a position sees earlier target positions and the whole source.

    Args:
        config ([`StableMoESeq2SeqConfig`]): `decoder_layers` and `decoder_moe_layer_positions` shape it.
    """

    config: StableMoESeq2SeqConfig
    config_class = StableMoESeq2SeqConfig
    side = 1
    _can_record_outputs = {
        **StableMoEBackbone._can_record_outputs,
        "attentions": OutputRecorder(StableMoEAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(StableMoECrossAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: StableMoESeq2SeqConfig):
        self.check_config(config)
        blocks = [StableMoECrossAttentionBlock(config, layer_idx) for layer_idx in range(config.decoder_layers)]
        super().__init__(config, blocks, config.decoder_moe_layer_positions)
        self.post_init()

    @takes_cache_by_either_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableMoEDecoderOutput:
        """Decode a target.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, target)`, *optional*): in [0, vocab_size).
            attention_mask (`torch.Tensor` of shape `(batch, past + target)`, *optional*): 0 on padding.
            encoder_hidden_states (`torch.FloatTensor` of shape `(batch, source, hidden_size)`): the encoder's output.
            encoder_attention_mask (`torch.Tensor` of shape `(batch, source)`, *optional*): 0 on padding of the source.
            cache (`EncoderDecoderCache`, *optional*): keys and values of earlier positions and the source.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, target, hidden_size)`, *optional*): in place of
                token embeddings; routed by `input_ids` too where given, else as the nearest tokens.
            use_cache (`bool`, *optional*): return the cache.
            **kwargs: what to record and how to route, as for `StableMoEModel`.

        Returns:
            `StableMoEDecoderOutput`

        Raises:
            ValueError: without input, any token or `encoder_hidden_states`; for an id outside the vocabulary, a target that
                is too long, or a cache of another kind.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError(
                "The decoder has no input: pass `decoder_input_ids`, `decoder_inputs_embeds` or `labels`."
            )
        inputs_embeds = self.look_up(input_ids, inputs_embeds)
        if encoder_hidden_states is None:
            raise ValueError("The decoder attends to a source: pass `encoder_hidden_states`.")
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if not isinstance(cache, EncoderDecoderCache | None):
            raise ValueError(
                "`cache` must be an EncoderDecoderCache, one cache for the target and one for the source; got "
                f"a {type(cache).__name__}."
            )
        self_attention_cache = None if cache is None else cache.self_attention_cache
        cu_seq_lens = kwargs.get("cu_seq_lens_q")
        hidden_states = self.transform(
            self.embed(inputs_embeds, count_positions(inputs_embeds, attention_mask, self_attention_cache)),
            self.tokens_of(input_ids, inputs_embeds, attention_mask, self_attention_cache, cu_seq_lens=cu_seq_lens),
            attention_mask=create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                **{CACHE_NAME: self_attention_cache},
                allow_is_causal_skip=may_look_at(attention_mask),
            ),
            **{CACHE_NAME: cache},
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                allow_is_bidirectional_skip=may_look_at(encoder_attention_mask),
            ),
            use_cache=use_cache,
            **kwargs,
        )
        return StableMoEDecoderOutput(last_hidden_state=hidden_states, **{CACHE_NAME: cache})


class StableMoESeq2SeqPreTrainedModel(StableMoEPreTrainedModel):
    """What the sequence-to-sequence models share."""

    config: StableMoESeq2SeqConfig
    config_class = StableMoESeq2SeqConfig
    _no_split_modules = [*StableMoEPreTrainedModel._no_split_modules, "StableMoECrossAttentionBlock"]
    _auto_map = {
        "AutoConfig": "configuration_stablemoe.StableMoESeq2SeqConfig",
        "AutoModel": "modeling_stablemoe_seq2seq.StableMoESeq2SeqModel",
        "AutoModelForSeq2SeqLM": "modeling_stablemoe_seq2seq.StableMoEForConditionalGeneration",
    }
    _can_record_outputs = {}

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True):
        """Tie weights as `PreTrainedModel` does, and let both sides share the module of one embedding.

        accelerate gives the embeddings that it is told of a FSDP2 group of their own, and another module that holds the
        same parameter would be in a second group, which torch refuses.
        """
        super().tie_weights(missing_keys, recompute_mapping)
        model = self.base_model
        source = model.encoder.embed_tokens
        # A checkpoint that is still to be read may hold two embeddings.
        is_empty = source.weight.is_meta and missing_keys is None
        if model.decoder.embed_tokens.weight is source.weight and not is_empty:
            model.decoder.embed_tokens = source

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the vocabulary of both sides, routers included."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        decoder, size = self.base_model.decoder, embeddings.weight.shape[0]
        if decoder.embed_tokens.weight.shape[0] != size:  # not tied
            decoder.embed_tokens = self._get_resized_embeddings(
                decoder.embed_tokens, size, mean_resizing=mean_resizing
            )
        return embeddings


class StableMoESeq2SeqModel(StableMoESeq2SeqPreTrainedModel):
    """Encoder and decoder, which share the token embedding.

    Args:
        config ([`StableMoESeq2SeqConfig`]).
    """

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: StableMoESeq2SeqConfig):
        super().__init__(config)
        self.encoder = StableMoEEncoder(config)
        self.decoder = StableMoEDecoder(config)
        self.post_init()

    def init_parallel_plans(self):
        """Collect the sharding plans of encoder and decoder: the config's own is that of either, not of both."""
        super().init_parallel_plans()
        sides = ("encoder.", "decoder.")
        for name in ("_ep_plan", "_fsdp_plan"):
            setattr(self, name, {rule: how for rule, how in getattr(self, name).items() if rule.startswith(sides)})

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the encoder's token embedding, which is the decoder's too unless `tie_word_embeddings` is off."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        """Replace the encoder's token embedding, and the decoder's where they are tied."""
        self.encoder.embed_tokens = value
        if self.config.tie_word_embeddings:
            self.decoder.embed_tokens = value

    @takes_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[Tensor, ...] | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableMoESeq2SeqModelOutput:
        """Encode a source and decode a target.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, source)`, *optional*): in [0, vocab_size).
            attention_mask (`torch.Tensor` of shape `(batch, source)`, *optional*): 0 on padding of the source.
            decoder_input_ids (`torch.LongTensor` of shape `(batch, target)`, *optional*): in [0, vocab_size).
            decoder_attention_mask (`torch.Tensor` of shape `(batch, past + target)`, *optional*): 0 on padding.
            encoder_outputs (`ModelOutput` or `tuple`, *optional*): of the encoder, in place of its inputs.
            cache (`EncoderDecoderCache`, *optional*): keys and values of earlier positions and the source.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, source, hidden_size)`, *optional*): in place of embeddings.
            decoder_inputs_embeds (`torch.FloatTensor` of shape `(batch, target, hidden_size)`, *optional*): the same.
            use_cache (`bool`, *optional*): return the cache.
            **kwargs: what to record and how to route, as for `StableMoEModel`.

        Returns:
            `StableMoESeq2SeqModelOutput`
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        recorded = ("hidden_states", "attentions", *RECORDED)
        return StableMoESeq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE_NAME: decoder_outputs.cache},
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            **{f"encoder_{name}": encoder_outputs.get(name) for name in recorded},
            **{f"decoder_{name}": decoder_outputs.get(name) for name in recorded},
        )


class StableMoEForConditionalGeneration(RoutingHeadMixin, StableMoESeq2SeqPreTrainedModel, StableMoEGenerationMixin):
    """The sequence-to-sequence model with a head that shares the token embedding.

    Args:
        config ([`StableMoESeq2SeqConfig`]).
    """

    _tied_weights_keys = {
        "model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
        "lm_head.weight": "model.encoder.embed_tokens.weight",
    }

    def __init__(self, config: StableMoESeq2SeqConfig):
        super().__init__(config)
        self.model = StableMoESeq2SeqModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Labels stand at the positions that predict them; the default for this class name would shift them again.
        self.loss_function = label_smoothed_loss
        self.post_init()

    @property
    def sides(self) -> dict[str, StableMoEBackbone]:
        """`dict[str, StableMoEBackbone]`: encoder and decoder, by what their fields of the output begin with."""
        return {"encoder_": self.model.encoder, "decoder_": self.model.decoder}

    @classmethod
    def maybe_distribute_model(cls, *args, **kwargs):
        """Shard a model before its weights are loaded, ready for `generate`."""
        model = super().maybe_distribute_model(*args, **kwargs)
        if torch.distributed.is_available():
            from torch.distributed.fsdp import register_fsdp_forward_method

            # `generate` runs the encoder by itself, before the forward pass for which FSDP2 would gather the embedding.
            register_fsdp_forward_method(model, "generate")
        return model

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift labels to the right: the decoder's input at a position is the label of the one before it.

        Args:
            labels (`torch.LongTensor` of shape `(batch, target)`): -100 becomes padding; a run of it on the left is
                padding before the target.

        Returns:
            `torch.LongTensor` of shape `(batch, target)`: each target begins with `decoder_start_token_id`.

        Raises:
            ValueError: for labels without any position.
        """
        if labels.shape[-1] == 0:
            raise ValueError(
                f"There is no target: `labels` has shape {tuple(labels.shape)}. An empty target is one `eos_token_id`."
            )
        shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=-100)
        start = labels.ne(-100).int().argmax(-1, keepdim=True)  # 0 where a target is empty
        shifted = shifted.scatter(-1, start, self.config.decoder_start_token_id)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    @takes_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[Tensor, ...] | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableMoESeq2SeqLMOutput:
        """Predict the target.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, source)`, *optional*): in [0, vocab_size).
            attention_mask (`torch.Tensor` of shape `(batch, source)`, *optional*): 0 on padding of the source.
            decoder_input_ids (`torch.LongTensor` of shape `(batch, target)`, *optional*): default: `labels`, shifted.
            decoder_attention_mask (`torch.Tensor` of shape `(batch, past + target)`, *optional*): default with
                `labels`: padding is the run of -100 at the end of each target, and the run of `pad_token_id` that
                `decoder_input_ids` begin with.
            encoder_outputs (`ModelOutput` or `tuple`, *optional*): of the encoder, in place of its inputs; while training
                stage 1 they must hold the routing (`output_routing_traces=True`).
            cache (`EncoderDecoderCache`, *optional*): keys and values of earlier positions and the source.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, source, hidden_size)`, *optional*): in place of embeddings.
            decoder_inputs_embeds (`torch.FloatTensor` of shape `(batch, target, hidden_size)`, *optional*): the same.
            labels (`torch.LongTensor` of shape `(batch, target)`, *optional*): the target itself, not shifted; -100 is
                not predicted, and padding at either end. Of a target of -100 alone the first position is routed all the
                same; without anything to predict `task_loss` is 0.
            use_cache (`bool`, *optional*): return the cache.
            output_router_logits (`bool`, *optional*): return router logits, expert indices and `aux_loss`; default
                `config.output_router_logits`.
            **kwargs: `num_items_in_batch`, the target tokens of the whole (accumulated, world-wide) batch that the
                loss is divided by; what to record and how to route, as for `StableMoEModel`.

        Returns:
            `StableMoESeq2SeqLMOutput`

        Raises:
            ValueError: for bad input of encoder or decoder; if `encoder_outputs` lack the routing that stage 1 trains on.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        decoder_input_ids, decoder_attention_mask = self._decoder_inputs(
            decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, labels, cache
        )
        target_mask = mask_of_pass(decoder_attention_mask, cache, decoder_input_ids, decoder_inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=cache,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **self.routing_outputs(output_router_logits),
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)

        is_target = None if labels is None else labels.ne(-100)
        task_loss, routing = None, {}
        if labels is not None:
            smoothing = self.config.label_smoothing if self.training else 0.0
            task_loss = self.loss_function(logits, labels, self.config.vocab_size, label_smoothing=smoothing, **kwargs)
        if self.training or output_router_logits:
            masks = (attention_mask, target_mask)
            routing = self.routing_fields(outputs, masks, is_target, kwargs.get("num_items_in_batch"))
        return self.head_output(
            StableMoESeq2SeqLMOutput,
            outputs,
            logits=logits,
            task_loss=task_loss,
            routing=routing,
            output_router_logits=output_router_logits,
        )

    def count_targets(self, labels: Tensor | None = None, shift_labels: Tensor | None = None) -> Tensor:
        """Count the tokens of `labels`, `(batch, target)`, that the task loss predicts."""
        return labels.ne(-100).sum()

    def count_tokens(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Count the tokens of source and target that are not padding, for statistics; arguments are those of `forward`.

        Returns:
            `torch.LongTensor` of shape `()`. A source that comes as `encoder_outputs` alone is not counted.
        """
        decoder_input_ids, decoder_attention_mask = self._decoder_inputs(
            decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, labels
        )
        source = input_ids if inputs_embeds is None else inputs_embeds
        target = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        sides = ((source, attention_mask), (target, decoder_attention_mask))
        counts = [count_real_tokens(tokens, mask) for tokens, mask in sides if tokens is not None]
        return sum(counts[1:], start=counts[0])

    def routed_tokens(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return what each MoE layer routes of a batch, the encoder's first; arguments are those of `forward`.

        Returns:
            `list[tuple]`: per MoE layer the rows of tokens in tables of routing, which are their ids unless
                `split_token_ids` says otherwise, `None` where embeddings were given instead, and the mask of real
                tokens, `None` where all are real; `(batch, source)` or `(batch, target)` each.
        """
        decoder_input_ids, decoder_attention_mask = self._decoder_inputs(
            decoder_input_ids, decoder_attention_mask, kwargs.get("decoder_inputs_embeds"), labels
        )
        routed = []
        for stack, token_ids, mask in (
            (self.model.encoder, input_ids, attention_mask),
            (self.model.decoder, decoder_input_ids, decoder_attention_mask),
        ):
            if token_ids is None:
                routed += [(None, None)] * len(stack.moe_layers)
                continue
            mask = final_token_mask(mask, token_ids.shape[-1])
            routed += [(stack.rows_of(token_ids, mask), mask)] * len(stack.moe_layers)
        return routed

    def _decoder_inputs(
        self,
        decoder_input_ids: Tensor | None,
        decoder_attention_mask: Tensor | None,
        decoder_inputs_embeds: Tensor | None,
        labels: Tensor | None,
        cache: Cache | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Fill in what labels say of the decoder's input: its ids, and which of them are padding."""
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if labels is not None and decoder_attention_mask is None:
            # Collators give no mask for the decoder, and padding must not be routed, nor seen by what comes after it. The
            # labels tell where a target ends, the inputs do not: their last token, which predicts nothing, is there only
            # where the row is longer than its target.
            real = labels.ne(-100).long()
            is_empty = real.amax(-1, keepdim=True) == 0  # such a target is its first position
            real[:, 0] = 1
            decoder_attention_mask = real.flip(-1).cummax(-1).values.flip(-1)
            if decoder_input_ids is not None:
                # The inputs tell where it begins, the labels do not: a prompt is not predicted.
                padding = decoder_input_ids.eq(self.config.pad_token_id).long().cumprod(-1)
                if self.config.decoder_start_token_id == self.config.pad_token_id:
                    padding = nn.functional.pad(padding[:, 1:], (0, 1))  # the last one of the run is the start
                decoder_attention_mask = decoder_attention_mask.masked_fill(padding.bool() & ~is_empty, 0)
            if cache is not None:  # such as a learned prefix, all of which is seen
                past = int(cache.get_seq_length())
                decoder_attention_mask = nn.functional.pad(decoder_attention_mask, (past, 0), value=1)
        return decoder_input_ids, decoder_attention_mask


StableMoESeq2SeqConfig.register_for_auto_class()
StableMoESeq2SeqModel.register_for_auto_class("AutoModel")
StableMoEForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")


__all__ = [
    "StableMoEDecoder",
    "StableMoEEncoder",
    "StableMoEForConditionalGeneration",
    "StableMoESeq2SeqModel",
    "StableMoESeq2SeqPreTrainedModel",
]
