"""What offloading costs, by the script that measures it."""

import json

import pytest

from helpers import ROOT
from helpers.matrices import one_fast
from helpers.workplaces import load_script, refuse


script = load_script("measure_offloading")
PRESET = ["--model_preset", str(ROOT / "configuration" / "models" / "tiny.json"), "--device", "cpu"]
OVERRIDES = {"num_experts": 16, "router_type": "hash", "hidden_size": 32, "num_attention_heads": 4}
TINY = [*PRESET, "--config_overrides", json.dumps(OVERRIDES), "--prompt_length", "8", "--steps", "6", "--rounds", "2"]


@pytest.fixture
def in_one_process(monkeypatch):
    monkeypatch.setattr(script, "run_alone", lambda function, **arguments: function(**arguments))


@pytest.mark.parametrize("options", one_fast(["--drop_cache", "true", "--dtype", "bfloat16"], []), ids=str)
def test_every_way_is_measured(in_one_process, tmp_path, capsys, options):
    script.main([*TINY, "--experts_on_device", "2", "--output_dir", str(tmp_path), *options])
    result = json.loads((tmp_path / "offloading.json").read_text())
    measured = result["measured"]
    assert list(measured) == ["memory", "offload-host", "offload-disk", "accelerate-disk"]
    assert all(arm[phase]["tokens_a_second"] > 0 for arm in measured.values() for phase in ("prefill", "decoding"))
    assert measured["offload-disk"]["decoding"]["hit_rate"] == 1
    moved = {name: arm["decoding"]["megabytes_a_pass"] for name, arm in measured.items()}
    assert moved["memory"] == 0
    # One expert of each layer at most, of 16.
    assert 0 < moved["offload-disk"] == moved["offload-host"] <= moved["accelerate-disk"] / 16
    report = (tmp_path / "offloading.md").read_text()
    assert report in capsys.readouterr().out
    assert "| ours, checkpoint |" in report
    assert "- ours, checkpoint / all on the device: " in report
    assert result["ratios"]["offload-disk / accelerate-disk"]["decoding"]["median"] > 0
    assert ("read from the disk" in report) == bool(options)


def test_what_cannot_be_measured_is_one_line(tmp_path):
    assert "--rounds must be >= 1, got 0" in refuse(script.main, [*TINY[:-1], "0"])
    assert "no safetensors file" in refuse(script.main, ["--model", str(tmp_path)])
    assert "do not fit `max_position_embeddings`" in refuse(script.main, [*TINY, "--steps", "5000"])
    assert "must be a JSON object" in refuse(script.main, [*PRESET, "--config_overrides", "3"])


@pytest.mark.slow
def test_each_is_measured_in_a_process_of_its_own(tmp_path):
    script.main([*TINY[:-1], "1", "--output_dir", str(tmp_path)])
    measured = json.loads((tmp_path / "offloading.json").read_text())["measured"]
    assert measured["offload-disk"]["decoding"]["hit_rate"] == 1
    assert all(arm["peak_megabytes"] > 0 for arm in measured.values())
