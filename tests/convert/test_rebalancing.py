"""Balancing the routing of checkpoints after the fact, and scripts/balance_routing.py."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.models import tiny_model, tiny_seq2seq_model
from helpers.pages import BYTE_LEVEL_SIZE, byte_level_tokenizer
from helpers.workplaces import load_script, refuse
from modeling_stablemoe.convert.rebalancing import format_balances, rebalance
from modeling_stablemoe.measure.inspection import route_texts


TEXT = "the quick brown fox jumps over the lazy dog; " * 30
DOCUMENTS = [torch.randint(2, 40, (50,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(6)]


def frozen_model(**settings):
    model = tiny_model(**settings)
    if model.config.distilled_router is not None:
        model.freeze_router()
    return model


@pytest.mark.parametrize(
    ("settings", "num_bands"),
    [
        ({}, 1),
        ({"router_type": "hash"}, 4),
        ({"router_type": "switch"}, 1),
        ({"router_type": "base"}, 4),
        ({"stage": 1}, 4),
        ({"num_experts_per_tok": 2}, 1),
        ({"router_type": "switch", "num_experts_per_tok": 2}, 4),
    ],
)
def test_any_routing_is_balanced_and_most_of_it_kept(settings, num_bands):
    model = tiny_model() if "stage" in settings else frozen_model(**settings)
    if "hash" in settings.values():
        model.set_routing_tables(torch.arange(99).unsqueeze(0) % 2)
    k = model.config.num_experts_per_tok
    (text,) = route_texts(model, DOCUMENTS)
    layer = text.layers[0]
    was = layer.backbone_experts if model.routing_stage == 1 else layer.experts
    (balance,) = rebalance(model, [text], 1.1, num_bands)
    table = model.route(torch.arange(99).unsqueeze(0))[0, 0].view(99, k)
    load = torch.bincount(table[text.token_ids].flatten(), minlength=5).double()
    assert balance.tokens == 300
    assert load.sum() == 300 * k
    assert balance.load_after == pytest.approx(float(load.max() / load.mean()))
    # Ids that are not in the text count as one token each.
    assert load.max() <= 1.1 * k * (300 + 99) / 5
    assert balance.load_after < balance.load_before
    pairs = zip(table[text.token_ids].tolist(), was.view(-1, k).tolist(), strict=True)
    kept = [set(now) & set(before) for now, before in pairs]
    assert balance.agreement == pytest.approx(sum(map(len, kept)) / (300 * k))
    assert k / 5 < balance.agreement <= balance.bound <= balance.best_agreement
    assert model.routing_stage == 2
    assert model.config.router_fingerprint == model.router_fingerprint()


def test_ids_that_are_not_in_the_text_stay_as_far_as_balance_allows():
    model = frozen_model()
    before = model.route(torch.arange(99).unsqueeze(0))[0, 0]
    rebalance(model, route_texts(model, DOCUMENTS), 5.0)
    assert torch.equal(model.route(torch.arange(99).unsqueeze(0))[0, 0], before)


@pytest.mark.parametrize("num_bands", [1, 4])
def test_an_id_of_half_the_text_stands_alone_and_the_others_keep_to_the_limit(num_bands):
    model = frozen_model()
    (text,) = route_texts(model, [[*document, *[50] * 50] for document in DOCUMENTS])
    (balance,) = rebalance(model, [text], 1.1, num_bands)
    table = model.route(torch.arange(99).unsqueeze(0))[0, 0]
    load = torch.bincount(table[text.token_ids], minlength=5)
    assert balance.alone == (table == table[50]).sum() == 1
    assert load[table[50]] == load.max() == 300
    assert load.sort().values[-2] <= 1.1 * (600 + 99) / 5
    assert "ids above the limit" in format_balances([balance])


def test_an_encoder_and_a_decoder_are_balanced_together():
    model = tiny_seq2seq_model()
    sources = [document[:20] for document in DOCUMENTS]
    balances = rebalance(model, route_texts(model, sources, [[*row[:10], 0] for row in sources]), 1.2)
    assert [balance.tokens for balance in balances] == [120, 66, 66]
    assert model.routing_stage == 2
    with pytest.raises(ValueError, match=r"Nothing was routed by model\.decoder\.moe_layers\.0, .*--target_files"):
        rebalance(model, route_texts(model, [[5, 6, 7, 0]]), 1.1)


def test_a_router_that_looks_back_has_no_table():
    model = tiny_model(distilled_router="bigram")
    with pytest.raises(ValueError, match="freezes as weights and has no tables"):
        rebalance(model, route_texts(model, DOCUMENTS), 1.1)


# The script


@pytest.fixture(scope="module")
def script():
    return load_script("balance_routing")


@pytest.fixture
def checkpoint(tmp_path):
    model = tiny_model(vocab_size=BYTE_LEVEL_SIZE, router_type="switch")
    model.save_pretrained(tmp_path / "checkpoint")
    byte_level_tokenizer().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_the_script_saves_a_frozen_checkpoint_that_loads(script, checkpoint, tmp_path, capsys):
    out = tmp_path / "balanced"
    script.main([str(checkpoint), "--text", TEXT, "--output_dir", str(out), "--max_load", "1.2"])
    printed = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.routing_stage == 2
    assert model.config.router_fingerprint in printed
    assert "load max/mean before" in printed
    original = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)


def test_the_script_says_what_is_wrong(script, checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = [str(checkpoint), "--text", TEXT, "--output_dir", str(tmp_path)]
    assert "there already and not empty" in refuse(script.main, command)
    for options, complaint in (
        (["--max_load", "0.5"], "--max_load must be"),
        (["--frequency_bands", "0"], "must be >= 1"),
    ):
        with pytest.raises(SystemExit):
            script.main([*command, *options])
        assert complaint in capsys.readouterr().err
