# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Decoders of transformers whose blocks are extended by MoE layers, and the logits of their heads.

A block stays what it is, in the list of blocks where its model looks for it: its class gains the MoE layers beside it. The
decoder hands what these need down to its blocks, as it does with every keyword that it does not know.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_stablemoe import StableMoEConfig
from .initialization_stablemoe import init_routing_weights
from .layer_stablemoe import StableMoEFeedForward, StableMoELayer
from .routing_stablemoe import RECORDED, Router


class BlockWithExperts:
    """What the class of a decoder's block gains: an MoE layer after it, or in place of its FFN, and one before the first block."""

    # Of the MoE layer that is not before the block: where it stands, and its name in the block.
    moe_position: int | None = None
    moe_name: str | None = None

    def forward(self, hidden_states: Tensor, *args, moe_inputs: dict[int, tuple] | None = None, **kwargs):
        """Run the MoE layer before the block, the block, with experts in it, and the MoE layer after it; each if there is one.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): input of the block.
            *args: other arguments of the block.
            moe_inputs (`dict[int, tuple]`): by position, the arguments of each MoE layer but the hidden states.
            **kwargs: other arguments of the block.

        Raises:
            ValueError: if the decoder has not handed `moe_inputs` down.
        """
        if moe_inputs is None:
            raise ValueError(
                f"The decoder of a {type(self).__name__} does not hand keyword arguments down to its blocks, so its MoE layers "
                "do not see the tokens. Choose a `backbone_config` of another architecture, Llama's or Qwen3's say."
            )
        if hasattr(self, "moe_layer_before"):
            hidden_states = self.moe_layer_before(hidden_states, *moe_inputs[0])
        moe_layer = None if self.moe_name is None else getattr(self, self.moe_name)
        if isinstance(moe_layer, StableMoEFeedForward):
            moe_layer.given = moe_inputs[self.moe_position]
            moe_layer = None
        outputs = super().forward(hidden_states, *args, **kwargs)
        if moe_layer is None:
            return outputs
        if isinstance(outputs, tuple):
            return moe_layer(outputs[0], *moe_inputs[self.moe_position]), *outputs[1:]
        return moe_layer(outputs, *moe_inputs[self.moe_position])

    def __reduce_ex__(self, protocol):
        # The class is made when it is needed, where pickle cannot find it.
        return _empty, (block_with_experts, type(self).__mro__[2]), self.__getstate__()


class DecoderWithExperts:
    """What the class of a decoder gains: its routers are recorded, and its MoE layers initialised as all others."""

    # Of the MoE layers; there is none yet while the decoder itself is built.
    moe_config: StableMoEConfig | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if not init_routing_weights(module, self.moe_config):
            super()._init_weights(module)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the source of the class's module, which is this file for ours.
        return cls.__mro__[2]._can_set_experts_implementation()

    def __reduce_ex__(self, protocol):
        return _empty, (decoder_with_experts, type(self).__mro__[2]), self.__getstate__()


@cache
def block_with_experts(block_class: type[nn.Module]) -> type[nn.Module]:
    """Extend the class of a block. The name stays: what must not be split over devices is known by it."""
    return type(block_class.__name__, (BlockWithExperts, block_class), {})


