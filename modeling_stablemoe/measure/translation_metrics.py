# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The quality of translations: sacreBLEU and chrF of each language pair, and their means over pairs."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from .report import format_table


_SCORE_HEADINGS = {"pair": "pair", "num_sentences": "sentences", "bleu": "BLEU", "chrf": "chrF"}
# Codes of ISO 639-1, 639-2 and 639-3. sacreBLEU itself chooses by codes of two letters only, without script or region.
_LANGUAGES_OF_TOKENIZER = {
    "zh": ("zh", "zho", "chi", "cmn", "yue", "wuu", "hak", "nan", "gan", "hsn", "lzh"),
    "ja-mecab": ("ja", "jpn"),
    "ko-mecab": ("ko", "kor"),
}
_TOKENIZER_OF_LANGUAGE = {code: name for name, codes in _LANGUAGES_OF_TOKENIZER.items() for code in codes}


def score_translations(hypotheses: Sequence[str], references: Sequence[str], pairs: Sequence[str]) -> dict[str, Any]:
    """Score translations against one reference each, by language pair.

    Both metrics are sacreBLEU's with its defaults: cased BLEU with its own tokenization, and chrF2. The target language
    of a pair decides on the tokenizer: "zh" for Chinese, "ja-mecab" for Japanese, "ko-mecab" for Korean, "13a" for all
    others and for romanised text. Script and region may follow its code: zh, zh_Hans, zh-CN, zho_Hant, ja_XX,
    kor_Hang. In other languages without spaces, such as Thai, "13a" counts whole phrases as words: chrF is more
    reliable there.

    Args:
        hypotheses (sequence of `str`): translations by the model, detokenized.
        references (sequence of `str`): translations by people, detokenized.
        pairs (sequence of `str`): language pair of each sentence, e.g. "de-en".

    Returns:
        `dict`: `pairs`, by pair in sorted order: `bleu` and `chrf`, each in [0, 100], and `num_sentences`;
            `mean_bleu` and `mean_chrf`, in which every pair counts the same, as in table 3 of the paper;
            `bleu_signature` and `chrf_signature`, each signature followed by its pairs if they differ.

    Raises:
        ImportError: if sacrebleu, or what it needs for Japanese or Korean, is not installed.
        ValueError: if there is nothing to score, or the three lengths differ.
    """
    if not len(hypotheses) == len(references) == len(pairs):
        raise ValueError(
            f"hypotheses, references and pairs must be equally many; got {len(hypotheses)}, {len(references)} and "
            f"{len(pairs)}."
        )
    if not len(pairs):
        raise ValueError("There is nothing to score: hypotheses is empty.")
    rows_of_pair: dict[str, list[int]] = {pair: [] for pair in sorted(set(pairs))}
    for row, pair in enumerate(pairs):
        rows_of_pair[pair].append(row)
    scores: dict[str, dict[str, Any]] = {}
    signatures: dict[str, dict[str, str]] = {"bleu": {}, "chrf": {}}
    for pair, rows in rows_of_pair.items():
        scores[pair] = {"num_sentences": len(rows)}
        for name, metric in _metrics(pair).items():
            corpus = ([hypotheses[row] for row in rows], [[references[row] for row in rows]])
            scores[pair][name] = metric.corpus_score(*corpus).score
            signatures[name][pair] = str(metric.get_signature())
    return {
        "pairs": scores,
        **{f"mean_{name}": float(np.mean([score[name] for score in scores.values()])) for name in signatures},
        **{f"{name}_signature": _join_signatures(by_pair) for name, by_pair in signatures.items()},
    }


def _metrics(pair: str) -> dict[str, Any]:
    """Build sacreBLEU's metrics for the target language of a pair."""
    try:
        from sacrebleu import metrics  # training without scores does not need it
    except ImportError as error:
        raise ImportError("BLEU and chrF need sacrebleu: pip install 'modeling_stablemoe[translation]'.") from error
    tokenizer = _tokenizer_for(pair)
    try:
        return {"bleu": metrics.BLEU(tokenize=tokenizer), "chrf": metrics.CHRF()}
    except RuntimeError as error:
        extra = tokenizer.partition("-")[0]
        raise ImportError(
            f"sacrebleu cannot tokenize the target language of {pair!r}: pip install 'sacrebleu[{extra}]'."
        ) from error


