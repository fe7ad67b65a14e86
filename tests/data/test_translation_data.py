"""Tests of parallel corpora, their tokenizer and the encoding."""

import csv
import gzip
import itertools
import json
import logging
import lzma
from collections import Counter

import pandas
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, HfArgumentParser

from helpers.workplaces import write_jsonl
from modeling_stablemoe.data import parallel_corpus
from modeling_stablemoe.data import text as data
from modeling_stablemoe.data import translation as translation_data
from modeling_stablemoe.data.embedded_pairs import EMBEDDED_PAIR, embedded_pairs
from modeling_stablemoe.data.parallel_corpus import TranslationDataArguments, load_parallel_corpus
from modeling_stablemoe.data.translation import encode_pairs, load_translation_tokenizer
from modeling_stablemoe.data.translation_tokenizer import add_target_language, target_language_token, target_languages


SENTENCES = [
    {
        "de": f"Die {i} Männer, groß und fein, gehen {'sehr ' * (i % 4)}langsam über {i * 7} m² Straße.",
        "en": f"The {i} men, plump and short, walk {'very ' * (i % 4)}slowly across street <{i * 7}/k>.",
        "fr": f"Les {i} hommes traversent {'très ' * (i % 4)}lentement la rue n° {i * 7}!",
    }
    for i in range(60)
]
NO_FIXTURE_CHECK = [HealthCheck.function_scoped_fixture]


def load(*names, train=(), **options):
    """Load language pairs from files, or from what the options name."""
    return load_parallel_corpus(
        TranslationDataArguments(language_pairs=list(names), train_files=[str(path) for path in train], **options)
    )


def rows_of(split):
    return [(row["pair"], row["source"], row["target"]) for row in split]


def expected(pair, sentences):
    source, target = pair.split("-")
    return [(pair, row[source], row[target]) for row in sentences]


def dataset(*pairs, sentences=SENTENCES):
    rows = [row for pair in pairs for row in expected(pair, sentences)]
    return Dataset.from_list([dict(zip(("pair", "source", "target"), row, strict=True)) for row in rows])


def write_text(path, lines, encoding="utf-8"):
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return path


def hub_folder(folder, **splits):
    """Build a local folder that `load_dataset` reads as a data set."""
    folder.mkdir()
    for name, rows in splits.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return str(folder)


def only(*languages, sentences=SENTENCES):
    return [{language: row[language] for language in languages} for row in sentences]


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "train.jsonl", SENTENCES)


@pytest.fixture(scope="module")
def corpus(own_cache):  # noqa: F811
    return DatasetDict(train=dataset("de-en", "en-fr"), test=dataset("de-en", "en-fr", sentences=SENTENCES[:5]))


@pytest.fixture(scope="module")
def one_way(own_cache):  # noqa: F811
    return DatasetDict(train=dataset("de-en"), test=dataset("de-en", sentences=SENTENCES[:5]))


def arguments(*names, **options):
    return TranslationDataArguments(language_pairs=list(names), train_files=["x.jsonl"], **options)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(corpus, request):
    options = {"unigram": 150, "bpe": 320}
    args = arguments("de-en", "en-fr", tokenizer_model=request.param, vocab_size=options[request.param])
    return load_translation_tokenizer(args, corpus)


@pytest.fixture(scope="module")
def unigram(one_way):
    return load_translation_tokenizer(arguments("de-en", vocab_size=100), one_way)


# --- arguments ---


def test_arguments_parse_from_the_command_line_and_have_help():
    parser = HfArgumentParser(TranslationDataArguments)
    line = "--language_pairs de-en zh_Hans-en --train_files a.{lang} b.jsonl --max_source_length 64"
    (args,) = parser.parse_args_into_dataclasses(line.split())
    assert [tuple(pair) for pair in args.pairs] == [("de", "en"), ("zh_Hans", "en")]
    assert (args.train_files, args.max_source_length) == (["a.{lang}", "b.jsonl"], 64)
    parser.format_help()  # a stray % in a help text would raise here
    assert all(field.metadata["help"].endswith(".") for field in args.__dataclass_fields__.values())
    (args,) = parser.parse_args_into_dataclasses([])
    assert [str(pair) for pair in args.pairs] == [EMBEDDED_PAIR]


