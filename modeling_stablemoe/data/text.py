# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""From a corpus to packed blocks of token ids, in four steps.

`load_corpus` -> `load_tokenizer` -> `pack` -> `collate_blocks`. The `datasets` library does the reading, caching and
parallel work. A corpus is a Hub data set, local files, or, if neither is named, the text that Python itself carries.
"""

import logging
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    NamedSplit,
    Value,
    are_progress_bars_disabled,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.fingerprint import Hasher
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .embedded_corpus import EMBEDDED_KINDS, embedded_documents, hashed_place
from .files import READABLE, describe_files, file_on_disk, find_files, format_of, is_saved_dataset, read_files


logger = logging.getLogger(__name__)

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
# All 256 bytes plus the two special tokens: below this some text could not be encoded.
MIN_VOCAB_SIZE = 258
# More text hardly changes a byte-level BPE, but costs memory in proportion; a streamed corpus may have no end.
TOKENIZER_DOCUMENTS = 200_000

# Raise it when the readers below produce other documents than before, so that old caches are not used.
_CACHE_FORMAT = 1
# One encoding call holds about 100 bytes per token, so texts are handed over in groups of about 2 M tokens.
_CHARACTERS_PER_CALL = 8_000_000

# The embedded corpora depend on it.
_INTERPRETER = (sys.version, sysconfig.get_path("stdlib"))

Corpus = DatasetDict | IterableDatasetDict


@dataclass
class DataArguments:
    """Where the text comes from and how it becomes blocks; made for `HfArgumentParser`.

    Without `dataset_name` and `train_files` the corpus is `embedded_corpus`. Each field is explained by its `help`.

    Raises:
        ValueError: if a value is out of range or two fields contradict each other.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set on the Hugging Face Hub, or in a local folder. The folder is one that load_dataset or "
            "load_from_disk can read."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of --dataset_name, e.g. wikitext-103-raw-v1."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of --dataset_name to train on."})
    validation_split: str = field(
        default="validation",
        metadata={
            "help": "Split of --dataset_name to evaluate on. If the data set has no split called 'validation', "
            "--validation_share of the training documents is held out."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read --dataset_name while training instead of downloading it first."}
    )
    train_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Files or folders (read recursively) to train on. Readable are {READABLE}. JSON: one object per line, or an "
            "array of them."
        },
    )
    validation_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Files or folders to evaluate on. Without them --validation_share is held out."},
    )
    text_column: str = field(
        default="text", metadata={"help": "Column (data sets, tables) or key (JSON) that holds the document."}
    )
    encoding: str = field(default="utf-8", metadata={"help": "Encoding of the local files, e.g. utf-8 or latin-1."})
    document_separator: str | None = field(
        default=None,
        metadata={
            "help": "A line of exactly this separates the documents of a text file. An empty string: blank lines do. "
            "Without it every text file is one document."
        },
    )
    embedded_corpus: Literal["docs", "docs+source"] = field(
        default="docs",
        metadata={
            "help": "Text of Python's own, where neither data set nor files are named. It is the documentation that "
            "Python carries (about 2 million characters), or this and the source code of its standard library "
            "(about 11 million)."
        },
    )
    validation_share: float = field(
        default=0.05,
        metadata={
            "help": "Share of the training documents, in (0, 1), to hold out for evaluation. Where the data set or the "
            "files have a validation part, that is read. Chosen by a hash of the text, so equal documents stay "
            "together; of a single document it is the end."
        },
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per training block. Default: the model's max_position_embeddings."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer on the Hub or in a folder. Default: train a byte-level BPE on the training text."
        },
    )
    vocab_size: int = field(
        default=4096,
        metadata={"help": f"Size of the trained tokenizer, special tokens included; at least {MIN_VOCAB_SIZE}."},
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that filter and tokenize. Default: the main process only."}
    )
    max_train_documents: int | None = field(
        default=None, metadata={"help": "Use only the first documents of the training split."}
    )
    max_validation_documents: int | None = field(
        default=None, metadata={"help": "Use only the first documents of the validation split."}
    )

    def __post_init__(self) -> None:
        """Check every field that can be checked without reading the corpus."""
        check_share(self.validation_share)
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and 2 special tokens); got {self.vocab_size}."
            )
        counts = ("block_size", "preprocessing_num_workers", "max_train_documents", "max_validation_documents")
        check_counts({name: getattr(self, name) for name in counts})
        if self.embedded_corpus not in EMBEDDED_KINDS:
            raise ValueError(f"embedded_corpus must be one of {EMBEDDED_KINDS}; got {self.embedded_corpus!r}.")
        if self.document_separator is not None and "\n" in self.document_separator:
            raise ValueError("document_separator is compared with single lines and must not hold a line break.")
        check_encoding(self.encoding)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.dataset_name and (self.train_files or self.validation_files):
            raise ValueError("Name either dataset_name or train_files/validation_files, not both.")
        if self.document_separator is not None and not (self.train_files or self.validation_files):
            raise ValueError("document_separator applies to text files; it needs train_files.")
        if self.dataset_config_name and not self.dataset_name:
            raise ValueError("dataset_config_name needs dataset_name.")
        if self.streaming and not self.dataset_name:
            raise ValueError("streaming needs dataset_name; local files are memory-mapped from the cache anyway.")
        if self.streaming and self.preprocessing_num_workers:
            raise ValueError("preprocessing_num_workers has no effect with streaming; set dataloader_num_workers.")


