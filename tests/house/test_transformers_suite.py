"""The report of transformers' own test suite counts what pytest wrote."""

import argparse
import sys

import pytest

from helpers import ROOT


SCRIPT = ROOT / "tests" / "helpers" / "scripts" / "run_transformers_suite.py"

REPORT = """<testsuites><testsuite>
<testcase name="test_runs" />
<testcase name="test_breaks"><failure message="AssertionError: 1 != 2&#10;more">trace</failure></testcase>
<testcase name="test_fetches"><error message="OSError: We couldn't connect to 'https://huggingface.co'">x</error></testcase>
<testcase name="test_gpu"><skipped message="test requires CUDA" /></testcase>
<testcase name="test_tpu"><skipped message="test requires accelerator" /></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def suite_script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import run_transformers_suite

    return run_transformers_suite


def test_a_report_is_counted_by_outcome_and_skips_are_grouped_by_reason(suite_script, tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    tally = suite_script.Tally.read("olmoe", tmp_path / "report.xml")
    assert str(tally) == "olmoe: 1 passed, 1 failed, 2 skipped, 1 need the network"
    assert tally.failed == {"test_breaks": "AssertionError: 1 != 2"}
    assert list(tally.skipped.values()) == [2]


@pytest.mark.slow
def test_the_suites_tests_of_a_model_run_under_its_own_configuration(suite_script, tmp_path):
    folder = tmp_path / "tests" / "models" / "toy"
    folder.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\npython_files = 'modeling_*.py'\n")
    (tmp_path / "conftest.py").write_text("import pytest\n@pytest.fixture\ndef two():\n    return 2\n")
    (folder / "modeling_toy.py").write_text(
        "def test_toy(two):\n    assert two == 2\ndef test_slow():\n    assert 0\n"
    )
    arguments = argparse.Namespace(suite=tmp_path, slow=False, sharded=False, timeout=60, k="toy and not slow")
    assert str(suite_script.run("toy", [str(folder)], arguments, None)) == "toy: 1 passed, 0 failed, 0 skipped"


def test_a_folder_without_the_suite_is_refused_in_one_line(suite_script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--suite", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        suite_script.main()
    assert stop.value.code == 2
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert refusal.endswith("holds no tests/causal_lm_tester.py: pass a clone of transformers.")