FILES = {"language_pairs": ["de-en"], "train_files": ["a.jsonl"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**FILES, "language_pairs": ["deen"]}, "language_pairs must be source-target.* got 'deen'"),
        ({**FILES, "language_pairs": ["de-en-fr"]}, "language_pairs must be source-target.* got 'de-en-fr'"),
        ({**FILES, "language_pairs": ["../x-en"]}, "language_pairs must be source-target"),
        ({**FILES, "language_pairs": ["de-de"]}, "'de-de' has the same source and target"),
        ({**FILES, "language_pairs": ["de-en", "fr-en", "de-en"]}, "'de-en' is named twice"),
        ({**FILES, "encoding": "utf-9"}, "encoding 'utf-9' is not a text encoding"),
        ({**FILES, "max_train_pairs": 0}, "max_train_pairs must be at least 1; got 0"),
        ({**FILES, "max_source_length": 1}, "max_source_length must be at least 2; got 1"),
        ({**FILES, "tokenizer_model": "wordpiece"}, "tokenizer_model must be one of .*'wordpiece'"),
        ({**FILES, "vocab_size": 3}, r"vocab_size must be at least 4 \(3 special"),
        ({**FILES, "vocab_size": 258, "tokenizer_model": "bpe"}, "vocab_size must be at least 259 .*for bpe"),
        (
            {**FILES, "language_pairs": ["en-de", "en-fr"], "vocab_size": 260, "tokenizer_model": "bpe"},
            r"vocab_size must be at least 261 \(5 special",
        ),
        ({**FILES, "parallel_datasets": ["x"]}, "either parallel_datasets or train_files"),
        ({"parallel_datasets": ["x"], "test_files": ["x"]}, "either parallel_datasets or train_files"),
        ({"train_files": ["a.jsonl"]}, "need language_pairs, e.g. --language_pairs de-en"),
        ({"language_pairs": ["de-en"]}, "language_pairs de-en needs parallel_datasets or train_files"),
        ({"language_pairs": ["de-en"], "parallel_datasets": ["x", "y", "x"]}, "'x' is named twice"),
    ],
)
def test_arguments_out_of_range_or_in_conflict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TranslationDataArguments(**options)


# --- local files ---


@pytest.mark.parametrize("nested", [False, True])
def test_json_lines_serve_every_pair_in_both_directions_in_the_order_asked(tmp_path, nested):
    rows = [{"id": i, "translation": row} if nested else {"id": i, **row} for i, row in enumerate(SENTENCES)]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    held = write_jsonl(tmp_path / "held.json", rows[:4])
    corpus = load("fr-en", "en-de", "de-fr", train=[path], validation_files=[str(held)])
    assert list(corpus) == ["train", "validation"]
    assert corpus["train"].column_names == ["pair", "source", "target"]
    for name, sentences in (("train", SENTENCES), ("validation", SENTENCES[:4])):
        wanted = itertools.chain.from_iterable(expected(pair, sentences) for pair in ("fr-en", "en-de", "de-fr"))
        assert rows_of(corpus[name]) == list(wanted)


def test_several_files_of_all_formats_are_joined_in_order(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n\n" for row in only("de", "en")[:10]))
    for language in ("de", "en"):
        (tmp_path / language).mkdir()
        lines = [row[language] for row in SENTENCES]
        (tmp_path / language / f"b.{language}.xz").write_bytes(lzma.compress("\n".join(lines[10:20]).encode()))
        write_text(tmp_path / f"c.{language}", lines[20:30])
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "d.jsonl", SENTENCES[30:40])
    test = write_jsonl(tmp_path / "test.jsonl", SENTENCES[50:])
    train = [tmp_path / name for name in ("a.jsonl.gz", "{lang}/b.{lang}.xz", "c.{lang}", "folder", "a.jsonl.gz")]
    corpus = load(
        "de-en",
        train=train,
        validation_files=[str(test)],
        test_files=[str(write_jsonl(tmp_path / "t.json", SENTENCES[40:50]))],
    )
    assert rows_of(corpus["train"]) == expected("de-en", SENTENCES[:40])
    assert rows_of(corpus["validation"]) == expected("de-en", SENTENCES[50:])
    assert rows_of(corpus["test"]) == expected("de-en", SENTENCES[40:50])


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.json"])
def test_tables_and_arrays_serve_pairs(tmp_path, name):
    rows = [{"id": number, **row} for number, row in enumerate(SENTENCES)]
    rows[0]["de"] = '"Ja' if name != "a.tsv" else '"Ja", sagte er'
    table = pandas.DataFrame(rows)
    if name == "a.csv":
        table.to_csv(tmp_path / name, index=False)
    elif name == "a.tsv":
        table.to_csv(tmp_path / name, index=False, sep="\t", quoting=csv.QUOTE_NONE, lineterminator="\r\n")
    elif name == "a.parquet":
        table.to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps(rows, indent=1))
    held = write_jsonl(tmp_path / "held.jsonl", SENTENCES[:1])
    corpus = load("de-en", train=[tmp_path / name], validation_files=[str(held)])
    assert rows_of(corpus["train"]) == expected("de-en", rows)


