# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What callbacks are not given: the StableMoE model inside a wrapper, and the checkpoint of a step."""

import json
from pathlib import Path

from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin


def find_stablemoe(model: nn.Module) -> TwoStageRoutingMixin:
    """Find the StableMoE model in `model`, which may wrap it (PEFT, DistributedDataParallel).

    Raises:
        ValueError: if there is none, or if it is dense.
    """
    for module in model.modules():
        if isinstance(module, TwoStageRoutingMixin):
            if not module.moe_layers_by_name:
                raise ValueError(
                    "This StableMoE model is dense (`moe_layer_positions` is empty): it has no routing to freeze or "
                    "to watch. Train it without this callback."
                )
            return module
    raise ValueError(
        f"{type(model).__name__} is not a StableMoE model: this callback needs a model of `modeling_stablemoe`, such as "
        "StableMoEForCausalLM. If it was loaded with `trust_remote_code=True`, import `modeling_stablemoe` first."
    )


def checkpoint_of_step(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint that Trainer has saved at this step.

    A trial of `hyperparameter_search` saves to its own folder inside `output_dir`. Trainer does not pass that folder
    to callbacks, so it is recognised by the `state` that it holds.
    """
    name = f"checkpoint-{state.global_step}"
    folder = Path(args.output_dir) / name
    if not getattr(state, "is_hyper_param_search", False):  # a custom loop may pass less than Trainer
        return folder
    found = [path for path in Path(args.output_dir).glob(f"**/{name}") if _holds(path, state)]
    return max(found, key=lambda path: (path / TRAINER_STATE_NAME).stat().st_mtime_ns, default=folder)


def resumed_checkpoint(args: TrainingArguments, state: TrainerState) -> Path | None:
    """Return the checkpoint from which Trainer resumed; callbacks are not given its path.

    Returns:
        `Path`: `args.resume_from_checkpoint`, or the checkpoint of this step in `output_dir`, whichever holds this
        `state`; `None` if training was not resumed, or was resumed from elsewhere.
    """
    if state.global_step == 0:
        return None
    named = getattr(args, "resume_from_checkpoint", None)  # a custom loop may pass less than Trainer
    folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
    if named is not None:
        folders.insert(0, Path(named))
    return next((folder for folder in folders if _holds(folder, state)), None)


def _holds(checkpoint: Path, state: TrainerState) -> bool:
    """Return True if a checkpoint holds this state. The measured times in its log make it unique to a run."""
    try:
        saved = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    names = ("global_step", "trial_params", "log_history")
    # As text, in which a NaN is equal to itself.
    there, here = [saved.get(name) for name in names], [getattr(state, name) for name in names]
    return json.dumps(there, sort_keys=True) == json.dumps(here, sort_keys=True)


__all__ = ["checkpoint_of_step", "find_stablemoe", "resumed_checkpoint"]
