# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""From sentence pairs to token ids, in three steps.

`load_parallel_corpus` -> `load_translation_tokenizer` -> `encode_pairs`. One model may learn several language pairs; a token in
front of the source, such as ">>de<<", then names the language to translate into, as in the OPUS models.
"""

import logging
from collections.abc import Iterator
from functools import partial
from itertools import compress
from operator import not_

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .parallel_corpus import PAIR_FEATURES, TranslationDataArguments, languages_to_name
from .text import check_counts, load_named_tokenizer
from .translation_tokenizer import (
    add_target_language_tokens,
    encode_sources,
    encode_texts,
    target_language_token,
    target_languages,
    train_translation_tokenizer,
)


logger = logging.getLogger(__name__)

# More text hardly changes a vocabulary, but costs memory in proportion.
TOKENIZER_PAIRS = 500_000


def load_translation_tokenizer(args: TranslationDataArguments, corpus: DatasetDict) -> PreTrainedTokenizerFast:
    """Load the named tokenizer, or train one on both sides of the training split.

    Args:
        args (`TranslationDataArguments`): `tokenizer_name`, or `tokenizer_model` and `vocab_size`, and the language
            pairs: for several target languages the tokenizer has, or is given, their tokens.
        corpus (`DatasetDict`): 500,000 pairs, spread evenly over its training split, train the tokenizer.

    Returns:
        `PreTrainedTokenizerFast`: ends every text with its end token, so that `tokenizer(text)` is what a model takes.
        Little text gives fewer than `vocab_size` tokens, so use `len(tokenizer)`.

    Raises:
        ValueError: if the tokenizer cannot be loaded, has no end or padding token or does not add the former, or
            if there is no text to train on or too small a `vocab_size` for its characters.
    """
    languages = languages_to_name(args.pairs)
    if not args.tokenizer_name:
        if len(corpus["train"]) == 0:
            raise ValueError("The training split is empty: a tokenizer needs text. Add text or name --tokenizer_name.")
        texts = partial(_training_texts, corpus["train"])
        return train_translation_tokenizer(texts, args.tokenizer_model, args.vocab_size, languages)
    tokenizer = load_named_tokenizer(args.tokenizer_name)
    _require_end_and_padding(tokenizer)
    # A tokenizer that names target languages at all must be able to name each.
    known = target_languages(tokenizer)
    missing = [str(pair) for pair in args.pairs if known and pair.target not in known]
    if missing:
        logger.warning(
            "Check the order of --language_pairs, source-target: the tokenizer %r names the languages to translate into, %s, "
            "and that of %s is not among them; a token is added for it.",
            args.tokenizer_name,
            ", ".join(known),
            " ".join(missing),
        )
    add_target_language_tokens(
        tokenizer, [pair.target for pair in args.pairs] if target_languages(tokenizer) else languages
    )
    return tokenizer


def _training_texts(split: Dataset) -> Iterator[list[str]]:
    if len(split) > TOKENIZER_PAIRS:
        # Spread evenly, as the rows are sorted by language pair.
        split = split.select(np.linspace(0, len(split) - 1, TOKENIZER_PAIRS).astype(int))
    for batch in split.iter(batch_size=1000):
        yield batch["source"]
        yield batch["target"]


def _require_end_and_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    for kind, token_id in (("end-of-text", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        if token_id is None:
            raise ValueError(
                f"Tokenizer {tokenizer.name_or_path!r} has no {kind} token, which translation needs; set its "
                f"{'eos' if kind == 'end-of-text' else 'pad'}_token and save it, or name another tokenizer with "
                "--tokenizer_name."
            )
    if tokenizer("")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        raise ValueError(
            f"Tokenizer {tokenizer.name_or_path!r} does not put its end-of-text token {tokenizer.eos_token!r} after a "
            "text; name another tokenizer with --tokenizer_name, or leave it out to train one."
        )


def encode_pairs(
    corpus: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int,
    max_target_length: int,
    num_proc: int | None = None,
) -> DatasetDict:
    """Add the token ids of both sides to sentence pairs.

    With a tokenizer that has target-language tokens every source begins with the token of its pair. Text that spells a
    special token is encoded as ordinary text. Training pairs that are too long are left out; in the other splits the
    long side is cut, as a score over a part of a test set would be none. Their number is logged.

    Args:
        corpus (`DatasetDict`): splits with the columns "pair", "source" and "target".
        tokenizer (`PreTrainedTokenizerBase`): ends every text with its end token.
        max_source_length (`int`): tokens per source, its end and language tokens included.
        max_target_length (`int`): tokens per target, its end token included.
        num_proc (`int`, *optional*): processes; default: the main process.

    Returns:
        `DatasetDict`: the same splits and columns with `input_ids` and `labels`, int32 lists that close with the end
        token.

    Raises:
        ValueError: if the tokenizer lacks a token that is needed, a length leaves no room for text, or every training
            pair is too long.
    """
    _require_end_and_padding(tokenizer)
    names_language = _names_language(corpus, tokenizer)
    check_counts({"max_source_length": max_source_length}, at_least=3 if names_language else 2)
    check_counts({"max_target_length": max_target_length}, at_least=2)
    options = {
        "tokenizer": tokenizer,
        "names_language": names_language,
        "max_source_length": max_source_length,
        "max_target_length": max_target_length,
    }
    ids = List(Value("int32"))
    features = Features({**PAIR_FEATURES, "input_ids": ids, "labels": ids, "is_cut": Value("bool")})
    encoded = {}
    for name, split in corpus.items():
        rows = split.map(
            _encode_batch,
            batched=True,
            remove_columns=split.column_names,
            features=features,
            fn_kwargs={**options, "drops_long": name == "train"},
            num_proc=num_proc,
            desc=f"Encoding the {name} split",
        )
        num_long = len(split) - len(rows) if name == "train" else int(np.sum(rows["is_cut"]))
        if num_long:
            limits = f"more than {max_source_length} source or {max_target_length} target tokens"
            if name == "train" and num_long == len(split):
                raise ValueError(
                    f"All {num_long} training pairs have {limits}; raise --max_source_length and --max_target_length, or "
                    "the model's positions."
                )
            verb = "dropped" if name == "train" else "cut"
            logger.warning(
                "%s split: %s %d of %d pairs with %s.", name.capitalize(), verb, num_long, len(split), limits
            )
        encoded[name] = rows.remove_columns("is_cut")
    return DatasetDict(encoded)


def _names_language(corpus: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if sources begin with the token of a target language; the tokenizer must then have each."""
    known = target_languages(tokenizer)
    pairs = dict.fromkeys(pair for split in corpus.values() for pair in split.unique("pair"))
    needed = dict.fromkeys(pair.rpartition("-")[2] for pair in pairs)
    missing = [language for language in needed if language not in known]
    if missing and (known or len(needed) > 1):
        raise ValueError(
            f"The tokenizer has no token {target_language_token(missing[0])!r} for one of the target languages "
            f"{', '.join(needed)}; get it from load_translation_tokenizer with all language pairs."
        )
    return bool(known)


def _encode_batch(
    batch: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    names_language: bool,
    max_source_length: int,
    max_target_length: int,
    drops_long: bool,
) -> dict[str, list]:
    languages = [pair.rpartition("-")[2] if names_language else None for pair in batch["pair"]]
    sources = encode_sources(batch["source"], languages, tokenizer)
    labels = encode_texts(batch["target"], tokenizer)
    is_long = [
        len(source) > max_source_length or len(target) > max_target_length
        for source, target in zip(sources, labels, strict=True)
    ]
    columns = {
        **batch,
        "input_ids": [_cut(ids, max_source_length) for ids in sources],
        "labels": [_cut(ids, max_target_length) for ids in labels],
        "is_cut": is_long,
    }
    if drops_long:
        columns = {name: list(compress(values, map(not_, is_long))) for name, values in columns.items()}
    return columns


def _cut(ids: list[int], length: int) -> list[int]:
    """Cut ids to a length, keeping the end token."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


__all__ = ["encode_pairs", "load_translation_tokenizer"]
