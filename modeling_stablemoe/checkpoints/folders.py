# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Run folders: which run a folder holds, and which of its checkpoints are whole after a crash."""

import json
import logging
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerState

from .atomic_files import replace_file
from .engines import DEEPSPEED, SHARDED_FSDP, TRANSLATION, engine_of, load_weights, wrap_for_evaluation
from .folder_lock import LOCK_FILE
from .manifests import MANIFEST_FILE, compare_with_manifest, expects_manifest


logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
# Arguments of Trainer that change what a run computes; a run can only be resumed with the same values.
_IDENTITY = (
    "max_steps num_train_epochs learning_rate lr_scheduler_type warmup_steps weight_decay adam_beta1 adam_beta2 optim "
    "max_grad_norm seed data_seed bf16 fp16"
).split()
# The division of the batch changes rounding, dropout and the counts of a balance loss, but not what is trained.
_DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
_TOTAL = "total_train_batch_size"


def run_identity(training_args: TrainingArguments, settings: dict) -> dict:
    """Return what identifies a run, JSON-ready: the arguments that change what it computes, and `settings`."""
    processes = training_args.world_size
    arguments = {
        **{name: getattr(training_args, name) for name in (*_IDENTITY, *_DIVISION[:2])},
        "processes": processes,
        _TOTAL: training_args.train_batch_size * training_args.gradient_accumulation_steps * processes,
    }
    return {**settings, **json.loads(json.dumps(arguments, default=str))}


def read_run(model: str | Path) -> dict:
    """Read the settings of the run that made a model or checkpoint; {} where there is no record, as on the Hub."""
    folder = Path(model)
    for record in (folder / RUN_FILE, *([folder.parent / RUN_FILE] if folder.name.startswith("checkpoint-") else [])):
        try:
            settings = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return settings if isinstance(settings, dict) else {}
    return {}


def checkpoints_in(folder: str | Path) -> list[Path]:
    """List the `checkpoint-<step>` folders of a run, complete or not, newest step first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: str | Path) -> int:
    """Return the step in the name of a `checkpoint-<step>` folder."""
    return int(Path(checkpoint).name.split("-")[1])


def what_is_missing(checkpoint: str | Path, checksums: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, `None` if it is whole and as it was saved.

    A checkpoint with a manifest is compared with that; without `checksums`, only the sizes of files are. In a
    checkpoint of a plain `Trainer`, which writes `trainer_state.json` last, no file may be cut off.
    """
    checkpoint = Path(checkpoint)
    if (checkpoint / MANIFEST_FILE).exists():
        return compare_with_manifest(checkpoint, checksums)
    try:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (OSError, ValueError, TypeError) as error:
        return f"trainer_state.json cannot be read ({type(error).__name__}): saving was cut off"
    if expects_manifest(state.stateful_callbacks, state.global_step):
        return f"{MANIFEST_FILE} is missing: saving was cut off"
    files = {path.name for path in checkpoint.glob("*.safetensors")}
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        try:
            files |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError) as error:
            return f"{index.name} cannot be read ({error})"
    return _first_that_is_cut_off(checkpoint, sorted(files))


