"""Tests of the translation scores."""

import builtins

import numpy as np
import pytest
import sacrebleu
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import EvalPrediction, PreTrainedTokenizerFast

from modeling_stablemoe.measure.translation_metrics import TranslationMetrics, format_scores, score_translations


# Pairs take turns, so that rows and pairs are told apart.
PAIRS = ["fr-en", "de-en", "fr-en", "de-en", "de-en"]
REFERENCES = [
    "The cat sat on the mat, and it purred.",
    "It is raining cats and dogs today.",
    "He has three brothers and no sister.",
    "Where is the nearest railway station?",
    "The committee adopted the report without a vote.",
]
HYPOTHESES = [
    "The cat sat on a mat, and it purred.",
    "It is raining today.",
    "He has three brothers and a sister.",
    "Where is the next railway station?",
    "The Committee adopted the report with no vote.",
]


@pytest.fixture(scope="module")
def tokenizer():
    words = sorted({word for text in REFERENCES + HYPOTHESES for word in text.split()})
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<unk>", "<pad>", "</s>", *words])}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


@pytest.fixture
def without_sacrebleu(monkeypatch):
    original = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.partition(".")[0] == "sacrebleu":
            raise ImportError("No module named 'sacrebleu'", name="sacrebleu")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)


def texts_of(pair, texts):
    return [text for text, other in zip(texts, PAIRS, strict=True) if other == pair]


def generated(texts, tokenizer) -> np.ndarray:
    """Token ids as the Trainer gathers them: end of text, then padding by the model, then -100."""
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id, -100] for text in texts]
    width = max(len(row) for row in rows)
    return np.array([row + [-100] * (width - len(row)) for row in rows])


# --- scores ---


def test_every_pair_is_scored_as_sacrebleu_scores_it():
    scores = score_translations(HYPOTHESES, REFERENCES, PAIRS)
    assert list(scores["pairs"]) == ["de-en", "fr-en"]
    for pair, score in scores["pairs"].items():
        hypotheses, references = texts_of(pair, HYPOTHESES), texts_of(pair, REFERENCES)
        assert score == {
            "bleu": pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score),
            "chrf": pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score),
            "num_sentences": len(references),
        }
        assert 10 < score["bleu"] < 90
    for name in ("bleu", "chrf"):  # every pair counts the same
        assert scores[f"mean_{name}"] == pytest.approx(sum(score[name] for score in scores["pairs"].values()) / 2)


def test_signatures_name_the_settings():
    scores = score_translations(HYPOTHESES, REFERENCES, PAIRS)
    version = f"version:{sacrebleu.__version__}"
    assert scores["bleu_signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|{version}"
    assert scores["chrf_signature"] == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|{version}"


def test_chinese_is_split_into_characters_and_its_signature_named():
    hypotheses, references = (
        ["我喜欢猫和大狗", "Good day to all of you."],
        ["我喜欢猫和小狗", "Good day to all of you."],
    )
    scores = score_translations(hypotheses, references, ["en-zh", "zh-en"])
    expected = sacrebleu.corpus_bleu(hypotheses[:1], [references[:1]], tokenize="zh").score
    assert scores["pairs"]["en-zh"]["bleu"] == pytest.approx(expected)
    assert expected > 1.5 * sacrebleu.corpus_bleu(hypotheses[:1], [references[:1]]).score
    first, second = scores["bleu_signature"].split("; ")
    assert "|tok:zh|" in first
    assert first.endswith(" (en-zh)")
    assert "|tok:13a|" in second
    assert second.endswith(" (zh-en)")


def test_lists_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="must be equally many; got 1, 5 and 5"):
        score_translations(HYPOTHESES[:1], REFERENCES, PAIRS)
    with pytest.raises(ValueError, match="must be equally many; got 5, 5 and 4"):
        score_translations(HYPOTHESES, REFERENCES, PAIRS[:4])
    with pytest.raises(ValueError, match="nothing to score"):
        score_translations([], [], [])


def test_missing_sacrebleu_names_the_extra(without_sacrebleu, tokenizer):
    with pytest.raises(ImportError, match=r"pip install 'modeling_stablemoe\[translation\]'"):
        score_translations(HYPOTHESES, REFERENCES, PAIRS)
    with pytest.raises(ImportError, match=r"pip install 'modeling_stablemoe\[translation\]'"):
        TranslationMetrics(tokenizer, REFERENCES, PAIRS)  # before training, not after it


CHINESE = ["我今天去学校学习。", "他很喜欢吃苹果和香蕉。"]


@pytest.mark.parametrize("pair", "en-zh en-zh-Hant-TW eng_Latn-zho_Hans en_XX-zh_CN en-cmn en-yue_Hant ja-ZH".split())
def test_chinese_is_told_by_any_of_its_codes(pair):
    hypotheses = ["我今天去学校上课。", "他喜欢吃苹果和香蕉。"]
    scores = score_translations(hypotheses, CHINESE, [pair] * 2)
    assert scores["mean_bleu"] == sacrebleu.corpus_bleu(hypotheses, [CHINESE], tokenize="zh").score > 40
    assert "|tok:zh|" in scores["bleu_signature"]


