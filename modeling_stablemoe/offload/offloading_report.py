# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What offloading costs: speed, bytes and memory of a model whose experts are here or there, and a table of it."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from modeling_stablemoe.model.layer_stablemoe import moe_layers_of
from modeling_stablemoe.model.modeling_stablemoe import StableMoEForCausalLM

from .expert_store import expert_parameters
from .offloading import ExpertOffload, experts_on_disk, offload_experts


# Where the experts are, and who fetches them.
ARMS = {
    "memory": "all on the device",
    "offload-host": "ours, host memory",
    "offload-disk": "ours, checkpoint",
    "accelerate-host": "accelerate, host memory",
    "accelerate-disk": "accelerate, checkpoint",
}


class CountingMap(Mapping):
    """Counts the bytes that one of accelerate's hooks takes from where it offloads to.

    Args:
        values (`Mapping`): of the hook.
        counts (`list[int]`): bytes are added to its only number.
    """

    def __init__(self, values: Mapping, counts: list[int]):
        self.values_by_name, self.counts = values, counts

    def __getitem__(self, name: str) -> torch.Tensor:
        """Fetch a tensor."""
        value = self.values_by_name[name]
        self.counts[0] += value.nbytes
        return value

    def __iter__(self):
        """List the names."""
        return iter(self.values_by_name)

    def __len__(self) -> int:
        """Count the names."""
        return len(self.values_by_name)


class Arm:
    """A model that is measured.

    Args:
        name (`str`): of `ARMS`.
        checkpoint (`str` or `Path`): of a causal language model.
        device (`str`): where to compute.
        experts_on_device (`int`): see `offload_experts`.
    """

    def __init__(self, name: str, checkpoint: str | Path, device: str, experts_on_device: int):
        self.device, self.offload, self.moved = device, None, [0]
        if name.startswith("accelerate"):
            place = "disk" if name.endswith("disk") else "cpu"
            places = experts_on_disk(checkpoint, StableMoEForCausalLM)
            places = {module: place if each == "disk" else device for module, each in places.items()}
            self.model = StableMoEForCausalLM.from_pretrained(checkpoint, device_map=places)
            self._count_moved()
            return
        places = experts_on_disk(checkpoint, StableMoEForCausalLM) if name == "offload-disk" else None
        self.model = StableMoEForCausalLM.from_pretrained(checkpoint, device_map=places)
        if name != "offload-disk":
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()  # loading may leave them in the mapped file
        if name == "memory":
            self.model.to(device)
        else:
            self.offload: ExpertOffload = offload_experts(
                self.model, device=device, experts_on_device=experts_on_device
            )

    def _count_moved(self):
        for layer in moe_layers_of(self.model).values():
            for sublayer in layer.expert_stack.sublayers:
                sublayer._hf_hook.weights_map = CountingMap(sublayer._hf_hook.weights_map, self.moved)

    def bytes_moved(self) -> int:
        """Count the bytes of experts that were brought to the device so far."""
        return self.moved[0] if self.offload is None else self.offload.statistics.bytes_moved


def files_of(checkpoint: str | Path) -> list[Path]:
    """List the files with weights of a checkpoint's folder."""
    return sorted(Path(checkpoint).glob("*.safetensors"))


def drop_from_cache(files: list[Path]):
    """Ask the system to forget the contents of files, so that they are read from the disk again."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_in_use(device: str) -> int:
    """Give the peak so far, in bytes: of the CUDA device, else of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not `resource.getrusage`: its peak begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@torch.no_grad()
def measure_arm(
    name: str,
    checkpoint: str | Path,
    *,
    device: str,
    experts_on_device: int,
    prompts: torch.Tensor,
    tokens: torch.Tensor,
    drop_cache: bool,
) -> dict[str, Any]:
    """Measure reading prompts and decoding, in this process.

    The tokens to decode are given, random ones: what a random model would choose repeats itself, and so would its experts.

    Args:
        name (`str`): of `ARMS`.
        checkpoint (`str` or `Path`): of a causal language model in stage 2.
        device (`str`): "cpu" or "cuda".
        experts_on_device (`int`): see `offload_experts`.
        prompts (`torch.LongTensor` of shape `(passes, batch, length)`): read one after the other, the first to warm up.
        tokens (`torch.LongTensor` of shape `(batch, steps)`): decoded one by one, the first two to warm up.
        drop_cache (`bool`): whether to read each forward pass's experts from the disk itself.

    Returns:
        `dict`: of `prefill` and `decoding` the tokens a second, megabytes moved a pass, seconds a pass waited and the hit
        rate; and the peak of memory over what it was before the model, in megabytes.
    """
    before = memory_in_use(device)
    arm = Arm(name, checkpoint, device, experts_on_device)
    files = files_of(checkpoint) if drop_cache else []
    measured: dict[str, Any] = {"arm": name}
    measured["prefill"] = _time_passes(arm, [(ids.to(device), None) for ids in prompts], files, warm_up=1)
    cache = arm.model(tokens[:, :1].to(device), use_cache=True).cache
    steps = [(tokens[:, step : step + 1].to(device), cache) for step in range(1, tokens.shape[1])]
    measured["decoding"] = _time_passes(arm, steps, files, warm_up=1)
    measured["peak_megabytes"] = (memory_in_use(device) - before) / 1e6
    return measured