def test_languages_that_are_not_asked_for_are_not_read(tmp_path):
    for language in ("de", "en"):
        write_text(tmp_path / f"a.{language}", [row[language] for row in SENTENCES])
    (tmp_path / "a.fr").write_bytes(b"\xff\n")
    rows = [{**row, "fr": 3} for row in SENTENCES]
    path = write_jsonl(tmp_path / "b.jsonl", rows)
    corpus = load(
        "de-en",
        train=[tmp_path / "a.{lang}", path],
        validation_files=[str(write_jsonl(tmp_path / "v.json", rows[:1]))],
    )
    assert len(corpus["train"]) == 120


def test_paired_lines_end_at_line_feeds_only_and_are_stripped(tmp_path):
    (tmp_path / "a.de").write_bytes("\ufeffeins \r\n zw\rei\u2028\x0b3\r\ndrei".encode())
    (tmp_path / "a.en").write_bytes("one\ntwo\u00a0\n\tthree\n".encode())
    held = write_jsonl(tmp_path / "v.jsonl", SENTENCES[:1])
    corpus = load("de-en", train=[tmp_path / "a.{lang}"], validation_files=[str(held)])
    assert corpus["train"]["source"][:] == ["eins", "zw\rei\u2028\x0b3", "drei"]
    assert corpus["train"]["target"][:] == ["one", "two", "three"]


def test_named_encodings_are_understood(tmp_path):
    for language in ("de", "en"):
        write_text(tmp_path / f"a.{language}", [row[language] for row in SENTENCES], "latin-1")
    corpus = load("de-en", train=[tmp_path / "a.{lang}"], encoding="latin-1", validation_share=0.5)
    assert sorted(rows_of(corpus["train"]) + rows_of(corpus["validation"])) == sorted(expected("de-en", SENTENCES))
    with pytest.raises(ValueError, match=r"a\.de is not utf-8 text .*--encoding cp1252"):
        load("de-en", train=[tmp_path / "a.{lang}"])
    # Each of the paired files, compressed too.
    (tmp_path / "b.de.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    (tmp_path / "b.en.gz").write_bytes(gzip.compress(b"\xff\n\xff\n"))
    with pytest.raises(ValueError, match=r"b\.en\.gz is not utf-8 text"):
        load("de-en", train=[tmp_path / "b.{lang}.gz"])


@pytest.mark.parametrize("numbers", [(3, 5), (5, 3), (0, 2)])
def test_paired_files_of_different_length_are_named_with_their_counts(tmp_path, numbers):
    write_text(tmp_path / "a.de", ["x"] * numbers[0])
    write_text(tmp_path / "a.en", ["y"] * numbers[1])
    message = rf"same number of lines: \S*a\.de has {numbers[0]}, \S*a\.en has {numbers[1]}\."
    with pytest.raises(ValueError, match=message) as caught:
        load("de-en", train=[tmp_path / "a.{lang}"])
    assert type(caught.value) is ValueError


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"de": "x"}\n', r"a\.jsonl has no language pair of de-en; its languages: de\."),
        ("a.jsonl", '{"de": "x", "en": "y"}\n{"de": "x", "id": "y"}\n', r"line 2 has no key 'en'.* its keys: de, id"),
        ("a.jsonl", '{"de": "x", "en": "y"}\n{"de": 3, "en": "y"}\n', r"line 2: 'de' holds int, not a string"),
        ("a.jsonl", '{"de": \n', "line 1 is not JSON"),
        ("a.jsonl", "\n", r"no text in \S*a\.jsonl"),
        ("a.txt", "x\n", r"a\.txt holds one language; .*\{lang\}"),
    ],
)
def test_broken_files_raise_our_message_unwrapped(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load("de-en", train=[tmp_path / name])
    assert type(caught.value) is ValueError


def test_missing_and_misnamed_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file \S*a\.\{lang\} with \{lang\} as one of: de, en\."):
        load("de-en", train=[tmp_path / "a.{lang}"])
    write_text(tmp_path / "a.en", ["x"])
    with pytest.raises(ValueError, match=r"a\.\{lang\} has no language pair of de-en; its languages: en\."):
        load("de-en", train=[tmp_path / "a.{lang}"])
    with pytest.raises(ValueError, match=r"\{lang\}\.jsonl: JSON and tables hold all languages"):
        load("de-en", train=[tmp_path / "{lang}.jsonl"])
    for language in ("de", "en"):
        (tmp_path / f"b.{language}").touch()
    with pytest.raises(ValueError, match=r"no text in \S*b\.de, \S*b\.en; name other files"):
        load("de-en", train=[tmp_path / "b.{lang}"])


@pytest.mark.parametrize("role", ["train", "test"])
def test_a_pair_that_no_file_has_is_refused_with_the_languages_found(tmp_path, jsonl, role):
    files = {"train": jsonl, role: write_jsonl(tmp_path / "german.jsonl", only("de", "en"))}
    options = {f"{name}_files": [str(path)] for name, path in files.items()}
    message = rf"no {role} corpus with both languages of fr-en; the languages found are de, en\. Check"
    with pytest.raises(ValueError, match=message):
        load_parallel_corpus(TranslationDataArguments(language_pairs=["de-en", "fr-en"], **options))


def test_a_file_on_two_sides_is_refused(jsonl):
    with pytest.raises(ValueError, match=r"train\.jsonl is both a train and a test file"):
        load("de-en", train=[jsonl], test_files=[str(jsonl)])


# --- empty sides, held-out pairs, limits ---


def test_pairs_with_an_empty_side_are_dropped_and_counted_each_time(tmp_path, caplog):
    rows = [
        *SENTENCES,
        {"de": " \u3000", "en": "x", "fr": "y"},
        {"de": "x", "en": "", "fr": "y"},
        {"de": "x", "en": None, "fr": ""},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    test = write_jsonl(tmp_path / "t.jsonl", rows[55:])
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="modeling_stablemoe.data"):
            corpus = load("de-en", "de-fr", train=[path], test_files=[str(test)], validation_share=0.3)
        assert [record.getMessage() for record in caplog.records] == [
            "Train corpus, de-en: dropped 3 of 63 sentence pairs with an empty side.",
            "Train corpus, de-fr: dropped 2 of 63 sentence pairs with an empty side.",
            "Test corpus, de-en: dropped 3 of 8 sentence pairs with an empty side.",
            "Test corpus, de-fr: dropped 2 of 8 sentence pairs with an empty side.",
        ]
    assert Counter(corpus["test"]["pair"]) == {"de-en": 5, "de-fr": 6}
    assert len(corpus["train"]) + len(corpus["validation"]) == 60 + 61


def test_a_corpus_without_any_full_pair_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"de": "x", "en": " ", "fr": "y"}] * 4)
    with pytest.raises(ValueError, match="train corpus of de-en holds no text: all its 4 sentence pairs"):
        load("fr-de", "de-en", train=[path])


