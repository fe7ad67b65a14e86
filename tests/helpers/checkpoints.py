"""Checkpoints edited on disk, and loaded where the package is not installed."""

import json
import textwrap
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.interpreters import interpreters


EVERY_ID = torch.arange(99).unsqueeze(0)
CODE_FILES = {"configuration_stablemoe.py", "modeling_stablemoe.py"}


def edit_config(path: Path, **fields):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def edit_weights(path: Path, edit):
    weights = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    edit(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_stablemoe":
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Block())
try:
    import modeling_stablemoe
except ModuleNotFoundError as error:
    assert "blocked" in str(error)
else:
    raise AssertionError("the package can be imported: this would prove nothing")
"""


def run_without_package(code: str, folder: Path, *arguments):
    folder.mkdir(exist_ok=True)
    result = interpreters().run("-c", BLOCK + textwrap.dedent(code), *arguments, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
