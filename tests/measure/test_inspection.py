"""Tests of what is measured of a routing, and of the page."""

import json
import math
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from helpers.models import random_ids, tiny_config, tiny_model, tiny_seq2seq_model
from helpers.pages import BYTE_LEVEL_SIZE, byte_level_tokenizer, parse_page
from modeling_stablemoe.data.translation_tokenizer import train_translation_tokenizer
from modeling_stablemoe.measure.inspection import (
    count_token_experts,
    format_report,
    inspect_routing,
    measure_agreement,
    measure_load,
    readable_tokens,
    route_texts,
    token_bytes,
)
from modeling_stablemoe.measure.inspection_page import build_page


HOSTILE = "a </script><b>bold</b> <!-- & `|` \"'\u2028 {{data}} {{title}}\n\tnaïve 日本 😀"


def encode(tokenizer, *documents: str) -> list[list[int]]:
    return [tokenizer(document, add_special_tokens=False)["input_ids"] for document in documents]


@pytest.mark.parametrize("k", [1, 2])
def test_text_is_routed_as_inference_routes_it_whatever_the_batches(k):
    model = tiny_model(moe_layer_positions=[0, 2], num_experts_per_tok=k)
    documents = [ids.tolist() for ids in random_ids(2, 150)] + [[5]] + [[]] + random_ids(1, 64, seed=3).tolist()
    (text,) = route_texts(model, documents)
    assert text.token_ids.tolist() == sum(documents, [])
    assert text.starts == [0, 150, 300, 301]
    # Independently: window by window, without padding; backbone scores from the input of the layer.
    windows = [document[first : first + 64] for document in documents for first in range(0, len(document), 64)]
    layers = list(model.moe_layers_by_name.items())
    assert [layer.name for layer in text.layers] == [name for name, _ in layers]
    inputs = {name: [] for name, _ in layers}
    for name, layer in layers:
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs[name].append(args[0].flatten(0, 1)))
    expected = torch.cat([model.route(torch.tensor([window])).squeeze(1) for window in windows], dim=1)
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]))
    for index, (name, layer) in enumerate(layers):
        assert torch.equal(text.layers[index].experts, expected[index])
        scores = torch.cat(inputs[name]) @ layer.router.centroids.T
        best = scores.argsort(-1, descending=True)[:, :k].squeeze(-1)
        assert torch.equal(text.layers[index].backbone_experts, best)
    assert len(expected.unique()) > 2
    for batch_tokens in (1, 100):
        (again,) = route_texts(model, documents, batch_tokens=batch_tokens)
        for layer, same in zip(text.layers, again.layers, strict=True):
            assert torch.equal(layer.experts, same.experts)
            assert torch.equal(layer.backbone_experts, same.backbone_experts)


def test_frozen_model_is_routed_by_its_tables(frozen_model):
    (text,) = route_texts(frozen_model, random_ids(3, 20).tolist())
    assert torch.equal(text.layers[0].experts, frozen_model.route(random_ids(3, 20)).flatten())


def test_encoder_sees_sources_and_decoder_shifted_targets():
    model = tiny_seq2seq_model()
    sources, targets = [[5, 6, 7, 0], [8, 0]], [[9, 0], [10, 11, 12, 13, 0]]
    encoder, decoder = route_texts(model, sources, targets)
    assert (encoder.kind, encoder.token_ids.tolist(), encoder.starts) == ("sources", [5, 6, 7, 0, 8, 0], [0, 4])
    assert (decoder.kind, decoder.starts) == ("targets", [0, 2])
    assert decoder.token_ids.tolist() == [1, 9, 1, 10, 11, 12, 13]  # begins with decoder_start_token_id
    names = list(model.moe_layers_by_name)
    assert [layer.name for layer in encoder.layers + decoder.layers] == names
    expected = model.eval().route(encoder.token_ids.unsqueeze(0))[:1, 0]
    assert torch.equal(torch.stack([layer.experts for layer in encoder.layers]), expected)
    expected = model.route(decoder.token_ids.unsqueeze(0))[1:, 0]
    assert torch.equal(torch.stack([layer.experts for layer in decoder.layers]), expected)
    alone = route_texts(model, sources)
    assert [text.kind for text in alone] == ["sources"]
    assert torch.equal(alone[0].layers[0].backbone_experts, encoder.layers[0].backbone_experts)


