"""Tests of the corpus, the trained tokenizer and the packing."""

import bz2
import csv
import gzip
import itertools
import json
import logging
import lzma
import os
import zipfile

import fsspec
import pyarrow
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast

from helpers.workplaces import write_jsonl
from modeling_stablemoe.data import files
from modeling_stablemoe.data import text as data
from modeling_stablemoe.data.text import DataArguments, collate_blocks, load_corpus, load_tokenizer, pack


DOCUMENTS = [f"Document {i}: the {'quick brown fox ' * (i % 5)}jumps over {i * 37} lazy dogs.\n" for i in range(60)]


@pytest.fixture(scope="module")
def corpus(own_cache):
    return DatasetDict(
        train=Dataset.from_dict({"text": DOCUMENTS[:50]}), validation=Dataset.from_dict({"text": DOCUMENTS[50:]})
    )


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return load_tokenizer(DataArguments(vocab_size=300), corpus)


@pytest.fixture
def hub_folder(tmp_path):
    """Build a local folder that `load_dataset` reads as a data set with two splits."""
    folder = tmp_path / "hub"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"content": text, "year": 1999} for text in [*DOCUMENTS[:50], "  \n"]])
    write_jsonl(folder / "validation.jsonl", [{"content": text, "year": 1999} for text in DOCUMENTS[50:]])
    return folder


READING = {"encoding": "utf-8", "separator": None, "text_column": "text"}


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def files_corpus(*paths, **options):
    return load_corpus(DataArguments(train_files=[str(path) for path in paths], **options))


def all_texts(corpus):
    return sorted(itertools.chain.from_iterable(split["text"] for split in corpus.values()))


def token_stream(texts, tokenizer):
    ids = [[*tokenizer(text, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id] for text in texts]
    return list(itertools.chain.from_iterable(ids))


# --- arguments ---


def test_arguments_parse_from_the_command_line_and_have_help():
    parser = HfArgumentParser(DataArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--train_files", "a.txt", "b.txt", "--document_separator", "", "--block_size", "64"]
    )
    assert (args.train_files, args.document_separator, args.block_size) == (["a.txt", "b.txt"], "", 64)
    assert (args.embedded_corpus, args.validation_files) == ("docs", [])
    parser.format_help()  # a stray % in a help text would raise here
    assert all(field.metadata["help"].endswith(".") for field in DataArguments.__dataclass_fields__.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_share": 0.0}, "validation_share must lie between 0 and 1"),
        ({"vocab_size": 257}, "vocab_size must be at least 258"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"max_train_documents": 0}, "max_train_documents must be at least 1"),
        ({"embedded_corpus": "novels"}, "embedded_corpus must be one of .*'novels'"),
        ({"train_files": ["a.txt"], "document_separator": "a\n"}, "document_separator .* line break"),
        ({"encoding": "utf-9"}, "encoding 'utf-9' is not a text encoding"),
        ({"encoding": "hex"}, "encoding 'hex' is not a text encoding"),
        ({"dataset_name": "x", "train_files": ["a.txt"]}, "either dataset_name or train_files"),
        ({"document_separator": "---"}, "document_separator .* needs train_files"),
        ({"dataset_config_name": "raw"}, "dataset_config_name needs dataset_name"),
        ({"streaming": True}, "streaming needs dataset_name"),
        ({"streaming": True, "dataset_name": "x", "preprocessing_num_workers": 2}, "no effect with streaming"),
    ],
)
def test_arguments_out_of_range_or_in_conflict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**options)


# --- local files ---


@pytest.mark.parametrize(
    ("content", "separator", "documents"),
    [
        ("first line\n\nsecond line\n", None, ["first line\n\nsecond line\n"]),
        ("---\none\n--- not a separator\n---\n  \n---\ntwo", "---", ["one\n--- not a separator\n", "two"]),
        ("one\nmore\n\n\ntwo\n", "", ["one\nmore\n", "two\n"]),
    ],
)
def test_separator_lines_split_documents_and_blank_documents_vanish(tmp_path, content, separator, documents):
    (tmp_path / "a.txt").write_text(content)
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": "held"}])
    corpus = files_corpus(tmp_path / "a.txt", document_separator=separator, validation_files=[str(held)])
    assert corpus["train"]["text"][:] == documents


