# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The checkpoint and the text that a command line names, for scripts that route a text."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_stablemoe.checkpoints.architectures import load_saved, read_saved_class
from modeling_stablemoe.checkpoints.folders import read_run
from modeling_stablemoe.data.files import READABLE, STANDARD_INPUT, find_files, open_text, read_files, read_lines
from modeling_stablemoe.data.parallel_corpus import read_paired_text
from modeling_stablemoe.data.text import check_encoding
from modeling_stablemoe.data.translation_tokenizer import encode_sources, encode_texts
from modeling_stablemoe.measure.inspection import RoutedText, route_texts

from .command_line import OptionParser, cannot_load, help_of


logger = logging.getLogger(__name__)


@dataclass
class TextArguments:
    """The text that the model reads."""

    text: str | None = field(
        default=None, metadata={"help": "The text itself. Without it and --text_files the standard input is read."}
    )
    text_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Files or folders to read. Readable are {READABLE}. For a translation model: files of any name with one source "
            "per line."
        },
    )
    target_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Translation models: a file of targets for each of --text_files, one per line. Without them the "
            "decoder's layers are left out."
        },
    )
    target_language: str | None = field(
        default=None, metadata={"help": "Language to translate into, for models that know several, such as 'de'."}
    )
    encoding: str = field(default="utf-8", metadata={"help": "Encoding of the files and of the standard input."})
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column or key that holds the document. Default: that of the model's training, or 'text'."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, for a checkpoint that was saved without one."}
    )
    max_tokens: int = field(
        default=50_000,
        metadata={"help": "Read no more than this many tokens (pairs: of either side; at least one pair)."},
    )

    def __post_init__(self):
        """Check what can be checked without the checkpoint."""
        if self.text is not None and self.text_files:
            raise ValueError("--text and --text_files exclude each other")
        if self.target_files and len(self.target_files) != len(self.text_files):
            raise ValueError("--target_files must name one file for each of --text_files")
        if self.max_tokens < 1:
            raise ValueError("--max_tokens must be >= 1")
        check_encoding(self.encoding)


def parse_checkpoint_command(
    arguments_class: type,
    doc: str,
    usage: str,
    argv: Sequence[str] | None = None,
    text_class: type[TextArguments] = TextArguments,
) -> tuple[TextArguments, Any, str]:
    """Parse the command line of a script that sends a text through a checkpoint.

    Args:
        arguments_class (`type`): the options of the script itself, for `HfArgumentParser`.
        doc (`str`): docstring of the script, for `--help`.
        usage (`str`): how it is called.
        argv (sequence of `str`, *optional*): default: the process's own arguments.
        text_class (`type[TextArguments]`): the options that name the text.

    Returns:
        `tuple`: the options of the text, those of the script, and the checkpoint. A bad command line ends the process
        with status 2.
    """
    parser = OptionParser((text_class, arguments_class), **help_of(doc))
    # Before the options, as those with several values would take it, too.
    parser.usage = usage
    parser.add_argument("model", help="Hub name or folder of a checkpoint")
    try:
        text_args, own_args, rest = parser.parse_args_into_dataclasses(args=argv)
    except ValueError as error:
        parser.error(str(error))
    text_args.text_column = text_args.text_column or read_run(rest.model).get("text_column")
    return text_args, own_args, rest.model


def load_checkpoint(name: str, tokenizer_name: str | None):
    """Load a model of any kind, with the head that it was saved with, and its tokenizer.

    Raises:
        OSError: if there is no such checkpoint, or it has no tokenizer.
        ValueError: if it is damaged or not of this package.
    """
    read_saved_class(name)  # reports a foreign checkpoint before a missing tokenizer
    tokenizer = load_tokenizer(tokenizer_name or name)
    return load_saved(name, device_map="auto"), tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer, by its own name or that of a checkpoint.

    Raises:
        ValueError: if there is none, naming the remedy.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer loads ({error}); name the one it was trained with: --tokenizer_name"
        ) from error


