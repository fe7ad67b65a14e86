# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The authors' fairseq language models as StableMoE models: which tensor is which, and the stage of the routing.

Source: the released code of StableMoE, `fairseq/models/transformer.py` and `fairseq/modules/moe_layer.py`; BASE layers of
fairseq itself have the same states. Every number is kept, in float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from modeling_stablemoe.model.configuration_stablemoe import StableMoEConfig
from modeling_stablemoe.model.modeling_stablemoe import StableMoEForCausalLM

from .fairseq_files import FairseqFile, find_first_file, read_file, require_rank_files
from .fairseq_options import FIRST_POSITION, Layout, read_config, read_layout


_BLOCK = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.out_proj": "self_attn.o_proj",
    "self_attn_layer_norm": "input_layernorm",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
    "final_layer_norm": "post_attention_layernorm",
}
_SUBLAYER = {
    "norm.weight": "layernorm_weight",
    "norm.bias": "layernorm_bias",
    "ff1.weight": "up_proj",
    "ff1.bias": "up_proj_bias",
    "ff2.weight": "down_proj",
    "ff2.bias": "down_proj_bias",
}
# Buffers without information; the sinusoids are computed.
_BUFFERS = {"decoder.version", "decoder.embed_positions._float_tensor", "decoder.embed_positions.weights"}


@dataclass(frozen=True)
class Conversion:
    """A converted model and what there is to say about it.

    Attributes:
        model (`StableMoEForCausalLM`): in eval mode, float32.
        files (`list[Path]`): that it was read from.
        num_updates (`int`, *optional*): optimizer steps that it has had, where the files tell.
        notes (`list[str]`): where it differs from what the authors' code would do, a sentence each.
    """

    model: StableMoEForCausalLM
    files: list[Path]
    num_updates: int | None
    notes: list[str]


@dataclass
class _Plan:
    """Where each tensor of our model comes from.

    Attributes:
        shared (`dict`): our name -> fairseq's, which every file has, and what is done to that tensor.
        experts (`dict`): our name of a stack -> fairseq's of its rows, one an expert of the file.
        made (`dict`): our name -> a tensor that stands in no file.
    """

    shared: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    experts: dict[str, list[str]] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)

    def copy(self, ours: str, theirs: str, change: Callable[[Tensor], Tensor] = lambda tensor: tensor):
        self.shared[ours] = (theirs, change)

    def copy_module(self, ours: str, theirs: str):
        for name in ("weight", "bias"):
            self.copy(f"{ours}.{name}", f"{theirs}.{name}")


def convert_fairseq_checkpoint(path: str | Path, stage: str = "auto") -> Conversion:
    """Turn a language model of the released code into a StableMoE model.

    Args:
        path (`str` or `Path`): see `find_first_file`.
        stage (`str`): of the result: `"1"`, `"2"` (its routing is frozen), or `"auto"`: 2 where the checkpoint has had
            `two_stage_updates` updates or more.

    Returns:
        `Conversion`

    Raises:
        ValueError: for a file that is missing, cannot be read or could run code; for a tensor that is missing, left over,
            of another shape than the options say, or not the same in files that share it; for options that a StableMoE
            model cannot have; for a `stage` that it cannot be in.
    """
    first = read_file(find_first_file(path))
    layout = read_layout(first)
    config = read_config(first, layout)
    files = require_rank_files(first.path, _count_ranks(first, layout, config)) if layout.moe_layers else [first.path]
    is_frozen = _is_frozen(first, config, stage)
    notes: list[str] = []
    plan = _plan(first, layout, config, notes)
    with torch.device("meta"):
        model = StableMoEForCausalLM(config)
    weights = _gather(model, plan, first, files)
    if not config.tie_word_embeddings:
        model.load_state_dict(weights, assign=True)
    else:
        model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True)
        model.tie_weights()
    if is_frozen:
        notes += _describe_ties(model, first)
        model.freeze_router()
    return Conversion(model.eval(), files, first.num_updates, notes)


def _count_ranks(file: FairseqFile, layout: Layout, config: StableMoEConfig) -> int:
    ranks, rest = divmod(config.num_experts, layout.num_local_experts)
    if rest:
        raise ValueError(
            f"{str(file.path)!r} has {layout.num_local_experts} experts of {config.num_experts}: they cannot be spread evenly "
            "over processes. Restore the checkpoint from its source."
        )
    return ranks