def check_share(validation_share: float) -> None:
    """Refuse a share that holds out nothing or everything."""
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must lie between 0 and 1 (exclusive); got {validation_share}.")


def check_train_files(args: Any, needs_train: bool) -> None:
    """Refuse files for evaluation alone where there is to be training."""
    for name in ("validation_files", "test_files"):
        if needs_train and getattr(args, name, None) and not args.train_files:
            raise ValueError(
                f"{name} needs train_files, to train on or to fit baselines to (--ngram_baselines); to evaluate a model on them alone, "
                "add --do_train false, without baselines."
            )


def check_counts(counts: dict[str, int | None], at_least: int = 1) -> None:
    """Refuse numbers, by name, that are set and too small."""
    for name, value in counts.items():
        if value is not None and value < at_least:
            raise ValueError(f"{name} must be at least {at_least}; got {value}.")


def check_encoding(encoding: str) -> None:
    """Check that Python can decode text of this encoding."""
    try:
        "".encode(encoding)
    except LookupError as error:
        raise ValueError(f"encoding {encoding!r} is not a text encoding known to Python.") from error


def load_corpus(args: DataArguments, needs_train: bool = True) -> Corpus:
    """Load the documents of the data set, the files or the embedded corpus.

    Args:
        args (`DataArguments`): names the source; at most one of `dataset_name` and `train_files` is set.
        needs_train (`bool`): refuse `validation_files` alone, which give no split "train".

    Returns:
        `DatasetDict`, or `IterableDatasetDict` when streaming: splits "train" and "validation", each not empty and
        with the one column "text", one document per row. Blank documents are left out.

    Raises:
        FileNotFoundError: if a path does not exist, or the interpreter carries no embedded corpus.
        ValueError: if a source cannot be loaded or decoded, lacks the column, or holds too little text.
    """
    if args.dataset_name:
        splits = _load_hub_dataset(args)
    elif args.train_files or args.validation_files:
        check_train_files(args, needs_train)
        splits = _load_local_files(args)
    else:
        options = {"kind": args.embedded_corpus}
        splits = load_embedded(_read_embedded, options, ("text",), ("train", "validation"))
    is_held_out = "validation" not in splits
    if is_held_out:
        splits = _hold_out(splits["train"], args.validation_share, args.preprocessing_num_workers)
    limits = {"train": args.max_train_documents, "validation": args.max_validation_documents}
    splits = {name: first_rows(split, limits[name]) for name, split in splits.items()}
    logger.info("%s", _describe_documents(args, splits, is_held_out, needs_train))
    return IterableDatasetDict(splits) if args.streaming else DatasetDict(splits)


