#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Tell how much of the routing of any MoE is a function of the token, and what freezing it to tables does to perplexity.

python scripts/freeze_moe.py allenai/OLMoE-1B-7B-0924 --text_files corpus --work_dir runs/frozen-olmoe
python scripts/freeze_moe.py runs/qwen3-moe --text_files README.md docs --json runs/frozen.json --figure runs/frozen.png
"""

import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from modeling_stablemoe.checkpoints import replace_file
from modeling_stablemoe.measure.figures import require_matplotlib, save_figure
from modeling_stablemoe.runs import (
    check_output_files,
    load_tokenizer,
    one_line_errors,
    parse_checkpoint_command,
    quiet_libraries,
)
from modeling_stablemoe.runs.routed_input import read_blocks
from modeling_stablemoe.tables import (
    format_freezing,
    freezing_card,
    freezing_json,
    install_tables,
    measure_freezing,
    plot_freezing,
    save_tables,
)


@dataclass
class FreezeArguments:
    """What to measure, and what to write besides the table on the standard output."""

    max_load: float | None = field(
        default=None, metadata={"help": "Tokens allowed on one expert, in mean loads. Default: any number."}
    )
    block_size: int = field(default=512, metadata={"help": "Tokens of a sequence."})
    batch_size: int = field(default=8, metadata={"help": "Sequences of a pass."})
    held_out: float = field(default=0.2, metadata={"help": "Share of the sequences that perplexity is measured on."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16 or float16."})
    work_dir: str | None = field(
        default=None, metadata={"help": "Folder for what is measured on the way: the same command goes on from there."}
    )
    tables_dir: str | None = field(default=None, metadata={"help": "Folder to write the tables of all layers to."})
    json: str | None = field(default=None, metadata={"help": "File to write the numbers to."})
    figure: str | None = field(default=None, metadata={"help": "File to draw to: .png, .svg or .pdf."})
    card: str | None = field(default=None, metadata={"help": "File to write a section for the model card to."})

    def __post_init__(self):
        """Check the numbers."""
        if self.block_size < 2 or self.batch_size < 1:
            raise ValueError("--block_size must be >= 2, --batch_size >= 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held_out must lie between 0 and 1, got {self.held_out}")

    def check_files(self):
        """Check before the work that its results can be written.

        Raises:
            FileNotFoundError: if a file is to go where there is no folder.
            ValueError: for a figure without matplotlib.
        """
        check_output_files(json=self.json, figure=self.figure, card=self.card)
        if self.figure:
            require_matplotlib()
        for folder in (self.work_dir, self.tables_dir):
            if folder:
                Path(folder).mkdir(parents=True, exist_ok=True)


def split_batches(blocks: list[list[int]], args: FreezeArguments) -> tuple[list[dict[str, Tensor]], ...]:
    """Draw the held-out blocks; return the batches of the others, and theirs."""
    random.Random(0).shuffle(blocks)
    num_held_out = round(args.held_out * len(blocks))
    if not 0 < num_held_out < len(blocks):
        raise ValueError(
            f"the text is {len(blocks)} blocks of {args.block_size} tokens: too short; give more, or lower --block_size"
        )
    return tuple(
        [{"input_ids": torch.tensor(part[i : i + args.batch_size])} for i in range(0, len(part), args.batch_size)]
        for part in (blocks[num_held_out:], blocks[:num_held_out])
    )


def main(argv=None):
    """Run the script."""
    usage = "%(prog)s model [--option value ...]"
    text_args, args, name = parse_checkpoint_command(FreezeArguments, __doc__, usage, argv)
    quiet_libraries()
    with one_line_errors():
        args.check_files()
        tokenizer = load_tokenizer(text_args.tokenizer_name or name)
        counted, held_out = split_batches(list(read_blocks(text_args, tokenizer, args.block_size)), args)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype).to(device)
        report, made = measure_freezing(model, counted, held_out, args.max_load, args.work_dir, show_progress=True)
        if args.tables_dir:
            install_tables(model, made.tables, [row.layer for row in report.layers])
            save_tables(model, args.tables_dir)
        contents = {args.json: freezing_json(report), args.card: freezing_card(report)}
        for file in contents.keys() - {None}:
            replace_file(file, partial(Path.write_text, data=contents[file], encoding="utf-8"))
        if args.figure:
            save_figure(plot_freezing(report), args.figure)
    print(format_freezing(report))


if __name__ == "__main__":
    main()
