# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Local files, plain or compressed, one document, line or row at a time.

`fsspec`, `pandas` and `pyarrow`, which come with `datasets`, decompress and parse. The readers of `datasets` themselves do
not serve: the one of text ends a line at a stray "\\r", too, which would shift paired files; that of JSON takes strings
that look like dates for dates and missing keys for nulls; that of CSV takes texts that look like numbers for numbers.
"""

import codecs
import csv
import io
import json
import logging
import lzma
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from textwrap import shorten
from typing import Any, BinaryIO, TextIO

import pandas
import pyarrow
import pyarrow.parquet
from fsspec.compression import compr


logger = logging.getLogger(__name__)

_FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".bz2": "bz2", ".zst": "zstd", ".zip": "zip"}
READABLE = f"{', '.join(_FORMATS)}, each also with {', '.join(list(_COMPRESSIONS)[:-1])} or in a .zip"
# Quotation marks of a TSV are text: a sentence that begins with one would else swallow the lines after it.
_TABLES = {"csv": {"sep": ","}, "tsv": {"sep": "\t", "quoting": csv.QUOTE_NONE}}
_ROWS_AT_ONCE = 1000
# A file inside a .zip is named "archive.zip::name".
_INSIDE_ZIP = ".zip::"
_LONG_DOCUMENT = 64_000_000
# Names the standard input in place of a path.
STANDARD_INPUT = "-"


def find_files(paths: Iterable[str]) -> list[str]:
    """List the readable files among files, folders and .zip archives, each once; folders in sorted order.

    Files have absolute paths; those inside of an archive have its path, "::" and their name.
    """
    found: list[str] = []
    for path in (Path(name).expanduser().absolute() for name in paths):
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {path}.")
        if is_saved_dataset(path):
            raise ValueError(
                f"{path} was saved by `save_to_disk`: name it with --dataset_name (translation: --parallel_datasets)."
            )
        if path.is_dir():
            inside = [
                file for file in sorted(path.rglob("*")) if _is_visible(file.relative_to(path)) and file.is_file()
            ]
            files = [name for file in inside for name in _readable(file)]
            if not files:
                raise FileNotFoundError(f"The folder {path} holds no readable file ({READABLE}).")
        else:
            files = _readable(path)
            if not files:
                is_archive = path.suffix.lower() == ".zip"
                problem = "holds no readable file" if is_archive else "has an unknown suffix"
                raise ValueError(f"{path} {problem}; readable are {READABLE}.")
        found += files
    return list(dict.fromkeys(found))


def describe_files(paths: list[str]) -> str:
    """Return how many files there are and the names of the first three."""
    names = ", ".join(Path(path).name for path in paths[:3]) + ", ..." * (len(paths) > 3)
    return f"{len(paths):,} file{'s' * (len(paths) > 1)} ({names})"


def is_saved_dataset(folder: str | Path) -> bool:
    """Return True for a folder that `save_to_disk` of datasets has written."""
    marks = (("dataset_dict.json",), ("dataset_info.json", "state.json"))
    return any(all((Path(folder) / name).is_file() for name in names) for names in marks)


def _is_visible(path: Path) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _readable(path: Path) -> list[str]:
    """List the file itself, or what is in an archive, as far as it can be read."""
    if path.suffix.lower() != ".zip":
        return [str(path)] if format_of(path) else []
    with _named_errors(path):
        names = zipfile.ZipFile(path).namelist()
    return [f"{path}::{name}" for name in sorted(names) if format_of(name) and _is_visible(Path(name))]


def file_on_disk(path: str) -> str:
    """Return the path of a file, or of the archive that it is in."""
    return path.rpartition("::")[0] if _INSIDE_ZIP in path.lower() else path


def format_of(path: str | Path) -> str | None:
    """Return what of `_FORMATS` a file holds, by the suffix before that of the compression; None if unreadable."""
    path = Path(path)
    return _FORMATS.get((path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path).suffix.lower())


@contextmanager
def _named_errors(path: str | Path, encoding: str = "utf-8") -> Iterator[None]:
    """Let the errors of whatever reads a file name the file and the remedy."""
    try:
        yield
    except UnicodeError as error:
        # Windows writes either, the second with a mark in front.
        is_utf16 = isinstance(error, UnicodeDecodeError) and error.object[:2] in (
            codecs.BOM_UTF16_LE,
            codecs.BOM_UTF16_BE,
        )
        raise ValueError(
            f"{'The standard input' if str(path) == STANDARD_INPUT else path} is not {encoding} text ({error}); name its "
            f"encoding with --encoding, e.g. --encoding {'utf-16' if is_utf16 else 'cp1252'}, that of Windows."
        ) from error
    except (EOFError, OSError, lzma.LZMAError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system; those of gzip and bz2 have no number
        raise ValueError(
            f"{path} is not a complete {Path(path).suffix} file ({error}); compress or copy it again."
        ) from error


@contextmanager
def _open_binary(path: str | Path) -> Iterator[BinaryIO]:
    compression = _COMPRESSIONS.get(Path(path).suffix.lower())
    archive = file_on_disk(str(path))
    with ExitStack() as stack:
        if archive == str(path):
            binary = stack.enter_context(open(path, "rb"))
        else:
            member = str(path).removeprefix(f"{archive}::")
            binary = stack.enter_context(stack.enter_context(zipfile.ZipFile(archive)).open(member))
        if compression == "zstd":  # fsspec needs another package for it, pyarrow has it
            yield io.BufferedReader(pyarrow.CompressedInputStream(binary, compression))
        else:
            yield compr[compression](binary, mode="rb")


@contextmanager
def open_text(path: str | Path, encoding: str, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file, compressed or not, or the standard input; errors of whatever reads it name the file."""
    # UTF-8 may begin with the byte-order mark of Windows editors.
    codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    with _named_errors(path, encoding), ExitStack() as stack:
        is_standard_input = str(path) == STANDARD_INPUT
        binary = sys.stdin.buffer if is_standard_input else stack.enter_context(_open_binary(path))
        file = io.TextIOWrapper(binary, encoding=codec, newline=newline)
        stack.callback(file.detach)  # `sys.stdin` stays open
        yield file


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