def test_equal_sources_are_held_out_together_across_pairs(tmp_path):
    rows = [{"en": f"source {i % 80}", "de": f"Ziel {i}", "fr": f"but {i}"} for i in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    corpora = [load("en-de", "en-fr", train=[path], validation_share=0.2) for _ in range(2)]
    assert corpora[0]["validation"].to_dict() == corpora[1]["validation"].to_dict()
    held, kept = ({row[1] for row in rows_of(corpora[0][name])} for name in ("validation", "train"))
    assert not held & kept
    counts = Counter(corpora[0]["validation"]["pair"])
    assert counts["en-de"] == counts["en-fr"] == pytest.approx(40, abs=3)
    assert len(corpora[0]["train"]) + len(corpora[0]["validation"]) == 400


def test_too_few_pairs_to_hold_out_are_refused_with_their_number(tmp_path):
    single = write_jsonl(tmp_path / "a.jsonl", SENTENCES[:1])
    with pytest.raises(ValueError, match="5% of the 1 training pair.* of de-en .*--validation_files"):
        load("de-en", train=[single])
    many = write_jsonl(tmp_path / "b.jsonl", only("en", "fr"))
    with pytest.raises(ValueError, match=r"of the 1 training pair.* of de-en .*none or all"):
        load("en-fr", "de-en", train=[single, many])


def test_limits_keep_the_first_pairs_of_each_language_pair(tmp_path, jsonl):
    options = {"validation_share": 0.5, "test_files": [str(write_jsonl(tmp_path / "t.jsonl", SENTENCES[:6]))]}
    full = load("de-en", "fr-en", train=[jsonl], **options)
    cut = load(
        "de-en", "fr-en", train=[jsonl], max_train_pairs=3, max_validation_pairs=999, max_test_pairs=2, **options
    )
    for name, limit in (("train", 3), ("validation", 999), ("test", 2)):
        wanted = [[row for row in rows_of(full[name]) if row[0] == pair][:limit] for pair in ("de-en", "fr-en")]
        assert rows_of(cut[name]) == wanted[0] + wanted[1]


# --- Hub data sets ---


@pytest.mark.parametrize("form", ["columns", "translation"])
def test_data_sets_of_both_forms_serve_the_pairs_they_can(tmp_path, form):
    def rows(*languages, start, end):
        chosen = only(*languages)[start:end]
        return [{"year": 1999, "translation": row} for row in chosen] if form == "translation" else chosen

    one = hub_folder(
        tmp_path / "one", **{name: rows("de", "en", start=0, end=30) for name in ("train", "validation", "test")}
    )
    two = hub_folder(tmp_path / "two", train=rows("fr", "en", "de", start=30, end=60))
    corpus = load("en-de", "fr-en", parallel_datasets=[one, two], validation_share=0.5)
    assert rows_of(corpus["train"])[:60] == expected("en-de", SENTENCES)
    french = rows_of(corpus["train"])[60:] + rows_of(corpus["validation"])[30:]
    assert sorted(french) == sorted(expected("fr-en", SENTENCES[30:]))
    assert rows_of(corpus["validation"])[:30] == expected("en-de", SENTENCES[:30])
    assert rows_of(corpus["test"]) == expected("en-de", SENTENCES[:30])


def test_pairs_without_a_test_part_are_reported(tmp_path, caplog):
    one = hub_folder(tmp_path / "a:colon", train=only("de", "en"), test=only("de", "en"))
    two = hub_folder(tmp_path / "two", train=only("fr", "en"))
    with caplog.at_level(logging.WARNING, logger="modeling_stablemoe.data"):
        load("de-en", "fr-en", parallel_datasets=[one, two])
        assert "no test corpus for fr-en;" in caplog.text
        caplog.clear()
        assert "test" not in load("fr-en", parallel_datasets=[two])
    assert not caplog.records


def test_named_splits_and_configurations_reach_the_data_set(tmp_path, monkeypatch):
    seen = []
    rows = Dataset.from_list(only("ro", "en", sentences=[{"ro": f"r{i}", "en": f"e{i}"} for i in range(9)]))

    def fake(name, configuration, streaming):
        seen.append((name, configuration, streaming))
        return DatasetDict({"a": rows, "b": rows.select(range(2)), "c": rows.select(range(3))})

    monkeypatch.setattr(data, "load_dataset", fake)
    splits = {"train_split": "a", "validation_split": "b", "test_split": "c"}
    corpus = load("ro-en", parallel_datasets=["wmt/wmt16:ro-en", "org/plain"], **splits)
    assert seen == [("wmt/wmt16", "ro-en", False), ("org/plain", None, False)]
    assert {name: len(split) for name, split in corpus.items()} == {"train": 18, "validation": 4, "test": 6}


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (
            ["de-en", "cs-en"],
            {},
            "no train corpus with both languages of cs-en; the languages found are de, en, genre",
        ),
        (["cs-en"], {}, r"split 'train' has no language pair of cs-en; its text columns: .*\(all columns: .*year"),
        (["de-en"], {"train_split": "t"}, "has no split 't'; set --train_split to one of: train, test"),
        (["de-en"], {"test_split": "newstest"}, "has no split 'newstest'; set --test_split to one of: train, test"),
    ],
)
def test_wrong_hub_names_are_refused_with_the_choices(tmp_path, names, options, message):
    rows = [{**row, "year": 1999, "genre": "x"} for row in only("de", "en")]
    folder = hub_folder(tmp_path / "hub", train=rows, test=rows)
    with pytest.raises(ValueError, match=message):
        load(*names, parallel_datasets=[folder], **options)


