# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Resume a checkpoint under another engine than the one that saved it: one process and DDP, FSDP, DeepSpeed.

One process and DDP write the same files. FSDP (`FULL_STATE_DICT`) writes weights and moments whole, too, but under other
names and with moments keyed by the parameter's name instead of its index: these are translated. What is sharded over
processes (`SHARDED_STATE_DICT`, DeepSpeed) can only be resumed by the engine that wrote it.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import Trainer, TrainerCallback


logger = logging.getLogger(__name__)

PLAIN, FSDP, SHARDED_FSDP, DEEPSPEED = "one process or DDP", "FSDP", "FSDP with SHARDED_STATE_DICT", "DeepSpeed"
_FULL_WEIGHTS, _NAMED_MOMENTS, _COUNTED_MOMENTS = f"{FSDP_MODEL_NAME}.bin", "optimizer.bin", "optimizer.pt"
# In the output folder, where all processes see it.
TRANSLATION = "translated-checkpoint.partial"


def engine_of_checkpoint(checkpoint: str | Path) -> str:
    """Return the engine that wrote a checkpoint, judged by its files."""
    checkpoint = Path(checkpoint)
    if any(checkpoint.glob("global_step*")):
        return DEEPSPEED
    if any(path.is_dir() for path in checkpoint.glob(f"{FSDP_MODEL_NAME}_*")):
        return SHARDED_FSDP
    return FSDP if (checkpoint / _FULL_WEIGHTS).is_file() else PLAIN


def engine_of(trainer: Trainer) -> str:
    """Return the engine under which a Trainer trains."""
    if trainer.is_deepspeed_enabled:
        return DEEPSPEED
    if not trainer.is_fsdp_enabled:
        return PLAIN
    is_full = "FULL" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    return FSDP if is_full else SHARDED_FSDP


def check_engine(trainer: Trainer, checkpoint: str | Path):
    """Check that a Trainer can resume a checkpoint, whatever engine saved it.

    Raises:
        ValueError: if the checkpoint is sharded and was saved by another engine, or by DeepSpeed on another number of
            processes or with another choice of ZeRO-3.
    """
    checkpoint = Path(checkpoint)
    saved, here = engine_of_checkpoint(checkpoint), engine_of(trainer)
    processes = trainer.args.world_size
    if saved != here and not {saved, here} <= {PLAIN, FSDP}:
        raise ValueError(
            f"The checkpoint {str(checkpoint)!r} was saved under {saved} and cannot be resumed under {here}. Resume it "
            f"with the configuration of accelerate it was saved with. Only checkpoints of one process, DDP and FSDP "
            f"with FULL_STATE_DICT go from one to another; {_remedy(checkpoint)}"
        )
    if saved == DEEPSPEED:
        _check_deepspeed(trainer, checkpoint)
        return
    states = len(list(checkpoint.glob("rng_state*.pth")))
    if states != processes:
        logger.warning(
            "The checkpoint %s was saved on %d processes, here are %d: dropout draws other numbers from here on.",
            checkpoint,
            states,
            processes,
        )


def _check_deepspeed(trainer: Trainer, checkpoint: Path):
    parts, processes = len(list(checkpoint.glob("global_step*/*optim_states.pt"))), trainer.args.world_size
    if parts and parts != processes:
        raise ValueError(
            f"The checkpoint {str(checkpoint)!r} was saved by DeepSpeed on {parts} processes, here are {processes}; "
            f"DeepSpeed does not divide it again. Resume it on {parts} processes; {_remedy(checkpoint)}"
        )
    was_zero3 = any(checkpoint.glob("global_step*/zero_pp_rank_*model_states.pt"))
    if was_zero3 != (trainer.accelerator.state.deepspeed_plugin.zero_stage == 3):
        raise ValueError(
            f"The checkpoint {str(checkpoint)!r} was saved {'with' if was_zero3 else 'without'} ZeRO-3, here it is the "
            f"other way round. Resume it with the stage it was saved with; {_remedy(checkpoint)}"
        )


