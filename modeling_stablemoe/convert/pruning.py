# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Frozen models without the experts that a part of the vocabulary never reaches: the same logits on that part.

This takes a routing that is frozen into tables, where token ids alone decide which experts are used. `prune_experts`
makes a smaller model from one in memory, `load_pruned` from a checkpoint, of which it reads only what is kept.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from modeling_stablemoe.checkpoints.architectures import HUB_OPTIONS, MODELS, read_saved_class
from modeling_stablemoe.earlier_checkpoints import current_name
from modeling_stablemoe.model.configuration_stablemoe import StableMoEBaseConfig
from modeling_stablemoe.model.distillation_stablemoe import sees_context
from modeling_stablemoe.model.layer_stablemoe import StableMoELayer
from modeling_stablemoe.model.routing_stablemoe import ROUTERS, HashRouter, LearnedRouter
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin, check_fingerprint, fingerprint_of
from modeling_stablemoe.model.tensors_stablemoe import is_quantized, pack_ids, unpack_ids


_TABLE = "frozen_router.routing_table"
# The token ids that any text may hold, by their names in a config or generation config.
_SPECIAL_IDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


@dataclass(frozen=True)
class LayerPruning:
    """What pruning does to one MoE layer.

    Attributes:
        name (`str`): qualified name of the layer.
        side (`int`): 0 in a language model or an encoder, 1 in a decoder.
        table (`torch.LongTensor` of shape `(V, K)`): experts of each token id in the whole model.
        reached (`torch.LongTensor`): the experts of the ids that count, sorted.
        kept (`torch.LongTensor` of shape `(N',)`): the reached experts and the lowest others, up to the N' of all
            layers; sorted.
        num_experts (`int`): N, of the whole model.
    """

    name: str
    side: int
    table: Tensor
    reached: Tensor
    kept: Tensor
    num_experts: int

    @cached_property
    def has_expert(self) -> Tensor:
        """`torch.BoolTensor` of shape `(V,)`: the ids whose experts are kept, all of them."""
        return torch.isin(self.table, self.kept).all(-1)

    @cached_property
    def new_table(self) -> Tensor:
        """`torch.LongTensor` of shape `(V, K)`: the new numbers of each id's experts; v + k mod N' where one is not kept."""
        numbers = torch.zeros(self.num_experts, dtype=torch.long)
        numbers[self.kept] = torch.arange(len(self.kept))
        num_ids, num_experts_per_tok = self.table.shape
        others = (torch.arange(num_ids).unsqueeze(-1) + torch.arange(num_experts_per_tok)) % len(self.kept)
        return torch.where(self.has_expert.unsqueeze(-1), numbers[self.table], others)

    @property
    def stored_table(self) -> Tensor:
        """`torch.IntTensor`: the new table as a model holds it, `(V,)` where a token has one expert."""
        return self.new_table.int().squeeze(-1)


