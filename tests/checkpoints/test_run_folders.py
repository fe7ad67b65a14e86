"""Tests of run folders and of checkpoints that a crash cut off."""

import json
import logging

import pytest
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from helpers.models import tiny_model
from modeling_stablemoe.checkpoints.folders import (
    check_run_folder,
    checkpoints_in,
    claim_run_folder,
    last_complete_checkpoint,
    remove_incomplete_checkpoints,
    run_identity,
    what_is_missing,
)


IDENTITY = {"learning_rate": 0.1, "train_files": ["a.txt"], "seed": None}


def claim(folder, identity=None, *, resume=False, overwrite=False):
    return claim_run_folder(folder, identity or IDENTITY, resume=resume, overwrite=overwrite)


def content(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_checkpoint(run, step, **options):
    folder = run / f"checkpoint-{step}"
    tiny_model().save_pretrained(folder, **options)
    TrainerState(global_step=step).save_to_json(folder / "trainer_state.json")
    return folder


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


# Claiming a folder


@pytest.mark.parametrize("resume", [False, True])
def test_new_folder_is_made_and_marked(tmp_path, resume):
    assert claim(tmp_path / "a" / "b", resume=resume) is None
    assert json.loads((tmp_path / "a" / "b" / "run.json").read_text()) == IDENTITY
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run.json"]


def test_empty_folder_is_free(tmp_path):
    assert claim(tmp_path) is None


def test_folder_that_holds_a_run_is_not_touched_without_a_flag(tmp_path):
    claim(tmp_path)
    with pytest.raises(
        ValueError, match=r"without a whole checkpoint yet\. Replace it with `--overwrite_output_dir`, or choose"
    ):
        claim(tmp_path)
    save_checkpoint(tmp_path, 3)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="holds a run already.*--resume_from_checkpoint latest.*--overwrite"):
        claim(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_folder_that_holds_other_files_is_never_touched(tmp_path, flags):
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(ValueError, match="is not empty and holds no run of this script"):
        claim(tmp_path, **flags)
    assert (tmp_path / "thesis.tex").read_text() == "ten years"


def test_overwriting_deletes_the_old_run(tmp_path):
    claim(tmp_path, {"learning_rate": 0.2})
    save_checkpoint(tmp_path, 3)
    assert claim(tmp_path, overwrite=True) is None
    assert list(content(tmp_path).values()) == [(json.dumps(IDENTITY, indent=2) + "\n").encode()]


def test_resuming_gives_the_last_checkpoint(tmp_path):
    claim(tmp_path)
    assert claim(tmp_path, resume=True) is None
    save_checkpoint(tmp_path, 3)
    assert claim(tmp_path, resume=True) == tmp_path / "checkpoint-3"


def test_resuming_another_run_names_the_settings_that_differ(tmp_path):
    claim(tmp_path)
    before = content(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds another run \(learning_rate: 0.1 there, 0.2 here; new: None .*7 here"
    ):
        claim(tmp_path, {**IDENTITY, "learning_rate": 0.2, "new": 7}, resume=True)
    assert content(tmp_path) == before


def identity_of(per_device, accumulation=1):
    arguments = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    return run_identity(TrainingArguments(use_cpu=True, **arguments), {"preset": "tiny"})


def test_same_batch_divided_otherwise_is_the_same_run_with_a_warning(tmp_path, caplog):
    claim(tmp_path, identity_of(4))
    folder = save_checkpoint(tmp_path, 3)
    with caplog.at_level(logging.WARNING, logger="modeling_stablemoe.checkpoints.folders"):
        assert claim(tmp_path, identity_of(4), resume=True) == folder
        assert not caplog.records
        assert claim(tmp_path, identity_of(2, accumulation=2), resume=True) == folder
    assert "per_device_train_batch_size: 4 there, 2 here; gradient_accumulation_steps: 1 there, 2 here" in caplog.text


def test_another_batch_is_another_run(tmp_path):
    claim(tmp_path, identity_of(4))
    with pytest.raises(ValueError, match=r"holds another run \(total_train_batch_size: 4 there, 8 here\)"):
        claim(tmp_path, identity_of(4, accumulation=2), resume=True)


def test_run_of_a_version_that_stored_no_total_needs_the_same_division(tmp_path):
    old = {
        name: value for name, value in identity_of(4).items() if name not in ("processes", "total_train_batch_size")
    }
    claim(tmp_path, old)
    claim(tmp_path, identity_of(4), resume=True)
    with pytest.raises(ValueError, match="per_device_train_batch_size: 4 there, 2 here"):
        claim(tmp_path, identity_of(2, accumulation=2), resume=True)


def test_both_flags_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="exclude each other"):
        claim(tmp_path, resume=True, overwrite=True)


def test_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        claim(tmp_path / "run")


def test_damaged_run_file_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        claim(tmp_path, resume=True)


def test_checking_a_folder_changes_nothing(tmp_path):
    check_run_folder(tmp_path / "run", IDENTITY, resume=False, overwrite=False)
    assert not (tmp_path / "run").exists()
    claim(tmp_path / "run")
    before = content(tmp_path)
    check_run_folder(tmp_path / "run", IDENTITY, resume=False, overwrite=True)
    assert content(tmp_path) == before


# Checkpoints


def test_checkpoints_are_listed_newest_first_by_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "checkpoint-10-old", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-10", "checkpoint-9"]
    assert checkpoints_in(tmp_path / "nothing") == []


def no_state(folder):
    (folder / "trainer_state.json").unlink()


def cut_state(folder):
    cut(folder / "trainer_state.json")


def cut_weights(folder):
    cut(folder / "model.safetensors", 0.9)


def cut_header(folder):
    cut(folder / "model.safetensors", 0.001)


def empty_weights(folder):
    cut(folder / "model.safetensors", 0)


@pytest.mark.parametrize("damage", [no_state, cut_state, cut_weights, cut_header, empty_weights])
def test_checkpoint_that_was_cut_off_is_passed_over_and_removed(tmp_path, caplog, damage):
    whole, damaged = save_checkpoint(tmp_path, 8), save_checkpoint(tmp_path, 10)
    assert last_complete_checkpoint(tmp_path) == damaged
    damage(damaged)
    with caplog.at_level(logging.WARNING, logger="modeling_stablemoe.checkpoints.folders"):
        assert last_complete_checkpoint(tmp_path) == whole
    assert f"Passing over {damaged}" in caplog.text
    before = content(whole)
    remove_incomplete_checkpoints(tmp_path)
    assert checkpoints_in(tmp_path) == [whole]
    assert content(whole) == before


def cut_shard(folder):
    cut(sorted(folder.glob("model-*.safetensors"))[1], 0.9)


def lose_shard(folder):
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()


def cut_index(folder):
    cut(folder / "model.safetensors.index.json")


@pytest.mark.parametrize("damage", [cut_shard, lose_shard, cut_index])
def test_sharded_checkpoint_needs_every_shard(tmp_path, damage):
    folder = save_checkpoint(tmp_path, 10, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert what_is_missing(folder) is None
    damage(folder)
    assert "cannot be read" in what_is_missing(folder)
    assert last_complete_checkpoint(tmp_path) is None


def test_a_folder_that_holds_only_half_written_files_is_free(tmp_path):
    (tmp_path / "run.json.partial").write_text("{")
    assert claim_run_folder(tmp_path, {"seed": 0}, resume=False, overwrite=False) is None
    assert json.loads((tmp_path / "run.json").read_text()) == {"seed": 0}