def _describe_documents(args: DataArguments, splits: dict[str, Any], is_held_out: bool, needs_train: bool) -> str:
    """Say what is read for training and what for evaluation, and how many documents that is, but of a stream."""
    number = {
        name: f"{len(split):,} document{'s' * (len(split) != 1)}" if isinstance(split, Dataset) else "documents"
        for name, split in splits.items()
    }
    if args.train_files or args.validation_files:
        train, validation = (
            f"{describe_files(files)}, {_unit_of(files, args)}" if files else ""
            for files in (find_files(args.train_files), find_files(args.validation_files))
        )
    elif args.dataset_name:
        train, validation = (
            f"{args.dataset_name}, split {name!r}" for name in (args.train_split, args.validation_split)
        )
    else:
        train = f"the text that Python carries ({args.embedded_corpus}), as no data set or file is named"
        validation = "the same, a part of its own"
    if is_held_out:
        source = "the same" if needs_train else train
        validation = f"{source}, {args.validation_share:.3g} of it held out (--validation_share)"
    evaluated = f"Evaluated on: {number['validation']} of {validation}."
    return (
        f"Training text: {number['train']} of {train}. {evaluated}" if "train" in splits and needs_train else evaluated
    )


def _unit_of(paths: list[str], args: DataArguments) -> str:
    text = "one per file" if args.document_separator is None else "cut at --document_separator"
    rows = f"one per row, column {args.text_column!r}"
    return " or ".join(dict.fromkeys(text if format_of(path) == "text" else rows for path in paths))


def _load_hub_dataset(args: DataArguments) -> dict[str, Dataset] | dict[str, IterableDataset]:
    loaded, source = load_hub_splits(
        args.dataset_name,
        args.dataset_config_name,
        {"train": args.train_split, "validation": args.validation_split},
        "use local text with --train_files",
        streaming=args.streaming,
    )
    return {
        role: _text_only(split, args, f"{source}, split {getattr(args, f'{role}_split')!r}")
        for role, split in loaded.items()
    }


def load_hub_splits(
    name: str, configuration: str | None, splits: dict[str, str], alternative: str, streaming: bool = False
) -> tuple[dict[str, Any], str]:
    """Load the splits of a Hub data set or folder by role, and what to call it in messages.

    `splits` names the split of each role; one that is not for training and has the name of its role may be missing.
    """
    source = f"Data set {name!r}, configuration {configuration!r}"
    try:
        if is_saved_dataset(name):
            loaded = load_from_disk(name)
            loaded = loaded if isinstance(loaded, DatasetDict) else DatasetDict({splits["train"]: loaded})
            if streaming:
                loaded = {split: rows.to_iterable_dataset() for split, rows in loaded.items()}
        else:
            loaded = load_dataset(name, configuration, streaming=streaming)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"{source} could not be loaded: {_reason(error)} Check the name, the configuration and the network connection, "
            f"or {alternative}."
        ) from error
    wanted = {role: split for role, split in splits.items() if split in loaded or role == "train" or split != role}
    for role, split in wanted.items():
        if split not in loaded:
            raise ValueError(f"{source} has no split {split!r}; set --{role}_split to one of: {', '.join(loaded)}.")
    return {role: loaded[split] for role, split in wanted.items()}, source


def _text_only(split: Dataset | IterableDataset, args: DataArguments, source: str) -> Dataset | IterableDataset:
    """Reduce a split to the documents in `text_column`, renamed to "text", without blank ones."""
    try:
        first_row = next(iter(split), None)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(f"{source} could not be read: {_reason(error)}") from error
    if first_row is None:
        raise ValueError(f"{source} has no rows.")
    column = args.text_column
    if column not in first_row:
        raise ValueError(f"{source} has no column {column!r}; set --text_column to one of: {', '.join(first_row)}.")
    if not isinstance(first_row[column], str | None):
        kind = type(first_row[column]).__name__
        raise ValueError(f"{source}: column {column!r} holds {kind} values, not strings; set --text_column.")
    split = split.select_columns([column])
    if column != "text":
        split = split.rename_column(column, "text")
    options = {}
    if isinstance(split, Dataset):
        options = {"num_proc": args.preprocessing_num_workers, "desc": "Dropping blank documents"}
    split = split.filter(_are_not_blank, input_columns="text", batched=True, **options)
    if next(iter(split), None) is None:
        raise ValueError(f"{source} holds no text in column {column!r}.")
    return split


def _reason(error: Exception) -> str:
    """Return what went wrong, which the datasets library hides behind "An error occurred"."""
    return str(error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error)


def _are_not_blank(texts: list[str | None]) -> list[bool]:
    return [bool(text) and not text.isspace() for text in texts]


