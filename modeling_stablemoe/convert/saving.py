# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Converting a checkpoint into a folder, and making sure that the result computes the same."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_stablemoe.checkpoints.atomic_files import new_folder
from modeling_stablemoe.hub.cards import CARD_FILE
from modeling_stablemoe.runs.recipes import read_preset

from .dense import routing_fields


# How far the rounding of another kernel may move a logit, in units of the last place of the largest one.
_ROUNDING_UNITS = 64


@dataclass(frozen=True)
class LogitComparison:
    """How far the logits of two models differ.

    Attributes:
        tokens (`int`): number of tokens compared.
        largest_difference (`float`): largest absolute difference of two logits; 0.0 where all are equal to the bit.
        allowed (`float`): largest difference that the rounding of other kernels explains.
    """

    tokens: int
    largest_difference: float
    allowed: float

    def __str__(self):
        if self.largest_difference == 0:
            return f"the logits of {self.tokens} tokens are the same to the bit (max difference 0)"
        return (
            f"the logits of {self.tokens} tokens are the same up to rounding (max difference "
            f"{self.largest_difference:.1e})"
        )


@torch.no_grad()
def compare_logits(
    dense: PreTrainedModel, converted: PreTrainedModel, input_ids: Tensor, **inputs: Tensor
) -> LogitComparison:
    """Compare the logits of two models in evaluation (of a backbone, the last hidden states).

    Args:
        dense (`PreTrainedModel`): in evaluation mode.
        converted (`PreTrainedModel`): in evaluation mode, of the same dtype.
        input_ids (`torch.LongTensor` of shape `(batch, sequence)`): what both read.
        **inputs (`torch.Tensor`): other inputs of both, such as `decoder_input_ids`.

    Raises:
        ValueError: if they differ by more than rounding.
    """
    inputs["input_ids"] = input_ids
    expected, actual = (
        model(**{name: ids.to(model.device) for name, ids in inputs.items()})[0].float()
        for model in (dense, converted)
    )
    difference = (expected - actual).abs().max().item()
    allowed = _ROUNDING_UNITS * torch.finfo(dense.dtype).eps * expected.abs().max().item()
    if not difference <= allowed:  # NaN, too
        raise ValueError(
            f"The converted model computes something else: logits differ by {difference:.3g}, rounding explains "
            f"{allowed:.1g}. Nothing is saved."
        )
    return LogitComparison(input_ids.numel(), difference, allowed)


def ids_to_compare(
    config, tokenizer: PreTrainedTokenizerBase | None, text: str | None, num_tokens: int = 128
) -> Tensor:
    """Make the ids that two models are compared on: those of a text, or random ones.

    Args:
        config (`PreTrainedConfig`): of the model: vocabulary and longest sequence.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for a text.
        text (`str`, *optional*): cut to the longest sequence. Default: random ids, the same on each call.
        num_tokens (`int`): number of random ids.

    Returns:
        `torch.LongTensor` of shape `(1, sequence)`.

    Raises:
        ValueError: for a text without tokenizer or without tokens.
    """
    longest = config.max_position_embeddings
    if text is None:
        length = min(num_tokens, longest)
        return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    if tokenizer is None:
        raise ValueError("A text needs a tokenizer; leave `--text` out to compare on random ids.")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:longest]
    if not ids:
        raise ValueError("The text to compare on is empty.")
    return torch.tensor([ids])


def routing_of_preset(path: str | Path) -> dict:
    """Read the fields of a model preset that concern experts, routing and stage 1, and leave out its shape.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a preset of a language model.
    """
    config_class, values = read_preset(path)
    if config_class.model_type != "stablemoe":
        raise ValueError(
            f"The preset {str(path)!r} is of a {config_class.model_type!r} model, not of a language model."
        )
    return {name: value for name, value in values.items() if name in routing_fields()}


def save_converted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    card: ModelCard | None = None,
):
    """Save a model with its code files, a tokenizer and a card, all or nothing.

    Args:
        model (`PreTrainedModel`): the converted model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer.
        folder (`str` or `Path`): new, or empty.
        card (`ModelCard`, *optional*): its card.

    Raises:
        OSError: if the folder cannot be written.
        ValueError: if the folder is not empty.
    """
    with new_folder(folder) as partial:
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
        if card is not None:
            card.save(partial / CARD_FILE)
