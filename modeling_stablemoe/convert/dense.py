# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""From a dense language model, GPT-2 or OPT, to a StableMoE that computes the same.

A `DenseSource` says how one architecture maps: which fields of its config are ours under another name, which values our
blocks cannot express, and where each tensor goes. New experts add nothing, so the MoE layers between the blocks change
no logit until they are trained.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import fields
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling_stablemoe.checkpoints.architectures import HUB_OPTIONS
from modeling_stablemoe.model.configuration_stablemoe import StableMoEConfig
from modeling_stablemoe.model.decoder_stablemoe import causal_class, copy_ffn
from modeling_stablemoe.model.layer_stablemoe import StableMoEFeedForward, moe_layers_of


# What `from_pretrained` takes that says where a checkpoint is, and in which dtype and format it is wanted.
LOADING_OPTIONS = (*HUB_OPTIONS, "dtype", "variant", "use_safetensors")
# A dense model has these fields, but they change no logit in evaluation: they are free to choose.
FREE_FIELDS = (
    "dropout",
    "attention_dropout",
    "initializer_range",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Those that a decoder which stays itself (`backbone_config`) leaves free: they are of the experts.
EXPERT_FIELDS = ("intermediate_size", "hidden_act", "layer_norm_eps")


class SourceTensors:
    """The state dict of a dense model, from which each tensor is taken once."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.left = dict(tensors)

    def take(self, name: str) -> Tensor:
        """Take the tensor of a name, which must be there."""
        if name not in self.left:
            raise ValueError(f"The dense model has no tensor `{name}`, which its config asks for.")
        return self.left.pop(name)


class DenseSource:
    """How a dense architecture maps to ours."""

    # `{field: (the value that our blocks compute, what another value would mean)}`
    required_values: dict[str, tuple[Any, str]] = {}
    # Fields that it does not determine, beside those of the routing.
    free_fields: tuple[str, ...] = FREE_FIELDS

    def check(self, config: PreTrainedConfig):
        """Refuse what our blocks cannot express; a ValueError names field, value and remedy."""
        for name, (expected, meaning) in self.required_values.items():
            self.require(config, name, expected, meaning)

    @staticmethod
    def require(config: PreTrainedConfig, name: str, expected: Any, meaning: str):
        """Refuse a field of another value than `expected`."""
        value = getattr(config, name)
        if value != expected:
            raise ValueError(
                f"`{name}` is {value!r} in this {config.model_type!r} model: {meaning}. A StableMoE knows {expected!r} "
                "only, so its logits would be others; choose another checkpoint."
            )

    def config_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Give the fields of our config that the dense model determines."""
        raise NotImplementedError

    def tensors(self, source: SourceTensors, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the dense model under our names."""
        raise NotImplementedError

    @torch.no_grad()
    def load(self, model: PreTrainedModel, dense: PreTrainedModel):
        """Copy the tensors of a dense model into a StableMoE, whose MoE layers keep their own."""
        given = SourceTensors(dense.state_dict())
        tensors = dict(self.tensors(given, dense.config))
        tensors["lm_head.weight"] = given.take("lm_head.weight")
        if given.left:
            raise ValueError(
                f"The dense model has tensors that a StableMoE has no place for: {', '.join(sorted(given.left))}. Merge "
                "adapters, undo quantization or remove extra heads first."
            )
        embedding = tensors["model.embed_tokens.weight"]
        if model.config.tie_word_embeddings and not torch.equal(tensors["lm_head.weight"], embedding):
            raise ValueError(
                "`tie_word_embeddings` is True, but the head of the dense model is not its token embedding. Call its "
                "`tie_weights()`, or set `tie_word_embeddings` to False in its config."
            )
        own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.moe_layers.")}
        if tensors.keys() != own.keys():
            raise ValueError(f"Tensors without a counterpart: {', '.join(sorted(tensors.keys() ^ own.keys()))}.")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"`{name}` is {list(tensor.shape)} in the dense model, {list(own[name].shape)} by its config: weights and "
                    "config are not of one model."
                )
            own[name].copy_(tensor)


def _parts(source: SourceTensors, old: str, new: str) -> Iterator[tuple[str, Tensor]]:
    """Yield weight and bias of a module of the same form."""
    for part in ("weight", "bias"):
        yield f"{new}.{part}", source.take(f"{old}.{part}")


class GPT2Source(DenseSource):
    """GPT-2: pre-norm blocks with learned positions; its matrices are stored input x output (`Conv1D`)."""

    required_values = {
        "add_cross_attention": (False, "blocks attend to an encoder, too"),
        "scale_attn_weights": (True, "attention scores are not divided by the root of the head's width"),
        "scale_attn_by_inverse_layer_idx": (False, "the scores of block i are also divided by i"),
        "reorder_and_upcast_attn": (
            False,
            "eager attention multiplies in another order, in float32 (with other implementations it is idle: set it to "
            "False in the loaded model, and pass that)",
        ),
    }

    def config_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Give the fields that GPT-2 determines; `dropout` is None where embeddings and residuals have two rates."""
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.n_embd,
            "intermediate_size": 4 * config.n_embd if config.n_inner is None else config.n_inner,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "hidden_act": config.activation_function,
            "max_position_embeddings": config.n_positions,
            "do_layer_norm_before": True,
            "layer_norm_eps": config.layer_norm_epsilon,
            "initializer_range": config.initializer_range,
            "dropout": config.resid_pdrop if config.resid_pdrop == config.embd_pdrop else None,
            "attention_dropout": config.attn_pdrop,
        }

    def tensors(self, source: SourceTensors, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
        """Yield GPT-2's tensors: matrices transposed, and the joint projection of attention cut in three."""
        yield "model.embed_tokens.weight", source.take("transformer.wte.weight")
        yield "model.embed_positions.weight", source.take("transformer.wpe.weight")
        for block in range(config.n_layer):
            old, new = f"transformer.h.{block}", f"model.layers.{block}"
            yield from _parts(source, f"{old}.ln_1", f"{new}.input_layernorm")
            for part, tensor in _parts(source, f"{old}.attn.c_attn", ""):
                for name, third in zip("qkv", tensor.chunk(3, dim=-1), strict=True):
                    yield f"{new}.self_attn.{name}_proj{part}", third.T if third.dim() == 2 else third
            yield from self._linear(source, f"{old}.attn.c_proj", f"{new}.self_attn.o_proj")
            yield from _parts(source, f"{old}.ln_2", f"{new}.post_attention_layernorm")
            yield from self._linear(source, f"{old}.mlp.c_fc", f"{new}.mlp.up_proj")
            yield from self._linear(source, f"{old}.mlp.c_proj", f"{new}.mlp.down_proj")
        yield from _parts(source, "transformer.ln_f", "model.norm")

    @staticmethod
    def _linear(source: SourceTensors, old: str, new: str) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _parts(source, old, new):
            yield name, tensor.T if tensor.dim() == 2 else tensor


class OPTSource(DenseSource):
    """OPT: pre-norm or post-norm blocks; learned positions, counted over real tokens as ours are."""

    # The first two rows of positions are no positions: padding reads the second, nothing the first.
    offset = 2
    required_values = {
        "enable_bias": (True, "linear layers have no bias"),
        "layer_norm_elementwise_affine": (True, "LayerNorms have no weights"),
        "layerdrop": (0.0, "whole blocks are dropped while training (load the model with `layerdrop=0.0`)"),
    }

    def check(self, config: PreTrainedConfig):
        """Refuse projected embeddings and a missing last LayerNorm, too."""
        super().check(config)
        self.require(config, "word_embed_proj_dim", config.hidden_size, "embeddings are projected to the hidden size")
        if config.do_layer_norm_before:
            self.require(config, "_remove_final_layer_norm", False, "no LayerNorm follows the last pre-norm block")

    def config_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Give the fields that OPT determines; here its rate of dropout applies to the embeddings, too."""
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.ffn_dim,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "hidden_act": config.activation_function,
            "max_position_embeddings": config.max_position_embeddings,
            "do_layer_norm_before": config.do_layer_norm_before,
            "layer_norm_eps": 1e-5,
            "initializer_range": config.init_std,
            "dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
        }

    def tensors(self, source: SourceTensors, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
        """Yield OPT's tensors, without the rows that are no positions."""
        decoder = "model.decoder"
        yield "model.embed_tokens.weight", source.take(f"{decoder}.embed_tokens.weight")
        yield "model.embed_positions.weight", source.take(f"{decoder}.embed_positions.weight")[self.offset :]
        for block in range(config.num_hidden_layers):
            old, new = f"{decoder}.layers.{block}", f"model.layers.{block}"
            for name in "qkv":
                yield from _parts(source, f"{old}.self_attn.{name}_proj", f"{new}.self_attn.{name}_proj")
            yield from _parts(source, f"{old}.self_attn.out_proj", f"{new}.self_attn.o_proj")
            yield from _parts(source, f"{old}.self_attn_layer_norm", f"{new}.input_layernorm")
            yield from _parts(source, f"{old}.fc1", f"{new}.mlp.up_proj")
            yield from _parts(source, f"{old}.fc2", f"{new}.mlp.down_proj")
            yield from _parts(source, f"{old}.final_layer_norm", f"{new}.post_attention_layernorm")
        if config.do_layer_norm_before:
            yield from _parts(source, f"{decoder}.final_layer_norm", "model.norm")


class DecoderSource(DenseSource):
    """Any other decoder of transformers: it stays what it is (`backbone_config`), its weights are taken whole."""

    free_fields = (*EXPERT_FIELDS, "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")

    def check(self, config: PreTrainedConfig):
        """Refuse what is no decoder-only language model."""
        causal_class(config)

    def config_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Give the decoder's config, and its FFN's width to the experts."""
        fields = {"backbone_config": copy.deepcopy(config)}
        if hasattr(config, "intermediate_size"):
            fields["intermediate_size"] = config.intermediate_size
        return fields

    @torch.no_grad()
    def load(self, model: PreTrainedModel, dense: PreTrainedModel):
        """Copy decoder and head; experts in place of an FFN become copies of it."""
        decoder, head, tensors = model.model.decoder, dense.get_output_embeddings(), dense.base_model.state_dict()
        own = moe_layers_of(decoder)
        for name, layer in own.items():
            if isinstance(layer, StableMoEFeedForward):
                copy_ffn(dense.base_model.get_submodule(name), layer.experts)
                tensors = {key: values for key, values in tensors.items() if not key.startswith(f"{name}.")}
        loaded = decoder.load_state_dict(tensors, strict=False)
        missing = [key for key in loaded.missing_keys if not key.startswith(tuple(f"{name}." for name in own))]
        if missing or loaded.unexpected_keys:
            raise ValueError(
                f"The dense model and its config do not fit: {', '.join(missing + loaded.unexpected_keys)}. Merge adapters, undo "
                "quantization or remove extra heads first."
            )
        model.lm_head.load_state_dict(head.state_dict())


# Architectures whose blocks are the paper's; all others bring their own.
DENSE_SOURCES: dict[str, type[DenseSource]] = {"gpt2": GPT2Source, "opt": OPTSource}


def convert_dense(
    model_class: type[PreTrainedModel], dense: PreTrainedModel | str | PathLike, options: dict[str, Any]
) -> PreTrainedModel:
    """Make a StableMoE of a dense model, or of its Hub name or folder.

    `options` is everything else that `StableMoEForCausalLM.from_dense` takes; `None` stands for the default.
    """
    options = {name: value for name, value in options.items() if value is not None}
    implementations = {
        name: options.pop(name) for name in ("attn_implementation", "experts_implementation") if name in options
    }
    loading = {name: options.pop(name) for name in LOADING_OPTIONS if name in options}
    if isinstance(dense, (str, PathLike)):
        check_overrides(options)
        dense = load_dense(dense, **loading)
    elif loading:
        raise ValueError(f"{', '.join(loading)}: these load a checkpoint; the model that was given is loaded already.")
    source = _source_of(dense.config)
    _check_whole(dense)
    config = config_of_dense(dense.config, **options)
    implementations.setdefault("attn_implementation", dense.config._attn_implementation)
    model = model_class._from_config(config, dtype=dense.dtype, **implementations)
    source.load(model, dense)
    if dense.can_generate():
        model.generation_config = copy.deepcopy(dense.generation_config)
    return model.to(dense.device).train(dense.training)


def config_of_dense(dense_config: PreTrainedConfig, **overrides: Any) -> StableMoEConfig:
    """Make the config of the StableMoE that computes what a dense model does; overrides are fields it leaves free."""
    source = _source_of(dense_config)
    check_overrides(overrides, source.free_fields)
    source.check(dense_config)
    shared = ("use_cache", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    values = source.config_fields(dense_config) | {name: getattr(dense_config, name) for name in shared} | overrides
    if values.get("dropout", 0.0) is None:
        raise ValueError(
            f"`resid_pdrop` ({dense_config.resid_pdrop}) and `embd_pdrop` ({dense_config.embd_pdrop}) differ: a StableMoE "
            "has one `dropout` for residuals and embeddings. Choose one, as `dropout=0.1`; it changes no logit in "
            "evaluation."
        )
    has_stage1 = values.get("router_type", "stable") == "stable" or values.get("distilled_router") is not None
    if values.get("moe_placement") == "ffn" and has_stage1:
        # Experts that run as one sum in the order of the FFN that they are copies of: the same logits to the bit.
        values.setdefault("share_experts_in_stage1", True)
    return StableMoEConfig(**values)


def check_overrides(overrides: dict[str, Any], free_fields: Sequence[str] = (*EXPERT_FIELDS, *FREE_FIELDS)):
    """Refuse overrides of fields that the dense model determines, or that do not exist.

    Args:
        overrides (`dict`): fields of `StableMoEConfig` by name.
        free_fields (sequence of `str`): those that may be set beside the fields of the routing. Default: those that some
            architecture leaves free.

    Raises:
        ValueError: naming the fields that are refused, and those that can be chosen.
    """
    free = [*routing_fields(), *free_fields]
    refused = sorted(set(overrides) - set(free))
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: no options of a conversion. The dense model determines its own shape; free are "
            f"{', '.join(free)}, and what loads it: {', '.join(LOADING_OPTIONS)}."
        )


def routing_fields() -> list[str]:
    """List the fields of our config that no dense model has: those of experts, routing and stage 1."""
    determined = {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "hidden_act",
        "max_position_embeddings",
        "position_embedding_type",
        "scale_embedding",
        "do_layer_norm_before",
        "layer_norm_eps",
        "tie_word_embeddings",
        "router_fingerprint",
        "pruned_tokens",
        "backbone_config",
        *FREE_FIELDS,
        *(field.name for field in fields(PreTrainedConfig)),
    }
    return [field.name for field in fields(StableMoEConfig) if field.name not in determined]


def load_dense(name_or_path: str | PathLike, **loading: Any) -> PreTrainedModel:
    """Load a whole decoder-only language model.

    Args:
        name_or_path (`str` or `PathLike`): Hub name or folder.
        **loading: arguments of `from_pretrained`: `revision`, `token`, `cache_dir`, `dtype`, `variant` and the like.

    Returns:
        `PreTrainedModel`: in evaluation mode.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if it is of another architecture, has a setting that our blocks cannot express, or has missing or
            surplus tensors.
    """
    where = {name: value for name, value in loading.items() if name in HUB_OPTIONS}
    config = AutoConfig.from_pretrained(name_or_path, **where)
    _source_of(config).check(config)
    model, info = AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **loading)
    # Earlier versions saved the causal mask with the weights.
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith((".attn.bias", ".attn.masked_bias"))]
    for what, names in (("lacks", info["missing_keys"]), ("holds more than its architecture has:", unexpected)):
        if names:
            raise ValueError(
                f"The checkpoint {str(name_or_path)!r} {what} {', '.join(sorted(names))}. Convert a whole language "
                "model; load another kind of model yourself, and pass what is its language model."
            )
    return model


def _source_of(config: PreTrainedConfig) -> DenseSource:
    return DENSE_SOURCES.get(getattr(config, "model_type", None), DecoderSource)()


def _check_whole(dense: PreTrainedModel):
    expected = causal_class(dense.config)
    if not isinstance(dense, expected):
        raise ValueError(
            f"`from_dense` needs a {expected.__name__}, got a {type(dense).__name__}. Merge adapters "
            "(`merge_and_unload()`), and pass the language model itself."
        )
    absent = [name for name, parameter in dense.named_parameters() if parameter.is_meta]
    if absent:
        raise ValueError(f"{', '.join(absent)}: not in memory. Load the dense model without offloading.")
