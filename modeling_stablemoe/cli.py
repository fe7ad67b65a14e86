# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The console command `stablemoe`: the scripts, where the package is installed and not cloned."""

import ast
import sys
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location

from .runs.command_line import COMMANDS, shipped
from .version import __version__


# What `stablemoe train` begins with where no recipe is named; options after it win.
DEFAULT_RECIPE = ("configuration/recipes/embedded-cpu.yaml", "--output_dir", "runs/stablemoe")


def main():
    """Start the script of a command."""
    command, arguments = "".join(sys.argv[1:2]), sys.argv[2:]
    if command not in COMMANDS:
        if command == "--version":
            print(__version__)  # noqa: T201
            return
        if command in ("", "-h", "--help"):
            print(_usage())  # noqa: T201
            return
        near = get_close_matches(command, COMMANDS, n=1)
        raise SystemExit(f"error: there is no command {command!r}; {f'did you mean {near[0]}?' if near else _usage()}")
    if command == "train" and not (_names_recipe(arguments) or _only_evaluates(arguments)):
        arguments = [*DEFAULT_RECIPE, *arguments]
    sys.argv = [f"stablemoe {command}", *arguments]
    spec = spec_from_file_location(COMMANDS[command], shipped("scripts") / f"{COMMANDS[command]}.py")
    script = sys.modules[spec.name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(script)
    except KeyboardInterrupt:  # while the libraries are imported
        raise SystemExit("interrupted") from None
    script.main()


def _usage() -> str:
    """List the commands, with the first sentence of each script."""
    lines = []
    for name, script in COMMANDS.items():
        source = (shipped("scripts") / f"{script}.py").read_text(encoding="utf-8")
        purpose = ast.get_docstring(ast.parse(source)).partition("\n\n")[0]
        lines.append(f"  {name:<18} {' '.join(purpose.split())}")
    evaluation = "To evaluate a model: stablemoe train --do_train false --model_name_or_path MODEL."
    return "\n".join(
        ["usage: stablemoe COMMAND [option ...]", *lines, evaluation, "stablemoe COMMAND --help says more."]
    )


def _names_recipe(arguments: list[str]) -> bool:
    return any(each.endswith((".yaml", ".yml")) for each in arguments[:1])


def _only_evaluates(arguments: list[str]) -> bool:
    given = " ".join(arguments).replace("=", " ").lower()
    return "--do_train false" in given or "--do_train no" in given


__all__ = ["main"]
