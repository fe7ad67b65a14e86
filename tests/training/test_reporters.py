"""Reporters for real: what TensorBoard and trackio hold after a run."""

import json
from importlib.util import find_spec

import pytest

from helpers import ROOT
from helpers.models import tiny_model
from helpers.trainers import BLOCKS, STATISTICS, make_trainer
from helpers.workplaces import Workplace
from modeling_stablemoe import RoutingFluctuationCallback, StageTransitionCallback
from modeling_stablemoe.training import RoutingTrainer


LOGGED = {
    *STATISTICS,
    "load_min_over_mean",
    "load_entropy",
    "load_entropy/layer_0",
    "load_entropy/layer_1",
    "dead_experts",
    "dead_experts/layer_0",
    "router_entropy",
    "tokens_per_second",
    "table_change",
    "routing_fluctuation",
    "transition_agreement",
    *(f"expert_load/layer_{layer}/expert_{expert}" for layer in range(2) for expert in range(5)),
}


def curve(history: list[dict], name: str) -> dict[int, float]:
    """The values of a name by step; the last entry of a history sums up the run."""
    return {entry["step"]: entry[name] for entry in history if name in entry and "train_loss" not in entry}


def test_tensorboard_files_hold_what_the_history_does(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        tmp_path,
        StageTransitionCallback(6, expert_load="reporters"),
        RoutingFluctuationCallback(BLOCKS, check_steps=3, num_tokens=64),
        model=tiny_model(moe_layer_positions=[0, 2]),
        trainer_class=RoutingTrainer,
        report_to="tensorboard",
    )
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    history = trainer.state.log_history
    assert {name for entry in history for name in entry} >= LOGGED
    for name in LOGGED:
        scalars = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert scalars == pytest.approx(curve(history, name), rel=1e-5), name


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_keeps_what_the_history_does_without_network_or_dashboard(tmp_path):
    Workplace(tmp_path).run(str(ROOT / "tests" / "helpers" / "scripts" / "train_with_trackio.py"), str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert {name for entry in result["history"] for name in entry} >= LOGGED
    for name in LOGGED:
        kept = {
            entry["train/global_step"]: entry[f"train/{name}"] for entry in result["kept"] if f"train/{name}" in entry
        }
        assert kept == pytest.approx(curve(result["history"], name)), name
    assert list((tmp_path / "trackio").glob("*.db"))
