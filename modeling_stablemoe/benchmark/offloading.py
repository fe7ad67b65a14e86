# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What offloading costs: speed, bytes and memory of a model whose experts are here or there, and a table of it."""

import os
from collections import UserDict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.benchmark import timer

from modeling_stablemoe.measure.machine import peak_memory
from modeling_stablemoe.model.layer_stablemoe import moe_layers_of
from modeling_stablemoe.model.modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.offload.offloading import ExpertOffload, experts_on_disk, offload_experts

from .turns import Spread, compare


# Where the experts are, and who fetches them.
ARMS = {
    "memory": "all on the device",
    "offload-host": "ours, host memory",
    "offload-disk": "ours, checkpoint",
    "accelerate-host": "accelerate, host memory",
    "accelerate-disk": "accelerate, checkpoint",
}


# What our own ways are compared with.
COMPARED = (
    ("offload-host", "memory"),
    ("offload-disk", "memory"),
    ("offload-host", "accelerate-host"),
    ("offload-disk", "accelerate-disk"),
)
PHASES = ("prefill", "decoding")


class _CountingMap(UserDict):
    """The values of one of accelerate's hooks; adds the bytes that are taken from it to the only number of `counts`."""

    def __init__(self, values: Mapping, counts: list[int]):
        self.data, self.counts = values, counts  # not copied: what is on the disk stays there

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self.data[name]
        self.counts[0] += value.nbytes
        return value


class _Arm:
    """A model that is measured."""

    def __init__(self, name: str, checkpoint: str | Path, device: str, experts_on_device: int):
        self.offload: ExpertOffload | None = None
        self.moved = [0]
        places = None
        if name not in ("memory", "offload-host"):
            places = experts_on_disk(checkpoint, StableMoEForCausalLM)
        if name.startswith("accelerate"):
            place = "disk" if name.endswith("disk") else "cpu"
            places = {module: place if each == "disk" else device for module, each in places.items()}
        self.model = StableMoEForCausalLM.from_pretrained(checkpoint, device_map=places)
        if name.startswith("accelerate"):
            for layer in moe_layers_of(self.model).values():
                for module in layer.expert_module.modules():
                    if next(module.parameters(recurse=False), None) is not None:
                        module._hf_hook.weights_map = _CountingMap(module._hf_hook.weights_map, self.moved)
            return
        if places is None:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()  # loading may leave them in the mapped file
        if name == "memory":
            self.model.to(device)
        else:
            self.offload = offload_experts(self.model, device=device, experts_on_device=experts_on_device)

    def bytes_moved(self) -> int:
        """Return the bytes of experts that were brought to the device so far."""
        return self.moved[0] if self.offload is None else self.offload.statistics.bytes_moved


def files_of(checkpoint: str | Path) -> list[Path]:
    """List the files with weights of a checkpoint's folder."""
    return sorted(Path(checkpoint).glob("*.safetensors"))


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
        experts_on_device (`int`): slots of each MoE layer.
        prompts (`torch.LongTensor` of shape `(passes, batch, length)`): read one after the other, the first to warm up.
        tokens (`torch.LongTensor` of shape `(batch, steps)`): decoded one by one, the first two to warm up.
        drop_cache (`bool`): whether to read each forward pass's experts from the disk itself.

    Returns:
        `dict`: of `prefill` and `decoding` the tokens per second, megabytes moved and seconds waited per pass, and the hit
        rate; and the peak of memory over what it was before the model, in megabytes.
    """
    before = peak_memory(torch.device(device))
    arm = _Arm(name, checkpoint, device, experts_on_device)
    files = files_of(checkpoint) if drop_cache else []
    measured: dict[str, Any] = {"arm": name}
    measured["prefill"] = _time_passes(arm, [(ids.to(device), None) for ids in prompts], files)
    cache = arm.model(tokens[:, :1].to(device), use_cache=True).cache
    steps = [(tokens[:, step : step + 1].to(device), cache) for step in range(1, tokens.shape[1])]
    measured["decoding"] = _time_passes(arm, steps, files)
    measured["peak_megabytes"] = (peak_memory(torch.device(device)) - before) / 1e6
    return measured


def _time_passes(arm: _Arm, passes: list[tuple], files: list[Path]) -> dict[str, float]:
    """Run forward passes, the first to warm up; the median of their times counts, as other programs may run here."""
    seconds, moved = [], 0
    statistics = arm.offload and arm.offload.statistics
    for number, (ids, cache) in enumerate(passes):
        if number == 1:
            if statistics is not None:
                statistics.reset()
            moved = arm.bytes_moved()
        for path in files:
            with path.open("rb") as file:  # so that it is read from the disk again
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = timer()
        arm.model(ids, cache=cache, use_cache=cache is not None, logits_to_keep=1)
        seconds.append(timer() - began)
    count = len(passes) - 1
    result = {
        "tokens_a_second": passes[0][0].numel() / median(seconds[1:]),
        "megabytes_a_pass": (arm.bytes_moved() - moved) / count / 1e6,
    }
    if statistics is not None:
        result["hit_rate"] = statistics.hit_rate
        result["resident_rate"] = statistics.resident / statistics.requests
        result["seconds_waited_a_pass"] = statistics.seconds_waited / count
    return result


def combine_rounds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Take the median of each number over several measurements of one arm."""

    def combine(values: list):
        if isinstance(values[0], dict):
            return combine_rounds(values)
        return values[0] if isinstance(values[0], str) else median(values)

    return {key: combine([each[key] for each in rounds]) for key in rounds[0]}


def compare_arms(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Spread]]:
    """Return how many times as fast our offloading is as all in memory, and as accelerate's: by pair and phase."""
    ratios = {}
    for ours, theirs in COMPARED:
        if ours in rounds and theirs in rounds:
            speeds = {
                phase: {name: [each[phase]["tokens_a_second"] for each in rounds[name]] for name in (ours, theirs)}
                for phase in PHASES
            }
            ratios[f"{ours} / {theirs}"] = {phase: compare(speeds[phase], ours, theirs) for phase in PHASES}
    return ratios


def to_markdown(settings: dict[str, Any], rounds: dict[str, list[dict[str, Any]]]) -> str:
    """Write a report.

    Args:
        settings (`dict`): what was measured, by name.
        rounds (`dict`): by arm, what `measure_arm` returned in each round.
    """
    lines = ["# Offloaded experts", "", *[f"- {name}: {value}" for name, value in settings.items()], ""]
    lines += [
        "| experts | prefill, tokens/s | MB a pass | hits | decoding, tokens/s | MB a pass | hits | peak memory, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, of_arm in rounds.items():
        arm, cells = combine_rounds(of_arm), [ARMS[name]]
        for phase in PHASES:
            hits = f"{100 * arm[phase]['hit_rate']:.1f} %" if "hit_rate" in arm[phase] else ""
            cells += [f"{arm[phase]['tokens_a_second']:.1f}", f"{arm[phase]['megabytes_a_pass']:.1f}", hits]
        cells.append(f"{arm['peak_megabytes']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "How many times as fast, the median over rounds with its quartiles:", ""]
    for pair, ratio in compare_arms(rounds).items():
        ours, theirs = (ARMS[name] for name in pair.split(" / "))
        texts = [f"{each['median']:.2f} [{each['low']:.2f}-{each['high']:.2f}] in {p}" for p, each in ratio.items()]
        lines.append(f"- {ours} / {theirs}: {', '.join(texts)}")
    return "\n".join([*lines, ""])
