#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Measure what routing statistics cost: steps with and without them, by turns, in one run.

python scripts/measure_statistics.py
python scripts/measure_statistics.py --model_preset configuration/models/compare-h200.json --batch_size 32
"""

import logging
import time
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
import transformers
from transformers import HfArgumentParser, TrainerControl, TrainerState, TrainingArguments, set_seed

from modeling_stablemoe import RoutingStatisticsCallback, StableMoEForCausalLM
from modeling_stablemoe.health_stablemoe import RoutingHealth
from modeling_stablemoe.recipes import load_preset


@dataclass
class MeasureArguments:
    """What to measure."""

    model_preset: str = field(
        default="configuration/models/cpu-small.json", metadata={"help": "Shape of the language model."}
    )
    batch_size: int = field(default=8, metadata={"help": "Sequences of a step, as long as the model takes."})
    steps: int = field(default=40, metadata={"help": "Steps of each kind in each stage, after three to warm up."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between two logs."})
    seed: int = field(default=0, metadata={"help": "Of weights and tokens."})

    def __post_init__(self):
        """Check the numbers."""
        for name in ("batch_size", "steps", "logging_steps"):
            if getattr(self, name) < (2 if name == "steps" else 1):
                raise ValueError(f"--{name} is too small: {getattr(self, name)}")


class Arm:
    """A model that trains alone, with or without statistics.

    Args:
        config (`StableMoEConfig`): of the model.
        args (`MeasureArguments`): see there.
        is_watched (`bool`): whether a `RoutingStatisticsCallback` watches.
        is_measured (`bool`): whether the model takes the health of its routing, which every training step does.
    """

    def __init__(self, config, args: MeasureArguments, device: str, is_watched: bool, is_measured: bool):
        set_seed(args.seed)
        self.model = StableMoEForCausalLM(config).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.state, self.control, self.logging_steps = TrainerState(), TrainerControl(), args.logging_steps
        self.args = TrainingArguments("unused", report_to="none")
        self.device, self.callback, self.seconds = device, None, []
        if not is_measured:
            nothing = RoutingHealth(*[torch.zeros((), device=device)] * len(RoutingHealth._fields))
            self.model.model.routing_health = lambda *_: [nothing] * config.num_moe_layers
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


def compare(arms: dict[str, Arm], ids: torch.Tensor, steps: int):
    """Let the arms take their steps by turns, and print what each kind of step takes."""
    names = list(arms)
    for step in range(steps + 3):
        for name in names[step % len(names) :] + names[: step % len(names)]:  # none is always first
            arms[name].step(ids)
    kept = {name: arm.seconds[-steps:] for name, arm in arms.items()}
    for name, seconds in kept.items():
        print(f"  {name:<28}{1000 * median(seconds):9.2f} ms a step")
    for name, base in (("model's own", "bare"), ("callback's", "no callback"), ("together", "bare")):
        other = "no callback" if name == "model's own" else "callback"
        ratios = [100 * (b / a - 1) for a, b in zip(kept[base], kept[other], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        mean = 100 * (sum(kept[other]) / sum(kept[base]) - 1)
        print(f"  {name:<28}{middle:+9.2f} % (quartiles {low:+.2f} to {high:+.2f}; of the sums {mean:+.2f})")


def main(argv=None):
    """Run the script."""
    (args,) = HfArgumentParser(MeasureArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(argv)
    logging.basicConfig(format="%(name)s: %(message)s")
    transformers.utils.logging.set_verbosity_error()
    try:
        config = load_preset(args.model_preset)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = {"bare": (False, False), "no callback": (False, True), "callback": (True, True)}
    arms = {name: Arm(config, args, device, *kind) for name, kind in kinds.items()}
    ids = torch.randint(config.vocab_size, (args.batch_size, config.max_position_embeddings)).to(device)
    print(f"{device}, {torch.get_num_threads()} threads, {ids.numel()} tokens a step, {args.steps} steps of each kind")
    for stage in (1, 2):
        if stage == 2:
            for arm in arms.values():
                arm.model.freeze_router()
        print(f"stage {stage}")
        compare(arms, ids, args.steps)


if __name__ == "__main__":
    main()
