# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""One vocabulary for all languages of a translation model, and the tokens that name the target language.

`tokenizer(text)` of a trained tokenizer is what the model takes: the tokens of the text and the end token. Where there
are several target languages, the source begins with the token of one, such as ">>de<<", as in the OPUS models.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from datasets import are_progress_bars_disabled
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .text import train_bpe, warn_of_small_vocabulary


PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
TOKENIZER_MODELS = ("unigram", "bpe")

_SPACE = "\u2581"
_TARGET_LANGUAGE_TOKEN = re.compile(r">>(\w+)<<")
# Digits of a unigram score that are the same on every run; its sums are not taken in a fixed order.
_SCORE_DIGITS = 4


def target_language_token(language: str) -> str:
    """Return the token that stands before a source to be translated into `language`."""
    return f">>{language}<<"


def target_languages(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the languages that the tokenizer has a token for, in the order of the ids."""
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    matches = [_TARGET_LANGUAGE_TOKEN.fullmatch(token) for token, _ in added]
    return [match[1] for match in matches if match]


def add_target_language(text: str, language: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Put the token of the target language before a source.

    Args:
        text (`str`): the source.
        language (`str`): code of the language to translate into.
        tokenizer (`PreTrainedTokenizerBase`): of the model.

    Returns:
        `str`: what to hand to the tokenizer.

    Raises:
        ValueError: if the tokenizer has no token for the language.
    """
    _require_language(language, target_languages(tokenizer))
    return f"{target_language_token(language)} {text}"


def _require_language(language: str, known: Sequence[str]) -> None:
    if not known:
        raise ValueError(
            f"The tokenizer has no target-language tokens, so its model translates into one language only; leave the "
            f"target language out (got {language!r})."
        )
    if language not in known:
        raise ValueError(f"The target language must be one of {', '.join(known)}; got {language!r}.")


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Turn texts into token ids with the end token, as ordinary text even where they spell a special token."""
    options = {"split_special_tokens": True, "return_attention_mask": False, "verbose": False}
    return tokenizer(list(texts), **options)["input_ids"] if texts else []


def encode_sources(
    texts: Sequence[str], languages: Sequence[str | None], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Turn sources into token ids, each with the token of its target language where the tokenizer has such tokens.

    Args:
        texts (sequence of `str`): sources, without language tokens.
        languages (sequence of `str` or `None`): what each is translated into; `None` where there is no choice.
        tokenizer (`PreTrainedTokenizerBase`): of the model.

    Returns:
        `list[list[int]]`: ids of each source, with the end token.

    Raises:
        ValueError: if the tokenizer has no token for a language, or a language is not named and there is a choice.
    """
    known = target_languages(tokenizer)
    encoded = encode_texts(texts, tokenizer)
    # After what the tokenizer puts before every text.
    place = len(tokenizer("")["input_ids"]) - 1
    for language, ids in zip(languages, encoded, strict=True):
        if language is not None:
            _require_language(language, known)
            ids.insert(place, tokenizer.convert_tokens_to_ids(target_language_token(language)))
        elif known:
            raise ValueError(f"The model translates into {', '.join(known)}: name the target language.")
    return encoded


def add_target_language_tokens(tokenizer: PreTrainedTokenizerBase, languages: Iterable[str]) -> None:
    """Give a loaded tokenizer the target-language tokens that it lacks."""
    tokens = [_language_added_token(language) for language in languages]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)


def _language_added_token(language: str) -> AddedToken:
    # The space between token and source belongs to neither.
    return AddedToken(target_language_token(language), rstrip=True, normalized=False, special=True)


def train_translation_tokenizer(
    texts: Callable[[], Iterable[list[str]]], model: str, vocab_size: int, languages: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a vocabulary, the same whenever it is trained on the same text.

    "unigram" keeps case and spaces, and normalizes to NFC only; characters that the text lacks become "<unk>", and
    U+2581, which stands for the space, decodes to one. "bpe" works on bytes and is reversible for any text.

    Args:
        texts (`Callable`): returns the batches of text, each time it is called.
        model (`str`): "unigram" or "bpe".
        vocab_size (`int`): tokens, at most, special ones included.
        languages (sequence of `str`): get a target-language token each.

    Returns:
        `PreTrainedTokenizerFast`: "<pad>", "</s>" (end) and "<unk>" have the ids 0, 1 and 2, followed by the
        languages. The end token follows every encoded text.

    Raises:
        ValueError: if there is no text, or `vocab_size` leaves no room beyond its characters.
    """
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    special += [_language_added_token(language) for language in languages]
    if model == "unigram":
        backend = _train_unigram(texts, vocab_size, special)
    else:
        backend = train_bpe(texts(), vocab_size, special)
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS_TOKEN}",
        pair=f"$A {EOS_TOKEN} $B {EOS_TOKEN}",
        special_tokens=[(EOS_TOKEN, SPECIAL_TOKENS.index(EOS_TOKEN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        pad_token=PAD_TOKEN,
        extra_special_tokens=special[len(SPECIAL_TOKENS) :],
        clean_up_tokenization_spaces=False,
    )


def _train_unigram(
    texts: Callable[[], Iterable[list[str]]], vocab_size: int, special_tokens: list[AddedToken]
) -> Tokenizer:
    """Train a unigram model whose words carry the space before them."""
    alphabet = {_SPACE}
    for batch in texts():
        alphabet.update(unicodedata.normalize("NFC", "".join(batch).replace(" ", _SPACE)))
    # With room for the characters alone, the trainer goes beyond the size that it is given.
    if vocab_size <= len(alphabet) + len(special_tokens):
        raise ValueError(
            f"vocab_size {vocab_size} is too small for the {len(alphabet)} different characters of the training text and "
            f"{len(special_tokens)} special tokens; raise --vocab_size or set --tokenizer_model bpe."
        )
    backend = Tokenizer(models.Unigram())
    # Prepending regardless of what the text begins with keeps a leading space apart from none.
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend(_SPACE)])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            # Special tokens are also pieces of the model; text that spells one must not become it.
            pre_tokenizers.Split("<", "merged_with_previous"),
        ]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        unk_token=UNK_TOKEN,
        show_progress=not are_progress_bars_disabled(),
    )
    backend.train_from_iterator(texts(), trainer)
    backend.model = _reproducible(backend, len(special_tokens), len(alphabet))
    warn_of_small_vocabulary(backend, vocab_size)
    return backend


def _reproducible(backend: Tokenizer, num_special: int, alphabet_size: int) -> models.Unigram:
    """Rebuild a trained unigram model without what differs from run to run: last digits and the order of ties."""
    vocab = [(piece, score) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]
    special, pieces = vocab[:num_special], vocab[num_special:]
    lowest = min(score for _, score in pieces)
    # Characters that training has pruned come back in random order, in steps of 0.0001 above the lowest score.
    filled_in = lowest + 1e-4 * alphabet_size
    pieces = [
        (piece, round(lowest if len(piece) == 1 and score <= filled_in else score, _SCORE_DIGITS))
        for piece, score in pieces
    ]
    pieces.sort(key=lambda item: (-item[1], item[0]))
    return models.Unigram(special + pieces, unk_id=SPECIAL_TOKENS.index(UNK_TOKEN))
