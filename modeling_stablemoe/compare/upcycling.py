# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What converting a dense model is worth: train one, then train it and its conversions further.

All of them begin with the same weights, so the same logits, and continue with the same data, order of batches,
schedule and number of steps.
"""

import json
import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

from modeling_stablemoe.checkpoints.manifests import CheckpointManifestCallback
from modeling_stablemoe.convert.dense import config_of_dense
from modeling_stablemoe.measure.report import perplexity_of
from modeling_stablemoe.model.decoder_stablemoe import copy_ffn
from modeling_stablemoe.model.modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.runs.recipes import NamesImplementations, model_fields
from modeling_stablemoe.runs.run import RunFolder
from modeling_stablemoe.training import TrainingClockCallback

from .comparison import Comparison, System, check_config, finish


logger = logging.getLogger(__name__)

# Added to the seed of a dense model, so that what follows does not see the same batches again.
_DENSE_SEED = 1000


@dataclass
class DenseArguments(NamesImplementations):
    """The dense model that is trained first."""

    dense_config: str = field(
        metadata={
            "help": 'Fields of its config, as JSON. Such as \'{"model_type": "llama", "hidden_size": 128, '
            '"num_hidden_layers": 4, "num_attention_heads": 4}\'. `model_type` is that of a decoder of '
            "transformers; default: gpt2."
        }
    )
    dense_steps: int = field(metadata={"help": "Steps that it is trained for; --max_steps are those that follow."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2, ...; default: the best there is."}
    )
    experts_implementation: str | None = field(
        default=None, metadata={"help": "eager, grouped_mm or batched_mm; default: grouped_mm."}
    )

    def __post_init__(self):
        """Check what can be checked without the corpus."""
        try:
            self.fields = json.loads(self.dense_config)
        except json.JSONDecodeError as error:
            raise ValueError(f"`--dense_config` is not valid JSON: {error}.") from error
        if not isinstance(self.fields, dict):
            raise ValueError(f"`--dense_config` must be a JSON object of fields, got {self.dense_config}.")
        self.model_type = self.fields.pop("model_type", "gpt2")
        try:
            check_config(self.model_type, self.fields)
        except ValueError as error:
            raise ValueError(f"`--dense_config`: {error}") from error
        if self.dense_steps < 1:
            raise ValueError(f"`--dense_steps` must be at least 1, got {self.dense_steps}.")


class UpcyclingComparison(Comparison):
    """A comparison whose systems are conversions of one dense model per seed, given by `DenseArguments`.

    A system without MoE layers is the dense model itself, trained further; `config` of a system is what `from_dense`
    takes. With `model_type: mixtral` it is transformers' Mixtral with copies of a Llama's FFNs as experts.
    """

    model_args: DenseArguments

    @property
    def dense_name(self) -> str:
        """`str`: name of the folder of the dense models, beside those of the systems."""
        return self.model_args.model_type

    @property
    def dense_config(self) -> PreTrainedConfig:
        """`PreTrainedConfig`: of the dense model, with the vocabulary of the tokenizer."""
        return AutoConfig.for_model(self.dense_name, **{**model_fields(self.tokenizer), **self.model_args.fields})

    def config_of(self, system: System) -> PreTrainedConfig:
        """Make the config of a conversion; a ValueError names the system."""
        make = mixtral_config if system.config.get("model_type") == "mixtral" else config_of_dense
        try:
            return make(self.dense_config, **system.config)
        except ValueError as error:
            raise ValueError(f"System {system.name!r}: {error}") from error

    def build(self, system: System, seed: int) -> PreTrainedModel:
        """Convert the dense model of a seed."""
        folder = self.results_of(self.dense_name, seed).parent
        if system.config.get("model_type") == "mixtral":
            return mixtral_of(AutoModelForCausalLM.from_pretrained(folder), self.config_of(system))
        return StableMoEForCausalLM.from_dense(folder, **system.config, **self.model_args.implementations)

    def train_dense(self, seed: int) -> dict:
        """Train the dense model of a seed, or read the results if that is finished already.

        Args:
            seed (`int`): of its initial weights and of the order of batches, both shifted from those of the systems.

        Returns:
            `dict`, JSON-ready: `seed`, `perplexity` of the validation text, `steps` and `seconds` of training.

        Raises:
            ValueError: if the folder of the model holds a run with other settings.
        """
        path, args = self.results_of(self.dense_name, seed), self.arguments_of(self.dense_name, seed)
        args.max_steps = self.model_args.dense_steps
        args.seed = args.data_seed = seed + _DENSE_SEED
        folder = RunFolder(args, False, self.model_args, self.data_args)
        if path.is_file():
            logger.info("%s, seed %d: finished before, %s.", self.dense_name, seed, path)
            return json.loads(path.read_text())
        logger.info("%s, seed %d: training %d steps.", self.dense_name, seed, args.max_steps)
        set_seed(args.seed)
        model = AutoModelForCausalLM.from_config(self.dense_config, **self.model_args.attention)
        clock = TrainingClockCallback()
        with folder:
            trainer = self.train_model(model, args, folder, [CheckpointManifestCallback(), clock])
            perplexity = perplexity_of(trainer.evaluate()["eval_loss"])
            results = {"seed": seed, "perplexity": perplexity, "steps": args.max_steps, "seconds": clock.seconds}
            finish(trainer, results, path)
        return results


def mixtral_config(dense_config: PreTrainedConfig, **options: Any) -> MixtralConfig:
    """Make the config of the Mixtral whose blocks are those of a Llama, but for their FFNs; a ValueError says why not."""
    if dense_config.model_type != "llama":
        raise ValueError(f"a Mixtral is made of a llama, not of a {dense_config.model_type!r} model.")
    shared = {entry.name for entry in fields(MixtralConfig)} & {entry.name for entry in fields(type(dense_config))}
    values = {name: getattr(dense_config, name) for name in shared - {"architectures", "dtype"}}
    # Its balance loss is added to the loss where router logits are returned.
    return MixtralConfig(**{**values, "output_router_logits": True, **options})


def mixtral_of(dense: PreTrainedModel, config: MixtralConfig) -> PreTrainedModel:
    """Make a Mixtral of a Llama: each expert a copy of the FFN that stood there, routers random."""
    model = AutoModelForCausalLM.from_config(config)
    tensors = dense.state_dict()
    for index, block in enumerate(model.model.layers):
        copy_ffn(dense.model.layers[index].mlp, block.mlp.experts)
        tensors = {name: values for name, values in tensors.items() if f"layers.{index}.mlp." not in name}
    loaded = model.load_state_dict(tensors, strict=False)
    if loaded.unexpected_keys or any(".mlp." not in name for name in loaded.missing_keys):
        raise ValueError(f"A Llama and a Mixtral differ in {', '.join(loaded.unexpected_keys + loaded.missing_keys)}.")
    return model


def check_names(systems: list[System], dense_name: str):
    """Refuse a system that would use the folder of the dense models."""
    if any(Path(system.name) == Path(dense_name) for system in systems):
        raise ValueError(f"A system cannot be called {dense_name!r}: that folder is the dense models'.")
