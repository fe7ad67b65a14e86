#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Translate files or the standard input, line by line, with a StableMoE translation model.

python scripts/translate.py runs/multi30k --input german.txt --output english.txt
echo "Ein Hund läuft." | python scripts/translate.py runs/multi30k
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_stablemoe import StableMoEForConditionalGeneration
from modeling_stablemoe.checkpoints import load_saved, replace_file
from modeling_stablemoe.data import STANDARD_INPUT, check_encoding, encode_sources, read_lines
from modeling_stablemoe.runs import OptionParser, cannot_load, help_of, one_line_errors


logger = logging.getLogger("translate")

# Lines are sorted by length within this many batches, to keep padding short.
BATCHES_PER_CHUNK = 16


def parse_arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OptionParser(**help_of(__doc__))
    parser.add_argument("model", help="Hub name or folder of a checkpoint")
    parser.add_argument(
        "--input", nargs="+", metavar="FILE", help="text, also compressed, a sentence per line (default: stdin)"
    )
    parser.add_argument("--encoding", default="utf-8", help="encoding of the input")
    parser.add_argument(
        "--output", metavar="FILE", help="where translations go, UTF-8, one per line (default: stdout)"
    )
    parser.add_argument(
        "--target_language", help="language to translate into, for models that know several, such as 'de'"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="sentences translated at once")
    parser.add_argument("--num_beams", type=int, help="width of the beam search (default: the checkpoint's)")
    parser.add_argument("--max_length", type=int, help="most tokens of a translation (default: the checkpoint's)")
    arguments = parser.parse_args(argv)
    for name in ("batch_size", "num_beams", "max_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be >= 1")
    try:
        check_encoding(arguments.encoding)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer, or end the script with a line that gives the reason."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return load_saved(name, StableMoEForConditionalGeneration, device_map="auto"), tokenizer
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {cannot_load(name, error)}") from error


def encode(lines: dict[int, str], model, tokenizer, target_language: str | None) -> list[list[int]]:
    """Return the token ids of numbered lines, cut off to the model's positions with a warning."""
    longest = model.config.max_position_embeddings
    encoded = encode_sources(list(lines.values()), [target_language] * len(lines), tokenizer)
    for number, ids in zip(lines, encoded, strict=True):
        if len(ids) > longest:
            logger.warning("line %d has %d tokens; only the first %d are translated", number, len(ids), longest)
            ids[longest - 1 :] = [tokenizer.eos_token_id]
    return encoded


@torch.inference_mode()
def translate(encoded: list[list[int]], model, tokenizer, batch_size: int, **generation) -> list[str]:
    """Translate sentences, those of similar length together; a blank line stays blank."""
    translations = [""] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        texts = tokenizer.batch_decode(model.generate(**inputs, **generation), skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            translations[row] = " ".join(text.split())
    return translations


def translate_lines(lines: Iterable[str], arguments: argparse.Namespace, model, tokenizer) -> Iterator[str]:
    """Yield the translation of each line, in order, some batches at a time (line by line at a terminal)."""
    at_terminal = not arguments.input and sys.stdin.isatty()
    size = 1 if at_terminal else arguments.batch_size * BATCHES_PER_CHUNK
    generation = {"num_beams": arguments.num_beams, "max_length": arguments.max_length}
    generation = {name: value for name, value in generation.items() if value is not None}
    lines, number = iter(lines), 1
    with tqdm(unit=" lines", disable=at_terminal) as progress:
        while chunk := list(islice(lines, size)):
            full = {row: line for row, line in enumerate(chunk, start=number) if line.strip()}
            encoded = encode(full, model, tokenizer, arguments.target_language)
            done = iter(translate(encoded, model, tokenizer, arguments.batch_size, **generation))
            yield from (next(done) if line.strip() else "" for line in chunk)
            number += len(chunk)
            progress.update(len(chunk))


def main(argv=None):
    """Run the script."""
    arguments = parse_arguments(argv)
    logging.basicConfig(format="warning: %(message)s")
    model, tokenizer = load(arguments.model)
    if (arguments.max_length or 0) > model.config.max_position_embeddings:
        raise SystemExit(f"error: --max_length exceeds the model's {model.config.max_position_embeddings} positions")
    paths = arguments.input or [STANDARD_INPUT]
    lines = chain.from_iterable(read_lines(path, arguments.encoding) for path in paths)
    translations = translate_lines(lines, arguments, model, tokenizer)

    def write(path):
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in translations)

    with one_line_errors():
        if arguments.output:
            replace_file(arguments.output, write)
        else:
            for line in translations:
                print(line, flush=True)


if __name__ == "__main__":
    main()
