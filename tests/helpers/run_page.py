# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Run the fenced blocks of a Markdown page in their order: `python run_page.py PAGE`, in a folder to work in.

Python blocks share one interpreter, as in a notebook; one that begins with the name of a file, `# name.py`, is saved as
that file. Each line of a bash block (a trailing backslash continues it) is a command that must succeed. Blocks without a
language are for show.
"""

import re
import subprocess
import sys
from pathlib import Path


FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\w+\.py)\n")
# What the page's reader has done already, and whoever runs the page, too.
DONE_BEFORE = ("make train", "make train-seq2seq", "make test", "make install", "pip install", "git clone")


def blocks_of(page: Path) -> list[tuple[str, str, int]]:
    """List language, code and first line of each fenced block that names a language."""
    text = page.read_text()
    return [(match[1], match[2], text[: match.start()].count("\n") + 2) for match in FENCED.finditer(text)]


def commands_of(code: str) -> list[str]:
    """List the commands of a bash block but for those of the set-up."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("#", *DONE_BEFORE))]


def run_page(page: Path):
    """Run a page; the first failure ends it.

    Raises:
        subprocess.CalledProcessError: from a command.
    """
    namespace = {"__name__": "__main__"}
    for language, code, line in blocks_of(page):
        print(f"--- {page.name}, line {line}", flush=True)
        if language == "python":
            named = FILE_NAME.match(code)
            if named:
                Path(named[1]).write_text(code)
            else:
                exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)
        elif language == "bash":
            for command in commands_of(code):
                subprocess.run(["bash", "-c", f"set -euo pipefail; {command}"], check=True)


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
