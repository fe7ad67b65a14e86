"""A dense GPT-2 or OPT becomes a StableMoE with the same logits."""

import copy
import re

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    T5Config,
)

from helpers.dense_models import tiny_gpt2, tiny_opt
from helpers.matrices import one_fast
from helpers.models import random_ids
from modeling_stablemoe import StableMoEForCausalLM


SMALL = {"num_experts": 4, "num_expert_sublayers": 2, "distilled_router_dim": 8}
# The settings for a small stage 1, of the README.
STAGE1 = {
    "balance_loss_coef": 0.0,
    "expert_bias_rate": 0.01,
    "distilled_router": "counts",
    "share_experts_in_stage1": True,
    "reset_gates_at_freeze": True,
    "max_frozen_load": 1.05,
    "frozen_load_bands": 8,
}
DENSE = {
    "gpt2": tiny_gpt2,
    "gpt2-untied": lambda: tiny_gpt2(tie_word_embeddings=False),
    "gpt2-relu": lambda: tiny_gpt2(activation_function="relu", n_inner=None, layer_norm_epsilon=1e-3),
    "opt": tiny_opt,
    "opt-post-norm": lambda: tiny_opt(do_layer_norm_before=False),
    "opt-untied": lambda: tiny_opt(tie_word_embeddings=False),
}


def convert(dense, **options) -> StableMoEForCausalLM:
    return StableMoEForCausalLM.from_dense(dense, **{**SMALL, **options})


@torch.no_grad()
def logits(model, *args, seed: int = 1, **kwargs) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(*args, **kwargs).logits


# Each dense model with each attention, each dtype with both.
@pytest.mark.parametrize(
    ("name", "attention", "dtype"),
    [
        (name, attention, (torch.float32, torch.bfloat16)[(index + shift) % 2])
        for index, name in enumerate(DENSE)
        for shift, attention in enumerate(("eager", "sdpa"))
    ],
)
def test_logits_are_the_same_bits_in_both_modes_and_both_stages(name, dtype, attention):
    dense = DENSE[name]().to(dtype)
    dense.set_attn_implementation(attention)
    model = convert(dense)
    assert (model.dtype, model.config._attn_implementation, model.training) == (dtype, attention, False)
    ids = random_ids(3, 9)
    for stage in (1, 2):
        assert model.routing_stage == stage
        for training in (False, True):  # dropout draws the same numbers
            dense.train(training)
            model.train(training)
            assert torch.equal(logits(model, ids), logits(dense, ids))
        if stage == 1:
            model.freeze_router()


@pytest.mark.parametrize(
    "options",
    [
        STAGE1,
        {"moe_layer_positions": [0, 2, 3]},
        {"moe_layer_positions": []},
        *({"router_type": kind} for kind in ("hash", "switch", "base")),
    ],
)
def test_routing_and_places_of_experts_change_no_logit(options):
    dense, ids = tiny_gpt2(), random_ids(3, 9)
    model = convert(dense, **options)
    assert torch.equal(logits(model, ids), logits(dense, ids))
    for name, value in options.items():
        assert getattr(model.config, name) == value


@pytest.mark.pairs
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "opt", *one_fast("opt-post-norm", "gpt2-untied", "gpt2-relu", "opt-untied")])
def test_padded_texts_are_continued_alike(name, attention):
    dense = DENSE[name]()
    dense.set_attn_implementation(attention)
    model, ids = convert(dense), random_ids(4, 7)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 1, "eos_token_id": 98}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    for stage in (1, 2):
        assert model.routing_stage == stage
        expected, actual = dense.generate(ids, **options), model.generate(ids, **options)
        assert torch.equal(actual.sequences, expected.sequences)
        for ours, theirs in zip(actual.logits, expected.logits, strict=True):
            # For few rows a CPU multiplies by a matrix that is stored transposed with another kernel.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if name.startswith("opt") else 1e-5)
        if stage == 1:
            model.freeze_router()


def test_padding_is_not_counted_in_positions():
    ids, mask = random_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    for dense in (tiny_gpt2(), tiny_opt()):
        # GPT-2 itself counts padding unless it is told positions, as `generate` does.
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if isinstance(dense, GPT2LMHeadModel) else {}
        expected = logits(dense, ids, attention_mask=mask, **positions)[mask.bool()]
        assert torch.equal(logits(convert(dense), ids, attention_mask=mask)[mask.bool()], expected)


