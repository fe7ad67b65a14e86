"""Tests of StableMoEConfig: the paper's defaults, validation of every field, JSON round trip."""

import copy
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from huggingface_hub.dataclasses import type_validator
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from helpers.checkpoints import edit_config
from helpers.models import random_ids, tiny_config, tiny_model, tiny_seq2seq_config, tiny_seq2seq_model
from modeling_stablemoe import StableMoEConfig, StableMoEForCausalLM, StableMoEForSequenceClassification


NAN, INF = float("nan"), float("inf")


def test_defaults_are_the_base_language_model_of_the_paper():
    config = StableMoEConfig()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (50257, 768, 3072)
    assert (config.num_hidden_layers, config.num_attention_heads, config.max_position_embeddings) == (12, 12, 1024)
    assert (config.num_experts, config.num_expert_sublayers, config.moe_layer_positions) == (32, 3, [6])
    assert (config.router_type, config.distilled_router_dim, config.hidden_act) == ("stable", 50, "relu")
    assert (config.balance_loss_coef, config.distillation_loss_coef, config.router_aux_loss_coef) == (0.3, 1.0, 1.0)
    assert config.expert_capacity_factor is None
    assert config.router_fingerprint is None
    assert config.output_router_logits is False
    assert config.tie_word_embeddings is True


def each(names: str, values: list) -> list[tuple[str, object]]:
    return [(name, value) for name in names.split() for value in values]


COUNTS = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
COUNTS += " num_experts num_expert_sublayers distilled_router_dim"
COEFFICIENTS = "balance_loss_coef distillation_loss_coef router_aux_loss_coef initializer_range"
# What is wrong with a number, and the numbers.
NUMBERS = [
    ("must be a positive integer below 2**63", each(COUNTS, [0, 2.0, "8", True, None, 2**63])),
    ("must be a finite number >= 0 (in float32)", each(COEFFICIENTS, [-0.1, NAN, INF, "0.3", True, 1e39])),
    ("is a probability in [0, 1)", each("dropout attention_dropout", [-0.1, 1, 1.5, NAN, "0", True, None])),
    ("must be a finite number > 0 (in float32)", each("layer_norm_eps", [0, -1e-5, NAN, INF, "1e-5", True, None])),
    ("must be None (no token", each("expert_capacity_factor", [0, -1.0, NAN, INF, "2", True])),
    ("must be a list of integers", each("moe_layer_positions", [1, "1", [1.0], ["1"], [True], [None], {1: 1}])),
]


@pytest.mark.parametrize(("rule", "values"), NUMBERS, ids=[rule for rule, _ in NUMBERS])
def test_numbers_out_of_range_are_refused_with_field_rule_and_value(rule, values):
    for name, value in values:
        with pytest.raises(ValueError, match=rf"^`{name}` {re.escape(rule)}.* got {re.escape(repr(value))}\.$"):
            tiny_config(**{name: value})


@pytest.mark.parametrize("value", ["nope", None, ["stable"]])
def test_unknown_router_type_is_refused_with_the_choices(value):
    with pytest.raises(ValueError, match=r"^`router_type` .* is unknown; choose one of \[.*'stable'.*\], or import"):
        tiny_config(router_type=value)


@pytest.mark.parametrize(("blocks", "middle"), [(1, 0), (2, 1), (5, 2), (12, 6)])
def test_positions_default_to_one_layer_in_the_middle(blocks, middle):
    assert tiny_config(num_hidden_layers=blocks, moe_layer_positions=None).moe_layer_positions == [middle]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"moe_layer_positions": []},
        {"moe_layer_positions": [2, 0], "expert_capacity_factor": 2.0, "router_fingerprint": "ab" * 32},
        {"eos_token_id": [3, 4], "output_router_logits": True, "tie_word_embeddings": False, "hidden_act": "gelu"},
    ],
)
def test_json_round_trip_changes_nothing(overrides, tmp_path):
    config = tiny_config(**overrides)
    assert config.moe_layer_positions == sorted(overrides.get("moe_layer_positions", [1]))
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "stablemoe"
    # Every own field is written out, so that a later change of a default cannot change an old checkpoint.
    assert stored["num_experts"] == 5
    assert stored["moe_layer_positions"] == config.moe_layer_positions
    loaded = StableMoEConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == {**config.to_dict(), **{k: v for k, v in loaded.to_dict().items() if k[0] == "_"}}


