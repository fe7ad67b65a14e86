# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)

from .health_stablemoe import RoutingHealth
from .versions_stablemoe import CacheByEitherName


@dataclass
class StableMoEModelOutputWithPast(BaseModelOutputWithPast, CacheByEitherName):
    """Output of the backbone.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, sequence, hidden_size)`): after the final norm.
        cache (`Cache`, *optional*): with `use_cache`; `past_key_values` is another name of this field.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): with `output_hidden_states`: the input of the first
            block and the output of each block.
        attentions (`tuple[torch.FloatTensor]`, *optional*): with `output_attentions`, one of shape
            `(batch, heads, sequence, sequence)` per block.
        router_logits (`tuple[torch.FloatTensor]`, *optional*): with `output_router_logits`: backbone scores s (eq. 5),
            not normalised, one of shape `(batch * sequence, num_experts)` per MoE layer; without a gradient once the
            routing is frozen. A hash has none.
        expert_indices (`tuple[torch.LongTensor]`, *optional*): with `output_expert_indices`: the expert of each
            token, padding included, one of shape `(batch, sequence)` per MoE layer; with more than one expert per token
            `(batch, sequence, num_experts_per_tok)`.
        distilled_router_logits (`tuple[torch.FloatTensor]`, *optional*): with `output_distilled_router_logits`, in
            stage 1: distilled scores (eq. 12), shaped like `router_logits`.
        routing_traces (`tuple[tuple]`, *optional*): with `output_routing_traces`: what losses and statistics are made
            of, one plain tuple per MoE layer, in the order of `Routing`.
    """

    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_indices: tuple[torch.LongTensor, ...] | None = None
    distilled_router_logits: tuple[torch.FloatTensor, ...] | None = None
    routing_traces: tuple[tuple, ...] | None = None


@dataclass
class StableMoECausalLMOutputWithPast(CausalLMOutputWithPast, CacheByEitherName):
    """Output of the language model.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): with `labels`: what is trained, eq. 11 in stage 1 and
            eq. 15 in stage 2: `task_loss + router_aux_loss_coef * aux_loss`. In eval mode `task_loss` alone.
        logits (`torch.FloatTensor` of shape `(batch, sequence, vocab_size)`).
        cache (`Cache`, *optional*): with `use_cache`; `past_key_values` is another name of this field.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): as of the backbone.
        attentions (`tuple[torch.FloatTensor]`, *optional*): as of the backbone.
        aux_loss (`torch.FloatTensor` of shape `()`, *optional*): while training or with `output_router_logits`:
            `balance_loss_coef * balance_loss + distillation_loss_coef * distillation_loss`; where `num_items_in_batch` is
            given, with the losses averaged over each sequence's tokens and weighed by its share of those targets. 0 in stage 2.
        router_logits (`tuple[torch.FloatTensor]`, *optional*): as of the backbone.
        expert_indices (`tuple[torch.LongTensor]`, *optional*): with `output_router_logits`.
        task_loss (`torch.FloatTensor` of shape `()`, *optional*): with `labels`: cross-entropy, nats per target token
            (over `num_items_in_batch` where that is given).
        balance_loss (`torch.FloatTensor` of shape `()`, *optional*): with `aux_loss`: that of the router without its
            coefficient, summed over layers: eq. 8, gate mass per token (StableMoE); N sum_i f_i P_i (Switch); else 0.
        distillation_loss (`torch.FloatTensor` of shape `()`, *optional*): with `aux_loss`: eq. 10, nats per token,
            summed over layers.
        distillation_agreement (`torch.FloatTensor` of shape `()`, *optional*): with `aux_loss`: share of tokens that
            the distilled router sends where the backbone router does (of their experts, with more than one per token); NaN
            where nothing is distilled (stage 2).
        expert_load (`torch.LongTensor` of shape `(moe layers, num_experts)`, *optional*): with `aux_loss`: tokens
            sent to each expert; a token counts for each of its experts.
        routing_health (`RoutingHealth`, *optional*): with `aux_loss`: what distinguishes a healthy routing from a sick one, mean
            over layers.
    """

    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_indices: tuple[torch.LongTensor, ...] | None = None
    task_loss: torch.FloatTensor | None = None
    balance_loss: torch.FloatTensor | None = None
    distillation_loss: torch.FloatTensor | None = None
    distillation_agreement: torch.FloatTensor | None = None
    expert_load: torch.LongTensor | None = None
    routing_health: RoutingHealth | None = None


