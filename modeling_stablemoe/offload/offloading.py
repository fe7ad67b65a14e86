# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Inference with experts that do not fit the device: kept in host memory or in the checkpoint, fetched ahead of use.

A router that reads hidden states knows a layer's experts only when that layer is reached. Frozen routing knows those
of all layers from the token ids, so they are copied while earlier blocks compute.
"""

from os import PathLike

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import AutoConfig

from modeling_stablemoe.checkpoints.architectures import MODELS
from modeling_stablemoe.checkpoints.finding import find_stablemoe
from modeling_stablemoe.model.experts_stablemoe import ExpertSublayer, StableMoEExperts
from modeling_stablemoe.model.gated_stablemoe import StableMoEGatedExperts
from modeling_stablemoe.model.layer_stablemoe import StableMoELayer, moe_layers_of
from modeling_stablemoe.model.tensors_stablemoe import is_quantized

from .expert_store import CheckpointFile, FileRows, MemoryRows, expert_parameters, find_rows, offloaded_value
from .offloaded_experts import OffloadedExperts, OffloadStatistics, Transfers


_EXPERTS = (StableMoEExperts, StableMoEGatedExperts)


class ExpertOffload:
    """A model's offloaded experts, as returned by `offload_experts`.

    Attributes:
        model (`torch.nn.Module`): the model.
        statistics (`OffloadStatistics`): hits, bytes and waits so far.
        experts_on_device (`int`): K, slots per MoE layer.
    """

    def __init__(self, model: nn.Module, stacks: dict[str, StableMoEExperts], num_slots: int):
        self.model, self.experts_on_device = model, num_slots
        self.statistics = OffloadStatistics()
        self._stacks, self._transfers = stacks, Transfers()

    def _attach(self, rows: dict[str, dict[str, MemoryRows | FileRows]], device: torch.device):
        for name, layer in moe_layers_of(self.model).items():
            stack = self._stacks[name]
            experts = OffloadedExperts(
                stack, rows[name], self.experts_on_device, device, self._transfers, self.statistics
            )
            setattr(layer, layer.expert_name, experts.train(layer.training))
            layer.fetch_experts = experts.prefetch

    @torch.no_grad()
    def remove(self, device: str | torch.device = "cpu") -> nn.Module:
        """Undo the offloading: bring all experts into memory, move the model to `device` and return it.

        Raises:
            OSError: if experts cannot be read; the model stays as it is.
            ValueError: if `remove` has been called before.
        """
        layers = moe_layers_of(self.model)
        if not all(isinstance(layer.expert_module, OffloadedExperts) for layer in layers.values()):
            raise ValueError("The experts of this model are not offloaded any more: call `offload_experts` again.")
        whole = {}
        for name, layer in layers.items():
            layer.expert_module.settle()
            whole[name] = {key: rows.whole() for key, rows in layer.expert_module.rows.items()}
        for name, layer in layers.items():
            stack = self._stacks[name]
            for key, parameter in list(expert_parameters(stack)):
                _set_parameter(stack, key, whole[name].pop(key), parameter.requires_grad)
            setattr(layer, layer.expert_name, stack.train(layer.training))
            del layer.fetch_experts
        self._transfers.close()
        del find_stablemoe(self.model).hf_device_map
        return self.model.to(device)

    def __str__(self) -> str:
        """Return slots and statistics as one line of text."""
        return f"{self.experts_on_device} experts per layer on the device: {self.statistics}"


@torch.inference_mode(mode=False)  # slots are written to in any mode
@torch.no_grad()
def offload_experts(
    model: nn.Module,
    *,
    device: str | torch.device | None = None,
    experts_on_device: int | None = None,
    max_bytes: int | None = None,
) -> ExpertOffload:
    """Keep a model's experts off the device, and fetch those of a forward pass before it reaches them.

    Everything else moves to the device. Experts stay in host memory, or in the checkpoint's files if the model was
    loaded with `device_map=experts_on_disk(...)`.

    Evaluation and `generate` give the same results as before. Until `remove()`, the model cannot be trained or saved.

    Args:
        model (`torch.nn.Module`): a StableMoE model with frozen routing, loaded in any way, or a wrapper around it.
        device (`str` or `torch.device`, *optional*): where to compute; defaults to an accelerator if there is one.
        experts_on_device (`int`, *optional*): K, how many experts per MoE layer the device has room for, in
            [1, num_experts]. A pass that needs more computes them in waves.
        max_bytes (`int`, *optional*): instead of `experts_on_device`, bytes for the slots of all layers together.

    Returns:
        `ExpertOffload`: statistics, and `remove()` to undo the offloading.

    Raises:
        ValueError: if the model has no MoE layers or is in stage 1, if its experts are quantised, sharded, adapted or
            already offloaded, or if a size is out of range.
    """
    layers = moe_layers_of(model)
    _check_model(layers)
    device = _device_of(device)
    first = next(iter(layers.values())).expert_module
    num_slots = _count_slots(first, len(layers), experts_on_device, max_bytes)
    files: dict[str, CheckpointFile] = {}
    stacks = {name: layer.expert_module for name, layer in layers.items()}
    rows = {
        name: find_rows(f"{name}.{layers[name].expert_name}", stack, files, device.type == "cuda")
        for name, stack in stacks.items()
    }
    _remove_hooks(model, stacks.values())
    for stack in stacks.values():  # `rows` has the values
        for key, parameter in list(expert_parameters(stack)):
            _set_parameter(stack, key, torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    offload = ExpertOffload(model, stacks, num_slots)
    offload._attach(rows, device)
    model.to(device)
    # As accelerate does: pipelines leave such a model where it is, and `generate` does not compile it.
    places = {f"{name}.{layer.expert_name}": "disk" if files else "cpu" for name, layer in layers.items()}
    find_stablemoe(model).hf_device_map = {"": str(device), **places}
    return offload


def experts_on_disk(name_or_path: str | PathLike, model_class: type | None = None, **kwargs) -> dict[str, str]:
    """Return the `device_map` that leaves the experts of a checkpoint in its files.

    Args:
        name_or_path (`str` or `PathLike`): the checkpoint, as for `from_pretrained`; its weights are not read.
        model_class (`type`, *optional*): the class to load it with; defaults to the one that it was saved from.
        **kwargs: passed to `AutoConfig.from_pretrained`, such as `revision`, `subfolder`, `token` and `cache_dir`.

    Returns:
        `dict[str, str]`: "disk" for the experts, "cpu" for everything else.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if it is not a checkpoint of a StableMoE model.
    """
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    name = model_class.__name__ if model_class is not None else (config.architectures or ["nothing"])[0]
    if name not in MODELS:
        raise ValueError(
            f"{str(name_or_path)!r} was saved as {name}, or is to be loaded as that. `model_class` must be one of "
            f"{', '.join(MODELS)}."
        )
    with torch.device("meta"):
        return dict(_places(MODELS[name](config)))


def _places(module: nn.Module, name: str = ""):
    """Yield the outermost modules that are either all experts or without experts, each with its place."""
    if isinstance(module, _EXPERTS):
        yield name, "disk"
    elif name and not any(isinstance(each, _EXPERTS) for each in module.modules()):
        yield name, "cpu"
    else:
        for child_name, child in module.named_children():
            yield from _places(child, f"{name}.{child_name}" if name else child_name)


def _check_model(layers: dict[str, StableMoELayer]):
    if not layers:
        raise ValueError(
            "The model has no MoE layer of this package, so there are no experts to offload: it is dense (`moe_layer_positions` "
            "is empty), or was loaded with `trust_remote_code=True` before `modeling_stablemoe` was imported."
        )
    for name, layer in layers.items():
        stack = layer.expert_module
        if isinstance(stack, OffloadedExperts):
            raise ValueError(f"The experts of `{name}` are offloaded already: call `remove()` of that first.")
        if not layer.frozen_router.is_frozen:
            raise ValueError(
                f"The routing of `{name}` is not frozen (stage 1): hidden states may decide, so that no expert is known ahead. "
                "Call `freeze_router()` first, or load a checkpoint of stage 2."
            )
        if not all(
            isinstance(each, (ExpertSublayer, StableMoEGatedExperts)) for each in getattr(stack, "sublayers", [stack])
        ):
            raise ValueError(
                f"The experts of `{name}` have adapters: merge them into the model first (`merge_and_unload`)."
            )
        for key, parameter in expert_parameters(stack):
            if is_quantized(parameter):
                raise ValueError(
                    f"`{name}.{layer.expert_name}.{key}` is quantised, which cannot be offloaded: load the checkpoint without "
                    "`quantization_config`, or leave the experts out of it."
                )
            is_sharded = hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id")
            if is_sharded or stack.num_experts < layer.num_experts:
                raise ValueError(
                    f"The experts of `{name}` are dealt out to several processes. Offloading is for one process: load the model "
                    "without expert parallelism, FSDP or ZeRO-3."
                )


def _device_of(device: str | torch.device | None) -> torch.device:
    """Return the device with its index, so that it equals the `device` of tensors on it."""
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return torch.empty(0, device=device).device


def _count_slots(
    stack: StableMoEExperts, num_layers: int, experts_on_device: int | None, max_bytes: int | None
) -> int:
    if (experts_on_device is None) == (max_bytes is None):
        raise ValueError("Pass one of `experts_on_device` and `max_bytes`: how many experts the device has room for.")
    if experts_on_device is not None:
        if not 1 <= experts_on_device <= stack.num_experts:
            raise ValueError(f"`experts_on_device` must be in [1, {stack.num_experts}], got {experts_on_device}.")
        return experts_on_device
    one = num_layers * sum(each[0].numel() * each.element_size() for _, each in expert_parameters(stack))
    if max_bytes < one:
        raise ValueError(
            f"`max_bytes` is {max_bytes}, but one expert of each of the {num_layers} MoE layers takes {one} bytes. Pass that "
            "at least, or load the model in a smaller dtype."
        )
    return min(max_bytes // one, stack.num_experts)


def _remove_hooks(model: nn.Module, stacks):
    """Remove accelerate's hooks and bring all weights but the experts' into memory."""
    experts = {module for stack in stacks for module in stack.modules()}
    values = {
        (module, name): offloaded_value(module, name)
        for module in model.modules()
        if module not in experts
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    }
    remove_hook_from_submodules(model)
    for (module, name), value in values.items():
        parameter = getattr(module, name)
        if parameter.is_meta and value is not None:
            _set_parameter(module, name, value, parameter.requires_grad)
    if values and hasattr(model, "tie_weights"):
        model.tie_weights()


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor, requires_grad: bool):
    owner_name, _, key = name.rpartition(".")
    setattr(module.get_submodule(owner_name), key, nn.Parameter(value, requires_grad=requires_grad))
