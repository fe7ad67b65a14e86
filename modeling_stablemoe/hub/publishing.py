# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Publish a checkpoint on the Hub: which files of a folder are sent, in one commit."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id
from transformers.utils import CHAT_TEMPLATE_DIR

from .cards import CARD_FILE


# Files of the folder itself and of its chat templates; checkpoints and logs in other subfolders are not sent.
_SENT = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "*.json",
    "*.jsonl",
    "*.jinja",
    "*.md",
    "*.model",
    "*.png",
    "*.py",
    "*.txt",
)
# Settings and states of a single training.
_LEFT_OUT = ("run.json", "trainer_state.json", "checkpoint_manifest.json")

# What the HTTP client of `huggingface_hub`, whichever it is, raises without a network.
NETWORK_ERROR = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class Shipment:
    """What is to be sent.

    Args:
        files (`dict[str, Path]`): files to send unchanged, by their path in the repository.
        card (`ModelCard`): sent in place of the folder's README.md.
        left_out (`list[str]`): what else is in the folder; subfolders end in "/".
    """

    files: dict[str, Path]
    card: ModelCard
    left_out: list[str]

    @property
    def sizes(self) -> dict[str, int]:
        """`dict[str, int]`: bytes by path in the repository, sorted by path."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return dict(sorted({**sizes, CARD_FILE: len(str(self.card).encode())}.items()))

    def operations(self) -> list[CommitOperationAdd]:
        """Return the changes that make up the commit."""
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in self.files.items()]
        return [*files, CommitOperationAdd(path_in_repo=CARD_FILE, path_or_fileobj=str(self.card).encode())]


def select_files(folder: str | Path) -> tuple[dict[str, Path], list[str]]:
    """Choose the files to send: weights as safetensors, config, code, tokenizer, results, figures; never a pickle.

    Returns:
        `tuple`: the files to send, without the card, by their path in the repository, and the names of everything
        else, where subfolders end in "/".
    """
    folder = Path(folder)
    templates = folder / CHAT_TEMPLATE_DIR  # those of a tokenizer with several, but for the default one
    files, left_out = {}, []
    for path in sorted({*folder.iterdir(), *templates.glob("*")} - {templates}):
        name = path.relative_to(folder).as_posix()
        patterns = ("*.jinja",) if path.parent == templates else _SENT
        wanted = path.is_file() and name not in _LEFT_OUT and any(fnmatch(path.name, each) for each in patterns)
        if wanted and not path.name.startswith(("_", ".")):
            files[name] = path
        else:
            left_out.append(name + "/" * path.is_dir())
    files.pop(CARD_FILE, None)
    return files, left_out


def check_name(name: str):
    """Refuse a name that no repository can have.

    Raises:
        ValueError: naming the rule.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name of a repository: {error}") from error
    if "/" not in name:
        raise ValueError(f"{name!r} is no name of a repository: say whose it is, as in 'user/{name}'.")


def rename(card: ModelCard, name: str) -> ModelCard:
    """Return a copy of a card whose title, code and model index name the repository instead of the folder."""
    renamed = ModelCard(str(card))
    former = re.search(r'from_pretrained\("([^"]+)"', renamed.text)
    if former is not None:
        for call in ('from_pretrained("{}"', "`transformers serve {} "):
            renamed.text = renamed.text.replace(call.format(former[1]), call.format(name))
        renamed.text = re.sub(rf"^# {re.escape(former[1])}$", f"# {name}", renamed.text, count=1, flags=re.MULTILINE)
    if renamed.data.eval_results:
        renamed.data.model_name = name
    return renamed


def send(
    shipment: Shipment,
    name: str,
    *,
    revision: str | None = None,
    private: bool = False,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Send everything in one commit; the repository is created if it does not exist.

    Args:
        shipment (`Shipment`): of `prepare`.
        name (`str`): of the repository, "user/name".
        revision (`str`, *optional*): branch, created from the main one if need be. Default: the main branch.
        private (`bool`): make the repository visible to its owner only.
        commit_message (`str`): title of the commit.

    Returns:
        `CommitInfo`

    Raises:
        ValueError: if `private` is set and the repository is public.
        OSError or `NETWORK_ERROR`: what the client raises; `explain` turns it into one line.
    """
    api = HfApi()
    api.create_repo(name, private=private or None, exist_ok=True)
    if private and not api.model_info(name).private:
        raise ValueError(f"{name!r} exists and is public: leave `--private` out, or make it private on the Hub first.")
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    return api.create_commit(name, shipment.operations(), commit_message=commit_message, revision=revision)


def require_login() -> str:
    """Return the name of the user on the Hub.

    Raises:
        OSError or `NETWORK_ERROR`: what the client raises; `explain` turns it into one line.
    """
    return HfApi().whoami()["name"]


def explain(error: Exception, name: str) -> str:
    """Return one line that says why the Hub could not be used for the repository `name`, with the remedy."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    details = " ".join(str(error).split())
    if type(error).__name__ == "LocalTokenNotFoundError" or status == 401:
        what = "no token" if status is None else "a token that it does not accept"
        return f"the Hub got {what}: run `hf auth login`, or set HF_TOKEN to a token that may write. ({details})"
    if status == 403:
        return f"you may not write to {name!r}: it is not yours, or your token may only read. ({details})"
    if status is None and isinstance(error, (NETWORK_ERROR, ConnectionError)):
        return f"the Hub cannot be reached: {details or type(error).__name__}. Nothing was published."
    return details


def format_shipment(shipment: Shipment, name: str, revision: str | None) -> str:
    """Lay out what would be sent, one line per file with its size."""
    rows = [f"  {_format_size(size):>9}  {file}" for file, size in shipment.sizes.items()]
    lines = [f"To {name}, branch {revision or 'main'}, in one commit:", *rows]
    lines.append(f"  {_format_size(sum(shipment.sizes.values())):>9}  in all")
    if shipment.left_out:
        lines.append(f"Left out: {', '.join(shipment.left_out)}")
    return "\n".join(lines)


def _format_size(size: float, units: Sequence[str] = ("B", "kB", "MB", "GB")) -> str:
    if size < 1000 or len(units) == 1:
        return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
    return _format_size(size / 1000, units[1:])


__all__ = [
    "NETWORK_ERROR",
    "Shipment",
    "check_name",
    "explain",
    "format_shipment",
    "rename",
    "require_login",
    "select_files",
    "send",
]