@pytest.mark.parametrize("pair", "code-summary zh-en zh_Hans-en_XX zh-CN-en en-zh_Latn en-zu x-kok".split())
def test_what_is_not_written_in_chinese_is_split_at_spaces(pair):
    assert "|tok:13a|" in score_translations(["Good day."], ["Good day."], [pair])["bleu_signature"]


@pytest.mark.parametrize(
    ("pair", "extra"), [("en-ja", "ja"), ("en-jpn_Jpan", "ja"), ("en-ko_KR", "ko"), ("ja-ko-KR", "ko")]
)
def test_missing_word_splitter_names_the_extra_of_sacrebleu(pair, extra, tokenizer, monkeypatch):
    monkeypatch.setattr(f"sacrebleu.tokenizers.tokenizer_{extra}_mecab.MeCab", None)
    with pytest.raises(ImportError, match=rf"'{pair}': pip install 'sacrebleu\[{extra}\]'"):
        score_translations(["x"], ["x"], [pair])
    with pytest.raises(ImportError, match=rf"'{pair}': pip install"):
        TranslationMetrics(tokenizer, ["x"], [pair])  # before training, not after it


# --- table ---


def test_table_has_a_row_a_pair_the_means_and_the_signatures():
    scores = {
        "pairs": {
            "de-en": {"bleu": 30.0, "chrf": 51.25, "num_sentences": 3},
            "fr-en": {"bleu": 20.126, "chrf": 50.0, "num_sentences": 12},
        },
        "mean_bleu": 25.063,
        "mean_chrf": 50.625,
        "bleu_signature": "b",
        "chrf_signature": "c",
    }
    assert format_scores(scores).splitlines() == [
        "| pair  | sentences | BLEU  | chrF  |",
        "| ----- | --------- | ----- | ----- |",
        "| de-en | 3         | 30    | 51.25 |",
        "| fr-en | 12        | 20.13 | 50    |",
        "| mean  | -         | 25.06 | 50.62 |",
        "",
        "BLEU: b",
        "chrF: c",
    ]
    del scores["pairs"]["fr-en"]  # one pair needs no mean
    assert [line.split(" | ")[0] for line in format_scores(scores).splitlines()[2:4]] == ["| de-en", ""]


# --- in the Trainer ---


def test_metrics_of_the_trainer_are_the_scores_of_the_decoded_texts(tokenizer):
    metrics = TranslationMetrics(tokenizer, REFERENCES, PAIRS)
    assert metrics.last_scores is metrics.last_hypotheses is None
    flat = metrics(EvalPrediction(predictions=generated(HYPOTHESES, tokenizer), label_ids=None))
    scores = score_translations(HYPOTHESES, REFERENCES, PAIRS)
    assert metrics.last_hypotheses == HYPOTHESES
    assert metrics.last_scores == scores
    assert flat == {
        "bleu": scores["mean_bleu"],
        "chrf": scores["mean_chrf"],
        "bleu_de-en": scores["pairs"]["de-en"]["bleu"],
        "chrf_de-en": scores["pairs"]["de-en"]["chrf"],
        "bleu_fr-en": scores["pairs"]["fr-en"]["bleu"],
        "chrf_fr-en": scores["pairs"]["fr-en"]["chrf"],
    }
    assert {type(value) for value in flat.values()} == {float}


def test_hypotheses_are_written_on_one_line_each(tokenizer):
    predictions = EvalPrediction(predictions=np.array([[2, 5, 2]]), label_ids=None)
    tokenizer_of_lines = type("Lines", (), {"pad_token_id": 1, "batch_decode": lambda *_, **__: [" a\nb  c "]})()
    metrics = TranslationMetrics(tokenizer_of_lines, REFERENCES[:1], PAIRS[:1])
    metrics(predictions)
    assert metrics.last_hypotheses == ["a b c"]


def test_predictions_that_do_not_fit_are_refused(tokenizer):
    metrics = TranslationMetrics(tokenizer, REFERENCES, PAIRS)
    ids = generated(HYPOTHESES, tokenizer)
    with pytest.raises(ValueError, match="4 predictions for 5 references; evaluate on the data set"):
        metrics(EvalPrediction(predictions=ids[:4], label_ids=None))
    for wrong in (np.zeros((5, 7, 99), dtype=int), ids.astype(np.float32), (ids, ids)):
        with pytest.raises(ValueError, match="generated token ids .*predict_with_generate=True"):
            metrics(EvalPrediction(predictions=wrong, label_ids=None))
    with pytest.raises(ValueError, match="references and pairs must be equally many; got 5 and 4"):
        TranslationMetrics(tokenizer, REFERENCES, PAIRS[:4])