def _plan(file: FairseqFile, layout: Layout, config: StableMoEConfig, notes: list[str]) -> _Plan:
    plan = _Plan()
    plan.copy("model.embed_tokens.weight", "decoder.embed_tokens.weight")
    if not config.tie_word_embeddings:
        plan.copy("lm_head.weight", "decoder.output_projection.weight")
    if file.options.get("decoder_learned_pos", False):
        # The rows before are of positions that no token has.
        plan.copy("model.embed_positions.weight", "decoder.embed_positions.weight", lambda rows: rows[FIRST_POSITION:])
    else:
        plan.made["model.embed_positions.weight"] = fairseq_sinusoids(config)
        notes.append(
            "The sinusoidal positions, which fairseq spaces and counts in its own way, became a table of learned positions "
            "that holds them: the logits are the same, further training moves them."
        )
    if config.do_layer_norm_before:
        plan.copy_module("model.norm", "decoder.layer_norm")
    for place, number in enumerate(layout.blocks):
        for theirs, ours in _BLOCK.items():
            plan.copy_module(f"model.layers.{place}.{ours}", f"decoder.layers.{number}.{theirs}")
    for place, number in enumerate(layout.moe_layers):
        ours, theirs = f"model.moe_layers.{place}", f"decoder.layers.{number}"
        _plan_router(plan, ours, theirs, file, config, notes)
        _plan_experts(plan, ours, theirs, file, layout)
    return plan


def _plan_router(plan: _Plan, ours: str, theirs: str, file: FairseqFile, config: StableMoEConfig, notes: list[str]):
    if config.router_type == "hash":
        plan.copy(f"{ours}.frozen_router.routing_table", f"{theirs}.hash_dict", lambda table: table.int())
        return
    plan.copy(f"{ours}.router.centroids", f"{theirs}.expert_centroids")
    if config.distilled_router is None:
        return
    router = f"{ours}.router.distilled_router"
    plan.copy(f"{router}.centroids", f"{theirs}.distill_expert_centroids")
    embedding, vocab_size = f"{theirs}.routing_emb.weight", config.vocab_size
    plan.copy(f"{router}.embedding", embedding, lambda rows: _fit_rows(rows, vocab_size))
    if embedding in file.tensors and file.tensors[embedding].shape[0] != vocab_size:
        notes.append(_describe_rows(embedding, file.tensors[embedding].shape[0], vocab_size))
    if config.distilled_router == "cnn":
        width = config.distilled_router_dim
        plan.copy(f"{router}.conv_weight", f"{theirs}.routing_kernel", lambda kernel: _as_convolution(kernel, width))
        plan.made[f"{router}.conv_bias"] = torch.zeros(width)


def _plan_experts(plan: _Plan, ours: str, theirs: str, file: FairseqFile, layout: Layout):
    newer = any(name.startswith(f"{theirs}.experts.") for name in file.tensors)
    experts = [f"experts.{i}" for i in range(layout.num_local_experts)] if newer else ["expert_network"]
    for sublayer in range(layout.num_sublayers):
        for name, our_name in _SUBLAYER.items():
            rows = [f"{theirs}.{expert}.{sublayer}.{name}" for expert in experts]
            plan.experts[f"{ours}.expert_stack.sublayers.{sublayer}.{our_name}"] = rows


