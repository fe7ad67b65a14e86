# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What all scripts share: help, options, logging, and user errors as one line."""

import json
import logging
import re
import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging as transformers_logging


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and examples as they are written."""


# What `--help` shows of Trainer's options, in a line each.
_TRAINING = {
    "output_dir": "Folder of the run: model, checkpoints, logs, card.",
    "max_steps": "Optimizer steps of the whole training.",
    "per_device_train_batch_size": "Rows of a batch of one device.",
    "learning_rate": "Highest learning rate of the schedule.",
    "save_steps": "Optimizer steps between checkpoints.",
    "resume_from_checkpoint": "latest, or a checkpoint of the run to go on from.",
    "report_to": "none, all, or reporters such as tensorboard and wandb.",
    "seed": "Seed of weights, data order and dropout.",
}
_HELP_WIDTH = 119
_SENTENCE_END = re.compile(r"\.(?= [A-Z'\"-]|$)")


class OptionParser(HfArgumentParser):
    """Has a help of one line per option, grouped by class, and errors that name the option that was meant.

    `--help_all` is the whole help of argparse. `origins` says where options are from that do not stand on the command line,
    by name.
    """

    origins: dict[str, str] = {}

    def format_help(self) -> str:
        """Return the short help; without classes, that of argparse."""
        types = list(self.dataclass_types)
        if not types:
            return super().format_help()
        lines = [self.format_usage().strip(), "", self.description]
        for each in types:
            is_training = issubclass(each, TrainingArguments)
            title = "Of transformers' Trainer" if is_training else each.__doc__.partition("\n")[0].partition(";")[0]
            lines.append(f"{title.rstrip('.')}:")
            if is_training:
                lines += [f"  --{name:<30} {text}" for name, text in _TRAINING.items()]
            else:
                lines += [_help_line(field) for field in fields(each)]
        return "\n".join([*lines, "", self.epilog or "", "--help_all explains all options."]) + "\n"

    def parse_known_args(self, args=None, namespace=None):
        """Parse; an unknown option ends the process with the one that was meant."""
        if "--help_all" in (sys.argv[1:] if args is None else args):
            print(super().format_help())  # noqa: T201
            self.exit()
        namespace, rest = super().parse_known_args(args, namespace)
        unknown = next((each.partition("=")[0] for each in rest if each.startswith("--")), None)
        if unknown is not None:
            self.error(_describe_unknown(unknown, vars(namespace)) + self.origin_of(unknown.removeprefix("--")))
        if rest:
            self.error(f"{rest[0]!r} belongs to no option: write the name of one before it, as --help lists them")
        return namespace, rest

    def origin_of(self, option: str) -> str:
        """Return what to add to a message about an option that the user has not typed."""
        return f" ({self.origins[option]} has it)" if option in self.origins else ""


def _help_line(field: Field) -> str:
    """Describe an option by as many sentences of its help as fit into a line, the first at least, and its default."""
    text = " ".join(str(field.metadata.get("help", "")).split())
    start = f"  --{field.name:<30} "
    ends = [match.end() for match in _SENTENCE_END.finditer(text)] or [len(text)]
    line = start + text[: max([ends[0], *(end for end in ends if len(start) + end <= _HELP_WIDTH)])]
    default = f" Default: {field.default}." if isinstance(field.default, (str, int, float)) and field.default else ""
    has_room = "default" not in line.lower() and len(line + default) <= _HELP_WIDTH
    return line + default if has_room else line


# Options of transformers' own example scripts, and what stands for them here.
_OF_OTHERS = {
    "source_lang": "language_pairs",
    "target_lang": "language_pairs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "output": "output_dir",
    "model": "model_name_or_path",
}


def _describe_unknown(option: str, known: Iterable[str]) -> str:
    name = option.lstrip("-").replace("-", "_")
    if _OF_OTHERS.get(name) in known:
        example = " source-target, such as --language_pairs de-en" if name.endswith("_lang") else ""
        return f"there is no option {option}; here it is --{_OF_OTHERS[name]}{example}"
    pattern = re.compile(rf'^    {name}: |"--{name}"', re.MULTILINE)
    owners = [
        script
        for script in dict.fromkeys(COMMANDS.values())
        if any(pattern.search(file.read_text(encoding="utf-8")) for file in _sources_of(script))
    ]
    if owners:
        return f"there is no option {option} here; it is one of {', '.join(owners)}"
    near = get_close_matches(option, [f"--{each}" for each in known], n=1, cutoff=0.75)
    return f"there is no option {option}; " + (f"did you mean {near[0]}?" if near else "see --help")


def _sources_of(script: str) -> list[Path]:
    """List the script and the module of its corpus."""
    package = Path(__file__).parents[1]
    corpora = {"run_clm": "data/text.py", "run_translation": "data/parallel_corpus.py"}
    files = [shipped("scripts") / f"{script}.py", *([package / corpora[script]] if script in corpora else [])]
    return [file for file in files if file.is_file()]


def shipped(folder: str) -> Path:
    """Return a folder of the project: inside an installed package, beside the package in a clone."""
    inside = Path(__file__).parents[1] / folder
    return inside if inside.is_dir() else Path(__file__).parents[2] / folder


def find_shipped(path: str | Path) -> Path:
    """Return a path under `configuration/` also where that is not in the working directory."""
    path, project = Path(path), shipped("configuration").parent
    return project / path if not path.exists() and (project / path).is_file() else path


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
    (arguments,) = OptionParser(arguments_class, **help_of(doc)).parse_args_into_dataclasses(argv)
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
    """Show warnings of this package, as such, and only errors of transformers."""
    logging.basicConfig(format="warning: %(message)s")
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
    "freeze-moe": "freeze_moe",
    "prune": "prune_experts",
    "compare": "compare_routers",
    "mismatch": "measure_routing_mismatch",
    "push": "push_to_hub",
}


def check_output_files(**files: str | None):
    """Check before the work that files can be written, by option; None is not asked for.

    Raises:
        FileNotFoundError: if a file is to go where there is no folder.
    """
    for option, file in files.items():
        if file and not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(f"--{option}: there is no folder {Path(file).parent}; create it first")


def describe_next(folder: str, *commands: str, model: str | None = None) -> str:
    """Say where the files of a finished run are, and how to go on: each command of `stablemoe` with its options.

    Args:
        folder (`str`): of the run.
        *commands (`str`): what can be done with the model.
        model (`str`, *optional*): the model that was only evaluated; by default it was trained, and is in `folder`.
    """
    if model is None:
        lines = [f"Model, card and results are in {folder}, all logs in its trainer_state.json. Next:"]
    else:
        lines = [
            f"Nothing was trained (--do_train false): card and results are in {folder}, the model is {model}. Next:"
        ]
        folder = model
    for command in commands:
        name, _, options = command.partition(" ")
        program = f"stablemoe {name}"
        if not sys.argv[0].startswith("stablemoe"):
            program = f"python {Path(sys.argv[0]).with_name(COMMANDS[name])}.py"
        lines.append(f"  {program} {shlex.quote(folder)} {options}".rstrip())
    return "\n".join(lines)


def cannot_load(name: str, error: Exception) -> str:
    """Say why a checkpoint does not load, on one line, and first what is wrong with a folder of that name."""
    reason = " ".join(str(error).split())  # transformers explains some errors in several lines
    if not Path(name).exists():
        reason = f"there is no folder of that name, so it was looked for on the Hub. {reason}"
    elif not (Path(name) / "config.json").is_file():
        reason = "that folder holds no model: there is no config.json"
    elif "backend tokenizer" in reason and "--tokenizer_name" not in reason and not any(Path(name).glob("tokenizer*")):
        reason = (
            "that folder holds no tokenizer: save the one of its training there, `tokenizer.save_pretrained(folder)`"
        )
    return f"cannot load {name!r}: {reason}"


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the process with one line for errors that the user can fix. Default: `OSError` and `ValueError`."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    except Exception as error:
        if not isinstance(error, kinds or (OSError, ValueError)):
            raise
        reason = " ".join(str(error).split())  # transformers explains some errors in several lines
        raise SystemExit(f"error: {reason}") from error


__all__ = [
    "COMMANDS",
    "cannot_load",
    "check_output_files",
    "describe_next",
    "help_of",
    "log_progress",
    "one_line_errors",
    "parse_options",
    "parse_overrides",
    "quiet_libraries",
]
