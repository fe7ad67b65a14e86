#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Measure what offloaded experts cost, beside all in memory and beside accelerate's own offloading.

Each is measured in a process of its own, by turns. The bytes of a checkpoint may still be in the system's page cache, for
both alike; `--drop_cache true` has them read from the disk.

python scripts/measure_offloading.py
python scripts/measure_offloading.py --model MY_CHECKPOINT --experts_on_device 4 --drop_cache true
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, set_seed

from modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.benchmark import ARMS, combine_rounds, compare_arms, files_of, measure_arm, to_markdown
from modeling_stablemoe.checkpoints import replace_file
from modeling_stablemoe.measure import ChildError, run_alone
from modeling_stablemoe.model import moe_layers_of
from modeling_stablemoe.runs import load_preset, one_line_errors, parse_options, parse_overrides, quiet_libraries


# Half a gigabyte of experts.
LARGE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_experts": 32,
    "router_type": "hash",
}


@dataclass
class OffloadingArguments:
    """What to measure."""

    model: str | None = field(
        default=None, metadata={"help": "Folder of a causal language model in stage 2; default: a random one is made."}
    )
    model_preset: str = field(
        default="configuration/models/cpu-small.json", metadata={"help": "Shape of the random model."}
    )
    config_overrides: str = field(
        default=json.dumps(LARGE), metadata={"help": "Fields of the preset to change, as JSON."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the random model's weights: float32, bfloat16."})
    experts_on_device: int | None = field(
        default=None, metadata={"help": "Slots of each MoE layer; default: a quarter of the experts."}
    )
    batch_size: int = field(default=1, metadata={"help": "Sequences of a forward pass."})
    prompt_length: int = field(default=128, metadata={"help": "Tokens of a sequence in prefill."})
    prompts: int = field(default=4, metadata={"help": "Forward passes of prefill, after one to warm up."})
    steps: int = field(default=40, metadata={"help": "Tokens to decode, after two to warm up."})
    rounds: int = field(default=3, metadata={"help": "How often each is measured; medians count."})
    drop_cache: bool = field(
        default=False, metadata={"help": "Have files forgotten by the page cache before each forward pass."}
    )
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; default: cuda where there is one."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for offloading.json and offloading.md."})
    seed: int = field(default=0, metadata={"help": "Of weights, routing and tokens."})

    def __post_init__(self):
        """Check the numbers and names."""
        for name in ("batch_size", "prompt_length", "prompts", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be >= 1, got {getattr(self, name)}")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        for name, known in (("device", ["cpu", "cuda"]), ("dtype", ["float32", "bfloat16"])):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} must be one of {known}, got {getattr(self, name)}")
        if self.drop_cache and not hasattr(os, "posix_fadvise"):
            raise ValueError("--drop_cache needs `posix_fadvise`, which this system does not have.")

    @property
    def overrides(self) -> dict:
        """`dict`: `config_overrides`, parsed."""
        return parse_overrides(self.config_overrides)


def make_checkpoint(args: OffloadingArguments, folder: Path):
    """Save a random model with random tables, whose experts change the output."""
    set_seed(args.seed)
    config = load_preset(args.model_preset, **args.overrides)
    with torch.device("meta"):
        StableMoEForCausalLM(config)  # refuses a bad config before anything large is made
    model = StableMoEForCausalLM(config)
    for layer in moe_layers_of(model).values():
        for name, values in layer.expert_module.named_parameters():
            if name.endswith("down_proj"):
                torch.nn.init.normal_(values, std=config.initializer_range)
    if model.routing_stage == 1:
        model.set_routing_tables(torch.randint(config.num_experts, (config.num_moe_layers, config.vocab_size)))
    model.to(getattr(torch, args.dtype)).save_pretrained(folder)