def test_heads_of_other_widths_agree_up_to_rounding():
    dense, ids = tiny_opt(num_attention_heads=4), random_ids(3, 9)
    torch.testing.assert_close(logits(convert(dense), ids), logits(dense, ids), rtol=0, atol=1e-5)


def test_the_dense_part_trains_as_the_dense_model_does():
    dense, ids = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train(), random_ids(3, 9)
    model = convert(dense, moe_layer_positions=[]).train()
    dense(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    theirs, ours = dict(dense.named_parameters()), dict(model.named_parameters())
    assert len(ours) == len(theirs) + 4 * 3  # queries, keys and values of a block are one matrix there
    for name, old in (
        ("model.embed_tokens.weight", "transformer.wte.weight"),
        ("model.embed_positions.weight", "transformer.wpe.weight"),
        ("model.norm.bias", "transformer.ln_f.bias"),
    ):
        torch.testing.assert_close(ours[name].grad, theirs[old].grad)
    block, old = "model.layers.2", "transformer.h.2"
    torch.testing.assert_close(ours[f"{block}.mlp.up_proj.weight"].grad, theirs[f"{old}.mlp.c_fc.weight"].grad.T)
    parts = [ours[f"{block}.self_attn.{part}_proj.weight"].grad.T for part in "qkv"]
    torch.testing.assert_close(torch.cat(parts, dim=1), theirs[f"{old}.attn.c_attn.weight"].grad)


def test_config_takes_over_what_the_dense_model_determines():
    dense = tiny_gpt2(tie_word_embeddings=False, layer_norm_epsilon=1e-4, eos_token_id=[3, 4], pad_token_id=5)
    config = convert(dense).config
    assert (
        config.to_dict()
        | {
            "vocab_size": 99,
            "hidden_size": 48,
            "intermediate_size": 53,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "hidden_act": "gelu_new",
            "max_position_embeddings": 64,
            "position_embedding_type": "learned",
            "do_layer_norm_before": True,
            "layer_norm_eps": 1e-4,
            "dropout": 0.1,
            "attention_dropout": 0.2,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": [3, 4],
            "pad_token_id": 5,
            "num_experts": 4,
            "moe_layer_positions": [1],
        }
        == config.to_dict()
    )
    # Without options: the paper's experts, in the middle (tables 4 and 7).
    default = StableMoEForCausalLM.from_dense(tiny_gpt2()).config
    assert (default.num_experts, default.num_expert_sublayers, default.moe_layer_positions) == (32, 3, [1])
    assert convert(tiny_opt(do_layer_norm_before=False)).config.do_layer_norm_before is False


def test_new_experts_are_those_of_a_new_model_and_draw_as_many_random_numbers():
    dense = tiny_gpt2()
    torch.manual_seed(7)
    model = convert(dense, **STAGE1)
    following = torch.rand(1)
    torch.manual_seed(7)
    expected = AutoModelForCausalLM.from_config(model.config)
    assert torch.equal(torch.rand(1), following)
    parts = {name: tensor for name, tensor in model.state_dict().items() if ".moe_layers." in name}
    assert len(parts) > 10
    for name, tensor in parts.items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_generation_settings_come_along_and_the_dense_model_stays_as_it_is():
    dense = tiny_gpt2()
    dense.generation_config.top_k, dense.generation_config.pad_token_id = 7, 9
    before = copy.deepcopy(dense.state_dict())
    model = convert(dense)
    assert (model.generation_config.top_k, model.generation_config.pad_token_id) == (7, 9)
    model.generation_config.top_k = 3
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.zero_()
    assert dense.generation_config.top_k == 7
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2-untied", "opt"])
def test_checkpoint_of_a_folder_is_converted_and_survives_saving(name, tmp_path):
    dense, ids = DENSE[name](), random_ids(3, 9)
    dense.save_pretrained(tmp_path / "dense")
    model = convert(tmp_path / "dense", dtype="bfloat16", attn_implementation="eager")
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    convert(str(tmp_path / "dense")).save_pretrained(tmp_path / "moe")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert isinstance(loaded, StableMoEForCausalLM)
    assert torch.equal(logits(loaded, ids), logits(dense, ids))
    assert loaded.config.dtype == torch.float32
    assert (tmp_path / "moe" / "modeling_stablemoe.py").exists()


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (tiny_gpt2, "scale_attn_weights", False),
        (tiny_gpt2, "scale_attn_by_inverse_layer_idx", True),
        (tiny_gpt2, "reorder_and_upcast_attn", True),
        (tiny_gpt2, "add_cross_attention", True),
        (tiny_opt, "enable_bias", False),
        (tiny_opt, "layer_norm_elementwise_affine", False),
        (tiny_opt, "_remove_final_layer_norm", True),
        (tiny_opt, "word_embed_proj_dim", 24),
        (tiny_opt, "layerdrop", 0.1),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_value(make, field, value):
    with pytest.raises(ValueError, match=rf"`{field}` is {value}"):
        convert(make(**{field: value}))


def test_dropouts_that_differ_want_a_choice():
    dense, ids = tiny_gpt2(embd_pdrop=0.3), random_ids(3, 9)
    with pytest.raises(ValueError, match=r"`resid_pdrop` \(0.1\) and `embd_pdrop` \(0.3\) differ"):
        convert(dense)
    model = convert(dense, dropout=0.3, attention_dropout=0.0)
    assert (model.config.dropout, model.config.attention_dropout) == (0.3, 0.0)
    assert torch.equal(logits(model, ids), logits(dense, ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 24}, "hidden_size: no options of a conversion"),
        ({"num_expert": 3}, "num_expert: no options of a conversion.*num_experts"),
        ({"router_fingerprint": "0", "hidden_act": "relu"}, "hidden_act, router_fingerprint: no options"),
        ({"num_experts": 0}, "`num_experts` must be a positive integer below 2..63, got 0"),
        ({"moe_layer_positions": [4]}, r"`moe_layer_positions` \[4\] lie outside 0..num_hidden_layers \(3\)"),
        ({"revision": "main", "dtype": "float32"}, "revision, dtype: these load a checkpoint"),
        ({"experts_implementation": "sonicmoe"}, "experts_implementation"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        convert(tiny_gpt2(), **options)


def test_other_models_are_refused_before_anything_is_loaded(tmp_path):
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(ValueError, match="A 't5' model is no decoder-only language model"):
        convert(tmp_path)
    with pytest.raises(ValueError, match="A 'stablemoe' model is no decoder-only language model"):
        convert(convert(tiny_gpt2()))
    with pytest.raises(ValueError, match="needs a GPT2LMHeadModel, got a GPT2Model"):
        convert(tiny_gpt2().transformer)
    with pytest.raises(OSError, match="couldn't find"):
        convert("nowhere")


def test_tensors_too_many_or_missing_are_refused_by_name(tmp_path):
    config = GPT2Config(**{**tiny_gpt2().config.to_dict(), "num_labels": 3})
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="holds more than its architecture has: score.weight"):
        convert(tmp_path / "classifier")
    untied = tiny_gpt2(tie_word_embeddings=False)
    untied.transformer.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=re.escape("lacks lm_head.weight")):
        convert(tmp_path / "headless")
    adapted = tiny_gpt2()
    adapted.transformer.h[1].attn.c_attn.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"no place for: transformer\.h\.1\.attn\.c_attn\.extra"):
        convert(adapted)
    shorter = tiny_gpt2()
    shorter.config.n_layer = 2
    with pytest.raises(ValueError, match=r"no place for: transformer\.h\.2"):
        convert(shorter)
    longer = tiny_gpt2()
    longer.config.n_layer = 4
    with pytest.raises(ValueError, match=r"has no tensor `transformer\.h\.3\.ln_1\.weight`"):
        convert(longer)
    wider = tiny_gpt2()
    wider.config.n_positions = 70
    with pytest.raises(
        ValueError, match=r"`model.embed_positions.weight` is \[64, 48\] in the dense model, \[70, 48\]"
    ):
        convert(wider)
    parted = tiny_gpt2(tie_word_embeddings=False)
    parted.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="`tie_word_embeddings` is True, but the head"):
        convert(parted)
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight.*not in memory"):
        convert(tiny_gpt2().to("meta"))


def test_causal_masks_of_old_checkpoints_are_no_weights(tmp_path):
    dense, ids = tiny_gpt2(), random_ids(3, 9)
    state = dense.state_dict()
    for block in range(3):
        state[f"transformer.h.{block}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        state[f"transformer.h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    dense.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(logits(convert(tmp_path), ids), logits(dense, ids))
