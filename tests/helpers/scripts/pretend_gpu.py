"""Run a model on a device that computes nothing, and tell for each case what the host would have waited for.

Tensors are fake, on a device of their own that is no CPU: the code takes the ways that it takes on a GPU, and whatever
needs a value raises. So do copies from and to the host. Prints a JSON object: of each case `null`, or the first wait.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import StaticCache, masking_utils


sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.models import COUNTING, tiny_model, tiny_seq2seq_model
from modeling_stablemoe.measure.meter import RoutingMeter
from modeling_stablemoe.training.loops import drop_idle_gradients


DEVICE = "pretended_gpu"
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.prims.device_put)
# It loops over experts on the host; to a fake tensor it is one operator like any other.
LOOP = torch.ops.transformers.grouped_mm_fallback


class PretendedTensors(FakeTensorMode):
    """Fake tensors of a device that is not there, which nothing must initialise."""

    avoid_device_init = True


class RefuseCopies(TorchDispatchMode):
    """Raises where something is copied between host and device, or left to a loop on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is LOOP:
            raise RuntimeError(f"{func} runs on the host")
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in COPIES:
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            if source.device != result.device and source.numel():
                raise RuntimeError(f"{func} copies from {source.device.type} to {result.device.type}")
        return result


def on_device(model: nn.Module) -> nn.Module:
    """Put fake parameters and buffers in the place of real ones."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
    return model


def make(make_model: Callable, backend: str = "grouped_mm", frozen: bool = False, **config: Any) -> nn.Module:
    # Rows of whole 16 bytes, so that the grouped product itself runs.
    model = make_model(intermediate_size=48, **config).to(torch.bfloat16)
    model.set_experts_implementation(backend)
    if frozen:
        model.freeze_router()
    return model


def batch(padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.empty(3, 7, dtype=torch.long, device=DEVICE)
    return {"input_ids": ids, "labels": ids} | ({"attention_mask": torch.empty_like(ids)} if padded else {})


def train(
    make_model: Callable = tiny_model,
    padded: bool = False,
    use_cache: bool = False,
    watched: bool = False,
    **options: Any,
):
    """Run a forward and a backward pass, with the statistics that the callbacks keep if it is watched."""
    model = make(make_model, **options).train()
    # transformers looks once whether a causal mask of padding hides anything: that wait is its own.
    looks = padded and not model.config.is_encoder_decoder
    ignored = mock.patch.object(masking_utils, "_ignore_causal_mask_sdpa", return_value=False)
    with PretendedTensors(), ignored if looks else nullcontext():
        on_device(model)
        inputs = batch(padded) | {"num_items_in_batch": torch.empty((), dtype=torch.long, device=DEVICE)}
        meter = RoutingMeter(model) if watched else None
        with RefuseCopies():
            model(**inputs, use_cache=use_cache).loss.backward()
            if meter is not None:
                meter.end_step()
                drop_idle_gradients(model)


def decode(masked: bool = False, **options: Any):
    """Decode one token after a prompt, with a static cache, and a mask as long as that if it is masked."""
    model = make(tiny_model, **options).eval()
    with PretendedTensors(), torch.no_grad():
        ids = batch(padded=False)["input_ids"]
        cache = StaticCache(config=on_device(model).config, max_cache_len=16)
        mask = torch.empty(3, 16, dtype=torch.long, device=DEVICE) if masked else None
        # Before the cache holds anything, transformers looks at the mask once.
        model(ids, past_key_values=cache, use_cache=True)
        with RefuseCopies():
            model(ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)


def look(wait: Callable[[torch.Tensor], Any]):
    """Do what waits for the device."""
    with PretendedTensors():
        values = torch.empty(3, device=DEVICE)
        with RefuseCopies():
            wait(values)


def cases() -> dict[str, Callable]:
    found = {
        "look item": partial(look, lambda values: values[0].item()),
        "look if": partial(look, lambda values: bool(values.isfinite().all())),
        "look nonzero": partial(look, lambda values: (values > 0).nonzero()),
        "look mask": partial(look, lambda values: values[values > 0]),
        "look cpu": partial(look, lambda values: values.cpu()),
        "look to": partial(look, lambda values: torch.zeros(3).to(DEVICE)),
    }
    for stage, frozen in (("stage 1", False), ("stage 2", True)):
        everything = {"padded": True, "use_cache": True, "watched": True, "frozen": frozen}
        found[f"train {stage} grouped_mm"] = partial(train, **everything)
        found[f"train {stage} batched_mm"] = partial(train, backend="batched_mm", frozen=frozen)
        found[f"train {stage} seq2seq"] = partial(train, tiny_seq2seq_model, padded=True, watched=True, frozen=frozen)
        found[f"train {stage} cnn"] = partial(train, frozen=frozen, distilled_router="cnn")
        found[f"decode {stage} grouped_mm masked"] = partial(decode, masked=True, frozen=frozen)
        found[f"decode {stage} batched_mm"] = partial(decode, backend="batched_mm", frozen=frozen)
        found[f"decode {stage} cnn masked"] = partial(decode, masked=True, frozen=frozen, distilled_router="cnn")
    variants = {
        "hash": {"router_type": "hash"},
        "switch": {"router_type": "switch"},
        "base": {"router_type": "base"},
        "counting": COUNTING,
        "capacity": {"expert_capacity_factor": 2.0},
        "shared": {"share_experts_in_stage1": True},
    }
    return found | {f"train {name}": partial(train, **config) for name, config in variants.items()}


def first_wait(case: Callable) -> str | None:
    try:
        case()
    except Exception as error:  # noqa: BLE001 - the test reports it
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(DEVICE)
    getattr(torch, DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16]
    # Where tensors are fake, transformers takes them for a tracer's, whose values it does not ask for.
    masking_utils.is_tracing = lambda tensor=None: False
    print(json.dumps({name: first_wait(case) for name, case in cases().items()}))
    sys.stdout.flush()
    os._exit(0)  # torch has started threads for the device, which does not know how to end them