def read_rows(path: str, encoding: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield file and number, for messages, and the values by name of every row of JSON, CSV, TSV or Parquet."""
    kind = format_of(path)
    if kind == "parquet":
        yield from _parquet_rows(path)
    elif kind == "json":
        yield from _json_rows(path, encoding)
    else:
        yield from _table_rows(path, encoding, _TABLES[kind])


def _json_rows(path: str, encoding: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the object of every line that is not blank, or of every item of an array."""
    is_first = True
    with open_text(path, encoding) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            if is_first and line.lstrip().startswith("["):
                yield from _json_array(path, line + file.read())
                return
            is_first = False
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON ({error}); every line must be one JSON object.") from error
            yield where, _object(row, where, "line")


def _json_array(path: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a JSON array ({error}); every line must be one JSON object.") from error
    for number, item in enumerate(items, start=1):
        yield f"{path}, item {number}", _object(item, f"{path}, item {number}", "item")


def _object(row: Any, where: str, what: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} holds a {type(row).__name__}; every {what} must be one JSON object.")
    return row


def _table_rows(path: str, encoding: str, options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows under the first one, which has the names; a cell that a short row lacks is ""."""
    options = {"dtype": str, "keep_default_na": False, "chunksize": _ROWS_AT_ONCE, **options}
    numbers = count(1)
    try:
        with open_text(path, encoding) as file, pandas.read_csv(file, **options) as table:
            for part in table:
                if not isinstance(part.index, pandas.RangeIndex):
                    raise pandas.errors.ParserError("rows have more columns than the first one names")
                yield from (
                    (f"{path}, row {number}", row)
                    for row, number in zip(part.to_dict("records"), numbers, strict=False)
                )
    except pandas.errors.EmptyDataError:
        return
    except pandas.errors.ParserError as error:
        between = {".csv": "commas", ".tsv": "tabs"}.get(Path(path).suffix, "commas (.csv) or tabs (.tsv)")
        raise ValueError(
            f"{path} is not a {Path(path).suffix} table with {between} between columns ({str(error).strip()}). Where other signs stand "
            f"between them, such as semicolons, save it with {between}."
        ) from error


def _parquet_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    numbers = count(1)
    with _named_errors(path), _open_binary(path) as file:
        try:
            whole = file if file.seekable() else io.BytesIO(file.read())
            for part in pyarrow.parquet.ParquetFile(whole).iter_batches(_ROWS_AT_ONCE):
                yield from (
                    (f"{path}, row {number}", row) for row, number in zip(part.to_pylist(), numbers, strict=False)
                )
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is not a complete .parquet file ({error}); copy it again.") from error


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
    is_empty, num_blank = True, 0
    for path in paths:
        if format_of(path) == "text":
            documents = _text_documents(path, encoding, options["separator"])
        else:
            documents = _column_of_rows(path, encoding, options["text_column"])
        for text in documents:
            if text and not text.isspace():
                is_empty = False
                yield {"text": text}
            else:
                num_blank += 1
    if is_empty:
        raise ValueError(f"There is no text in {', '.join(paths[:3])}{', ...' * (len(paths) > 3)}; name other files.")
    if num_blank:
        logger.warning("%s documents of %s have no text and are left out.", f"{num_blank:,}", ", ".join(paths[:3]))


def _column_of_rows(path: str, encoding: str, column: str) -> Iterator[str]:
    for where, row in read_rows(path, encoding):
        if column not in row:
            raise ValueError(_describe_missing(where, column, [str(name) for name in row]))
        yield checked_text(row[column], f"{where}: {column!r}", "; set --text_column")


def _describe_missing(where: str, column: str, names: list[str]) -> str:
    """Say which columns there are, the nearest first, and when the first row seems to be none of names."""
    near = get_close_matches(column.lower(), [name.lower() for name in names], n=1)
    names.sort(key=lambda name: [name.lower()] != near)
    listed = ", ".join(shorten(name, 40, placeholder=" ...") for name in names[:8]) + ", ..." * (len(names) > 8)
    heading = (
        " The first row is read as the names of the columns: put them there." if max(map(len, names)) > 80 else ""
    )
    return f"{where} has no column {column!r}; set --text_column to one of: {listed}.{heading}"


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
    "describe_files",
    "file_on_disk",
    "find_files",
    "format_of",
    "is_saved_dataset",
    "open_text",
    "read_files",
    "read_lines",
    "read_rows",
]
