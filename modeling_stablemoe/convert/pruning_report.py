# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What pruning keeps of a model, in numbers: experts reached, parameters and bytes, and whether it pays."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_stablemoe.measure.report import format_table
from modeling_stablemoe.model.configuration_stablemoe import StableMoEBaseConfig
from modeling_stablemoe.runs.vocabularies import TextVocabulary

from .pruning import LayerPruning, Pruning, build_skeleton
from .saving import LogitComparison, compare_logits


# Numbers of experts for which the reach into a random table is shown.
_NUMBERS_OF_EXPERTS = (8, 32, 128, 512)


def expected_reach(num_ids: int, num_experts: int) -> float:
    """Return how many of N experts n token ids reach on average where the table is random: N (1 - (1 - 1/N)^n)."""
    return num_experts * (1 - (1 - 1 / num_experts) ** num_ids)


def format_pruning(pruning: Pruning, vocabularies: Sequence[TextVocabulary]) -> str:
    """Format what is kept of each MoE layer as a Markdown table, and below it what is kept of the whole model.

    Args:
        pruning (`Pruning`): for the ids of the vocabularies.
        vocabularies (sequence of `TextVocabulary`): of the language model, or of sources and targets.
    """
    whole, pruned = (build_skeleton(pruning.model_class, config) for config in (pruning.config, pruning.new_config))
    rows = [
        _row(layer, pruning, vocabularies[layer.side], whole.moe_layers_by_name, pruned.moe_layers_by_name)
        for layer in pruning.layers
    ]
    headings = {
        "name": "MoE layer",
        "ids": "token ids needed",
        "reached": "experts reached",
        "kept": "kept",
        "own": "ids with their expert",
        "covered": "tokens covered",
        "parameters": "parameters",
        "bytes": "MB",
    }
    before, after = (_size(model, pruning.config) for model in (whole, pruned))
    share = pruning.num_experts / pruning.config.num_experts
    return (
        f"{format_table(rows, headings)}\n\n"
        f"{pruning.num_experts} of {pruning.config.num_experts} experts of each layer are kept, {share:.0%}: "
        f"{before[0]:,} parameters -> {after[0]:,}, {before[1] / 1e6:,.1f} MB -> {after[1] / 1e6:,.1f} MB."
    )


def _row(
    layer: LayerPruning, pruning: Pruning, vocabulary: TextVocabulary, whole: dict, pruned: dict
) -> dict[str, str | int]:
    before, after = (_size(layers[layer.name], pruning.config) for layers in (whole, pruned))
    return {
        "name": layer.name,
        "ids": f"{len(pruning.vocabularies[layer.side]):,} of {len(layer.table):,}",
        "reached": f"{len(layer.reached)} of {layer.num_experts}",
        "kept": len(layer.kept),
        "own": f"{int(layer.has_expert.sum()):,}",
        "covered": f"{vocabulary.covered(layer.has_expert):.2%}",
        "parameters": f"{before[0]:,} -> {after[0]:,}",
        "bytes": f"{before[1] / 1e6:.1f} -> {after[1] / 1e6:.1f}",
    }


def _size(module: nn.Module, config: StableMoEBaseConfig) -> tuple[int, int]:
    """Count parameters and their bytes in the dtype of the checkpoint."""
    dtype = config.dtype or torch.float32
    parameters = list(module.parameters())
    sizes = [p.numel() * (dtype if p.is_floating_point() else p.dtype).itemsize for p in parameters]
    return sum(p.numel() for p in parameters), sum(sizes)


def format_random_tables(pruning: Pruning) -> str:
    """Format how many experts as many ids would reach in random tables, for some numbers of experts, in Markdown."""
    sizes = {f"ids{side}": len(ids) for side, ids in enumerate(pruning.vocabularies)}
    numbers = sorted({*_NUMBERS_OF_EXPERTS, pruning.config.num_experts})
    rows = [
        {"experts": number}
        | {
            name: f"{expected_reach(size, number):.1f} ({expected_reach(size, number) / number:.0%})"
            for name, size in sizes.items()
        }
        for number in numbers
    ]
    headings = {"experts": "experts of a random table"}
    return format_table(rows, headings | {name: f"reached by {size:,} ids" for name, size in sizes.items()})


def compare_on_text(
    whole: PreTrainedModel, pruned: PreTrainedModel, pruning: Pruning, vocabularies: Sequence[TextVocabulary]
) -> LogitComparison:
    """Compare the logits of a pruned model with those of the whole one, on the tokens of texts that it was pruned for.

    Args:
        whole (`PreTrainedModel`): in evaluation mode.
        pruned (`PreTrainedModel`): in evaluation mode, of the same dtype.
        pruning (`Pruning`): that the pruned model was made by.
        vocabularies (sequence of `TextVocabulary`): of the texts; their beginnings are compared.

    Returns:
        `LogitComparison`: over all sequences.

    Raises:
        ValueError: if logits differ by more than rounding.
    """
    longest = pruning.config.max_position_embeddings
    sides = []
    for vocabulary, ids in zip(vocabularies, pruning.vocabularies, strict=True):
        rows = map(torch.tensor, vocabulary.beginnings)
        sides.append([row[torch.isin(row, ids)][:longest] for row in rows])
    names = ("input_ids", "decoder_input_ids")
    pairs = [row for row in zip(*sides, strict=True) if all(len(ids) for ids in row)]
    parts = [
        compare_logits(whole, pruned, **{name: ids.unsqueeze(0) for name, ids in zip(names, pair, strict=False)})
        for pair in pairs
    ]
    return LogitComparison(
        sum(part.tokens for part in parts),
        max((part.largest_difference for part in parts), default=0.0),
        max((part.allowed for part in parts), default=0.0),
    )
