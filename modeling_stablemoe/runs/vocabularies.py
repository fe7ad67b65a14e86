# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The part of a vocabulary that a text uses, for pruning a model to it."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modeling_stablemoe.model.configuration_stablemoe import StableMoEBaseConfig

from .routed_input import TextArguments, encode_one_by_one, encode_pairs, read_documents


logger = logging.getLogger(__name__)


@dataclass
class VocabularyArguments(TextArguments):
    """The text, and which of its tokens count."""

    target_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Translation models: a file of targets for each of --text_files, one target per line."},
    )
    max_tokens: int = field(
        default=100_000_000,
        metadata={"help": "Read no more than this many tokens (pairs: of either side; at least one pair)."},
    )
    min_count: int = field(
        default=1,
        metadata={
            "help": "Leave out token ids that the text has fewer times. Special tokens and --also always count."
        },
    )
    also: str | None = field(
        default=None, metadata={"help": "Another text, all of whose tokens count, on either side."}
    )
    all_bytes: bool = field(
        default=False,
        metadata={
            "help": "Keep the 256 tokens of single bytes, too. A byte-level tokenizer can spell any word by them, if in "
            "many tokens."
        },
    )

    def __post_init__(self):
        """Check what can be checked without the checkpoint."""
        super().__post_init__()
        if self.min_count < 1:
            raise ValueError("--min_count must be >= 1")


@dataclass(frozen=True)
class TextVocabulary:
    """The token ids of a text, on one side of a model.

    Attributes:
        counts (`torch.LongTensor` of shape `(V,)`): how often each id occurs.
        ids (`torch.LongTensor`): the ids to keep, sorted.
        beginnings (`list[list[int]]`): samples: the beginnings of the first documents, or whole sentences.
    """

    counts: Tensor
    ids: Tensor
    beginnings: list[list[int]]

    def covered(self, has_expert: Tensor) -> float:
        """Return the share of the text's tokens whose ids are in a set, a `torch.BoolTensor` of shape `(V,)`."""
        return (self.counts[has_expert].sum() / self.counts.sum()).item()


def read_vocabularies(
    args: VocabularyArguments, tokenizer: PreTrainedTokenizerBase, config: StableMoEBaseConfig
) -> list[TextVocabulary]:
    """Read a text and collect the token ids that it uses.

    Returns:
        `list[TextVocabulary]`: one for a language model; those of sources and targets for an encoder-decoder.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if the text is empty, or does not fit the model.
    """
    if config.is_encoder_decoder:
        if not args.target_files:
            raise ValueError("name --target_files, too: the decoder needs the experts of the targets")
        texts = encode_pairs(args, tokenizer, config.max_position_embeddings)
    elif args.target_files or args.target_language:
        raise ValueError("--target_files and --target_language are for translation models; this is a language model")
    else:
        texts = (encode_one_by_one(read_documents(args), tokenizer, args.max_tokens),)
    always = _ids_that_always_count(args, tokenizer, config.vocab_size)
    vocabularies = [_vocabulary(text, args.min_count, always, config) for text in texts]
    missing = set(byte_ids(tokenizer)) - set.intersection(*(set(part.ids.tolist()) for part in vocabularies))
    if missing:
        logger.warning(
            "%d of the 256 tokens of single bytes are not in the text: a word that it has not may be spelled with them, and "
            "leave the vocabulary. --all_bytes keeps their experts, too.",
            len(missing),
        )
    return vocabularies


def _vocabulary(
    rows: Iterable[Sequence[int]], min_count: int, always: Tensor, config: StableMoEBaseConfig
) -> TextVocabulary:
    counts, beginnings = torch.zeros(config.vocab_size, dtype=torch.long), []
    for row in rows:
        if not row:
            continue
        if max(row) >= config.vocab_size:
            raise ValueError(
                f"the tokenizer gives the id {max(row)}, the model has {config.vocab_size}: name its own with --tokenizer_name"
            )
        counts += torch.bincount(torch.tensor(row), minlength=config.vocab_size)
        if len(beginnings) < 4:
            beginnings.append(list(row[: 4 * config.max_position_embeddings]))
    if not counts.any():
        raise ValueError("the text is empty: give some with --text, --text_files or the standard input")
    seen = (counts >= min_count).nonzero().flatten()
    return TextVocabulary(counts, torch.cat([seen, always]).unique(), beginnings)


def _ids_that_always_count(args: VocabularyArguments, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    ids = {*tokenizer.all_special_ids}
    ids |= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    if args.also:
        ids |= set(tokenizer(args.also, add_special_tokens=False, verbose=False)["input_ids"])
    if args.all_bytes:
        ids |= set(byte_ids(tokenizer))
    # A tokenizer may have more special tokens than the model has embeddings.
    return torch.tensor(sorted(token_id for token_id in ids if token_id < vocab_size), dtype=torch.long)


def byte_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the 256 tokens for single bytes; an empty list if the tokenizer has no such tokens."""
    vocabulary = tokenizer.get_vocab()
    for pieces in (ByteLevel.alphabet(), [f"<0x{byte:02X}>" for byte in range(256)]):
        ids = [vocabulary[piece] for piece in pieces if piece in vocabulary]
        if len(ids) == 256:
            return ids
    return []


__all__ = ["TextVocabulary", "VocabularyArguments", "byte_ids", "read_vocabularies"]
