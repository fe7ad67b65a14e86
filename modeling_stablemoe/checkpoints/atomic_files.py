# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: str | os.PathLike, write: Callable[[Path], object]):
    """Let `write` fill a file beside `path`, then rename it to `path` in one step.

    Args:
        path (`str` or `os.PathLike`): the file to replace; a crash leaves an existing one as it was.
        write (`Callable`): called with the path, ending in `.partial`, to write to.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def require_new_folder(path: str | os.PathLike):
    """Refuse a folder that holds anything.

    Raises:
        ValueError: naming it.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} is there already and not empty; name a new folder.")


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Fill a folder beside `path` and rename it to `path` at the end; an error before that leaves nothing behind.

    Args:
        path (`str` or `os.PathLike`): a folder that does not exist or is empty.

    Yields:
        `Path`: the folder to fill, hidden and ending in `.partial`.

    Raises:
        ValueError: if there is something at `path` already.
    """
    path = Path(path)
    require_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        if path.is_dir():
            path.rmdir()
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


__all__ = ["new_folder", "replace_file", "require_new_folder"]
