"""What scripts/translate.py, and whatever else reads sentences a line each, takes for a line."""

import gzip
import io
import os
import sys

import pytest

from helpers.models import tiny_seq2seq_model
from helpers.workplaces import load_script
from modeling_stablemoe.data.files import STANDARD_INPUT, read_lines
from modeling_stablemoe.data.parallel_corpus import read_paired_text
from modeling_stablemoe.data.translation_tokenizer import train_translation_tokenizer
from modeling_stablemoe.runs.routed_input import TextArguments, read_documents, read_pairs


# Everything that `str.splitlines` and universal newlines take for the end of a line, but "\n".
INSIDE = ["\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
SOURCES = [f"the cat{inside}sat" for inside in INSIDE] + ["", "a dog", "the park"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_translation_tokenizer(lambda: iter([["the cat sat", "a dog", "the park"] * 9]), "bpe", 300)
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    tiny_seq2seq_model(vocab_size=len(tokenizer), **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def translate(checkpoint, monkeypatch, capsys, *options: str, stdin: bytes | None = None) -> list[str]:
    """Translate files, or the standard input; the lines that are printed."""
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii"))
    load_script("translate").main([str(checkpoint), "--max_length", "6", *options])
    lines = capsys.readouterr().out.split("\n")
    assert lines.pop() == ""
    return lines


def test_only_a_newline_ends_a_source(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_bytes("\n".join(SOURCES).encode() + b"\n")
    whole = translate(checkpoint, monkeypatch, capsys, "--input", str(tmp_path / "in.txt"))
    alone = [translate(checkpoint, monkeypatch, capsys, stdin=source.encode() + b"\n")[0] for source in SOURCES[-2:]]
    assert len(whole) == len(SOURCES)
    assert whole[-3] == ""
    assert whole[-2:] == alone
    assert alone[0] != alone[1]


def test_what_an_editor_or_a_system_puts_around_the_text_is_not_translated(checkpoint, tmp_path, monkeypatch, capsys):
    plain = translate(checkpoint, monkeypatch, capsys, stdin=b"the cat\na dog\n")
    marked = b"\xef\xbb\xbfthe cat\r\na dog"
    (tmp_path / "in.txt").write_bytes(marked)
    (tmp_path / "in.txt.gz").write_bytes(gzip.compress(marked))
    assert translate(checkpoint, monkeypatch, capsys, stdin=marked) == plain
    for name in ("in.txt", "in.txt.gz"):
        assert translate(checkpoint, monkeypatch, capsys, "--input", str(tmp_path / name)) == plain


def test_text_of_another_encoding_is_read_as_that(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_bytes("Düne\n".encode("latin-1"))
    options = ["--input", str(tmp_path / "in.txt")]
    expected = translate(checkpoint, monkeypatch, capsys, stdin="Düne\n".encode())
    assert translate(checkpoint, monkeypatch, capsys, *options, "--encoding", "latin-1") == expected
    with pytest.raises(SystemExit, match=r"error: .*in\.txt is not utf-8 text .*--encoding cp1252"):
        translate(checkpoint, monkeypatch, capsys, *options)
    with pytest.raises(SystemExit, match="2"):
        translate(checkpoint, monkeypatch, capsys, *options, "--encoding", "latin-0815")
    assert "is not a text encoding known to Python" in capsys.readouterr().err


@pytest.mark.parametrize("origin", ["files", "standard input", "command line"])
def test_pairs_and_texts_have_the_same_lines_wherever_they_come_from(origin, tmp_path, monkeypatch):
    text = "\n".join(SOURCES)
    file = tmp_path / "sources"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    if origin == "files":
        arguments = TextArguments(text_files=[str(file)], target_files=[str(file)])
    elif origin == "command line":
        arguments = TextArguments(text=text)
    else:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="ascii"))
        arguments = TextArguments()
    pairs = list(read_pairs(arguments))
    assert [source for source, _ in pairs] == [source for source in SOURCES if source]
    assert {source == target for source, target in pairs} == {origin == "files"}


def test_a_document_on_the_standard_input_has_no_byte_order_mark_and_any_encoding(monkeypatch):
    for encoding, text in {"utf-8": b"\xef\xbb\xbfD\xc3\xbcne", "latin-1": b"D\xfcne"}.items():
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="ascii"))
        assert list(read_documents(TextArguments(encoding=encoding))) == ["Düne"]
    with pytest.raises(ValueError, match="is not a text encoding known to Python"):
        TextArguments(encoding="latin-0815")


def test_lines_come_without_their_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\r\n\n\nlast\r")
    assert list(read_lines(tmp_path / "a.txt", "utf-8")) == ["one", "two\r", "", "", "last"]
    rows = read_paired_text({"paths": {"de": tmp_path / "a.txt", "en": tmp_path / "a.txt"}, "encoding": "utf-8"})
    assert [row["de"] for row in rows] == ["one", "two\r", "", "", "last"]


def test_lines_are_read_from_pipes():
    reading, writing = os.pipe()
    os.write(writing, b"one\ntwo\n")
    os.close(writing)
    assert list(read_lines(f"/dev/fd/{reading}", "utf-8")) == ["one", "two"]
    os.close(reading)


def test_the_standard_input_stays_open(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert next(iter(read_lines(STANDARD_INPUT, "utf-8"))) == "one"
    assert not sys.stdin.closed
