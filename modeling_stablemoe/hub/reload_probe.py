# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint computes, for comparing two ways of loading it.

Imports nothing of this package. As a program, `python - FOLDER OUTPUT < reload_probe.py`, it loads the checkpoint with
its own code files, in an interpreter where the package cannot be imported, and writes OUTPUT.
"""

import importlib.abc
import sys

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


PACKAGE = "modeling_stablemoe"
# A few tokens are enough: the fingerprint compares every row of a frozen table.
_ROWS, _TOKENS = 2, 16


def load(folder: str, **options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a checkpoint, in float32 and eval mode with the head it was saved with, and its tokenizer.

    Raises:
        ValueError: if weights are missing, or unknown to the model.
    """
    config = AutoConfig.from_pretrained(folder, **options)
    model, info = _auto_class(config).from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            raise ValueError(f"The weights have {problem.replace('_', ' ')}: {', '.join(sorted(info[problem]))}.")
    return model.eval(), AutoTokenizer.from_pretrained(folder, **options)


def _auto_class(config: PreTrainedConfig) -> type:
    """Return the Auto class of the saved model, or that of a language model if the `auto_map` does not name it."""
    names = {f".{name}" for name in config.architectures or ()}
    for auto_class, reference in (getattr(config, "auto_map", None) or {}).items():
        if any(reference.endswith(name) for name in names):
            return getattr(transformers, auto_class)
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


@torch.no_grad()
def compute(model: PreTrainedModel) -> dict[str, Tensor]:
    """Compute logits (without a head: last hidden states) and experts of a few made-up tokens.

    Returns:
        `dict[str, torch.Tensor]`: `output`; `experts_<k>` of MoE layer k; `fingerprint` of the frozen routing as
        bytes, empty in stage 1.
    """
    length = min(_TOKENS, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (_ROWS, length), generator=generator)
    # A classifier without a padding token needs the mask to know where a sequence ends.
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = input_ids.flip(1)
    routed = model.base_model(**inputs, output_expert_indices=True)
    experts = [index for name, layers in routed.items() if name.endswith("expert_indices") for index in layers]
    fingerprint = (model.router_fingerprint() or "").encode()
    return {
        "output": model(**inputs)[0].contiguous(),
        "fingerprint": torch.tensor(list(fingerprint), dtype=torch.uint8),
        **{f"experts_{k}": index.contiguous() for k, index in enumerate(experts)},
    }


class _NotInstalled(importlib.abc.MetaPathFinder):
    """Makes imports of the package fail as if it were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, _NotInstalled())
    save_file(compute(load(sys.argv[1], trust_remote_code=True)[0]), sys.argv[2])
