"""Pages of `inspect_routing.py`, parsed as a browser does, and a tokenizer for their texts."""

import json
from html.parser import HTMLParser

from transformers import PreTrainedTokenizerFast

from modeling_stablemoe.data.text import train_bpe


BYTE_LEVEL_SIZE = 300


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    backend = train_bpe([["the cat and the dog and the script"] * 20], BYTE_LEVEL_SIZE, ["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


class PageParser(HTMLParser):
    """Collects elements and the content of scripts, as a browser delimits them."""

    def __init__(self):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.title = ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data
        elif self.lasttag == "title":
            self.title += data


def parse_page(page: str) -> tuple[PageParser, dict]:
    parser = PageParser()
    parser.feed(page)
    parser.close()
    return parser, json.loads(parser.scripts[0])
