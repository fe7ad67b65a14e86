#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Train a StableMoE language model through both stages, evaluate it and save it.

python scripts/run_clm.py configuration/recipes/embedded-cpu.yaml
accelerate launch scripts/run_clm.py recipe.yaml --learning_rate 3e-4
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import is_main_process

from modeling_stablemoe import RoutingFluctuationCallback, StableMoEForCausalLM, StageTransitionCallback
from modeling_stablemoe.atomic_files import replace_file
from modeling_stablemoe.checkpoints import (
    check_run_folder,
    claim_run_folder,
    remove_incomplete_checkpoints,
    restore_finished_run,
    run_identity,
    what_is_missing,
)
from modeling_stablemoe.data import DataArguments, collate_blocks, load_corpus, load_tokenizer, pack
from modeling_stablemoe.hub import build_model_card
from modeling_stablemoe.ngram import ngram_perplexities
from modeling_stablemoe.recipes import ModelArguments, RoutingArguments, check_fit, load_preset, parse_recipe
from modeling_stablemoe.report import format_results, summarize


logger = logging.getLogger(__name__)

# What `--resume_from_checkpoint` calls the last whole checkpoint of the run.
LATEST = ("latest", "true", "True")


@dataclass
class RunArguments:
    """How to treat the output folder, and what to measure at the end."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete what --output_dir holds and start anew."}
    )
    ngram_baselines: bool = field(
        default=False, metadata={"help": "Print the perplexity of unigram and interpolated bigram models beside ours."}
    )


def parse_arguments(argv=None):
    """Parse the command line: `(model, data, routing, run, training)` arguments."""
    types = (ModelArguments, DataArguments, RoutingArguments, RunArguments, TrainingArguments)
    return parse_recipe(types, description=__doc__.splitlines()[0], argv=argv)


def describe_run(model_args, data_args, routing_args, run_args, training_args) -> dict:
    """Gather what `check_run_folder` and `claim_run_folder` are to know of this run."""
    settings = {**asdict(model_args), **asdict(data_args), "stage1_steps": routing_args.stage1_steps}
    return {
        "folder": training_args.output_dir,
        "identity": run_identity(training_args, settings),
        "resume": training_args.resume_from_checkpoint is not None,
        "overwrite": run_args.overwrite_output_dir,
    }


def claim_output_folder(run: dict, training_args: TrainingArguments) -> str | None:
    """Make the output folder this run's; return the checkpoint to resume from, if any."""
    requested = training_args.resume_from_checkpoint
    checkpoint = None
    with training_args.main_process_first(desc="output folder"):
        if is_main_process(training_args.local_process_index) or requested:
            checkpoint = claim_run_folder(**run)
    if requested not in (None, *LATEST):
        return requested
    return None if checkpoint is None else str(checkpoint)


def build_model(model_args: ModelArguments, tokenizer) -> StableMoEForCausalLM:
    """Make the model that the preset describes, or load the checkpoint."""
    implementations = {
        "attn_implementation": model_args.attn_implementation,
        "experts_implementation": model_args.experts_implementation,
    }
    implementations = {name: value for name, value in implementations.items() if value is not None}
    if model_args.model_name_or_path is not None:
        return AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **implementations)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = load_preset(model_args.model_preset, **{"vocab_size": len(tokenizer), **special, **model_args.overrides})
    return AutoModelForCausalLM.from_config(config, **implementations)


def build_callbacks(routing_args: RoutingArguments, max_steps: int, validation_blocks) -> list:
    """Make the callbacks that the routing arguments ask for."""
    callbacks = []
    if routing_args.stage1 is not None:
        callbacks.append(StageTransitionCallback(routing_args.stage1))
        if max_steps > 0:  # else only Trainer knows how many there will be, and the callback checks them then
            callbacks[0].resolve_transition_step(max_steps)
    if routing_args.fluctuation_check_steps:
        callbacks.append(
            RoutingFluctuationCallback(
                validation_blocks, routing_args.fluctuation_check_steps, routing_args.fluctuation_tokens
            )
        )
    return callbacks


def train(trainer: Trainer, checkpoint: str | None):
    """Train to the end, from a checkpoint where there is one, and save the model and the Trainer's state."""
    if checkpoint is not None:
        logger.info("Resuming from %s.", checkpoint)
        with trainer.args.main_process_first(desc="cut-off checkpoints"):
            if trainer.is_world_process_zero():
                remove_incomplete_checkpoints(trainer.args.output_dir)
    if checkpoint is None or not restore_finished_run(trainer, checkpoint):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    # A pickle; checkpoints keep theirs, what is shared holds none.
    (Path(trainer.args.output_dir) / "training_args.bin").unlink(missing_ok=True)


def report(trainer: Trainer, blocks, data_args: DataArguments, ngram_baselines: bool):
    """Evaluate, write `results.json` and the model card, and print what the run came to."""
    results = {
        "perplexity": math.exp(trainer.evaluate()["eval_loss"]),
        "parameters": trainer.model.num_parameters(),
        "router_fingerprint": trainer.model.config.router_fingerprint,
        **summarize(trainer.state.log_history, frozen=trainer.model.config.router_fingerprint is not None),
    }
    if not trainer.is_world_process_zero():
        return
    if ngram_baselines:
        vocab_size = trainer.model.config.vocab_size
        results["baselines"] = ngram_perplexities(blocks["train"], blocks["validation"], vocab_size)
    folder = Path(trainer.args.output_dir)
    replace_file(folder / "results.json", lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))
    card = build_model_card(
        Path(__file__).parents[1] / "hub_card.md",
        model_name=trainer.args.hub_model_id or folder.name,
        config=trainer.model.config,
        results=results,
        dataset_name=data_args.dataset_name or (data_args.train_files or [f"Python {data_args.embedded_corpus}"])[0],
    )
    replace_file(folder / "README.md", card.save)
    print(f"\n{format_results(results)}")


def prepare(model_args, data_args, routing_args, run_args, training_args) -> tuple:
    """Make everything that training needs: `(trainer, blocks, checkpoint to resume from)`.

    The output folder is looked at first and changed last, when nothing else can be wrong any more.
    """
    run = describe_run(model_args, data_args, routing_args, run_args, training_args)
    check_run_folder(**run)
    named = training_args.resume_from_checkpoint
    problem = None if named in (None, *LATEST) else what_is_missing(named)
    if problem is not None:
        raise ValueError(f"The checkpoint {named!r} cannot be resumed: {problem}.")
    with training_args.main_process_first(desc="data"):
        corpus = load_corpus(data_args)
        tokenizer = load_tokenizer(data_args, corpus)
    model = build_model(model_args, tokenizer)
    block_size = data_args.block_size or model.config.max_position_embeddings
    check_fit(model.config, len(tokenizer), block_size)
    with training_args.main_process_first(desc="packing"):
        blocks = pack(corpus, tokenizer, block_size, data_args.preprocessing_num_workers)
    callbacks = build_callbacks(routing_args, training_args.max_steps, blocks["validation"])
    checkpoint = claim_output_folder(run, training_args)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=collate_blocks,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    return trainer, blocks, checkpoint


def main(argv=None):
    """Run the script."""
    model_args, data_args, routing_args, run_args, training_args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO if training_args.should_log else logging.WARNING)
    transformers.utils.logging.set_verbosity_warning()
    set_seed(training_args.seed)

    try:
        trainer, blocks, checkpoint = prepare(model_args, data_args, routing_args, run_args, training_args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if training_args.do_train:
        train(trainer, checkpoint)
    report(trainer, blocks, data_args, run_args.ngram_baselines)


if __name__ == "__main__":
    main()
