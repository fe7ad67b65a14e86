"""A folder where the scripts run as users run them, for their tests."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]


class Workplace:
    """A folder with a datasets cache of its own, and the commands to work there; `arguments` makes a command line.

    `script` is the name of the training script.
    """

    script: str

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **os.environ,
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }

    def start(self, *command: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str) -> str:
        process = self.start(*command)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
        return output

    def start_training(self, output: str, *more: str, **options) -> subprocess.Popen:
        return self.start(str(ROOT / "scripts" / self.script), *self.arguments(output, *more, **options))

    def train(self, output: str, *more: str, **options) -> str:
        return self.run(str(ROOT / "scripts" / self.script), *self.arguments(output, *more, **options))

    def kill_at(self, output: str, step: int, delay: float, *more: str, **options) -> bool:
        """Start or resume a run, kill it `delay` seconds after it begins to save checkpoint `step`, if it gets there."""
        process = self.start_training(output, *more, **options)
        checkpoint = self.folder / output / f"checkpoint-{step}"
        deadline = time.monotonic() + 300
        while process.poll() is None and not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return process.returncode == -signal.SIGKILL

    def kill_and_resume(self, output: str, kills: list[tuple[int, float]], **options):
        """Kill a run at each `(step, delay)` of `kills` in turn, then let it train to the end."""
        more = []
        for step, delay in kills:
            assert self.kill_at(output, step, delay, *more, **options)
            more = ["--resume_from_checkpoint", "latest"]
        self.train(output, *more, **options)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_launched(launcher: subprocess.Popen):
    """Kill `accelerate launch` and the processes it started, which have sessions of their own."""
    for pid in (*children_of(launcher.pid), launcher.pid):
        os.kill(pid, signal.SIGKILL)
    launcher.communicate()


def load_script(name: str):
    """The script `name` as a module of this process: for command lines that go no further than the start."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def content(folder: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def assert_same_saved_weights(folder: Path, expected: Path):
    actual, expected = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def refuse(main, arguments) -> str:
    """Run `main`; return the one line that it ends with."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert isinstance(stop.value.code, str)  # printed to stderr, exit status 1
    assert "\n" not in stop.value.code
    return stop.value.code