def test_a_failed_hub_load_names_the_data_set():
    message = "Data set 'org/none', configuration 'ro-en' could not be loaded.*--train_files"
    with pytest.raises(ValueError, match=message):
        load("ro-en", parallel_datasets=["org/none:ro-en"])


def test_what_is_read_and_held_out_is_said_with_the_first_pair(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="modeling_stablemoe.data")
    path, test = (write_jsonl(tmp_path / f"{name}.jsonl", SENTENCES) for name in ("all", "test"))
    load("fr-en", train=[path], test_files=[str(test)], validation_share=0.2)
    assert caplog.messages == [
        "Sentence pairs: 48 to train on, of all.jsonl; 12 to evaluate on, of the training pairs, 0.2 of them held out "
        "(--validation_share); 60 to score at the end, of test.jsonl.",
        "fr-en, the first pair: 'Les 0 hommes traversent lentement la rue n° 0!' -> 'The 0 men, plump and short, walk slowly across...'",
    ]


def test_files_for_evaluation_alone_serve_where_nothing_is_trained(tmp_path):
    test = write_jsonl(tmp_path / "test.jsonl", SENTENCES)
    args = TranslationDataArguments(language_pairs=["de-en"], test_files=[str(test)])
    assert {name: len(split) for name, split in load_parallel_corpus(args, needs_train=False).items()} == {"test": 60}
    with pytest.raises(ValueError, match="test_files needs train_files.*--do_train false"):
        load_parallel_corpus(args)


@pytest.mark.parametrize("swapped", ["train", "test", None])
def test_a_split_with_source_and_target_exchanged_is_noticed(tmp_path, caplog, swapped):
    turned = [{"de": row["en"], "en": row["de"]} for row in SENTENCES]
    rows = {name: turned if name == swapped else SENTENCES for name in ("train", "validation", "test")}
    files = {f"{name}_files": [str(write_jsonl(tmp_path / f"{name}.jsonl", rows[name]))] for name in rows}
    load_parallel_corpus(TranslationDataArguments(language_pairs=["de-en"], **files))
    said = [message for message in caplog.messages if message.startswith("Exchange source and target")]
    wanted = {"train": ["validation", "test"], "test": ["test"], None: []}[swapped]
    assert [f" of the {name} pairs of de-en:" in message for name, message in zip(wanted, said, strict=True)] == (
        [True] * len(wanted)
    )