def test_a_separator_that_never_occurs_and_a_very_long_document_are_reported(tmp_path, caplog, monkeypatch):
    (tmp_path / "a.txt").write_text("a document of more characters")
    (tmp_path / "b.txt").write_text("two\n")
    with caplog.at_level(logging.WARNING, logger=files.__name__):
        files_corpus(tmp_path, document_separator="=====")
        assert "no line is '====='" in caplog.text
        monkeypatch.setattr(files, "_LONG_DOCUMENT", 10)
        files_corpus(tmp_path)
    assert "a.txt holds a document of 29 characters" in caplog.text


def test_rows_without_text_are_left_out_and_counted(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("id,text\n1,one\n2,\n3, \n4,two\n")
    with caplog.at_level(logging.WARNING, logger=files.__name__):
        corpus = files_corpus(tmp_path, validation_share=0.5)
    assert sorted(corpus["train"]["text"][:] + corpus["validation"]["text"][:]) == ["one", "two"]
    assert "2 documents of" in caplog.text
    assert "have no text and are left out" in caplog.text


def test_folders_are_read_recursively_in_sorted_order_with_all_formats_mixed(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.MD").write_text("1")
    write_jsonl(tmp_path / "b" / "a.jsonl", [{"text": "2"}, {"text": "3"}])
    with gzip.open(tmp_path / "b" / "b.txt.gz", "wt") as file:
        file.write("4")
    with lzma.open(tmp_path / "b" / "c.json.xz", "wt") as file:
        file.write('\n{"text": "5"}\n')
    write_jsonl(tmp_path / "z.json", [{"text": "6"}])
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "v.txt").write_text("v")
    corpus = files_corpus(
        tmp_path / "a.MD",
        tmp_path / "b",
        tmp_path / "z.json",
        tmp_path / "a.MD",
        validation_files=[tmp_path / "valid"],
    )
    assert list(corpus["train"]["text"]) == ["1", "2", "3", "4", "5", "6"]
    assert list(corpus["validation"]["text"]) == ["v"]
    assert all_texts(files_corpus(tmp_path)) == ["1", "2", "3", "4", "5", "6", "v"]


def test_tables_and_arrays_give_their_texts_as_they_are_written(tmp_path):
    texts = ["1", "NA", "", 'a "quoted", word', "two\nlines", "2020-01-01", "x" * 200_000]
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    expected = sorted(filter(None, texts))
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])  # ends lines as Windows does
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.json", "a.parquet"):
        assert all_texts(files_corpus(tmp_path / name)) == expected
    # In a TSV quotation marks are text.
    (tmp_path / "a.tsv").write_text('id\ttext\r\n1\t"Yes\r\n2\tNA\r\n3\tsaid "he"\r\n', newline="")
    assert all_texts(files_corpus(tmp_path / "a.tsv")) == ['"Yes', "NA", 'said "he"']


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zip", ".zst"])
def test_compressed_files_give_the_texts_of_plain_ones(tmp_path, suffix):
    packed = tmp_path / f"a.csv{suffix}"
    if suffix == ".zst":
        packed.write_bytes(zstd(b"text\none\n") + zstd(b"two\n"))  # frames may follow one another
    else:
        with fsspec.open(str(packed), "wb", compression=files._COMPRESSIONS[suffix]) as file:
            file.write(b"text\none\ntwo\n")
    if suffix == ".zip":  # what is inside has no suffix here
        packed.unlink()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("a.csv", "text\none\ntwo\n")
    assert all_texts(files_corpus(packed)) == ["one", "two"]


