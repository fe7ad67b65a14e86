"""Train a tiny model through both stages, on one process or under torchrun; rank 0 writes what it came to."""

import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments


sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.models import random_ids, tiny_model
from modeling_stablemoe import StageTransitionCallback  # noqa: E402
from modeling_stablemoe.data.text import collate_blocks  # noqa: E402


STEPS, STAGE1_STEPS = 6, 3


class Gradients(TrainerCallback):
    """Keeps the gradients of each step, and the distilled routers after it."""

    def __init__(self):
        self.gradients, self.distilled = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.distilled.append({name: p.detach().clone() for name, p in named if "distilled_router" in name})


def train(folder, batch_size: int, output_router_logits: bool = False, **arguments) -> dict:
    gradients = Gradients()
    trainer = Trainer(
        model=tiny_model(moe_layer_positions=[0, 2], output_router_logits=output_router_logits),
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch_size,
            max_steps=STEPS,
            optim="adamw_torch",
            adam_epsilon=1e-2,  # keeps the rounding of tiny gradients from becoming whole steps
            learning_rate=1e-2,
            weight_decay=0.1,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **arguments,
        ),
        train_dataset=[{"input_ids": row} for row in random_ids(24, 16, seed=1)],
        data_collator=collate_blocks,
        callbacks=[StageTransitionCallback(STAGE1_STEPS), gradients],
    )
    trainer.train()
    return {
        "gradients": gradients.gradients,
        "distilled": gradients.distilled,
        "weights": trainer.model.state_dict(),
        "fingerprint": trainer.model.router_fingerprint(),
        "history": trainer.state.log_history,
        "processes": trainer.args.world_size,
    }


def main():
    folder, batch_size, *options = sys.argv[1:]
    arguments = {}
    if "checkpointing" in options:
        # As an option of TrainingArguments its name differs between versions of transformers.
        arguments["gradient_checkpointing"] = True
    if "no_unused" in options:
        arguments["ddp_find_unused_parameters"] = False
    if "router_logits" in options:
        # What a Trainer would go by that takes the auxiliary loss out of the loss to scale it (transformers, issue 48690).
        arguments["output_router_logits"] = True
    result = train(folder, int(batch_size), **arguments)
    if int(torch.distributed.get_rank()) == 0:
        torch.save(result, Path(folder) / "result.pt")


if __name__ == "__main__":
    main()
