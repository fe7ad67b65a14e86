# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Documents from local files: text and JSON lines, plain or compressed, one document at a time."""

import codecs
import gzip
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO


logger = logging.getLogger(__name__)

_TEXT_SUFFIXES = (".txt", ".md")
_JSON_SUFFIXES = (".jsonl", ".json")
_DECOMPRESSORS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
READABLE = f"{', '.join(_TEXT_SUFFIXES + _JSON_SUFFIXES)}, each also with {' or '.join(_DECOMPRESSORS)}"
_LONG_DOCUMENT = 64_000_000


def find_files(paths: Iterable[str]) -> list[str]:
    """List the readable files among files and folders, each once, as absolute paths; folders in sorted order."""
    found: list[Path] = []
    for name in paths:
        path = Path(name).expanduser().absolute()
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*") if _format(file) and file.is_file() and not _is_hidden(file, path)
            )
            if not inside:
                raise FileNotFoundError(f"The folder {path} holds no readable file ({READABLE}).")
            found += inside
        elif not path.exists():
            raise FileNotFoundError(f"There is no file or folder {path}.")
        elif _format(path) is None:
            raise ValueError(f"{path} has an unknown suffix; readable are {READABLE}.")
        else:
            found.append(path)
    return list(dict.fromkeys(str(path) for path in found))


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _format(path: Path) -> Literal["text", "json"] | None:
    """Tell the format of a file by its suffix, compression apart; None if it is not readable."""
    suffix = path.suffix.lower()
    if suffix in _DECOMPRESSORS:
        suffix = path.with_suffix("").suffix.lower()
    if suffix in _TEXT_SUFFIXES:
        return "text"
    return "json" if suffix in _JSON_SUFFIXES else None


def read_files(options: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the documents of local files one at a time; blank ones are left out."""
    paths, encoding = options["paths"], options["encoding"]
    num_documents = 0
    # "utf-8-sig" is UTF-8 that also accepts the byte-order mark of Windows editors.
    codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    for path in map(Path, paths):
        open_file = _DECOMPRESSORS.get(path.suffix.lower(), open)
        try:
            with open_file(path, "rt", encoding=codec) as file:
                if _format(path) == "json":
                    documents = _json_documents(file, path, options["text_column"])
                else:
                    documents = _text_documents(file, path, options["separator"])
                for text in documents:
                    if text and not text.isspace():
                        num_documents += 1
                        yield {"text": text}
        except UnicodeError as error:
            raise ValueError(
                f"{path} is not {encoding} text ({error}); name its encoding with --encoding, e.g. --encoding latin-1."
            ) from error
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise ValueError(
                f"{path} is not a complete {path.suffix} file ({error}); compress or copy it again."
            ) from error
    if num_documents == 0:
        raise ValueError(f"There is no text in {', '.join(paths[:3])}{', ...' * (len(paths) > 3)}; name other files.")


def _text_documents(file: TextIO, path: Path, separator: str | None) -> Iterator[str]:
    """Yield the documents between separator lines, with their line ends, or the whole file."""
    lines: list[str] = []
    num_separators = 0
    if separator is None:
        lines = [file.read()]
    else:
        for line in file:
            if line.rstrip("\n") == separator:
                yield "".join(lines)
                lines = []
                num_separators += 1
            else:
                lines.append(line)
    document = "".join(lines)
    if separator is not None and num_separators == 0:
        logger.warning("%s: no line is %r, so the file is one document.", path, separator)
    elif len(document) > _LONG_DOCUMENT:
        logger.warning(
            "%s holds a document of %d characters, which takes much memory; separate documents with "
            "--document_separator.",
            path,
            len(document),
        )
    yield document


def _json_documents(file: TextIO, path: Path, column: str) -> Iterator[str]:
    """Yield the value of `column` of every line."""
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error}); every line must be one JSON object.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} holds a {type(row).__name__}; every line must be one JSON object.")
        if column not in row:
            raise ValueError(f"{where} has no key {column!r}; set --text_column to one of: {', '.join(row)}.")
        text = row[column]
        if not isinstance(text, str):
            raise ValueError(f"{where}: {column!r} holds {type(text).__name__}, not a string; set --text_column.")
        if not _is_unicode(text):
            raise ValueError(f"{where}: {column!r} holds half of a surrogate pair, which is no character.")
        yield text


def _is_unicode(text: str) -> bool:
    """Say whether a string can be stored; JSON escapes can spell code points that are no characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


__all__ = ["READABLE", "find_files", "read_files"]
