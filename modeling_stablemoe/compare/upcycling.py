# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What converting a dense model is worth: train a GPT-2, then train it and its conversions further.

All of them begin with the same weights, so the same logits, and continue with the same data, order of batches,
schedule and number of steps.
"""

import json
import logging
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, set_seed

from modeling_stablemoe.checkpoints.manifests import CheckpointManifestCallback
from modeling_stablemoe.convert.dense import config_of_dense
from modeling_stablemoe.measure.report import perplexity_of
from modeling_stablemoe.model.configuration_stablemoe import StableMoEConfig
from modeling_stablemoe.model.modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.runs.recipes import model_fields
from modeling_stablemoe.runs.run import RunFolder
from modeling_stablemoe.training import TrainingClockCallback

from .comparison import Comparison, System, finish


logger = logging.getLogger(__name__)

# The folder of the dense models, beside those of the systems.
DENSE_FOLDER = "gpt2"
# Added to the seed of a dense model, so that what follows does not see the same batches again.
_DENSE_SEED = 1000


@dataclass
class DenseArguments:
    """The dense model that is trained first."""

    dense_config: str = field(
        metadata={"help": """Fields of its GPT2Config, as JSON: '{"n_embd": 128, "n_layer": 4, "n_head": 4}'."""}
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
        known = {entry.name for entry in fields(GPT2Config)}
        if not isinstance(self.fields, dict) or set(self.fields) - known:
            raise ValueError(f"`--dense_config` must be a JSON object of GPT2Config fields, got {self.dense_config}.")
        if self.dense_steps < 1:
            raise ValueError(f"`--dense_steps` must be at least 1, got {self.dense_steps}.")

    @property
    def attention(self) -> dict[str, str]:
        """`dict`: the attention implementation, if it is named, as `from_config` takes it."""
        return {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}

    @property
    def implementations(self) -> dict[str, str]:
        """`dict`: those of attention and experts that are named, as `from_dense` takes them."""
        experts = self.experts_implementation
        return self.attention | ({} if experts is None else {"experts_implementation": experts})


class UpcyclingComparison(Comparison):
    """A comparison whose systems are conversions of one dense model per seed, given by `DenseArguments`.

    A system without MoE layers is the dense model itself, trained further; `config` of a system is what `from_dense`
    takes.
    """

    model_args: DenseArguments

    @property
    def dense_config(self) -> GPT2Config:
        """`GPT2Config`: of the dense model, with the vocabulary of the tokenizer."""
        return GPT2Config(**{**model_fields(self.tokenizer), **self.model_args.fields})

    def config_of(self, system: System) -> StableMoEConfig:
        """Make the config of a conversion; a ValueError names the system."""
        try:
            return config_of_dense(self.dense_config, **system.config)
        except ValueError as error:
            raise ValueError(f"System {system.name!r}: {error}") from error

    def build(self, system: System, seed: int) -> PreTrainedModel:
        """Convert the dense model of a seed."""
        folder = self.results_of(DENSE_FOLDER, seed).parent
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
        path, args = self.results_of(DENSE_FOLDER, seed), self.arguments_of(DENSE_FOLDER, seed)
        args.max_steps = self.model_args.dense_steps
        args.seed = args.data_seed = seed + _DENSE_SEED
        folder = RunFolder(args, False, self.model_args, self.data_args)
        if path.is_file():
            logger.info("GPT-2, seed %d: finished before, %s.", seed, path)
            return json.loads(path.read_text())
        logger.info("GPT-2, seed %d: training %d steps.", seed, args.max_steps)
        set_seed(args.seed)
        model = AutoModelForCausalLM.from_config(self.dense_config, **self.model_args.attention)
        clock = TrainingClockCallback()
        trainer = self.train_model(model, args, folder, [CheckpointManifestCallback(), clock])
        perplexity = perplexity_of(trainer.evaluate()["eval_loss"])
        results = {"seed": seed, "perplexity": perplexity, "steps": args.max_steps, "seconds": clock.seconds}
        finish(trainer, results, path)
        return results


def check_names(systems: list[System]):
    """Refuse a system that would use the folder of the dense models."""
    if any(Path(system.name) == Path(DENSE_FOLDER) for system in systems):
        raise ValueError(f"A system cannot be called {DENSE_FOLDER!r}: that folder is the dense models'.")
