# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The routing in checkpoints of PEFT, which saves adapters and `modules_to_save` and nothing else.

The frozen routing, and what routers count in stage 1, are integers of the base model. They are written to a file
beside the adapters, and among the adapters too, so that PEFT loads them wherever the folder is.
"""

import logging
import re
import shutil
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modeling_stablemoe.model.losses_stablemoe import is_distributed
from modeling_stablemoe.model.tensors_stablemoe import copy_into, full_tensor

from .atomic_files import replace_file
from .finding import find_stablemoe


logger = logging.getLogger(__name__)

ROUTING_FILE = "stablemoe_routing.safetensors"
# The name that PEFT gives to its file.
_ADAPTERS_FILE = "adapter_model.safetensors"

# What PEFT puts into the names of what it has wrapped.
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.|$)")


def holds_adapters(model: nn.Module) -> bool:
    """Return True if `save_pretrained` writes only adapters: for models of PEFT and after `add_adapter`."""
    return bool(getattr(model, "peft_config", None))


def save_routing(model: nn.Module, folder: str | Path):
    """Add the routing to a checkpoint of adapters; every process must call this.

    It is written to `stablemoe_routing.safetensors`, which `load_routing` reads, and into the adapter file of a
    `PeftModel`, where PEFT puts resized embeddings too: `PeftModel.from_pretrained` and `load_adapter` then restore
    the routing and the stage of the base model.

    Args:
        model (`torch.nn.Module`): a StableMoE model, or what wraps it.
        folder (`str` or `Path`): where the adapters are.

    Raises:
        ValueError: if there is no StableMoE model with MoE layers.
    """
    stablemoe = find_stablemoe(model)
    tensors = {name: full_tensor(values.detach()).cpu() for name, values in _integers(stablemoe).items()}
    fingerprint = stablemoe.router_fingerprint()
    if not is_distributed() or dist.get_rank() == 0:
        metadata = {"router_fingerprint": fingerprint or ""}
        plain = {_WRAPPED.sub("", name): values for name, values in tensors.items()}
        replace_file(Path(folder) / ROUTING_FILE, lambda path: save_file(plain, path, metadata))
        prefix = next(name for name, module in model.named_modules() if module is stablemoe)
        if prefix:  # transformers saves the adapters of `add_adapter` and has no place for other weights
            # PEFT itself saves what `modules_to_save` trains.
            of_base = {
                f"{prefix}.{name}": values for name, values in tensors.items() if ".modules_to_save." not in name
            }
            for path in [*Path(folder).glob(_ADAPTERS_FILE), *Path(folder).glob(f"*/{_ADAPTERS_FILE}")]:
                _add_tensors(path, of_base)


def _add_tensors(path: Path, tensors: dict[str, Tensor]):
    together = {**load_file(path), **tensors}
    replace_file(path, lambda partial: save_file(together, partial, {"format": "pt"}))


def load_routing(model: nn.Module, folder: str | Path):
    """Restore the routing that `save_routing` wrote, and the stage with it; every process must call this.

    Args:
        model (`torch.nn.Module`): the base model that the adapters were trained on, or what wraps it.
        folder (`str` or `Path`): where the adapters are.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another model, or of another frozen routing than the model's; if it is damaged.
    """
    stablemoe, path = find_stablemoe(model), Path(folder) / ROUTING_FILE
    tensors, own = load_file(path), {_WRAPPED.sub("", name): values for name, values in _integers(stablemoe).items()}
    with safe_open(path, framework="pt") as file:
        fingerprint = (file.metadata() or {}).get("router_fingerprint") or None
    if {name: values.shape for name, values in tensors.items()} != {n: full_tensor(p).shape for n, p in own.items()}:
        raise ValueError(
            f"The routing in {str(path)!r} is of a model with other MoE layers, experts or tokens. Load the base model "
            "that the adapters were trained on."
        )
    present = stablemoe.router_fingerprint()
    if None not in (present, fingerprint) and present != fingerprint:
        raise ValueError(
            f"The base model's frozen routing (fingerprint {present}) is not the one that the adapters in {str(folder)!r} "
            f"were trained with ({fingerprint}). Load the base model that they were trained on."
        )
    if present is not None and fingerprint is None:
        logger.warning(
            "The routing in %r is of stage 1: the model learns it again, the frozen one is gone.", str(path)
        )
    for name, values in tensors.items():
        copy_into(own[name], values)
    stablemoe.config.router_fingerprint = fingerprint
    stablemoe.check_routing()


def has_routing(model: nn.Module, is_frozen: bool) -> bool:
    """Return False if a model that was trained (and frozen, if `is_frozen`) has the routing of a new one."""
    stablemoe = find_stablemoe(model)
    if stablemoe.routing_stage == 2:
        return True
    seen = [values for name, values in _integers(stablemoe).items() if ".frozen_router." not in name]
    return not is_frozen and (not seen or any(bool(values.any()) for values in seen))


def copy_routing(checkpoint: str | Path, folder: str | Path):
    """Copy the file that `save_routing` wrote, if there is one."""
    if (Path(checkpoint) / ROUTING_FILE).is_file():
        shutil.copy(Path(checkpoint) / ROUTING_FILE, folder)


def _integers(stablemoe: nn.Module) -> dict[str, Tensor]:
    """Return the integer buffers of the MoE layers by name."""
    return {
        f"{layer}.{name}": values
        for layer, module in stablemoe.moe_layers_by_name.items()
        for name, values in module.named_buffers()
        if not values.is_floating_point() and ".original_module." not in name
    }


__all__ = ["ROUTING_FILE", "copy_routing", "has_routing", "holds_adapters", "load_routing", "save_routing"]
