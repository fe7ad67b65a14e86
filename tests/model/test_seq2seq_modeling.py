"""Tests of the sequence-to-sequence model: sizes, labels, losses, recorded outputs, checkpointing, configuration."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    set_seed,
)

from helpers import ROOT
from helpers.models import (
    gradients,
    padded,
    random_ids,
    switch_checkpointing,
    tiny_config,
    tiny_seq2seq_config,
    tiny_seq2seq_model,
)
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


PRESETS = ROOT / "configuration" / "models"
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


def assert_same_losses(actual, expected, names=LOSSES):
    for name in names:
        assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# Sizes


def sizes(config: StableMoESeq2SeqConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = StableMoEForConditionalGeneration(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    counts = {"experts": 0, "routers": 0, "shared": 0}
    for name, parameter in model.named_parameters():
        kind = "experts" if "expert_stack" in name else "routers" if "router" in name else "shared"
        counts[kind] += parameter.numel()
    return counts


@pytest.mark.parametrize("preset", [None, "paper-translation"])
def test_the_translation_model_of_the_paper_has_the_parameters_of_its_table(preset):
    fields = {} if preset is None else json.loads((PRESETS / f"{preset}.json").read_text())
    counts = sizes(StableMoESeq2SeqConfig(**fields))
    assert counts["shared"] == pytest.approx(76.9e6, rel=0.001)
    assert counts["experts"] == pytest.approx(403.3e6, rel=0.001)
    assert counts["shared"] + counts["experts"] == pytest.approx(480e6, rel=0.001)
    dense = {f"{side}_moe_layer_positions": [] for side in ("encoder", "decoder")}
    assert sizes(StableMoESeq2SeqConfig(**{**fields, **dense})) == {**counts, "experts": 0, "routers": 0}


def test_encoder_decoder_and_head_share_one_embedding():
    model = tiny_seq2seq_model()
    embedding = model.get_input_embeddings().weight
    sharing = [n for n, p in model.named_parameters(remove_duplicate=False) if p is embedding]
    assert sharing == ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"]
    assert not [name for name, _ in model.named_parameters() if "embed_positions" in name]  # computed
    untied = tiny_seq2seq_model(tie_word_embeddings=False)
    assert len({id(p) for n, p in untied.named_parameters() if n in sharing}) == 3


def test_scaled_embeddings_of_the_paper_start_with_unit_variance():
    config = tiny_seq2seq_config(hidden_size=512, num_attention_heads=8, initializer_range=0.044)
    weight = StableMoEForConditionalGeneration(config).get_input_embeddings().weight
    assert (weight[3:].std() * 512**0.5).item() == pytest.approx(1.0, abs=0.02)


def test_new_experts_change_nothing():
    set_seed(0)
    model = StableMoEForConditionalGeneration(tiny_seq2seq_config()).eval()
    nowhere = {f"{side}_moe_layer_positions": [] for side in ("encoder", "decoder")}
    dense = StableMoEForConditionalGeneration(tiny_seq2seq_config(**nowhere)).eval()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "moe_layers" not in k})
    assert_close(model(**batch_of()).logits, dense(**batch_of()).logits, rtol=1e-6, atol=1e-6)


# Labels


def test_labels_are_shifted_into_the_inputs_of_the_decoder():
    labels = torch.tensor([[7, IGNORED, 9, EOS], [5, EOS, IGNORED, IGNORED]])
    kept = labels.clone()
    shifted = tiny_seq2seq_model().prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[START, 7, PAD, 9], [START, 5, EOS, PAD]]
    assert torch.equal(labels, kept)


def test_the_loss_is_at_the_labels_own_positions():
    model, batch = tiny_seq2seq_model().eval(), batch_of()
    batch["labels"][1, 2:4] = IGNORED
    outputs = model(**batch)
    expected = F.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten())
    assert_close((outputs.loss, outputs.task_loss), (expected, expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("start", [START, PAD], ids=["start token", "start token is the pad token"])
@pytest.mark.parametrize("training", [True, False])
def test_inputs_of_the_decoder_that_the_collator_makes_change_nothing(training, start):
    model = tiny_seq2seq_model(decoder_start_token_id=start).train(training)
    features = [
        {"input_ids": source.tolist(), "labels": target.tolist()}
        for source, target in zip(SOURCES, TARGETS, strict=True)
    ]
    collated = DataCollatorForSeq2Seq(tiny_tokenizer(), model=model)(features)
    batch = batch_of()
    assert {name: values.tolist() for name, values in collated.items() if name != "decoder_input_ids"} == {
        name: values.tolist() for name, values in batch.items()
    }
    assert collated["decoder_input_ids"][:, 0].tolist() == [start] * 3
    expected = model(**batch, output_router_logits=True)
    assert_same_losses(model(**collated, output_router_logits=True), expected)
    assert expected.expert_load.sum(-1).tolist() == [14, 13, 13]
    routed = model.routed_tokens(**batch), model.routed_tokens(**collated)
    for (ids, mask), (other_ids, other_mask) in zip(*routed, strict=True):
        assert torch.equal(ids, other_ids)
        assert torch.equal(mask, other_mask)


@pytest.mark.parametrize("stage", [1, 2])
def test_wider_padding_changes_no_loss_and_no_load(stage):
    model, batch = in_stage(stage).train(), batch_of()
    wider = {
        "input_ids": F.pad(batch["input_ids"], (0, 2), value=PAD),
        "attention_mask": F.pad(batch["attention_mask"], (0, 2)),
        # The last token of the longest target becomes an input, but predicts nothing: it is no more than padding.
        "labels": F.pad(batch["labels"], (0, 3), value=IGNORED),
    }
    assert_same_losses(model(**wider), model(**batch))


def test_a_batch_routes_as_many_tokens_as_its_rows_alone():
    model = tiny_seq2seq_model().train()
    alone = [
        model(**batch_of([source], [target])).expert_load for source, target in zip(SOURCES, TARGETS, strict=True)
    ]
    assert torch.equal(model(**batch_of()).expert_load, sum(alone))


def test_labels_padded_on_the_left_are_shifted_behind_their_padding():
    labels = torch.tensor([[IGNORED, IGNORED, 7, EOS], [7, IGNORED, 9, EOS], [IGNORED] * 4])
    shifted = tiny_seq2seq_model().prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[PAD, PAD, START, 7], [START, 7, PAD, 9], [START, PAD, PAD, PAD]]


@pytest.mark.parametrize("kind", ["word_embedding", "cnn"])
@pytest.mark.parametrize("start", [START, PAD], ids=["start token", "start token is the pad token"])
@pytest.mark.parametrize("collated", [True, False], ids=["inputs of the collator", "labels alone"])
def test_the_side_of_the_padding_changes_neither_loss_nor_routing(collated, start, kind):
    model = tiny_seq2seq_model(decoder_start_token_id=start, distilled_router=kind).eval()
    features = [
        {"input_ids": source.tolist(), "labels": target.tolist()}
        for source, target in zip(SOURCES, [*TARGETS[:2], TARGETS[2][:0]], strict=True)
    ]
    seen = {}
    for side in ("right", "left"):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = side
        batch = DataCollatorForSeq2Seq(tokenizer, model=model if collated else None)(features)
        assert (
            batch["labels"][0].eq(IGNORED).nonzero().flatten().tolist()
            == {
                "right": [4, 5, 6],
                "left": [0, 1, 2],
            }[side]
        )
        seen[side] = model(**batch, output_router_logits=True), batch
        assert model.count_tokens(**batch) == 14 + 12
    (right, _), (left, batch) = seen["right"], seen["left"]
    assert_same_losses(left, right)
    for row, target in enumerate(TARGETS[:2]):
        assert_close(left.logits[row, -len(target) :], right.logits[row, : len(target)], rtol=1e-4, atol=1e-5)
    assert [mask.sum() for _, mask in model.routed_tokens(**batch)] == [14, 12, 12]


def test_a_prompt_of_the_decoder_that_is_not_predicted_is_routed():
    batch = batch_of()
    ids = tiny_seq2seq_model().prepare_decoder_input_ids_from_labels(batch["labels"])
    batch["labels"][1, :3] = IGNORED
    for start in (START, PAD):
        model = tiny_seq2seq_model(decoder_start_token_id=start).train()
        outputs = model(**batch, decoder_input_ids=ids.where(ids != START, start))
        assert outputs.expert_load.sum(-1).tolist() == [14, 13, 13]


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
    batch = batch_of()
    batch["labels"][1, 1:4] = IGNORED
    model = tiny_seq2seq_model().train()
    assert model(**batch).expert_load.sum(-1).tolist() == [14, 13, 13]
    assert model.count_targets(batch["labels"]).item() == 10


def test_an_empty_target_is_its_start_token():
    model = tiny_seq2seq_model().train()
    outputs = model(**batch_of(SOURCES, [TARGETS[0], TARGETS[1], TARGETS[2][:0]]))
    assert outputs.expert_load.sum(-1).tolist() == [14, 12, 12]
    assert outputs.loss.isfinite()


def test_a_mask_of_the_decoder_that_is_given_is_used():
    model, batch = tiny_seq2seq_model().train(), batch_of()
    mask = torch.ones_like(batch["labels"])
    assert model(**batch, decoder_attention_mask=mask).expert_load.sum(-1).tolist() == [14, 21, 21]


def test_the_pad_token_as_input_of_the_decoder_without_labels_is_a_token():
    ids = padded(TARGETS, PAD)
    outputs = tiny_seq2seq_model().eval()(padded(SOURCES, PAD), decoder_input_ids=ids, output_router_logits=True)
    assert outputs.expert_load.sum(-1).tolist() == [18, 21, 21]


# Losses


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing_is_for_training_and_for_the_task_loss_only(stage, smoothing):
    model, batch = in_stage(stage, label_smoothing=smoothing).train(), batch_of()
    outputs = model(**batch)
    scores = outputs.logits.log_softmax(-1)[batch["labels"].ne(IGNORED)]
    labels = batch["labels"][batch["labels"].ne(IGNORED)]
    plain, even = F.nll_loss(scores, labels), -scores.mean()
    assert_close(outputs.task_loss, (1 - smoothing) * plain + smoothing * even, rtol=1e-5, atol=0)
    assert_close(outputs.loss, outputs.task_loss + outputs.aux_loss, rtol=1e-6, atol=0)
    unsmoothed = in_stage(stage, label_smoothing=0.0).train()(**batch)
    assert_same_losses(outputs, unsmoothed, LOSSES[2:])
    # Evaluation, which in stage 1 routes by the distilled router and so has logits of its own.
    evaluated = model.eval()(**batch)
    expected = F.cross_entropy(evaluated.logits.flatten(0, 1), batch["labels"].flatten())
    assert_close((evaluated.loss, evaluated.task_loss), (expected, expected), rtol=1e-6, atol=0)


def test_auxiliary_losses_of_the_sides_add_up_and_end_with_stage_1():
    model = tiny_seq2seq_model(router_aux_loss_coef=0.25).train()
    outputs = model(**batch_of())
    assert min(outputs.encoder_aux_loss, outputs.decoder_aux_loss) > 0.1
    assert_close(outputs.aux_loss, outputs.encoder_aux_loss + outputs.decoder_aux_loss, rtol=1e-6, atol=0)
    expected = 0.3 * outputs.balance_loss + 1.0 * outputs.distillation_loss
    assert_close(outputs.aux_loss, expected, rtol=1e-6, atol=0)
    assert_close(outputs.loss, outputs.task_loss + 0.25 * outputs.aux_loss, rtol=1e-6, atol=0)
    assert 0 < outputs.distillation_agreement < 1
    model.freeze_router()
    outputs = model(**batch_of())
    assert (outputs.aux_loss, outputs.encoder_aux_loss, outputs.decoder_aux_loss) == (0, 0, 0)
    assert outputs.distillation_agreement.isnan()


def test_agreement_is_the_share_of_routed_tokens_over_both_sides():
    model, batch = tiny_seq2seq_model().train(), batch_of()
    outputs = model(**batch, output_router_logits=True)
    agreed = total = 0
    layers = model.moe_layers_by_name.values()
    for layer, (ids, mask), index in zip(layers, model.routed_tokens(**batch), outputs.expert_indices, strict=True):
        agreed += (layer.route(ids) == index)[mask].sum().item()
        total += mask.sum().item()
    assert total == 14 + 13 + 13
    assert outputs.distillation_agreement.item() == pytest.approx(agreed / total)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_in_batch_divides_the_task_loss_and_weighs_the_auxiliary_losses(as_tensor):
    model = tiny_seq2seq_model().train()
    batch = {"input_ids": random_ids(3, 5, low=3, high=91), "labels": random_ids(3, 4, seed=1, low=3, high=91)}
    plain = model(**batch)
    outputs = model(**batch, num_items_in_batch=torch.tensor(48) if as_tensor else 48)
    for name in ("task_loss", "aux_loss", "encoder_aux_loss", "decoder_aux_loss", "loss"):
        assert_close(outputs[name], plain[name] * 12 / 48, rtol=1e-5, atol=0)
    assert_same_losses(outputs, plain, ("balance_loss", "distillation_loss", "expert_load"))


def test_two_micro_batches_sum_to_the_loss_and_gradient_of_the_whole():
    # Loads are counted in each micro-batch, so balance stays out unless the halves are equal; every row has the same
    # number of source and target tokens.
    for coefficient, halves in ((0.0, (0, 1)), (0.3, (0, 0))):
        rows = [random_ids(2, 5, seed=seed, low=3, high=91) for seed in halves]
        targets = [random_ids(2, 4, seed=7 + seed, low=3, high=91) for seed in halves]
        whole, parts = (tiny_seq2seq_model(balance_loss_coef=coefficient).train() for _ in range(2))
        expected = whole(torch.cat(rows), labels=torch.cat(targets))
        expected.loss.backward()
        losses = []
        for source, target in zip(rows, targets, strict=True):
            outputs = parts(source, labels=target, num_items_in_batch=16)
            outputs.loss.backward()
            losses.append(outputs.loss.detach())
        assert_close(sum(losses), expected.loss.detach(), rtol=1e-5, atol=0)
        assert_close(gradients(parts), gradients(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
def test_dropout_follows_the_config_while_training_only(name):
    def logits(model, seed):
        set_seed(seed)
        return model(**batch_of()).logits

    model = tiny_seq2seq_model(**{name: 0.4})
    model.freeze_router()
    assert not torch.allclose(logits(model.train(), 0), logits(model, 1), atol=1e-2)
    assert torch.equal(logits(model, 0), logits(model, 0))
    evaluated = logits(model.eval(), 0)
    assert torch.equal(evaluated, logits(model, 1))
    plain = tiny_seq2seq_model()
    plain.freeze_router()
    assert torch.equal(evaluated, logits(plain.train(), 1))


def test_dropout_falls_on_embeddings_and_every_sublayer_of_the_blocks(monkeypatch):
    rates = []
    dropout = F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True: rates.append(p) or dropout(x, p, training))
    model = tiny_seq2seq_model(dropout=0.125, attention_dropout=0.25).train()
    model.set_attn_implementation("eager")
    model(**batch_of())
    # Embeddings of both sides; 2 blocks of 2 sublayers and 3 blocks of 3; an attention in each but the FFNs.
    assert rates.count(0.125) == 2 + 2 * 2 + 3 * 3
    assert rates.count(0.25) == 2 + 3 * 2
    assert set(rates) == {0.125, 0.25}


# Recorded outputs


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_router_outputs_are_one_a_moe_layer_of_each_side(stage, training):
    model, batch = in_stage(stage).train(training), batch_of()
    hidden = []
    for layer in model.moe_layers_by_name.values():
        layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    outputs = model(**batch, output_router_logits=True)
    assert [tuple(scores.shape) for scores in outputs.encoder_router_logits] == [(18, 5)]
    assert [tuple(scores.shape) for scores in outputs.decoder_router_logits] == [(21, 5)] * 2
    assert [tuple(index.shape) for index in outputs.encoder_expert_indices] == [(3, 6)]
    assert [tuple(index.shape) for index in outputs.decoder_expert_indices] == [(3, 7)] * 2
    assert outputs.expert_indices == outputs.encoder_expert_indices + outputs.decoder_expert_indices
    assert outputs.expert_load.shape == (3, 5)
    scores = outputs.encoder_router_logits + outputs.decoder_router_logits
    routed = model.routed_tokens(**batch)
    for i, layer in enumerate(model.moe_layers_by_name.values()):
        assert_close(scores[i], hidden[i].flatten(0, 1) @ layer.router.centroids.T, rtol=1e-5, atol=1e-5)
        ids, mask = routed[i]
        greedy = scores[i].argmax(-1).view_as(ids)
        expected = greedy if training and stage == 1 else model.route(ids)[i]
        assert torch.equal(outputs.expert_indices[i], expected)
        assert torch.equal(outputs.expert_load[i], expected[mask].bincount(minlength=5))


@pytest.mark.parametrize(("in_config", "argument"), [(False, None), (True, None), (True, False), (False, True)])
def test_router_outputs_are_given_where_asked_for(in_config, argument):
    model = tiny_seq2seq_model(output_router_logits=in_config)
    given = in_config if argument is None else argument
    for training in (True, False):
        outputs = model.train(training)(**batch_of(), output_router_logits=argument)
        for name in ("encoder_router_logits", "decoder_router_logits", "encoder_expert_indices"):
            assert (outputs[name] if name in outputs else None) is None or given
        assert (outputs.decoder_expert_indices is not None) is given
        assert (outputs.aux_loss is not None) is (given or training)
        assert len(outputs.expert_indices) == (3 if given else 0)


@torch.no_grad()
def test_hidden_states_and_attentions_are_one_a_block():
    model, batch = tiny_seq2seq_model(decoder_moe_layer_positions=[0, 3]).eval(), batch_of()
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.encoder_hidden_states] == [(3, 6, 24)] * 3
    assert [tuple(states.shape) for states in outputs.decoder_hidden_states] == [(3, 7, 24)] * 4
    assert [tuple(weights.shape) for weights in outputs.encoder_attentions] == [(3, 3, 6, 6)] * 2
    assert [tuple(weights.shape) for weights in outputs.decoder_attentions] == [(3, 3, 7, 7)] * 3
    assert [tuple(weights.shape) for weights in outputs.cross_attentions] == [(3, 3, 7, 6)] * 3
    assert_close(outputs.encoder_hidden_states[-1], outputs.encoder_last_hidden_state, rtol=0, atol=0)
    assert_close(outputs.logits, model.lm_head(outputs.decoder_hidden_states[-1]), rtol=0, atol=0)
    assert outputs.decoder_attentions[0].triu(1).abs().max() == 0
    padding = batch["attention_mask"].eq(0)
    for weights in (*outputs.encoder_attentions, *outputs.cross_attentions):
        assert weights.movedim(-1, 1)[padding].abs().max() == 0
        assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=1e-5, atol=1e-5)
    assert outputs.encoder_attentions[0].triu(1).abs().max() > 0.01


@torch.no_grad()
def test_return_dict_false_gives_the_same_as_a_tuple():
    model = tiny_seq2seq_model().eval()
    outputs = model(**batch_of(), use_cache=False)
    loss, logits = model(**batch_of(), use_cache=False, return_dict=False)[:2]
    assert_close((loss, logits), (outputs.loss, outputs.logits), rtol=0, atol=0)


@pytest.mark.parametrize("stage", [1, 2])
def test_eager_and_sdpa_attention_agree_in_loss_and_gradients(stage):
    results = []
    for implementation in ("eager", "sdpa"):
        model = in_stage(stage).train()
        model.set_attn_implementation(implementation)
        stacks = (model, model.model.encoder, model.model.decoder)
        assert {stack.config._attn_implementation for stack in stacks} == {implementation}
        outputs = model(**batch_of())
        outputs.loss.backward()
        results.append({**gradients(model), "loss": outputs.loss.detach()})
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("stage", [1, 2])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(stage):
    results = []
    for checkpointed in (False, True):
        model = in_stage(stage, dropout=0.1).train()
        runs = []
        for layer in model.moe_layers_by_name.values():
            layer.router.register_forward_hook(lambda router, *_, runs=runs: runs.append(router))
        if checkpointed:
            switch_checkpointing(model, {"use_reentrant": False})
        set_seed(1)
        outputs = model(**batch_of())
        outputs.loss.backward()
        results.append({**gradients(model), "loss": outputs.loss.detach(), "load": outputs.expert_load})
        assert [runs.count(router) for router in set(runs)] == [2 if checkpointed else 1] * 3
    assert results[0].keys() == results[1].keys()
    assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_every_parameter_learns_in_stage_1_and_all_but_the_distilled_routers_in_stage_2():
    for stage in (1, 2):
        model = in_stage(stage, num_experts=3).train()
        model(random_ids(8, 20, low=3, high=91), labels=random_ids(8, 20, seed=1, low=3, high=91)).loss.backward()
        without = {n for n, p in model.named_parameters() if p.is_floating_point() and p.grad is None}
        assert without == (
            {n for n, _ in model.named_parameters() if "distilled_router" in n} if stage == 2 else set()
        )
        still = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
        assert still == []


@pytest.mark.parametrize("dense", ["encoder", "decoder", "both"])
def test_a_side_may_be_dense(dense):
    sides = ["encoder", "decoder"] if dense == "both" else [dense]
    model = tiny_seq2seq_model(**{f"{side}_moe_layer_positions": [] for side in sides}).train()
    outputs = model(**batch_of(), output_router_logits=True)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    layers = {"encoder": 2, "decoder": 1, "both": 0}[dense]
    assert model.config.num_moe_layers == len(model.moe_layers_by_name) == len(outputs.expert_indices) == layers
    for side in sides:
        assert outputs.get(f"{side}_aux_loss") is None
    assert model.route(batch_of()["input_ids"]).shape == (layers, 3, 6)
    if dense == "both":
        assert outputs.aux_loss == 0
        assert outputs.expert_load is None
        with pytest.raises(ValueError, match="There is no router to freeze"):
            model.freeze_router()
        return
    assert outputs.expert_load.shape == (layers, 5)
    assert outputs.aux_loss > 0.1
    model.freeze_router()
    assert model.routing_stage == 2
    assert model(**batch_of()).aux_loss == 0


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_bfloat16_autocast_trains_with_scores_in_float32(stage, implementation):
    model = in_stage(stage).train()
    model.set_experts_implementation(implementation)
    expected = model(**batch_of(), output_router_logits=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch_of(), output_router_logits=True)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    assert {scores.dtype for scores in outputs.decoder_router_logits} == {torch.float32}
    assert outputs.aux_loss.dtype == torch.float32
    assert_close(outputs.task_loss, expected.task_loss, rtol=0.05, atol=0.05)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


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


# Errors


def test_calls_without_input_are_refused():
    model, ids = tiny_seq2seq_model(), random_ids(low=3, high=91)
    with pytest.raises(ValueError, match=r"^Pass `input_ids` or `inputs_embeds`\.$"):
        model(labels=ids)
    with pytest.raises(ValueError, match=r"^The decoder has no input: pass `decoder_input_ids`, .* or `labels`\.$"):
        model(ids)
    with pytest.raises(ValueError, match=r"^The decoder attends to a source: pass `encoder_hidden_states`\.$"):
        model.model.decoder(ids)


@pytest.mark.parametrize("side", ["input_ids", "decoder_input_ids"])
def test_token_ids_outside_the_vocabulary_are_refused(side):
    ids = random_ids(low=3, high=91)
    wrong = ids.clone()
    wrong[1, 3] = 91
    with pytest.raises(ValueError, match=r"^There is a token id 91, outside 0\.\.90 of `vocab_size`"):
        tiny_seq2seq_model()(**{"input_ids": ids, "decoder_input_ids": ids, side: wrong})


@pytest.mark.parametrize("side", ["input_ids", "decoder_input_ids"])
def test_positions_past_the_maximum_are_refused(side):
    ids, long = random_ids(1, 5, low=3, high=91), random_ids(1, 41, low=3, high=91)
    with pytest.raises(ValueError, match=r"^There is a position 40, outside 0\.\.39 of `max_position_embeddings`"):
        tiny_seq2seq_model()(**{"input_ids": ids, "decoder_input_ids": ids, side: long})


# Configuration


BAD = {
    "position_embedding_type": ["rotary", None, ["learned"]],
    "scale_embedding": ["yes", None, 1],
    "do_layer_norm_before": ["no", None, 0],
    "label_smoothing": [-0.1, 1, 1.0, float("nan"), "0.1", True, None],
    "encoder_layers": [0, -1, 2.0, "2", True, None],
    "decoder_layers": [0, -1, 2.0, "2", True, None],
    "encoder_moe_layer_positions": [[3], [-1], [1, 1], 1, ["1"], [True]],
    "decoder_moe_layer_positions": [[4], [-1], [2, 2], 1, ["1"], [True]],
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


def test_json_round_trip_changes_nothing(tmp_path):
    config = tiny_seq2seq_config(label_smoothing=0.2, router_fingerprint="ab" * 32, eos_token_id=[0, 3])
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["model_type"], stored["encoder_layers"], stored["decoder_layers"]) == ("stablemoe-seq2seq", 2, 3)
    assert (stored["encoder_moe_layer_positions"], stored["decoder_moe_layer_positions"]) == ([1], [0, 2])
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is StableMoESeq2SeqConfig
    assert loaded.to_dict() == {**config.to_dict(), **{k: v for k, v in loaded.to_dict().items() if k[0] == "_"}}


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


@pytest.mark.parametrize(
    ("auto_class", "config"), [(AutoModelForSeq2SeqLM, tiny_config), (AutoModelForCausalLM, tiny_seq2seq_config)]
)
def test_auto_classes_refuse_a_config_of_the_other_kind_themselves(auto_class, config):
    # transformers' own words: it knows no such model and lists those it knows.
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*StableMoE.*Config.* for this kind of"):
        auto_class.from_config(config())
