# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Whole models side by side: StableMoE in both stages, its rivals, dense ones, and two of transformers' own.

All have the blocks, heads, vocabulary and sequences of one preset. transformers' models have a MoE in every block: their
experts are as wide as makes the parameters that a token meets equal in number to StableMoE's.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    StaticCache,
    set_seed,
)

from modeling_stablemoe.measure.flops import forward_flops
from modeling_stablemoe.model.configuration_stablemoe import TABLE_ROUTERS, StableMoEConfig
from modeling_stablemoe.model.modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.model.versions_stablemoe import CACHE_NAME
from modeling_stablemoe.runs.recipes import load_preset

from .layers import DenseStack, count_active, equal_gated_size, randomize


# The dense models: of the shared shape alone, with the FLOPs of an expert added, and with the size of all experts added.
DENSE = "dense"
EQUAL_DENSE = "dense, equal FLOPs"
EQUAL_SIZE = "dense, equal size"
STEP_ARMS = ("stage 1", "stage 2", "hash", "switch", "base", DENSE, EQUAL_DENSE, "olmoe", "mixtral")
GENERATION_ARMS = ("stage 2", EQUAL_DENSE, "olmoe")


class BlockWithStack(nn.Module):
    """A block with a dense stack beside it, where a StableMoE model has a MoE layer: before the block or after it."""

    def __init__(self, block: nn.Module, stack: DenseStack, is_before: bool):
        super().__init__()
        self.block, self.stack, self.is_before = block, stack, is_before

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """Map `(batch, sequence, hidden_size)` to the same; all else goes to the block."""
        if self.is_before:
            return self.block(self.stack(hidden_states), *args, **kwargs)
        return self.stack(self.block(hidden_states, *args, **kwargs))


@dataclass
class Preset:
    """A shape that all models share: a preset by file or name, with fields to change.

    A preset is refused that is no StableMoE language model with MoE layers and a table.
    """

    path: str | Path
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        """Refuse what cannot be measured."""
        config, name = self.config(), repr(str(self.path))
        if not isinstance(config, StableMoEConfig):
            raise ValueError(f"Language models are measured; the preset {name} is of another kind.")
        if not config.moe_layer_positions:
            raise ValueError(f"The preset {name} has no MoE layer to measure; set `moe_layer_positions`.")
        if config.router_type != "stable" or config.distilled_router not in TABLE_ROUTERS:
            raise ValueError(
                f"The preset {name} must have the router 'stable', distilled into one of {list(TABLE_ROUTERS)}; it has "
                f"{config.router_type!r} and {config.distilled_router!r}."
            )

    def config(self, **fields) -> StableMoEConfig:
        """Make the config, with some fields changed."""
        return load_preset(self.path, **{**self.overrides, **fields})

    def config_of(self, name: str) -> StableMoEConfig | OlmoeConfig | MixtralConfig:
        """Make the config of a model, of those that `build_model` knows."""
        config = self.config()
        if name in ("hash", "switch", "base"):
            # With the coefficient of the balance loss that it was published with.
            return self.config(router_type=name, distilled_router=None, balance_loss_coef=None)
        if name in (DENSE, EQUAL_DENSE):
            return self.config(moe_layer_positions=[])
        # FFNs of a model of the same active parameters without MoE layers, and of one of the same size.
        width_of_experts = config.num_moe_layers * config.num_expert_sublayers * config.expert_size
        width_of_blocks = config.num_hidden_layers * config.intermediate_size
        if name == EQUAL_SIZE:
            width = (width_of_blocks + width_of_experts * config.num_experts) // config.num_hidden_layers
            return self.config(moe_layer_positions=[], intermediate_size=width)
        if name not in ("olmoe", "mixtral"):
            return config
        active_width = width_of_blocks + width_of_experts * config.num_experts_per_tok
        shared = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": equal_gated_size(active_width / config.num_hidden_layers),
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_attention_heads,
            "max_position_embeddings": config.max_position_embeddings,
            "num_experts_per_tok": 1,
            "tie_word_embeddings": config.tie_word_embeddings,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        }
        if name == "olmoe":
            return OlmoeConfig(num_experts=config.num_experts, **shared)
        return MixtralConfig(num_local_experts=config.num_experts, **shared)


MODEL_CLASSES = {"olmoe": OlmoeForCausalLM, "mixtral": MixtralForCausalLM}


def _construct(preset: Preset, name: str) -> PreTrainedModel:
    model = MODEL_CLASSES.get(name, StableMoEForCausalLM)(preset.config_of(name))
    if name == EQUAL_DENSE:
        config, layers = preset.config(), model.model.layers
        width = config.expert_size * config.num_experts_per_tok
        sizes = config.hidden_size, width, config.num_expert_sublayers, config.hidden_act
        for position in config.moe_layer_positions:
            index = max(0, position - 1)
            layers[index] = BlockWithStack(layers[index], DenseStack(*sizes), is_before=position == 0)
    return model


def build_model(preset: Preset, name: str, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """Build one of `STEP_ARMS` or `EQUAL_SIZE` with random weights; stage 2 and hash have the same random tables."""
    set_seed(seed)
    model = _construct(preset, name)
    randomize(model, experts_only=True)
    if name in ("stage 2", "hash"):
        config = model.config
        generator = torch.Generator().manual_seed(seed)
        size = (config.num_moe_layers, config.vocab_size)
        model.set_routing_tables(torch.randint(config.num_experts, size, generator=generator))
    return model.to(device)


def count_parameters(preset: Preset, name: str) -> int:
    """Count all parameters of a model without building it."""
    with torch.device("meta"):
        # A rival's router has as many as ours or fewer, and a hash cannot be made on that device.
        model = _construct(preset, "stage 1" if name in ("hash", "switch", "base") else name)
    return sum(parameter.numel() for parameter in model.parameters())


def describe(model: PreTrainedModel, num_experts: int, sequence_length: int) -> dict[str, float]:
    """Return `active_parameters` and `parameters`, and `flops` of a forward pass per token."""
    active, total = count_active(model, num_experts)
    flops = forward_flops(model, sequence_length) / sequence_length
    return {"active_parameters": active, "parameters": total, "flops": flops}


class TrainingStep:
    """A step as `Trainer` takes it: loss, backward, clipping, AdamW; bfloat16 runs under autocast, as `--bf16` does."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, dtype: torch.dtype, is_compiled: bool = False):
        self.model, self.ids = model.train(), ids
        self.forward = torch.compile(model) if is_compiled else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.num_items = torch.tensor(ids[:, 1:].numel(), device=ids.device)
        is_half = dtype != torch.float32
        self.precision = torch.autocast(ids.device.type, dtype) if is_half else nullcontext()

    def run(self):
        """Take a step."""
        with self.precision:
            loss = self.forward(self.ids, labels=self.ids, num_items_in_batch=self.num_items).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Generation:
    """Prompts that are continued greedily; with a static cache of so many tokens, which a compiled model needs."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, backend: str | None, static_length: int | None = None):
        self.model, self.ids, self.backend = model.eval(), ids, backend
        self.cache = static_length and StaticCache(config=model.config, max_cache_len=static_length)

    def run(self, num_tokens: int):
        """Generate so many tokens per prompt."""
        if self.cache is not None:
            self.cache.reset()
        if self.backend is not None:
            self.model.set_experts_implementation(self.backend)
        self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            **{CACHE_NAME: self.cache},
            disable_compile=True,  # nothing but what was asked for
        )