def _tokenizer_for(pair: str) -> str:
    """Choose the tokenizer of sacreBLEU for the target language of a pair."""
    source, *rest = pair.lower().split("-")
    # "-" may also separate a language from its region, in source and target: no region has one of these codes.
    for place, tag in enumerate(rest or [source]):
        tokenizer = _TOKENIZER_OF_LANGUAGE.get(tag.partition("_")[0])
        if tokenizer is not None:
            is_romanised = "latn" in re.split("[-_]", "-".join([tag, *rest[place + 1 :]]))
            return "13a" if is_romanised else tokenizer
    return "13a"


def _join_signatures(signature_of_pair: dict[str, str]) -> str:
    """Join the different signatures, each followed by its pairs if there are several."""
    pairs_of_signature: dict[str, list[str]] = {}
    for pair, signature in signature_of_pair.items():
        pairs_of_signature.setdefault(signature, []).append(pair)
    if len(pairs_of_signature) == 1:
        return next(iter(pairs_of_signature))
    return "; ".join(f"{signature} ({', '.join(pairs)})" for signature, pairs in pairs_of_signature.items())


def format_scores(scores: dict[str, Any]) -> str:
    """Format scores of `score_translations` as a Markdown table, a row per pair, with the signatures below it."""
    rows = [{"pair": pair, **score} for pair, score in scores["pairs"].items()]
    if len(rows) > 1:
        rows.append({"pair": "mean", "bleu": scores["mean_bleu"], "chrf": scores["mean_chrf"]})
    signatures = f"BLEU: {scores['bleu_signature']}\nchrF: {scores['chrf_signature']}"
    return f"{format_table(rows, _SCORE_HEADINGS)}\n\n{signatures}"


class TranslationMetrics:
    """The `compute_metrics` of a `Seq2SeqTrainer` that evaluates with `predict_with_generate`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): decodes the predictions; has a padding token.
        references (sequence of `str`): reference of each row of the evaluated data set, in order.
        pairs (sequence of `str`): language pair of each row.

    Attributes:
        last_hypotheses (`list[str]` or `None`): translations of the last evaluation, each on one line.
        last_scores (`dict` or `None`): their scores, by `score_translations`.

    Raises:
        ImportError: if sacrebleu, or what it needs for Japanese or Korean, is not installed.
        ValueError: if there are not as many references as pairs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, references: Sequence[str], pairs: Sequence[str]) -> None:
        if len(references) != len(pairs):
            raise ValueError(f"references and pairs must be equally many; got {len(references)} and {len(pairs)}.")
        for pair in set(pairs):
            _metrics(pair)  # fails now, not after hours of training, if something is not installed
        self._tokenizer = tokenizer
        self._references = list(references)
        self._pairs = list(pairs)
        self.last_hypotheses: list[str] | None = None
        self.last_scores: dict[str, Any] | None = None

    def __call__(self, eval_prediction: EvalPrediction) -> dict[str, float]:
        """Decode and score the predictions.

        Args:
            eval_prediction (`EvalPrediction`): `predictions` are generated token ids, an integer `np.ndarray` of shape
                `(rows, length)`, padded with the padding token or -100.

        Returns:
            `dict[str, float]`: the means `bleu` and `chrf`, and for every pair e.g. `bleu_de-en` and `chrf_de-en`.

        Raises:
            ValueError: if the predictions are not token ids, or not as many as the references.
        """
        predictions = eval_prediction.predictions
        if not isinstance(predictions, np.ndarray) or predictions.ndim != 2 or predictions.dtype.kind != "i":
            raise ValueError("predictions must be generated token ids (rows, length); set predict_with_generate=True.")
        if len(predictions) != len(self._references):
            raise ValueError(
                f"There are {len(predictions)} predictions for {len(self._references)} references; evaluate on the "
                "data set that the references were taken from."
            )
        token_ids = np.where(predictions == -100, self._tokenizer.pad_token_id, predictions)
        texts = self._tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        self.last_hypotheses = [" ".join(text.split()) for text in texts]
        self.last_scores = score_translations(self.last_hypotheses, self._references, self._pairs)
        flat = {name: self.last_scores[f"mean_{name}"] for name in ("bleu", "chrf")}
        for pair, score in self.last_scores["pairs"].items():
            flat |= {f"{name}_{pair}": score[name] for name in ("bleu", "chrf")}
        return flat
