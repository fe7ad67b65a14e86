# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What all StableMoE models share, of any head: initialisation, checks, and how routing losses enter a loss."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_torchdynamo_compiling, logging
from transformers.utils.output_capturing import OutputRecorder

from .blocks_stablemoe import StableMoEAttention, StableMoEBlock
from .configuration_stablemoe import EXPERT_PARAMETERS, StableMoEConfig
from .distillation_stablemoe import CountRouter, DistilledRouter, sees_context
from .experts_stablemoe import ExpertSublayer
from .frozen_stablemoe import FrozenRouter, FrozenWeights
from .health_stablemoe import RoutingHealth, mean_health
from .integration_stablemoe import IntegrationMixin
from .losses_stablemoe import RoutingLosses, combine_routing_losses, share_of_targets
from .outputs_stablemoe import StableMoECausalLMOutputWithPast, StableMoEModelOutputWithPast
from .routing_stablemoe import LearnedRouter, Router
from .running_stablemoe import RouterMemory
from .stages_stablemoe import TwoStageRoutingMixin
from .tensors_stablemoe import may_ask, unpack_ids
from .versions_stablemoe import CACHE_NAME


logger = logging.get_logger(__name__)

# What a forward pass records of its routing for losses and statistics: arguments of every backbone.
ROUTING_OUTPUTS = (
    "output_router_logits",
    "output_expert_indices",
    "output_distilled_router_logits",
    "output_routing_traces",
)

# What a head's output says of its routing.
ROUTING_FIELDS = (
    "aux_loss",
    "balance_loss",
    "distillation_loss",
    "expert_load",
    "distillation_agreement",
    "routing_health",
)


def init_as_linear(parameter: Tensor, in_features: int):
    """Draw a weight or bias of `in_features` inputs from U(-1/sqrt(n), 1/sqrt(n)), as `torch.nn.Linear` does."""
    bound = in_features**-0.5
    init.uniform_(parameter, -bound, bound)


