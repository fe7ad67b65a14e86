"""Seeds, and the fixtures of all tests."""

import helpers  # noqa: F401, I001 - sets the environment before torch reads it

import gc
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.interpreters import interpreters
from helpers.matrices import leave_most_combinations_to_slow
from helpers.models import tiny_model
from helpers.workplaces import CausalWorkplace, TrainedRun, TranslationWorkplace
from transformers import set_seed

from modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.hub import release_checks


@pytest.hookimpl(tryfirst=True)  # before `-m` leaves out what is slow
def pytest_collection_modifyitems(items):
    leave_most_combinations_to_slow(items)


def pytest_collection_finish():
    # Every Trainer collects garbage when it starts: it need not look at all that was imported.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    set_seed(0)


@pytest.fixture
def model() -> StableMoEForCausalLM:
    return tiny_model()


@pytest.fixture
def frozen_model() -> StableMoEForCausalLM:
    frozen = tiny_model()
    frozen.freeze_router()
    return frozen.eval()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """One folder for the whole run: the workers of pytest-xdist have theirs inside of it."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def trained_clm(shared_folder) -> TrainedRun:
    """A run of `run_clm.py` through both stages, with its checkpoints: to read, not to change."""
    return TrainedRun.shared(CausalWorkplace, shared_folder / "trained-clm")


@pytest.fixture(scope="session")
def trained_translation(shared_folder) -> TrainedRun:
    """A run of `run_translation.py` through both stages, with its checkpoints: to read, not to change."""
    return TrainedRun.shared(TranslationWorkplace, shared_folder / "trained-translation")


@pytest.fixture
def trained_clm_copy(trained_clm, tmp_path) -> Path:
    """The run folder's copy, to change."""
    return Path(shutil.copytree(trained_clm.folder, tmp_path / "whole"))


@pytest.fixture
def trained_translation_copy(trained_translation, tmp_path) -> Path:
    """The run folder's copy, to change."""
    return Path(shutil.copytree(trained_translation.folder, tmp_path / "whole"))


@pytest.fixture
def forked_probe(monkeypatch):
    """Let the check of a release load a checkpoint's own code in a fork, which need not import torch first."""

    def run(command: list[str], *, input: str, cwd: str, **options):
        return interpreters().run("-c", input, *command[2:], cwd=cwd)

    monkeypatch.setattr(release_checks, "subprocess", SimpleNamespace(run=run))