def read_documents(args: TextArguments) -> Iterator[str]:
    """Yield the documents of a language model."""
    if args.text_files:
        options = {"encoding": args.encoding, "separator": None, "text_column": args.text_column or "text"}
        for row in read_files({"paths": find_files(args.text_files), **options}):
            yield row["text"]
    elif args.text is None:
        with open_text(STANDARD_INPUT, args.encoding) as file:
            yield file.read()
    else:
        yield args.text


def encode_one_by_one(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Iterator[list[int]]:
    """Yield the token ids of each document, as in training: text that spells a special token is ordinary text."""
    room = max_tokens
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    for document in documents:
        if room == 0:
            logger.warning("only the first %d tokens are read; raise --max_tokens for more", max_tokens)
            break
        ids = tokenizer(document, **options)["input_ids"]
        if len(ids) > room:
            logger.warning("only the first %d tokens are read; raise --max_tokens for more", max_tokens)
            yield ids[:room]
            return
        yield ids
        room -= len(ids)


def read_blocks(args: TextArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Iterator[list[int]]:
    """Yield the documents, one after the other, cut into blocks."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    block: list[int] = []
    for ids in encode_one_by_one(read_documents(args), tokenizer, args.max_tokens):
        block += ids + ends
        while len(block) >= block_size:
            yield block[:block_size]
            block = block[block_size:]


def read_pairs(args: TextArguments) -> Iterator[tuple[str, str]]:
    """Yield pairs of source and target, "" without targets; blank sources are left out."""
    if not args.text_files:
        lines = read_lines(STANDARD_INPUT, args.encoding) if args.text is None else args.text.split("\n")
        pairs = ((line, "") for line in lines)
    else:
        sides = [args.text_files, *([args.target_files] if args.target_files else [])]
        pairs = (
            (row["source"], row.get("target", ""))
            for paths in zip(*sides, strict=True)
            for row in read_paired_text(
                {"paths": dict(zip(("source", "target"), paths, strict=False)), "encoding": args.encoding}
            )
        )
    for source, target in pairs:
        if source.strip():
            yield source, target


def encode_pairs(args: TextArguments, tokenizer, longest: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of sources and targets, cut off to the model's positions with a warning."""
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    num_tokens = [0, 0]
    for number, (source, target) in enumerate(read_pairs(args), start=1):
        pair = (encode_sources([source], [args.target_language], tokenizer)[0], encode_texts([target], tokenizer)[0])
        for side, ids in enumerate(pair):
            if len(ids) > longest:
                logger.warning("pair %d has %d tokens on a side; the first %d are read", number, len(ids), longest)
                ids[longest - 1 :] = [tokenizer.eos_token_id]
            num_tokens[side] += len(ids)
        if max(num_tokens) > args.max_tokens and sides[0]:
            logger.warning("only the first %d pairs are read; raise --max_tokens for more", number - 1)
            break
        for encoded, ids in zip(sides, pair, strict=True):
            encoded.append(ids)
    return sides


def route_through_checkpoint(
    name: str, args: TextArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[RoutedText]]:
    """Load a checkpoint (Hub name or folder) and route a text with it.

    Returns:
        `tuple`: the model, its tokenizer, and the routed texts.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if the checkpoint does not load, or does not fit the text.
    """
    try:
        model, tokenizer = load_checkpoint(name, args.tokenizer_name)
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load(name, error)) from error
    targets = None
    if model.config.is_encoder_decoder:
        documents, targets = encode_pairs(args, tokenizer, model.config.max_position_embeddings)
        if not args.target_files:
            targets = None
            if model.config.decoder_moe_layer_positions:
                logger.warning("the decoder's layers route targets and are left out: name --target_files")
    elif args.target_files or args.target_language:
        raise ValueError("--target_files and --target_language are for translation models; this is a language model")
    else:
        documents = list(encode_one_by_one(read_documents(args), tokenizer, args.max_tokens))
    if not any(documents):
        raise ValueError("the text is empty: give some with --text, --text_files or the standard input")
    return model, tokenizer, route_texts(model, documents, targets, show_progress=True)


__all__ = [
    "TextArguments",
    "encode_one_by_one",
    "encode_pairs",
    "load_checkpoint",
    "load_tokenizer",
    "parse_checkpoint_command",
    "read_blocks",
    "read_documents",
    "route_through_checkpoint",
]
