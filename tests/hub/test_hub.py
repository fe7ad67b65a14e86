"""The model card is filled from the run and its metadata are what the Hub expects."""

from huggingface_hub import ModelCard

from helpers import ROOT
from helpers.models import tiny_config
from modeling_stablemoe.hub.cards import build_model_card


TEMPLATE = ROOT / "hub_card.md"
RESULTS = {
    "perplexity": 12.3456,
    "parameters": 1234567,
    "stages": [{"stage": 1, "steps": 10, "perplexity": 20.0, "load_max_over_mean": 1.5, "fluctuation": 0.25}],
    "distillation_agreement_at_transition": 0.5,
}


def card_of(results=RESULTS, **config) -> ModelCard:
    return build_model_card(
        TEMPLATE, model_name="me/model", config=tiny_config(**config), results=results, dataset_name="books"
    )


def test_card_metadata_hold_the_measured_perplexity():
    card = card_of(router_fingerprint="ab" * 32)
    data = ModelCard(str(card)).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    [result] = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("perplexity", 12.346, "books")


def test_card_of_a_frozen_model_names_its_fingerprint_and_leaves_no_blank():
    text = str(card_of(router_fingerprint="ab" * 32))
    assert "frozen (stage 2)" in text
    assert "ab" * 32 in text
    assert "1,234,567" in text
    assert "| 1     | 10    | 20" in text
    assert "50.0%" in text
    assert "{{" not in text


def test_card_of_a_stage_1_model_says_so():
    text = str(card_of({**RESULTS, "distillation_agreement_at_transition": None}))
    assert "still learned (stage 1)" in text
    assert "not measured" in text