def _load_local_files(args: DataArguments) -> dict[str, Dataset]:
    named = {"train": args.train_files, "validation": args.validation_files}
    files = {name: find_files(paths) for name, paths in named.items() if paths}
    shared = sorted(set(files.get("train", ())) & set(files.get("validation", ())))
    if shared:
        raise ValueError(f"{shared[0]} is both a training and a validation file; name it only once.")
    splits = {}
    for name, paths in files.items():
        reader = {"text_column": args.text_column, "encoding": args.encoding, "separator": args.document_separator}
        splits[name] = cached_dataset(read_files, {"paths": paths, **reader}, ("text",), name, file_stamps(paths))
    return splits


def file_stamps(paths: Iterable[str]) -> list[tuple[str, int, int]]:
    """List what changes when a file is edited, as a part of cache keys."""
    stats = {path: os.stat(file_on_disk(path)) for path in paths}
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()]


def load_embedded(
    reader: Callable[..., Iterator], options: dict[str, Any], columns: tuple[str, ...], names: tuple[str, ...]
) -> dict[str, Dataset]:
    """Load the splits of these names from an embedded corpus, whose rows say which split they are in."""
    rows = cached_dataset(reader, options, ("split", *columns), "train", _INTERPRETER)
    roles = np.array(rows["split"])
    rows = rows.select_columns(list(columns))
    return {name: rows.select(np.flatnonzero(roles == name)) for name in names}


def cached_dataset(
    generator: Callable[..., Iterator], options: dict[str, Any], columns: tuple[str, ...], name: str, cache_key: Any
) -> Dataset:
    """Run a generator of rows of strings once, and read them from the datasets cache from then on.

    `cache_key` is what the rows depend on besides `options`. Errors of the generator come as it raised them.
    """
    try:
        return Dataset.from_generator(
            generator,
            features=Features({column: Value("large_string") for column in columns}),
            gen_kwargs={"options": options},  # one value, as lists directly in gen_kwargs are taken for shards
            split=NamedSplit(name),
            fingerprint=Hasher.hash((_CACHE_FORMAT, generator.__name__, options, columns, name, cache_key)),
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _read_embedded(options: dict[str, Any]) -> Iterator[dict[str, str]]:
    for document in embedded_documents(**options):
        yield {"split": document.split, "text": document.text}


def _hold_out(
    split: Dataset | IterableDataset, share: float, num_proc: int | None
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """Split documents into training and validation by a hash of their text; of a stream, the share is approximate."""
    if isinstance(split, IterableDataset):
        return {
            name: split.filter(_are_in, input_columns="text", batched=True, fn_kwargs={"name": name, "share": share})
            for name in ("train", "validation")
        }
    held_out = choose_held_out(split, "text", share, num_proc)
    if held_out.all():
        begin, end = _cut(split[0]["text"], 1 - share) if len(split) == 1 else ("", "")
        if not (begin.strip() and end.strip()):
            raise ValueError(
                f"{share:.0%} of the {len(split)} training document(s) cannot be held out for validation without using up "
                "all of them; name --validation_files, or make more documents with --document_separator."
            )
        logger.warning(
            "The training text is a single document: its last %d of %d characters are held out for validation. To hold out "
            "others, name --validation_files, or make more documents with --document_separator.",
            len(end),
            len(begin) + len(end),
        )
        return {"train": _one_document(begin), "validation": _one_document(end)}
    return {"train": split.select(np.flatnonzero(~held_out)), "validation": split.select(np.flatnonzero(held_out))}


def _cut(text: str, share: float) -> tuple[str, str]:
    """Cut a text in two, behind the white space that comes next after this share of it."""
    place = round(share * len(text))
    space = re.search(r"\s+", text[place:])
    place += space.end() if space and place + space.end() < len(text) else 0
    return text[:place], text[place:]


def _one_document(text: str) -> Dataset:
    return Dataset.from_dict({"text": [text]}, features=Features({"text": Value("large_string")}))


def choose_held_out(split: Dataset, column: str, share: float, num_proc: int | None) -> np.ndarray:
    """Return True for the rows to hold out, a share of them (rounded, at least one), by a hash of their text."""
    hashed = split.map(
        _add_places,
        input_columns=column,
        batched=True,
        remove_columns=split.column_names,
        num_proc=num_proc,
        desc="Choosing validation rows",
    )
    places = np.array(hashed["place"])
    return places <= np.sort(places)[max(1, round(share * len(places))) - 1]


def _are_in(texts: list[str], name: str, share: float) -> list[bool]:
    return [(hashed_place(text, 6) < share) == (name == "validation") for text in texts]


def _add_places(texts: list[str]) -> dict[str, list[float]]:
    return {"place": [hashed_place(text, 6) for text in texts]}


def first_rows(split: Dataset | IterableDataset, limit: int | None) -> Dataset | IterableDataset:
    """Keep the first rows of a split, all if there is no limit."""
    if limit is None:
        return split
    return split.take(limit) if isinstance(split, IterableDataset) else split.select(range(min(limit, len(split))))


def load_tokenizer(args: DataArguments, corpus: Corpus) -> PreTrainedTokenizerFast:
    """Load the named tokenizer, or train a byte-level BPE on the training split.

    The trained tokenizer is reversible for any text, and the same whenever it is trained on the same text. Its tokens
    "<|endoftext|>" (begin, end, unknown) and "<|pad|>" have the ids 0 and 1.

    Args:
        args (`DataArguments`): `tokenizer_name`, or `vocab_size` of the tokenizer to train.
        corpus (`DatasetDict` or `IterableDatasetDict`): its first 200,000 training documents train the tokenizer.

    Returns:
        `PreTrainedTokenizerFast`: has an end-of-text token. Little text gives fewer than `vocab_size` tokens, so use
        `len(tokenizer)`.

    Raises:
        ValueError: if the tokenizer cannot be loaded, has no end-of-text token, or there is no text to train on.
    """
    if args.tokenizer_name:
        tokenizer = load_named_tokenizer(args.tokenizer_name)
        _require_eos(tokenizer)
        return tokenizer
    split = corpus["train"]
    if next(iter(split), None) is None:
        raise ValueError("The training split is empty: a tokenizer needs text. Add text or name --tokenizer_name.")
    texts = (batch["text"] for batch in first_rows(split, TOKENIZER_DOCUMENTS).iter(batch_size=1000))
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(texts, args.vocab_size, [EOS_TOKEN, PAD_TOKEN]),
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def load_named_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from the Hub or a folder."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Tokenizer {name!r} could not be loaded: {error} Check --tokenizer_name, or leave it out to train a "
            "tokenizer."
        ) from error


def _require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"Tokenizer {tokenizer.name_or_path!r} has no end-of-text token to put after each document; set its "
            "eos_token and save it, or name another tokenizer with --tokenizer_name."
        )
    return tokenizer.eos_token_id