@dataclass
class StableMoESequenceClassifierOutputWithPast(StableMoECausalLMOutputWithPast):
    """Output of the sequence classifier; the other fields are those of `StableMoECausalLMOutputWithPast`.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, num_labels)`): scores of the labels; numbers in a regression.
        task_loss (`torch.FloatTensor` of shape `()`, *optional*): with `labels`: by `problem_type` cross-entropy (nats),
            binary cross-entropy or squared error, mean over labels (over `num_items_in_batch` where that is given).
    """


@dataclass
class StableMoEDecoderOutput(StableMoEModelOutputWithPast):
    """Output of a decoder with cross-attention.

    Args:
        cross_attentions (`tuple[torch.FloatTensor]`, *optional*): with `output_attentions`, one of shape
            `(batch, heads, target, source)` per block.
    """

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class StableMoESeq2SeqModelOutput(Seq2SeqModelOutput, CacheByEitherName):
    """Output of encoder and decoder; each field is explained at the one it is named after.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, target, hidden_size)`): of the decoder.
        cache (`EncoderDecoderCache`, *optional*): with `use_cache`; `past_key_values` is another name of this field.
        decoder_hidden_states (`tuple[torch.FloatTensor]`, *optional*): with `output_hidden_states`.
        decoder_attentions (`tuple[torch.FloatTensor]`, *optional*): with `output_attentions`.
        cross_attentions (`tuple[torch.FloatTensor]`, *optional*): with `output_attentions`.
        encoder_last_hidden_state (`torch.FloatTensor` of shape `(batch, source, hidden_size)`).
        encoder_hidden_states (`tuple[torch.FloatTensor]`, *optional*): with `output_hidden_states`.
        encoder_attentions (`tuple[torch.FloatTensor]`, *optional*): with `output_attentions`.
        encoder_router_logits (`tuple[torch.FloatTensor]`, *optional*): with `output_router_logits`.
        decoder_router_logits (`tuple[torch.FloatTensor]`, *optional*): with `output_router_logits`.
        encoder_expert_indices (`tuple[torch.LongTensor]`, *optional*): with `output_expert_indices`.
        decoder_expert_indices (`tuple[torch.LongTensor]`, *optional*): with `output_expert_indices`.
        encoder_distilled_router_logits (`tuple[torch.FloatTensor]`, *optional*): with `output_distilled_router_logits`.
        decoder_distilled_router_logits (`tuple[torch.FloatTensor]`, *optional*): with `output_distilled_router_logits`.
        encoder_routing_traces (`tuple[tuple]`, *optional*): with `output_routing_traces`.
        decoder_routing_traces (`tuple[tuple]`, *optional*): with `output_routing_traces`.
    """

    encoder_router_logits: tuple[torch.FloatTensor, ...] | None = None
    decoder_router_logits: tuple[torch.FloatTensor, ...] | None = None
    encoder_expert_indices: tuple[torch.LongTensor, ...] | None = None
    decoder_expert_indices: tuple[torch.LongTensor, ...] | None = None
    encoder_distilled_router_logits: tuple[torch.FloatTensor, ...] | None = None
    decoder_distilled_router_logits: tuple[torch.FloatTensor, ...] | None = None
    encoder_routing_traces: tuple[tuple, ...] | None = None
    decoder_routing_traces: tuple[tuple, ...] | None = None


