# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""One process at a time writes to a run folder; others are told which."""

import json
import os
import platform
import time
from datetime import datetime
from pathlib import Path
from typing import TextIO


try:
    import fcntl
except ImportError:  # Windows, where nobody is told
    fcntl = None

LOCK_FILE = "run.lock"
# Data loaders of a killed process look every 5 s whether it is there; as long as they live they hold what it held.
_SECONDS_OF_ORPHANS = 15


class FolderLock:
    """Held from `acquire` to `release` or to the end of the process, however that ends.

    The kernel holds it for the process: a file that a killed run left behind locks nobody out.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / LOCK_FILE
        self._file: TextIO | None = None

    def check(self):
        """Do nothing if the folder is free.

        Raises:
            ValueError: naming the process that holds it.
        """
        if self.path.exists() and (file := self._take()) is not None:
            file.close()

    def acquire(self):
        """Take the folder, which exists.

        Raises:
            ValueError: naming the process that holds it.
        """
        self._file = self._take()
        if self._file is not None:
            self._file.truncate(0)
            now = datetime.now().isoformat(" ", "seconds")
            json.dump({"process": os.getpid(), "host": platform.node(), "since": now}, self._file)
            self._file.flush()

    def release(self):
        """Give the folder back."""
        if self._file is not None:
            if _is_at(self._file, self.path):
                self.path.unlink()
            self._file.close()
            self._file = None

    def _take(self) -> TextIO | None:
        """Open the file and lock it; return `None` where files cannot be locked."""
        deadline = time.monotonic() + _SECONDS_OF_ORPHANS
        while fcntl is not None:
            file = open(self.path, "a+", encoding="utf-8")  # not truncated: it tells of whoever holds it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, self.path):
                    return file
                file.close()  # whoever held it has taken it away since
            except BlockingIOError:
                holder = _read(file)
                file.close()
                if _is_alive(holder) or time.monotonic() > deadline:
                    raise ValueError(self._describe(holder)) from None
                time.sleep(0.5)
            except OSError:  # a file system without locks
                file.close()
                break
        return None

    def _describe(self, holder: dict) -> str:
        return (
            f"The output folder {str(self.path.parent)!r} is being written by process {holder.get('process', 'unknown')} on "
            f"{holder.get('host', 'an unknown host')}, since {holder.get('since', 'an unknown time')}. Stop that run or wait for "
            f"its end, or choose another `--output_dir`. (If there is no such run, delete {self.path}.)"
        )


def _is_at(file: TextIO, path: Path) -> bool:
    """Return True if an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read(file: TextIO) -> dict:
    file.seek(0)
    try:
        return json.load(file)
    except ValueError:  # it is being written
        return {}


def _is_alive(holder: dict) -> bool:
    """Return False if the process was of this machine and has ended."""
    if holder.get("host") != platform.node():
        return True
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True


__all__ = ["LOCK_FILE", "FolderLock"]
