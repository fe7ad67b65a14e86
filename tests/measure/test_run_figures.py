"""Figures of runs from their folders, and the script."""

import json
import re
import shutil
import sys

import pytest

from helpers.models import tiny_model
from helpers.trainers import BLOCKS, make_trainer, training_logs
from helpers.workplaces import load_script, refuse
from modeling_stablemoe import RoutingFluctuationCallback, RoutingStatisticsCallback, StageTransitionCallback
from modeling_stablemoe.measure import run_figures
from modeling_stablemoe.measure.run_figures import RunHistory, read_run, write_run_figures


plot_run = load_script("plot_run").main
ALL = {"loss", "fluctuation", "load", "expert_load", "distillation", "gates"}


@pytest.fixture(scope="module", autouse=True)
def _no_pictures_while_training():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_stablemoe.measure.fluctuation.plot_fluctuation", lambda summary: None)
        yield


def train(folder, *callbacks, model, **arguments):
    watch = RoutingFluctuationCallback(BLOCKS, check_steps=3, num_tokens=64)
    arguments = {"eval_strategy": "steps", "eval_steps": 4, **arguments}
    trainer = make_trainer(folder, *callbacks, watch, model=model, **arguments)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A finished run of two MoE layers through both stages."""
    folder = tmp_path_factory.mktemp("runs") / "frozen"
    train(folder, StageTransitionCallback(6), model=tiny_model(moe_layer_positions=[0, 2])).save_state()
    return folder


@pytest.fixture(scope="module")
def hashed(tmp_path_factory):
    """A run with a hash that was killed: it has two checkpoints and no more."""
    folder = tmp_path_factory.mktemp("runs") / "hashed"
    model = tiny_model(router_type="hash")
    train(folder, RoutingStatisticsCallback(), model=model, save_strategy="steps", save_steps=6)
    (folder / "routing_fluctuation.json").unlink()
    (folder / "checkpoint-best").mkdir()
    return folder


def shown(file) -> str:
    """An SVG file, which holds each text as a comment beside its outline."""
    return file.read_text()


def test_runs_stand_side_by_side_under_their_labels_with_the_stage_boundary(frozen, hashed, tmp_path):
    pytest.importorskip("matplotlib")
    labels = ["StableMoE", "Hash"]
    files = write_run_figures([read_run(frozen, labels[0]), read_run(hashed, labels[1])], tmp_path, ("svg",))
    assert {file.stem for file in files} == ALL
    for file in files:
        text = shown(file)
        assert "<!-- routing frozen -->" in text, file
        assert "<!-- step -->" in text, file
        if file.stem not in ("distillation", "expert_load"):
            assert all(f"<!-- {label} -->" in text for label in labels), file
    loads = shown(tmp_path / "expert_load.svg")
    assert all(f"<!-- {title} -->" in loads for title in ("StableMoE, layer_0", "StableMoE, layer_1", "Hash, layer_0"))
    # A hash distils nothing.
    assert "<!-- Hash -->" not in shown(tmp_path / "distillation.svg")


def test_history_is_that_of_the_last_checkpoint_where_the_run_did_not_end(hashed):
    run = read_run(hashed)
    assert run.label == "hashed"
    assert max(entry["step"] for entry in run.log_history) == 12
    assert read_run(hashed / "checkpoint-6", "half").curve("task_loss")[0] == [3, 6]
    assert run.transition_step is None
    # The checks are kept while the run goes on, the report is written at its end.
    assert run.fluctuation["steps"] == [0, 3, 6, 9, 12]


def test_loads_of_layers_and_experts_are_read_as_they_were_logged(frozen, tmp_path):
    run = read_run(frozen)
    steps, layers = run.expert_load()
    assert steps == [3, 6, 9, 12]
    assert [list(layers), [len(row) for rows in layers.values() for row in rows]] == [["layer_0", "layer_1"], [5] * 8]
    logs = training_logs(run.log_history)
    for name in ("load_max_over_mean", "load_entropy", "dead_experts"):
        for layer, (_, values) in run.layer_curves()[name].items():
            assert values == pytest.approx([entry[f"{name}/{layer}"] for entry in logs], abs=1e-3)
    least = run.layer_curves()["load_min_over_mean"]
    assert [min(pair) for pair in zip(*(values for _, values in least.values()), strict=True)] == pytest.approx(
        [entry["load_min_over_mean"] for entry in logs], abs=1e-4
    )

    scalars = RoutingStatisticsCallback(expert_load="reporters")
    train(tmp_path, scalars, model=tiny_model()).save_state()
    steps, layers = read_run(tmp_path).expert_load()
    assert steps == [3, 6, 9, 12]
    assert {layer: [len(row) for row in rows] for layer, rows in layers.items()} == {"layer_0": [5] * 4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"log_history": [{"step": 3', "trainer_state.json' is not valid JSON: .* may have been cut off"),
        ("[]", "is not a JSON object, but a list"),
        ('{"log_history": [{"loss": 1.0}]}', "holds no `log_history`: it is no state of a Trainer"),
        ('{"log_history": []}', "Nothing was logged in .*: train on, or lower `logging_steps`"),
        ('{"log_history": [{"step": 3, "epoch": 1.0}]}', "the logs hold nothing to draw"),
        (None, "neither `trainer_state.json` nor a checkpoint with one"),
    ],
)
def test_a_history_that_cannot_be_drawn_is_one_line(tmp_path, content, message):
    pytest.importorskip("matplotlib")
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    assert re.search(message, refuse(plot_run, [str(tmp_path)]))
    assert refuse(plot_run, [str(tmp_path / "nowhere")]).startswith("error: There is no folder")


def test_a_short_run_has_no_empty_panels_and_shows_single_logs(tmp_path):
    pytest.importorskip("matplotlib")
    history = [
        {"step": 2, "loss": 1.0, "load_entropy": 0.9, "distillation_agreement": 0.3, "routing_fluctuation": None},
        {"step": 3, "transition_step": 3},
    ]
    figures = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_figures, "save_figure", lambda figure, path: figures.setdefault(path.stem, figure))
        write_run_figures([RunHistory("short", history)], tmp_path)
    assert {name: len(figure.axes) for name, figure in figures.items()} == {"loss": 1, "load": 1, "distillation": 1}
    for name, figure in figures.items():
        figure.canvas.draw()  # a figure of one panel has its width and height alone
        assert figure.get_size_inches()[0] <= 5, name
        assert figure.axes[0].get_position().width > 0.7, name
        assert figure.axes[0].lines[0].get_marker() == ".", name


def test_runs_of_one_name_are_refused(frozen, tmp_path):
    pytest.importorskip("matplotlib")
    assert "Runs need different labels" in refuse(plot_run, [str(frozen), str(frozen), "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        plot_run([str(frozen), "--labels", "a", "b"])


def test_a_damaged_list_of_checks_is_one_line(frozen, tmp_path):
    shutil.copytree(frozen, tmp_path / "run")
    (tmp_path / "run" / "routing_fluctuation.safetensors").write_bytes(b"cut off")
    assert "is not a readable safetensors file" in refuse(plot_run, [str(tmp_path / "run")])


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 3, "loss": 1.0}]}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "modeling_stablemoe[plots]"' in refuse(plot_run, [str(tmp_path)])


def test_what_was_logged_is_drawn_into_the_run_folder_and_a_classifier_has_no_perplexity(tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    history = [{"step": step, "loss": 1.0, "eval_loss": 0.7} for step in (2, 4)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    for name, unit in (("StableMoEForSequenceClassification", "loss"), ("StableMoEForCausalLM", "perplexity")):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
        plot_run([str(tmp_path), "--svg"])
        text = shown(tmp_path / "figures" / "loss.svg")
        assert f"<!-- {unit} -->" in text
        assert ("perplexity" in text) == (unit == "perplexity")
    drawn = {str(file) for file in (tmp_path / "figures").iterdir()}
    assert drawn == {str(tmp_path / "figures" / name) for name in ("loss.png", "loss.svg")}
    assert drawn == set(capsys.readouterr().out.splitlines())
    assert image.imread(tmp_path / "figures" / "loss.png").std() > 0.05
