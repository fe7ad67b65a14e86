# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: str | os.PathLike, write: Callable[[Path], object]):
    """Let `write` fill a file beside `path`, then put it in the place of `path` in one step.

    Args:
        path (`str` or `os.PathLike`): the file to replace; a crash leaves the old one, if there was one.
        write (`Callable`): called with the path, ending in `.partial`, to write to.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


__all__ = ["replace_file"]