@dataclass
class StableMoESeq2SeqLMOutput(Seq2SeqLMOutput, CacheByEitherName):
    """Output of the sequence-to-sequence model with its head.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): with `labels`: what is trained, eq. 11 in stage 1 and
            eq. 15 in stage 2: `task_loss + router_aux_loss_coef * aux_loss`. In eval mode `task_loss` alone.
        logits (`torch.FloatTensor` of shape `(batch, target, vocab_size)`).
        cache (`EncoderDecoderCache`, *optional*): with `use_cache`; `past_key_values` is another name of this field.
        decoder_hidden_states (`tuple[torch.FloatTensor]`, *optional*): as of the backbone.
        decoder_attentions (`tuple[torch.FloatTensor]`, *optional*): as of the backbone.
        cross_attentions (`tuple[torch.FloatTensor]`, *optional*): as of the decoder.
        encoder_last_hidden_state (`torch.FloatTensor` of shape `(batch, source, hidden_size)`).
        encoder_hidden_states (`tuple[torch.FloatTensor]`, *optional*): as of the backbone.
        encoder_attentions (`tuple[torch.FloatTensor]`, *optional*): as of the backbone.
        aux_loss (`torch.FloatTensor` of shape `()`, *optional*): while training or with `output_router_logits`: the sum
            of the two that follow.
        encoder_aux_loss (`torch.FloatTensor` of shape `()`, *optional*): `balance_loss_coef * balance_loss +
            distillation_loss_coef * distillation_loss` of the encoder's layers; with `num_items_in_batch` weighed as of
            `StableMoECausalLMOutputWithPast`. 0 in stage 2.
        decoder_aux_loss (`torch.FloatTensor` of shape `()`, *optional*): the same of the decoder's layers.
        encoder_router_logits (`tuple[torch.FloatTensor]`, *optional*): as of the backbone.
        decoder_router_logits (`tuple[torch.FloatTensor]`, *optional*): as of the backbone.
        encoder_expert_indices (`tuple[torch.LongTensor]`, *optional*): with `output_router_logits`.
        decoder_expert_indices (`tuple[torch.LongTensor]`, *optional*): with `output_router_logits`.
        task_loss (`torch.FloatTensor` of shape `()`, *optional*): with `labels`: cross-entropy, nats per target token
            (over `num_items_in_batch` where that is given), label-smoothed while training.
        balance_loss (`torch.FloatTensor` of shape `()`, *optional*): with `aux_loss`: eq. 8 without alpha, gate mass
            per token, summed over the layers of both sides.
        distillation_loss (`torch.FloatTensor` of shape `()`, *optional*): with `aux_loss`: eq. 10, nats per token,
            summed over the layers of both sides.
        distillation_agreement (`torch.FloatTensor` of shape `()`, *optional*): with `aux_loss`: share of tokens that
            the distilled router sends where the backbone router does, over all layers; NaN in stage 2.
        expert_load (`torch.LongTensor` of shape `(moe layers, num_experts)`, *optional*): with `aux_loss`: tokens
            sent to each expert, the encoder's layers first.
        routing_health (`RoutingHealth`, *optional*): with `aux_loss`: health of the routing, mean over layers.
    """

    aux_loss: torch.FloatTensor | None = None
    encoder_aux_loss: torch.FloatTensor | None = None
    decoder_aux_loss: torch.FloatTensor | None = None
    encoder_router_logits: tuple[torch.FloatTensor, ...] | None = None
    decoder_router_logits: tuple[torch.FloatTensor, ...] | None = None
    encoder_expert_indices: tuple[torch.LongTensor, ...] | None = None
    decoder_expert_indices: tuple[torch.LongTensor, ...] | None = None
    task_loss: torch.FloatTensor | None = None
    balance_loss: torch.FloatTensor | None = None
    distillation_loss: torch.FloatTensor | None = None
    distillation_agreement: torch.FloatTensor | None = None
    expert_load: torch.LongTensor | None = None
    routing_health: RoutingHealth | None = None

    @property
    def expert_indices(self) -> tuple[torch.LongTensor, ...]:
        """`tuple[torch.LongTensor]`: the experts of each token, one per MoE layer, as of encoder and decoder."""
        return (self.encoder_expert_indices or ()) + (self.decoder_expert_indices or ())


__all__ = [
    "StableMoECausalLMOutputWithPast",
    "StableMoEDecoderOutput",
    "StableMoEModelOutputWithPast",
    "StableMoESeq2SeqLMOutput",
    "StableMoESeq2SeqModelOutput",
    "StableMoESequenceClassifierOutputWithPast",
]
