# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Corpora and pairs into blocks and batches."""

from .embedded_corpus import embedded_documents
from .embedded_pairs import EMBEDDED_PAIR
from .files import STANDARD_INPUT, read_lines
from .parallel_corpus import TranslationDataArguments, load_parallel_corpus
from .text import (
    EOS_TOKEN,
    PAD_TOKEN,
    DataArguments,
    check_encoding,
    collate_blocks,
    load_corpus,
    load_tokenizer,
    pack,
    train_bpe,
    without_end,
)
from .token_batches import TokenBatchCollator, TokenBatches, sort_by_length
from .translation import encode_pairs, load_translation_tokenizer
from .translation_tokenizer import add_target_language, encode_sources, train_translation_tokenizer


__all__ = [
    "EMBEDDED_PAIR",
    "EOS_TOKEN",
    "PAD_TOKEN",
    "STANDARD_INPUT",
    "DataArguments",
    "TokenBatchCollator",
    "TokenBatches",
    "TranslationDataArguments",
    "add_target_language",
    "check_encoding",
    "collate_blocks",
    "embedded_documents",
    "encode_pairs",
    "encode_sources",
    "load_corpus",
    "load_parallel_corpus",
    "load_tokenizer",
    "load_translation_tokenizer",
    "pack",
    "read_lines",
    "sort_by_length",
    "train_bpe",
    "train_translation_tokenizer",
    "without_end",
]