def _time_passes(arm: Arm, passes: list[tuple], files: list[Path], warm_up: int) -> dict[str, float]:
    """Run forward passes; the median of their times counts, as other programs may run here."""
    seconds, moved = [], 0
    for number, (ids, cache) in enumerate(passes):
        if number == warm_up:
            moved = arm.bytes_moved()
            if arm.offload is not None:
                arm.offload.statistics.reset()
                moved = 0
        drop_from_cache(files)
        began = _now(arm.device)
        arm.model(ids, cache=cache, use_cache=cache is not None, logits_to_keep=1)
        seconds.append(_now(arm.device) - began)
    count = len(passes) - warm_up
    result = {
        "tokens_a_second": passes[0][0].numel() / median(seconds[warm_up:]),
        "megabytes_a_pass": (arm.bytes_moved() - moved) / count / 1e6,
    }
    if arm.offload is not None:
        statistics = arm.offload.statistics
        result["hit_rate"] = statistics.hit_rate
        result["resident_rate"] = statistics.resident / statistics.requests
        result["seconds_waited_a_pass"] = statistics.seconds_waited / count
    return result


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def expert_bytes(model: nn.Module) -> int:
    """Count the bytes of all experts of a model."""
    stacks = [layer.expert_stack for layer in moe_layers_of(model).values()]
    return sum(parameter.nbytes for stack in stacks for _, parameter in expert_parameters(stack))


def combine_rounds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Take the median of each number over several measurements of one arm."""
    combined = {}
    for key, first in rounds[0].items():
        values = [each[key] for each in rounds]
        if isinstance(first, dict):
            combined[key] = combine_rounds(values)
        else:
            combined[key] = first if isinstance(first, str) else median(values)
    return combined


def compare_arms(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Tell how many times as fast as accelerate's offloading ours is, by place and phase."""
    ratios = {}
    for place in ("host", "disk"):
        ours, theirs = measured.get(f"offload-{place}"), measured.get(f"accelerate-{place}")
        if ours is not None and theirs is not None:
            ratios[place] = {
                phase: ours[phase]["tokens_a_second"] / theirs[phase]["tokens_a_second"]
                for phase in ("prefill", "decoding")
            }
    return ratios


def to_markdown(settings: dict[str, Any], measured: dict[str, dict[str, Any]]) -> str:
    """Write a report.

    Args:
        settings (`dict`): what was measured, by name.
        measured (`dict`): of `measure_arm`, by arm.
    """
    lines = ["# Offloaded experts", "", *[f"- {name}: {value}" for name, value in settings.items()], ""]
    lines += [
        "| experts | prefill, tokens/s | MB a pass | hits | decoding, tokens/s | MB a pass | hits | peak memory, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, arm in measured.items():
        cells = [ARMS[name]]
        for phase in ("prefill", "decoding"):
            hits = f"{100 * arm[phase]['hit_rate']:.1f} %" if "hit_rate" in arm[phase] else ""
            cells += [f"{arm[phase]['tokens_a_second']:.1f}", f"{arm[phase]['megabytes_a_pass']:.1f}", hits]
        cells.append(f"{arm['peak_megabytes']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for place, ratio in compare_arms(measured).items():
        name = "host memory" if place == "host" else "the checkpoint"
        lines.append(
            f"From {name}: {ratio['prefill']:.1f} times accelerate's speed in prefill, {ratio['decoding']:.1f} in decoding."
        )
    return "\n".join([*lines, ""])


__all__ = [
    "ARMS",
    "Arm",
    "combine_rounds",
    "compare_arms",
    "drop_from_cache",
    "expert_bytes",
    "files_of",
    "measure_arm",
    "to_markdown",
]
