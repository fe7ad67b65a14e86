# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Two processes that want one run folder: the second is told who has it, and a killed one locks nobody out."""

import os
import platform
import signal
import time

import pytest

from modeling_stablemoe.checkpoints.folder_lock import LOCK_FILE, FolderLock
from modeling_stablemoe.checkpoints.folders import claim_run_folder


def die_holding(folder, seconds_of_orphan: float = 0.0):
    """Take the folder in a process that is killed; a child of it lives on, as a worker of a data loader does."""
    child = os.fork()
    if child == 0:
        FolderLock(folder).acquire()
        if seconds_of_orphan and os.fork() == 0:
            time.sleep(seconds_of_orphan)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_folder_has_one_holder_and_others_are_told_which(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.check()
    first.acquire()
    for attempt in (second.check, second.acquire):
        with pytest.raises(ValueError, match=f"by process {os.getpid()} on {platform.node()}, since 20.*--output_dir"):
            attempt()
    second.release()  # it has nothing
    with pytest.raises(ValueError, match="being written"):
        second.check()
    first.release()
    assert list(tmp_path.iterdir()) == []
    second.acquire()
    second.release()


def test_overwriting_the_folder_leaves_it_with_its_holder(tmp_path):
    claim_run_folder(tmp_path, {}, resume=False, overwrite=False)
    (tmp_path / "checkpoint-1").mkdir()
    lock = FolderLock(tmp_path)
    lock.acquire()
    claim_run_folder(tmp_path, {}, resume=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", LOCK_FILE]
    with pytest.raises(ValueError, match="being written"):
        FolderLock(tmp_path).acquire()


@pytest.mark.parametrize("seconds_of_orphan", [0.0, 1.0])
def test_a_killed_process_locks_nobody_out(tmp_path, seconds_of_orphan):
    die_holding(tmp_path, seconds_of_orphan)
    assert (tmp_path / LOCK_FILE).exists()
    claim_run_folder(tmp_path, {}, resume=False, overwrite=False)  # a lock that was left is no run
    lock = FolderLock(tmp_path)
    lock.check()
    lock.acquire()
    assert f'"process": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text()
    lock.release()


def test_deleting_the_file_is_the_last_resort(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    (tmp_path / LOCK_FILE).unlink()
    second.acquire()
    first.release()
    with pytest.raises(ValueError, match="being written"):
        first.check()