def _first_that_is_cut_off(checkpoint: Path, safetensors: list[str]) -> str | None:
    """Describe the first file of tensors that is cut off, without reading the tensors."""
    for name in safetensors:
        try:
            with safe_open(checkpoint / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{name} cannot be read ({error})"
    for path in sorted(path for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin")):
        # What torch saves is a zip archive, which has its table of contents at the end.
        if not zipfile.is_zipfile(path):
            return f"{path.name} cannot be read: it was cut off"
    return None


def require_optimizer(checkpoint: str | Path):
    """Refuse to resume a checkpoint without the optimizer: Trainer would silently restart the schedule.

    Raises:
        ValueError: unless the run is finished.
    """
    checkpoint = Path(checkpoint)
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    has_optimizer = any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("global_step*"))  # the latter: DeepSpeed
    if not has_optimizer and state.global_step < state.max_steps:
        raise ValueError(
            f"The checkpoint {str(checkpoint)!r} cannot be resumed: it was saved with `save_only_model`, without the "
            "optimizer. Train its weights in a new run, with `--model_name_or_path`; or save whole checkpoints."
        )


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a run, passing over those that a crash cut off."""
    for checkpoint in checkpoints_in(folder):
        problem = what_is_missing(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("Passing over %s: %s.", checkpoint, problem)
    return None


def check_run_folder(folder: str | Path, identity: dict, *, resume: bool, overwrite: bool):
    """Refuse a folder that this run may not write to; changes nothing.

    Args:
        folder (`str` or `Path`): the run folder.
        identity (`dict`): JSON-ready settings that identify the run; stored in `run.json`.
        resume (`bool`): continue the run that the folder holds, from its last whole checkpoint.
        overwrite (`bool`): delete what the folder holds.

    Raises:
        ValueError: if both flags are given; if the folder holds anything and neither is given; if it holds another run
            than the one to resume (names the settings that differ), or files that belong to no run.
    """
    folder = Path(folder)
    if resume and overwrite:
        raise ValueError("`--resume_from_checkpoint` and `--overwrite_output_dir` exclude each other.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output folder {str(folder)!r} is a file.")
    run_file = folder / RUN_FILE
    # Files that a crash left half-written are no run, nor is a lock.
    occupied = folder.is_dir() and any(
        path.suffix != ".partial" and path.name != LOCK_FILE for path in folder.iterdir()
    )
    if occupied and not run_file.is_file():
        raise ValueError(
            f"The output folder {str(folder)!r} is not empty and holds no run of this script. Choose another "
            "`--output_dir`."
        )
    if occupied and not (resume or overwrite):
        last = _last_whole(folder)
        state, remedy = "without a whole checkpoint yet. Replace it", ""
        if last is not None:
            state, remedy = (
                f"saved up to step {step_of(last)}. Continue it with `--resume_from_checkpoint latest`",
                ", replace it",
            )
        raise ValueError(
            f"The output folder {str(folder)!r} holds a run already, {state}{remedy} with `--overwrite_output_dir`, or choose another "
            "`--output_dir`."
        )
    if occupied and resume:
        _check_identity(run_file, identity)


def _last_whole(folder: Path) -> Path | None:
    whole = (path for path in checkpoints_in(folder) if what_is_missing(path, checksums=False) is None)
    return next(whole, None)


def claim_run_folder(folder: str | Path, identity: dict, *, resume: bool, overwrite: bool) -> Path | None:
    """Claim a folder for this run, if `check_run_folder` accepts it, before anything is written to it.

    If the same total batch is divided in another way over processes and accumulation, a warning says so.

    Returns:
        `Path`: the checkpoint to resume from; `None` to start from the beginning.

    Raises:
        ValueError: if this run may not write to the folder.
    """
    check_run_folder(folder, identity, resume=resume, overwrite=overwrite)
    folder = Path(folder)
    run_file = folder / RUN_FILE
    if overwrite and folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()
    elif run_file.is_file():
        division = _check_identity(run_file, identity)
        if division:
            logger.warning(
                "The batch is divided otherwise than when the run was started (%s): rounding, dropout and what a balance "
                "loss counts change, so the result will not be the same to the bit.",
                division,
            )
        return last_complete_checkpoint(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(run_file, lambda partial: partial.write_text(json.dumps(identity, indent=2) + "\n"))
    return None


def _check_identity(run_file: Path, identity: dict) -> str:
    """Refuse to resume another run; return how the division of the batch differs, or an empty text."""
    try:
        stored = json.loads(run_file.read_text())
    except ValueError as error:
        raise ValueError(f"{str(run_file)!r} is damaged ({error}); choose another `--output_dir`.") from error
    # Runs of earlier versions stored the division of the batch only.
    less_strict = _DIVISION if _TOTAL in stored else ("processes", _TOTAL)
    differing = {
        name: f"{name}: {stored.get(name)!r} there, {identity.get(name)!r} here"
        for name in sorted({*stored, *identity})
        if stored.get(name) != identity.get(name)
    }
    division = "; ".join(differing.pop(name) for name in less_strict if name in differing and name in stored)
    differing = [text for name, text in differing.items() if name not in less_strict]
    if differing:
        raise ValueError(
            f"The output folder {str(run_file.parent)!r} holds another run ({'; '.join(differing)}). Resume with the "
            "settings it was started with, or choose another `--output_dir`."
        )
    return division


def restore_finished_run(trainer: Trainer, checkpoint: str | Path) -> bool:
    """Restore the Trainer of a finished run from its last checkpoint; `Trainer.train` would do one more step.

    Returns:
        `bool`: True if it was restored; False if there are steps left to train, and always under DeepSpeed and
        `SHARDED_STATE_DICT`, which leave this to `Trainer.train`.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if state.global_step < state.max_steps or engine_of(trainer) in (DEEPSPEED, SHARDED_FSDP):
        return False
    state.is_world_process_zero = trainer.is_world_process_zero()
    state.is_local_process_zero = trainer.is_local_process_zero()
    trainer.state = state
    load_weights(trainer, checkpoint)
    trainer.callback_handler.on_train_begin(trainer.args, state, trainer.control)
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        load_weights(trainer, state.best_model_checkpoint)
    wrap_for_evaluation(trainer)
    trainer.callback_handler.on_train_end(trainer.args, state, trainer.control)
    return True


def copy_code_files(checkpoint: str | Path, folder: str | Path):
    """Copy the code files of a checkpoint, if there is one, into a folder."""
    for path in Path(checkpoint).glob("*.py"):
        shutil.copy(path, folder)


def remove_incomplete_checkpoints(folder: str | Path, resumed_step: int = -1):
    """Delete checkpoints that a crash cut off, which `save_total_limit` would keep in place of whole ones.

    Up to `resumed_step`, from which training continues, only the sizes of files are checked.
    """
    for checkpoint in checkpoints_in(folder):
        if what_is_missing(checkpoint, checksums=step_of(checkpoint) > resumed_step) is not None:
            shutil.rmtree(checkpoint)
    shutil.rmtree(Path(folder) / TRANSLATION, ignore_errors=True)


__all__ = [
    "check_run_folder",
    "checkpoints_in",
    "claim_run_folder",
    "copy_code_files",
    "last_complete_checkpoint",
    "read_run",
    "remove_incomplete_checkpoints",
    "require_optimizer",
    "restore_finished_run",
    "run_identity",
    "step_of",
    "what_is_missing",
]
