"""Tests of kills, full disks, damaged files and changes of engine: no run loses more than the steps since its last save."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file

from helpers.checkpoints import CODE_FILES
from helpers.forks import LATEST, ShortWorkplace, die, fault, fill_disk, finish, fork_script, last_step
from helpers.trainers import make_trainer
from helpers.workplaces import assert_same_saved_weights, content, load_script, refuse
from modeling_stablemoe.checkpoints.engines import check_engine
from modeling_stablemoe.checkpoints.folders import last_complete_checkpoint, what_is_missing
from modeling_stablemoe.checkpoints.manifests import MANIFEST_FILE, CheckpointManifestCallback
from modeling_stablemoe.training.transition import StageTransitionCallback


class SteadyWorkplace(ShortWorkplace):
    """Without dropout, which draws other numbers on another number of processes."""

    dropout = 0.0


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return ShortWorkplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    return SteadyWorkplace(tmp_path_factory.mktemp("steady"))


@pytest.fixture(scope="module")
def whole(workplace):
    """The folder of a run that nothing interrupts."""
    return finish(workplace, "whole")


def break_at(workplace, output, point, step, action=die, rank=None, engine="one"):
    """Resume a run (or start it) and let a fault happen in it; return what it printed."""
    more = LATEST if (workplace.folder / output).exists() else ()
    run = fork_script(workplace, output, *more, engine=engine, before=fault(point, step, action, rank))
    assert any(run.wait())
    assert f"fault: {point}\n" in run.output, run.output[-3000:]
    if action is die:
        assert "Traceback" not in run.output or engine != "one", run.output[-3000:]
    return run.output


# Kills


# What is hit, at which step, and the step of the checkpoint that is left.
FEW_KILLS = [("watch", 2, None), ("transition", 4, 2), ("manifest", 6, 4)]
ALL_KILLS = [
    ("random state", 2, None),
    ("watch", 2, None),
    ("transition", 4, 2),
    ("optimizer", 4, 2),
    ("weights", 6, 4),
    ("trainer state", 6, 4),
    ("manifest", 8, 6),
    ("rotation", 8, 8),
]


@pytest.mark.parametrize("kills", [FEW_KILLS, pytest.param(ALL_KILLS, marks=pytest.mark.slow)], ids=["few", "all"])
def test_killed_at_points_of_a_save_and_at_the_transition(workplace, whole, kills):
    name = f"killed-{len(kills)}"
    for point, step, survivor in kills:
        break_at(workplace, name, point, step)
        assert last_step(workplace.folder / name) == survivor, (point, step)
    finish(workplace, name, *LATEST)
    assert_same_saved_weights(workplace.folder / name, whole)


def test_only_one_checkpoint_is_kept_and_a_kill_in_the_next_save_leaves_it(workplace, whole):
    folder = workplace.folder / "kept"
    limit = ("--save_total_limit", "1")
    run = fork_script(workplace, "kept", *limit, before=fault("manifest", 6, die))
    assert run.wait() == [-signal.SIGKILL]
    # All of Trainer's own files of step 6 were there, and it would have deleted step 4 by then.
    assert (folder / "checkpoint-6" / "trainer_state.json").exists()
    assert last_step(folder) == 4
    finish(workplace, "kept", *limit, *LATEST)
    assert_same_saved_weights(folder, whole)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-10"]


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="Trainer 5.15 cannot resume several processes on CPUs: it reads moments to `cpu:0`",
)
def test_one_killed_process_of_two_leaves_no_checkpoint_without_its_random_state(workplace):
    expected = finish(workplace, "two-whole", engine="ddp")
    folder = workplace.folder / "two"
    # The first process has written all that is its own, `trainer_state.json` last of all.
    break_at(workplace, "two", "random state", 4, lambda: (time.sleep(1), die()), rank=1, engine="ddp")
    assert (folder / "checkpoint-4" / "trainer_state.json").exists()
    assert last_step(folder) == 2
    finish(workplace, "two", *LATEST, engine="ddp")
    assert_same_saved_weights(folder, expected)


# A full disk


FEW_POINTS = [("optimizer", 2, None), ("manifest", 4, 2)]
ALL_POINTS = [
    ("weights", 2, None),
    ("optimizer", 4, 2),
    ("random state", 6, 4),
    ("trainer state", 8, 6),
    ("manifest", 10, 8),
]


@pytest.mark.parametrize("points", [FEW_POINTS, pytest.param(ALL_POINTS, marks=pytest.mark.slow)], ids=["few", "all"])
def test_full_disk_at_points_of_a_save_is_one_line_and_costs_nothing(workplace, whole, points):
    folder = workplace.folder / f"full-{len(points)}"
    for point, step, survivor in points:
        output = break_at(workplace, folder.name, point, step, fill_disk)
        last_line = output.strip().splitlines()[-1]
        assert last_line.startswith(f"error: Saving to {str(folder)!r} failed at step {step}, with "), output[-3000:]
        assert "Make room" in last_line
        assert "Traceback" not in output
        assert last_step(folder) == survivor
    finish(workplace, folder.name, *LATEST)
    assert_same_saved_weights(folder, whole)


@pytest.mark.slow
def test_disk_that_is_really_full(workplace, whole, tmp_path):
    checkpoint = sum(path.stat().st_size for path in (whole / "checkpoint-10").iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={5 * checkpoint}", "none", tmp_path]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a file system of its own needs privileges")
    try:
        (tmp_path / "ballast").write_bytes(bytes(3 * checkpoint))
        run = fork_script(workplace, str(tmp_path / "run"))
        assert run.wait() == [1]
        # Which of them depends on what is being written: a file of safetensors, or one of torch's own streams.
        assert any(text in run.output for text in ("No space left", "unexpected pos", "iostream error"))
        assert run.output.strip().splitlines()[-1].startswith("error: Saving to")
        (tmp_path / "ballast").unlink()
        finish(workplace, str(tmp_path / "run"), *LATEST)
        assert_same_saved_weights(tmp_path / "run", whole)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# Damaged files


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 1 << 3
    path.write_bytes(data)


FILES = [
    "model.safetensors",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "stage1_watch.safetensors",
]


@pytest.fixture(scope="module")
def run_of_stage1(tmp_path_factory):
    """A run folder with two checkpoints of stage 1."""
    folder = tmp_path_factory.mktemp("run")
    callbacks = (StageTransitionCallback(0.9), CheckpointManifestCallback())
    make_trainer(folder, *callbacks, max_steps=10, save_strategy="steps", save_steps=4).train()
    shutil.rmtree(folder / "checkpoint-10")
    return folder


# Each file in one way, and the weights in all.
DAMAGE = [*zip(FILES, [cut, flip, Path.unlink] * 3, strict=False), (FILES[0], flip), (FILES[0], Path.unlink)]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_damaged_file_is_named_and_its_checkpoint_passed_over(run_of_stage1, tmp_path, caplog, name, damage):
    run = shutil.copytree(run_of_stage1, tmp_path / "run")
    assert last_complete_checkpoint(run) == run / "checkpoint-8"
    damage(run / "checkpoint-8" / name)
    with caplog.at_level(logging.WARNING, logger="modeling_stablemoe.checkpoints.folders"):
        assert last_complete_checkpoint(run) == run / "checkpoint-4"
    assert f"Passing over {run / 'checkpoint-8'}: {name} " in caplog.text


def test_damaged_manifest_is_no_manifest_to_trust(run_of_stage1, tmp_path):
    run = shutil.copytree(run_of_stage1, tmp_path / "run")
    cut(run / "checkpoint-8" / MANIFEST_FILE)
    assert MANIFEST_FILE in what_is_missing(run / "checkpoint-8")


def test_checkpoint_of_a_plain_trainer_needs_no_manifest_but_whole_files(tmp_path):
    trainer = make_trainer(tmp_path, StageTransitionCallback(3), max_steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    assert what_is_missing(tmp_path / "checkpoint-4") is None
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        damaged = shutil.copytree(tmp_path / "checkpoint-4", tmp_path / name)
        cut(damaged / name)
        assert what_is_missing(damaged).startswith(f"{name} cannot be read")


def test_checkpoint_from_before_manifests_is_resumed_and_the_next_has_one(tmp_path):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, StageTransitionCallback(3), **options).train()
    shutil.rmtree(tmp_path / "checkpoint-8")
    trainer = make_trainer(tmp_path, StageTransitionCallback(3), CheckpointManifestCallback(), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (tmp_path / "checkpoint-8" / MANIFEST_FILE).exists()
    assert what_is_missing(tmp_path / "checkpoint-8") is None


def test_naming_a_damaged_checkpoint_is_one_line_and_changes_nothing(workplace, whole, tmp_path, monkeypatch):
    run = shutil.copytree(whole, tmp_path / "run")
    flip(run / "checkpoint-10" / "optimizer.pt")
    before = content(run)
    monkeypatch.chdir(workplace.folder)
    arguments = workplace.arguments(str(run), "--resume_from_checkpoint", str(run / "checkpoint-10"))
    message = refuse(load_script("run_clm").main, arguments)
    assert "checkpoint-10' cannot be resumed: optimizer.pt was altered" in message
    assert content(run) == before


# Other engines and other numbers of processes


@pytest.fixture(scope="module")
def by_one(steady):
    """The folder of a run of one process."""
    return finish(steady, "one")


@pytest.mark.parametrize(
    "engines",
    [["ddp", "fsdp"], pytest.param(["ddp", "fsdp", "one", "fsdp"], marks=pytest.mark.slow)],
    ids=lambda engines: "-".join(engines),
)
def test_run_goes_from_engine_to_engine(steady, by_one, engines):
    name = f"moved-{len(engines)}"
    folder, (*others, last) = steady.folder / name, engines
    for step, engine in zip((2, 4, 6), others, strict=False):
        break_at(steady, name, "weights", step + 2, engine=engine)
        assert last_step(folder) == step
    finish(steady, name, *LATEST, engine=last)
    assert last_step(folder) == 10
    assert not list(folder.glob("*.partial"))
    assert_close_saved_weights(folder, by_one)
    # What an engine has wrapped is saved under its own name, with its code.
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_stablemoe.StableMoEForCausalLM"
    assert {path.name for path in folder.glob("*.py")} == CODE_FILES
    # A run that is finished is finished, under any engine.
    before = load_file(folder / "model.safetensors")
    finish(steady, name, *LATEST, engine=engines[0])
    after = load_file(folder / "model.safetensors")
    assert not [key for key in after if not torch.equal(before[key], after[key])]


@pytest.mark.slow
def test_run_with_parameters_that_never_get_a_gradient_goes_from_engine_to_engine(steady):
    # A hash from the start: the distilled router is never trained, and one process keeps no moments for it.
    fixed = ("--hash_table", "random", "--stage1_steps", "")
    expected = finish(steady, "fixed-one", *fixed)
    for step, engine in ((4, "one"), (8, "fsdp")):
        more = LATEST if step > 4 else ()
        run = fork_script(steady, "fixed", *fixed, *more, engine=engine, before=fault("weights", step, die))
        assert any(run.wait()), run.output[-3000:]
        assert last_step(steady.folder / "fixed") == step - 2, run.output[-3000:]
    finish(steady, "fixed", *fixed, *LATEST)
    # Several processes decay the weights of what is not trained, one does not: nothing reads them.
    assert_close_saved_weights(steady.folder / "fixed", expected, untrained="distilled_router")


def assert_close_saved_weights(folder, expected, untrained="none"):
    actual, expected = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    # FSDP writes tied weights under both names.
    assert expected.keys() <= actual.keys()
    for name, weight in expected.items():
        if untrained in name:
            continue
        # The order of summation differs; ten steps at 1e-2 move weights by 0.1.
        torch.testing.assert_close(actual[name], weight, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("global_step8", "saved under DeepSpeed and cannot be resumed under one process or DDP"),
        ("pytorch_model_fsdp_0", "saved under FSDP with SHARDED_STATE_DICT and cannot be resumed under one process"),
    ],
)
def test_checkpoint_that_is_sharded_over_processes_is_left_to_its_engine(run_of_stage1, tmp_path, part, message):
    checkpoint = shutil.copytree(run_of_stage1 / "checkpoint-8", tmp_path / "checkpoint-8")
    check_engine(make_trainer(tmp_path), checkpoint)
    (checkpoint / part).mkdir()
    with pytest.raises(ValueError, match=message):
        check_engine(make_trainer(tmp_path), checkpoint)
