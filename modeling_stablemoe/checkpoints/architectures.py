# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The models of this package by name, and loading a checkpoint as the class it was saved from."""

from os import PathLike
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from modeling_stablemoe.model.configuration_stablemoe import (
    StableMoEBaseConfig,
    StableMoEConfig,
    StableMoESeq2SeqConfig,
)
from modeling_stablemoe.model.modeling_stablemoe import (
    StableMoEForCausalLM,
    StableMoEForSequenceClassification,
    StableMoEModel,
)
from modeling_stablemoe.model.modeling_stablemoe_seq2seq import (
    StableMoEForConditionalGeneration,
    StableMoESeq2SeqModel,
)


CONFIGS = {config.model_type: config for config in (StableMoEConfig, StableMoESeq2SeqConfig)}
MODELS: dict[str, type[PreTrainedModel]] = {
    model_class.__name__: model_class
    for model_class in (
        StableMoEModel,
        StableMoEForCausalLM,
        StableMoEForSequenceClassification,
        StableMoESeq2SeqModel,
        StableMoEForConditionalGeneration,
    )
}
# Arguments of `from_pretrained` that say where a checkpoint is.
HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "force_download", "local_files_only", "proxies")


def read_saved_class(checkpoint: str | PathLike, **hub: Any) -> tuple[type[PreTrainedModel], StableMoEBaseConfig]:
    """Return the class and the config of the model that a checkpoint (Hub name or folder) was saved from.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if it is not of this package.
    """
    config = AutoConfig.from_pretrained(checkpoint, **hub)
    if config.model_type not in CONFIGS:
        raise ValueError(
            f"{str(checkpoint)!r} is a {config.model_type!r} model, not one of this package: {', '.join(CONFIGS)}."
        )
    saved_from = (config.architectures or [None])[0]
    if saved_from not in MODELS:
        raise ValueError(
            f"`architectures` {config.architectures} of {str(checkpoint)!r} names no model of this package; it must be "
            f"one of {', '.join(MODELS)}."
        )
    return MODELS[saved_from], config


def load_saved(
    checkpoint: str | PathLike, wanted: type[PreTrainedModel] | None = None, **loading: Any
) -> PreTrainedModel:
    """Load a checkpoint with the head that it was saved with.

    An Auto class would load any checkpoint as its own class: it drops a head that it does not have, and initialises
    one that the checkpoint lacks.

    Args:
        checkpoint (`str` or `PathLike`): Hub name or folder.
        wanted (`type`, *optional*): the only class to accept. Default: any of `MODELS`.
        **loading: arguments of `from_pretrained`.

    Returns:
        `PreTrainedModel`: in evaluation mode.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if it is not of this package, not `wanted`, or has fewer or more weights than its model.
    """
    hub = {name: loading[name] for name in HUB_OPTIONS if name in loading}
    model_class, _ = read_saved_class(checkpoint, **hub)
    if wanted not in (None, model_class):
        raise ValueError(
            f"{str(checkpoint)!r} was saved from a {model_class.__name__}; what is needed is a {wanted.__name__}."
        )
    model, info = model_class.from_pretrained(checkpoint, output_loading_info=True, **loading)
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            raise ValueError(
                f"The weights of {str(checkpoint)!r} have {problem.replace('_', ' ')}: {', '.join(sorted(info[problem]))}. "
                "Restore the config.json and the weights that were saved together."
            )
    return model


__all__ = ["CONFIGS", "HUB_OPTIONS", "MODELS", "load_saved", "read_saved_class"]
