# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The sequence-to-sequence task of last resort: from a function's source code to the first sentence of its docstring.

Like the embedded corpus it needs no network and no committed text: the functions are those of the running interpreter's
standard library. The pairs, and so every number computed from them, differ between Python versions.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .embedded_corpus import find_definitions, hashed_place, read_modules, split_of


EMBEDDED_PAIR = "code-summary"
TEST_SHARE = 0.06
# At 3 to 4 characters per token this fits into 512 positions; 9 of 10 functions are shorter.
MAX_SOURCE_CHARACTERS = 1000
MAX_TARGET_CHARACTERS = 200
MIN_TARGET_WORDS = 3

_BLANK_LINE = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_LETTER = re.compile(r"[^\W\d_]")


class EmbeddedPair(NamedTuple):
    """One pair of the embedded task.

    Args:
        name (`str`): dotted name of the function.
        split (`str`): "train", "validation" or "test".
        source (`str`): the function as Python code, without docstrings and comments.
        target (`str`): the first sentence of its docstring, on one line.
    """

    name: str
    split: str
    source: str
    target: str


def embedded_pairs(stdlib: Path | None = None) -> Iterator[EmbeddedPair]:
    """Yield the pairs of the embedded task, always in the same order for one Python version.

    A source is what `ast.unparse` makes of a function or method, so its layout is uniform. The line breaks stay, since
    indentation is syntax. It is named as in its class body, without module and class, and parses as it stands.

    Left out are functions without a body of their own, sources of more than 1,000 characters, and summaries that are
    not a sentence (fewer than 3 words, more than 200 characters, or a doctest) or that stand in the source
    themselves. A pair occurs once. Where a source or a target occurs in several splits, the first split keeps it.

    Args:
        stdlib (`Path`, *optional*): folder of the standard library; default: the running interpreter's.

    Yields:
        `EmbeddedPair`: the next pair; its `split` is decided by the top-level package alone.

    Raises:
        FileNotFoundError: if the interpreter carries no readable module (a frozen or zipped standard library).
    """
    seen_pairs: set[tuple[str, str]] = set()
    split_of_source: dict[str, str] = {}
    split_of_target: dict[str, str] = {}
    for module, _, tree in read_modules(stdlib):
        split = pair_split_of(module.partition(".")[0])
        for name, source, target in _module_pairs(module, tree):
            if (source, target) in seen_pairs:
                continue
            if split_of_source.get(source, split) != split or split_of_target.get(target, split) != split:
                continue
            seen_pairs.add((source, target))
            split_of_source[source] = split_of_target[target] = split
            yield EmbeddedPair(name, split, source, target)


def pair_split_of(package: str) -> str:
    """Assign a package to a split by a hash of its name; "validation" is what the embedded corpus holds out."""
    return "test" if hashed_place(package) >= 1 - TEST_SHARE else split_of(package)


def _module_pairs(module: str, tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Yield name, source and target of every usable function of a module, in source order; `tree` is used up."""
    functions = [
        (name, node, _summary(ast.get_docstring(node) or ""))
        for name, node in find_definitions(module, tree)
        if not isinstance(node, ast.ClassDef)
    ]
    _drop_constants(tree)
    for name, node, target in functions:
        if target is None or all(isinstance(statement, ast.Pass) for statement in node.body):
            continue
        source = ast.unparse(node)
        if len(source) <= MAX_SOURCE_CHARACTERS and target not in source:
            yield name, source, target


def _drop_constants(tree: ast.Module) -> None:
    """Remove, in place, each statement that is a lone constant: a docstring, a string for a comment, or `...`."""
    for node in ast.walk(tree):
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(node, block, None)
            if isinstance(statements, list):  # the body of a lambda is an expression
                kept = [s for s in statements if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
                setattr(node, block, kept or ([ast.Pass()] if block == "body" else []))


def _summary(docstring: str) -> str | None:
    """Return the first sentence of a cleaned docstring on one line, or None if it is not usable."""
    paragraph = _BLANK_LINE.split(docstring, maxsplit=1)[0]
    sentence = _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]
    if sentence.startswith(">>>") or len(sentence) > MAX_TARGET_CHARACTERS:
        return None
    words = [word for word in sentence.split(" ") if _LETTER.search(word)]
    return sentence if len(words) >= MIN_TARGET_WORDS else None
