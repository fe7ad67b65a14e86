# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Train several systems on the same data, in the same order, with the same schedule, and gather their results.

A system is a model preset with some fields changed: a router, a position of the MoE layer, a number of experts. Each run,
of one system with one seed, has its own folder, is resumed there after a crash, and is not repeated once finished.
"""

import copy
import gc
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import DatasetDict
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_stablemoe.checkpoints.atomic_files import replace_file
from modeling_stablemoe.checkpoints.engines import check_engine
from modeling_stablemoe.checkpoints.manifests import CheckpointManifestCallback
from modeling_stablemoe.data.text import DataArguments, collate_blocks
from modeling_stablemoe.measure.flops import count_parameters, forward_flops
from modeling_stablemoe.measure.fluctuation import REPORT_FILE
from modeling_stablemoe.measure.meter import imbalance
from modeling_stablemoe.measure.report import perplexity_of
from modeling_stablemoe.model.configuration_stablemoe import StableMoEConfig
from modeling_stablemoe.model.health_stablemoe import CLOSED_GATE
from modeling_stablemoe.model.routing_stablemoe import Routing
from modeling_stablemoe.runs.recipes import ModelArguments, RoutingArguments, YamlLoader, load_preset, model_fields
from modeling_stablemoe.runs.run import LATEST, RunFolder, build_callbacks, set_hash_tables, train
from modeling_stablemoe.training import TrainingClockCallback, show_progress
from modeling_stablemoe.training.exact_evaluation import BlockTrainer


logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"


@dataclass
class System:
    """One of the systems: how its model differs from the preset, and how its routing is trained.

    Args:
        name (`str`): in tables and figures, and of its folder.
        config (`dict`): fields of the config to change.
        stage1_steps (`str`, *optional*): length of stage 1, in steps or as a share of all steps; none by default.
        hash_table (`str`, *optional*): table to route by from the start: random, balanced, or a frozen checkpoint, in whose
            name `{seed}` stands for the seed of the run.
        split_tokens (`int`): so many of the most frequent token ids are routed by the token before them, too.
        settled_change (`float`, *optional*): end stage 1 early once at most this share of tokens changes experts.
        hold_until_ready (`str`, *optional*): step, or share of all, up to which stage 1 is prolonged if necessary.
        learning_rate (`float`, *optional*): tuned for this system. Default: that of all systems.
        family (`str`, *optional*): name of the line that joins systems of different size in figures. Default: `name`.

    Raises:
        ValueError: naming the system, for a name that is no folder's or a setting that cannot be.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    stage1_steps: str | None = None
    hash_table: str | None = None
    split_tokens: int = 0
    settled_change: float | None = None
    hold_until_ready: str | None = None
    learning_rate: float | None = None
    family: str | None = None

    def __post_init__(self):
        """Convert what YAML reads otherwise, and check the rest."""
        self.family = self.family or self.name
        for name in ("stage1_steps", "hold_until_ready"):
            steps = getattr(self, name)
            setattr(self, name, None if steps is None else str(steps))
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"The system {self.name!r} cannot be the name of a folder; choose another name.")
        if not isinstance(self.config, dict):
            raise ValueError(f"`config` of the system {self.name!r} must be a mapping of config fields.")
        if self.learning_rate is not None:
            try:
                rate = float(self.learning_rate)  # YAML reads 2e-3 as a string
            except (TypeError, ValueError):
                rate = math.nan
            if not 0 < rate < math.inf:
                raise ValueError(
                    f"`learning_rate` of the system {self.name!r} must be a number > 0, got {self.learning_rate!r}."
                )
            self.learning_rate = rate
        self.routing(0, 0)

    def of_seed(self, seed: int) -> "System":
        """Put a seed into the name of its tables; a ValueError names the system, if they are not there."""
        if self.hash_table is None:
            return self
        return replace(self, hash_table=self.hash_table.replace("{seed}", str(seed)))

    def routing(self, fluctuation_check_steps: int, fluctuation_tokens: int) -> RoutingArguments:
        """Make the routing arguments of a run; a ValueError names the system."""
        depends_on_seed = "{seed}" in (self.hash_table or "")  # then `of_seed` looks for it
        try:
            arguments = RoutingArguments(
                stage1_steps=self.stage1_steps,
                settled_change=self.settled_change,
                hold_until_ready=self.hold_until_ready,
                hash_table=None if depends_on_seed else self.hash_table,
                split_tokens=self.split_tokens,
                fluctuation_check_steps=fluctuation_check_steps,
                fluctuation_tokens=fluctuation_tokens,
            )
            _ = arguments.stage1, arguments.hold  # parsed when they are asked for
        except ValueError as error:
            raise ValueError(f"System {self.name!r}: {error}") from error
        return arguments


