"""Every script, as `python` starts it."""

import ast
import runpy

import pytest

from helpers import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_every_script_starts_and_says_what_it_is_for(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    purpose = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    assert purpose in " ".join(capsys.readouterr().out.split())