def _gather(model: StableMoEForCausalLM, plan: _Plan, first: FairseqFile, files: list[Path]) -> dict[str, Tensor]:
    """Fill a state dict; a MoE layer's expert `rank * local experts + i` is the i-th of that rank's file."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _require_names(first, plan, model.config.tie_word_embeddings)
    weights = dict(plan.made)
    for ours, (theirs, change) in plan.shared.items():
        weights[ours] = _fitting(change(first.tensors[theirs]), shapes[ours], theirs, first)
    for ours in shapes.keys() - weights.keys() - plan.experts.keys() - {"lm_head.weight"}:
        weights[ours] = torch.full(shapes[ours], -1, dtype=torch.int32)  # a routing that is not frozen yet
    for ours in plan.experts:
        weights[ours] = torch.empty(shapes[ours])
    for rank, path in enumerate(files):
        file = first if rank == 0 else read_file(path)
        if file is not first:
            _require_names(file, plan, model.config.tie_word_embeddings)
            _require_same_run(file, first, plan)
        for ours, rows in plan.experts.items():
            for place, theirs in enumerate(rows):
                row = weights[ours][rank * len(rows) + place]
                row.copy_(_fitting(file.tensors[theirs], row.shape, theirs, file))
    return weights


def _fitting(tensor: Tensor, shape: torch.Size, name: str, file: FairseqFile) -> Tensor:
    if tensor.shape != shape:
        raise ValueError(
            f"`{name}` of {str(file.path)!r} has shape {list(file.tensors[name].shape)}, which does not fit the options it "
            f"was saved with: of {list(tensor.shape)} taken from it, {list(shape)} are needed."
        )
    # A copy: what was read is mapped from the file.
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _require_names(file: FairseqFile, plan: _Plan, is_tied: bool):
    """Refuse a file that lacks a tensor, or holds one that would go nowhere."""
    needed = {theirs for theirs, _ in plan.shared.values()} | {name for rows in plan.experts.values() for name in rows}
    missing = sorted(needed - file.tensors.keys())
    if missing:
        raise ValueError(f"{str(file.path)!r} lacks {_list(missing)}. Restore the checkpoint from its source.")
    head = "decoder.output_projection.weight"
    left_over = sorted(file.tensors.keys() - needed - _BUFFERS - ({head} if is_tied else set()))
    if left_over:
        raise ValueError(
            f"{str(file.path)!r} holds {_list(left_over)}, which a StableMoE model of its options has not. It was made by "
            "another version of the code; what would be left out cannot be without consequence."
        )
    if is_tied and head in file.tensors and not _same(file.tensors[head], file.tensors["decoder.embed_tokens.weight"]):
        raise ValueError(
            f"{str(file.path)!r} says `share_decoder_input_output_embed`, but its `{head}` is not its "
            "`decoder.embed_tokens.weight`. Restore the checkpoint from its source."
        )


def _require_same_run(file: FairseqFile, first: FairseqFile, plan: _Plan):
    """Refuse the file of another run or another step, which would give a model that never was."""
    if file.num_updates != first.num_updates:
        raise ValueError(
            f"{first.path.name} has had {first.num_updates} updates, {file.path.name} {file.num_updates}: they were not "
            "saved together. Take the files of one checkpoint."
        )
    for theirs, _ in plan.shared.values():
        if not _same(file.tensors[theirs], first.tensors[theirs]):
            raise ValueError(
                f"`{theirs}` is shared by all ranks, but {file.path.name} has another than {first.path.name}: they are not "
                "of one run. Take the files of one checkpoint."
            )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _list(names: list[str], most: int = 5) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def fairseq_sinusoids(config: StableMoEConfig) -> Tensor:
    """Give the positions of fairseq's sinusoidal embedding, as many as a sequence has: `(positions, hidden_size)`.

    They are not those of `SinusoidalPositions`: the wavelengths run from 2 pi to 2 pi 10000 inclusive, as in
    tensor2tensor, and the first token stands at `FIRST_POSITION`.
    """
    # In float32 and in this order, for the same bits.
    half = config.hidden_size // 2
    frequency = torch.exp(torch.arange(half).float() * -(math.log(10000) / max(half - 1, 1)))
    position = torch.arange(config.max_position_embeddings).float() + FIRST_POSITION
    angle = position.unsqueeze(-1) * frequency
    sinusoids = torch.cat([angle.sin(), angle.cos()], dim=-1)
    return torch.nn.functional.pad(sinusoids, (0, config.hidden_size - 2 * half))


def _fit_rows(rows: Tensor, vocab_size: int) -> Tensor:
    return torch.nn.functional.pad(rows[:vocab_size], (0, 0, 0, max(vocab_size - rows.shape[0], 0)))


def _describe_rows(name: str, rows: int, vocab_size: int) -> str:
    if rows > vocab_size:
        return f"`{name}` has {rows} rows for a vocabulary of {vocab_size}: those past it belong to no token, and are left out."
    return (
        f"`{name}` has {rows} rows for a vocabulary of {vocab_size}: the ids from {rows} on, which the authors' code could "
        "not route, begin with zeros and so go to expert 0."
    )


def _as_convolution(kernel: Tensor, width: int) -> Tensor:
    """Write a kernel of one number a token, the newest first, as matrices of all features, the oldest first."""
    return torch.cat([weight * torch.eye(width) for weight in kernel.float().flip(0)], dim=-1)


def _is_frozen(file: FairseqFile, config: StableMoEConfig, stage: str) -> bool:
    if stage not in ("auto", "1", "2"):
        raise ValueError(f"`stage` must be auto, 1 or 2, got {stage!r}.")
    if not config.num_moe_layers or config.distilled_router is None:
        if stage == "2" and config.router_type != "hash":
            raise ValueError(f"`stage` 2: {str(file.path)!r} has no distilled router that could be frozen.")
        return False
    if stage != "auto":
        return stage == "2"
    if file.num_updates is None or not isinstance(file.options.get("two_stage_updates"), int):
        raise ValueError(
            f"{str(file.path)!r} does not tell its stage: it lacks `num_updates` or `two_stage_updates`. Say it: "
            "`stage` 1 or 2."
        )
    return file.num_updates >= file.options["two_stage_updates"]


def _describe_ties(model: StableMoEForCausalLM, file: FairseqFile) -> list[str]:
    """Tell how many tokens a float16 run may have sent elsewhere: its scores are rounded before they are compared."""
    if file.tensors["decoder.embed_tokens.weight"].dtype != torch.float16 or model.model.sees_context:
        return []
    notes = []
    for name, layer in model.moe_layers_by_name.items():
        with torch.no_grad():
            best = layer.router.distilled_router().half().topk(min(2, model.config.num_experts)).values
        ties = int((best[:, 0] == best[:, -1]).sum()) if best.shape[-1] > 1 else 0
        notes.append(
            f"{name}: in float16 two experts have the same best score for {ties:,} of {model.config.vocab_size:,} token ids; "
            "only of these may the authors' own run have taken the other."
        )
    return notes


__all__ = ["Conversion", "convert_fairseq_checkpoint", "fairseq_sinusoids"]
