"""The README's commands and code run as written, one after the other. Run: `make test-slow`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall((ROOT / "README.md").read_text())
MULTI_GPU = FENCED.findall((ROOT / "docs" / "multi-gpu.md").read_text())
PYTHON = "\n".join(code for language, code in BLOCKS if language == "python")
SHELL = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
# `make test` would run this very suite; `make train` takes minutes, so shorter runs of the recipes stand in for it.
COMMANDS = [line for line in SHELL if not line.startswith("make ")]
STAND_INS = [
    "python scripts/run_clm.py configuration/recipes/embedded-cpu.yaml --max_steps 20 --ngram_baselines false",
    "python scripts/run_translation.py configuration/recipes/code-summary-cpu.yaml --max_steps 20 --max_test_pairs 20",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A copy of what the commands use, with the trained models that the README starts from."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configuration", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("README.md", "hub_card.md"):
        shutil.copy(ROOT / name, folder)
    for command in STAND_INS:
        run(folder, command)
    return folder


def run(folder: Path, command: str):
    programs = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        # Whoever copies a command has all cores.
        "OMP_NUM_THREADS": str(os.cpu_count()),
    }
    finished = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=550
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout[-2000:]}\n{finished.stderr[-3000:]}"


def test_readme_shows_commands_and_code():
    assert [line.split()[1] for line in SHELL if line.startswith("make ")] == ["train", "test"]
    assert len(COMMANDS) >= 5
    assert "StageTransitionCallback(" in PYTHON


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_readme_code_runs_as_written(workplace):
    (workplace / "readme.py").write_text(PYTHON)
    run(workplace, "python readme.py")
    assert (workplace / "runs" / "mine" / "routing_fluctuation.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_readme_commands_run_as_written(workplace):
    for command in COMMANDS:
        run(workplace, command)
    assert (workplace / "runs" / "two" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_multi_gpu_page_runs_as_written(workplace):
    [command] = [code.strip() for language, code in MULTI_GPU if language == "bash"]
    run(workplace, command.replace("runs/two", "runs/two-again"))
    assert (workplace / "runs" / "two-again" / "results.json").exists()
    [code] = [code for language, code in MULTI_GPU if language == "python"]
    (workplace / "expert_parallel.py").write_text(code)
    run(workplace, "torchrun --nproc_per_node 2 expert_parallel.py runs/embedded-cpu 2")
