"""Checkpoints edited on disk, and loaded where the package is not installed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


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
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("HF_")}
    environment |= {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BLOCK + textwrap.dedent(code), *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
