# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What the options and the names of tensors of a fairseq checkpoint say about the model: its config, and its layers.

Source: the released code of StableMoE, `fairseq/models/transformer_lm.py` (options and their defaults).
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modeling_stablemoe.model.configuration_stablemoe import StableMoEConfig

from .fairseq_files import FairseqFile


# fairseq's dictionary begins with <s>, <pad> and </s>; positions begin behind the padding's.
BOS, PAD, EOS = range(3)
FIRST_POSITION = PAD + 1

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# One expert a process in the released code, `experts.0` and so on in newer versions of fairseq.
_EXPERT = re.compile(r"(?:expert_network|experts\.(?P<local>\d+))\.(?P<sublayer>\d+)\.(?P<name>.+)")
_OF_MOE_LAYERS = (
    "expert_network",
    "experts",
    "expert_centroids",
    "distill_expert_centroids",
    "routing_emb",
    "routing_kernel",
    "routing_model",
    "hash_dict",
    "dense_ffn",
)
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "tanh": "tanh",
    "linear": "linear",
}
# By `distilled_model`.
_DISTILLED_ROUTERS = {"wordemb": "word_embedding", "bigram_emb": "bigram", "cnn": "cnn"}
# By `assignment_algorithm`: StableMoE is greedy, BASE balances with an auction.
_ROUTER_TYPES = {"GA": "stable", "BA": "base"}
# What a StableMoE model has not, by option, with the value that leaves it out.
_ABSENT = {
    "adaptive_input": False,
    "adaptive_softmax_cutoff": None,
    "character_embeddings": False,
    "layernorm_embedding": False,
    "no_token_positional_embeddings": False,
    "no_decoder_final_norm": False,
    "decoder_layers_to_keep": None,
}


@dataclass(frozen=True)
class Layout:
    """Which layers of the decoder are what; fairseq counts Transformer blocks and MoE layers in one row.

    Attributes:
        blocks (`list[int]`): numbers of the Transformer blocks.
        moe_layers (`list[int]`): numbers of the MoE layers.
        num_local_experts (`int`): of each MoE layer in one file.
        num_sublayers (`int`): of each expert.
    """

    blocks: list[int]
    moe_layers: list[int]
    num_local_experts: int
    num_sublayers: int

    @property
    def moe_layer_positions(self) -> list[int]:
        """`list[int]`: how many blocks stand before each MoE layer."""
        return [number - place for place, number in enumerate(self.moe_layers)]


def read_layout(file: FairseqFile) -> Layout:
    """Tell blocks from MoE layers by the names of their tensors.

    Raises:
        ValueError: for numbers that are missing, or without any layer.
    """
    layers = [found.groups() for found in map(_LAYER.fullmatch, file.tensors) if found]
    moe_layers = {int(number) for number, name in layers if name.split(".")[0] in _OF_MOE_LAYERS}
    blocks = {int(number) for number, _ in layers} - moe_layers
    count = max(blocks | moe_layers, default=-1) + 1
    missing = sorted(set(range(count)) - blocks - moe_layers)
    if missing or not count:
        what = ", ".join(f"`decoder.layers.{number}`" for number in missing) or "`decoder.layers.0`"
        raise ValueError(f"{str(file.path)!r} holds no tensor of {what}. Restore the checkpoint from its source.")
    experts = [found for found in (_EXPERT.fullmatch(name) for _, name in layers) if found]
    return Layout(
        sorted(blocks),
        sorted(moe_layers),
        1 + max((int(found["local"] or 0) for found in experts), default=0),
        1 + max((int(found["sublayer"]) for found in experts), default=0),
    )


def read_config(file: FairseqFile, layout: Layout) -> StableMoEConfig:
    """Make the config of a model; sizes are those of the options, for the tensors to be held against.

    Args:
        file (`FairseqFile`): of any rank.
        layout (`Layout`): of that file.

    Raises:
        ValueError: for options that a StableMoE model cannot have, or that do not fit the tensors.
    """
    options = file.options
    _require_decoder(file, layout)
    hidden_size = _required(file, "decoder_embed_dim")
    learned = bool(options.get("decoder_learned_pos", False))
    return StableMoEConfig(
        vocab_size=_tensor(file, "decoder.embed_tokens.weight").shape[0],
        hidden_size=hidden_size,
        intermediate_size=_required(file, "decoder_ffn_embed_dim"),
        num_hidden_layers=len(layout.blocks),
        num_attention_heads=_required(file, "decoder_attention_heads"),
        moe_layer_positions=layout.moe_layer_positions,
        hidden_act=_one_of(file, "activation_fn", _ACTIVATIONS, "relu"),
        max_position_embeddings=_count_positions(file, learned),
        scale_embedding=not options.get("no_scale_embedding", False),
        do_layer_norm_before=bool(options.get("decoder_normalize_before", True)),
        dropout=_number(file, "dropout"),
        attention_dropout=_number(file, "attention_dropout"),
        tie_word_embeddings=bool(options.get("share_decoder_input_output_embed", False)),
        initialization="fairseq",
        bos_token_id=BOS if options.get("add_bos_token") else EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **(_moe_fields(file, layout) if layout.moe_layers else {}),
    )


