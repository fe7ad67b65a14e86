"""A tiny frozen model on disk for client programs, with its tokenizer, and what must be left right of it."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from helpers.backbones import backed_model
from helpers.models import random_ids, tiny_model
from helpers.trainers import tiny_tokenizer
from modeling_stablemoe import StableMoEForCausalLM


IDS = random_ids(4, 9, low=3, high=91)
EVERY_ID = torch.arange(99).unsqueeze(0)
# Where the package is not installed: a checkpoint's own code.
WITHOUT_PACKAGE = "import sys; sys.modules['modeling_stablemoe'] = None; "


def save_frozen(folder: Path, seed: int = 0, **overrides) -> StableMoEForCausalLM:
    model = tiny_model(seed, **{"moe_layer_positions": [0, 2], "pad_token_id": 2, "dropout": 0.0} | overrides)
    model.freeze_router()
    model.eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model.folder = folder
    return model


def save_frozen_llama(folder: Path, **overrides) -> StableMoEForCausalLM:
    """A Llama with gated experts in place of FFNs, two per token."""
    model = backed_model("llama/ffn", vocab_size=99, pad_token_id=2, **overrides)
    model.freeze_router()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model.folder = folder
    return model


def words(seed: int, length: int = 12) -> str:
    return " ".join(f"w{i}" for i in random_ids(1, length, seed, low=3, high=91)[0].tolist())


TEXTS = [{"text": words(seed)} for seed in range(16)]


def load(source) -> StableMoEForCausalLM:
    return AutoModelForCausalLM.from_pretrained(source.folder)


def assert_routes_like(model, source):
    """A frozen routing is the one it was: its checksum, and every token's expert."""
    assert model.router_fingerprint() == source.router_fingerprint() == model.config.router_fingerprint
    assert torch.equal(model.route(EVERY_ID).cpu(), source.route(EVERY_ID))


def run(code: str, *arguments, cwd: Path, **environment):
    """Run Python code in a process that finds nothing on the Hub."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "home")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=cwd, env=variables | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