def test_compressed_parquet_is_read_whole(tmp_path):
    Dataset.from_list([{"text": "one"}]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.parquet.zst").write_bytes(zstd((tmp_path / "a.parquet").read_bytes()))
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    for name in ("a.parquet.zst", "b.parquet.gz"):
        assert [row["text"] for row in files.read_files({"paths": [str(tmp_path / name)], **READING})] == ["one"]


def test_archives_are_read_like_folders(tmp_path):
    inside = {
        "b/a.md": b"1",
        "b/c.jsonl.gz": gzip.compress(b'{"text": "2"}\n'),
        "d.pdf": b"%PDF",
        "e.csv": b"text\n3\n",
    }
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in {**inside, "__MACOSX/b/a.md": b"no", ".hidden.md": b"no"}.items():
            archive.writestr(name, content)
    (tmp_path / "f.txt").write_text("4")
    assert all_texts(files_corpus(tmp_path)) == ["1", "2", "3", "4"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("c.md", b"Gr\xfc\xdfe")
    with pytest.raises(ValueError, match=r"a\.zip::c\.md is not utf-8 text"):
        files_corpus(tmp_path)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("c.pdf", b"%PDF")
    with pytest.raises(ValueError, match=r"b\.zip holds no readable file; readable are \.txt"):
        files_corpus(tmp_path / "b.zip")


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_save_to_disk_are_data_sets(tmp_path, streaming):
    splits = DatasetDict(
        train=Dataset.from_dict({"content": DOCUMENTS[:50]}), validation=Dataset.from_dict({"content": DOCUMENTS[50:]})
    )
    splits.save_to_disk(tmp_path / "splits")
    splits["train"].save_to_disk(tmp_path / "one")
    options = {"text_column": "content", "streaming": streaming}
    for name, held_out in (("splits", DOCUMENTS[50:]), ("one", None)):
        corpus = load_corpus(DataArguments(dataset_name=str(tmp_path / name), **options))
        texts = {role: [row["text"] for row in split] for role, split in corpus.items()}
        assert texts["validation"] == held_out or sorted(sum(texts.values(), [])) == sorted(DOCUMENTS[:50])
        with pytest.raises(ValueError, match="was saved by `save_to_disk`: name it with --dataset_name"):
            files_corpus(tmp_path / name)


def test_byte_order_mark_line_ends_and_named_encodings_are_understood(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b.txt").write_bytes(b"plain")
    assert all_texts(files_corpus(tmp_path)) == ["one\ntwo\n", "plain"]
    (tmp_path / "a.txt").write_bytes("Gr\u00fc\u00dfe".encode("latin-1"))
    assert all_texts(files_corpus(tmp_path, encoding="latin-1")) == ["Gr\u00fc\u00dfe", "plain"]


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one\n---\ntwo\n")
    read = []
    original = files._text_documents
    monkeypatch.setattr(files, "_text_documents", lambda *args: read.append(1) or original(*args))
    options = {"document_separator": "---"}
    assert all_texts(files_corpus(path, **options)) == ["one\n", "two\n"]
    files_corpus(path, **options)
    assert len(read) == 1
    stat = path.stat()
    path.write_text("one\n---\nTWO\n")  # same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert all_texts(files_corpus(path, **options)) == ["TWO\n", "one\n"]
    path.write_text("one\n---\nTWO, longer\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # same time of change
    assert all_texts(files_corpus(path, **options)) == ["TWO, longer\n", "one\n"]


def test_missing_paths_and_unreadable_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere\.txt"):
        files_corpus(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"folder .* holds no readable file .*\.jsonl"):
        files_corpus(tmp_path)
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=r"a\.pdf has an unknown suffix; readable are \.txt"):
        files_corpus(tmp_path / "a.pdf")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"Gr\xfc\xdfe", r"a\.txt is not utf-8 text .*--encoding cp1252"),
        ("a.txt", "Gr\xfc\xdfe".encode("utf-16"), r"a\.txt is not utf-8 text .*--encoding utf-16"),
        ("a.csv", b"text\nGr\xfc\xdfe\n", r"a\.csv is not utf-8 text .*--encoding cp1252"),
        ("a.jsonl", b'{"text": "\xfc"}', r"a\.jsonl is not utf-8 text .*--encoding"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON .*one JSON object"),
        ("a.jsonl", b'{"text": "one"}\n["two"]\n', r"a\.jsonl, line 2 holds a list; every line"),
        ("a.json", b'["one"]\n', r"a\.json, item 1 holds a str; every item"),
        ("a.json", b'[{"text": "one"},\n', r"a\.json is not a JSON array .*every line must be one JSON object"),
        (
            "a.jsonl",
            b'{"body": "one", "id": 3}\n',
            r"line 1 has no column 'text'; .*--text_column to one of: body, id",
        ),
        ("a.jsonl", b'{"text": "one"}\n{"text": 3}\n', r"a\.jsonl, line 2: 'text' holds int, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: 'text' holds half of a surrogate pair"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz is not a complete \.gz file"),
        ("a.txt.gz", gzip.compress(b"one" * 99, mtime=0)[:-12], r"a\.txt\.gz is not a complete \.gz file"),
        ("a.txt.xz", b"no xz", r"a\.txt\.xz is not a complete \.xz file"),
        ("a.txt.zst", b"no zst", r"a\.txt\.zst is not a complete \.zst file"),
        ("a.txt.zst", zstd(b"one" * 99)[:-4], r"a\.txt\.zst is not a complete \.zst file"),
        ("a.txt.bz2", b"no bz2", r"a\.txt\.bz2 is not a complete \.bz2 file"),
        ("a.csv.bz2", bz2.compress(b"text\none\n" * 99)[:-20], r"a\.csv\.bz2 is not a complete \.bz2 file"),
        ("a.zip", b"no zip", r"a\.zip is not a complete \.zip file"),
        ("a.csv", b"text,label\none,1\ntwo,2,3\n", r"a\.csv is not a \.csv table .*line 3"),
        ("a.csv", b"text,label\none,1,2\n", r"a\.csv is not a \.csv table .*more columns"),
        ("a.csv", b"id,text\n1\n", r"no text in .*a\.csv"),
        ("a.tsv", b"id\tbody\n1\tone\n", r"a\.tsv, row 1 has no column 'text'; .*--text_column to one of: id, body"),
        ("a.csv", b"id;text\n1;one, two\n", r"table with commas between columns .*semicolons, save it with commas"),
        ("a.csv", b"id,Text\n1,one\n", r"has no column 'text'; set --text_column to one of: Text, id\.$"),
        (
            "a.csv",
            b"1," + b"one " * 99 + b"\n2,two\n",
            r"to one of: 1, one one .* \.\.\.\. The first row is read as the names",
        ),
        ("a.parquet", b"PAR1", r"a\.parquet is not a complete \.parquet file"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "one"}\n' * 99)[:-20], r"a\.jsonl\.xz is not a complete \.xz file"),
        ("a.txt", b"", r"no text in .*a\.txt"),
        ("a.txt", b" \n\n", r"no text in .*a\.txt"),
    ],
)
def test_broken_files_raise_our_message_unwrapped(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        files_corpus(tmp_path)
    assert type(caught.value) is ValueError


def test_a_file_on_both_sides_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match=r"a\.txt is both a training and a validation file"):
        files_corpus(tmp_path, validation_files=[tmp_path / "a.txt"])


# --- held-out documents ---


def test_held_out_documents_are_a_fixed_share_and_equal_documents_stay_together(tmp_path):
    rows = [{"text": f"{i % 90}"} for i in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    first, second = files_corpus(path, validation_share=0.2), files_corpus(path, validation_share=0.2)
    assert all(first[name].to_dict() == second[name].to_dict() for name in ("train", "validation"))
    assert 19 <= len(first["validation"]) <= 22
    assert len(first["train"]) + len(first["validation"]) == 100
    assert not set(first["train"]["text"]) & set(first["validation"]["text"])


def test_the_end_of_a_single_document_is_held_out_and_said(tmp_path, caplog):
    text = " ".join(f"word{number}" for number in range(1000))
    (tmp_path / "a.txt").write_text(text)
    with caplog.at_level(logging.WARNING, logger=data.__name__):
        corpus = files_corpus(tmp_path / "a.txt", validation_share=0.1)
    [begin], [end] = (corpus[name]["text"][:] for name in ("train", "validation"))
    assert begin + end == text
    assert begin.endswith(" ")  # no word is cut
    assert abs(len(end) - 0.1 * len(text)) < 10
    assert f"its last {len(end)} of {len(text)} characters are held out" in caplog.text
    (tmp_path / "a.txt").write_text("no-white-space" * 10)
    assert [len(split["text"][0]) for split in files_corpus(tmp_path / "a.txt").values()] == [133, 7]


def test_a_document_too_short_to_cut_cannot_be_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="5% of the 1 training document.* --validation_files.*--document_separator"):
        files_corpus(tmp_path)


def test_files_for_evaluation_alone_serve_where_nothing_is_trained(tmp_path):
    args = DataArguments(validation_files=[str(write_jsonl(tmp_path / "a.jsonl", [{"text": "a b"}]))])
    assert {name: split["text"][:] for name, split in load_corpus(args, needs_train=False).items()} == {
        "validation": ["a b"]
    }
    with pytest.raises(ValueError, match="validation_files needs train_files.*--do_train false"):
        load_corpus(args)


def test_limits_keep_the_first_documents(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS])
    full = files_corpus(path, validation_share=0.5)
    cut = files_corpus(path, validation_share=0.5, max_train_documents=3, max_validation_documents=1000)
    assert cut["train"]["text"][:] == full["train"]["text"][:3]
    assert len(cut["validation"]) == len(full["validation"]) == 30


def test_what_is_read_and_what_is_held_out_is_said_once(tmp_path, caplog, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": text} for text in DOCUMENTS])
    caplog.set_level(logging.INFO, logger=data.__name__)
    corpus = files_corpus(path, text_column="body", validation_share=0.2)
    blocks = pack(corpus, tokenizer, 8)
    sizes = [f"{name} {8 * len(blocks[name]):,} in {len(blocks[name]):,}" for name in ("train", "validation")]
    assert caplog.messages == [
        "Training text: 48 documents of 1 file (a.jsonl), one per row, column 'body'. Evaluated on: 12 documents of the same, "
        "0.2 of it held out (--validation_share).",
        f"Tokens: {', '.join(sizes)} blocks of 8.",
    ]
    for name in "bcd":
        (tmp_path / f"{name}.txt").write_text(DOCUMENTS[0])
    caplog.clear()
    files_corpus(
        tmp_path,
        text_column="body",
        validation_files=[str(write_jsonl(tmp_path.parent / "v.jsonl", [{"body": "a b"}]))],
    )
    assert caplog.messages == [
        "Training text: 63 documents of 4 files (a.jsonl, b.txt, c.txt, ...), one per row, column 'body' or one per file. "
        "Evaluated on: 1 document of 1 file (v.jsonl), one per row, column 'body'."
    ]


# --- Hub data sets ---


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_splits_are_reduced_to_the_text_column_and_to_the_first_documents(hub_folder, streaming, caplog):
    caplog.set_level(logging.INFO, logger=data.__name__)
    named = {"dataset_name": str(hub_folder), "text_column": "content", "streaming": streaming}
    corpus = load_corpus(DataArguments(**named))
    assert isinstance(corpus, IterableDatasetDict if streaming else DatasetDict)
    assert list(corpus["train"]) == [{"text": text} for text in DOCUMENTS[:50]]
    assert list(corpus["validation"]) == [{"text": text} for text in DOCUMENTS[50:]]
    cut = load_corpus(DataArguments(**named, max_train_documents=2))
    assert [row["text"] for row in cut["train"]] == DOCUMENTS[:2]
    numbers = ["documents"] * 2 if streaming else ["2 documents", "10 documents"]
    assert caplog.messages[-1] == (
        f"Training text: {numbers[0]} of {hub_folder}, split 'train'. Evaluated on: {numbers[1]} of {hub_folder}, split "
        "'validation'."
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_without_validation_split_is_split_by_document(hub_folder, streaming):
    (hub_folder / "validation.jsonl").unlink()
    args = DataArguments(
        dataset_name=str(hub_folder), text_column="content", streaming=streaming, validation_share=0.3
    )
    texts = {name: [row["text"] for row in split] for name, split in load_corpus(args).items()}
    assert sorted(texts["train"] + texts["validation"]) == sorted(DOCUMENTS[:50])
    assert 5 <= len(texts["validation"]) <= 25


@pytest.mark.pairs
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "training"}, "has no split 'training'; set --train_split to one of: train, validation"),
        ({"validation_split": "dev"}, "has no split 'dev'; set --validation_split to one of: train, validation"),
        ({}, "no column 'text'; set --text_column to one of: content, year"),
        ({"text_column": "year"}, "column 'year' holds int values, not strings"),
        ({"dataset_config_name": "raw"}, "configuration 'raw' could not be loaded.*--train_files"),
    ],
)
def test_wrong_hub_names_are_refused_with_the_choices(hub_folder, options, message, streaming):
    with pytest.raises(ValueError, match=message):
        load_corpus(DataArguments(dataset_name=str(hub_folder), streaming=streaming, **options))


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_without_text_or_with_broken_files_is_refused(hub_folder, streaming):
    args = DataArguments(dataset_name=str(hub_folder), text_column="content", streaming=streaming)
    write_jsonl(hub_folder / "train.jsonl", [{"content": text, "year": 1999} for text in (" ", None)])
    with pytest.raises(ValueError, match="split 'train' holds no text in column 'content'"):
        load_corpus(args)
    (hub_folder / "train.jsonl").write_text('{"content": \n')
    with pytest.raises(ValueError, match="could not be (loaded|read)") as caught:
        load_corpus(args)
    assert caught.value.__cause__ is not None


