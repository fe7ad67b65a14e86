#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Show what each expert of a checkpoint holds: its most frequent tokens, load, and agreement with the backbone router.

python scripts/inspect_routing.py runs/embedded-cpu --text_files README.md --html runs/experts.html
python scripts/inspect_routing.py runs/multi30k --text_files test.de --target_files test.en --json runs/experts.json
"""

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
)

from modeling_stablemoe.atomic_files import replace_file
from modeling_stablemoe.inspection import format_report, inspect_routing, route_texts
from modeling_stablemoe.inspection_page import build_page
from modeling_stablemoe.local_files import READABLE, find_files, read_files, read_paired_text
from modeling_stablemoe.recipes import CONFIGS
from modeling_stablemoe.translation_tokenizer import encode_sources, encode_texts


logger = logging.getLogger("inspect_routing")


@dataclass
class TextArguments:
    """What the model reads."""

    text: str | None = field(
        default=None, metadata={"help": "The text itself. Without it and --text_files the standard input is read."}
    )
    text_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Files or folders to read: {READABLE}. For a translation model: files of any name with a source a "
            "line."
        },
    )
    target_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Translation models: a file of targets for each of --text_files, a target a line. Without them the "
            "decoder's layers are left out."
        },
    )
    target_language: str | None = field(
        default=None, metadata={"help": "Language to translate into, for models that know several, such as 'de'."}
    )
    encoding: str = field(default="utf-8", metadata={"help": "Encoding of the files."})
    text_column: str = field(default="text", metadata={"help": "Key that holds the document in JSON lines."})
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


@dataclass
class OutputArguments:
    """What comes out, besides the tables on the standard output."""

    top_k: int = field(default=20, metadata={"help": "Tokens to list of each expert."})
    json: str | None = field(default=None, metadata={"help": "File to write the numbers to."})
    html: str | None = field(
        default=None, metadata={"help": "File to write a page to, to read the text in with a colour for each expert."}
    )

    def __post_init__(self):
        """Check the number."""
        if self.top_k < 1:
            raise ValueError("--top_k must be >= 1")

    def check_folders(self):
        """Find out before the work whether its results can be kept.

        Raises:
            FileNotFoundError: if a file is to go where there is no folder.
        """
        for option, file in (("--json", self.json), ("--html", self.html)):
            if file and not Path(file).absolute().parent.is_dir():
                raise FileNotFoundError(f"{option}: there is no folder {Path(file).parent}; create it first")


def parse_arguments(argv=None) -> tuple[TextArguments, OutputArguments, str]:
    """Parse the command line: text, output, and the checkpoint."""
    parser = HfArgumentParser(
        (TextArguments, OutputArguments), description=__doc__.splitlines()[0], allow_abbrev=False
    )
    # Before the options: those that take several values would take it, too.
    parser.usage = "%(prog)s model [--option value ...]"
    parser.add_argument("model", help="Hub name or folder of a checkpoint")
    try:
        text_args, output_args, rest = parser.parse_args_into_dataclasses(args=argv)
    except ValueError as error:
        parser.error(str(error))
    return text_args, output_args, rest.model


def load(name: str, tokenizer_name: str | None):
    """Load model and tokenizer.

    Raises:
        OSError: if there is no such checkpoint, or it has no tokenizer.
        ValueError: if it is damaged or not of this package.
    """
    config = AutoConfig.from_pretrained(name)
    if config.model_type not in CONFIGS:
        raise ValueError(f"it is a {config.model_type!r} model; only those of {', '.join(CONFIGS)} have such experts")
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer loads ({error}); name the one it was trained with: --tokenizer_name"
        ) from error
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_pretrained(name, device_map="auto"), tokenizer


def read_documents(args: TextArguments) -> Iterator[str]:
    """Yield the documents of a language model."""
    if args.text_files:
        options = {"encoding": args.encoding, "separator": None, "text_column": args.text_column}
        for row in read_files({"paths": find_files(args.text_files), **options}):
            yield row["text"]
    else:
        yield sys.stdin.read() if args.text is None else args.text


def encode_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[list[int]]:
    """Turn documents into token ids, as training does: text that spells a special token is ordinary text."""
    encoded, room = [], max_tokens
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    for document in documents:
        if room == 0:
            logger.warning("only the first %d tokens are read; raise --max_tokens for more", max_tokens)
            break
        ids = tokenizer(document, **options)["input_ids"]
        if len(ids) > room:
            logger.warning("only the first %d tokens are read; raise --max_tokens for more", max_tokens)
            return [*encoded, ids[:room]]
        encoded.append(ids)
        room -= len(ids)
    return encoded


def read_pairs(args: TextArguments) -> Iterator[tuple[str, str]]:
    """Yield sources and targets of a translation model, "" where there are no targets; blank sources are left out."""
    if not args.text_files:
        lines = sys.stdin if args.text is None else args.text.splitlines()
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
            yield source.rstrip("\r\n"), target.rstrip("\r\n")


def encode_pairs(args: TextArguments, tokenizer, longest: int) -> tuple[list[list[int]], list[list[int]]]:
    """Turn pairs into token ids; what is longer than the model's positions is cut off, with a warning."""
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


def inspect_checkpoint(text_args: TextArguments, output_args: OutputArguments, name: str):
    """Read, route and measure: `(report, texts, tokenizer)`."""
    try:
        model, tokenizer = load(name, text_args.tokenizer_name)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {name!r}: {error}") from error
    targets = None
    if model.config.is_encoder_decoder:
        documents, targets = encode_pairs(text_args, tokenizer, model.config.max_position_embeddings)
        if not text_args.target_files:
            targets = None
            if model.config.decoder_moe_layer_positions:
                logger.warning("the decoder's layers route targets and are left out: name --target_files")
    elif text_args.target_files or text_args.target_language:
        raise ValueError("--target_files and --target_language are for translation models; this is a language model")
    else:
        documents = encode_documents(read_documents(text_args), tokenizer, text_args.max_tokens)
    if not any(documents):
        raise ValueError("the text is empty: give some with --text, --text_files or the standard input")
    texts = route_texts(model, documents, targets, show_progress=True)
    # Without the folders above it, which are nobody else's business.
    report = inspect_routing(model, tokenizer, texts, Path(os.path.abspath(name)).name, output_args.top_k)
    return report, texts, tokenizer


def main(argv=None):
    """Run the script."""
    text_args, output_args, name = parse_arguments(argv)
    logging.basicConfig(format="%(name)s: %(message)s")
    transformers.utils.logging.set_verbosity_error()
    try:
        output_args.check_folders()
        report, texts, tokenizer = inspect_checkpoint(text_args, output_args, name)
        contents = {}
        if output_args.json:
            contents[output_args.json] = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        if output_args.html:
            contents[output_args.html] = build_page(report, texts, tokenizer)
        for file, content in contents.items():
            replace_file(file, partial(Path.write_text, data=content, encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())  # transformers tells it in several lines
        raise SystemExit(f"error: {reason}") from error
    print(format_report(report))


if __name__ == "__main__":
    main()
