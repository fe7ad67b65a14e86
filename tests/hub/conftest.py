"""A stand-in for the Hub, and interpreters that take it for the Hub: one of each for all tests of publishing."""

import os
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.hub_server import HubServer
from helpers.interpreters import Interpreters


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="session")
def run_on_hub(hub):
    """A function that runs code, or a script, with arguments in a folder; it returns what was printed."""
    environment = {**os.environ, **hub.environment, "PYTHONPATH": ""}
    with Interpreters(environment) as interpreters:

        def run(folder: Path, program: str | Path, *arguments: str, **more: str) -> str:
            command = [program] if isinstance(program, Path) else ["-c", program]
            paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
            done = interpreters.run(*command, *arguments, cwd=folder, environment=environment | paths | more)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            return done.stdout

        yield run
