# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Reading checkpoint files of fairseq without running what is in them.

A MoE model of the released code has a file a process, `checkpoint_best-rank-0.pt` and so on. Each holds all that the
processes share (the same in every file) and the experts of its own process. A dense model has one file without `-rank-0`.
"""

import argparse
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


_RANK = re.compile(r"-rank-(\d+)$")
# What fairseq writes beside tensors and plain values: options of models that are not dataclasses.
_ALLOWED_CLASSES = (argparse.Namespace,)


@dataclass(frozen=True)
class FairseqFile:
    """What a conversion needs of one file.

    Attributes:
        path (`Path`): of the file.
        tensors (`dict[str, torch.Tensor]`): the state of the model, by fairseq's names.
        options (`dict[str, Any]`): of model, criterion and task, by name.
        num_updates (`int`, *optional*): optimizer steps so far, where the file tells.
    """

    path: Path
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    num_updates: int | None


def find_first_file(path: str | Path) -> Path:
    """Find the file to begin with.

    Args:
        path (`str` or `Path`): of a file, or the name without rank that fairseq's own commands take, as
            `checkpoint_best.pt`; of a rank's file, that of rank 0 is meant.

    Raises:
        ValueError: if there is no such file.
    """
    path = Path(path)
    rank_0 = rank_file(path, 0)
    for candidate in (rank_0, path) if _RANK.search(path.stem) else (path, rank_0):
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"There is neither {str(path)!r} nor {str(rank_0)!r}. Name a file of the checkpoint, or the name that its files "
        "have without their ranks: checkpoint_best.pt for checkpoint_best-rank-0.pt and so on."
    )


def rank_file(path: Path, rank: int) -> Path:
    """Name the file of a process, given that of any other or the name without rank."""
    return path.with_name(f"{_RANK.sub('', path.stem)}-rank-{rank}{path.suffix}")


def require_rank_files(path: Path, num_ranks: int) -> list[Path]:
    """List the files of all processes, the first of which is `path`.

    Args:
        path (`Path`): of the process of rank 0.
        num_ranks (`int`): processes that the model was trained by.

    Raises:
        ValueError: naming files that are missing, or that no process of this model can have written.
    """
    if num_ranks == 1:
        return [path]
    files = [path, *(rank_file(path, rank) for rank in range(1, num_ranks))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"The experts lie in {num_ranks} files beside {str(path)!r}, of which {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Copy the files of all ranks into one folder."
        )
    if rank_file(path, num_ranks).exists():
        raise ValueError(
            f"{str(path)!r} is of {num_ranks} processes, but there is {rank_file(path, num_ranks).name} beside it, of a "
            "larger run. Keep the files of one run in a folder."
        )
    return files


def read_file(path: Path) -> FairseqFile:
    """Read one file; its tensors stay on the disk until they are used.

    Raises:
        ValueError: if it cannot be read, would run code, or is not a fairseq checkpoint.
    """
    state = _load(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"{str(path)!r} is not a fairseq checkpoint: it holds no `model` state.")
    tensors = state["model"]
    odd = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{str(path)!r} is not a fairseq checkpoint: `{odd[0]}` of its `model` is no tensor.")
    return FairseqFile(path, dict(tensors), _options(state, path), _num_updates(state))


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(_ALLOWED_CLASSES)):
            # Only files of torch >= 1.6 can be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
            raise _unreadable(path, error) from error
        raise ValueError(
            f"{str(path)!r} was not loaded: it holds {_forbidden(path)}, which could run code. Tensors, plain values and "
            "argparse.Namespace are all that is accepted. If you trust its source, load it where it was written and save "
            "its `model`, `cfg`, `args` and `optimizer_history` alone."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(f"{str(path)!r} cannot be read as a checkpoint ({reason}). Restore it from its source.")


def _forbidden(path: Path) -> str:
    """Name what a pickle would have called, without calling it."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, ValueError):  # files of torch < 1.6
        found = []
    allowed = {f"{each.__module__}.{each.__name__}" for each in _ALLOWED_CLASSES}
    return ", ".join(sorted(set(found) - allowed)) or "more than tensors and plain values"


def _options(state: dict, path: Path) -> dict[str, Any]:
    """Flatten the options: older versions of fairseq keep one Namespace, newer ones a section a subject."""
    if state.get("args") is not None:
        return _as_dict(state["args"])
    sections = _as_dict(state.get("cfg"))
    if not sections:
        raise ValueError(f"{str(path)!r} holds neither `args` nor `cfg`: nothing tells how its model was built.")
    # The model's own option wins where two sections have one name.
    names = ("distributed_training", "task", "criterion", "model")
    return {name: value for section in names for name, value in _as_dict(sections.get(section)).items()}


def _as_dict(options: Any) -> dict[str, Any]:
    if isinstance(options, argparse.Namespace):
        return vars(options)
    return options if isinstance(options, dict) else {}


def _num_updates(state: dict) -> int | None:
    history = state.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    number = last.get("num_updates") if isinstance(last, dict) else None
    return number if isinstance(number, int) else None


__all__ = ["FairseqFile", "find_first_file", "rank_file", "read_file", "require_rank_files"]
