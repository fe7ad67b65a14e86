#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Measure how fast StableMoE is beside dense models and transformers' own mixtures of experts, and how much memory it takes.

python scripts/benchmark.py
python scripts/benchmark.py --parts layer shares --tokens 4096 --experts 8 32 --output_dir runs/benchmark-layer
python scripts/benchmark.py --hidden_size 1024 --intermediate_size 4096 --compile true --batch_size 32 \\
    --model_preset configuration/models/compare-h200.json --prompt_length 256 --output_dir runs/benchmark-gpu
"""

from modeling_stablemoe.benchmark import BenchmarkArguments, run_benchmark
from modeling_stablemoe.runs import one_line_errors, parse_options, quiet_libraries


def main(argv=None):
    """Run the script."""
    with one_line_errors():
        args = parse_options(BenchmarkArguments, __doc__, argv)
        quiet_libraries()
        report = run_benchmark(args)
    print(f"{report}\nThis table and every number are in {args.output_dir}.")


if __name__ == "__main__":
    main()