# --- embedded corpus ---


def test_embedded_corpus_is_the_default_with_its_own_split(monkeypatch):
    pairs = list(itertools.islice(embedded_pairs(), 40))
    pairs = [pair._replace(split=("train", "validation", "test")[i % 3]) for i, pair in enumerate(pairs)]
    monkeypatch.setattr(parallel_corpus, "embedded_pairs", lambda: iter(pairs))
    for args in (TranslationDataArguments(), TranslationDataArguments(language_pairs=[EMBEDDED_PAIR])):
        corpus = load_parallel_corpus(args)
        for name, split in corpus.items():
            assert rows_of(split) == [
                (EMBEDDED_PAIR, p.source.strip(), p.target.strip()) for p in pairs if p.split == name
            ]
    assert list(corpus) == ["train", "validation", "test"]


# --- tokenizer ---


ALPHABET = sorted(set("".join(itertools.chain.from_iterable(row.values() for row in SENTENCES))))
PIECES = ["</s>", "<pad>", "<unk>", ">>en<<", ">>fr<<", "  ", "Männer", " ,", "street 7."]


@settings(max_examples=60, deadline=None, suppress_health_check=NO_FIXTURE_CHECK)
@given(text=st.text(ALPHABET, max_size=40) | st.lists(st.sampled_from(ALPHABET + PIECES), max_size=12).map("".join))
def test_trained_tokenizers_give_back_text_of_their_alphabet(tokenizer, text):
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert not set(ids[:-1]) & set(range(5))
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.pairs
@pytest.mark.parametrize("model", ["unigram", "bpe"])
@pytest.mark.parametrize("special", ["</s>", "<unk>", ">>fr<<"])
def test_text_that_spells_a_special_token_is_ordinary_text(special, model):
    sentences = [
        {"en": f"{special} x{i}{special}", "de": f"y {i} {special}{special}", "fr": special} for i in range(30)
    ]
    corpus = DatasetDict(train=dataset("en-de", "en-fr", sentences=sentences))
    args = arguments("en-de", "en-fr", tokenizer_model=model, vocab_size=40 if model == "unigram" else 300)
    tokenizer = load_translation_tokenizer(args, corpus)
    encoded = encode_pairs(corpus, tokenizer, 64, 64)["train"]
    for row in encoded.select([0, 7, 30]):
        prefix = tokenizer.convert_tokens_to_ids(target_language_token(row["pair"].partition("-")[2]))
        assert [i for i in row["input_ids"] if i < 5] == [prefix, tokenizer.eos_token_id]
        assert [i for i in row["labels"] if i < 5] == [tokenizer.eos_token_id]
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == row["source"]
        assert tokenizer.decode(row["labels"], skip_special_tokens=True) == row["target"]


def test_special_tokens_have_fixed_ids_and_name_the_target_languages(tokenizer, unigram):
    names = ["<pad>", "</s>", "<unk>", ">>en<<", ">>fr<<"]
    assert tokenizer.convert_ids_to_tokens(range(5)) == names
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert (tokenizer.bos_token, target_languages(tokenizer)) == (None, ["en", "fr"])
    assert set(tokenizer.all_special_tokens) == set(names)
    assert target_languages(unigram) == []
    assert unigram.convert_ids_to_tokens(range(3)) == names[:3]


def test_unigram_keeps_case_and_normalizes_to_composed_characters(unigram):
    assert unigram("Ma\u0308nner")["input_ids"] == unigram("M\u00e4nner")["input_ids"]
    assert unigram("DIE")["input_ids"] != unigram("Die")["input_ids"]
    word = unigram("men")["input_ids"][:-1]
    assert unigram("men men men")["input_ids"][:-1] == word * 3  # the same at the start and inside
    assert unigram("Ж")["input_ids"][-2:] == [unigram.unk_token_id, unigram.eos_token_id]


def test_trained_tokenizer_survives_saving(tokenizer, tmp_path, corpus):
    tokenizer.save_pretrained(tmp_path)
    args = arguments("de-en", "en-fr", tokenizer_name=str(tmp_path))
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_translation_tokenizer(args, corpus)):
        for text in ("  Die 3 Männer ,", ">>fr<< The men", "The </s> men"):
            assert loaded(text) == tokenizer(text)
        assert loaded("The men").keys() == {"input_ids", "attention_mask"}
        assert target_languages(loaded) == ["en", "fr"]
        assert len(loaded) == len(tokenizer)
        assert loaded.decode(loaded(">>fr<< The men")["input_ids"], skip_special_tokens=True) == "The men"


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_training_is_deterministic(corpus, model):
    args = arguments("de-en", "en-fr", tokenizer_model=model, vocab_size={"unigram": 110, "bpe": 320}[model])
    trained = [load_translation_tokenizer(args, corpus).backend_tokenizer.to_str() for _ in range(2)]
    assert len(set(trained)) == 1