def test_decoder_alone_can_be_inspected():
    model = tiny_seq2seq_model(encoder_moe_layer_positions=[])
    (decoder,) = route_texts(model, [[5, 0]], [[6, 0]])
    assert [layer.name for layer in decoder.layers] == list(model.moe_layers_by_name)
    with pytest.raises(ValueError, match="give targets"):
        route_texts(model, [[5, 0]])


def test_load_is_that_of_a_plain_count():
    experts = torch.tensor([0] * 6 + [2] * 3 + [3])
    load = measure_load(experts, 5)
    assert load["tokens"] == [6, 0, 3, 1, 0]
    assert load["share"] == pytest.approx([0.6, 0, 0.3, 0.1, 0])
    assert load["max_over_mean"] == pytest.approx(6 / (10 / 5))
    entropy = -(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1))
    assert load["entropy"] == pytest.approx(entropy)
    assert load["entropy_share"] == pytest.approx(entropy / math.log(5))
    assert load["idle_experts"] == [1, 4]


def test_of_several_experts_each_counts_and_agreement_is_what_they_have_in_common():
    experts, backbone = torch.tensor([[0, 1], [1, 2], [0, 1]]), torch.tensor([[1, 0], [2, 3], [2, 3]])
    assert measure_load(experts, 4)["tokens"] == [2, 3, 1, 0]
    assert count_token_experts(torch.tensor([7, 9, 7]), experts) == [(7, 0, 2), (7, 1, 2), (9, 1, 1), (9, 2, 1)]
    assert measure_agreement(torch.tensor([7, 9, 7]), experts, backbone)["overall"] == pytest.approx(0.5)


def test_load_of_one_expert_is_even():
    load = measure_load(torch.zeros(4, dtype=torch.long), 1)
    assert (load["max_over_mean"], load["entropy"], load["entropy_share"], load["idle_experts"]) == (1, 0, None, [])


def test_agreement_is_that_of_a_plain_count_by_token_frequency():
    generator = torch.Generator().manual_seed(1)
    token_ids = (torch.rand(700, generator=generator) ** 3 * 90).long()
    experts = torch.randint(3, (700,), generator=generator)
    backbone = torch.randint(3, (700,), generator=generator)
    agreement = measure_agreement(token_ids, experts, backbone)
    counts = Counter(token_ids.tolist())
    assert agreement["overall"] == pytest.approx(
        sum(a == b for a, b in zip(experts.tolist(), backbone.tolist(), strict=True)) / 700
    )
    seen = 0
    for row in agreement["by_frequency"]:
        assert row["at_most"] == 2 * row["at_least"] - 1
        inside = [i for i, v in enumerate(token_ids.tolist()) if row["at_least"] <= counts[v] <= row["at_most"]]
        assert row["tokens"] == len(inside) > 0
        assert row["distinct_tokens"] == len({int(token_ids[i]) for i in inside})
        assert row["agreement"] == pytest.approx(sum(int(experts[i] == backbone[i]) for i in inside) / len(inside))
        seen += len(inside)
    assert seen == 700
    assert len(agreement["by_frequency"]) > 3


@pytest.mark.parametrize(("occurrences", "at_least"), [(1, 1), (3, 2), (4, 4), (7, 4)])
def test_powers_of_two_begin_a_range_of_frequencies(occurrences, at_least):
    same = torch.zeros(occurrences, dtype=torch.long)
    (row,) = measure_agreement(same, same, same)["by_frequency"]
    assert (row["at_least"], row["tokens"], row["agreement"]) == (at_least, occurrences, 1)


def test_token_experts_are_counted_most_frequent_first():
    token_ids, experts = torch.tensor([7, 7, 4, 7, 9, 4]), torch.tensor([1, 1, 0, 2, 0, 0])
    assert count_token_experts(token_ids, experts) == [(4, 0, 2), (7, 1, 2), (7, 2, 1), (9, 0, 1)]


def inspected(text: str, **overrides):
    """A frozen model, how it routes a text, and the report."""
    model, tokenizer = tiny_model(vocab_size=BYTE_LEVEL_SIZE, **overrides), byte_level_tokenizer()
    if model.routing_stage == 1:
        model.freeze_router()
    texts = route_texts(model, encode(tokenizer, text))
    return texts[0], inspect_routing(model, tokenizer, texts, "x", top_k=1)