MISREAD = [
    ({"output_router_logits": "false"}, "must be True or False, got 'false'"),
    ({"use_cache": None}, "must be True or False, got None"),
    ({"bos_token_id": "<s>"}, "must be a token id, an integer, or None, got '<s>'"),
    ({"bos_token_id": 99}, "99 lies outside the vocabulary 0..98"),
    ({"eos_token_id": 2.0}, "must be a token id, an integer, several in a list, or None, got 2.0"),
    ({"eos_token_id": []}, "must be a token id, an integer, several in a list, or None, got []"),
    ({"eos_token_id": [0, -1]}, "[0, -1] lies outside the vocabulary 0..98"),
    ({"pad_token_id": True}, "must be a token id, an integer, or None, got True"),
    ({"num_labels": 0}, "must be a positive integer below 2**63, got 0"),
    ({"num_labels": "3", "id2label": {0: "a"}}, "must be a positive integer below 2**63, got '3'"),
    ({"id2label": {1: "a", 2: "b"}}, "must be a dictionary from 0, 1, ... to names, or None, got {1: 'a', 2: 'b'}"),
    ({"label2id": {"a": None}}, "must be a dictionary from names to numbers, or None"),
    ({"problem_type": "classification"}, "'classification' is unknown; choose one of ['regression', "),
    ({"dtype": "int8"}, "must be a type of floating-point numbers"),
    ({"output_attentions": "false"}, "must be True or False, or None, got 'false'"),
    ({"is_encoder_decoder": True}, "must be False: for a model with an encoder"),
    ({"hidden_size": 33}, "(33) must be divisible by `num_attention_heads` (4)"),
    ({"moe_layer_positions": [0, 1, 7, 9]}, "[7, 9] lie outside 0..num_hidden_layers (2)"),
    ({"pad_token_id": -1}, "-1 lies outside the vocabulary"),
    ({"hidden_act": "rlu"}, "'rlu' is unknown"),
    ({"hidden_act": ["gelu"]}, "['gelu'] is unknown; choose one of ["),
    ({"router_fingerprint": "ab"}, "must be 64 hexadecimal digits"),
    ({"pruned_tokens": ["!"]}, "must be a list of strings, as `prune_experts` writes it"),
    ({"expert_capacity_factor": 1e300}, "must be None (no token is dropped) or > 0, and finite, got 1e+300"),
    ({"balance_loss_warmup_tokens": 2**63}, "is a number of tokens, an integer >= 0 and below 2**63"),
    ({"center_balance_loss": "no"}, "must be True or False, got 'no'"),
    (
        {"center_balance_loss": True, "router_type": "switch"},
        "centres the balance loss of StableMoE, which 'switch' has",
    ),
    ({"vocab_size": 2**62, "hidden_size": 4}, "x `hidden_size` (4): no tensor can hold so many numbers"),
]


@pytest.mark.parametrize(("fields", "message"), MISREAD)
def test_a_value_that_would_be_misread_is_refused_with_its_field(fields, message):
    with pytest.raises(ValueError, match=rf"^`{next(iter(fields))}` .*{re.escape(message)}"):
        tiny_config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_start_token_id": 91}, "91 lies outside the vocabulary 0..90"),
        ({"pad_token_id": None}, "None lies outside the vocabulary 0..90"),
        ({"is_encoder_decoder": False}, "must be True: for a model without encoder"),
    ],
)
def test_what_a_decoder_needs_is_refused_with_its_field(fields, message):
    with pytest.raises(ValueError, match=rf"^`{next(iter(fields))}` .*{re.escape(message)}"):
        tiny_seq2seq_config(**fields)


@pytest.mark.parametrize("make", [tiny_config, tiny_seq2seq_config])
def test_every_field_has_a_rule(make):
    config = make()
    assert {field.name for field in dataclasses.fields(config)} <= config._rules.keys()


INTEGERS = st.integers(-3, 120) | st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64 + 1, 10**30])
SCALARS = (
    st.none()
    | st.booleans()
    | INTEGERS
    | st.floats(-2, 130)
    | st.sampled_from(
        [NAN, INF, -INF, 1e39, -0.0, 5e-324, np.int64(4), np.float32(0.5), np.bool_(True), np.uint64(2**63)]
    )
    | st.text(max_size=4)
    | st.sampled_from(["true", "false", "None", "0", "gelu", "stable", "counts", "float32", "ab" * 32, b"1", 1j])
)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.dictionaries(st.integers(-1, 2) | st.text(max_size=2), SCALARS, max_size=2)
)


def refusal(act) -> str | None:
    try:
        act()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("make", [tiny_config, tiny_seq2seq_config])