def _moe_fields(file: FairseqFile, layout: Layout) -> dict[str, Any]:
    options, name = file.options, f"decoder.layers.{layout.moe_layers[0]}"
    router_type, distilled_router = _routers(file)
    fields = {
        "num_expert_sublayers": layout.num_sublayers,
        "router_type": router_type,
        "distilled_router": distilled_router,
    }
    if router_type == "hash":
        used = int(_tensor(file, f"{name}.hash_dict", 1).max()) + 1
        return fields | {"num_experts": options.get("distributed_world_size") or used}
    num_experts = _tensor(file, f"{name}.expert_centroids").shape[0]
    if distilled_router is not None:
        fields["distilled_router_dim"] = _tensor(file, f"{name}.distill_expert_centroids").shape[1]
        fields["distillation_loss_coef"] = _number(file, "distill_factor")
    has_balance_loss = router_type == "switch" or options.get("balance_loss")
    factor = _number(file, "capacity_factor", num_experts)
    return fields | {
        "num_experts": num_experts,
        "balance_loss_coef": _number(file, "balance_factor") if has_balance_loss else 0.0,
        # So many shares hold all tokens: nothing is ever dropped.
        "expert_capacity_factor": factor if factor < num_experts else None,
    }


def _routers(file: FairseqFile) -> tuple[str, str | None]:
    """Name the router and what it is distilled into."""
    moe_type = file.options.get("moe_type", "base_layer")
    if moe_type in ("switch_layer", "hash_layer"):
        return moe_type.removesuffix("_layer"), None
    _one_of(file, "moe_type", {"base_layer": "base"}, "base_layer")
    router_type = _one_of(file, "assignment_algorithm", _ROUTER_TYPES, "BA")
    if file.options.get("distill_assignment", False):
        return router_type, _one_of(file, "distilled_model", _DISTILLED_ROUTERS, "wordemb")
    if router_type == "stable":
        raise ValueError(
            f"{str(file.path)!r} was trained with greedy assignment (`assignment_algorithm` 'GA') and without "
            "`distill_assignment`: nothing was distilled, so it has no routing that could be frozen, and no `router_type` "
            "here does that."
        )
    return router_type, None


def _require_decoder(file: FairseqFile, layout: Layout):
    """Refuse what is not a decoder of these blocks, and blocks or MoE layers that are not all there."""
    if any(name.startswith("encoder.") for name in file.tensors):
        raise ValueError(
            f"{str(file.path)!r} has an encoder. The released code has language models only, so there is no layout of "
            "encoder and decoder to convert from."
        )
    for name, value in _ABSENT.items():
        if file.options.get(name, value) not in (value, None):
            raise ValueError(
                f"{str(file.path)!r} was trained with `{name}` {file.options[name]!r}, which a StableMoE model has not."
            )
    counts = {"decoder_layers": layout.blocks, "moe_layers": layout.moe_layers, "base_layers": layout.moe_layers}
    for name, found in counts.items():
        if name in file.options and file.options[name] != len(found):
            raise ValueError(
                f"{str(file.path)!r} says `{name}` {file.options[name]!r}, but holds tensors of {len(found)}. Restore the "
                "checkpoint from its source."
            )
    if len(set(layout.moe_layer_positions)) < len(layout.moe_layers):
        raise ValueError(
            f"{str(file.path)!r} has MoE layers without a block between them (`decoder.layers` {layout.moe_layers}), which "
            "a StableMoE model has not."
        )


def _count_positions(file: FairseqFile, learned: bool) -> int:
    if learned:
        return _tensor(file, "decoder.embed_positions.weight").shape[0] - FIRST_POSITION
    return file.options.get("max_target_positions") or _required(file, "tokens_per_sample")


def _tensor(file: FairseqFile, name: str, dimensions: int = 2) -> Tensor:
    if name not in file.tensors:
        raise ValueError(f"{str(file.path)!r} holds no `{name}`. Restore the checkpoint from its source.")
    if file.tensors[name].dim() != dimensions:
        raise ValueError(
            f"`{name}` of {str(file.path)!r} has shape {list(file.tensors[name].shape)}, which fits no model."
        )
    return file.tensors[name]


def _number(file: FairseqFile, name: str, default: float = 0.0) -> float:
    value = file.options.get(name)
    if value is not None and not isinstance(value, (int, float)):
        raise ValueError(f"{str(file.path)!r} says `{name}` {value!r}, which is no number.")
    return float(default if value is None else value)


def _required(file: FairseqFile, name: str) -> int:
    value = file.options.get(name)
    if not isinstance(value, int):
        raise ValueError(f"{str(file.path)!r} does not say `{name}` in its `cfg` or `args`, but {value!r}.")
    return value


def _one_of(file: FairseqFile, name: str, choices: dict[str, str], default: str) -> str:
    value = file.options.get(name) or default
    if value not in choices:
        raise ValueError(
            f"{str(file.path)!r} was trained with `{name}` {value!r}; what can be converted is {list(choices)}."
        )
    return choices[value]


__all__ = ["BOS", "EOS", "FIRST_POSITION", "PAD", "Layout", "read_config", "read_layout"]
