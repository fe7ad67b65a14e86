#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Train a StableMoE language model in a plain loop, without Trainer, on one process or several: to copy and change.

accelerate launch scripts/train_with_accelerate.py --model_preset configuration/models/tiny.json --stage1_steps 20 --output_dir runs/loop
python scripts/train_with_accelerate.py --model_name_or_path runs/loop --tokenizer_name runs/loop --output_dir runs/further
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedType
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, get_scheduler, set_seed

from modeling_stablemoe.data import DataArguments, collate_blocks, load_corpus, load_tokenizer, pack
from modeling_stablemoe.runs import ModelArguments, build_model, check_fit, parse_recipe
from modeling_stablemoe.training import check_same_routing, drop_idle_gradients, freeze_router, parameter_groups


@dataclass
class LoopArguments:
    """What the loop does; the other arguments are those of `run_clm.py`."""

    output_dir: str = field(metadata={"help": "Where the trained model goes."})
    max_steps: int = field(default=100, metadata={"help": "Optimizer steps."})
    stage1_steps: int | None = field(
        default=None, metadata={"help": "The routing is frozen after this step. Unset: the model's is frozen already."}
    )
    batch_size: int = field(default=8, metadata={"help": "Blocks of a micro-batch, on each process."})
    accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches of a step, on each process."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Highest learning rate; it falls linearly to 0."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between prints."})
    save_steps: int | None = field(default=None, metadata={"help": "Steps between states to resume from."})
    resume_from: str | None = field(default=None, metadata={"help": "A `state-<step>` folder of the output folder."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, data order and dropout."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on CPUs, whatever else there is."})


def check_stage(model: PreTrainedModel, arguments: LoopArguments):
    """Refuse a stage 1 that never ends, or that is over before it begins."""
    if model.routing_stage == 2 and arguments.stage1_steps is not None:
        raise ValueError("The model's routing is frozen already: leave `--stage1_steps` out.")
    if model.routing_stage == 1 and not 1 <= (arguments.stage1_steps or 0) <= arguments.max_steps:
        raise ValueError(
            f"The model's routing is not frozen yet: `--stage1_steps` must lie in 1..{arguments.max_steps} (the steps of the "
            f"run), got {arguments.stage1_steps}."
        )


def steps_of(loader: DataLoader, arguments: LoopArguments, first: int) -> Iterator[tuple[int, list[dict]]]:
    """Yield the number and the micro-batches of each step, starting at step `first` and cycling through the data."""
    step, epoch, batches = 0, 0, []
    while True:
        loader.set_epoch(epoch)
        for batch in loader:
            batches.append(batch)
            if len(batches) == arguments.accumulation_steps:
                step += 1
                if step >= first:
                    yield step, batches
                if step == arguments.max_steps:
                    return
                batches = []
        epoch += 1


def backward(accelerator: Accelerator, model, batches: list[dict]) -> torch.Tensor:
    """Compute the gradients of a step; return its loss, a mean over the targets of all processes."""
    targets = sum(accelerator.unwrap_model(model).count_targets(batch["labels"]) for batch in batches)
    targets = accelerator.reduce(targets)
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        # Processes exchange gradients once per step.
        with accelerator.no_sync(model) if number < len(batches) else nullcontext():
            # Each loss is this micro-batch's share of the mean over all targets; routing losses get the same weight.
            loss = model(**batch, num_items_in_batch=targets).loss
            # Processes average their gradients; what is wanted is the sum.
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    return accelerator.reduce(total)


def train(accelerator: Accelerator, model: PreTrainedModel, blocks, arguments: LoopArguments) -> PreTrainedModel:
    """Train to the end, through the transition; return the model."""
    loader = DataLoader(blocks, arguments.batch_size, shuffle=True, collate_fn=collate_blocks, drop_last=True)
    groups = parameter_groups(model, arguments.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98))
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=arguments.max_steps)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(scheduler)
    done = 0
    if arguments.resume_from is not None:
        accelerator.load_state(arguments.resume_from)  # the weights include the stage
        done = scheduler.last_epoch
    check_same_routing(model, "at the start of training")
    wrapped.train()
    for step, batches in steps_of(loader, arguments, done + 1):
        loss = backward(accelerator, wrapped, batches)
        accelerator.clip_grad_norm_(wrapped.parameters(), arguments.max_grad_norm)
        drop_idle_gradients(wrapped)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == arguments.stage1_steps:
            freeze_router(wrapped)
        if step % arguments.logging_steps == 0:
            accelerator.print(f"step {step}: loss {loss.item():.4f}, stage {model.routing_stage}")
        if arguments.save_steps and step % arguments.save_steps == 0:
            accelerator.save_state(Path(arguments.output_dir) / f"state-{step}")
    return accelerator.unwrap_model(wrapped)


def main(argv=None):
    """Run the script."""
    types = (ModelArguments, DataArguments, LoopArguments)
    model_args, data_args, arguments = parse_recipe(types, __doc__, argv)
    set_seed(arguments.seed)
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=arguments.seed)
    accelerator = Accelerator(cpu=arguments.use_cpu, dataloader_config=order)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise SystemExit(
            "error: this loop knows one process and DistributedDataParallel; scripts/run_clm.py knows all engines."
        )
    try:
        with accelerator.main_process_first():
            corpus = load_corpus(data_args)
            tokenizer = load_tokenizer(data_args, corpus)
            model = build_model(model_args, AutoModelForCausalLM, tokenizer)
            block_size = data_args.block_size or model.config.max_position_embeddings
            check_fit(model.config, len(tokenizer), block_size=block_size)
            check_stage(model, arguments)
            blocks = pack(corpus, tokenizer, block_size)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    model = train(accelerator, model, blocks["train"], arguments)
    model.save_pretrained(arguments.output_dir, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(arguments.output_dir)
    accelerator.print(f"Saved to {arguments.output_dir}; routing fingerprint {model.router_fingerprint()}.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
