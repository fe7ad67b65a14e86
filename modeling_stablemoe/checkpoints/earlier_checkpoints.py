# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""How `from_pretrained` reads what earlier checkpoints call by other names."""

import copy

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from modeling_stablemoe.model.configuration_stablemoe import StableMoEConfig, StableMoESeq2SeqConfig


class RenamedSince(WeightRenaming):
    """A renaming that is not taken back when a model is saved: what is written has the names of now."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        """Return what renames earlier names in either direction; see `WeightTransform.reverse_transform`."""
        return copy.deepcopy(self)


def register_earlier_names():
    """Tell transformers what the norms of experts were called: `norm_weight`, which its Trainer takes for a matrix."""
    for config_class in (StableMoEConfig, StableMoESeq2SeqConfig):
        register_checkpoint_conversion_mapping(
            config_class.model_type,
            [
                RenamedSince(rf"sublayers\.(\d+)\.norm_{name}$", rf"sublayers.\1.layernorm_{name}")
                for name in ("weight", "bias")
            ],
            overwrite=True,
        )


__all__ = ["register_earlier_names"]
