#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Train a dense model, convert it, and compare the conversions with the dense model trained on for as many steps.

python scripts/compare_upcycling.py configuration/recipes/upcycling-cpu.yaml
python scripts/compare_upcycling.py configuration/recipes/upcycling-llama-cpu.yaml --seeds 0 1 2
python scripts/compare_upcycling.py configuration/recipes/upcycling-cpu.yaml --only dense stablemoe --seeds 0
"""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from modeling_stablemoe.compare import (
    DenseArguments,
    UpcyclingComparison,
    check_comparable,
    check_names,
    measure_speed,
    read_systems,
    speed_table,
    write_report,
)
from modeling_stablemoe.data import DataArguments, load_corpus, load_tokenizer, pack
from modeling_stablemoe.runs import check_fit, log_progress, one_line_errors, parse_recipe


@dataclass
class UpcyclingArguments:
    """What to compare."""

    systems: str = field(
        default="configuration/systems/upcycling-cpu.yaml",
        metadata={
            "help": "YAML file with a mapping of names to settings. The `config` is what from_dense takes; no MoE layers, "
            "`{config: {moe_layer_positions: []}}`, is the dense model; `model_type: mixtral` is transformers' "
            "own."
        },
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Names of systems to keep; default: all."})
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={
            "help": "Seeds of the dense model and what follows. Initial weights and order of batches go by them."
        },
    )
    reference: str = field(
        default="dense", metadata={"help": "The system that the others are measured against, in the table."}
    )

    speed: bool = field(
        default=False,
        metadata={
            "help": "At the end, time a training step and generation by turns. The models are those of the first seed."
        },
    )

    def __post_init__(self):
        """Check the seeds."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`--seeds` must be different numbers, at least one; got {self.seeds}.")


def parse_arguments(argv=None):
    """Parse the command line: `(dense, data, upcycling, training)` arguments."""
    types = (DenseArguments, DataArguments, UpcyclingArguments, TrainingArguments)
    return parse_recipe(types, __doc__, argv)


def prepare(dense_args, data_args, upcycling_args, training_args) -> tuple:
    """Prepare what all runs share, and the systems to run."""
    check_comparable(data_args, training_args)
    systems = read_systems(upcycling_args.systems, upcycling_args.only)
    check_names(systems, dense_args.model_type)
    with training_args.main_process_first(desc="data"):
        corpus = load_corpus(data_args)
        tokenizer = load_tokenizer(data_args, corpus)
    comparison = UpcyclingComparison(dense_args, data_args, training_args, tokenizer, corpus, 0, 1)
    block_size = data_args.block_size or comparison.dense_config.max_position_embeddings
    with training_args.main_process_first(desc="packing"):
        comparison.blocks = pack(corpus, tokenizer, block_size, data_args.preprocessing_num_workers)
    for system in systems:
        check_fit(comparison.config_of(system), len(tokenizer), block_size=block_size)
    return comparison, systems


def main(argv=None):
    """Run the script."""
    *arguments, training_args = parse_arguments(argv)
    log_progress(training_args)
    upcycling_args = arguments[2]
    with one_line_errors():
        comparison, systems = prepare(*arguments, training_args)
        starts, runs, table = [], [], ""
        # Seed by seed, so that an interrupted comparison has complete seeds to compare.
        for seed in upcycling_args.seeds:
            starts.append(comparison.train_dense(seed))
            for system in systems:
                runs.append(comparison.run(system, seed))
                if training_args.process_index == 0:
                    table = write_report(comparison, runs, upcycling_args.reference, dense_models=starts)
    if training_args.process_index == 0:
        begun = ", ".join(f"{start['perplexity']:.2f}" for start in starts)
        name = comparison.dense_name
        print(f"\nAll begin as a {name} of {starts[0]['steps']} steps, validation perplexity {begun}.\n\n{table}")
        if upcycling_args.speed:
            names = [system.name for system in systems]
            speed = measure_speed(comparison, names, upcycling_args.seeds[0], upcycling_args.reference)
            print(f"\n{speed_table(speed)}")
        print(f"\nResults, table and figures are in {training_args.output_dir}.")


if __name__ == "__main__":
    main()
