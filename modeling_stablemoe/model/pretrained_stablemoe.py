# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What all StableMoE models share: initialisation, what they record, and checks."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.output_capturing import OutputRecorder

from .blocks_stablemoe import StableMoEAttention, StableMoEBlock
from .configuration_stablemoe import StableMoEBaseConfig, StableMoEConfig
from .decoder_stablemoe import causal_class
from .distillation_stablemoe import needs_context
from .initialization_stablemoe import init_as_linear, init_routing_weights
from .integration_stablemoe import IntegrationMixin
from .routing_stablemoe import RECORDED, Router
from .stages_stablemoe import TwoStageRoutingMixin
from .tensors_stablemoe import may_ask, unpack_ids


logger = logging.get_logger(__name__)


# What depends on the attention of the blocks, and so on whose they are.
_OF_THE_BLOCKS = (
    "_supports_flash_attn",
    "_supports_sdpa",
    "_supports_flex_attn",
    "_supports_attention_backend",
    "_can_compile_fullgraph",
)


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
        # What `transformers serve --trust-remote-code` asks for; a decision is read from next-token logits.
        "AutoModelForDecision": "modeling_stablemoe.StableMoEForCausalLM",
    }
    _can_record_outputs = {
        "hidden_states": StableMoEBlock,
        "attentions": StableMoEAttention,
        **{name: OutputRecorder(Router, index=index) for index, name in enumerate(RECORDED)},
    }

    def __init__(self, config: StableMoEBaseConfig, *args, **kwargs):
        backbone_config = getattr(config, "backbone_config", None)
        if backbone_config is not None:
            backbone_class = causal_class(backbone_config)
            for name in _OF_THE_BLOCKS:
                setattr(self, name, getattr(backbone_class, name))
        super().__init__(config, *args, **kwargs)
        if backbone_config is not None:
            self._no_split_modules = []  # but the blocks of the decoder, which it names itself

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if self.config.initialization == "fairseq":
            self._init_as_fairseq(module)
        init_routing_weights(module, self.config)

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

    def create_masks_for_generate(self, *, attention_mask: Tensor | None, **kwargs) -> Tensor | dict | None:
        """Make the mask that `generate` passes with a static cache, as `transformers.masking_utils` does.

        What looks back at earlier tokens must know which of them are padding, which the ready mask of four dimensions hides:
        there the mask stays as it is.
        """
        if needs_context(self.config):
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
        """Warn once if a token has lost its expert to pruning, on the CPU and outside compiled code."""
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


def check_range(ids: Tensor, limit: int, what: str, remedy: str):
    """Refuse ids outside [0, limit), on the CPU and outside compiled code.

    `what` is one id, `remedy` the field that sets the limit, and what to do.

    Raises:
        ValueError: naming an offending id.
    """
    if not may_ask(ids) or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise ValueError(f"There is a {what} {low if low < 0 else high}, outside 0..{limit - 1} of {remedy}.")


__all__ = ["StableMoEPreTrainedModel", "check_range"]
