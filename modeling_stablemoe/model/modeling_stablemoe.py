# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The decoder-only models: the backbone, and the language model and the classifier made of it."""

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backbone_stablemoe import StableMoEBackbone, count_positions
from .blocks_stablemoe import StableMoEBlock
from .classification_stablemoe import SequenceClassificationMixin
from .configuration_stablemoe import GATED_EXPERTS_TP_PLAN, SHARED_EXPERTS_TP_PLAN, StableMoEConfig, from_package
from .context_stablemoe import final_token_mask, mask_of_pass
from .decoder_stablemoe import BackboneHead, causal_class, name_of
from .head_stablemoe import RoutingHeadMixin
from .losses_stablemoe import causal_targets, count_causal_targets
from .outputs_stablemoe import StableMoECausalLMOutputWithPast, StableMoEModelOutputWithPast
from .pretrained_stablemoe import StableMoEPreTrainedModel
from .versions_stablemoe import CACHE_NAME, StableMoEGenerationMixin, cache_argument, takes_cache_by_either_name


logger = logging.get_logger(__name__)


class StableMoEModel(StableMoEBackbone):
    """The backbone of the language model.

    Args:
        config ([`StableMoEConfig`]): `moe_layer_positions` says where MoE layers stand.
    """

    def __init__(self, config: StableMoEConfig):
        self.check_config(config)
        blocks = None
        if config.backbone_config is None:
            blocks = [StableMoEBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        super().__init__(config, blocks, config.moe_layer_positions)
        self.post_init()

    @property
    def num_blocks(self) -> int:
        """`int`: blocks that a pass runs; `generate(assistant_early_exit=)` sets the config to fewer for its draft."""
        return min(self.config.get_text_config().num_hidden_layers, len(self.blocks))

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.decoder.get_input_embeddings() if self.has_decoder else self.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        """Replace the token embedding."""
        if self.has_decoder:
            self.decoder.set_input_embeddings(value)
        else:
            self.embed_tokens = value

    def init_parallel_plans(self):
        """Collect the sharding plans: of a decoder its own, and for the experts in its blocks what the config has for ours."""
        super().init_parallel_plans()
        if not self.has_decoder:
            return
        in_blocks = f"decoder.{name_of(self.decoder, self.blocks)}.*"
        layers = sorted({f"{in_blocks}.{name.rpartition('.')[2]}" for name in self.moe_layers_by_name})
        expert_parallel = {rule: how for rule, how in self._ep_plan.items() if rule.startswith("moe_layers.*.")}
        for name in ("_fsdp_plan", "_ep_plan"):
            setattr(
                self, name, {rule: how for rule, how in getattr(self, name).items() if rule.startswith("decoder.")}
            )
        for layer in layers:
            self._ep_plan |= {rule.replace("moe_layers.*", layer): how for rule, how in expert_parallel.items()}
            if self._tp_plan and self.config.expert_type == "gated":
                plan = GATED_EXPERTS_TP_PLAN | (SHARED_EXPERTS_TP_PLAN if self.config.num_shared_experts else {})
                self._tp_plan |= {f"{layer}.{part}": how for part, how in plan.items()}

    @takes_cache_by_either_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableMoEModelOutputWithPast:
        """Run the backbone.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): in [0, vocab_size).
            attention_mask (`torch.Tensor`, *optional*): of shape `(batch, past + sequence)`, 0 on padding, which is not
                routed; columns beyond that, as of a static cache, are not read. Or a mask that the attention implementation
                takes as it is; then every token is routed.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): by default counted over the
                tokens that `attention_mask` shows. Without a mask and a cache, a row whose positions begin again holds
                several sequences, which do not see each other.
            cache (`Cache`, *optional*): keys and values of earlier positions, and their ids, which this model adds, where
                the distilled router looks back at them. `past_key_values` is another name of this argument.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, hidden_size)`, *optional*): in place of
                token embeddings. Without `input_ids` each vector is routed as the token whose embedding is nearest.
            use_cache (`bool`, *optional*): return the cache.
            **kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, `output_expert_indices`,
                `output_distilled_router_logits`, and what attention implementations take. With `route_by_backbone=True` a
                model evaluated in stage 1 routes by its backbone's scores, as in training, not by the distilled router.

        Returns:
            `StableMoEModelOutputWithPast`

        Raises:
            ValueError: without `input_ids` and `inputs_embeds`; for input without any token; for a token id outside
                the vocabulary or a position past `max_position_embeddings` (on an accelerator the embedding's own
                device assertion fires); for an `attention_mask` that ends before the input does; where the distilled
                router looks back, for a cache whose ids are not known.
        """
        self._warn_of_lost_losses(kwargs.get("output_routing_traces", False))
        run = self._run_decoder if self.has_decoder else self._run_blocks
        return run(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache=use_cache, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def _run_blocks(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableMoEModelOutputWithPast:
        """Run the paper's blocks and the MoE layers between them."""
        inputs_embeds = self.look_up(input_ids, inputs_embeds)
        # Where rows may be packed: transformers tells their sequences apart by positions only if there is no cache, though
        # one that is made below holds nothing.
        may_be_packed = attention_mask is None and cache is None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_NAME: None if may_be_packed else cache},
            position_ids=position_ids,  # those given, which may pack sequences: looking for it waits for the device
        )
        if position_ids is None:
            position_ids = count_positions(inputs_embeds, attention_mask, cache)
        packing = position_ids if may_be_packed else None
        hidden_states = self.transform(
            self.embed(inputs_embeds, position_ids),
            self.tokens_of(input_ids, inputs_embeds, attention_mask, cache, packing, kwargs.get("cu_seq_lens_q")),
            attention_mask=causal_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            use_cache=use_cache,
            **kwargs,
        )
        return StableMoEModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    @merge_with_config_defaults
    @can_return_tuple
    def _run_decoder(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableMoEModelOutputWithPast:
        """Run the decoder of `config.backbone_config`, whose blocks have the MoE layers beside them."""
        self.check_input(input_ids, inputs_embeds)
        packing = position_ids if attention_mask is None and cache is None else None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.decoder.config)
        tokens = self.tokens_of(input_ids, inputs_embeds, attention_mask, cache, packing, kwargs.get("cu_seq_lens_q"))
        outputs = self.decoder(
            input_ids=input_ids if inputs_embeds is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_argument(cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            moe_inputs=dict(zip(self.moe_layer_positions, self.moe_inputs(tokens, **kwargs), strict=False)),
            **kwargs,
        )
        return StableMoEModelOutputWithPast(**outputs)

    def _warn_of_lost_losses(self, is_recorded: bool):
        """Warn once if the backbone is trained in stage 1 by a head that records no routing to compute losses from."""
        if is_recorded or not self.training or not torch.is_grad_enabled() or is_torchdynamo_compiling():
            return
        if not all(layer.frozen_router.is_frozen for layer in self.moe_layers_in_order):
            logger.warning_once(
                "StableMoEModel is trained in stage 1 without its own head, by which routing losses enter the loss: the "
                "routing is neither balanced nor distilled. TRL's trainers do so: train stage 1 with transformers' "
                "Trainer, or with a subclass of SFTTrainer that has `compute_loss = Trainer.compute_loss`."
            )

    def routed_tokens(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return what each MoE layer routes of a batch, for statistics.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): as given to `forward`.
            attention_mask (`torch.Tensor`, *optional*): as given to `forward`; ends where the batch does.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): as given to `forward`.
            **kwargs: the other arguments of `forward`, which change nothing here.

        Returns:
            `list[tuple]`: per MoE layer the rows of tokens in tables of routing, which are their ids unless `split_token_ids`
                says otherwise, `None` where embeddings were given instead, and the mask of real tokens, `None` where all
                are real; of shape `(batch, sequence)` each.
        """
        if input_ids is None:
            return [(None, None)] * self.config.num_moe_layers
        mask = final_token_mask(attention_mask, input_ids.shape[-1])
        return [(self.rows_of(input_ids, mask, position_ids), mask)] * self.config.num_moe_layers


class StableMoEForCausalLM(RoutingHeadMixin, StableMoEPreTrainedModel, StableMoEGenerationMixin):
    """The language model of StableMoE: the backbone and a head that shares the token embedding.

    Args:
        config ([`StableMoEConfig`]).
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: StableMoEConfig):
        super().__init__(config)
        self.model = StableMoEModel(config)
        # What a backbone's own language model makes of logits.
        self.backbone_head = None if config.backbone_config is None else BackboneHead(config.backbone_config)
        has_bias = self.backbone_head is not None and self.backbone_head.has_bias
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=has_bias)
        if self.model.has_decoder:
            embedding = name_of(self.model, self.model.get_input_embeddings())
            self._tied_weights_keys = {"lm_head.weight": f"model.{embedding}.weight"}
        self.post_init()

    def init_parallel_plans(self):
        """Collect the sharding plans: a head over a decoder is dealt out as the decoder's own language model does."""
        super().init_parallel_plans()
        if self.model.has_decoder:
            theirs = causal_class(self.config.backbone_config)._tp_plan or {}
            self._tp_plan |= {rule: how for rule, how in theirs.items() if rule == "lm_head"}

    @classmethod
    def from_dense(
        cls,
        dense: PreTrainedModel | str | PathLike,
        *,
        num_experts: int | None = None,
        moe_layer_positions: list[int] | None = None,
        **options: Any,
    ) -> "StableMoEForCausalLM":
        """Convert a dense language model to a StableMoE with the same logits, ready for both stages of training.

        MoE layers are put between its blocks, and their new experts add nothing until they are trained; or, with
        `moe_placement="ffn"`, experts in place of the FFNs of blocks, each a copy of the one that stood there (with
        `share_experts_in_stage1`, unless it is given: apart from each other they give the same logits up to rounding). GPT-2 and OPT become the
        paper's blocks; any other decoder of transformers stays what it is (`config.backbone_config`). Weights, dtype, device,
        generation settings, attention implementation and rates of dropout are those of the dense model (`resid_pdrop` and
        `embd_pdrop` of GPT-2; that of OPT is applied to the embeddings here, too).

        Args:
            dense (`PreTrainedModel`, `str` or `PathLike`): the language model, or its Hub name or folder.
            num_experts (`int`, *optional*): of each MoE layer; default 32, as the paper's base model.
            moe_layer_positions (`list[int]`, *optional*): k = after block k, 0 = before the first block; default: one
                layer in the middle, the best place in table 4. `[]` adds nothing.
            **options: every other field of `StableMoEConfig` that the dense model does not determine:
                `expert_type`, `moe_placement`, those of routing and stage 1, `initializer_range` (of the experts), `use_cache` and
                special token ids; of GPT-2 and OPT `dropout` and `attention_dropout`, of other decoders
                `intermediate_size` (of the experts; default: as the decoder's), `hidden_act` and `layer_norm_eps`. `attn_implementation` and
                `experts_implementation` as in `from_pretrained`; with a name or folder also `revision`, `token`,
                `cache_dir`, `dtype` and the like.

        Returns:
            `StableMoEForCausalLM`: in stage 1, and in the dense model's mode: evaluation, if it was loaded here.

        Raises:
            OSError: if there is no such checkpoint.
            ValueError: for a model that cannot carry the layers, a setting of GPT-2 or OPT that the paper's blocks do not have, a
                surplus or missing tensor, or an unknown option; the message names it.
        """
        options |= {"num_experts": num_experts, "moe_layer_positions": moe_layer_positions}
        return from_package("convert_dense", "`from_dense`")(cls, dense, options)

    @takes_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableMoECausalLMOutputWithPast:
        """Predict the next token of each position.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): in [0, vocab_size).
            attention_mask (`torch.Tensor` of shape `(batch, past + sequence)`, *optional*): 0 on padding, not routed.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): by default counted over real tokens.
            cache (`Cache`, *optional*): of earlier positions; `past_key_values` is another name of this argument.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, hidden_size)`, *optional*): in place of
                token embeddings, routed by `input_ids` too where given, else as the nearest tokens.
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): token ids, not shifted; -100 is
                routed but not predicted. Without anything to predict, as in sequences of one token, `task_loss` is 0.
            use_cache (`bool`, *optional*): return the cache.
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
        mask = mask_of_pass(attention_mask, cache, input_ids, inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **self.routing_outputs(output_router_logits),
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        if self.backbone_head is not None:
            logits = self.backbone_head(logits)

        shifted = kwargs.get("shift_labels")
        is_target = None if labels is None and shifted is None else causal_targets(labels, shifted)
        task_loss, routing = None, {}
        if labels is not None:
            task_loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            # A mean over no targets is NaN: 0 / 0.
            task_loss = torch.where(is_target.any().to(task_loss.device), task_loss, 0.0)
        if self.training or output_router_logits:
            routing = self.routing_fields(outputs, (mask,), is_target, kwargs.get("num_items_in_batch"))
        return self.head_output(
            StableMoECausalLMOutputWithPast,
            outputs,
            logits=logits,
            task_loss=task_loss,
            routing=routing,
            output_router_logits=output_router_logits,
        )

    def count_targets(self, labels: Tensor | None = None, shift_labels: Tensor | None = None) -> Tensor:
        """Count the tokens that the task loss predicts.

        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): not shifted.
            shift_labels (`torch.LongTensor`, *optional*): shifted already; used where given.

        Returns:
            `torch.LongTensor` of shape `()`.
        """
        return count_causal_targets(labels, shift_labels)

    def routed_tokens(self, *args, **kwargs) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return what each MoE layer routes of a batch, for statistics: token ids and the mask of real tokens."""
        return self.model.routed_tokens(*args, **kwargs)


class StableMoEForSequenceClassification(SequenceClassificationMixin, RoutingHeadMixin, StableMoEPreTrainedModel):
    """The backbone and a head that classifies whole sequences, or scores them; a language model's checkpoint loads.

    Args:
        config ([`StableMoEConfig`]): `num_labels` (1 for regression) and `problem_type` say what is predicted.
    """

    def __init__(self, config: StableMoEConfig):
        super().__init__(config)
        self.model = StableMoEModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


StableMoEConfig.register_for_auto_class()
StableMoEModel.register_for_auto_class("AutoModel")
StableMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
StableMoEForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")


__all__ = ["StableMoEForCausalLM", "StableMoEForSequenceClassification", "StableMoEModel"]
