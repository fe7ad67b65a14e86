# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Names of tensors in earlier checkpoints, and in those of programs that name each expert, which `from_pretrained` reads."""

import copy
import re
from functools import cache

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from modeling_stablemoe.model.configuration_stablemoe import StableMoEConfig, StableMoESeq2SeqConfig


# The current names tell Trainer that these are norms; by the earlier ones it took them for matrices and decayed them.
_RENAMED = {rf"sublayers\.(\d+)\.norm_{name}$": rf"sublayers.\1.layernorm_{name}" for name in ("weight", "bias")}


class RenamedSince(WeightRenaming):
    """A renaming that is not reversed when a model is saved, so that checkpoints have the current names."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        """Return a copy: loading and saving both give the current names."""
        return copy.deepcopy(self)


class MergedOnLoad(WeightConverter):
    """A stack of what a checkpoint has for each expert; saved, it stays a stack."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        """Return a renaming that changes no current name."""
        return RenamedSince(*next(iter(_RENAMED.items())))


@cache
def register_earlier_names():
    """Register the earlier names of tensors, and those of single gated experts, with transformers, which takes a while once."""
    # llm-compressor and others write `experts.0.gate_proj.weight`, as checkpoints of most MoE models have it.
    merged = [
        MergedOnLoad(
            ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
            "experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        MergedOnLoad("experts.*.down_proj.weight", "experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]
    for config_class in (StableMoEConfig, StableMoESeq2SeqConfig):
        register_checkpoint_conversion_mapping(
            config_class.model_type, [*(RenamedSince(*names) for names in _RENAMED.items()), *merged], overwrite=True
        )


def current_name(key: str) -> str:
    """Return the current name of a tensor of an earlier checkpoint."""
    for earlier, current in _RENAMED.items():
        key = re.sub(earlier, current, key)
    return key


__all__ = ["current_name", "register_earlier_names"]