# --- tokenizer ---


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(max_size=60) | st.sampled_from(["a  b .", " lead", "<|endoftext|> x <|pad|>", "\r\n\t\x00 \u2028"])
)
def test_trained_tokenizer_gives_back_any_text(tokenizer, text):
    for split_special_tokens in (False, True):
        ids = tokenizer(text, split_special_tokens=split_special_tokens)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_trained_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path),
        load_tokenizer(DataArguments(tokenizer_name=str(tmp_path)), DatasetDict()),
    ):
        text = " The  quick <|endoftext|> fox , don't .\n\u00e9\U0001f40d"
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id, loaded.pad_token_id) == (0, 0, 0, 1)
        assert len(loaded) == len(tokenizer) == 300


def test_tokenizer_trained_on_a_stream_is_the_same_and_says_when_text_is_short(hub_folder, caplog, tokenizer):
    args = DataArguments(dataset_name=str(hub_folder), text_column="content", streaming=True, vocab_size=300)
    streamed = load_corpus(args)
    assert load_tokenizer(args, streamed).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    args.vocab_size = 4096
    with caplog.at_level(logging.WARNING, logger=data.__name__):
        small = load_tokenizer(args, streamed)
    assert f"of {len(small)} tokens only, in place of 4,096" in caplog.text