@contextmanager
def checkpoint_of(args: OffloadingArguments) -> Iterator[Path]:
    """Yield the checkpoint to measure, for as long as it is needed."""
    if args.model is not None:
        if not files_of(args.model):
            raise FileNotFoundError(f"--model: there is no safetensors file in {args.model!r}.")
        yield Path(args.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        print("a random model is made ...", flush=True)
        make_checkpoint(args, Path(folder))
        yield Path(folder)


def check_lengths(args: OffloadingArguments, config) -> int:
    """Return the number of slots; refuse settings that the model cannot run."""
    if not getattr(config, "moe_layer_positions", None):
        raise ValueError("The model must be a causal language model with MoE layers.")
    longest = max(args.prompt_length, args.steps + 2)
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"--prompt_length {args.prompt_length} and --steps {args.steps} do not fit `max_position_embeddings` "
            f"({config.max_position_embeddings})."
        )
    return args.experts_on_device or max(config.num_experts // 4, 1)


def measure(args: OffloadingArguments) -> tuple[dict[str, list[dict]], dict]:
    """Measure all arms in turn, each in a fresh process; return the rounds, and the settings for the report."""
    # Without a GPU, accelerate offloads nothing to the CPU, where the computation runs anyway.
    names = [name for name in ARMS if args.device == "cuda" or name != "accelerate-host"]
    rounds: dict[str, list[dict]] = {name: [] for name in names}
    with checkpoint_of(args) as checkpoint:
        config = AutoConfig.from_pretrained(checkpoint)
        slots = check_lengths(args, config)
        total = sum(path.stat().st_size for path in files_of(checkpoint))
        set_seed(args.seed)
        size = (args.prompts + 1, args.batch_size, args.prompt_length)
        task = {
            "checkpoint": str(checkpoint),
            "device": args.device,
            "experts_on_device": slots,
            "prompts": torch.randint(config.vocab_size, size),
            "tokens": torch.randint(config.vocab_size, (args.batch_size, args.steps + 2)),
            "drop_cache": args.drop_cache,
        }
        for turn in range(args.rounds):
            for name in names:
                print(f"round {turn + 1} of {args.rounds}: {ARMS[name]} ...", flush=True)
                rounds[name].append(run_alone(measure_arm, name=name, **task))
    settings = {
        "model": f"{total / 1e6:.0f} MB of weights, {config.num_moe_layers} MoE layer(s) of {config.num_experts} experts",
        "slots": f"{slots} experts of each MoE layer on the device",
        "device": f"{torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        "prefill": f"{args.batch_size} x {args.prompt_length} random tokens; decoding: {args.batch_size} random token(s) a "
        "step",
        "files": "read from the disk" if args.drop_cache else "may be in the page cache, for all alike",
        "peak memory": "of the device"
        if args.device == "cuda"
        else "of the process, over what it was before the model",
        "rounds": f"{args.rounds}, each in a process of its own; medians",
    }
    if args.device == "cpu":
        settings["accelerate, host memory"] = "not measured: without a GPU that offloads nothing"
        settings["accelerate, checkpoint"] = (
            "maps the file: of the bytes that a pass asks for it reads those that it uses"
        )
    return rounds, settings


def main(argv=None):
    """Run the script."""
    with one_line_errors(ChildError, OSError, ValueError):
        args = parse_options(OffloadingArguments, __doc__, argv)
        quiet_libraries()
        transformers.utils.logging.disable_progress_bar()
        rounds, settings = measure(args)
        report = to_markdown(settings, rounds)
        if args.output_dir is not None:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            measured = {name: combine_rounds(each) for name, each in rounds.items()}
            results = {"settings": settings, "measured": measured, "ratios": compare_arms(rounds)}
            content = json.dumps(results, indent=2)
            replace_file(folder / "offloading.json", lambda path: path.write_text(content + "\n"))
            replace_file(folder / "offloading.md", lambda path: path.write_text(report))
    print(f"\n{report}")


if __name__ == "__main__":
    main()
