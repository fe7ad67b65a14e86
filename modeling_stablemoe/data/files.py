# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Local files, plain or compressed, one document, line or row at a time.

`fsspec`, which comes with `datasets`, decompresses. The readers of `datasets` themselves do not serve: the one of text
ends a line at a stray "\\r", too, which would shift paired files; that of JSON takes strings that look like dates
for dates and missing keys for nulls.
"""

import codecs
import gzip
import io
import json
import logging
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from fsspec.compression import compr


logger = logging.getLogger(__name__)

_FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json"}
_COMPRESSIONS = {".gz": "gzip", ".xz": "xz"}
READABLE = f"{', '.join(_FORMATS)}, each also with {' or '.join(_COMPRESSIONS)}"
_LONG_DOCUMENT = 64_000_000
# Names the standard input in place of a path.
STANDARD_INPUT = "-"


def find_files(paths: Iterable[str]) -> list[str]:
    """List the readable files among files and folders, each once, as absolute paths; folders in sorted order."""
    found: list[Path] = []
    for path in (Path(name).expanduser().absolute() for name in paths):
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if format_of(file)
                and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not inside:
                raise FileNotFoundError(f"The folder {path} holds no readable file ({READABLE}).")
            found += inside
        elif not path.exists():
            raise FileNotFoundError(f"There is no file or folder {path}.")
        elif format_of(path) is None:
            raise ValueError(f"{path} has an unknown suffix; readable are {READABLE}.")
        else:
            found.append(path)
    return list(dict.fromkeys(map(str, found)))


def format_of(path: str | Path) -> str | None:
    """Return "text" or "json", by the suffix before that of the compression; None if the file is not readable."""
    path = Path(path)
    return _FORMATS.get((path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path).suffix.lower())


@contextmanager
def open_text(path: str | Path, encoding: str, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file, compressed or not, or the standard input; errors of whatever reads it name the file."""
    # UTF-8 may begin with the byte-order mark of Windows editors.
    codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    is_standard_input = str(path) == STANDARD_INPUT
    try:
        with ExitStack() as stack:
            if is_standard_input:
                binary = sys.stdin.buffer
            else:
                binary = stack.enter_context(open(path, "rb"))
                binary = compr[_COMPRESSIONS.get(Path(path).suffix.lower())](binary, mode="rb")
            file = io.TextIOWrapper(binary, encoding=codec, newline=newline)
            stack.callback(file.detach)  # `sys.stdin` stays open
            yield file
    except UnicodeError as error:
        raise ValueError(
            f"{'The standard input' if is_standard_input else path} is not {encoding} text ({error}); name its encoding "
            "with --encoding, e.g. --encoding latin-1."
        ) from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a complete {Path(path).suffix} file ({error}); compress or copy it again."
        ) from error


def read_lines(path: str | Path, encoding: str) -> Iterator[str]:
    """Yield the lines of a text file, compressed or not, or of the standard input, without their ends.

    Only "\\n" and "\\r\\n" end a line. A stray "\\r" inside one, or a line separator of Unicode, would make two of it and
    shift all that follow against the lines of another file.

    Args:
        path (`str` or `Path`): the file, or `STANDARD_INPUT`.
        encoding (`str`): a codec that Python knows.

    Raises:
        ValueError: if the text is of another encoding, or a compressed file is incomplete.
    """
    with open_text(path, encoding, newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n").removesuffix("\r")


def read_json_lines(path: str | Path, encoding: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield file and number, for messages, and the object of every line that is not blank."""
    with open_text(path, encoding) as file:
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
            yield where, row


def checked_text(value: Any, where: str, remedy: str = "") -> str:
    """Return a value of JSON if it is a string that can be stored."""
    if not isinstance(value, str):
        raise ValueError(f"{where} holds {type(value).__name__}, not a string{remedy}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON escapes can spell code points that are no characters
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character.") from None
    return value


def read_files(options: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the documents of local files one at a time, without blank ones."""
    paths, encoding = options["paths"], options["encoding"]
    is_empty = True
    for path in paths:
        if format_of(path) == "json":
            documents = _json_documents(path, encoding, options["text_column"])
        else:
            documents = _text_documents(path, encoding, options["separator"])
        for text in documents:
            if text and not text.isspace():
                is_empty = False
                yield {"text": text}
    if is_empty:
        raise ValueError(f"There is no text in {', '.join(paths[:3])}{', ...' * (len(paths) > 3)}; name other files.")


def _json_documents(path: str, encoding: str, column: str) -> Iterator[str]:
    for where, row in read_json_lines(path, encoding):
        if column not in row:
            raise ValueError(f"{where} has no key {column!r}; set --text_column to one of: {', '.join(row)}.")
        yield checked_text(row[column], f"{where}: {column!r}", "; set --text_column")


def _text_documents(path: str, encoding: str, separator: str | None) -> Iterator[str]:
    """Yield what stands between separator lines, with the line ends, or the whole file."""
    is_separated = False
    with open_text(path, encoding) as file:
        lines = [file.read()] if separator is None else []
        for line in file:
            if line.rstrip("\n") == separator:
                is_separated = True
                yield "".join(lines)
                lines = []
            else:
                lines.append(line)
    document = "".join(lines)
    if separator is not None and not is_separated:
        logger.warning("%s: no line is %r, so the file is one document.", path, separator)
    elif len(document) > _LONG_DOCUMENT:
        logger.warning(
            "%s holds a document of %d characters, which takes much memory; separate documents with "
            "--document_separator.",
            path,
            len(document),
        )
    yield document


__all__ = [
    "READABLE",
    "STANDARD_INPUT",
    "checked_text",
    "find_files",
    "format_of",
    "open_text",
    "read_files",
    "read_json_lines",
    "read_lines",
]