def test_tokenizer_needs_text(corpus):
    empty = DatasetDict(train=corpus["train"].select([]), validation=corpus["validation"])
    with pytest.raises(ValueError, match="training split is empty.*--tokenizer_name"):
        load_tokenizer(DataArguments(), empty)


def test_a_named_tokenizer_must_exist_and_have_an_end_token(tokenizer, tmp_path, corpus):
    with pytest.raises(ValueError, match="nowhere' could not be loaded.*--tokenizer_name") as caught:
        load_tokenizer(DataArguments(tokenizer_name=str(tmp_path / "nowhere")), corpus)
    assert caught.value.__cause__ is not None
    without_eos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    without_eos.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-text token.*eos_token"):
        load_tokenizer(DataArguments(tokenizer_name=str(tmp_path)), corpus)
    with pytest.raises(ValueError, match="no end-of-text token.*eos_token"):
        pack(corpus, without_eos, 8)


# --- packing ---


@pytest.mark.parametrize("num_proc", [None, 2])
def test_packed_splits_hold_the_token_stream_in_order(corpus, tokenizer, num_proc):
    blocks = pack(corpus, tokenizer, 16, num_proc=num_proc)
    assert isinstance(blocks, DatasetDict)
    for name, split in blocks.items():
        assert split.column_names == ["input_ids"]
        texts, num_shards = corpus[name]["text"][:], num_proc or 1
        size = len(texts) // num_shards
        expected = []
        for shard in range(num_shards):
            stream = token_stream(texts[shard * size : (shard + 1) * size], tokenizer)
            expected += stream[: len(stream) // 16 * 16]
        assert list(itertools.chain.from_iterable(split["input_ids"])) == expected


def test_streamed_packing_gives_the_same_blocks(corpus, tokenizer):
    streamed = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in corpus.items()})
    blocks, expected = pack(streamed, tokenizer, 16), pack(corpus, tokenizer, 16)
    assert isinstance(blocks, IterableDatasetDict)
    for name, split in blocks.items():
        assert split.column_names == ["input_ids"]
        assert [list(row["input_ids"]) for row in split] == expected[name]["input_ids"][:]
    with pytest.raises(ValueError, match="num_proc applies to map-style corpora only"):
        pack(streamed, tokenizer, 16, num_proc=2)


