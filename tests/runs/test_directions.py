"""Tests of telling a checkpoint's direction."""

import logging

import pytest
import torch
from datasets import Dataset, DatasetDict

from modeling_stablemoe import StableMoEForConditionalGeneration, StableMoESeq2SeqConfig
from modeling_stablemoe.data import (
    TokenBatchCollator,
    TranslationDataArguments,
    encode_pairs,
    load_translation_tokenizer,
)
from modeling_stablemoe.runs import warn_of_wrong_direction


SIDES = {"source": [f"{i} {i * i} {i * 7}" for i in range(30)], "target": ["so so"] * 30}


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """A model that has learned to answer "so so"."""
    corpus = DatasetDict(train=Dataset.from_dict({"pair": ["de-en"] * 30, **SIDES}))
    arguments = TranslationDataArguments(language_pairs=["de-en"], train_files=["x.tsv"], vocab_size=30)
    tokenizer = load_translation_tokenizer(arguments, corpus)
    torch.manual_seed(0)
    model = StableMoEForConditionalGeneration(
        StableMoESeq2SeqConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            encoder_layers=1,
            decoder_layers=1,
            num_attention_heads=2,
            num_experts=2,
            distilled_router_dim=4,
            max_position_embeddings=32,
            decoder_start_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rows = encode_pairs(corpus, tokenizer, 32, 32)["train"].select_columns(["input_ids", "labels"])
    batch = TokenBatchCollator(tokenizer)(list(rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(40):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_checkpoint_of_the_other_direction_is_noticed(translator, caplog, is_wrong):
    caplog.set_level(logging.WARNING, logger="modeling_stablemoe.runs.directions")
    model, tokenizer = translator
    source, target = ("target", "source") if is_wrong else ("source", "target")
    pairs = ["en-de"] * 20 if is_wrong else ["de-en"] * 20
    rows = Dataset.from_dict({"pair": pairs, "source": SIDES[source][:20], "target": SIDES[target][:20]})
    warn_of_wrong_direction(model, tokenizer, rows)
    assert model.training
    assert [
        "Check the direction of en-de" in each and "`--language_pairs de-en`" in each for each in caplog.messages
    ] == ([True] if is_wrong else [])
