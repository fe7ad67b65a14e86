#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Train a StableMoE translation model through both stages, score its translations and save it.

python scripts/run_translation.py configuration/recipes/code-summary-cpu.yaml
python scripts/run_translation.py --do_train false --model_name_or_path runs/mine   # evaluate only
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, Seq2SeqTrainingArguments, set_seed

from modeling_stablemoe.checkpoints import check_engine, replace_file
from modeling_stablemoe.data import (
    EMBEDDED_PAIR,
    TokenBatchCollator,
    TokenBatches,
    TranslationDataArguments,
    encode_pairs,
    load_parallel_corpus,
    load_translation_tokenizer,
    sort_by_length,
)
from modeling_stablemoe.hub import CardFacts, languages_of_pairs
from modeling_stablemoe.measure import (
    TranslationMetrics,
    describe_saved_model,
    format_scores,
    format_stages,
    perplexity_of,
)
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
    log_progress,
    one_line_errors,
    parse_recipe,
    push,
    set_hash_tables,
    summarize_run,
    train,
    warn_of_wrong_direction,
    write_results,
)
from modeling_stablemoe.training import TranslationTrainer, refuse_label_smoother, show_progress


logger = logging.getLogger(__name__)


@dataclass
class BatchArguments:
    """How sentence pairs become batches."""

    batch_tokens: int = field(
        default=4096,
        metadata={
            "help": "Most tokens of a training batch, padding included. Pairs count as the longest source or target among "
            "them. Several batches make a step with --gradient_accumulation_steps and several processes."
        },
    )


def parse_arguments(argv=None):
    """Parse the command line: `(model, data, batch, routing, folder, card, training)` arguments."""
    types = (
        ModelArguments,
        TranslationDataArguments,
        BatchArguments,
        RoutingArguments,
        FolderArguments,
        CardArguments,
        Seq2SeqTrainingArguments,
    )
    return parse_recipe(types, __doc__, argv)


def check_training_arguments(training_args: Seq2SeqTrainingArguments):
    """Refuse options of Trainer that would not do here what they say."""
    if training_args.do_train and training_args.per_device_train_batch_size != 1:
        raise ValueError(
            f"`--per_device_train_batch_size {training_args.per_device_train_batch_size}`: what Trainer takes for an "
            "example is a batch of `--batch_tokens` tokens already. Set it to 1."
        )
    refuse_label_smoother(training_args)
    if not training_args.predict_with_generate:
        raise ValueError("`--predict_with_generate true` is needed: translations are what is scored.")


def prepare_generation(model: PreTrainedModel, training_args: Seq2SeqTrainingArguments):
    """Make the settings that the run is scored with the defaults of `generate`, also for users of the saved model.

    What is not named stays as it was saved with a checkpoint; a new model has nothing.
    """
    config = model.generation_config
    config.max_length = (
        training_args.generation_max_length or config.max_length or model.config.max_position_embeddings
    )
    config.num_beams = training_args.generation_num_beams or config.num_beams or 1
    if config.max_length > model.config.max_position_embeddings:
        raise ValueError(
            f"`--generation_max_length {config.max_length}` exceeds the model's "
            f"{model.config.max_position_embeddings} positions."
        )


def card_facts(model_args: ModelArguments, data_args: TranslationDataArguments, card_args: CardArguments) -> CardFacts:
    """Gather what the model card says besides the measurements."""
    named = [name.partition(":") for name in data_args.parallel_datasets]  # name:configuration
    return card_args.facts(
        [name for name, _, _ in named] or data_args.test_files or data_args.train_files or [f"Python {EMBEDDED_PAIR}"],
        model_args.model_name_or_path,
        dataset_config=named[0][2] or None if len(named) == 1 else None,
        languages=languages_of_pairs(data_args.language_pairs or [EMBEDDED_PAIR]),
    )


def make_batches(encoded: DatasetDict, batch_args: BatchArguments, training_args) -> TokenBatches:
    """Make the batches to train on, and say how many there are."""
    batches = TokenBatches(encoded["train"], batch_args.batch_tokens, seed=training_args.seed)
    logger.info(
        "Of these %d are trained on: %d tokens in %d batches, %.1f%% padding.",
        batches.num_pairs,
        batches.num_tokens,
        len(batches),
        100 * batches.padding_share,
    )
    return batches