@pytest.mark.parametrize(("k", "number"), [(1, "several"), (2, "more than 2")])
def test_tokens_that_a_router_of_contexts_sends_to_several_experts_are_listed(k, number):
    words = "the cat and the dog and the script, " * 5
    text, report = inspected(words, distilled_router="bigram", num_experts_per_tok=k)
    counts = {}
    for token, experts in zip(text.token_ids.tolist(), text.layers[0].experts.view(-1, k).tolist(), strict=True):
        counts.setdefault(token, Counter()).update(experts)
    several = {token: experts for token, experts in counts.items() if len(experts) > k}
    listed = report["layers"][0]["tokens_of_several_experts"]
    assert listed["distinct_tokens"] == len(several) > 0
    assert listed["tokens"] == sum(experts.total() for experts in several.values()) / k
    (first,) = listed["most_frequent"]
    assert first["count"] == max(experts.total() for experts in several.values()) / k
    assert {each["expert"]: each["count"] for each in first["experts"]} == several[first["id"]]
    formatted = format_report(report)
    assert f"| `{first['token']}` " in formatted.split(f"go to {number} experts")[1]
    assert ("5 experts, 2 per token." in formatted) == (k == 2)


def test_a_router_without_scores_is_measured_and_agrees_with_nothing():
    _, report = inspected("the cat and the dog", router_type="hash")
    assert report["layers"][0]["agreement"] is None
    assert "no backbone scores" in format_report(report)


def test_report_lists_the_most_frequent_tokens_of_each_expert():
    model, tokenizer = tiny_model(vocab_size=BYTE_LEVEL_SIZE), byte_level_tokenizer()
    model.freeze_router()
    documents = encode(tokenizer, "the cat and the dog " * 9, HOSTILE)
    report = inspect_routing(model, tokenizer, route_texts(model, documents), "name", top_k=3)
    assert json.loads(json.dumps(report)) == report
    assert (report["routing_stage"], report["router_fingerprint"]) == (2, model.router_fingerprint())
    (layer,) = report["layers"]
    table = model.route(torch.arange(BYTE_LEVEL_SIZE).unsqueeze(0))[0, 0].tolist()
    counts = Counter(documents[0] + documents[1])
    assert (layer["tokens"], layer["distinct_tokens"]) == (sum(counts.values()), len(counts))
    for expert in layer["experts"]:
        own = sorted(((n, v) for v, n in counts.items() if table[v] == expert["expert"]), key=lambda e: (-e[0], e[1]))
        assert [(entry["count"], entry["id"]) for entry in expert["most_frequent"]] == own[:3]
        assert (expert["tokens"], expert["distinct_tokens"]) == (sum(n for n, _ in own), len(own))
    assert layer["tokens_of_several_experts"] == {"distinct_tokens": 0, "tokens": 0, "most_frequent": []}
    assert layer["agreement"]["by_frequency"]
    rows = [line for line in format_report(report).splitlines() if line.startswith("| ")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {5, 6}  # no token breaks a table


def test_tokens_are_spelt_so_that_they_add_up_to_the_text():
    tokenizer = byte_level_tokenizer()
    (ids,) = encode(tokenizer, HOSTILE)
    assert b"".join(token_bytes(tokenizer, ids)).decode() == HOSTILE
    assert " the" in [spelt.decode(errors="replace") for spelt in token_bytes(tokenizer, range(BYTE_LEVEL_SIZE))]
    unigram = train_translation_tokenizer(lambda: iter([["the cat and the dog"] * 20]), "unigram", 40)
    spelt = token_bytes(unigram, unigram("the cat and the dog")["input_ids"])
    assert b"".join(spelt) == b" the cat and the dog</s>"


def test_readable_tokens_show_spaces_and_cut_characters():
    tokenizer = byte_level_tokenizer()
    (ids,) = encode(tokenizer, "é\n\t")
    assert readable_tokens(tokenizer, [*ids, 0, 99_999]) == [
        "\\xc3",
        "\\xa9",
        "↵",
        "⇥",
        "<|endoftext|>",
        "<99999>",
    ]
    fallback = Tokenizer(models.BPE({"<0xC3>": 0, "<0xA9>": 1}, [], byte_fallback=True))
    fallback.decoder = decoders.ByteFallback()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=fallback), [0, 1]) == [b"\xc3", b"\xa9"]


