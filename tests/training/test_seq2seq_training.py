"""The sequence-to-sequence model with a real Seq2SeqTrainer: accumulation, the two stages, resuming, fluctuation."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from helpers.models import random_ids, tiny_seq2seq_model
from helpers.trainers import (
    PAIRS,
    STATISTICS,
    Gradients,
    Recorder,
    make_seq2seq_trainer,
    tiny_tokenizer,
    training_logs,
)
from modeling_stablemoe import RoutingFluctuationCallback, StageTransitionCallback
from modeling_stablemoe.measure.meter import RoutingMeter


START, PAD = 1, 2
# Every pair has the same share of targets.
EVEN = [
    {"input_ids": source.tolist(), "labels": target.tolist()}
    for source, target in zip(
        random_ids(16, 5, seed=1, low=3, high=91), random_ids(16, 4, seed=2, low=3, high=91), strict=True
    )
]


def collate(model, pairs) -> dict[str, torch.Tensor]:
    return dict(DataCollatorForSeq2Seq(tiny_tokenizer(), model=model)([dict(pair) for pair in pairs]))


def decoder_input(pair) -> list[int]:
    return [START, *pair["labels"][:-1]]


# Accumulation


def train(folder, batch_size: int, accumulation: int, pairs, **config):
    """Train with plain SGD; return the gradients of every step and the counts of targets that Trainer passes."""
    model, counts, gradients = tiny_seq2seq_model(label_smoothing=0.1, **config), [], Gradients()
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: counts.append((kwargs["num_items_in_batch"], kwargs["labels"])), with_kwargs=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    make_seq2seq_trainer(
        folder,
        gradients,
        model=model,
        pairs=pairs,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        max_grad_norm=0.0,
        logging_strategy="no",
    ).train()
    return gradients.steps, counts


@pytest.mark.parametrize(
    ("pairs", "config"),
    [
        # Loads are counted in each micro-batch, so balance stays out.
        (EVEN, {"balance_loss_coef": 0.0}),
        # A target counts the same wherever its batch is cut, whatever the lengths.
        (PAIRS, {"router_aux_loss_coef": 0.0}),
    ],
    ids=["equal lengths", "different lengths"],
)
def test_one_batch_equals_the_same_pairs_by_accumulation(tmp_path, pairs, config):
    whole, _ = train(tmp_path, 4, 1, pairs, **config)
    cut, counts = train(tmp_path, 2, 2, pairs, **config)
    assert len(whole) == len(cut) == 3
    for expected, actual in zip(whole, cut, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert len(counts) == 6
    for (first, labels), (second, more_labels) in zip(counts[::2], counts[1::2], strict=True):
        # Every label, the first of each target too: none is shifted away.
        assert int(first) == int(second) == int(labels.ne(-100).sum() + more_labels.ne(-100).sum())


# The two stages


def test_both_sides_are_frozen_at_the_transition_and_its_statistics_are_logged(tmp_path):
    model, recorder, forward_stages = tiny_seq2seq_model(), Recorder(), []
    model.register_forward_hook(lambda module, *_: forward_stages.append(module.routing_stage))
    trainer = make_seq2seq_trainer(tmp_path, StageTransitionCallback(0.5), recorder, model=model, pairs=EVEN)
    trainer.train()
    assert recorder.stages == [1, 1, 2, 2, 2, 2]
    assert forward_stages == [1, 1, 1, 2, 2, 2]
    assert all(layer.frozen_router.is_frozen for layer in model.moe_layers_by_name.values())
    assert len(set(recorder.fingerprints[2:])) == 1
    assert model.config.router_fingerprint == recorder.fingerprints[-1]
    history = trainer.state.log_history
    logs = training_logs(history)
    assert [entry["routing_stage"] for entry in logs] == [1, 2, 2]
    assert logs[0].keys() >= STATISTICS
    assert logs[1].keys() >= STATISTICS
    assert logs[2].keys() & STATISTICS == {"task_loss", "load_max_over_mean", "routing_stage"}
    for entry in logs:
        auxiliary = 0.3 * entry.get("balance_loss", 0.0) + entry.get("distillation_loss", 0.0)
        assert entry["task_loss"] == pytest.approx(entry["loss"] - auxiliary, abs=1e-4)
    (transition,) = [entry for entry in history if "transition_step" in entry]
    assert transition["step"] == transition["transition_step"] == 3
    assert 0 < transition["transition_agreement"] < 1


class Seen(TrainerCallback):
    """Counts the tokens of stage 1 for itself, from what the Trainer feeds."""

    def __init__(self, model):
        self.encoder, self.decoder = torch.zeros(2, 91)
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model, args, kwargs):
        if model.routing_stage == 1:
            for ids, mask, labels in zip(kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"], strict=True):
                self.encoder += ids[mask.bool()].bincount(minlength=91)
                target = labels[labels != -100].tolist()
                self.decoder += torch.tensor([START, *target[:-1]]).bincount(minlength=91)


@pytest.mark.parametrize("k", [1, 2])
def test_load_of_the_tables_counts_the_ids_of_each_side(tmp_path, k):
    model = tiny_seq2seq_model(num_experts_per_tok=k)
    seen = Seen(model)
    trainer = make_seq2seq_trainer(tmp_path, StageTransitionCallback(3), model=model, gradient_accumulation_steps=2)
    trainer.train()
    (transition,) = [entry for entry in trainer.state.log_history if "transition_step" in entry]
    assert seen.encoder[PAD] == seen.decoder[PAD] == 0
    assert seen.decoder[START] == 2 * 2 * 3
    imbalances = []
    for name, layer in model.moe_layers_by_name.items():
        counts = seen.encoder if ".encoder." in name else seen.decoder
        table = layer.frozen_router.values().view(91, k)
        load = torch.stack([counts[(table == expert).any(-1)].sum() for expert in range(5)])
        imbalances.append((load.max() / load.mean()).item())
    assert transition["transition_table_load_max_over_mean"] == pytest.approx(max(imbalances))


def test_the_meter_counts_token_ids_layer_by_layer():
    model = tiny_seq2seq_model().train()
    meter = RoutingMeter(model)
    for pairs in (PAIRS[:3], PAIRS[3:8]):
        batch = collate(model, pairs)
        del batch["decoder_input_ids"]
        model(**batch)
        meter.end_step()
    encoder = torch.tensor([token for pair in PAIRS[:8] for token in pair["input_ids"]]).bincount(minlength=91)
    decoder = torch.tensor([token for pair in PAIRS[:8] for token in decoder_input(pair)]).bincount(minlength=91)
    assert torch.equal(meter.token_counts, torch.stack([encoder, decoder, decoder]))
    totals = meter.pop_window()
    assert totals.load.sum(-1).tolist() == [encoder.sum(), decoder.sum(), decoder.sum()]
    assert totals.sums[0] == decoder.sum()  # as many targets as inputs of the decoder
    meter.close()


def test_the_label_smoothing_of_the_trainer_is_refused(tmp_path):
    message = r"`label_smoothing_factor=0\.1` makes Trainer .* without the routing losses.*StableMoESeq2SeqConfig has"
    trainer = make_seq2seq_trainer(tmp_path, StageTransitionCallback(3), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_evaluation_gives_plain_cross_entropy_and_generates(tmp_path):
    model = tiny_seq2seq_model(label_smoothing=0.3)
    trainer = make_seq2seq_trainer(
        tmp_path, model=model, predict_with_generate=True, generation_max_length=6, per_device_eval_batch_size=4
    )
    # `keys_to_ignore_at_inference` keep what is neither loss nor logits away from the metrics.
    result = trainer.predict(PAIRS[:4])
    batch = collate(model, PAIRS[:4])
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
    assert result.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**source, max_length=6).tolist()
    assert [row[:6] for row in result.predictions.tolist()] == expected
    assert set(result.predictions[:, 6:].flatten().tolist()) <= {PAD}  # Trainer's own


def test_evaluation_without_generation_gives_the_logits_alone(tmp_path):
    trainer = make_seq2seq_trainer(tmp_path, model=tiny_seq2seq_model(output_router_logits=True))
    predictions = trainer.predict(PAIRS[:2]).predictions
    predictions = predictions[0] if isinstance(predictions, tuple) else predictions
    assert predictions.shape == (2, 4, 91)


# Routing fluctuation


def test_fluctuation_compares_the_experts_of_real_tokens_and_is_zero_in_stage_2(tmp_path):
    model, chosen = tiny_seq2seq_model(), {}

    class Training(TrainerCallback):
        @torch.no_grad()
        def route(self, state):
            """One pair at a time, so that nothing is padded: the experts of each MoE layer, pair by pair."""
            model.train()  # the tiny model has no dropout
            layers = [[], [], []]
            for pair in PAIRS[:8]:
                ids, labels = (torch.tensor([pair[name]]) for name in ("input_ids", "labels"))
                indices = model(input_ids=ids, labels=labels, output_router_logits=True).expert_indices
                for layer, index in zip(layers, indices, strict=True):
                    layer.append(index.flatten())
            chosen[state.global_step] = torch.cat([index for layer in layers for index in layer])

        def on_train_begin(self, args, state, control, **kwargs):
            self.route(state)

        def on_step_end(self, args, state, control, **kwargs):
            self.route(state)

    collator = DataCollatorForSeq2Seq(tiny_tokenizer(), model=model)
    watch = RoutingFluctuationCallback(PAIRS, check_steps=2, num_tokens=36, batch_size=3, data_collator=collator)
    trainer = make_seq2seq_trainer(tmp_path, StageTransitionCallback(3), Training(), watch, model=model)
    trainer.train()
    assert watch.history.steps == [0, 2, 3, 4, 6]
    assert watch.history.stages == [1, 1, 2, 2, 2]
    sources, targets = (sum(len(pair[name]) for pair in PAIRS[:8]) for name in ("input_ids", "labels"))
    assert sources >= 36 > sources - len(PAIRS[7]["input_ids"])
    for step, experts in zip(watch.history.steps, watch.history.experts, strict=True):
        assert experts.numel() == sources + 2 * targets
        assert torch.equal(experts.long(), chosen[step]), step
    changes = watch.history.changes()
    assert changes[1] > 0
    assert changes[3:] == [0, 0]


def test_pairs_of_one_source_length_and_several_target_lengths_are_watched_without_a_collator(tmp_path):
    pairs = [{"input_ids": [3, 4, 5], "labels": [6] * length} for length in (1, 4, 2)]
    watch = RoutingFluctuationCallback(pairs, check_steps=5, num_tokens=1000)
    make_seq2seq_trainer(tmp_path, watch, max_steps=1).train()
    assert watch.history.experts[0].numel() == 3 * 3 + 2 * (1 + 4 + 2)


def test_one_side_alone_cannot_be_frozen():
    model = tiny_seq2seq_model()
    with pytest.raises(ValueError, match="StableMoEEncoder is a part: call `freeze_router\\(\\)` on the model"):
        model.model.encoder.freeze_router()
    assert model.routing_stage == 1
    assert model.model.encoder.routing_stage == 1