def prepare(model_args, data_args, batch_args, routing_args, folder_args, facts, training_args) -> tuple:
    """Prepare everything that training needs: `(trainer, encoded splits, run folder, checkpoint to resume from)`."""
    check_training_arguments(training_args)
    check_model(model_args, AutoModelForSeq2SeqLM)  # before the data are read
    # A checkpoint needs its own tokenizer.
    data_args.tokenizer_name = data_args.tokenizer_name or model_args.model_name_or_path
    settings = (model_args, data_args, batch_args, routing_args)
    folder = RunFolder(training_args, folder_args.overwrite_output_dir, *settings)
    with training_args.main_process_first(desc="data"):
        corpus = load_parallel_corpus(data_args, training_args.do_train)
        if not training_args.do_train:
            corpus.pop("train", None)
        tokenizer = load_translation_tokenizer(data_args, corpus)
    special = {"decoder_start_token_id": tokenizer.eos_token_id}
    model = build_model(model_args, AutoModelForSeq2SeqLM, tokenizer, **special)
    prepare_generation(model, training_args)
    positions = model.config.max_position_embeddings
    lengths = {
        "max_source_length": data_args.max_source_length or positions,
        "max_target_length": data_args.max_target_length or positions,
    }
    check_fit(model.config, len(tokenizer), **lengths)
    if model_args.model_name_or_path is not None:
        warn_of_wrong_direction(model, tokenizer, corpus.get("validation", corpus.get("test")))
    with training_args.main_process_first(desc="tokenization"):
        encoded = encode_pairs(corpus, tokenizer, **lengths, num_proc=data_args.preprocessing_num_workers)
    encoded = DatasetDict(
        {**encoded, **{name: sort_by_length(encoded[name])[0] for name in encoded if name != "train"}}
    )
    batches = make_batches(encoded, batch_args, training_args) if training_args.do_train else None
    if batches is not None:
        set_hash_tables(model, routing_args, encoded["train"])
    collator = TokenBatchCollator(tokenizer)
    validation = encoded.get("validation", encoded.get("test"))
    callbacks = build_callbacks(routing_args, model.config, training_args.max_steps, validation, collator, facts)
    checkpoint = folder.claim()
    trainer = TranslationTrainer(
        model=model,
        args=training_args,
        train_dataset=batches,
        eval_dataset=validation,
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=TranslationMetrics(tokenizer, validation["target"], validation["pair"]),
        callbacks=callbacks,
    )
    show_progress(trainer)
    if checkpoint is not None:
        check_engine(trainer, checkpoint)
    return trainer, encoded, folder, checkpoint


def translate(trainer: TranslationTrainer, split: Dataset) -> tuple[dict, float]:
    """Translate and score a split; write the translations to a file and return the scores and the perplexity."""
    metrics = TranslationMetrics(trainer.processing_class, split["target"], split["pair"])
    trainer.compute_metrics = metrics
    loss = trainer.predict(split, metric_key_prefix="test").metrics["test_loss"]
    rows = zip(split["pair"], split["source"], split["target"], metrics.last_hypotheses, strict=True)
    names = ("pair", "source", "reference", "translation")
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in rows]
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "translations.jsonl"
        replace_file(path, lambda partial: partial.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    return metrics.last_scores, perplexity_of(loss)


def report(trainer: TranslationTrainer, encoded: DatasetDict, facts: CardFacts, evaluated: str | None):
    """Score the test split (without one, the validation split), write the results and print them.

    `evaluated` is a model that was not trained.
    """
    name = "test" if "test" in encoded else "validation"
    scores, perplexity = translate(trainer, encoded[name])
    results = {"split": name, "scores": scores, "perplexity": perplexity, **summarize_run(trainer)}
    if not trainer.is_world_process_zero():
        return
    write_results(trainer, results, facts=facts)
    print(f"\n{format_stages(results['stages'])}\n\n{name}:\n{format_scores(scores)}")
    print(f"perplexity: {perplexity:.2f}")
    saved = describe_saved_model(results)
    if saved is not None:
        print(saved)
    commands = ["translate --input FILE", "inspect --text_files FILE"][: 1 if results["routing_stage"] is None else 2]
    print(f"\n{describe_next(trainer.args.output_dir, *commands, model=evaluated)}")


def main(argv=None):
    """Run the script."""
    *arguments, card_args, training_args = parse_arguments(argv)
    log_progress(training_args)
    set_seed(training_args.seed)

    with one_line_errors(ImportError, OSError, ValueError):
        facts = card_facts(arguments[0], arguments[1], card_args)
        trainer, encoded, folder, checkpoint = prepare(*arguments, facts, training_args)
    with folder, one_line_errors(OSError):  # a full disk, no network
        if training_args.do_train:
            train(trainer, checkpoint)
        report(trainer, encoded, facts, None if training_args.do_train else arguments[0].model_name_or_path)
        push(trainer)


if __name__ == "__main__":
    main()