@cache
def decoder_with_experts(decoder_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Extend the class of a decoder."""
    recorded = {name: OutputRecorder(Router, index=index) for index, name in enumerate(RECORDED)}
    can_record = {**(decoder_class._can_record_outputs or {}), **recorded}
    return type(decoder_class.__name__, (DecoderWithExperts, decoder_class), {"_can_record_outputs": can_record})


def _empty(extend: Callable[[type[nn.Module]], type[nn.Module]], own_class: type[nn.Module]) -> nn.Module:
    return object.__new__(extend(own_class))


def build_decoder(config: StableMoEConfig) -> PreTrainedModel:
    """Build the decoder of `config.backbone_config`, and extend its blocks.

    Raises:
        ValueError: for the config of anything but a decoder-only language model.
    """
    causal_class(config.backbone_config)
    decoder_class = AutoModel._model_mapping[type(config.backbone_config)]
    if not decoder_class._can_set_experts_implementation():
        # What is asked for is for our experts: the backbone has none, and would refuse.
        config.backbone_config._experts_implementation = None
    decoder = decoder_with_experts(decoder_class)(config.backbone_config)
    decoder.moe_config = config
    blocks = blocks_of(decoder)
    for position in config.moe_layer_positions:
        block = blocks[max(position - 1, 0)]
        if not isinstance(block, BlockWithExperts):
            block.__class__ = block_with_experts(type(block))
        if position == 0:
            block.moe_layer_before = StableMoELayer(config)
            continue
        block.moe_name, block.moe_position = "moe_layer", position
        if config.moe_placement == "ffn":
            block.moe_name, ffn = gated_ffn(block, config.hidden_act)
            layer = StableMoEFeedForward(config)
            layer.experts.has_fused_gate = hasattr(ffn, "gate_up_proj")
        else:
            layer = StableMoELayer(config)
        setattr(block, block.moe_name, layer)
    return decoder


def moe_layer_at(blocks: nn.ModuleList, position: int) -> StableMoELayer:
    """Return the MoE layer at a position of `moe_layer_positions`."""
    return (
        blocks[0].moe_layer_before if position == 0 else getattr(blocks[position - 1], blocks[position - 1].moe_name)
    )


def gated_ffn(block: nn.Module, hidden_act: str) -> tuple[str, nn.Module]:
    """Find the FFN of a block that gated experts can take the place of, and its name.

    Raises:
        ValueError: if there is none: experts have a gate, no biases, and the activation `hidden_act`.
    """
    activation = type(ACT2FN[hidden_act])
    for name, module in block.named_children():
        parts = dict(module.named_children())
        matrices = [parts.pop(key, None) for key in ("gate_proj", "up_proj", "down_proj")]
        if "gate_up_proj" in parts:
            matrices[:2] = [parts.pop("gate_up_proj")]
        is_plain = all(type(matrix) is nn.Linear and matrix.bias is None for matrix in matrices)
        if is_plain and [type(part) for part in parts.values()] == [activation]:
            return name, module
    raise ValueError(
        f"A {type(block).__name__} has no gated FFN without biases and with the activation {hidden_act!r}, which experts could be "
        'copies of: choose `moe_placement="between"`, or another `backbone_config`.'
    )


@torch.no_grad()
def copy_ffn(ffn: nn.Module, experts: nn.Module):
    """Make all of some gated experts, of this package or of transformers, copies of a gated FFN."""
    gate_up = [ffn.gate_up_proj] if hasattr(ffn, "gate_up_proj") else [ffn.gate_proj, ffn.up_proj]
    experts.gate_up_proj.copy_(torch.cat([matrix.weight for matrix in gate_up]).expand_as(experts.gate_up_proj))
    experts.down_proj.copy_(ffn.down_proj.weight.expand_as(experts.down_proj))


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of a decoder-only language model.

    Raises:
        ValueError: for the config of anything else.
    """
    classes = AutoModelForCausalLM._model_mapping
    if type(config) not in classes.keys() or config.is_encoder_decoder or config.sub_configs:
        raise ValueError(
            f"A {config.model_type!r} model is no decoder-only language model, with blocks that MoE layers could stand between, as a "
            "Llama or a Qwen3 is."
        )
    return classes[type(config)]


def blocks_of(decoder: PreTrainedModel) -> nn.ModuleList:
    """Find the blocks of a decoder: its only list of layers that can be checkpointed.

    Raises:
        ValueError: if there is no such list.
    """
    lists = [
        module
        for module in decoder.children()
        if isinstance(module, nn.ModuleList) and module and isinstance(module[0], GradientCheckpointingLayer)
    ]
    if len(lists) != 1 or len(lists[0]) != decoder.config.num_hidden_layers:
        raise ValueError(
            f"A {type(decoder).__name__} has no single list of blocks, which MoE layers could stand between: choose a "
            "`backbone_config` of another architecture."
        )
    return lists[0]


def name_of(model: nn.Module, part: nn.Module) -> str:
    """Return the qualified name of a part of a model."""
    return next(name for name, module in model.named_modules() if module is part)


@dataclass
class _DecoderOutput(MoeModelOutputWithPast):
    """What heads read of the output of any decoder."""

    cross_attentions: tuple[Tensor, ...] | None = None


class _GivenStates(nn.Module):
    """In place of a decoder: returns the hidden states that it is given as embeddings."""

    def forward(self, input_ids: None = None, *, inputs_embeds: Tensor, **kwargs) -> _DecoderOutput:
        """Return them, `(batch, sequence, hidden_size)`."""
        return _DecoderOutput(last_hidden_state=inputs_embeds)


class BackboneHead:
    """The head of a decoder's language model, without its matrix: scales and caps logits as that model does.

    Args:
        config (`PreTrainedConfig`): of the decoder.

    Raises:
        ValueError: if that head is not a linear layer whose products are changed, or not.
    """

    def __init__(self, config: PreTrainedConfig):
        with torch.device("meta"):
            self._model = causal_class(config)(config)
        matrix = self._model.get_output_embeddings()
        if type(matrix) is not nn.Linear:
            raise ValueError(
                f"The head of a {type(self._model).__name__} is no linear layer. Choose a `backbone_config` of another "
                "architecture."
            )
        self.has_bias = matrix.bias is not None
        setattr(self._model, self._model.base_model_prefix, _GivenStates())
        self._model.set_output_embeddings(nn.Identity())
        # Most do nothing, and to ask them costs a twentieth of a small model's decoding step.
        probe = torch.linspace(-100.0, 100.0, 9, device="cpu").view(1, 1, -1)
        try:
            self.changes_logits = not torch.equal(self._run(probe), probe)
        except AttributeError as error:  # of the matrix, which is not there
            raise ValueError(
                f"The head of a {type(self._model).__name__} does more with its matrix than multiply by it. Choose a "
                "`backbone_config` of another architecture."
            ) from error

    def __call__(self, logits: Tensor) -> Tensor:
        """Return what the language model makes of the products with its output matrix, `(batch, sequence, V)`."""
        return self._run(logits) if self.changes_logits else logits

    def _run(self, logits: Tensor) -> Tensor:
        return self._model(inputs_embeds=logits, use_cache=False).logits


__all__ = [
    "BackboneHead",
    "BlockWithExperts",
    "DecoderWithExperts",
    "block_with_experts",
    "blocks_of",
    "build_decoder",
    "causal_class",
    "copy_ffn",
    "decoder_with_experts",
    "gated_ffn",
    "moe_layer_at",
    "name_of",
]
