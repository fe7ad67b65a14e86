# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Parallel corpora: sentence pairs of Hub data sets, local files, or, if neither is named, `embedded_pairs`."""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets

from .embedded_pairs import EMBEDDED_PAIR, embedded_pairs
from .files import checked_text, find_files, format_of, read_lines, read_rows
from .text import (
    cached_dataset,
    check_counts,
    check_encoding,
    check_share,
    check_train_files,
    choose_held_out,
    file_stamps,
    first_rows,
    load_embedded,
    load_hub_splits,
)
from .translation_tokenizer import SPECIAL_TOKENS, TOKENIZER_MODELS


logger = logging.getLogger(__name__)

# Stands for the language in the path of paired text files, one file per language.
LANGUAGE_PLACEHOLDER = "{lang}"

_USE_OF_SPLIT = {"train": "train on", "validation": "evaluate on", "test": "score at the end"}
# Pairs of a split that tell its languages apart; a few could be alike by accident.
_FEWEST_TO_COMPARE, _MOST_TO_COMPARE = 10, 500
# Two languages of one alphabet have a cosine of trigrams about half that of two texts of one language.
_CLEARLY_MORE = 1.2

_LANGUAGE_PAIR = re.compile(r"(\w+)-(\w+)")
PAIR_FEATURES = Features({name: Value("large_string") for name in ("pair", "source", "target")})


class LanguagePair(NamedTuple):
    """What is translated into what; its `str` is the name in `language_pairs`.

    Args:
        source (`str`): language code.
        target (`str`): language code.
    """

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"

    def is_among(self, languages: Iterable[str]) -> bool:
        """Return True if both languages are there."""
        return {self.source, self.target} <= set(languages)