def test_a_vocabulary_below_the_alphabet_is_refused_and_a_poor_text_reported(corpus, one_way, caplog):
    characters = set("".join(one_way["train"]["source"][:] + one_way["train"]["target"][:])) - {" "} | {"\u2581"}
    fits = len(characters) + 4
    with pytest.raises(
        ValueError, match=rf"vocab_size {fits - 1} is too small for the {len(characters)} different .*bpe"
    ):
        load_translation_tokenizer(arguments("de-en", vocab_size=fits - 1), one_way)
    assert len(load_translation_tokenizer(arguments("de-en", vocab_size=fits), one_way)) == fits
    for model in ("unigram", "bpe"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger=data.__name__):
            small = load_translation_tokenizer(arguments("de-en", tokenizer_model=model), one_way)
        assert [r.getMessage() for r in caplog.records] == [
            f"The text has words for a vocabulary of {len(small):,} tokens only, in place of 8,000: that is the size of this one."
        ]


def test_tokenizer_needs_text_and_sees_every_language_pair_of_a_large_corpus(corpus, monkeypatch):
    with pytest.raises(ValueError, match="training split is empty.*--tokenizer_name"):
        load_translation_tokenizer(arguments("de-en"), DatasetDict(train=corpus["train"].select([])))
    monkeypatch.setattr(translation_data, "TOKENIZER_PAIRS", 30)
    args = arguments("de-en", "en-fr", vocab_size=150)
    vocab = load_translation_tokenizer(args, corpus).get_vocab()
    assert {"ß", "°"} <= vocab.keys()  # German comes first, French last
    texts = list(itertools.chain.from_iterable(translation_data._training_texts(corpus["train"])))
    assert len(texts) == 60


def test_named_tokenizers_get_the_target_languages_they_lack(unigram, tokenizer, tmp_path, corpus):
    unigram.save_pretrained(tmp_path / "none")
    named = {"tokenizer_name": str(tmp_path / "none")}
    assert target_languages(load_translation_tokenizer(arguments("en-cs", **named), corpus)) == []
    grown = load_translation_tokenizer(arguments("de-en", "en-fr", "de-fr", **named), corpus)
    assert (target_languages(grown), len(grown)) == (["en", "fr"], len(unigram) + 2)
    tokenizer.save_pretrained(tmp_path / "two")
    named = {"tokenizer_name": str(tmp_path / "two")}
    grown = load_translation_tokenizer(arguments("en-cs", **named), corpus)
    assert target_languages(grown) == ["en", "fr", "cs"]
    grown.save_pretrained(tmp_path / "three")
    again = AutoTokenizer.from_pretrained(tmp_path / "three")
    assert target_languages(again) == ["en", "fr", "cs"]
    assert {">>en<<", ">>fr<<", ">>cs<<"} <= set(again.all_special_tokens)
    ids = again(">>cs<< The men")["input_ids"]
    assert ids == [len(tokenizer), *tokenizer("The men")["input_ids"]]
    assert again.decode(ids, skip_special_tokens=True) == "The men"


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("eos_token", "has no end-of-text token.*set its eos_token"),
        ("pad_token", "has no padding token.*set its pad_token"),
        ("post_processor", "does not put its end-of-text token '</s>' after a text"),
    ],
)
def test_named_tokenizers_must_end_texts_and_pad(one_way, unigram, tmp_path, attribute, message):
    unigram.save_pretrained(tmp_path)
    crippled = AutoTokenizer.from_pretrained(tmp_path)
    if attribute == "post_processor":
        crippled.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    else:
        setattr(crippled, attribute, None)
    crippled.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_translation_tokenizer(arguments("de-en", tokenizer_name=str(tmp_path)), one_way)
    with pytest.raises(ValueError, match=message):
        encode_pairs(one_way, crippled, 64, 64)


def test_target_languages_are_put_before_a_text_and_unknown_ones_refused(tokenizer, unigram):
    text = add_target_language("The men", "fr", tokenizer)
    assert text == ">>fr<< The men"
    assert tokenizer(text)["input_ids"] == [4, *tokenizer("The men")["input_ids"]]
    with pytest.raises(ValueError, match="target language must be one of en, fr; got 'de'"):
        add_target_language("The men", "de", tokenizer)
    with pytest.raises(ValueError, match="no target-language tokens.*got 'de'"):
        add_target_language("The men", "de", unigram)