def train_bpe(texts: Iterable[list[str]], vocab_size: int, special_tokens: list[str] | list[AddedToken]) -> Tokenizer:
    """Train a byte-level BPE, reversible for any text.

    Args:
        texts (iterable of `list[str]`): batches of text.
        vocab_size (`int`): tokens, at most; at least 256 and the special ones.
        special_tokens (`list`): get the ids from 0 on.

    Returns:
        `Tokenizer`: without post-processor. Little text gives fewer tokens, which is logged.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=not are_progress_bars_disabled(),
    )
    backend.train_from_iterator(texts, trainer)
    warn_of_small_vocabulary(backend, vocab_size)
    return backend


def warn_of_small_vocabulary(backend: Tokenizer, vocab_size: int) -> None:
    """Log it if a trained tokenizer has fewer tokens than asked for."""
    if backend.get_vocab_size() < vocab_size:
        logger.warning(
            "The text has words for a vocabulary of %s tokens only, in place of %s: that is the size of this one.",
            f"{backend.get_vocab_size():,}",
            f"{vocab_size:,}",
        )


def pack(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, block_size: int, num_proc: int | None = None) -> Corpus:
    """Tokenize the documents and cut their concatenation into blocks.

    The end-of-text token follows every document. Blocks are cut within batches of 1000 documents, and what remains at
    the end of a batch (fewer than `block_size` tokens) is dropped; with `num_proc`, each process has batches of its
    own. Text that spells a special token is encoded as ordinary text. Map-style splits go through the cache.

    Args:
        corpus (`DatasetDict` or `IterableDatasetDict`): splits with the column "text".
        tokenizer (`PreTrainedTokenizerBase`): has an end-of-text token; its other special tokens are not added.
        block_size (`int`): tokens per block, at least 1.
        num_proc (`int`, *optional*): processes, for map-style splits only; default: the main process.

    Returns:
        `DatasetDict` or `IterableDatasetDict`, as given: the same splits with the one column `input_ids`, `block_size`
        ids per row.

    Raises:
        ValueError: if a split gives no block, the tokenizer has no end-of-text token, `block_size` is below 1, or
            `num_proc` is given for a stream.
    """
    _require_eos(tokenizer)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1; got {block_size}.")
    if num_proc is not None and isinstance(corpus, IterableDatasetDict):
        raise ValueError("num_proc applies to map-style corpora only; this one is streamed.")
    packed = {}
    for name, split in corpus.items():
        options: dict[str, Any] = {
            "batched": True,
            "batch_size": 1000,
            "remove_columns": ["text"],
            "features": Features({"input_ids": List(Value("int32"), length=block_size)}),
            "fn_kwargs": {"tokenizer": tokenizer, "block_size": block_size},
        }
        if isinstance(split, Dataset):
            options.update(num_proc=num_proc, desc=f"Packing the {name} split")
        packed[name] = split.map(_pack_batch, **options)
        if next(iter(packed[name]), None) is None:
            remedy = ", or raise --validation_share" if name == "validation" else ""
            num_tokens = sum(len(_encode(batch["text"], tokenizer)) for batch in split.iter(batch_size=1000))
            raise ValueError(
                f"The {name} split has only {num_tokens} tokens, too few for one block of {block_size} tokens (blocks "
                f"do not cross batches of 1000 documents). Use a smaller --block_size or more text{remedy}."
            )
    sizes = {name: len(blocks) for name, blocks in packed.items() if isinstance(blocks, Dataset)}
    if sizes:
        described = (f"{name} {number * block_size:,} in {number:,}" for name, number in sizes.items())
        logger.info("Tokens: %s blocks of %d.", ", ".join(described), block_size)
    return type(corpus)(packed)


def without_end(blocks: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Repeat a stream without end, so that a Trainer reads its passes as one; leave a map-style split as it is.

    A Trainer that resumes skips the batches read so far within the first pass only; in a later pass it would begin that
    pass again. The last batch of a pass is filled from the next one.

    Args:
        blocks (`Dataset` or `IterableDataset`): of `pack`, not empty.

    Returns:
        `Dataset` or `IterableDataset`, as given.
    """
    return blocks if isinstance(blocks, Dataset) else blocks.repeat(None)


