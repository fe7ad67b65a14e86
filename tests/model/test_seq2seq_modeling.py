"""Tests of what an encoder-decoder alone has: labels as inputs of the decoder, outputs of the encoder as input, its config."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, DataCollatorForSeq2Seq

from helpers.models import padded, random_ids, tiny_config, tiny_seq2seq_config, tiny_seq2seq_model
from helpers.trainers import tiny_tokenizer
from modeling_stablemoe import (
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoEModel,
    StableMoESeq2SeqConfig,
    StableMoESeq2SeqModel,
)
from modeling_stablemoe.model.modeling_stablemoe_seq2seq import StableMoEDecoder, StableMoEEncoder


pytestmark = pytest.mark.pairs


PAD, START, EOS, IGNORED = 2, 1, 0, -100
SOURCES = [random_ids(1, length, seed=length, low=3, high=91)[0] for length in (6, 3, 5)]
TARGETS = [random_ids(1, length, seed=10 + length, low=3, high=91)[0] for length in (4, 7, 2)]
LOSSES = ("loss", "task_loss", "aux_loss", "balance_loss", "distillation_loss", "expert_load")


def batch_of(sources=SOURCES, targets=TARGETS) -> dict[str, torch.Tensor]:
    mask = padded([torch.ones_like(row) for row in sources], 0)
    return {"input_ids": padded(sources, PAD), "attention_mask": mask, "labels": padded(targets, IGNORED)}


def in_stage(stage: int, **overrides) -> StableMoEForConditionalGeneration:
    model = tiny_seq2seq_model(**overrides)
    if stage == 2:
        model.freeze_router()
    return model


def assert_same_losses(actual, expected):
    for name in LOSSES:
        assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# Labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([7, IGNORED, 9, EOS], [START, 7, PAD, 9]),
        ([5, EOS, IGNORED, IGNORED], [START, 5, EOS, PAD]),
        ([IGNORED, IGNORED, 7, EOS], [PAD, PAD, START, 7]),
        ([IGNORED] * 4, [START, PAD, PAD, PAD]),
    ],
)
def test_labels_are_shifted_into_the_inputs_of_the_decoder_behind_padding_on_the_left(labels, expected):
    given = torch.tensor([labels])
    assert tiny_seq2seq_model().prepare_decoder_input_ids_from_labels(given).tolist() == [expected]
    assert given.tolist() == [labels]


@pytest.mark.parametrize("kind", ["word_embedding", "cnn"])
@pytest.mark.parametrize("start", [START, PAD], ids=["start token", "start token is the pad token"])
@pytest.mark.parametrize("training", [True, False])
def test_neither_the_side_of_the_padding_nor_inputs_of_the_collator_change_loss_or_routing(training, start, kind):
    model = tiny_seq2seq_model(decoder_start_token_id=start, distilled_router=kind).train(training)
    targets = [*TARGETS[:2], TARGETS[2][:0]]
    expected = model(**batch_of(targets=targets), output_router_logits=True)
    assert expected.expert_load.sum(-1).tolist() == [14, 12, 12]
    features = [
        {"input_ids": source.tolist(), "labels": target.tolist()}
        for source, target in zip(SOURCES, targets, strict=True)
    ]
    for side in ("right", "left"):
        for collated in (True, False):
            tokenizer = tiny_tokenizer()
            tokenizer.padding_side = side
            batch = DataCollatorForSeq2Seq(tokenizer, model=model if collated else None)(features)
            assert batch["labels"][0].eq(IGNORED).tolist() == [side == "left"] * 3 + [False] + [side == "right"] * 3
            assert ("decoder_input_ids" in batch) is collated
            outputs = model(**batch, output_router_logits=True)
            assert_same_losses(outputs, expected)
            for row, target in enumerate(targets[:2]):
                own = outputs.logits[row, -len(target) :] if side == "left" else outputs.logits[row, : len(target)]
                assert_close(own, expected.logits[row, : len(target)], rtol=1e-4, atol=1e-5)
            assert model.count_tokens(**batch) == 14 + 12
            assert [mask.sum() for _, mask in model.routed_tokens(**batch)] == [14, 12, 12]


@pytest.mark.parametrize("stage", [1, 2])
def test_wider_padding_changes_no_loss_and_no_load(stage):
    model, batch = in_stage(stage).train(), batch_of()
    wider = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 2), value=PAD),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 2)),
        # The last token of the longest target becomes an input, but predicts nothing: it is no more than padding.
        "labels": torch.nn.functional.pad(batch["labels"], (0, 3), value=IGNORED),
    }
    assert_same_losses(model(**wider), model(**batch))


@pytest.mark.parametrize("start", [START, PAD], ids=["start token", "start token is the pad token"])
def test_a_prompt_of_the_decoder_that_is_not_predicted_is_routed(start):
    model, batch = tiny_seq2seq_model(decoder_start_token_id=start).train(), batch_of()
    ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    batch["labels"][1, :3] = IGNORED
    assert model(**batch, decoder_input_ids=ids).expert_load.sum(-1).tolist() == [14, 13, 13]


@pytest.mark.parametrize("kind", ["word_embedding", "cnn"])
def test_labels_may_go_on_from_a_cache(kind):
    model, batch = tiny_seq2seq_model(distilled_router=kind).eval(), batch_of()
    ids = model.prepare_decoder_input_ids_from_labels(batch.pop("labels"))
    labels = padded([row[2:] for row in TARGETS], IGNORED)
    expected = model(**batch, decoder_input_ids=ids).logits[:, 2:]
    cache = model(**batch, decoder_input_ids=ids[:, :2], use_cache=True).cache
    outputs = model(**batch, decoder_input_ids=ids[:, 2:], labels=labels, cache=cache, output_router_logits=True)
    real = labels != IGNORED
    assert_close(outputs.logits[real], expected[real], rtol=1e-4, atol=1e-5)
    assert outputs.expert_load[1:].sum(-1).tolist() == [8, 8]  # the start of the last target, which is at its end


def test_ignored_labels_inside_a_target_are_routed():
    model, batch = tiny_seq2seq_model().train(), batch_of()
    batch["labels"][1, 1:4] = IGNORED
    assert model(**batch).expert_load.sum(-1).tolist() == [14, 13, 13]
    assert model.count_targets(batch["labels"]).item() == 10


def test_a_mask_of_the_decoder_that_is_given_is_used():
    model, batch = tiny_seq2seq_model().train(), batch_of()
    mask = torch.ones_like(batch["labels"])
    assert model(**batch, decoder_attention_mask=mask).expert_load.sum(-1).tolist() == [14, 21, 21]


def test_the_pad_token_as_input_of_the_decoder_without_labels_is_a_token():
    ids = padded(TARGETS, PAD)
    outputs = tiny_seq2seq_model().eval()(padded(SOURCES, PAD), decoder_input_ids=ids, output_router_logits=True)
    assert outputs.expert_load.sum(-1).tolist() == [18, 21, 21]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_switching_the_experts_implementation_reaches_both_sides(implementation, monkeypatch):
    from modeling_stablemoe.model.experts_stablemoe import ALL_STABLEMOE_EXPERTS_FUNCTIONS

    used, function = [], ALL_STABLEMOE_EXPERTS_FUNCTIONS[implementation]
    eager, other = (tiny_seq2seq_model().eval() for _ in range(2))
    eager.set_experts_implementation("eager")
    other.set_experts_implementation(implementation)
    monkeypatch.setitem(
        ALL_STABLEMOE_EXPERTS_FUNCTIONS._global_mapping,
        implementation,
        lambda module, *args: used.append(module) or function(module, *args),
    )
    expected = eager(**batch_of()).logits
    assert used == []
    assert_close(other(**batch_of()).logits, expected, rtol=1e-4, atol=1e-5)
    assert used == [layer.expert_stack for layer in other.moe_layers_by_name.values()]


# Outputs of the encoder in place of a source


RECORDED = (
    "output_router_logits",
    "output_expert_indices",
    "output_distilled_router_logits",
    "output_routing_traces",
)


@pytest.mark.parametrize("stage", [1, 2])
def test_training_goes_on_from_encoder_outputs_that_hold_their_routing(stage):
    model, batch = in_stage(stage).train(), batch_of()
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    encoded = model.model.encoder(**source, **dict.fromkeys(RECORDED, True))
    rest = {name: batch[name] for name in ("attention_mask", "labels")}
    assert_same_losses(model(encoder_outputs=encoded, **rest), model(**batch))


@pytest.mark.parametrize("recorded", [(), RECORDED[:1], RECORDED[:2], RECORDED[:3]])
def test_encoder_outputs_without_routing_are_refused_where_stage_1_learns(recorded):
    model, batch = tiny_seq2seq_model().train(), batch_of()
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    encoded = model.model.encoder(**source, **dict.fromkeys(recorded, True))
    rest = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    with pytest.raises(
        ValueError, match=r"^`encoder_outputs` hold no routing, .* `output_router_logits=True, .*`input_ids`"
    ):
        model(**rest)
    with pytest.raises(ValueError, match="hold no routing"):
        model(**{**rest, "encoder_outputs": (encoded.last_hidden_state,)})
    # Neither evaluation nor stage 2 needs it.
    assert model.eval()(**rest).loss.isfinite()
    model.train().freeze_router()
    rest["encoder_outputs"] = model.model.encoder(**source)
    assert_close(model(**rest).loss, model(**batch).loss, rtol=1e-6, atol=0)


def test_a_dense_encoder_has_no_routing_to_hold():
    model, batch = tiny_seq2seq_model(encoder_moe_layer_positions=[]).train(), batch_of()
    encoded = model.model.encoder(batch["input_ids"], batch["attention_mask"])
    rest = {name: batch[name] for name in ("attention_mask", "labels")}
    assert_same_losses(model(encoder_outputs=encoded, **rest), model(**batch))


# Configuration


BAD = {
    "position_embedding_type": ["rotary", None, ["learned"]],
    "scale_embedding": ["yes", None, 1],
    "do_layer_norm_before": ["no", None, 0],
    "label_smoothing": [-0.1, 1, 1.0, float("nan"), "0.1", True, None],
    "encoder_layers": [0, -1, 2.0, "2", True, None],
    "decoder_layers": [0, -1, 2.0, "2", True, None],
    "encoder_moe_layer_positions": [[3], [-1], 1, ["1"], [True]],
    "decoder_moe_layer_positions": [[4], [-1], 1, ["1"], [True]],
    "pad_token_id": [None, -1, 91, "0", True, 1.0],
    "decoder_start_token_id": [None, -1, 91, "0", True, 1.0],
    "is_encoder_decoder": [False],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_fields_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^`{name}` "):
        tiny_seq2seq_config(**{name: value})


@pytest.mark.parametrize("name", ["position_embedding_type", "scale_embedding", "do_layer_norm_before"])
def test_bad_fields_of_a_language_model_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^`{name}` "):
        tiny_config(**{name: "no"})


def test_defaults_are_the_translation_model_of_the_paper():
    config = StableMoESeq2SeqConfig()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (64000, 512, 2048)
    assert (config.encoder_layers, config.decoder_layers, config.num_attention_heads) == (6, 6, 8)
    assert (config.encoder_moe_layer_positions, config.decoder_moe_layer_positions) == ([3], [3])
    assert (config.num_experts, config.num_expert_sublayers, config.distilled_router_dim) == (32, 3, 50)
    assert (config.dropout, config.attention_dropout, config.label_smoothing) == (0.1, 0.0, 0.1)
    assert (config.max_position_embeddings, config.balance_loss_coef) == (256, 0.3)
    assert (config.position_embedding_type, config.scale_embedding, config.do_layer_norm_before) == (
        "sinusoidal",
        True,
        False,
    )
    assert config.is_encoder_decoder
    assert config.num_moe_layers == 2
    assert isinstance(AutoConfig.for_model("stablemoe-seq2seq"), StableMoESeq2SeqConfig)


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        (StableMoEForConditionalGeneration, tiny_config, "needs a StableMoESeq2SeqConfig, got a StableMoEConfig"),
        (StableMoESeq2SeqModel, tiny_config, "needs a StableMoESeq2SeqConfig, got a StableMoEConfig"),
        (StableMoEEncoder, tiny_config, "needs a StableMoESeq2SeqConfig, got a StableMoEConfig"),
        (StableMoEDecoder, tiny_config, "needs a StableMoESeq2SeqConfig, got a StableMoEConfig"),
        (StableMoEForCausalLM, tiny_seq2seq_config, "needs a StableMoEConfig, got a StableMoESeq2SeqConfig"),
        (StableMoEModel, tiny_seq2seq_config, "needs a StableMoEConfig, got a StableMoESeq2SeqConfig"),
    ],
)
def test_a_config_of_the_other_kind_is_refused(model_class, config, message):
    with pytest.raises(ValueError, match=rf"^{model_class.__name__} {message}\.$"):
        model_class(config())
