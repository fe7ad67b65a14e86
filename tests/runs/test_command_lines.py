"""Every script, in a process of its own."""

import ast

import pytest

from helpers import ROOT
from helpers.workplaces import Workplace


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_every_script_starts_and_says_what_it_is_for(path, tmp_path):
    done = Workplace(tmp_path).attempt(path, "--help")
    assert done.returncode == 0, done.stderr
    purpose = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    assert purpose in " ".join(done.stdout.split())
