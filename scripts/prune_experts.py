#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Save a frozen checkpoint without the experts that the vocabulary of a text never reaches: the same logits on it.

python scripts/prune_experts.py runs/embedded-cpu --text_files README.md --dry_run
python scripts/prune_experts.py runs/embedded-cpu --text_files README.md --min_count 5 --output_dir runs/pruned
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, TrainerState

from modeling_stablemoe.checkpoints import require_new_folder
from modeling_stablemoe.convert import (
    Pruning,
    compare_on_text,
    format_pruning,
    format_random_tables,
    load_pruned,
    open_weights,
    plan_pruning,
    read_configs,
    read_tables,
    save_converted,
)
from modeling_stablemoe.hub import CardFacts, build_model_card
from modeling_stablemoe.measure import summarize_run
from modeling_stablemoe.runs import (
    TextVocabulary,
    VocabularyArguments,
    load_tokenizer,
    one_line_errors,
    parse_checkpoint_command,
    quiet_libraries,
    read_vocabularies,
)


@dataclass
class PruneArguments:
    """Where to save the result, and what to do with it."""

    output_dir: str | None = field(
        default=None, metadata={"help": "New folder for the pruned checkpoint, its tokenizer and card."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Only show what would be kept; of the weights nothing but the tables is read."},
    )
    confine_generation: bool = field(
        default=True, metadata={"help": "Let `generate` avoid the token ids whose expert is gone."}
    )
    compare: bool = field(
        default=True,
        metadata={
            "help": "Load the whole model, too, and compare logits before saving. The beginning of the text is read for "
            "it."
        },
    )

    def __post_init__(self):
        """Check what can be checked without the checkpoint."""
        if (self.output_dir is None) != self.dry_run:
            raise ValueError("name either a new folder with --output_dir, or --dry_run")


def plan(name: str, text_args: VocabularyArguments) -> tuple[Pruning, list[TextVocabulary]]:
    """Read the text and the tables, and plan which experts to keep."""
    model_class, config, generation_config = read_configs(name)
    with open_weights(name) as weights:
        tables = read_tables(model_class, config, weights)
    tokenizer = load_tokenizer(text_args.tokenizer_name or name)
    vocabularies = read_vocabularies(text_args, tokenizer, config)
    ids = (part.ids for part in vocabularies)
    return plan_pruning(model_class, config, tables, *ids, generation_config=generation_config), vocabularies


def save(model: PreTrainedModel, name: str, text_args: VocabularyArguments, folder: str):
    """Save the pruned model with tokenizer, generation config and card, all or nothing."""
    tokenizer = load_tokenizer(text_args.tokenizer_name or name)
    results = {**summarize_run(model, TrainerState(), 0), "step": None}
    card = build_model_card(
        model_name=Path(folder).resolve().name,
        config=model.config,
        results=results,
        model_class=type(model),
        facts=CardFacts(base_model=name),
        versions={},
    )
    save_converted(model, tokenizer, folder, card)


def run(name: str, text_args: VocabularyArguments, prune_args: PruneArguments) -> str:
    """Plan and, unless it is a dry run, prune, compare and save; return the report."""
    if not prune_args.dry_run:
        require_new_folder(prune_args.output_dir)
    pruning, vocabularies = plan(name, text_args)
    lines = [format_pruning(pruning, vocabularies)]
    if prune_args.dry_run:
        return "\n\n".join([*lines, format_random_tables(pruning), "Nothing is saved: this was a dry run."])
    ids = (part.ids for part in vocabularies)
    model = load_pruned(name, *ids, confine_generation=prune_args.confine_generation)
    if prune_args.compare:
        whole = pruning.model_class.from_pretrained(name)
        comparison = compare_on_text(whole, model, pruning, vocabularies)
        lines.append(f"Against the whole model, {comparison}.")
    save(model, name, text_args, prune_args.output_dir)
    return "\n\n".join([*lines, f"Saved to {prune_args.output_dir}; fingerprint {model.config.router_fingerprint}."])


def main(argv=None):
    """Run the script."""
    usage = "%(prog)s model (--output_dir folder | --dry_run) [--option value ...]"
    text_args, prune_args, name = parse_checkpoint_command(PruneArguments, __doc__, usage, argv, VocabularyArguments)
    quiet_libraries()
    with one_line_errors():
        print(run(name, text_args, prune_args))


if __name__ == "__main__":
    main()
