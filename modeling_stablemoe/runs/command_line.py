# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What all scripts share: help, options, logging, and user errors as one line."""

import json
import logging
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
    """Show the progress of a run, from one of its processes, and warnings of all libraries."""
    logging.basicConfig(level=logging.INFO if training_args.should_log else logging.WARNING)
    transformers_logging.set_verbosity_warning()


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


__all__ = ["help_of", "log_progress", "one_line_errors", "parse_options", "parse_overrides", "quiet_libraries"]
