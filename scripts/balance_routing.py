#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Balance the routing of a checkpoint by a text, keep as much of it as that allows, and save it frozen.

python scripts/balance_routing.py runs/embedded-cpu --text_files README.md --output_dir runs/balanced
python scripts/balance_routing.py runs/multi30k --text_files train.de --target_files train.en --output_dir runs/balanced
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import transformers

from modeling_stablemoe.convert import format_balances, rebalance
from modeling_stablemoe.runs import parse_checkpoint_command, route_through_checkpoint


@dataclass
class BalanceArguments:
    """How to balance, and where the result goes."""

    output_dir: str = field(metadata={"help": "New folder for the balanced checkpoint and its tokenizer."})
    max_load: float = field(
        default=1.05, metadata={"help": "Tokens of the text allowed on one expert, in mean loads; >= 1."}
    )
    frequency_bands: int = field(
        default=8,
        metadata={
            "help": "Cut the token ids into so many bands from frequent to rare, and spread each evenly; 1: balance the "
            "whole load only, which keeps more tokens where they were."
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
    description, usage = __doc__.splitlines()[0], "%(prog)s model --output_dir folder [--option value ...]"
    text_args, balance_args, name = parse_checkpoint_command(BalanceArguments, description, usage, argv)
    logging.basicConfig(format="%(name)s: %(message)s")
    transformers.utils.logging.set_verbosity_error()
    folder = Path(balance_args.output_dir)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{str(folder)!r} is there already and not empty; name a new folder with --output_dir")
        model, tokenizer, texts = route_through_checkpoint(name, text_args)
        balances = rebalance(model, texts, balance_args.max_load, balance_args.frequency_bands)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())  # transformers tells it in several lines
        raise SystemExit(f"error: {reason}") from error
    print(format_balances(balances))
    print(f"\nSaved to {folder}, frozen; fingerprint {model.config.router_fingerprint}.")


if __name__ == "__main__":
    main()
