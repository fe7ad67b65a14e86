#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Show what each expert of a checkpoint holds: its most frequent tokens, load, and agreement with the backbone router.

python scripts/inspect_routing.py runs/embedded-cpu --text_files README.md --html runs/experts.html --open
python scripts/inspect_routing.py runs/multi30k --text_files test.de --target_files test.en --json runs/experts.json
"""

import json
import os
import sys
import webbrowser
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from modeling_stablemoe.checkpoints import replace_file
from modeling_stablemoe.measure import build_page, format_report, inspect_routing
from modeling_stablemoe.runs import (
    check_output_files,
    one_line_errors,
    parse_checkpoint_command,
    quiet_libraries,
    route_through_checkpoint,
)


@dataclass
class OutputArguments:
    """What to write besides the tables on the standard output."""

    top_k: int = field(default=20, metadata={"help": "Tokens to list of each expert."})
    json: str | None = field(default=None, metadata={"help": "File to write the numbers to."})
    html: str | None = field(
        default=None, metadata={"help": "File to write a page to, to read the text in with a colour for each expert."}
    )
    open: bool = field(default=False, metadata={"help": "Show the page of --html in the browser."})

    def __post_init__(self):
        """Check the number, and that there is a page to open."""
        if self.top_k < 1:
            raise ValueError("--top_k must be >= 1")
        if self.open and not self.html:
            raise ValueError("--open shows the page of --html: name its file, as in --html experts.html --open")


def main(argv=None):
    """Run the script."""
    usage = "%(prog)s model [--option value ...]"
    text_args, output_args, name = parse_checkpoint_command(OutputArguments, __doc__, usage, argv)
    quiet_libraries()
    with one_line_errors():
        check_output_files(json=output_args.json, html=output_args.html)
        model, tokenizer, texts = route_through_checkpoint(name, text_args)
        # Only the folder's name, as the page may be shared.
        report = inspect_routing(model, tokenizer, texts, Path(os.path.abspath(name)).name, output_args.top_k)
        contents = {}
        if output_args.json:
            contents[output_args.json] = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        if output_args.html:
            contents[output_args.html] = build_page(report, texts, tokenizer)
        for file, content in contents.items():
            replace_file(file, partial(Path.write_text, data=content, encoding="utf-8"))
    print(format_report(report))
    if output_args.open and not webbrowser.open(Path(output_args.html).absolute().as_uri()):
        print(f"No browser was found here: open {output_args.html} in one yourself.", file=sys.stderr)


if __name__ == "__main__":
    main()
