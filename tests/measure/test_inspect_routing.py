"""Tests of scripts/inspect_routing.py."""

import io
import json
import lzma
import sys
from collections import Counter

import pytest
import torch
from transformers import GPT2Config

from helpers.models import tiny_model, tiny_seq2seq_model
from helpers.pages import BYTE_LEVEL_SIZE, byte_level_tokenizer, parse_page
from helpers.workplaces import load_script, refuse
from modeling_stablemoe.data.translation_tokenizer import train_translation_tokenizer


TEXT = "the cat and the dog and the script\n" * 8
LINES = ["the cat and the dog", "and the cat", "", "the dog"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of each kind, and files to read."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = byte_level_tokenizer()
    frozen = tiny_model(vocab_size=BYTE_LEVEL_SIZE)
    frozen.freeze_router()
    for name, model in {
        "frozen": frozen,
        "dense": tiny_model(vocab_size=BYTE_LEVEL_SIZE, moe_layer_positions=[]),
        "small": tiny_model(vocab_size=99),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    frozen.save_pretrained(folder / "bare")
    GPT2Config(vocab_size=9).save_pretrained(folder / "other")
    for name, languages in {"pairs": (), "languages": ("de", "fr")}.items():
        pairs = train_translation_tokenizer(lambda: iter([LINES * 9]), "unigram", 40, languages)
        special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        tiny_seq2seq_model(vocab_size=len(pairs), **special).save_pretrained(folder / name)
        pairs.save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    (folder / "text.txt.xz").write_bytes(lzma.compress(TEXT.encode()))
    (folder / "source.en").write_text("\n".join(LINES) + "\n")
    (folder / "target.en").write_text("\n".join(reversed(LINES)) + "\n")
    return folder


@pytest.fixture
def script(checkpoints, monkeypatch):
    monkeypatch.chdir(checkpoints)
    return load_script("inspect_routing").main


def test_script_prints_tables_and_writes_numbers_and_page(script, tmp_path, capsys):
    numbers, page = tmp_path / "numbers.json", tmp_path / "page.html"
    script(["frozen", "--text_files", "text.txt", "text.txt.xz", "--json", str(numbers), "--html", str(page)])
    report = json.loads(numbers.read_text())
    model, ids = tiny_model(vocab_size=BYTE_LEVEL_SIZE), byte_level_tokenizer()(TEXT)["input_ids"]
    model.freeze_router()
    load = Counter(model.route(torch.tensor([ids]))[0, 0].tolist())
    (layer,) = report["layers"]
    assert layer["load"]["tokens"] == [2 * load[expert] for expert in range(5)]
    printed = capsys.readouterr().out
    assert printed.startswith("# frozen\n")
    assert report["router_fingerprint"] == model.router_fingerprint()
    assert model.router_fingerprint() in printed
    assert f"{2 * len(ids)} tokens of the text" in printed
    best = layer["experts"][0]["most_frequent"][0]
    assert f"`{best['token']}` {best['count']}" in printed
    _, data = parse_page(page.read_text())
    assert data["layers"][0]["load"] == layer["load"]
    assert data["texts"][0]["starts"] == [0, len(ids)]
    assert str(tmp_path) not in page.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["numbers.json", "page.html"]


@pytest.mark.parametrize("has_browser", [True, False])
def test_the_page_opens_in_a_browser_where_there_is_one(script, tmp_path, monkeypatch, capsys, has_browser):
    shown = []
    monkeypatch.setattr("webbrowser.open", lambda address: shown.append(address) or has_browser)
    page = tmp_path / "a page.html"
    script(["frozen", "--text", TEXT, "--html", str(page), "--open"])
    assert shown == [f"file://{tmp_path}/a%20page.html"]
    assert page.is_file()
    told = f"No browser was found here: open {page} in one yourself." in capsys.readouterr().err
    assert told is not has_browser


def test_text_and_standard_input_are_read_alike(script, monkeypatch, capsys):
    script(["frozen", "--text", TEXT])
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    script(["frozen"])
    assert capsys.readouterr().out == expected


def test_text_that_spells_a_special_token_is_text(script, capsys):
    script(["frozen", "--text", "<|endoftext|>"])
    spelt = byte_level_tokenizer()("<|endoftext|>", split_special_tokens=True)["input_ids"]
    assert len(spelt) > 5
    assert f" {len(spelt)} tokens of the text" in capsys.readouterr().out


def test_max_tokens_bounds_what_is_read(script, capsys, caplog):
    script(["frozen", "--text_files", "text.txt", "text.txt.xz", "--max_tokens", "10"])
    assert "10 tokens of the text" in capsys.readouterr().out
    assert "only the first 10 tokens" in caplog.text


@pytest.mark.parametrize(("max_tokens", "pairs"), [(50_000, 3), (40, 2), (1, 1)])
def test_translation_model_shows_both_sides(script, checkpoints, capsys, max_tokens, pairs, tmp_path):
    files = ["--text_files", "source.en", "--target_files", "target.en"]
    script(["pairs", *files, "--max_tokens", str(max_tokens), "--html", str(tmp_path / "page.html")])
    _, data = parse_page((tmp_path / "page.html").read_text())
    # The pair with the blank source is left out.
    assert [(text["kind"], len(text["starts"])) for text in data["texts"]] == [("sources", pairs), ("targets", pairs)]
    assert [layer["text"] for layer in data["layers"]] == [0, 1, 1]
    printed = capsys.readouterr().out
    assert "tokens of the sources" in printed
    assert "tokens of the targets" in printed


def test_translation_model_without_targets_shows_its_encoder(script, capsys, caplog):
    script(["pairs", "--text", "the cat\nthe dog"])
    printed = capsys.readouterr().out
    assert "model.encoder.moe_layers.0" in printed
    assert "decoder" not in printed
    assert "--target_files" in caplog.text


def test_source_names_its_target_language(script, capsys):
    script(["languages", "--text", "the cat", "--target_language", "fr"])
    assert "`>>fr<<` 1" in capsys.readouterr().out


def test_long_sources_are_cut_to_the_positions(script, capsys, caplog):
    script(["pairs", "--text", "the cat and the dog " * 20])
    assert "40 tokens of the sources" in capsys.readouterr().out
    assert "the first 40 are read" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "--text", "a"], "cannot load 'missing'"),
        (["other", "--text", "a"], "'gpt2' model"),
        (["bare", "--text", "a"], "--tokenizer_name"),
        (["dense", "--text", "a"], "dense model"),
        (["frozen", "--text", ""], "the text is empty: give some with --text, --text_files"),
        (["pairs", "--text", " \n"], "the text is empty"),
        (["small", "--text", "script"], "outside the model's vocabulary of 99"),
        (["frozen", "--text_files", "missing.txt"], "There is no file or folder"),
        (["frozen", "--text_files", "text.txt", "--target_files", "text.txt"], "this is a language model"),
        (["pairs", "--text_files", "missing.en"], "missing.en"),
        (["pairs", "--text_files", "source.en", "--target_files", "text.txt"], "same number of lines"),
        (["languages", "--text", "a"], "name the target language"),
        (["frozen", "--text", "a", "--html", "nowhere/page.html"], "--html: there is no folder nowhere"),
    ],
)
def test_user_mistakes_end_with_one_line_that_names_the_remedy(script, arguments, message):
    line = refuse(script, arguments)
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frozen", "--text", "a", "--text_files", "text.txt"], "exclude each other"),
        (["frozen", "--text", "a", "--target_files", "text.txt"], "one file for each"),
        (["frozen", "--text", "a", "--max_tokens", "0"], "--max_tokens must be >= 1"),
        (["frozen", "--text", "a", "--top_k", "0"], "--top_k must be >= 1"),
        (["frozen", "--text", "a", "--open"], "name its file, as in --html experts.html --open"),
    ],
)
def test_contradictory_options_are_refused(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_tokenizer_of_a_checkpoint_without_one_can_be_named(script, capsys):
    script(["bare", "--text", TEXT, "--tokenizer_name", "frozen"])
    expected = capsys.readouterr().out
    script(["frozen", "--text", TEXT])
    assert capsys.readouterr().out.splitlines()[1:] == expected.splitlines()[1:]
