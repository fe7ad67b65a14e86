"""Tests of sequence-to-sequence checkpoints: what is written, where it loads, what is refused, other vocabularies."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from helpers import ROOT
from helpers.checkpoints import edit_config, edit_weights, run_without_package
from helpers.models import random_ids, tiny_model, tiny_seq2seq_config, tiny_seq2seq_model
from modeling_stablemoe import (
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoEModel,
    StableMoESeq2SeqConfig,
    StableMoESeq2SeqModel,
)


pytestmark = pytest.mark.pairs


SOURCE, TARGET = random_ids(3, 7, low=3, high=91), random_ids(3, 5, seed=1, low=3, high=91)
EVERY_ID = torch.arange(91).unsqueeze(0)
LAYERS = ["model.encoder.moe_layers.0", "model.decoder.moe_layers.0", "model.decoder.moe_layers.1"]
TABLES = [f"{layer}.frozen_router.routing_table" for layer in LAYERS]
CODE_FILES = {"configuration_stablemoe.py", "modeling_stablemoe_seq2seq.py"}
AUTO_MAP = {
    "AutoConfig": "configuration_stablemoe.StableMoESeq2SeqConfig",
    "AutoModel": "modeling_stablemoe_seq2seq.StableMoESeq2SeqModel",
    "AutoModelForSeq2SeqLM": "modeling_stablemoe_seq2seq.StableMoEForConditionalGeneration",
}
EMBEDDINGS = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"]


def in_stage(stage: int, **overrides) -> StableMoEForConditionalGeneration:
    model = tiny_seq2seq_model(**overrides).eval()
    if stage == 2:
        model.freeze_router()
    return model


@pytest.fixture(scope="module")
def source() -> StableMoEForConditionalGeneration:
    return in_stage(2)


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory) -> Path:
    """A frozen model on disk; tests that change it take `copied`."""
    path = tmp_path_factory.mktemp("checkpoint") / "frozen"
    source.save_pretrained(path)
    return path


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


@torch.no_grad()
def assert_same_model(model, source):
    # Weights mapped from a file are aligned differently in memory, which costs the last bit of a product.
    assert model.routing_stage == source.routing_stage
    assert model.router_fingerprint() == model.config.router_fingerprint == source.router_fingerprint()
    assert torch.equal(model.route(EVERY_ID), source.route(EVERY_ID))
    actual, expected = (of(SOURCE, decoder_input_ids=TARGET)[0] for of in (model.eval(), source))
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# What is written and where it loads


def test_a_checkpoint_holds_its_code_its_tables_and_the_embedding_once(checkpoint, source):
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json"} | CODE_FILES
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["StableMoEForConditionalGeneration"]
    assert config["router_fingerprint"] == source.router_fingerprint()
    weights = load_file(checkpoint / "model.safetensors")
    assert [name for name in EMBEDDINGS if name in weights] == EMBEDDINGS[:1]
    for layer, table in enumerate(TABLES):
        assert weights[table].dtype == torch.int32
        assert torch.equal(weights[table].long(), source.route(EVERY_ID)[layer, 0])
    assert not [name for name in weights if "embed_positions" in name]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trips_change_nothing_in_either_stage(tmp_path, stage, tied):
    model = in_stage(stage, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded, info = StableMoEForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_model(loaded, model)
    weights = dict(loaded.named_parameters(remove_duplicate=False))
    assert len({id(weights[name]) for name in EMBEDDINGS}) == (1 if tied else 3)
    assert list(weights) == [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter), name


def test_auto_classes_load_the_classes_of_the_package(checkpoint, source):
    assert type(AutoConfig.from_pretrained(checkpoint)) is StableMoESeq2SeqConfig
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    assert type(model) is StableMoEForConditionalGeneration
    assert_same_model(model, source)
    backbone, info = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert type(backbone) is StableMoESeq2SeqModel
    assert not any(info.values()), info
    assert_same_model(backbone, source.model)
    assert backbone.decoder.embed_tokens.weight is backbone.encoder.embed_tokens.weight


def test_the_backbone_alone_is_saved_whole(source, tmp_path):
    source.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert_same_model(AutoModel.from_pretrained(tmp_path), source.model)


def test_shards_and_bfloat16_keep_the_routing(source, tmp_path):
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same_model(StableMoEForConditionalGeneration.from_pretrained(tmp_path), source)
    half = StableMoEForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.route(EVERY_ID), source.route(EVERY_ID))
    assert half.generate(SOURCE, max_new_tokens=3, min_new_tokens=3).shape == (3, 4)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_state_dict_brings_the_stage_of_both_sides(source, stage):
    # What Trainer does on resuming; encoder and decoder are models of their own that share the config of the whole.
    saved = in_stage(stage)
    model = tiny_seq2seq_model(seed=3).eval()
    model.load_state_dict(saved.state_dict())
    assert_same_model(model, saved)
    sides = [layer.frozen_router.is_frozen for layer in model.moe_layers_by_name.values()]
    assert sides == [stage == 2] * 3


def test_a_state_dict_of_another_frozen_routing_is_refused_untouched(source):
    other = tiny_seq2seq_model(seed=3)
    other.freeze_router()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    with pytest.raises(ValueError, match="are not those that this checkpoint was saved with"):
        source.load_state_dict(other.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


def test_remote_code_and_a_fresh_interpreter_with_the_package_give_the_same_model(checkpoint, source, tmp_path):
    code = """
        import sys
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
        checkpoint, resaved, results, repository = sys.argv[1:]
        ids, target, every_id = torch.load(results + "/inputs.pt")

        def facts(path, home, **options):
            assert type(AutoConfig.from_pretrained(path, **options)).__module__.startswith(home)
            model = AutoModelForSeq2SeqLM.from_pretrained(path, **options)
            assert type(model).__module__.startswith(home), type(model)
            backbone = AutoModel.from_pretrained(path, **options)
            assert type(backbone).__name__ == "StableMoESeq2SeqModel"
            with torch.no_grad():
                return model, {
                    "logits": model(ids, decoder_input_ids=target).logits,
                    "routes": model.route(every_id),
                    "fingerprints": [model.router_fingerprint(), backbone.router_fingerprint()],
                    "generated": model.generate(ids, max_new_tokens=4, num_beams=2),
                }

        model, first = facts(checkpoint, "transformers_modules.", trust_remote_code=True)
        model.save_pretrained(resaved)
        second = facts(resaved, "transformers_modules.", trust_remote_code=True)[1]
        sys.meta_path.pop(0)
        sys.path.insert(0, repository)
        import modeling_stablemoe
        third = facts(resaved, "modeling_stablemoe.")[1]
        torch.save([first, second, third], results + "/facts.pt")
    """
    results, resaved = tmp_path / "results", tmp_path / "resaved"
    results.mkdir()
    torch.save((SOURCE, TARGET, EVERY_ID), results / "inputs.pt")
    run_without_package(code, tmp_path / "elsewhere", checkpoint, resaved, results, ROOT)
    for facts in torch.load(results / "facts.pt"):
        assert facts["fingerprints"] == [source.router_fingerprint()] * 2
        assert torch.equal(facts["routes"], source.route(EVERY_ID))
        assert_close(facts["logits"], source(SOURCE, decoder_input_ids=TARGET).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(facts["generated"], source.generate(SOURCE, max_new_tokens=4, num_beams=2))
    assert CODE_FILES <= {path.name for path in resaved.iterdir()}
    assert json.loads((resaved / "config.json").read_text())["auto_map"].keys() == AUTO_MAP.keys()


# Damage


def change_row(weights):
    weights[TABLES[2]][5] = (weights[TABLES[2]][5] + 1) % 5


def swap(weights):
    weights[TABLES[0]], weights[TABLES[1]] = weights[TABLES[1]], weights[TABLES[0]]


NOT_THOSE = rf"^The routing tables of {', '.join(LAYERS)} are not those that this checkpoint was saved with"
DAMAGE = {
    "a row altered": (change_row, NOT_THOSE),
    "encoder and decoder swapped": (swap, NOT_THOSE),
    "a row not frozen": (
        lambda weights: weights[TABLES[1]].__setitem__(7, -1),
        rf"^The routing table `{TABLES[1]}` is damaged: token id 7 has no expert",
    ),
    "a row out of range": (
        lambda weights: weights[TABLES[0]].__setitem__(90, 5),
        rf"^The routing table `{TABLES[0]}` is damaged: token id 90 is sent to expert 5",
    ),
    "the encoder's table missing": (
        lambda weights: weights.pop(TABLES[0]),
        rf"^The config says that the routing is frozen .* the routing table of {LAYERS[0]} is missing",
    ),
    "the decoder's tables missing": (
        lambda weights: [weights.pop(name) for name in TABLES[1:]],
        rf"^The config says that the routing is frozen .* the routing table of {LAYERS[1]}, {LAYERS[2]} is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tables_are_refused_naming_the_layer(copied, damage):
    edit, message = DAMAGE[damage]
    edit_weights(copied, edit)
    for load in (StableMoEForConditionalGeneration.from_pretrained, AutoModelForSeq2SeqLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(copied)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_fingerprint": None}, NOT_THOSE),
        ({"router_fingerprint": "ab" * 32}, NOT_THOSE),
        (
            {"vocab_size": 90},
            r"do not fit its config: .*embed_tokens\.weight is \[91, 24\] in the weights, \[90, 24\]",
        ),
        ({"num_experts": 4}, r"do not fit its config: .*router\.centroids is \[5, 24\] in the weights, \[4, 24\]"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(copied, fields, message):
    edit_config(copied, **fields)
    with pytest.raises(ValueError, match=message):
        StableMoEForConditionalGeneration.from_pretrained(copied)


# Checkpoints of the other kind


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("language") / "model"
    tiny_model().save_pretrained(path)
    return path


@pytest.mark.parametrize("model_class", [StableMoEForConditionalGeneration, StableMoESeq2SeqModel])
def test_a_language_model_is_no_translation_model(language_model, model_class):
    message = r"^This is a 'stablemoe' checkpoint, not a 'stablemoe-seq2seq' one\. Load it with .* of its own kind"
    with pytest.raises(ValueError, match=message):
        model_class.from_pretrained(language_model)
    with pytest.raises(ValueError, match=message):
        StableMoESeq2SeqConfig.from_pretrained(language_model)


@pytest.mark.parametrize("model_class", [StableMoEForCausalLM, StableMoEModel])
def test_a_translation_model_is_no_language_model(checkpoint, model_class):
    with pytest.raises(ValueError, match=r"^This is a 'stablemoe-seq2seq' checkpoint, not a 'stablemoe' one\."):
        model_class.from_pretrained(checkpoint)


def test_auto_classes_refuse_checkpoints_of_the_other_kind_themselves(checkpoint, language_model):
    # transformers' own words: it looks the config's class up before it asks ours.
    message = r"Unrecognized configuration class .*StableMoE.*Config.* for this kind of AutoModel"
    with pytest.raises(ValueError, match=message):
        AutoModelForSeq2SeqLM.from_pretrained(language_model)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint)


# Other vocabularies


@pytest.mark.parametrize("size", [97, 80])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backbone", [False, True], ids=["whole", "backbone"])
def test_both_sides_follow_the_vocabulary(tmp_path, backbone, tied, stage, size):
    whole = in_stage(stage, tie_word_embeddings=tied)
    model = whole.model if backbone else whole
    stacks = whole.model
    kept = min(size, 91)
    routes, rows = model.route(EVERY_ID[:, :kept]), stacks.decoder.embed_tokens.weight[:kept].detach().clone()
    assert model.resize_token_embeddings(size, mean_resizing=False) is stacks.encoder.embed_tokens
    assert model.config.vocab_size == size
    embeddings = [stacks.encoder.embed_tokens, stacks.decoder.embed_tokens, *([] if backbone else [whole.lm_head])]
    assert [tuple(module.weight.shape) for module in embeddings] == [(size, 24)] * len(embeddings)
    assert len({id(module.weight) for module in embeddings}) == (1 if tied else len(embeddings))
    assert torch.equal(stacks.decoder.embed_tokens.weight[:kept], rows)
    every_id = torch.arange(size).unsqueeze(0)
    assert torch.equal(model.route(every_id)[..., :kept], routes)
    for layer in model.moe_layers_by_name.values():
        assert layer.frozen_router.routing_table.shape == (size,)
        assert layer.router.distilled_router.embedding.shape == (size, 7)
    assert model.routing_stage == stage
    assert model.config.router_fingerprint == model.router_fingerprint()
    if stage == 2 and size > 91:
        assert model.route(every_id)[..., 91:].tolist() == [[[v % 5 for v in range(91, size)]]] * 3
    if backbone:
        return
    last = torch.full((1, 4), size - 1)
    assert whole.train()(last, labels=last).loss.isfinite()
    whole.eval().save_pretrained(tmp_path)
    loaded = StableMoEForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.route(every_id), whole.route(every_id))
    assert_close(loaded(last, labels=last).logits, whole(last, labels=last).logits, rtol=1e-4, atol=1e-5)


def test_new_rows_of_an_untied_decoder_follow_the_same_rule_as_those_of_the_encoder():
    # By the mean of the old rows, with next to no variance, where that is asked for.
    for mean_resizing, spread in ((True, False), (False, True)):
        model = tiny_seq2seq_model(tie_word_embeddings=False, initializer_range=3.0)
        model.resize_token_embeddings(200, mean_resizing=mean_resizing)
        for stack in (model.model.encoder, model.model.decoder):
            assert (stack.embed_tokens.weight[91:].std() > 2).item() is spread


def test_a_new_embedding_is_shared_where_embeddings_are_tied():
    for tied in (True, False):
        model = tiny_seq2seq_model(tie_word_embeddings=tied)
        embedding = torch.nn.Embedding(91, 24)
        model.set_input_embeddings(embedding)
        assert model.get_input_embeddings() is embedding
        assert (model.model.decoder.embed_tokens is embedding) is tied


def test_the_config_of_a_checkpoint_keeps_both_depths(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    expected = tiny_seq2seq_config()
    for name in ("encoder_layers", "decoder_layers", "encoder_moe_layer_positions", "decoder_moe_layer_positions"):
        assert getattr(config, name) == getattr(expected, name)