# --- encoding ---


@pytest.mark.pairs
@pytest.mark.parametrize("num_proc", [None, 2])
def test_encoded_pairs_are_what_the_tokenizer_makes_of_each_text(corpus, tokenizer, num_proc):
    encoded = encode_pairs(corpus, tokenizer, 512, 512, num_proc=num_proc)
    assert list(encoded) == ["train", "test"]
    for name, split in encoded.items():
        assert split.column_names == ["pair", "source", "target", "input_ids", "labels"]
        assert split.features["input_ids"].feature.dtype == split.features["labels"].feature.dtype == "int32"
        assert rows_of(split) == rows_of(corpus[name])
        for row in split.select([0, len(split) - 1]):
            text = add_target_language(row["source"], row["pair"].partition("-")[2], tokenizer)
            assert row["input_ids"] == tokenizer(text)["input_ids"]
            assert row["labels"] == tokenizer(row["target"])["input_ids"]


def test_a_single_target_language_is_not_named(one_way, unigram):
    row = encode_pairs(one_way, unigram, 512, 512)["train"][3]
    assert row["input_ids"] == unigram(row["source"])["input_ids"]


def test_the_language_token_follows_what_the_tokenizer_puts_first(corpus, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with_start = AutoTokenizer.from_pretrained(tmp_path)
    with_start.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A </s>", special_tokens=[("</s>", 1), ("<unk>", 2)]
    )
    row = encode_pairs(corpus, with_start, 512, 512)["test"][9]
    assert row["input_ids"] == with_start(f">>fr<< {row['source']}")["input_ids"]
    assert row["input_ids"][:2] == [2, 4]


@settings(max_examples=8, deadline=None, suppress_health_check=NO_FIXTURE_CHECK)
@given(max_source_length=st.integers(3, 45), max_target_length=st.integers(2, 45))
def test_long_training_pairs_are_dropped_long_test_pairs_cut_and_both_counted(
    corpus, tokenizer, caplog, max_source_length, max_target_length
):
    full = encode_pairs(corpus, tokenizer, 512, 512)

    def is_long(row):
        return len(row["input_ids"]) > max_source_length or len(row["labels"]) > max_target_length

    kept = [row for row in full["train"] if not is_long(row)]
    caplog.clear()
    if not kept:
        with pytest.raises(ValueError, match="All 120 training pairs have more than .* raise --max_source_length"):
            encode_pairs(corpus, tokenizer, max_source_length, max_target_length)
        return
    with caplog.at_level(logging.WARNING, logger="modeling_stablemoe.data"):
        cut = encode_pairs(corpus, tokenizer, max_source_length, max_target_length)
    assert list(cut["train"]) == kept
    assert rows_of(cut["test"]) == rows_of(corpus["test"])
    for before, after in zip(full["test"], cut["test"], strict=True):
        for column, length in (("input_ids", max_source_length), ("labels", max_target_length)):
            ids = before[column]
            assert after[column] == (ids if len(ids) <= length else [*ids[: length - 1], 1])
    num_dropped, num_cut = 120 - len(kept), sum(map(is_long, full["test"]))
    assert caplog.text.count(f"Train split: dropped {num_dropped} of 120 pairs with more than") == (num_dropped > 0)
    assert caplog.text.count(f"Test split: cut {num_cut} of 10 pairs with more than") == (num_cut > 0)


def test_encoding_without_the_tokens_or_the_room_it_needs_is_refused(corpus, one_way, tokenizer, unigram):
    with pytest.raises(
        ValueError, match=r"no token '>>en<<' for one of the target languages en, fr; .*load_translation"
    ):
        encode_pairs(corpus, unigram, 64, 64)
    with pytest.raises(ValueError, match="no token '>>de<<' for one of the target languages de"):
        encode_pairs(DatasetDict(train=dataset("en-de")), tokenizer, 64, 64)
    with pytest.raises(ValueError, match="max_source_length must be at least 3; got 2"):
        encode_pairs(corpus, tokenizer, 2, 64)
    with pytest.raises(ValueError, match="max_source_length must be at least 2; got 1"):
        encode_pairs(one_way, unigram, 1, 64)
    with pytest.raises(ValueError, match="max_target_length must be at least 2; got 1"):
        encode_pairs(one_way, unigram, 64, 1)


def test_encoding_is_cached_across_equal_tokenizers(jsonl):
    def cache_file(length):
        corpus = load("de-en", train=[jsonl], validation_share=0.2)
        args = arguments("de-en", tokenizer_model="bpe", vocab_size=300)
        return encode_pairs(corpus, load_translation_tokenizer(args, corpus), length, 99)["train"].cache_files

    first = cache_file(98)
    assert first
    assert cache_file(98) == first
    assert cache_file(97) != first