def read_systems(path: str | Path, only: Sequence[str] = (), kind: type[System] = System) -> list[System]:
    """Read the systems to compare.

    Args:
        path (`str` or `Path`): YAML file: a mapping of names to the fields of `kind`.
        only (sequence of `str`): names of the systems to keep. Default: all.
        kind (`type`): `System`, or a class built upon it.

    Returns:
        `list[System]`: in the order of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a mapping, or lacks a name of `only`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of systems {str(path)!r}; they are under configuration/systems/.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=YamlLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"The systems {str(path)!r} are not valid YAML: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"The systems {str(path)!r} must be a mapping of names to settings.")
    missing = sorted(set(only) - set(content))
    if missing:
        raise ValueError(f"There is no system {missing} in {str(path)!r}; it has {list(content)}.")
    systems = []
    for name, settings in content.items():
        try:
            systems.append(kind(str(name), **(settings or {})))
        except TypeError as error:
            raise ValueError(f"The system {name!r} in {str(path)!r} has unknown settings: {error}.") from error
    return [system for system in systems if not only or system.name in only]


def check_comparable(data_args: DataArguments, training_args: TrainingArguments):
    """Refuse options with which systems would not be trained alike; the ValueError names option and remedy."""
    if training_args.max_steps <= 0:
        raise ValueError("Systems are trained for the same number of steps: set `--max_steps`.")
    if data_args.streaming:
        raise ValueError("A comparison needs blocks that can be read again for every run: leave `--streaming` out.")
    if training_args.resume_from_checkpoint is not None:
        raise ValueError("A comparison always resumes what its output folder holds: leave the option out.")


def check_config(model_type: str | None, values: Mapping[str, Any]):
    """Refuse a model that transformers does not know, or fields that its config does not have."""
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no `model_type` {model_type!r}.")
    config_class = CONFIG_MAPPING[model_type]
    unknown = sorted(set(values) - {entry.name for entry in fields(config_class)})
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no fields of {config_class.__name__}.")


@dataclass
class Comparison:
    """What all runs of a comparison share.

    Args:
        model_args (`ModelArguments`): the preset, and implementations.
        data_args (`DataArguments`): that the blocks were made by.
        training_args (`TrainingArguments`): schedule; `output_dir` is the parent of all runs.
        tokenizer (`PreTrainedTokenizerBase`): of the blocks.
        blocks (`DatasetDict`): "train", "validation" and, optionally, "test": rows of `input_ids` of one length.
        fluctuation_check_steps (`int`): steps between checks of routing fluctuation; 0: none.
        fluctuation_tokens (`int`): validation tokens that it is measured on.
    """

    model_args: ModelArguments
    data_args: DataArguments
    training_args: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    blocks: DatasetDict
    fluctuation_check_steps: int
    fluctuation_tokens: int

    def config_of(self, system: System) -> StableMoEConfig:
        """Make the config of a system; a ValueError names the system."""
        fields = {**model_fields(self.tokenizer), **self.model_args.overrides, **system.config}
        try:
            config = load_preset(self.model_args.model_preset, **fields)
        except ValueError as error:
            raise ValueError(f"System {system.name!r}: {error}") from error
        if not isinstance(config, StableMoEConfig):
            raise ValueError(f"Language models are compared; {self.model_args.model_preset!r} is of another kind.")
        return config

    def build(self, system: System, seed: int) -> PreTrainedModel:
        """Make the model that a run begins with; the caller has seeded the random numbers."""
        return AutoModelForCausalLM.from_config(self.config_of(system), **self.model_args.implementations)

    def results_of(self, name: str, seed: int) -> Path:
        """Return the path of the results of a run, which exist once it is finished."""
        return Path(self.training_args.output_dir) / name / f"seed-{seed}" / RESULTS_FILE

    def arguments_of(self, name: str, seed: int) -> TrainingArguments:
        """Make the training arguments of a run, which resumes from its last checkpoint."""
        args = copy.copy(self.training_args)
        args.output_dir, args.seed, args.data_seed = str(self.results_of(name, seed).parent), seed, seed
        args.run_name = f"{name}-{seed}"
        args.resume_from_checkpoint = LATEST[0]
        return args

    def run(self, system: System, seed: int) -> dict:
        """Train and measure a system, or read the results if the run is finished already.

        Args:
            system (`System`): what to train.
            seed (`int`): of the initial weights and of the order of batches.

        Returns:
            `dict`, JSON-ready: `system`, `family` and `seed`; `perplexity` by split; `validation_curve` and
                `training_curve`, lists of log entries; `seconds` of training, `tokens` and `tokens_per_second`;
                `parameters`, `shared` and `experts`; `forward_flops` of one sequence; `config` and
                `router_fingerprint`; of inference on the validation text `load` (share of the tokens of each expert, a
                list per MoE layer), `load_max_over_mean`, `mean_gate` and `closed_gates` (share of gates below 0.05);
                `transition`, its log entry, and `fluctuation`, the summary of `RoutingHistory`. `None` where there is
                none.

        Raises:
            ValueError: if the folder of the run holds one with other settings.
        """
        system = system.of_seed(seed)
        path = self.results_of(system.name, seed)
        args = self.arguments_of(system.name, seed)
        if system.learning_rate is not None:
            args.learning_rate = system.learning_rate
        routing_args = system.routing(self.fluctuation_check_steps, self.fluctuation_tokens)
        folder = RunFolder(args, False, self.model_args, self.data_args, routing_args, system)
        if path.is_file():
            logger.info("%s, seed %d: finished before, %s.", system.name, seed, path)
            return json.loads(path.read_text())
        logger.info("%s, seed %d: training %d steps.", system.name, seed, args.max_steps)
        set_seed(seed)
        model = self.build(system, seed)
        clock = TrainingClockCallback()
        with folder:
            trainer = self.train_model(model, args, folder, [*self.prepare(model, system, seed), clock])
            results = {"system": system.name, "family": system.family, "seed": seed, **self._measure(trainer, clock)}
            finish(trainer, results, path)
        return results

    def prepare(self, model: PreTrainedModel, system: System, seed: int) -> list:
        """Route a new model by the table that its system names, if any, and build the callbacks of the run."""
        if not isinstance(model.config, StableMoEConfig):
            return [CheckpointManifestCallback()]
        routing_args = system.routing(self.fluctuation_check_steps, self.fluctuation_tokens)
        set_hash_tables(model, routing_args, self.blocks["train"])
        if not is_moe(model):
            routing_args = RoutingArguments()
        return build_callbacks(routing_args, model.config, self.training_args.max_steps, self.blocks["validation"])

    def train_model(
        self, model: PreTrainedModel, args: TrainingArguments, folder: RunFolder, callbacks: list
    ) -> BlockTrainer:
        """Train a model on the shared blocks, from the last checkpoint of its folder, and return its Trainer."""
        checkpoint = folder.claim()
        if checkpoint is not None and not isinstance(model.config, StableMoEConfig):
            # Checkpoints of some families name each expert by itself, which Trainer does not find in the model.
            implementations = {
                "attn_implementation": model.config._attn_implementation,
                "experts_implementation": model.config._experts_implementation,
            }
            model = AutoModelForCausalLM.from_pretrained(checkpoint, **implementations)
        trainer = BlockTrainer(
            model=model,
            args=args,
            train_dataset=self.blocks["train"],
            eval_dataset=self.blocks["validation"],
            data_collator=collate_blocks,
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )
        show_progress(trainer)
        if checkpoint is not None:
            check_engine(trainer, checkpoint)
        train(trainer, checkpoint)
        return trainer

    def measure_routing(self, trainer: BlockTrainer) -> dict | None:
        """Measure the routing of inference on the validation text; every process must call this."""
        return measure_routing(trainer, self.blocks["validation"])

    def _measure(self, trainer: BlockTrainer, clock: TrainingClockCallback) -> dict:
        """Evaluate a trained model, and gather the results of its run."""
        args, history = trainer.args, list(trainer.state.log_history)  # evaluation adds to it
        evaluated = {name: trainer.evaluate(rows) for name, rows in self.blocks.items() if name != "train"}
        routing = self.measure_routing(trainer)
        load = None if routing is None else routing["load"]
        tokens = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        tokens *= len(self.blocks["train"][0]["input_ids"])
        fluctuation = Path(args.output_dir) / REPORT_FILE
        return {
            "perplexity": {name: perplexity_of(metrics["eval_loss"]) for name, metrics in evaluated.items()},
            "validation_curve": [
                {
                    "step": entry["step"],
                    "perplexity": perplexity_of(entry["eval_loss"]),
                    "seconds": entry["train_seconds"],
                }
                for entry in history
                if "eval_loss" in entry
            ],
            "training_curve": [entry for entry in history if "loss" in entry],
            "transition": next((entry for entry in history if "transition_step" in entry), None),
            "seconds": clock.seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / clock.seconds,
            "parameters": count_parameters(trainer.model),
            "forward_flops": forward_flops(trainer.model, len(self.blocks["validation"][0]["input_ids"])),
            "config": {
                **trainer.model.config.to_diff_dict(),
                "num_experts": trainer.model.config.num_experts if load is None else load.shape[-1],
            },
            "router_fingerprint": getattr(trainer.model.config, "router_fingerprint", None),
            "load": None if load is None else (load / load.sum(-1, keepdim=True)).tolist(),
            "load_max_over_mean": None if load is None else imbalance(load),
            "mean_gate": None if routing is None else routing["mean_gate"],
            "closed_gates": None if routing is None else routing["closed_gates"],
            "fluctuation": json.loads(fluctuation.read_text()) if fluctuation.is_file() else None,
        }


def is_moe(model: PreTrainedModel) -> bool:
    """Return True for a model with MoE layers of this package."""
    return getattr(model.config, "num_moe_layers", 0) > 0


@torch.no_grad()
def measure_routing(trainer: Trainer, rows) -> dict | None:
    """Measure the routing of inference on rows of `input_ids`; every process must call this.

    Returns:
        `dict`: `load`, tokens sent to each expert, a `torch.DoubleTensor` of shape `(moe layers, num_experts)`;
            `mean_gate`, over tokens and layers; `closed_gates`, share of gates below 0.05. `None` for a dense model.
    """
    model = trainer.model.eval()
    if not is_moe(model):
        return None
    layers = model.moe_layers_by_name.values()
    load = torch.zeros(len(layers), model.config.num_experts, device=trainer.args.device)
    gates = torch.zeros(3, device=trainer.args.device)  # their number, their sum, the number of closed ones

    def observe(router, inputs, decision):
        gate = Routing(*decision[-1]).routing_weights
        gates.add_(torch.stack([gate.new_tensor(gate.numel()), gate.sum(), (gate < CLOSED_GATE).sum().to(gate.dtype)]))

    hooks = [layer.router.register_forward_hook(observe) for layer in layers]
    try:
        for batch in trainer.get_eval_dataloader(rows):
            output = model(batch["input_ids"].to(trainer.args.device), output_router_logits=True, logits_to_keep=1)
            load += output.expert_load
    finally:
        for hook in hooks:
            hook.remove()
    total, mass, closed = trainer.accelerator.reduce(gates).tolist()
    return {
        "load": trainer.accelerator.reduce(load).double().cpu(),
        "mean_gate": mass / total,
        "closed_gates": closed / total,
    }


def finish(trainer: Trainer, results: dict, path: Path):
    """Write the results, which marks the run as finished, and free its memory for the next one."""
    if trainer.is_world_process_zero():
        replace_file(path, lambda partial: partial.write_text(json.dumps(results, indent=1) + "\n"))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def settings_of(comparison: Comparison) -> dict:
    """Return the settings that all runs share, JSON-ready."""
    args = comparison.training_args
    names = (
        "max_steps learning_rate lr_scheduler_type warmup_steps adam_beta1 adam_beta2 weight_decay max_grad_norm bf16 "
        "per_device_train_batch_size gradient_accumulation_steps world_size"
    ).split()
    return {
        "model": asdict(comparison.model_args),
        "data": asdict(comparison.data_args),
        "training": json.loads(json.dumps({name: getattr(args, name) for name in names}, default=str)),
        "sequence_length": len(comparison.blocks["train"][0]["input_ids"]),
        "validation_tokens": len(comparison.blocks["validation"])
        * len(comparison.blocks["validation"][0]["input_ids"]),
    }