@dataclass(frozen=True)
class Pruning:
    """Which experts of a model are kept for a part of its vocabulary.

    Attributes:
        model_class (`type[PreTrainedModel]`): of the model.
        config (`StableMoEBaseConfig`): of the whole model.
        vocabularies (`list[torch.LongTensor]`): the ids that count, sorted: of the language model, or of encoder and decoder.
        layers (`list[LayerPruning]`): one per MoE layer, in order.
    """

    model_class: type[PreTrainedModel]
    config: StableMoEBaseConfig
    vocabularies: list[Tensor]
    layers: list[LayerPruning]

    @property
    def num_experts(self) -> int:
        """`int`: N', experts of each layer of the pruned model."""
        return len(self.layers[0].kept)

    def lost(self, side: int) -> Tensor:
        """Return a mask of the ids that lose their expert in some layer, or have lost it in an earlier pruning.

        Args:
            side (`int`): 0 for a language model or an encoder, 1 for a decoder.

        Returns:
            `torch.BoolTensor` of shape `(V,)`
        """
        lost = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        if self.config.pruned_tokens is not None:
            before = unpack_ids(self.config.pruned_tokens[side])[: len(lost)]
            lost[: len(before)] = before
        for layer in self.layers:
            if layer.side == side:
                lost |= ~layer.has_expert
        return lost

    @cached_property
    def new_config(self) -> StableMoEBaseConfig:
        """`StableMoEBaseConfig`: of the pruned model."""
        config = copy.deepcopy(self.config)
        config.num_experts = self.num_experts
        skeleton = build_skeleton(self.model_class, config).moe_layers_by_name
        config.router_fingerprint = fingerprint_of(
            skeleton[layer.name].frozen_router.encode({"routing_table": layer.stored_table}) for layer in self.layers
        )
        lost = [self.lost(side) for side in range(len(self.vocabularies))]
        config.pruned_tokens = [pack_ids(ids) for ids in lost] if any(ids.any() for ids in lost) else None
        return config

    def take(self, weights: Mapping[str, Any]) -> dict[str, Tensor]:
        """Take the weights of the pruned model from those of the whole one, and read no other rows.

        Args:
            weights (`Mapping[str, Any]`): tensors, or slices of safetensors files, by name.

        Returns:
            `dict[str, torch.Tensor]`: a state dict that shares no memory with `weights`.

        Raises:
            ValueError: if a weight of the experts is missing, or of another shape than the config says.
        """
        whole, pruned = (
            {name: values.shape for name, values in build_skeleton(self.model_class, config).state_dict().items()}
            for config in (self.config, self.new_config)
        )
        kept = {layer.name: layer.kept.tolist() for layer in self.layers}
        resized = {name for name, shape in whole.items() if shape != pruned[name]}
        wrong = [name for name in sorted(resized) if name not in weights or _shape(weights[name]) != whole[name]]
        if wrong:
            raise ValueError(
                f"The weights do not fit their config: {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} missing or of "
                "another shape. Restore the config.json and the weights that were saved together."
            )
        state = {f"{layer.name}.{_TABLE}": layer.stored_table for layer in self.layers}
        for name in sorted(weights.keys() - state.keys()):
            values, index = weights[name], ...
            if name in resized:
                dim = next(dim for dim, size in enumerate(whole[name]) if size != pruned[name][dim])
                layer = next(layer for layer in kept if name.startswith(f"{layer}."))
                index = (slice(None),) * dim + (kept[layer],)
            # Indexing by a list copies, and so does reading a file.
            shares_memory = index is ... and isinstance(values, Tensor)
            state[name] = values.detach().clone() if shares_memory else values[index].detach()
        return state


def _shape(values: Any) -> torch.Size:
    return torch.Size(values.get_shape()) if hasattr(values, "get_shape") else values.shape


