#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Measure what routing statistics cost: steps with and without them, by turns, in one run.

python scripts/measure_statistics.py
python scripts/measure_statistics.py --model_preset configuration/models/compare-h200.json --batch_size 32
"""

import time
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments, set_seed

from modeling_stablemoe import RoutingStatisticsCallback, StableMoEForCausalLM
from modeling_stablemoe.model import RoutingHealth
from modeling_stablemoe.runs import load_preset, one_line_errors, parse_options, parse_overrides, quiet_libraries


# Warm-up steps, which are not counted.
WARM_UP = 3


@dataclass
class MeasureArguments:
    """What to measure."""

    model_preset: str = field(
        default="configuration/models/cpu-small.json", metadata={"help": "Shape of the language model."}
    )
    config_overrides: str = field(
        default="{}", metadata={"help": """Fields of the preset to change, as JSON: '{"num_experts": 512}'."""}
    )
    batch_size: int = field(default=8, metadata={"help": "Sequences of a step, as long as the model takes."})
    steps: int = field(default=40, metadata={"help": "Steps of each kind in each stage, after three to warm up."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between two logs."})
    seed: int = field(default=0, metadata={"help": "Of weights and tokens."})

    def __post_init__(self):
        """Check the numbers."""
        for name, least in (("batch_size", 1), ("steps", 2), ("logging_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be >= {least}, got {getattr(self, name)}")

    @property
    def overrides(self) -> dict:
        """`dict`: `config_overrides`, parsed."""
        return parse_overrides(self.config_overrides)


class WithoutHealth(StableMoEForCausalLM):
    """A model that does not measure the health of its routing."""

    def _health_of(self, routing, mask):
        return RoutingHealth(*[torch.zeros((), device=self.device)] * len(RoutingHealth._fields))


class Arm:
    """A model that trains alone, with or without statistics.

    Args:
        config (`StableMoEConfig`): of the model.
        args (`MeasureArguments`): batch size, steps between logs, seed.
        is_watched (`bool`): whether a `RoutingStatisticsCallback` watches.
        is_measured (`bool`): whether the model takes the health of its routing, which every training step does.
    """

    def __init__(self, config, args: MeasureArguments, device: str, is_watched: bool, is_measured: bool):
        set_seed(args.seed)
        model_class = StableMoEForCausalLM if is_measured else WithoutHealth
        self.model = model_class(config).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.state, self.control, self.logging_steps = TrainerState(), TrainerControl(), args.logging_steps
        self.args = TrainingArguments("unused", report_to="none")
        self.device, self.callback, self.seconds = device, None, []
        if is_watched:
            self.callback = RoutingStatisticsCallback()
            self._call("on_train_begin", model=self.model)

    def _call(self, event: str, **kwargs):
        if self.callback is not None:
            getattr(self.callback, event)(self.args, self.state, self.control, **kwargs)

    def step(self, ids: torch.Tensor):
        """Train a step as `Trainer` does, and time it."""
        began = self._now()
        self._call("on_step_begin")
        self.model(
            ids, labels=ids, num_items_in_batch=torch.tensor(ids[:, 1:].numel(), device=ids.device)
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self._call("on_step_end")
        if self.state.global_step % self.logging_steps == 0:
            self._call("on_log", logs={"loss": 0.0})
        self.seconds.append(self._now() - began)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()  # other programs on this machine do not count


def take_turns(arms: dict[str, Arm], ids: torch.Tensor, steps: int) -> dict[str, list[float]]:
    """Let the arms take steps in turn; return the seconds of each step by arm."""
    names = list(arms)
    for step in range(steps + WARM_UP):
        for name in names[step % len(names) :] + names[: step % len(names)]:  # so that no arm is always first
            arms[name].step(ids)
    return {name: arm.seconds[-steps:] for name, arm in arms.items()}


def ratios(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the time that statistics add to each step, in percent."""
    pairs = {
        "the model's own": ("bare", "no callback"),
        "the callback's": ("no callback", "callback"),
        "together": ("bare", "callback"),
    }
    return {
        name: [100 * (more / less - 1) for less, more in zip(seconds[base], seconds[other], strict=True)]
        for name, (base, other) in pairs.items()
    }


def measure(args: MeasureArguments) -> dict[int, dict[str, list[float]]]:
    """Measure both stages; return the seconds of each step, by stage and arm.

    Raises:
        OSError, ValueError: for a shape that does not load.
    """
    config = load_preset(args.model_preset, **args.overrides)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = {"bare": (False, False), "no callback": (False, True), "callback": (True, True)}
    arms = {name: Arm(config, args, device, *kind) for name, kind in kinds.items()}
    ids = torch.randint(config.vocab_size, (args.batch_size, config.max_position_embeddings)).to(device)
    print(f"{device}, {torch.get_num_threads()} threads, {ids.numel()} tokens a step, {args.steps} steps of each kind")
    stages = {1: take_turns(arms, ids, args.steps)}
    for arm in arms.values():
        arm.model.freeze_router()
    return {**stages, 2: take_turns(arms, ids, args.steps)}


def main(argv=None):
    """Run the script."""
    with one_line_errors():
        args = parse_options(MeasureArguments, __doc__, argv)
        quiet_libraries()
        measured = measure(args)
    for stage, seconds in measured.items():
        print(f"stage {stage}")
        for name, values in seconds.items():
            print(f"  {name:<16}{1000 * median(values):9.2f} ms a step")
        for name, values in ratios(seconds).items():
            low, middle, high = quantiles(values, n=4)
            print(f"  {name:<16}{middle:+9.2f} % (quartiles {low:+.2f} to {high:+.2f})")


if __name__ == "__main__":
    main()