def _remedy(checkpoint: Path) -> str:
    if engine_of_checkpoint(checkpoint) == SHARDED_FSDP:
        return "or merge its weights with `accelerate merge-weights` and start a new run from them."
    return f"or start a new run from its weights with `--model_name_or_path {checkpoint}`."


@contextmanager
def translated(trainer: Trainer, checkpoint: str | Path) -> Iterator[str]:
    """Provide a checkpoint that passed `check_engine` in the form that the engine of an untrained `trainer` reads.

    Yields:
        `str`: the checkpoint itself, or a folder with the translated files and links to the others. That folder is
        deleted after the first step, when everything in it has been read.
    """
    saved, here = engine_of_checkpoint(checkpoint), engine_of(trainer)
    folder = Path(trainer.args.output_dir) / TRANSLATION
    if saved == here:
        yield str(checkpoint)
        return
    logger.info("Translating %s from the form of %s to that of %s.", checkpoint, saved, here)
    # On all processes: the tables decide the stage of a model, which must be the same everywhere.
    load_weights(trainer, checkpoint)
    with trainer.args.main_process_first(local=False, desc="translated checkpoint"):
        if trainer.is_world_process_zero():
            _translate(trainer, Path(checkpoint), folder, here)
    trainer.add_callback(_RemoveFolderCallback(folder))
    yield str(folder)
    trainer.remove_callback(_RemoveFolderCallback)


class _RemoveFolderCallback(TrainerCallback):
    """Deletes a translated checkpoint after the first step, when it has been read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            shutil.rmtree(self.folder, ignore_errors=True)


def _translate(trainer: Trainer, checkpoint: Path, folder: Path, here: str):
    folder.mkdir(parents=True)
    translated_names = {_FULL_WEIGHTS, _NAMED_MOMENTS, _COUNTED_MOMENTS}
    for path in checkpoint.iterdir():
        if path.name not in translated_names:
            (folder / path.name).symlink_to(path.resolve())
    model, optimizer = trainer.model, trainer.optimizer
    trainer.create_optimizer()
    if here == FSDP:
        torch.save(model.state_dict(), folder / _FULL_WEIGHTS)
        # FSDP needs moments for all parameters: zeros for those that have had no gradient yet.
        moments = get_optimizer_state_dict(model, trainer.optimizer)
        trainer.optimizer.load_state_dict(_load(checkpoint / _COUNTED_MOMENTS))
        saved = get_optimizer_state_dict(model, trainer.optimizer)
        torch.save({**saved, "state": {**moments["state"], **saved["state"]}}, folder / _NAMED_MOMENTS)
    else:
        set_optimizer_state_dict(model, trainer.optimizer, _load(checkpoint / _NAMED_MOMENTS))
        torch.save(trainer.optimizer.state_dict(), folder / _COUNTED_MOMENTS)
    # Trainer creates its own optimizer once the model is wrapped.
    trainer.optimizer = optimizer


def _load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(trainer: Trainer, checkpoint: str | Path):
    """Load the weights of an unsharded checkpoint into a Trainer that has not wrapped its model yet."""
    if engine_of(trainer) == PLAIN and engine_of_checkpoint(checkpoint) == PLAIN:
        trainer._load_from_checkpoint(str(checkpoint))
        return
    # FSDP writes the ordinary files, too. Tied weights may be missing from them.
    for path in sorted(Path(checkpoint).glob("model*.safetensors")):
        trainer.model.load_state_dict(load_file(path), strict=False)


def wrap_for_evaluation(trainer: Trainer):
    """Let FSDP2 shard the model of a Trainer that does not train; accelerate needs an optimizer for that."""
    if engine_of(trainer) != FSDP:
        return
    trainer.create_optimizer()
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model


__all__ = [
    "DEEPSPEED",
    "FSDP",
    "PLAIN",
    "SHARDED_FSDP",
    "TRANSLATION",
    "check_engine",
    "engine_of",
    "engine_of_checkpoint",
    "load_weights",
    "translated",
    "wrap_for_evaluation",
]
