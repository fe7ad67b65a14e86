# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Runs of the scripts: recipes, folders, and what goes into a routed text."""

from .card_arguments import CardArguments
from .command_line import (
    COMMANDS,
    OptionParser,
    cannot_load,
    check_output_files,
    describe_next,
    help_of,
    log_progress,
    one_line_errors,
    parse_options,
    parse_overrides,
    quiet_libraries,
    shipped,
)
from .directions import warn_of_wrong_direction
from .recipes import ModelArguments, RoutingArguments, check_fit, load_preset, parse_recipe, read_preset
from .routed_input import load_tokenizer, parse_checkpoint_command, route_through_checkpoint
from .run import (
    FolderArguments,
    RunFolder,
    build_callbacks,
    build_model,
    check_model,
    evaluate_saved_model,
    push,
    set_hash_tables,
    summarize_run,
    train,
    write_results,
)
from .vocabularies import TextVocabulary, VocabularyArguments, read_vocabularies


__all__ = [
    "COMMANDS",
    "CardArguments",
    "FolderArguments",
    "ModelArguments",
    "OptionParser",
    "RoutingArguments",
    "RunFolder",
    "TextVocabulary",
    "VocabularyArguments",
    "build_callbacks",
    "build_model",
    "cannot_load",
    "check_fit",
    "check_model",
    "check_output_files",
    "describe_next",
    "evaluate_saved_model",
    "help_of",
    "load_preset",
    "load_tokenizer",
    "log_progress",
    "one_line_errors",
    "parse_checkpoint_command",
    "parse_options",
    "parse_overrides",
    "parse_recipe",
    "push",
    "quiet_libraries",
    "read_preset",
    "read_vocabularies",
    "route_through_checkpoint",
    "set_hash_tables",
    "shipped",
    "summarize_run",
    "train",
    "warn_of_wrong_direction",
    "write_results",
]