class StableMoEPreTrainedModel(TwoStageRoutingMixin, IntegrationMixin, PreTrainedModel):
    """What all StableMoE models share: initialisation, loading, and the two stages of the routing."""

    config: StableMoEConfig
    config_class = StableMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StableMoEBlock", "StableMoELayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _auto_map = {
        "AutoConfig": "configuration_stablemoe.StableMoEConfig",
        "AutoModel": "modeling_stablemoe.StableMoEModel",
        "AutoModelForCausalLM": "modeling_stablemoe.StableMoEForCausalLM",
        "AutoModelForSequenceClassification": "modeling_stablemoe.StableMoEForSequenceClassification",
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
        if self.config.initialization == "fairseq":
            self._init_as_fairseq(module)
        if isinstance(module, ExpertSublayer):
            self._init_experts(module)
        elif isinstance(module, LearnedRouter):
            init.orthogonal_(module.centroids, gain=0.1)
        elif isinstance(module, RouterMemory):
            for values in module.buffers():
                init.zeros_(values)
        elif isinstance(module, DistilledRouter):
            self._init_distilled_router(module)
        elif isinstance(module, FrozenRouter):
            init.copy_(module.routing_table, module.initial_table())
        elif isinstance(module, FrozenWeights):
            for bits in module.buffers():
                init.copy_(bits, torch.full_like(bits, -1))

    def _init_as_fairseq(self, module: nn.Module):
        """Initialise an embedding or a matrix of a block as the released code does."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=module.embedding_dim**-0.5)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif module is self.get_output_embeddings():  # one that is not tied
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        elif isinstance(module, nn.Linear) and hasattr(module, "part_of_block"):
            if module.part_of_block == "ffn":
                init_as_linear(module.weight, module.in_features)
            else:
                init.xavier_uniform_(module.weight, gain=2**-0.5 if module.part_of_block == "qkv" else 1.0)
            if module.part_of_block == "attention_output":
                init.zeros_(module.bias)
            else:
                init_as_linear(module.bias, module.in_features)

    def _init_experts(self, module: ExpertSublayer):
        is_fairseq = self.config.initialization == "fairseq"
        init.ones_(module.layernorm_weight)
        init.zeros_(module.layernorm_bias)
        # W2 at zero: a new expert changes nothing (released code).
        init.zeros_(module.down_proj)
        if is_fairseq:
            init_as_linear(module.up_proj, module.up_proj.shape[-1])
            init_as_linear(module.up_proj_bias, module.up_proj.shape[-1])
            init_as_linear(module.down_proj_bias, module.down_proj.shape[-1])
        else:
            init.normal_(module.up_proj, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)
        if is_fairseq or self.config.share_experts_in_stage1:
            for name in EXPERT_PARAMETERS:
                parameter = getattr(module, name)
                init.copy_(parameter, parameter[:1].expand_as(parameter).clone())

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

    def routing_outputs(self, output_router_logits: bool) -> dict[str, bool]:
        """Say what a head has its backbone record: all that losses and statistics need, in training.

        Scores of a frozen routing are left out unless someone asks for them: nothing is learned of them, and they would
        cost what the number of experts is.

        Args:
            output_router_logits (`bool`): whether someone does.

        Returns:
            `dict[str, bool]`: arguments of the backbone.
        """
        recorded = dict.fromkeys(ROUTING_OUTPUTS, self.training or output_router_logits)
        if not output_router_logits and self.routing_stage == 2:
            recorded["output_router_logits"] = False
        return recorded

    def is_learning(self, last_hidden_state: Tensor, *scores: tuple[Tensor, ...] | None) -> bool:
        """Return True if a forward pass belongs to a step that learns: in training mode, and with a gradient.

        Only such a step moves counts and running statistics. Programs sample between steps without leaving training mode,
        and run a second pass under `torch.no_grad()`.

        Args:
            last_hidden_state (`torch.Tensor`): of the backbone.
            *scores (`tuple[torch.Tensor]`, *optional*): of the routers, which may learn where the backbone does not.
        """
        tensors = [last_hidden_state, *(layer for layers in scores for layer in layers or ())]
        return self.training and any(tensor.requires_grad for tensor in tensors)

    def warn_of_missing_labels(self):
        """Say so, once, if a pass that learns in stage 1 has no labels, so that its loss is made elsewhere.

        Trainer's `compute_loss_func` and its label smoothing take them away.
        """
        if self.routing_stage == 1 and not is_torchdynamo_compiling():
            logger.warning_once(
                "Stage 1 is trained without `labels`, on a loss that is not the model's: the routing is balanced and distilled "
                "only if `config.router_aux_loss_coef * outputs.aux_loss` is added to that loss. Where Trainer's "
                "`compute_loss_func` makes the loss, it is given these outputs."
            )

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
        check_range(
            token_ids,
            self.config.vocab_size,
            "token id",
            "`vocab_size`; use the model's own tokenizer, or `resize_token_embeddings` after adding tokens",
        )

    def warn_of_pruned_tokens(self, token_ids: Tensor, side: int):
        """Say so, once, if a token has lost its expert to pruning, on the CPU and outside compiled code.

        Args:
            token_ids (`torch.LongTensor`): what tokens are routed by, of any shape.
            side (`int`): 0 for a language model or an encoder, 1 for a decoder.
        """
        if self.config.pruned_tokens is None or not may_ask(token_ids):
            return
        has_lost = unpack_ids(self.config.pruned_tokens[side])
        lost = token_ids[token_ids < len(has_lost)]  # others have been added since
        lost = lost[has_lost[lost]]
        if lost.numel():
            logger.warning_once(
                f"Token id {int(lost[0])} lost its expert when this checkpoint was pruned and goes through another one: what "
                "follows is not what the whole model computes. Keep to the vocabulary that it was pruned for, or load the "
                "whole checkpoint."
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
            "balance_loss": losses.balance_loss,
            "distillation_loss": losses.distillation_loss,
            "expert_load": losses.expert_load,
            "distillation_agreement": mean.distillation_agreement,
            "routing_health": mean,
        }

    def _balance_weight(self) -> Tensor | float:
        """Give the share of the balance loss that counts by now, of `balance_loss_warmup_tokens`."""
        if not self.config.balance_loss_warmup_tokens:
            return 1.0
        first = next(iter(self.moe_layers_by_name.values()))
        return (first.bare_router.memory()["tokens"][0] / self.config.balance_loss_warmup_tokens).clamp(max=1.0)

    def auxiliary_loss(
        self, routing: RoutingLosses, is_target: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Weigh the routing losses as they enter the loss, up to `router_aux_loss_coef` (eq. 11).

        The task loss is divided by `num_items_in_batch`, so the auxiliary loss of each micro-batch, a mean, must count
        for its share of it: else it would grow with the number of micro-batches and processes.

        Args:
            routing (`RoutingLosses`): of this micro-batch, its sequences weighed by their targets where
                `num_items_in_batch` is given (see `token_weights`).
            is_target (`torch.BoolTensor`, *optional*): True on the target tokens of this micro-batch, if it has labels.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): those of the whole batch.

        Returns:
            `torch.Tensor` of shape `()`: 0 where there are labels but no target tokens, and `num_items_in_batch` is
                given.
        """
        aux_loss = self.config.distillation_loss_coef * routing.weighted_distillation_loss
        if self.config.balance_loss_coef:
            weight = self.config.balance_loss_coef * self._balance_weight()
            aux_loss = aux_loss + weight * routing.weighted_balance_loss
        if num_items_in_batch is None or is_target is None:
            return aux_loss
        return aux_loss * share_of_targets(is_target.sum(), num_items_in_batch, aux_loss.device)

    def head_output(
        self,
        output_class: type[StableMoECausalLMOutputWithPast],
        outputs: StableMoEModelOutputWithPast,
        *,
        logits: Tensor,
        task_loss: Tensor | None,
        routing: dict[str, Any],
        output_router_logits: bool,
    ) -> StableMoECausalLMOutputWithPast:
        """Put together what a head on a causal backbone returns: the loss that is trained (eqs. 11 and 15), and the rest.

        Args:
            output_class (`type`): of the output.
            outputs (`StableMoEModelOutputWithPast`): of the backbone.
            logits (`torch.Tensor`): of the head.
            task_loss (`torch.Tensor` of shape `()`, *optional*): without labels there is no loss.
            routing (`dict`): of `StableMoEModel.routing_fields`; empty where the routing was not recorded.
            output_router_logits (`bool`): whether router logits and expert indices were asked for.
        """
        loss = task_loss
        if self.training and loss is not None and self.config.moe_layer_positions:
            loss = loss + self.config.routing_loss_factor * routing["aux_loss"].to(loss.device)
        return output_class(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.cache},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=(outputs.router_logits or None) if output_router_logits else None,
            expert_indices=outputs.expert_indices if output_router_logits else None,
            task_loss=task_loss,
            # By name: a symbolic trace of the head has a value for `routing` that cannot be unpacked.
            **{name: routing.get(name) for name in ROUTING_FIELDS},
        )


def check_range(ids: Tensor, limit: int, what: str, remedy: str):
    """Refuse ids outside [0, limit), on the CPU and outside compiled code.

    Args:
        ids (`torch.LongTensor`): of any shape.
        limit (`int`): how many there are.
        what (`str`): one id.
        remedy (`str`): the field that sets the limit, and what to do.

    Raises:
        ValueError: naming an offending id.
    """
    if not may_ask(ids) or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise ValueError(f"There is a {what} {low if low < 0 else high}, outside 0..{limit - 1} of {remedy}.")


__all__ = ["ROUTING_FIELDS", "ROUTING_OUTPUTS", "StableMoEPreTrainedModel", "check_range"]