def test_text_that_spells_the_end_token_is_ordinary_text(corpus, tokenizer):
    text = "one <|endoftext|> two <|pad|> three"
    blocks = pack(DatasetDict(train=Dataset.from_dict({"text": [text]})), tokenizer, 1)
    ids = [row["input_ids"][0] for row in blocks["train"]]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids) == text + "<|endoftext|>"


def test_texts_are_encoded_in_groups_without_a_trace(corpus, tokenizer, monkeypatch):
    texts = corpus["train"]["text"][:]
    whole = data._encode(texts, tokenizer)
    monkeypatch.setattr(data, "_CHARACTERS_PER_CALL", 100)
    assert len(list(data._groups(texts))) > 5
    assert data._encode(texts, tokenizer).tolist() == whole.tolist()


def test_packing_is_cached_across_equal_tokenizers_and_not_across_block_sizes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS])

    def cache_file(block_size):
        args = DataArguments(train_files=[str(path)], vocab_size=300, validation_share=0.2)
        corpus = load_corpus(args)
        return pack(corpus, load_tokenizer(args, corpus), block_size)["train"].cache_files

    first = cache_file(16)
    assert first
    assert cache_file(16) == first
    assert cache_file(8) != first


def test_a_split_shorter_than_a_block_is_refused_with_its_size(corpus, tokenizer):
    num_tokens = len(token_stream(corpus["validation"]["text"], tokenizer))
    with pytest.raises(ValueError, match=f"validation split has only {num_tokens} tokens.*--block_size or more text"):
        pack(corpus, tokenizer, num_tokens + 1)
    assert len(pack(corpus, tokenizer, num_tokens)["validation"]) == 1
    with pytest.raises(ValueError, match="block_size must be at least 1; got 0"):
        pack(corpus, tokenizer, 0)


def test_collated_labels_are_an_independent_copy(corpus, tokenizer):
    blocks = pack(corpus, tokenizer, 16)["train"]
    for features in ([blocks[0], blocks[2]], [blocks.with_format("torch")[i] for i in (0, 2)]):
        batch = collate_blocks(features)
        assert set(batch) == {"input_ids", "labels"}
        assert batch["input_ids"].dtype == torch.long
        assert batch["input_ids"].tolist() == [blocks[0]["input_ids"], blocks[2]["input_ids"]]
        batch["input_ids"][0, 0] = -1
        assert batch["labels"].tolist() == [blocks[0]["input_ids"], blocks[2]["input_ids"]]
