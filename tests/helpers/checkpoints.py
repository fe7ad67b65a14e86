"""Checkpoints edited on disk, and loaded where the package is not installed."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
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


# A process that has imported what costs seconds, and forks for each code that it is sent.
SERVE = """
import json, os, traceback
import torch, transformers
import transformers.dynamic_module_utils, transformers.generation, transformers.models.auto.modeling_auto
torch.set_num_threads(1)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.chdir(request["folder"])
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.argv = ["-c", *request["arguments"]]
            exec(compile(request["code"], "<code>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    print(json.dumps(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def bare_process(home: str) -> subprocess.Popen:
    """Start the process where the package cannot be imported; `home` holds what it caches."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("HF_")}
    environment |= {"HF_HOME": home, "HF_MODULES_CACHE": f"{home}/modules"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BLOCK + SERVE]
    return subprocess.Popen(
        command, cwd=home, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@functools.cache
def bare_home() -> str:
    home = tempfile.mkdtemp(prefix="without-package-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


def run_without_package(code: str, folder: Path, *arguments):
    """Run code in `folder`, in a process where the package is not installed."""
    folder.mkdir(exist_ok=True)
    process = bare_process(bare_home())
    output = folder / "output.txt"
    request = {"code": textwrap.dedent(code), "folder": str(folder), "output": str(output)}
    process.stdin.write(json.dumps({**request, "arguments": [str(each) for each in arguments]}) + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "0\n", output.read_text()
