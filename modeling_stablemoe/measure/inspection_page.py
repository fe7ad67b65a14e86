# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""One HTML file, which needs no network, that shows a text with each token in the colour of its expert."""

import html
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .inspection import RoutedText, token_bytes


_TEMPLATE = Path(__file__).parent / "templates" / "inspection.html"
_HEADER = ("checkpoint", "router_type", "routing_stage", "router_fingerprint", "num_experts", "num_experts_per_tok")
# JSON escapes of the characters that could end a script element or begin another one.
_HARMLESS = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def build_page(report: dict, texts: Sequence[RoutedText], tokenizer: PreTrainedTokenizerBase) -> str:
    """Build the page of a report: texts to read, load and tokens of each expert, tokens to look up.

    Args:
        report (`dict`): of `inspect_routing`.
        texts (sequence of `RoutedText`): that the report was measured on.
        tokenizer (`PreTrainedTokenizerBase`): of the texts.

    Returns:
        `str`: a whole HTML document, with its data as JSON in the element with the id "data".
    """
    data = json.dumps(page_data(report, texts, tokenizer), separators=(",", ":")).translate(_HARMLESS)
    values = {"title": html.escape(report["checkpoint"]), "data": data}
    # In one pass, so that no placeholder is looked for in what is filled in.
    template = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|data)\}\}", lambda place: values[place[1]], template)


def page_data(report: dict, texts: Sequence[RoutedText], tokenizer: PreTrainedTokenizerBase) -> dict:
    """Gather what the page shows, compactly: a token is an index into the vocabulary of its text.

    Returns:
        `dict`, JSON-ready: the header of the report; `texts`, each with its `kind`, the `starts` of documents, its
            `tokens`, and `vocabulary` and `ids` of the distinct ones, the most frequent first (a token that is not
            whole UTF-8 as a list of its bytes); `layers`, each with its `name`, the index of its `text`, `load` and
            `agreement` of the report, and the `experts` and `backbone` choice of each token (`None` without scores), a list
            where a token has several experts.
    """
    measured = iter(report["layers"])
    layers = []
    for index, text in enumerate(texts):
        for layer in text.layers:
            measures = next(measured)
            layers.append(
                {
                    "name": layer.name,
                    "text": index,
                    "load": measures["load"],
                    "agreement": measures["agreement"],
                    "experts": layer.experts.tolist(),
                    "backbone": None if layer.backbone_experts is None else layer.backbone_experts.tolist(),
                }
            )
    header = {name: report[name] for name in _HEADER}
    return {**header, "texts": [_compact(text, tokenizer) for text in texts], "layers": layers}


def _compact(text: RoutedText, tokenizer: PreTrainedTokenizerBase) -> dict:
    token_ids = text.token_ids.tolist()
    ids = [token_id for token_id, _ in Counter(token_ids).most_common()]
    place = {token_id: index for index, token_id in enumerate(ids)}
    return {
        "kind": text.kind,
        "starts": text.starts,
        "ids": ids,
        "vocabulary": [_text_or_bytes(spelt) for spelt in token_bytes(tokenizer, ids)],
        "tokens": [place[token_id] for token_id in token_ids],
    }


def _text_or_bytes(spelt: bytes) -> str | list[int]:
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return list(spelt)
