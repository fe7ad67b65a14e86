"""What statistics cost, by the script that measures it."""

from statistics import median

import pytest

from helpers import ROOT
from helpers.workplaces import load_script, refuse


script = load_script("measure_statistics")
TINY = ["--model_preset", str(ROOT / "configuration" / "models" / "tiny.json")]


def test_the_script_measures_both_stages(capsys):
    script.main([*TINY, "--steps", "2", "--batch_size", "2", "--logging_steps", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("stage")] == ["stage 1", "stage 2"]
    assert sum("ms a step" in line for line in lines) == 6
    assert sum("% (quartiles" in line for line in lines) == 6


def test_what_cannot_be_measured_is_one_line():
    assert "--steps must be >= 2, got 1" in refuse(script.main, [*TINY, "--steps", "1"])
    assert "must be a JSON object" in refuse(script.main, [*TINY, "--config_overrides", "3"])
    assert "There is no model preset" in refuse(script.main, ["--model_preset", "nowhere.json"])


@pytest.mark.slow
def test_statistics_cost_less_than_3_percent_of_a_step():
    preset = str(ROOT / "configuration" / "models" / "cpu-small.json")
    measured = script.measure(script.MeasureArguments(model_preset=preset))
    for seconds in measured.values():
        assert median(script.ratios(seconds)["together"]) < 3
