#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Train a StableMoE language model through both stages, evaluate it and save it.

python scripts/run_clm.py configuration/recipes/embedded-cpu.yaml
accelerate launch scripts/run_clm.py recipe.yaml --learning_rate 3e-4
python scripts/run_clm.py --do_train false --model_name_or_path runs/mine   # evaluate only
"""

from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, TrainingArguments, set_seed

from modeling_stablemoe.checkpoints import check_engine
from modeling_stablemoe.data import DataArguments, collate_blocks, load_corpus, load_tokenizer, pack, without_end
from modeling_stablemoe.hub import CardFacts
from modeling_stablemoe.measure import format_results, ngram_perplexities
from modeling_stablemoe.runs import (
    CardArguments,
    FolderArguments,
    ModelArguments,
    RoutingArguments,
    RunFolder,
    build_callbacks,
    build_model,
    check_fit,
    check_model,
    describe_next,
    evaluate_saved_model,
    log_progress,
    one_line_errors,
    parse_recipe,
    push,
    set_hash_tables,
    summarize_run,
    train,
    write_results,
)
from modeling_stablemoe.training import BlockTrainer, show_progress


@dataclass
class ReportArguments:
    """What to measure at the end."""

    ngram_baselines: bool = field(
        default=False, metadata={"help": "Print the perplexity of unigram and interpolated bigram models beside ours."}
    )


def parse_arguments(argv=None):
    """Parse the command line: `(model, data, routing, folder, card, report, training)` arguments."""
    types = (
        ModelArguments,
        DataArguments,
        RoutingArguments,
        FolderArguments,
        CardArguments,
        ReportArguments,
        TrainingArguments,
    )
    return parse_recipe(types, __doc__, argv)


def card_facts(model_args: ModelArguments, data_args: DataArguments, card_args: CardArguments) -> CardFacts:
    """Gather what the model card says besides the measurements."""
    corpora = data_args.train_files or [data_args.dataset_name or f"Python {data_args.embedded_corpus}"]
    return card_args.facts(corpora[:1], model_args.model_name_or_path, dataset_config=data_args.dataset_config_name)


def report(trainer: BlockTrainer, blocks, facts: CardFacts, ngram_baselines: bool, evaluated: str | None):
    """Evaluate, write `results.json` and the model card, and print them; `evaluated` is a model that was not trained."""
    results = {"perplexity": evaluate_saved_model(trainer), **summarize_run(trainer)}
    if not trainer.is_world_process_zero():
        return
    if trainer.args.do_train:
        block = next(iter(blocks["train"]))
        results["tokens"] = (
            results["step"] * trainer.get_total_train_batch_size(trainer.args) * len(block["input_ids"])
        )
    if ngram_baselines:
        vocab_size = trainer.model.config.vocab_size
        results["baselines"] = ngram_perplexities(blocks["train"], blocks["validation"], vocab_size)
    write_results(trainer, results, facts=facts)
    commands = ['generate --prompt "The"', 'inspect --text "The"'][: 1 if results["routing_stage"] is None else 2]
    print(f"\n{format_results(results)}\n\n{describe_next(trainer.args.output_dir, *commands, model=evaluated)}")


def prepare(model_args, data_args, routing_args, folder_args, facts, training_args, needs_train: bool) -> tuple:
    """Prepare everything that training needs: `(trainer, blocks, run folder, checkpoint to resume from)`."""
    check_model(model_args, AutoModelForCausalLM)  # before the data are read
    # A checkpoint needs its own tokenizer.
    data_args.tokenizer_name = data_args.tokenizer_name or model_args.model_name_or_path
    folder = RunFolder(training_args, folder_args.overwrite_output_dir, model_args, data_args, routing_args)
    with training_args.main_process_first(desc="data"):
        corpus = load_corpus(data_args, needs_train)
        if not needs_train:
            corpus.pop("train", None)
        tokenizer = load_tokenizer(data_args, corpus)
    model = build_model(model_args, AutoModelForCausalLM, tokenizer)
    block_size = data_args.block_size or model.config.max_position_embeddings
    check_fit(model.config, len(tokenizer), block_size=block_size)
    with training_args.main_process_first(desc="packing"):
        blocks = pack(corpus, tokenizer, block_size, data_args.preprocessing_num_workers)
    if training_args.do_train:
        set_hash_tables(model, routing_args, blocks["train"])
    callbacks = build_callbacks(routing_args, model.config, training_args.max_steps, blocks["validation"], facts=facts)
    checkpoint = folder.claim()
    trainer = BlockTrainer(
        model=model,
        args=training_args,
        train_dataset=without_end(blocks["train"]) if needs_train else None,
        eval_dataset=blocks["validation"],
        data_collator=collate_blocks,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    show_progress(trainer)
    if checkpoint is not None:
        check_engine(trainer, checkpoint)
    return trainer, blocks, folder, checkpoint


def main(argv=None):
    """Run the script."""
    model_args, data_args, routing_args, folder_args, card_args, report_args, training_args = parse_arguments(argv)
    log_progress(training_args)
    set_seed(training_args.seed)

    with one_line_errors():
        facts = card_facts(model_args, data_args, card_args)
        arguments = (model_args, data_args, routing_args, folder_args, facts, training_args)
        needs_train = training_args.do_train or report_args.ngram_baselines
        trainer, blocks, folder, checkpoint = prepare(*arguments, needs_train)
    with folder, one_line_errors(OSError):  # a full disk, no network
        if training_args.do_train:
            train(trainer, checkpoint)
        evaluated = None if training_args.do_train else model_args.model_name_or_path
        report(trainer, blocks, facts, report_args.ngram_baselines, evaluated)
        push(trainer)


if __name__ == "__main__":
    main()
