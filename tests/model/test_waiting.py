"""Tests that a step on an accelerator never waits for it, on a device that is pretended: there is none here."""

import json
import os

import pytest
from torch.utils import backend_registration

from helpers import ROOT
from helpers.interpreters import interpreters


pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot pretend a device",
)


@pytest.fixture(scope="module")
def waits() -> dict[str, str | None]:
    script = ROOT / "tests" / "helpers" / "scripts" / "pretend_gpu.py"
    result = interpreters().run(script, cwd=ROOT, environment={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.stdout, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_look_at_a_value_and_a_copy_to_or_from_the_host_would_be_noticed(waits):
    looks = {name: wait for name, wait in waits.items() if name.startswith("look")}
    assert len(looks) == 6
    assert all(looks.values())


@pytest.mark.parametrize("stage", ["stage 1", "stage 2"])
@pytest.mark.parametrize("step", ["train", "decode"])
def test_a_step_of_a_stage_waits_for_nothing(waits, step, stage):
    steps = {name: wait for name, wait in waits.items() if name.startswith(f"{step} {stage}")}
    assert len(steps) >= 3
    assert not {name: wait for name, wait in steps.items() if wait}


@pytest.mark.parametrize("variant", ["hash", "switch", "counting", "capacity", "shared"])
def test_a_training_step_of_another_router_waits_for_nothing(waits, variant):
    assert waits[f"train {variant}"] is None


def test_balancing_tokens_as_base_does_waits(waits):
    # Not for good, but a reader of the README is told so.
    assert waits["train base"]
