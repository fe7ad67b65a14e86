# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Documents and parallel sentences from local files: text and JSON lines, plain or compressed, one at a time."""

import codecs
import gzip
import io
import json
import logging
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TextIO


logger = logging.getLogger(__name__)

_TEXT_SUFFIXES = (".txt", ".md")
_JSON_SUFFIXES = (".jsonl", ".json")
_DECOMPRESSORS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
READABLE = f"{', '.join(_TEXT_SUFFIXES + _JSON_SUFFIXES)}, each also with {' or '.join(_DECOMPRESSORS)}"
_LONG_DOCUMENT = 64_000_000
# Names the standard input in the place of a path.
STANDARD_INPUT = "-"
# Stands for the language in the path of paired text files, one file a language.
LANGUAGE_PLACEHOLDER = "{lang}"


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
    paths = options["paths"]
    num_documents = 0
    for path in map(Path, paths):
        with open_text(path, options["encoding"]) as file:
            if _format(path) == "json":
                documents = _json_documents(file, path, options["text_column"])
            else:
                documents = _text_documents(file, path, options["separator"])
            for text in documents:
                if text and not text.isspace():
                    num_documents += 1
                    yield {"text": text}
    if num_documents == 0:
        raise ValueError(f"There is no text in {', '.join(paths[:3])}{', ...' * (len(paths) > 3)}; name other files.")


@contextmanager
def open_text(path: str | Path, encoding: str, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file, compressed or not, or the standard input; errors of whatever reads it name the file.

    Args:
        path (`str` or `Path`): the file, or `STANDARD_INPUT`.
        encoding (`str`): a codec that Python knows. UTF-8 may begin with the byte-order mark of Windows editors.
        newline (`str`, *optional*): as of `open`.

    Raises:
        ValueError: if the text is of another encoding, or a compressed file is incomplete.
    """
    path = Path(path)
    codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    open_file = _DECOMPRESSORS.get(path.suffix.lower(), open)
    if str(path) == STANDARD_INPUT:
        open_file = _open_standard_input
    try:
        with open_file(path, "rt", encoding=codec, newline=newline) as file:
            yield file
    except UnicodeError as error:
        name = "The standard input" if str(path) == STANDARD_INPUT else path
        raise ValueError(
            f"{name} is not {encoding} text ({error}); name its encoding with --encoding, e.g. --encoding latin-1."
        ) from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a complete {path.suffix} file ({error}); compress or copy it again."
        ) from error


@contextmanager
def _open_standard_input(path: Path, mode: str, **options: Any) -> Iterator[TextIO]:
    file = io.TextIOWrapper(sys.stdin.buffer, **options)
    try:
        yield file
    finally:
        file.detach()  # `sys.stdin` stays open


def read_lines(path: str | Path, encoding: str) -> Iterator[str]:
    """Yield the lines of a text file, compressed or not, or of the standard input, without their ends.

    Only "\\n" and "\\r\\n" end a line. A stray "\\r" inside one, or a line separator of Unicode, would make two of it and shift
    all that follow against the lines of another file.

    Args:
        path (`str` or `Path`): the file, or `STANDARD_INPUT`.
        encoding (`str`): see `open_text`.
    """
    with open_text(path, encoding, newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n").removesuffix("\r")


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
    for where, row in _json_rows(file, path):
        if column not in row:
            raise ValueError(f"{where} has no key {column!r}; set --text_column to one of: {', '.join(row)}.")
        yield _checked_text(row[column], f"{where}: {column!r}", "; set --text_column")


def _json_rows(file: TextIO, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield file and number, for messages, and the object of every line that is not blank."""
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


def _checked_text(value: Any, where: str, remedy: str = "") -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} holds {type(value).__name__}, not a string{remedy}.")
    if not _is_unicode(value):
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character.")
    return value


def _is_unicode(text: str) -> bool:
    """Say whether a string can be stored; JSON escapes can spell code points that are no characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def find_parallel_files(name: str, languages: Iterable[str]) -> dict[str, str]:
    """Find the paired text files that a path with "{lang}" stands for.

    Args:
        name (`str`): path that holds "{lang}", at least once.
        languages (iterable of `str`): those that may be read.

    Returns:
        `dict`: language -> absolute path, for the languages that have a file.

    Raises:
        FileNotFoundError: if no language has one.
        ValueError: if the path is one of JSON lines, which hold all languages of a row.
    """
    if _format(Path(name)) == "json":
        raise ValueError(f"{name}: JSON lines hold all languages in one file; name it without {LANGUAGE_PLACEHOLDER}.")
    paths = {lang: Path(name.replace(LANGUAGE_PLACEHOLDER, lang)).expanduser().absolute() for lang in languages}
    found = {lang: str(path) for lang, path in paths.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(f"There is no file {name} with {LANGUAGE_PLACEHOLDER} as one of: {', '.join(paths)}.")
    return found


def read_paired_text(options: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the lines that stand beside each other in files of one sentence a line; `paths`: language -> file."""
    paths = options["paths"]
    # Each is opened by its own generator, so that an error names the file that it is in.
    files = [read_lines(path, options["encoding"]) for path in paths.values()]
    num_lines = 0
    for lines in zip_longest(*files):
        if None in lines:
            rest = [(line is not None) + sum(1 for _ in file) for line, file in zip(lines, files, strict=True)]
            counts = ", ".join(
                f"{path} has {num_lines + more}" for path, more in zip(paths.values(), rest, strict=True)
            )
            raise ValueError(f"Paired files must have the same number of lines: {counts}.")
        num_lines += 1
        yield dict(zip(paths, lines, strict=True))
    if num_lines == 0:
        raise ValueError(f"There is no text in {', '.join(paths.values())}; name other files.")


def read_parallel_json(options: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the languages of every JSON line, which stand in the line or in its "translation"; null becomes ""."""
    path, languages = Path(options["path"]), options["languages"]
    with open_text(path, options["encoding"]) as file:
        for where, row in _json_rows(file, path):
            texts = _translations(row)
            missing = [language for language in languages if language not in texts]
            if missing:
                raise ValueError(
                    f"{where} has no key {missing[0]!r}, which the first line has; its keys: {', '.join(texts)}."
                )
            yield {
                language: "" if texts[language] is None else _checked_text(texts[language], f"{where}: {language!r}")
                for language in languages
            }


def languages_of_json(path: str, encoding: str) -> list[str]:
    """List the keys of the first line, or of its "translation"."""
    if _format(Path(path)) != "json":
        raise ValueError(
            f"{path} holds one language; name paired text files by a path with {LANGUAGE_PLACEHOLDER} in place of the "
            "language."
        )
    with open_text(path, encoding) as file:
        for _, row in _json_rows(file, Path(path)):
            return list(_translations(row))
    raise ValueError(f"There is no text in {path}; name another file.")


def _translations(row: dict[str, Any]) -> dict[str, Any]:
    return row["translation"] if isinstance(row.get("translation"), dict) else row


__all__ = [
    "LANGUAGE_PLACEHOLDER",
    "READABLE",
    "STANDARD_INPUT",
    "find_files",
    "find_parallel_files",
    "languages_of_json",
    "open_text",
    "read_files",
    "read_lines",
    "read_paired_text",
    "read_parallel_json",
]