@settings(max_examples=100, deadline=None)
@given(data=st.data(), value=VALUES)
def test_any_value_of_any_field_is_either_kept_and_saved_or_refused_by_name(make, data, value):
    types = {field.name: field.type for field in dataclasses.fields(make())}
    name = data.draw(st.sampled_from(sorted(types)))
    config, refused = make(), refusal(lambda: make(**{name: value}))
    # What is set later is refused when it is set, or at the latest when a model is built or the config saved.
    refused_later = refusal(lambda: (setattr(config, name, value), config.validate_architecture()))
    if refused is not None:
        assert f"`{name}`" in refused
        assert f"`{name}`" in refused_later
        return
    config = make(**{name: value})
    kept = getattr(config, name)
    if value is not None and name not in ("moe_layer_positions", "id2label", "label2id", "dtype"):
        assert kept == value
    # huggingface_hub's own reading of the annotation; a whole number is a number, too.
    type_validator(name, float(kept) if "float" in str(types[name]) and kept is not None else kept, types[name])
    assert type(config)(**json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_what_is_set_later_is_checked_like_what_is_set_first(tmp_path):
    config = tiny_config()
    with pytest.raises(ValueError, match="`use_cache` must be True or False, got 'no'"):
        config.use_cache = "no"
    assert config.use_cache is True
    config.vocab_size = 1  # which leaves out the padding token
    for act in (StableMoEForCausalLM, StableMoEForSequenceClassification, lambda _: config.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="`pad_token_id` 1 lies outside the vocabulary"):
            act(config)
    assert not list(tmp_path.iterdir())
    config = tiny_config()
    config.balance_loss_coef = None  # at the start that of the router
    with pytest.raises(ValueError, match="`balance_loss_coef` must be a finite number"):
        StableMoEForCausalLM(config)


def test_a_config_file_and_what_overrides_it_are_checked(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    for fields, message in (
        ({"output_router_logits": "false"}, "`output_router_logits` must be True or False"),
        ({"hidden_size": 33}, r"`hidden_size` \(33\) must be divisible"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(tmp_path, **fields)
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, **fields)
    edit_config(tmp_path, num_experts=0)
    with pytest.raises(ValueError, match=r"^`num_experts` must be a positive integer below 2\*\*63, got 0\.$"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("make", [tiny_config, tiny_seq2seq_config])
def test_a_config_is_loaded_for_the_dtype_of_the_weights(make, tmp_path):
    make().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, dtype="auto").dtype == "auto"


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    given_numbers = {"vocab_size": np.int64(99), "dropout": np.float32(0.5), "eos_token_id": [np.int32(3)]}
    config = tiny_config(**given_numbers)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.vocab_size, loaded.dropout, loaded.eos_token_id) == (99, 0.5, [3])


def test_positions_follow_the_number_of_blocks_by_either_name():
    config = tiny_seq2seq_config(num_hidden_layers=8, encoder_moe_layer_positions=None)
    assert config.encoder_moe_layer_positions == [4]


@pytest.mark.parametrize("build", [tiny_model, tiny_seq2seq_model])
def test_the_coefficient_of_routing_losses_reads_zero_where_there_are_none(build, tmp_path):
    model = build(router_aux_loss_coef=0.5)
    config = model.config
    assert (config.router_aux_loss_coef, config.routing_loss_factor) == (0.5, 0.5)
    model.freeze_router()
    assert (config.router_aux_loss_coef, config.routing_loss_factor) == (0.0, 0.5)
    assert config.to_dict()["router_aux_loss_coef"] == 0.5
    model.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert (loaded.router_aux_loss_coef, loaded.routing_loss_factor) == (0.0, 0.5)
    loaded.router_aux_loss_coef = loaded.router_aux_loss_coef
    assert loaded.routing_loss_factor == 0.5, "what was read is written back"
    loaded.router_fingerprint = None
    assert copy.deepcopy(loaded).router_aux_loss_coef == 0.5
    loaded.router_aux_loss_coef = 0.25
    assert (loaded.router_aux_loss_coef, loaded.routing_loss_factor) == (0.25, 0.25)
    with pytest.raises(ValueError, match="`router_aux_loss_coef` must be a finite number"):
        loaded.router_aux_loss_coef = -1.0


def test_a_dense_model_and_a_hash_have_no_routing_losses_to_count():
    assert tiny_config(moe_layer_positions=[]).router_aux_loss_coef == 0.0
    assert tiny_seq2seq_config(encoder_moe_layer_positions=[]).router_aux_loss_coef == 1.0
    sides = {"encoder_moe_layer_positions": [], "decoder_moe_layer_positions": []}
    assert tiny_seq2seq_config(**sides).router_aux_loss_coef == 0.0
    assert tiny_model(router_type="hash").config.router_aux_loss_coef == 0.0


def test_a_model_that_learns_takes_its_routing_losses_whatever_fingerprint_its_config_has():
    model, ids = tiny_model(), random_ids()
    expected = model.train()(ids, labels=ids).loss
    model.config.router_fingerprint = "0" * 64
    assert torch.equal(model(ids, labels=ids).loss, expected)