def _pack_batch(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, block_size: int) -> dict[str, Any]:
    ids = _encode(batch["text"], tokenizer)
    return {"input_ids": ids[: len(ids) // block_size * block_size].reshape(-1, block_size)}


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the token ids of all documents, each followed by the end-of-text token, int32."""
    eos = np.array([tokenizer.eos_token_id], dtype=np.int32)
    pieces: list[np.ndarray] = []
    for group in _groups(texts):
        encoded = tokenizer(
            group, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        for ids in encoded["input_ids"]:
            pieces += [np.array(ids, dtype=np.int32), eos]
    return np.concatenate(pieces)


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Cut a list of texts so that a group exceeds the number of characters for one call by its last text only."""
    group: list[str] = []
    num_characters = 0
    for text in texts:
        group.append(text)
        num_characters += len(text)
        if num_characters >= _CHARACTERS_PER_CALL:
            yield group
            group, num_characters = [], 0
    if group:
        yield group


def collate_blocks(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack packed blocks into a batch for causal language modelling.

    There is no padding, hence no attention mask. The model shifts the labels itself.

    Args:
        features (`list[dict]`): rows of `pack`, all of one `block_size`.

    Returns:
        `dict`: `input_ids` and an equal copy `labels`, each a `torch.LongTensor` of shape `(batch, block_size)`.
    """
    input_ids = torch.stack([torch.as_tensor(feature["input_ids"], dtype=torch.long) for feature in features])
    return {"input_ids": input_ids, "labels": input_ids.clone()}
