# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The console command `stablemoe`: the scripts, where the package is installed and not cloned."""

import sys
from importlib.util import module_from_spec, spec_from_file_location

from .runs.command_line import COMMANDS, shipped


# What `stablemoe train` begins with where no recipe is named; options after it win.
DEFAULT_RECIPE = ("configuration/recipes/embedded-cpu.yaml", "--output_dir", "runs/stablemoe")


def main():
    """Start the script of a command."""
    command, arguments = "".join(sys.argv[1:2]), sys.argv[2:]
    if command not in COMMANDS:
        lines = [f"  {name:<18} scripts/{script}.py" for name, script in COMMANDS.items()]
        usage = "\n".join(["usage: stablemoe COMMAND [option ...]", *lines, "stablemoe COMMAND --help says more."])
        if command in ("-h", "--help"):
            print(usage)  # noqa: T201
            return
        raise SystemExit(f"error: there is no command {command!r}\n{usage}" if command else usage)
    if command == "train" and not any(each.endswith((".yaml", ".yml")) for each in arguments[:1]):
        arguments = [*DEFAULT_RECIPE, *arguments]
    sys.argv = [f"stablemoe {command}", *arguments]
    spec = spec_from_file_location(COMMANDS[command], shipped("scripts") / f"{COMMANDS[command]}.py")
    script = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main()


__all__ = ["main"]
