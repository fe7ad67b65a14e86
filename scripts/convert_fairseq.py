#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Turn a checkpoint of the authors' fairseq code into a StableMoE checkpoint.

python scripts/convert_fairseq.py checkpoints/checkpoint_best.pt --dict data-bin/dict.txt --output_dir runs/converted
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from modeling_stablemoe.convert import Conversion, build_tokenizer, convert_fairseq_checkpoint, read_dictionary


def parse_arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoint", help="checkpoint_best.pt, whose ranks lie beside it as checkpoint_best-rank-0.pt ..."
    )
    parser.add_argument("--output_dir", help="new folder for the model and its tokenizer")
    parser.add_argument("--dict", help="the dictionary of the data, dict.txt; without it no tokenizer is written")
    parser.add_argument(
        "--bpe_tokenizer", help="Hub name or folder of the BPE whose ids or pieces the dictionary holds"
    )
    parser.add_argument(
        "--stage", choices=("auto", "1", "2"), default="auto", help="of the routing; default: as the updates say"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the weights (float32)"
    )
    parser.add_argument("--dry_run", action="store_true", help="convert, say what would be written, write nothing")
    arguments = parser.parse_args(argv)
    if arguments.output_dir is None and not arguments.dry_run:
        parser.error("--output_dir is needed, but for --dry_run")
    if arguments.bpe_tokenizer and not arguments.dict:
        parser.error("--bpe_tokenizer says what the symbols of --dict stand for")
    return arguments


def make_tokenizer(arguments: argparse.Namespace, conversion: Conversion):
    """Make the tokenizer that the arguments ask for, if any."""
    if arguments.dict is None:
        return None
    symbols, config = read_dictionary(arguments.dict), conversion.model.config
    if len(symbols) != config.vocab_size:
        raise ValueError(
            f"{arguments.dict!r} has {len(symbols)} symbols with the four special ones, the model {config.vocab_size}: it is "
            "the dictionary of other data"
        )
    bpe = AutoTokenizer.from_pretrained(arguments.bpe_tokenizer) if arguments.bpe_tokenizer else None
    return build_tokenizer(
        symbols, bpe=bpe, begins_with=config.bos_token_id, max_length=config.max_position_embeddings
    )


def describe(conversion: Conversion, tokenizer) -> str:
    """Say what was read and what it became."""
    model = conversion.model
    stage = (
        f"2, frozen; fingerprint {model.config.router_fingerprint}" if model.routing_stage == 2 else "1, not frozen"
    )
    lines = [
        f"read: {len(conversion.files)} files beginning with {conversion.files[0].name}, {conversion.num_updates} updates",
        f"parameters: {model.num_parameters():,} in {str(model.dtype).removeprefix('torch.')}",
        f"stage: {stage if model.config.num_moe_layers else 'none, a dense model'}",
        f"tokenizer: {'none (--dict was not given)' if tokenizer is None else f'{len(tokenizer)} tokens'}",
        f"config: {json.dumps(model.config.to_diff_dict(), default=str)}",
    ]
    return "\n".join(lines + [f"note: {note}" for note in conversion.notes])


def main(argv=None):
    """Run the script."""
    arguments = parse_arguments(argv)
    transformers.utils.logging.set_verbosity_error()
    try:
        folder = Path(arguments.output_dir or ".")
        if not arguments.dry_run and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{str(folder)!r} is there already and not empty; name a new folder with --output_dir")
        conversion = convert_fairseq_checkpoint(arguments.checkpoint, arguments.stage)
        conversion.model.to(getattr(torch, arguments.dtype))
        tokenizer = make_tokenizer(arguments, conversion)
        if not arguments.dry_run:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            conversion.model.save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
    print(describe(conversion, tokenizer))
    print("Nothing was written (--dry_run)." if arguments.dry_run else f"Saved to {folder}.")


if __name__ == "__main__":
    main()
