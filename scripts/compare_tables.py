#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Train MoE models of transformers whose experts tables choose from the start, from the middle of training, after it or never.

python scripts/compare_tables.py configuration/recipes/tables-cpu.yaml
python scripts/compare_tables.py configuration/recipes/tables-cpu.yaml --only olmoe olmoe-after --seeds 0 1 2
"""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from modeling_stablemoe.compare import (
    TableArguments,
    TableComparison,
    TableSystem,
    check_comparable,
    read_systems,
    write_table_report,
)
from modeling_stablemoe.data import DataArguments, load_corpus, load_tokenizer, pack
from modeling_stablemoe.runs import check_fit, log_progress, one_line_errors, parse_recipe


@dataclass
class CompareArguments:
    """What to compare."""

    systems: str = field(
        default="configuration/systems/tables-cpu.yaml",
        metadata={
            "help": "YAML file with a mapping of names to settings. The `config` has the `model_type` and its fields."
        },
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Names of systems to keep; default: all."})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds: of initial weights and order of batches alike."}
    )

    def __post_init__(self):
        """Check the seeds."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`--seeds` must be different numbers, at least one; got {self.seeds}.")


def parse_arguments(argv=None):
    """Parse the command line: `(tables, data, compare, training)` arguments."""
    types = (TableArguments, DataArguments, CompareArguments, TrainingArguments)
    return parse_recipe(types, __doc__, argv)


def prepare(table_args, data_args, compare_args, training_args) -> tuple:
    """Prepare what all runs share, and the systems to run."""
    check_comparable(data_args, training_args)
    systems = read_systems(compare_args.systems, compare_args.only, TableSystem)
    with training_args.main_process_first(desc="data"):
        corpus = load_corpus(data_args)
        tokenizer = load_tokenizer(data_args, corpus)
    comparison = TableComparison(table_args, data_args, training_args, tokenizer, corpus, 0, 1)
    comparison.check_sources(systems, compare_args.seeds)
    configs = [comparison.config_of(system) for system in systems]
    block_size = data_args.block_size or min(config.max_position_embeddings for config in configs)
    for config in configs:
        check_fit(config, len(tokenizer), block_size=block_size)
    with training_args.main_process_first(desc="packing"):
        comparison.blocks = pack(corpus, tokenizer, block_size, data_args.preprocessing_num_workers)
    return comparison, systems


def main(argv=None):
    """Run the script."""
    *arguments, training_args = parse_arguments(argv)
    log_progress(training_args)
    with one_line_errors():
        comparison, systems = prepare(*arguments, training_args)
        runs, page = [], ""
        # Seed by seed, so that an interrupted comparison has complete seeds to compare.
        for seed in arguments[2].seeds:
            for system in systems:
                runs.append(comparison.run(system, seed))
                if training_args.process_index == 0:
                    page = write_table_report(comparison, runs)
    if training_args.process_index == 0:
        print(f"\n{page}\n\nResults, tables and figures are in {training_args.output_dir}.")


if __name__ == "__main__":
    main()
