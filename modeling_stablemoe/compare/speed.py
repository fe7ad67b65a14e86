# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""How fast the trained systems of a comparison are: a training step and generation, by turns in one process."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_stablemoe.benchmark.turns import Spread, compare, take_turns
from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.measure.machine import environment
from modeling_stablemoe.measure.report import format_table

from .comparison import Comparison


SPEED_FILE = "speed.json"


def measure_speed(comparison: Comparison, names: Sequence[str], seed: int, reference: str, rounds: int = 9) -> dict:
    """Time the models that systems have come to, round by round, and write `speed.json`.

    Args:
        comparison (`Comparison`): whose runs are finished.
        names (sequence of `str`): of the systems.
        seed (`int`): of the runs whose models are taken.
        reference (`str`): the system that the others are measured against.
        rounds (`int`): turns of each system.

    Returns:
        `dict`, JSON-ready: `environment`, `reference`, and by system `step` and `token`, each `median`, `low` and `high` of
            the ratio to the reference, and `flops`, the ratio of those of inference.
    """
    device = comparison.training_args.device
    folders = {name: comparison.results_of(name, seed).parent for name in names}
    models = {name: AutoModelForCausalLM.from_pretrained(folder).to(device) for name, folder in folders.items()}
    flops = {name: json.loads(comparison.results_of(name, seed).read_text())["forward_flops"] for name in names}
    times = {
        "step": _turns({name: _step_of(model, comparison) for name, model in models.items()}, rounds),
        "token": _turns({name: _generation_of(model, comparison) for name, model in models.items()}, rounds),
    }
    systems: dict[str, dict[str, Spread | float]] = {
        name: {
            "flops": flops[name] / flops[reference],
            **{what: compare(of, name, reference) for what, of in times.items()},
        }
        for name in names
    }
    speed = {"environment": environment(device), "reference": reference, "systems": systems}
    path = Path(comparison.training_args.output_dir) / SPEED_FILE
    replace_file(path, lambda partial: partial.write_text(json.dumps(speed, indent=1) + "\n"))
    return speed


def speed_table(speed: dict) -> str:
    """Lay the ratios out as a Markdown table: the median over rounds, in brackets its quartiles."""

    def cell(ratio: Spread) -> str:
        return f"{ratio['median']:.2f} [{ratio['low']:.2f}-{ratio['high']:.2f}]"

    rows = [
        {
            "system": name,
            "flops": f"{of['flops']:.2f}",
            "step": cell(of["step"]),
            "step_by_flops": f"{of['step']['median'] / of['flops']:.2f}",
            "token": cell(of["token"]),
        }
        for name, of in speed["systems"].items()
    ]
    headings = {"flops": "FLOPs", "step": "training step", "step_by_flops": "step / FLOPs", "token": "generated token"}
    return f"Against {speed['reference']}:\n\n" + format_table(rows, {"system": "system", **headings})


def _turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times, _ = take_turns(runs, rounds=rounds, always=tuple(runs))
    return times


def _step_of(model: PreTrainedModel, comparison: Comparison) -> Callable[[], object]:
    rows = comparison.blocks["train"][: comparison.training_args.per_device_train_batch_size]["input_ids"]
    input_ids = torch.as_tensor(rows, device=model.device)

    def run():
        model.train()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def _generation_of(model: PreTrainedModel, comparison: Comparison) -> Callable[[], object]:
    # One sequence: a quarter of a block is read, half of one is written.
    row = torch.as_tensor(comparison.blocks["validation"][0]["input_ids"], device=model.device)
    prompt, new = row[: len(row) // 4].unsqueeze(0), len(row) // 2
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

    def run():
        model.eval().generate(prompt, **options)

    return run
