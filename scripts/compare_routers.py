#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Train several systems (routers, positions, sizes) on the same data with the same schedule, and compare them.

python scripts/compare_routers.py configuration/recipes/compare-cpu.yaml
python scripts/compare_routers.py configuration/recipes/compare-cpu.yaml --only hash stablemoe --seeds 0 1 2
"""

import copy
from dataclasses import dataclass, field
from itertools import product

from datasets import DatasetDict
from transformers import TrainingArguments

from modeling_stablemoe.compare import Comparison, check_comparable, read_systems, write_report
from modeling_stablemoe.data import DataArguments, load_corpus, load_tokenizer, pack
from modeling_stablemoe.runs import ModelArguments, check_fit, log_progress, one_line_errors, parse_recipe, read_preset


@dataclass
class CompareArguments:
    """What to compare."""

    systems: str = field(
        default="configuration/systems/table2.yaml",
        metadata={"help": "YAML file with a mapping of names to settings. See those under configuration/systems/."},
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Names of systems to keep; default: all."})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds: of initial weights and order of batches alike."}
    )
    reference: str = field(
        default="stablemoe", metadata={"help": "The system that the others are measured against, in the table."}
    )
    test_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Files or folders to measure at the end, as many documents as of the validation text."},
    )
    fluctuation_check_steps: int = field(
        default=0, metadata={"help": "Steps between checks of routing fluctuation (figures 2 and 7); 0: none."}
    )
    fluctuation_tokens: int = field(
        default=8192, metadata={"help": "Validation tokens that routing fluctuation is watched on."}
    )

    def __post_init__(self):
        """Check the seeds."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`--seeds` must be different numbers, at least one; got {self.seeds}.")


def parse_arguments(argv=None):
    """Parse the command line: `(model, data, compare, training)` arguments."""
    types = (ModelArguments, DataArguments, CompareArguments, TrainingArguments)
    return parse_recipe(types, __doc__, argv)


def prepare(model_args, data_args, compare_args, training_args) -> tuple:
    """Prepare what all runs share, and the systems to run."""
    if model_args.model_preset is None:
        raise ValueError("Systems are trained from the beginning: name a `--model_preset`, no `--model_name_or_path`.")
    check_comparable(data_args, training_args)
    systems = read_systems(compare_args.systems, compare_args.only)
    for system, seed in product(systems, compare_args.seeds):
        system.of_seed(seed)
    _, preset = read_preset(model_args.model_preset)
    with training_args.main_process_first(desc="data"):
        corpus = load_corpus(data_args)
        tokenizer = load_tokenizer(data_args, corpus)
        if compare_args.test_files:
            test_args = copy.copy(data_args)
            test_args.validation_files = compare_args.test_files
            corpus = DatasetDict({**corpus, "test": load_corpus(test_args)["validation"]})
    block_size = data_args.block_size or (preset | model_args.overrides).get("max_position_embeddings", 1024)
    with training_args.main_process_first(desc="packing"):
        blocks = pack(corpus, tokenizer, block_size, data_args.preprocessing_num_workers)
    comparison = Comparison(
        model_args,
        data_args,
        training_args,
        tokenizer,
        blocks,
        compare_args.fluctuation_check_steps,
        compare_args.fluctuation_tokens,
    )
    for system in systems:
        check_fit(comparison.config_of(system), len(tokenizer), block_size=block_size)
    return comparison, systems


def main(argv=None):
    """Run the script."""
    *arguments, training_args = parse_arguments(argv)
    log_progress(training_args)
    compare_args = arguments[2]
    with one_line_errors():
        comparison, systems = prepare(*arguments, training_args)
        runs, table = [], ""
        # Seed by seed, so that an interrupted comparison has complete seeds to compare.
        for seed in compare_args.seeds:
            for system in systems:
                runs.append(comparison.run(system, seed))
                if training_args.process_index == 0:
                    table = write_report(comparison, runs, compare_args.reference)
    if training_args.process_index == 0:
        print(f"\n{table}\n\nResults, table and figures are in {training_args.output_dir}.")


if __name__ == "__main__":
    main()
