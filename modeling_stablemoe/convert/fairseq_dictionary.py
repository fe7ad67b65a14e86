# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The dictionary of a fairseq model, `dict.txt`, as a tokenizer: same text, same ids.

The dictionary numbers symbols, which are words, or the pieces or numbers that some BPE made of the text beforehand.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .fairseq_options import EOS


SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")


def read_dictionary(path: str | Path) -> list[str]:
    """Read the symbols of a dictionary, in the order of their ids: the special ones, then a line each.

    Raises:
        ValueError: if the file cannot be read, a line is not `symbol count`, or a symbol is there twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = list(file)  # not `splitlines`: a symbol may be one of Unicode's own line ends
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a dictionary ({error}).") from error
    symbols = dict.fromkeys(SPECIAL_SYMBOLS)
    for number, line in enumerate(lines, start=1):
        symbol, _, count = line.rstrip().rpartition(" ")
        if not symbol or not count.isdecimal():
            raise ValueError(
                f"{str(path)!r}, line {number}: {line!r} is not `symbol count`, as in fairseq's dict.txt."
            )
        if symbol in symbols:
            raise ValueError(f"{str(path)!r}, line {number}: {symbol!r} is there twice, so its id is not certain.")
        symbols[symbol] = None
    return list(symbols)


def build_tokenizer(
    symbols: list[str], *, bpe: PreTrainedTokenizerBase | None = None, begins_with: int = EOS, max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """Make a tokenizer that gives text the ids of a dictionary.

    Args:
        symbols (`list[str]`): of `read_dictionary`.
        bpe (`PreTrainedTokenizerBase`, *optional*): the byte-pair encoding that the corpus was encoded with, where the
            symbols are its ids or its pieces: GPT-2's, say. `None`: symbols are words, with spaces between them.
        begins_with (`int`): id that every text begins with: fairseq's </s>, or <s> with `add_bos_token`.
        max_length (`int`): tokens of the longest text.

    Raises:
        ValueError: if the symbols are ids and no `bpe` is given, or do not hold all that it can make.
    """
    if bpe is not None:
        tokenizer = _of_bpe(symbols, bpe)
    elif _are_ids(symbols):
        raise ValueError(
            "The symbols of the dictionary are numbers: ids of a byte-pair encoding, without which they give no tokenizer. "
            "Name it, `--bpe_tokenizer openai-community/gpt2` for GPT-2's, or leave the dictionary out."
        )
    else:
        vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    start = SPECIAL_SYMBOLS[begins_with]
    tokenizer.add_special_tokens(list(SPECIAL_SYMBOLS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, begins_with)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=SPECIAL_SYMBOLS[EOS],
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def _of_bpe(symbols: list[str], bpe: PreTrainedTokenizerBase) -> Tokenizer:
    """Renumber the pieces of a byte-pair encoding."""
    backend = getattr(bpe, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(bpe).__name__}}
    if state["model"]["type"] != "BPE":
        raise ValueError(f"The tokenizer is a {state['model']['type']}, not a byte-pair encoding (`BPE`).")
    number_of = {symbol: number for number, symbol in enumerate(symbols)}
    by_id = _are_ids(symbols)
    added = {token["content"] for token in state["added_tokens"]}
    pieces = {piece: str(number) if by_id else piece for piece, number in state["model"]["vocab"].items()}
    missing = [piece for piece, symbol in pieces.items() if symbol not in number_of and piece not in added]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(pieces)} pieces of the byte-pair encoding are not in the dictionary, {missing[0]!r} "
            "for one: it is not the one that the corpus was encoded with, or the dictionary was cut. Leave the dictionary "
            "out and encode texts with fairseq's own tools."
        )
    vocabulary = {piece: number_of[symbol] for piece, symbol in pieces.items() if symbol in number_of}
    taken = set(vocabulary.values())
    vocabulary |= {symbol: number for symbol, number in number_of.items() if number not in taken}
    state["model"] |= {"vocab": vocabulary, "unk_token": None}
    return Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))


def _are_ids(symbols: list[str]) -> bool:
    """Tell whether the symbols are numbers, but for those that fill a dictionary up to a multiple of 8."""
    of_data = [symbol for symbol in symbols[len(SPECIAL_SYMBOLS) :] if not symbol.startswith("madeupword")]
    return all(symbol.isdecimal() for symbol in of_data)


__all__ = ["SPECIAL_SYMBOLS", "build_tokenizer", "read_dictionary"]
