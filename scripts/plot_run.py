#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Draw the figures of a training run, or of several side by side, from their folders.

python scripts/plot_run.py runs/embedded-cpu
python scripts/plot_run.py runs/first runs/second --labels paper balanced --output_dir runs/figures --svg
"""

import argparse
from pathlib import Path

from modeling_stablemoe.measure import read_run, write_run_figures
from modeling_stablemoe.runs import OptionParser, help_of, one_line_errors


def parse_arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OptionParser(**help_of(__doc__))
    parser.add_argument("runs", nargs="+", help="Output folders of runs, finished or not, or checkpoints.")
    parser.add_argument("--labels", nargs="+", help="Names of the runs in the figures. Default: those of the folders.")
    parser.add_argument("--output_dir", help="Where to put the figures. Default: `figures` in the first folder.")
    parser.add_argument("--svg", action="store_true", help="Write each figure as SVG, too.")
    args = parser.parse_args(argv)
    if args.labels is not None and len(args.labels) != len(args.runs):
        parser.error(f"--labels names {len(args.labels)} runs, but there are {len(args.runs)}")
    return args


def main(argv=None):
    """Run the script."""
    args = parse_arguments(argv)
    with one_line_errors():
        labels = args.labels or [None] * len(args.runs)
        runs = [read_run(folder, label) for folder, label in zip(args.runs, labels, strict=True)]
        folder = Path(args.output_dir) if args.output_dir else Path(args.runs[0]) / "figures"
        files = write_run_figures(runs, folder, ("png", "svg") if args.svg else ("png",))
    if not files:
        raise SystemExit("error: the logs hold nothing to draw: neither a loss nor routing statistics")
    for file in files:
        print(file)


if __name__ == "__main__":
    main()
