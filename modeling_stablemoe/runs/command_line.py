# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What all scripts share: help, options, logging, and user errors as one line."""

import json
import logging
import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging as transformers_logging


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and examples as they are written."""


def help_of(doc: str) -> dict[str, Any]:
    """Return parser arguments for a script's docstring: its first paragraph goes above the options, the rest below."""
    description, _, examples = doc.strip().partition("\n\n")
    return {
        "description": description,
        "epilog": examples,
        "formatter_class": _HelpFormatter,
        "allow_abbrev": False,
    }


def parse_options(arguments_class: type, doc: str, argv: Sequence[str] | None = None) -> Any:
    """Parse the command line of a script with one class of options.

    Raises:
        ValueError: what the class raises for an invalid value.
    """
    (arguments,) = HfArgumentParser(arguments_class, **help_of(doc)).parse_args_into_dataclasses(argv)
    return arguments


def parse_overrides(text: str | None) -> dict[str, Any]:
    """Parse `--config_overrides`, a JSON object of config fields; an empty text is an empty object.

    Raises:
        ValueError: for anything but a JSON object.
    """
    try:
        overrides = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"`--config_overrides` is not valid JSON: {error}.") from error
    if not isinstance(overrides, dict):
        raise ValueError(f"`--config_overrides` must be a JSON object, got {text}.")
    return overrides


def quiet_libraries():
    """Show warnings of this package, with the module's name, and only errors of transformers."""
    logging.basicConfig(format="%(name)s: %(message)s")
    transformers_logging.set_verbosity_error()


def log_progress(training_args: TrainingArguments):
    """Show what this package says of a run, from one of its processes, warnings of all libraries, and bars on a terminal."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("modeling_stablemoe").setLevel(logging.INFO if training_args.should_log else logging.WARNING)
    transformers_logging.set_verbosity_warning()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()


# The commands of `stablemoe`, and the scripts that they start.
COMMANDS = {
    "train": "run_clm",
    "train-translation": "run_translation",
    "generate": "generate",
    "translate": "translate",
    "inspect": "inspect_routing",
    "plot": "plot_run",
    "convert": "convert_dense",
    "freeze": "balance_routing",
    "prune": "prune_experts",
    "compare": "compare_routers",
    "push": "push_to_hub",
}


def describe_next(folder: str, *commands: str) -> str:
    """Say where the files of a finished run are, and how to go on: each command of `stablemoe` with its options."""
    lines = [f"Model, card and results are in {folder}, all logs in its trainer_state.json. Next:"]
    for command in commands:
        name, _, options = command.partition(" ")
        program = f"stablemoe {name}"
        if not sys.argv[0].startswith("stablemoe"):
            program = f"python {Path(sys.argv[0]).with_name(COMMANDS[name])}.py"
        lines.append(f"  {program} {shlex.quote(folder)} {options}".rstrip())
    return "\n".join(lines)


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the process with one line for errors that the user can fix. Default: `OSError` and `ValueError`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, kinds or (OSError, ValueError)):
            raise
        reason = " ".join(str(error).split())  # transformers explains some errors in several lines
        raise SystemExit(f"error: {reason}") from error


__all__ = [
    "COMMANDS",
    "describe_next",
    "help_of",
    "log_progress",
    "one_line_errors",
    "parse_options",
    "parse_overrides",
    "quiet_libraries",
]