@pytest.mark.parametrize(
    ("documents", "overrides", "message"),
    [
        ([[5]], {"moe_layer_positions": []}, "dense model"),
        ([[], []], {}, "no token"),
        ([[5, 99]], {}, "token id 99 in the text, outside the model's vocabulary of 99"),
        ([[5, -1]], {}, "token id -1"),
    ],
)
def test_what_cannot_be_routed_is_refused(documents, overrides, message):
    with pytest.raises(ValueError, match=message):
        route_texts(tiny_model(**overrides), documents)


def test_pair_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="in the sources has 41 tokens, more than the model's 40"):
        route_texts(tiny_seq2seq_model(), [[5] * 41])


def page_of(texts: list[str], name: str = "checkpoint", **overrides):
    model = tiny_model(vocab_size=BYTE_LEVEL_SIZE, moe_layer_positions=[0, 2], **overrides)
    tokenizer = byte_level_tokenizer()
    routed = route_texts(model, encode(tokenizer, *texts))
    report = inspect_routing(model, tokenizer, routed, name)
    return build_page(report, routed, tokenizer), report, routed


@pytest.mark.parametrize("k", [1, 2])
def test_page_holds_the_text_and_what_was_measured(k):
    page, report, (text,) = page_of(["the cat and the dog", HOSTILE], num_experts_per_tok=k)
    _, data = parse_page(page)
    assert {name: data[name] for name in ("checkpoint", "router_type", "routing_stage", "num_experts")} == {
        "checkpoint": "checkpoint",
        "router_type": "stable",
        "routing_stage": 1,
        "num_experts": tiny_config().num_experts,
    }
    (shown,) = data["texts"]
    assert [shown["ids"][token] for token in shown["tokens"]] == text.token_ids.tolist()
    spelt = [piece.encode() if isinstance(piece, str) else bytes(piece) for piece in shown["vocabulary"]]
    assert b"".join(spelt[token] for token in shown["tokens"]).decode() == "the cat and the dog" + HOSTILE
    assert shown["starts"] == text.starts
    frequencies = Counter(shown["tokens"])
    assert sorted(frequencies, key=lambda token: -frequencies[token])[0] == 0
    assert [layer["name"] for layer in data["layers"]] == [layer["name"] for layer in report["layers"]]
    for layer, measured, routing in zip(data["layers"], report["layers"], text.layers, strict=True):
        assert (layer["load"], layer["agreement"]) == (measured["load"], measured["agreement"])
        assert layer["experts"] == routing.experts.tolist()
        assert layer["backbone"] == routing.backbone_experts.tolist()
    # What a reader adds up from the tokens is what was measured.
    experts = data["layers"][1]["experts"]
    chosen = experts if k == 1 else [expert for of_token in experts for expert in of_token]
    assert Counter(chosen) == Counter(dict(enumerate(report["layers"][1]["load"]["tokens"])))
    assert data["num_experts_per_tok"] == k


def test_hostile_text_and_name_stay_text():
    harmless, _, _ = page_of(["the cat"])
    page, _, _ = page_of([HOSTILE], name='</title><img src=x onerror="alert(1)">{{data}}')
    (plain, _), (parser, data) = parse_page(harmless), parse_page(page)
    assert parser.elements == plain.elements  # no element came from the text
    assert len(parser.scripts) == 2
    assert data["checkpoint"] == '</title><img src=x onerror="alert(1)">{{data}}'
    assert "<" not in parser.scripts[0]
    assert "<img" in parser.title
    assert "{{data}}" in parser.title  # not filled in a second time


def test_page_loads_nothing():
    page, _, _ = page_of(["the cat"])
    parser, _ = parse_page(page)
    assert not [
        (tag, attributes)
        for tag, attributes in parser.elements
        if {"src", "href", "srcset", "data", "action"} & attributes.keys() or tag in ("link", "img", "iframe")
    ]
    policies = [a["content"] for tag, a in parser.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies[0].startswith("default-src 'none'")
    assert "url(" not in page
    assert "@import" not in page
    assert "innerHTML" not in page  # text reaches the page as text only


def test_every_element_that_the_script_of_the_page_asks_for_is_there():
    parser, _ = parse_page(page_of(["the cat"])[0])
    asked = {part.split('"')[0] for part in parser.scripts[1].split('$("')[1:]}
    assert len(asked) > 15
    assert asked <= {attributes.get("id") for _, attributes in parser.elements}
