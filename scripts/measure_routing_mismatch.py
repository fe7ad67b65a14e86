#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Run an MoE in two ways on the same tokens: how many of them get other experts, and how far predictions move.

Learned routing is measured as it is and frozen to tables.

python scripts/measure_routing_mismatch.py allenai/OLMoE-1B-7B-0924 --text_files corpus --json runs/mismatch.json
python scripts/measure_routing_mismatch.py runs/embedded-cpu --text_files README.md --pairs generate continuous
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_stablemoe.checkpoints import replace_file
from modeling_stablemoe.runs import (
    check_output_files,
    load_tokenizer,
    one_line_errors,
    parse_checkpoint_command,
    quiet_libraries,
)
from modeling_stablemoe.runs.routed_input import read_blocks
from modeling_stablemoe.tables import PAIRS, compare_routings, format_mismatch, mismatch_json


@dataclass
class MismatchArguments:
    """What to compare, and what to write besides the table on the standard output."""

    pairs: list[str] = field(
        default_factory=lambda: list(PAIRS), metadata={"help": f"Pairs of ways to run the model: {', '.join(PAIRS)}."}
    )
    num_sequences: int = field(default=64, metadata={"help": "Sequences of the text to run."})
    block_size: int = field(default=128, metadata={"help": "Tokens of a sequence; >= 4."})
    batch_size: int = field(default=32, metadata={"help": "Sequences of a pass, where it is not one."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16 or float16."})
    tables: str | None = field(
        default=None, metadata={"help": "Routing tables to freeze to, file or folder. Default: made of the same text."}
    )
    json: str | None = field(default=None, metadata={"help": "File to write the numbers to."})

    def __post_init__(self):
        """Check the numbers."""
        unknown = [pair for pair in self.pairs if pair not in PAIRS]
        if unknown:
            raise ValueError(f"--pairs: there is no {unknown[0]}; choose of {', '.join(PAIRS)}")
        if min(self.num_sequences, self.batch_size) < 1 or self.block_size < 4:
            raise ValueError("--num_sequences and --batch_size must be >= 1, --block_size >= 4")


def main(argv=None):
    """Run the script."""
    usage = "%(prog)s model [--option value ...]"
    text_args, args, name = parse_checkpoint_command(MismatchArguments, __doc__, usage, argv)
    quiet_libraries()
    # Where continuous batching fails, the table says why.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    with one_line_errors():
        check_output_files(json=args.json)
        if AutoConfig.from_pretrained(name).is_encoder_decoder:
            raise ValueError(f"{name} has an encoder; language models are measured here")
        tokenizer = load_tokenizer(text_args.tokenizer_name or name)
        blocks = list(islice(read_blocks(text_args, tokenizer, args.block_size), args.num_sequences))
        if not blocks:
            raise ValueError(
                f"the text is shorter than a sequence of {args.block_size} tokens: give more, or lower --block_size"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype).to(device)
        measured = compare_routings(
            model, torch.tensor(blocks), args.pairs, args.batch_size, args.tables, show_progress=True
        )
        if args.json:
            replace_file(args.json, partial(Path.write_text, data=mismatch_json(measured), encoding="utf-8"))
    print(format_mismatch(measured))


if __name__ == "__main__":
    main()
