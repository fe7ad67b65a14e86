# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The README and every page under docs/: their links lead somewhere, and their code and commands run as written."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import modeling_stablemoe
from helpers import ROOT
from helpers.run_page import blocks_of, commands_of


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# `make train` and `make train-seq2seq`, which pages start from, take minutes: shorter runs of the same recipes stand in.
STAND_INS = [
    "scripts/run_clm.py configuration/recipes/embedded-cpu.yaml --max_steps 20 --ngram_baselines false",
    "scripts/run_translation.py configuration/recipes/code-summary-cpu.yaml --max_steps 20 --max_test_pairs 20",
]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")
# What a page needs that `make install` does not bring.
NEEDED = {"docs/precision.md": "torchao"}
# What a page may use of a checkout.
USED = ("configuration", "scripts", "tests", "docs", "README.md", "RESULTS.md", "hub_card.md", "pyproject.toml")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A checkout whose main jobs have been run."""
    folder = tmp_path_factory.mktemp("pages")
    for name in USED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    for command in STAND_INS:
        run(folder, f"{sys.executable} {command}")
    return folder


def run(folder: Path, command: str):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        # Whoever copies a command has all cores.
        "OMP_NUM_THREADS": str(os.cpu_count()),
    }
    finished = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=1700
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout[-2000:]}\n{finished.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_commands_name_what_is_there_and_code_is_code(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target
    for language, code, line in blocks_of(page):
        assert language in ("python", "bash", "bibtex"), f"line {line}"
        if language == "python":
            ast.parse(code)
        for command in commands_of(code) if language == "bash" else ():
            for name in re.findall(r"(?:scripts|configuration|tests|docs)/[\w./-]+", command):
                assert (ROOT / name).exists(), command


def test_every_page_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [name for name in NAMES[1:] if f"]({name})" not in readme] == []


def test_the_api_page_names_every_public_name_and_script():
    page = (ROOT / "docs" / "api.md").read_text()
    public = {name for name in modeling_stablemoe.__all__ if not name.startswith("_")}
    scripts = {f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")}
    assert {name for name in public | scripts if f"`{name}`" not in page} == set()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_pages_run_as_written(workplace, page):
    needed = NEEDED.get(str(page.relative_to(ROOT)))
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    run(workplace, f"{sys.executable} {ROOT / 'tests' / 'helpers' / 'run_page.py'} {page}")
