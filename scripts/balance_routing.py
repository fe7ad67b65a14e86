#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Balance the routing of a checkpoint by a text, keep as much of it as that allows, and save it frozen.

python scripts/balance_routing.py runs/embedded-cpu --text_files README.md --output_dir runs/balanced
python scripts/balance_routing.py runs/multi30k --text_files train.de --target_files train.en --output_dir runs/balanced
"""

from dataclasses import dataclass, field
from pathlib import Path

from modeling_stablemoe.checkpoints import require_new_folder
from modeling_stablemoe.convert import format_balances, rebalance
from modeling_stablemoe.runs import (
    one_line_errors,
    parse_checkpoint_command,
    quiet_libraries,
    route_through_checkpoint,
)


@dataclass
class BalanceArguments:
    """How to balance, and where to save the result."""

    output_dir: str = field(metadata={"help": "New folder for the balanced checkpoint and its tokenizer."})
    max_load: float = field(
        default=1.05, metadata={"help": "Tokens of the text allowed on one expert, in mean loads; >= 1."}
    )
    frequency_bands: int = field(
        default=8,
        metadata={
            "help": "Bands of token ids, from frequent to rare, each of which is spread evenly. With 1, balance the whole "
            "load only, which keeps more tokens where they were."
        },
    )

    def __post_init__(self):
        """Check what can be checked without the checkpoint."""
        if not 1 <= self.max_load < float("inf"):
            raise ValueError("--max_load must be a number >= 1")
        if self.frequency_bands < 1:
            raise ValueError("--frequency_bands must be >= 1")


def main(argv=None):
    """Run the script."""
    usage = "%(prog)s model --output_dir folder [--option value ...]"
    text_args, balance_args, name = parse_checkpoint_command(BalanceArguments, __doc__, usage, argv)
    quiet_libraries()
    folder = Path(balance_args.output_dir)
    with one_line_errors():
        require_new_folder(folder)
        model, tokenizer, texts = route_through_checkpoint(name, text_args)
        balances = rebalance(model, texts, balance_args.max_load, balance_args.frequency_bands)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    print(format_balances(balances))
    print(f"\nSaved to {folder}, frozen; fingerprint {model.config.router_fingerprint}.")


if __name__ == "__main__":
    main()