@dataclass
class TranslationDataArguments:
    """Where the sentence pairs come from and how they become token ids; made for `HfArgumentParser`.

    Without `parallel_datasets` and `train_files` the corpus is `embedded_pairs`. Each field is explained by its `help`.

    Raises:
        ValueError: if a value is out of range or two fields contradict each other.
    """

    language_pairs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What to translate into what, source-target, e.g. de-en fr-en zh_Hans-en. Default: the embedded "
            f"corpus, {EMBEDDED_PAIR}."
        },
    )
    parallel_datasets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Data sets on the Hugging Face Hub, or in local folders. Name each, or a folder that load_dataset can "
            "read, as name or name:configuration, e.g. wmt/wmt16:ro-en bentrevett/multi30k. Their rows hold a "
            "column per language, or the column translation with a text per language. Each serves every pair that "
            "it has both languages of."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split of --parallel_datasets to train on."})
    validation_split: str = field(
        default="validation",
        metadata={
            "help": "Split of --parallel_datasets to evaluate on. Of pairs without a split called 'validation', "
            "--validation_share of the training pairs is held out."
        },
    )
    test_split: str = field(
        default="test", metadata={"help": "Split of --parallel_datasets to score at the end, if there is one."}
    )
    train_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files to train on: tables, JSON, or text by a path with {lang} for the language. Tables (.csv, .tsv, "
            ".parquet) and JSON (.jsonl, .json) have a key or column per language, or an object translation that has them; "
            "text has one sentence per line, e.g. data/train.{lang}. All also compressed."
        },
    )
    validation_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Files to evaluate on. Without them --validation_share is held out."},
    )
    test_files: list[str] = field(default_factory=list, metadata={"help": "Files to score at the end."})
    encoding: str = field(default="utf-8", metadata={"help": "Encoding of the local files, e.g. utf-8 or latin-1."})
    validation_share: float = field(
        default=0.05,
        metadata={
            "help": "Share of the training pairs, in (0, 1), to hold out for evaluation. Where there is a validation "
            "part, that is read. Chosen by a hash of the source, so equal sources stay together."
        },
    )
    max_train_pairs: int | None = field(
        default=None, metadata={"help": "Use only the first sentence pairs of each language pair to train on."}
    )
    max_validation_pairs: int | None = field(
        default=None, metadata={"help": "Use only the first sentence pairs of each language pair to evaluate on."}
    )
    max_test_pairs: int | None = field(
        default=None, metadata={"help": "Use only the first sentence pairs of each language pair to score."}
    )
    max_source_length: int | None = field(
        default=None,
        metadata={"help": "Tokens per source, its end and language tokens included. Default: the model's positions."},
    )
    max_target_length: int | None = field(
        default=None,
        metadata={"help": "Tokens per target, its end token included. Default: the model's positions."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer on the Hub or in a folder. Default: train one on the training pairs."},
    )
    tokenizer_model: Literal["unigram", "bpe"] = field(
        default="unigram", metadata={"help": "What to train: a unigram model of words, or a byte-level BPE."}
    )
    vocab_size: int = field(
        default=8000,
        metadata={"help": "Size of the trained vocabulary, which all languages share, special tokens included."},
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that filter and tokenize. Default: the main process only."}
    )

    def __post_init__(self) -> None:
        """Check every field that can be checked without reading the corpus."""
        self._check_language_pairs()
        self._check_ranges()
        self._check_combinations()

    @property
    def pairs(self) -> list[LanguagePair]:
        """`list[LanguagePair]`: `language_pairs`, parsed; the embedded one if none is named."""
        return [LanguagePair(*name.split("-")) for name in self.language_pairs or [EMBEDDED_PAIR]]

    def _check_language_pairs(self) -> None:
        for name in self.language_pairs:
            match = _LANGUAGE_PAIR.fullmatch(name)
            if match is None:
                raise ValueError(
                    f"language_pairs must be source-target, such as de-en or zh_Hans-en (letters, digits and _ in a "
                    f"language, zh_CN for zh-CN); got {name!r}."
                )
            if match[1] == match[2]:
                raise ValueError(f"language_pairs: {name!r} has the same source and target; name two languages.")
            if self.language_pairs.count(name) > 1:
                raise ValueError(f"language_pairs: {name!r} is named twice; name it only once.")

    def _check_ranges(self) -> None:
        check_share(self.validation_share)
        check_encoding(self.encoding)
        counts = ("max_train_pairs", "max_validation_pairs", "max_test_pairs", "preprocessing_num_workers")
        check_counts({name: getattr(self, name) for name in counts})
        lengths = ("max_source_length", "max_target_length")
        check_counts({name: getattr(self, name) for name in lengths}, at_least=2)
        if self.tokenizer_model not in TOKENIZER_MODELS:
            raise ValueError(f"tokenizer_model must be one of {TOKENIZER_MODELS}; got {self.tokenizer_model!r}.")
        num_special = len(SPECIAL_TOKENS) + len(languages_to_name(self.pairs))
        num_bytes = 256 if self.tokenizer_model == "bpe" else 1
        if self.vocab_size < num_special + num_bytes:
            raise ValueError(
                f"vocab_size must be at least {num_special + num_bytes} ({num_special} special tokens and {num_bytes} "
                f"more for {self.tokenizer_model}); got {self.vocab_size}."
            )

    def _check_combinations(self) -> None:
        files = self.train_files or self.validation_files or self.test_files
        if self.parallel_datasets and files:
            raise ValueError("Name either parallel_datasets or train_files/validation_files/test_files, not both.")
        has_source = bool(self.parallel_datasets or files)
        if has_source and not self.language_pairs:
            raise ValueError("parallel_datasets and train_files need language_pairs, e.g. --language_pairs de-en.")
        if not has_source and self.language_pairs not in ([], [EMBEDDED_PAIR]):
            raise ValueError(
                f"language_pairs {' '.join(self.language_pairs)} needs parallel_datasets or train_files; without them "
                f"there is only {EMBEDDED_PAIR}."
            )
        for name in self.parallel_datasets:
            if self.parallel_datasets.count(name) > 1:
                raise ValueError(f"parallel_datasets: {name!r} is named twice; name it only once.")


def languages_to_name(pairs: list[LanguagePair]) -> list[str]:
    """List the target languages if there are several; a single one need not be named."""
    languages = list(dict.fromkeys(pair.target for pair in pairs))
    return languages if len(languages) > 1 else []


class _Part(NamedTuple):
    """Rows of one split from one source, with a column per language."""

    origin: str  # for messages
    languages: list[str]  # all that the source has
    rows: Dataset  # strings or nulls, at least in the languages that are read


def load_parallel_corpus(args: TranslationDataArguments, needs_train: bool = True) -> DatasetDict:
    """Load the sentence pairs of the data sets, the files or the embedded corpus.

    Pairs with an empty or blank side are left out; their number is logged.

    Args:
        args (`TranslationDataArguments`): names the sources; at most one of `parallel_datasets` and `train_files`.
        needs_train (`bool`): refuse `validation_files` and `test_files` alone, which give those splits alone.

    Returns:
        `DatasetDict`: splits "train", "validation" and, where there is one, "test", with the string columns "pair"
        ("de-en"), "source" and "target" (stripped). Rows are in the order of `language_pairs`, then of the corpus.

    Raises:
        FileNotFoundError: if a path does not exist, or the interpreter carries no embedded corpus.
        ValueError: if a source cannot be loaded or decoded, serves no language pair or has sides that do not match, or
            if a language pair has no source or no text.
    """
    if args.parallel_datasets:
        parts = _load_hub_parts(args)
    elif args.train_files or args.validation_files or args.test_files:
        check_train_files(args, needs_train)
        parts = _load_file_parts(args)
    else:
        parts = _load_embedded_parts()
    splits = {name: _rows_by_pair(parts[name], name, args) for name in ("train", "validation", "test")}
    _warn_of_swapped(splits)
    _hold_out_pairs(splits["train"], splits["validation"], args)
    limits = {"train": args.max_train_pairs, "validation": args.max_validation_pairs, "test": args.max_test_pairs}
    corpus = DatasetDict(
        {
            name: concatenate_datasets(
                [first_rows(by_pair[pair], limits[name]) for pair in args.pairs if pair in by_pair]
            )
            for name, by_pair in splits.items()
            if by_pair
        }
    )
    _say_what_was_read(args, parts, splits, corpus)
    return corpus


def _say_what_was_read(
    args: TranslationDataArguments,
    parts: dict[str, list[_Part]],
    splits: dict[str, dict[LanguagePair, Dataset]],
    corpus: DatasetDict,
) -> None:
    """Log how many pairs each split has, from where, and the first pair of each direction, to see its languages by."""
    said = []
    for name, split in corpus.items():
        origins = [part.origin if args.parallel_datasets else Path(part.origin).name for part in parts[name]]
        origin = ", ".join(origins[:3]) + ", ..." * (len(origins) > 3)
        if not origins:
            origin = f"the training pairs, {args.validation_share:.3g} of them held out (--validation_share)"
        said.append(f"{len(split):,} to {_USE_OF_SPLIT[name]}, of {origin}")
    logger.info("Sentence pairs: %s.", "; ".join(said))
    for pair, rows in (splits["train"] or splits["validation"] or splits["test"]).items():
        source, target = (shorten(rows[0][side], 50, placeholder="...") for side in ("source", "target"))
        logger.info("%s, the first pair: %r -> %r", pair, source, target)


def _warn_of_swapped(splits: dict[str, dict[LanguagePair, Dataset]]) -> None:
    """Warn where the sources of a split read like the training targets, and its targets like the training sources."""
    for pair, rows in splits["train"].items():
        known = _trigrams(rows)
        for name in ("validation", "test"):
            if len(splits[name].get(pair, ())) < _FEWEST_TO_COMPARE:
                continue
            source, target = _trigrams(splits[name][pair])
            straight = _cosine(known[0], source) + _cosine(known[1], target)
            if _cosine(known[0], target) + _cosine(known[1], source) > _CLEARLY_MORE * straight:
                logger.warning(
                    "Exchange source and target of the %s pairs of %s: their sources read like the training targets, and "
                    "their targets like the training sources.",
                    name,
                    pair,
                )


def _trigrams(rows: Dataset) -> tuple[Counter, Counter]:
    """Count the trigrams of characters of the first sources and targets."""
    rows = rows[:_MOST_TO_COMPARE]
    return tuple(
        Counter(text[i : i + 3] for text in rows[side] for i in range(len(text) - 2)) for side in ("source", "target")
    )


def _cosine(one: Counter, other: Counter) -> float:
    product = sum(number * other[trigram] for trigram, number in one.items())
    squares = (sum(number**2 for number in counts.values()) for counts in (one, other))
    return product / max(1.0, math.prod(squares) ** 0.5)


def _load_hub_parts(args: TranslationDataArguments) -> dict[str, list[_Part]]:
    """Load the splits of the data sets; only the training split must be there under its default name."""
    parts: dict[str, list[_Part]] = {"train": [], "validation": [], "test": []}
    names = {"train": args.train_split, "validation": args.validation_split, "test": args.test_split}
    for name in args.parallel_datasets:
        # A folder may have a colon in its path.
        name, _, configuration = (name, "", "") if Path(name).is_dir() else name.partition(":")
        loaded, source = load_hub_splits(name, configuration or None, names, "use local files with --train_files")
        for role, split in loaded.items():
            rows = _language_columns(split)
            part = _Part(f"{source}, split {names[role]!r}", rows.column_names, rows)
            if not any(pair.is_among(part.languages) for pair in args.pairs):
                raise ValueError(
                    f"{part.origin} has no language pair of {' '.join(args.language_pairs)}; its text columns: "
                    f"{', '.join(part.languages) or 'none'} (all columns: {', '.join(split.column_names)})."
                )
            parts[role].append(part)
    _require_all_pairs(parts["train"], "train", args)
    return parts


def _language_columns(split: Dataset) -> Dataset:
    """Reduce a split to its text columns: those of the column "translation", if it has one, else all of strings."""
    if "translation" in split.column_names:
        split = split.select_columns(["translation"]).flatten()
        split = split.rename_columns({name: name.removeprefix("translation.") for name in split.column_names})
    return split.select_columns(
        [
            name
            for name, feature in split.features.items()
            if isinstance(feature, Value) and feature.dtype in ("string", "large_string")
        ]
    )


def _load_file_parts(args: TranslationDataArguments) -> dict[str, list[_Part]]:
    parts: dict[str, list[_Part]] = {"train": [], "validation": [], "test": []}
    names = {"train": args.train_files, "validation": args.validation_files, "test": args.test_files}
    role_of_path: dict[str, str] = {}
    for role, files in names.items():
        for path in dict.fromkeys(
            path for name in files for path in ([name] if LANGUAGE_PLACEHOLDER in name else find_files([name]))
        ):
            if role_of_path.setdefault(path, role) != role:
                raise ValueError(f"{path} is both a {role_of_path[path]} and a {role} file; name it only once.")
            parts[role].append(_load_file_part(path, role, args))
        if files:
            _require_all_pairs(parts[role], role, args)
    return parts


def _load_file_part(name: str, role: str, args: TranslationDataArguments) -> _Part:
    """Read the languages of one file, or set of paired files, that are asked for and have a partner in it."""
    paths: dict[str, str] = {}
    if LANGUAGE_PLACEHOLDER in name:
        paths = _find_paired_files(name, dict.fromkeys(language for pair in args.pairs for language in pair))
        languages = list(paths)
    elif format_of(name) == "text":
        raise ValueError(
            f"{name} holds one language; name paired text files by a path with {LANGUAGE_PLACEHOLDER} in place of the "
            "language."
        )
    else:
        _, first_row = next(_read_translations(name, args.encoding), (None, None))
        if first_row is None:
            raise ValueError(f"There is no text in {name}; name another file.")
        languages = list(first_row)
    served = [pair for pair in args.pairs if pair.is_among(languages)]
    if not served:
        raise ValueError(
            f"{name} has no language pair of {' '.join(args.language_pairs)}; its languages: {', '.join(languages)}."
        )
    read = tuple(dict.fromkeys(language for pair in served for language in pair))
    options: dict[str, Any] = {"encoding": args.encoding}
    if paths:
        paths = {language: paths[language] for language in read}
        rows = cached_dataset(read_paired_text, {"paths": paths, **options}, read, role, file_stamps(paths.values()))
    else:
        options = {"path": name, "languages": read, **options}
        rows = cached_dataset(read_parallel_rows, options, read, role, file_stamps([name]))
    return _Part(name, languages, rows)


def _find_paired_files(name: str, languages: Iterable[str]) -> dict[str, str]:
    """Return the absolute paths, by language, that a path with "{lang}" stands for."""
    if format_of(name) not in (None, "text"):
        raise ValueError(
            f"{name}: JSON and tables hold all languages in one file; name it without {LANGUAGE_PLACEHOLDER}."
        )
    paths = {lang: Path(name.replace(LANGUAGE_PLACEHOLDER, lang)).expanduser().absolute() for lang in languages}
    found = {lang: str(path) for lang, path in paths.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(f"There is no file {name} with {LANGUAGE_PLACEHOLDER} as one of: {', '.join(paths)}.")
    return found


def read_paired_text(options: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the lines that stand beside each other in files of one sentence per line; `paths`: language -> file."""
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


def read_parallel_rows(options: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the languages of every row; null becomes ""."""
    languages = options["languages"]
    for where, texts in _read_translations(options["path"], options["encoding"]):
        missing = [language for language in languages if language not in texts]
        if missing:
            raise ValueError(
                f"{where} has no key {missing[0]!r}, which the first line has; its keys: {', '.join(texts)}."
            )
        yield {
            language: "" if texts[language] is None else checked_text(texts[language], f"{where}: {language!r}")
            for language in languages
        }


def _read_translations(path: str, encoding: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield file and number of every row, and the languages, which stand in it or in its "translation"."""
    for where, row in read_rows(path, encoding):
        yield where, row["translation"] if isinstance(row.get("translation"), dict) else row


def _require_all_pairs(parts: list[_Part], role: str, args: TranslationDataArguments) -> None:
    languages = sorted({language for part in parts for language in part.languages})
    for pair in args.pairs:
        if not any(pair.is_among(part.languages) for part in parts):
            raise ValueError(
                f"There is no {role} corpus with both languages of {pair}; the languages found are "
                f"{', '.join(languages)}. Check --language_pairs or name more corpora."
            )


def _load_embedded_parts() -> dict[str, list[_Part]]:
    languages = EMBEDDED_PAIR.split("-")
    splits = load_embedded(_read_embedded_pairs, {}, tuple(languages), ("train", "validation", "test"))
    return {role: [_Part("The embedded corpus", languages, rows)] for role, rows in splits.items()}


def _read_embedded_pairs(options: dict[str, Any]) -> Iterator[dict[str, str]]:
    source, target = EMBEDDED_PAIR.split("-")
    for pair in embedded_pairs(**options):
        yield {"split": pair.split, source: pair.source, target: pair.target}


def _rows_by_pair(parts: list[_Part], role: str, args: TranslationDataArguments) -> dict[LanguagePair, Dataset]:
    """Return the rows of each language pair that a split has; those with an empty side are dropped and counted."""
    rows_by_pair = {}
    for pair in args.pairs:
        serving = [part.rows for part in parts if pair.is_among(part.languages)]
        if not serving:
            continue
        num_rows = sum(len(rows) for rows in serving)
        rows = concatenate_datasets(
            [
                rows.map(
                    _pair_batch,
                    batched=True,
                    remove_columns=rows.column_names,
                    features=PAIR_FEATURES,
                    fn_kwargs={"pair": pair},
                    num_proc=args.preprocessing_num_workers,
                    desc=f"Reading {pair}",
                )
                for rows in serving
            ]
        )
        if len(rows) == 0:
            raise ValueError(
                f"The {role} corpus of {pair} holds no text: all its {num_rows} sentence pairs have an empty side."
            )
        if len(rows) < num_rows:
            logger.warning(
                "%s corpus, %s: dropped %d of %d sentence pairs with an empty side.",
                role.capitalize(),
                pair,
                num_rows - len(rows),
                num_rows,
            )
        rows_by_pair[pair] = rows
    missing = [str(pair) for pair in args.pairs if pair not in rows_by_pair]
    if missing and rows_by_pair and role == "test":
        logger.warning("There is no test corpus for %s; only the other pairs are scored.", ", ".join(missing))
    return rows_by_pair


def _pair_batch(batch: dict[str, list[str | None]], pair: LanguagePair) -> dict[str, list[str]]:
    """Strip both sides of each row and leave out rows with an empty side."""
    stripped = [[(text or "").strip() for text in batch[language]] for language in pair]
    sides = [(source, target) for source, target in zip(*stripped, strict=True) if source and target]
    return {
        "pair": [str(pair)] * len(sides),
        "source": [source for source, _ in sides],
        "target": [target for _, target in sides],
    }


def _hold_out_pairs(
    train: dict[LanguagePair, Dataset], validation: dict[LanguagePair, Dataset], args: TranslationDataArguments
) -> None:
    """Move rows from training to validation, in place, for the language pairs that have no validation rows.

    The share is that of all these pairs together, so that equal sources stay together across them.
    """
    lacking = [pair for pair in train if pair not in validation]
    if not lacking:
        return
    joined = concatenate_datasets([train[pair] for pair in lacking])
    held_out = choose_held_out(joined, "source", args.validation_share, args.preprocessing_num_workers)
    ends = np.cumsum([len(train[pair]) for pair in lacking])
    for pair, chosen in zip(lacking, np.split(held_out, ends[:-1]), strict=True):
        if chosen.all() or not chosen.any():
            raise ValueError(
                f"{args.validation_share:.0%} of the {len(chosen)} training pair(s) of {pair} cannot be held out for "
                "validation: it would be none or all of them. Name --validation_files or change --validation_share."
            )
        train[pair], validation[pair] = (
            train[pair].select(np.flatnonzero(~chosen)),
            train[pair].select(np.flatnonzero(chosen)),
        )


__all__ = [
    "LANGUAGE_PLACEHOLDER",
    "PAIR_FEATURES",
    "LanguagePair",
    "TranslationDataArguments",
    "languages_to_name",
    "load_parallel_corpus",
    "read_paired_text",
]
