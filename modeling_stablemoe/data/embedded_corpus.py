# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The corpus of last resort: the English documentation that every CPython installation carries.

It needs no network and no committed text. Two sources are read, both from the running interpreter's standard library:

- the language reference, as the topics of `pydoc_data.topics`;
- the docstrings of the standard library, found with `ast` in its source files (no module is imported).

The text, and so every number computed from it, differs between Python versions.
"""

import ast
import hashlib
import logging
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


logger = logging.getLogger(__name__)

EMBEDDED_KINDS = ("docs", "docs+source")
VALIDATION_SHARE = 0.06

# Tests are not prose; the rest is vendored, generated or a table.
_SKIPPED_FOLDERS = frozenset(
    "test tests idle_test idlelib lib2to3 ensurepip encodings pydoc_data site-packages dist-packages lib-dynload".split()
)
_SKIPPED_PREFIXES = (".", "__pycache__", "config-", "_sysconfigdata")
# Shorter passages ("Return True.") legitimately repeat and give nothing away.
_SHORTEST_TRACKED_PASSAGE = 60

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class EmbeddedDocument(NamedTuple):
    """One document of the embedded corpus.

    Args:
        name (`str`): dotted module name, or the name of a language-reference topic.
        source (`str`): "topic", "docstrings" or "code".
        split (`str`): "train" or "validation".
        text (`str`): the document; its first line says what it is about.
    """

    name: str
    source: str
    split: str
    text: str


def embedded_documents(kind: str = "docs", stdlib: Path | None = None) -> Iterator[EmbeddedDocument]:
    """Yield the documents of the embedded corpus, always in the same order for one Python version.

    Topics come first, then for every module one document with all its docstrings in source order and, for
    "docs+source", one with its source code. A topic's paragraph or a docstring of 60 characters or more is left out
    where an earlier document has it, so that none stands on both sides of the split; source code stays whole.

    Args:
        kind (`str`): "docs" or "docs+source".
        stdlib (`Path`, *optional*): folder of the standard library; default: the running interpreter's.

    Yields:
        `EmbeddedDocument`: the next document; its `split` is decided by the topic or the top-level package alone.

    Raises:
        ValueError: if `kind` is unknown.
        FileNotFoundError: if the interpreter carries no readable module (a frozen or zipped standard library).
    """
    if kind not in EMBEDDED_KINDS:
        raise ValueError(f"embedded_corpus must be one of {', '.join(EMBEDDED_KINDS)}; got {kind!r}.")
    seen_passages: set[str] = set()
    yield from _topic_documents(seen_passages)

    for name, code, tree in read_modules(stdlib):
        split = split_of(name.partition(".")[0])
        passages = [
            f"{heading}\n\n{docstring}"
            for heading, docstring in _docstrings(name, tree)
            if _is_new(docstring, seen_passages)
        ]
        if passages:
            yield EmbeddedDocument(name, "docstrings", split, "\n\n\n".join(passages) + "\n")
        if kind == "docs+source" and code.strip():
            yield EmbeddedDocument(name, "code", split, f"# {name}\n{code}")


def read_modules(stdlib: Path | None = None) -> Iterator[tuple[str, str, ast.Module]]:
    """Yield dotted name, source code and syntax tree of the standard library's modules, sorted, importing none."""
    root = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    num_parsed = num_unreadable = 0
    for name, path in _find_modules(root):
        try:
            with tokenize.open(path) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                code = file.read()
                tree = ast.parse(code)
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            logger.debug("Embedded corpus: skipped %s: %s", path, error)
            num_unreadable += 1
        else:
            num_parsed += 1
            yield name, code, tree

    if num_parsed == 0:
        raise FileNotFoundError(
            f"This Python has no readable standard-library sources in {root}, so there is no embedded corpus. "
            "Pass your own text with --train_files, or name a data set."
        )
    if num_unreadable:
        logger.warning("Embedded corpus: skipped %d unreadable modules.", num_unreadable)


def split_of(name: str) -> str:
    """Assign a topic or top-level package to "validation" (about 6 % of the names) or "train" by a hash of its name."""
    return "validation" if hashed_place(name) < VALIDATION_SHARE else "train"


def hashed_place(text: str, num_bytes: int = 8) -> float:
    """Map a text to a number in [0, 1], evenly distributed and the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:num_bytes], "big") / 256**num_bytes


def _topic_documents(seen_passages: set[str]) -> Iterator[EmbeddedDocument]:
    """Yield the language reference, each topic without the paragraphs that an earlier topic holds."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        # Some Linux distributions package it apart from the interpreter.
        logger.warning("Embedded corpus: this Python carries no pydoc_data.topics; using docstrings only.")
        return
    for name, text in sorted(topics.items()):
        paragraphs = [paragraph for paragraph in text.strip().split("\n\n") if _is_new(paragraph, seen_passages)]
        if any(len(paragraph) >= _SHORTEST_TRACKED_PASSAGE for paragraph in paragraphs):  # more than its heading
            yield EmbeddedDocument(name, "topic", split_of(name), "\n\n".join(paragraphs) + "\n")


def _is_new(passage: str, seen_passages: set[str]) -> bool:
    """Return True if a passage is short or not seen yet, and remember it."""
    if len(passage) < _SHORTEST_TRACKED_PASSAGE:
        return True
    is_new = passage not in seen_passages
    seen_passages.add(passage)
    return is_new


def _find_modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the path of every module that is worth reading, in sorted order."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not _is_skipped(name))
        for file in sorted(files):
            if file.endswith(".py") and not _is_skipped(file):
                path = Path(folder, file)
                parts = path.relative_to(root).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _is_skipped(name: str) -> bool:
    return name in _SKIPPED_FOLDERS or name.startswith(_SKIPPED_PREFIXES)


def _docstrings(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield heading and cleaned docstring of a module, its classes and their functions, in source order."""
    docstring = ast.get_docstring(tree)
    if docstring:
        yield module, docstring
    for name, node in find_definitions(module, tree):
        docstring = ast.get_docstring(node)
        if docstring:
            yield _heading(name, node), docstring


def find_definitions(owner: str, node: ast.AST) -> Iterator[tuple[str, Definition]]:
    """Yield dotted name and tree of what a module or class defines, in source order; functions are not searched."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            name = f"{owner}.{child.name}"
            yield name, child
            if isinstance(child, ast.ClassDef):
                yield from find_definitions(name, child)
        elif isinstance(child, ast.stmt | ast.excepthandler):  # definitions inside if, try, with
            yield from find_definitions(owner, child)


def _heading(name: str, node: Definition) -> str:
    """Write the signature line of a class or function under its qualified name."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{prefix}{name}({ast.unparse(node.args)}){returns}"
