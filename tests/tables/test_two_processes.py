"""The transition to tables on two real processes (gloo): both count, and both freeze what one alone would."""

import os
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from helpers.many_processes import start
from helpers.moe_families import tiny_moe
from helpers.trainers import make_trainer
from helpers.workplaces import free_port
from modeling_stablemoe.tables import TableTransitionCallback, installed_tables


def outcome(folder: Path, batch_size: int, steps: int, resume: str | None = None, **options) -> torch.Tensor:
    trainer = make_trainer(
        folder,
        TableTransitionCallback(4, 3, 1.5),
        model=tiny_moe("gpt_oss", output_router_logits=True),
        max_steps=steps,
        learning_rate=0.0,
        per_device_train_batch_size=batch_size,
        ddp_find_unused_parameters=False,
        save_strategy="steps",
        save_steps=2,
        save_only_model=True,  # nothing moves, so no optimizer need go on
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return installed_tables(trainer.model)


def process(rank: int, folder: Path, port: str):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
    runs = {"whole": {}, "resumed": {"resume": str(folder / "run" / "checkpoint-2")}}
    for name, options in runs.items():
        AcceleratorState._reset_state()
        GradientState._reset_state()
        try:
            result = outcome(folder / "run", 2, 6, **options)
        except Exception:  # noqa: BLE001 - the test reports it
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}.{rank}.pt")
    torch.distributed.destroy_process_group()


def test_tables_are_those_of_the_tokens_of_both(tmp_path):
    start(process, tmp_path, free_port())
    alone = outcome(tmp_path / "alone", 4, 6)
    for name in ("whole", "resumed"):
        for rank in range(2):
            tables = torch.load(tmp_path / f"{name}.{rank}.pt")
            assert isinstance(tables, torch.Tensor), tables
            assert torch.equal(tables, alone)