def build_skeleton(model_class: type[PreTrainedModel], config: StableMoEBaseConfig) -> PreTrainedModel:
    """Build a model on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def plan_pruning(
    model_class: type[PreTrainedModel],
    config: StableMoEBaseConfig,
    tables: Mapping[str, Tensor],
    token_ids: Iterable[int] | Tensor,
    target_ids: Iterable[int] | Tensor | None = None,
    generation_config: GenerationConfig | None = None,
) -> Pruning:
    """Find the experts that a part of the vocabulary reaches.

    The special tokens that the configs name (begin, end, padding, start of a decoder) always count.

    Args:
        model_class (`type[PreTrainedModel]`): of the model.
        config (`StableMoEBaseConfig`): of the whole model, in stage 2.
        tables (`Mapping[str, torch.Tensor]`): the experts of each token id, `(V,)` or `(V, K)`, by the name of the MoE layer.
        token_ids (iterable of `int`): the ids that the pruned model reads and writes; the source ids of an
            encoder-decoder.
        target_ids (iterable of `int`, *optional*): the target ids of an encoder-decoder. Default: `token_ids`.
        generation_config (`GenerationConfig`, *optional*): of the model.

    Raises:
        ValueError: for no ids, ids outside the vocabulary, `target_ids` for a model without decoder, and for a model
            that cannot be pruned: a dense one, one of stage 1, one whose router sees context or whose gate depends on
            the scores of all experts, and one with quantised weights.
    """
    require_prunable(config)
    if target_ids is not None and not config.is_encoder_decoder:
        raise ValueError("`target_ids` are for encoder-decoders; give a language model `token_ids` alone.")
    special = _special_ids(config, generation_config)
    vocabularies = [_check_ids(token_ids, "token_ids", config.vocab_size, special)]
    if config.is_encoder_decoder:
        targets = token_ids if target_ids is None else target_ids
        vocabularies.append(_check_ids(targets, "target_ids", config.vocab_size, special))
    num_first = len(config.encoder_moe_layer_positions) if config.is_encoder_decoder else len(tables)
    sides = [int(number >= num_first) for number in range(len(tables))]
    tables = {name: table.long().cpu().view(config.vocab_size, -1) for name, table in tables.items()}
    reached = [table[vocabularies[side]].unique() for side, table in zip(sides, tables.values(), strict=True)]
    num_kept = max(len(experts) for experts in reached)
    layers = []
    for side, (name, table), experts in zip(sides, tables.items(), reached, strict=True):
        others = torch.arange(config.num_experts)
        others = others[~torch.isin(others, experts)]
        kept = torch.cat([experts, others[: num_kept - len(experts)]]).sort().values
        layers.append(LayerPruning(name, side, table, experts, kept, config.num_experts))
    return Pruning(model_class, config, vocabularies, layers)


def require_prunable(config: StableMoEBaseConfig):
    """Refuse a model whose logits depend on experts that no table shows; the ValueError names the remedy."""
    if not config.num_moe_layers:
        raise ValueError(
            "This is a dense model (its list of MoE layer positions is empty): it has no experts to prune."
        )
    if config.router_fingerprint is None:
        raise ValueError(
            "The routing is not frozen (stage 1): any token may go to any expert. Freeze it with `freeze_router()`, or "
            "balance it into a table with scripts/balance_routing.py, then prune."
        )
    if sees_context(config):
        raise ValueError(
            f"A {config.distilled_router!r} router looks back at earlier tokens, so a token id alone does not tell its "
            'expert. Only tables can be pruned by vocabulary: those of `distilled_router` "word_embedding" and "counts", '
            'and of `router_type="hash"`.'
        )
    if config.split_token_ids:
        raise ValueError(
            "Some token ids of this model are routed by the token before them, too (`split_token_ids`): a vocabulary does not tell "
            "which experts it needs. Only tables of token ids alone can be pruned."
        )
    router = ROUTERS.get(config.router_type)
    # The gate of `LearnedRouter` reads the score of the chosen expert alone.
    gates_alone = router is HashRouter or (
        router is not None
        and issubclass(router, LearnedRouter)
        and (router.gate, router.forward) == (LearnedRouter.gate, LearnedRouter.forward)
    )
    if not gates_alone:
        raise ValueError(
            f"`router_type` {config.router_type!r} weighs an expert by the scores of all of them, as a softmax does, so "
            'logits would change with every one that is left out. Prune models of "stable", "base" or "hash".'
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("The weights are quantised. Prune the checkpoint that they were made of, then quantise that.")


def _special_ids(config: StableMoEBaseConfig, generation_config: GenerationConfig | None) -> list[int]:
    named = [getattr(settings, name, None) for settings in (config, generation_config) for name in _SPECIAL_IDS]
    flat = [i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
    return [i for i in flat if 0 <= i < config.vocab_size]


def _check_ids(ids: Iterable[int] | Tensor, name: str, vocab_size: int, special: list[int]) -> Tensor:
    values = ids if isinstance(ids, Tensor) else torch.tensor(list(ids))
    if values.numel() == 0:
        raise ValueError(f"`{name}` holds no token id: name those that the pruned model is to read and write.")
    if values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold token ids, integers; got {values.dtype} (of a mask take `nonzero()`).")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"`{name}` holds the id {low if low < 0 else high}, outside the vocabulary 0..{vocab_size - 1}; use the "
            "model's own tokenizer."
        )
    return torch.cat([values.flatten().long().cpu(), torch.tensor(special, dtype=torch.long)]).unique()


def prune_experts(
    model: PreTrainedModel,
    token_ids: Iterable[int] | Tensor,
    target_ids: Iterable[int] | Tensor | None = None,
    *,
    confine_generation: bool = True,
) -> PreTrainedModel:
    """Make a model without the experts that a part of the vocabulary never reaches.

    On sequences of that part its logits are those of the whole model. Each layer keeps as many experts as the layer
    that needs most, N'. Any other id keeps its experts where they are all kept, and otherwise goes to expert `id mod N'`, of
    several to those that follow, too: a forward pass that meets such an id warns once, and generation avoids it.

    Args:
        model (`PreTrainedModel`): of this package, frozen; it is not changed. The weights that are kept are copied:
            drop the model afterwards, or save memory with `load_pruned`, which reads them from a checkpoint.
        token_ids (iterable of `int`): the ids that the pruned model reads and writes; the source ids of an
            encoder-decoder. Special tokens of the config always count.
        target_ids (iterable of `int`, *optional*): the target ids of an encoder-decoder. Default: `token_ids`.
        confine_generation (`bool`): add the ids without an expert to `generation_config.suppress_tokens`.

    Returns:
        `PreTrainedModel`: of the same class, dtype, device and mode; it trains, saves and loads as any frozen model.

    Raises:
        ValueError: for no ids, ids outside the vocabulary, `target_ids` for a model without decoder, for a model whose
            routing is not frozen into tables or whose gate depends on the scores of all experts, and for weights that
            are sharded, offloaded, quantised or adapted.
    """
    _require_plain(model)
    require_prunable(model.config)
    model.check_routing()
    tables = {name: layer.frozen_router.values() for name, layer in model.moe_layers_by_name.items()}
    generation_config = copy.deepcopy(model.generation_config) if model.can_generate() else None
    pruning = plan_pruning(type(model), model.config, tables, token_ids, target_ids, generation_config)
    state = pruning.take(model.state_dict())
    pruned = _build(pruning, state, {"dtype": model.dtype, "device_map": {"": model.device}})
    _finish(pruned, pruning, generation_config, confine_generation)
    pruned.config.name_or_path = model.config.name_or_path
    return pruned.train(model.training)


def _require_plain(model: PreTrainedModel):
    """Refuse a model whose parameters are not all here, whole and its own."""
    if type(model) not in MODELS.values():
        raise ValueError(
            f"A {type(model).__name__} cannot be pruned: give one of {', '.join(MODELS)} (adapters merged into it), loaded "
            "with this package imported."
        )
    names = set(dict(build_skeleton(type(model), model.config).named_parameters()))
    for name, parameter in model.named_parameters():
        if parameter.is_meta or hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id"):
            raise ValueError(f"`{name}` is not in this process as a whole: prune the checkpoint with `load_pruned`.")
        if is_quantized(parameter):
            raise ValueError(f"`{name}` is quantised: prune the model that it was made of, then quantise that.")
        if name not in names:
            raise ValueError(f"`{name}` is not of this model alone: merge or unload adapters first.")


def load_pruned(
    checkpoint: str | PathLike,
    token_ids: Iterable[int] | Tensor,
    target_ids: Iterable[int] | Tensor | None = None,
    *,
    confine_generation: bool = True,
    variant: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a checkpoint without the experts that a part of the vocabulary never reaches, and never read those.

    The model is the one that `prune_experts` makes, but no more memory is taken than it needs.

    Args:
        checkpoint (`str` or `PathLike`): Hub name or folder, with weights as safetensors, in one file or several.
        token_ids (iterable of `int`): the ids that the pruned model reads and writes; the source ids of an
            encoder-decoder. Special tokens of the config always count.
        target_ids (iterable of `int`, *optional*): the target ids of an encoder-decoder. Default: `token_ids`.
        confine_generation (`bool`): add the ids without an expert to `generation_config.suppress_tokens`.
        variant (`str`, *optional*): that the checkpoint was saved with; it has model.<variant>.safetensors.
        **kwargs: arguments of `from_pretrained`: `revision`, `token`, `cache_dir`, `dtype`, `device_map` and the like.

    Returns:
        `PreTrainedModel`: of the class that the checkpoint was saved from, in evaluation mode.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: for no ids, ids outside the vocabulary, `target_ids` for a model without decoder, for a model whose
            routing is not frozen into tables or whose gate depends on the scores of all experts, for a damaged
            checkpoint and for one that is not of this package.
    """
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    model_class, config, generation_config = read_configs(checkpoint, **hub)
    with open_weights(checkpoint, variant, **hub) as weights:
        tables = read_tables(model_class, config, weights)
        pruning = plan_pruning(model_class, config, tables, token_ids, target_ids, generation_config)
        state = pruning.take(weights)
    model = _build(pruning, state, kwargs)
    _finish(model, pruning, generation_config, confine_generation)
    model.config.name_or_path = str(checkpoint)
    return model


def read_configs(
    checkpoint: str | PathLike, **hub: Any
) -> tuple[type[PreTrainedModel], StableMoEBaseConfig, GenerationConfig | None]:
    """Read the model class, the config and, if there is one, the generation config of a checkpoint.

    Args:
        checkpoint (`str` or `PathLike`): Hub name or folder.
        **hub: arguments of `from_pretrained` that say where it is: `revision`, `token`, `cache_dir` and the like.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if it is not of this package.
    """
    model_class, config = read_saved_class(checkpoint, **hub)
    try:
        generation_config = GenerationConfig.from_pretrained(checkpoint, **hub)
    except OSError:
        generation_config = None
    return model_class, config, generation_config


@contextmanager
def open_weights(checkpoint: str | PathLike, variant: str | None = None, **hub: Any) -> Iterator[dict[str, Any]]:
    """Open the safetensors files of a checkpoint.

    Args:
        checkpoint (`str` or `PathLike`): Hub name or folder.
        variant (`str`, *optional*): that the checkpoint was saved with.
        **hub: arguments of `from_pretrained` that say where it is: `revision`, `token`, `cache_dir` and the like.

    Yields:
        `dict`: safetensors slices by the current name of the tensor; only the rows they are indexed with are read.

    Raises:
        ValueError: if there are no such files, or they cannot be read.
    """
    names = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    if variant is not None:
        names = [f".{variant}.".join(name.rsplit(".", 1)) for name in names]
    single, index = (
        cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **hub) for name in names
    )
    if single is None and index is None:
        raise ValueError(
            f"{str(checkpoint)!r} has no weights as safetensors ({names[0]}); save it with `save_pretrained`, and give the "
            "`variant` that it was saved with, if any."
        )
    files = [single] if single is not None else get_checkpoint_shard_files(checkpoint, index, **hub)[0]
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            yield {current_name(name): file.get_slice(name) for file in opened for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"The weights of {str(checkpoint)!r} are not a readable safetensors file: {error}. It may have been cut off "
                "while saving or downloading; fetch it again or use an earlier checkpoint."
            ) from error


def read_tables(
    model_class: type[PreTrainedModel], config: StableMoEBaseConfig, weights: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Read the frozen tables of a checkpoint, and check them against the fingerprint in its config.

    Args:
        model_class (`type[PreTrainedModel]`): that the checkpoint was saved from.
        config (`StableMoEBaseConfig`): of the checkpoint.
        weights (`Mapping[str, Any]`): slices of its safetensors files, by name.

    Returns:
        `dict[str, torch.IntTensor]`: the experts of each token id, `(V,)` or `(V, K)`, by the name of the MoE layer.

    Raises:
        ValueError: if the model cannot be pruned, or a table is missing, damaged, or not the one that was saved.
    """
    require_prunable(config)
    layers: dict[str, StableMoELayer] = build_skeleton(model_class, config).moe_layers_by_name
    names = {layer: f"{layer}.{_TABLE}" for layer in layers}
    per_token = config.num_experts_per_tok
    shape = (config.vocab_size, per_token) if per_token > 1 else (config.vocab_size,)
    wrong = [name for name in names.values() if name not in weights or _shape(weights[name]) != shape]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: missing from the weights, or not a row a token id. Restore the checkpoint."
        )
    tables = {layer: weights[name][...] for layer, name in names.items()}
    for name, table in tables.items():
        if not layers[name].frozen_router.check({"routing_table": table}, f"{name}.frozen_router"):
            raise ValueError(f"The routing table of {name} is not frozen, as the config says. Restore the checkpoint.")
    encoded = (layers[name].frozen_router.encode({"routing_table": table}) for name, table in tables.items())
    check_fingerprint(fingerprint_of(encoded), config.router_fingerprint, layers)
    return tables


def _build(pruning: Pruning, state: dict[str, Tensor], kwargs: dict[str, Any]) -> TwoStageRoutingMixin:
    # By `from_pretrained`, which checks the routing as after any loading.
    return pruning.model_class.from_pretrained(None, config=pruning.new_config, state_dict=state, **kwargs)


def _finish(
    model: PreTrainedModel, pruning: Pruning, generation_config: GenerationConfig | None, confine_generation: bool
):
    """Let the pruned model generate as the whole one does, without the ids that have lost their expert."""
    if not model.can_generate():
        return
    if generation_config is not None:
        model.generation_config = generation_config
    if confine_generation:
        # What is generated is read by the decoder, or by the language model.
        lost = pruning.lost(len(pruning.vocabularies) - 1).nonzero().flatten().tolist()
        suppressed = sorted({*(model.generation_config.suppress_tokens or []), *lost})
        model.generation_config.suppress_tokens = suppressed or None
