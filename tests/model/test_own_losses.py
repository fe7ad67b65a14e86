"""Losses that are not the model's: what trains a routing, and what is refused because it would not."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import Trainer
from transformers.utils import logging as transformers_logging

from helpers.models import random_ids, shaken, tiny_config, tiny_model, tiny_seq2seq_model
from helpers.trainers import make_seq2seq_trainer, make_trainer, training_logs
from modeling_stablemoe import (
    RoutingStatisticsCallback,
    StableMoEForSequenceClassification,
    StageTransitionCallback,
)


pytestmark = pytest.mark.pairs


LOST = "without the routing losses: no gradient reaches the distilled routers"
WITHOUT_LABELS = "Stage 1 is trained without `labels`"


@pytest.fixture(autouse=True)
def _forget_warnings():
    """What has been said once may be said again."""
    transformers_logging.warning_once.cache_clear()


def task_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1] if labels.dim() == 2 else outputs.logits
    targets = labels[:, 1:] if labels.dim() == 2 else labels
    total = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.flatten(), reduction="sum")
    return total / (targets.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


def whole_loss(outputs, labels, num_items_in_batch=None):
    """What docs/train.md shows."""
    loss = task_loss(outputs, labels, num_items_in_batch)
    if outputs.aux_loss is None:
        return loss
    targets = labels[:, 1:].ne(-100).sum()
    return loss + outputs.aux_loss * (1 if num_items_in_batch is None else targets / num_items_in_batch)


class OwnLossTrainer(Trainer):
    loss_of = staticmethod(task_loss)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_loss_func=self.loss_of, **kwargs)


class WholeLossTrainer(OwnLossTrainer):
    loss_of = staticmethod(whole_loss)


class OverridingTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(input_ids=inputs["input_ids"])
        loss = task_loss(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("trainer_class", [OwnLossTrainer, OverridingTrainer])
@pytest.mark.parametrize("callback", [lambda: StageTransitionCallback(2), RoutingStatisticsCallback])
def test_a_loss_that_leaves_the_routing_losses_out_is_refused_in_stage_1(tmp_path, callback, trainer_class, caplog):
    trainer = make_trainer(tmp_path, callback(), trainer_class=trainer_class, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=LOST):
        trainer.train()
    assert WITHOUT_LABELS in caplog.text
    assert trainer.state.global_step == 0, "before the optimizer has moved anything"


@pytest.mark.parametrize("distilled_router", ["counts", "cnn"])
def test_it_is_refused_whatever_is_distilled_into(tmp_path, distilled_router):
    model = tiny_model(distilled_router=distilled_router)
    with pytest.raises(ValueError, match=LOST):
        make_trainer(tmp_path, StageTransitionCallback(2), model=model, trainer_class=OwnLossTrainer).train()


def test_it_is_refused_for_a_classifier(tmp_path):
    rows = [{"input_ids": row, "labels": index % 3} for index, row in enumerate(random_ids(8, 6))]
    model = shaken(StableMoEForSequenceClassification(tiny_config(num_labels=3)))
    trainer = make_trainer(
        tmp_path,
        StageTransitionCallback(2),
        model=model,
        trainer_class=OwnLossTrainer,
        train_dataset=rows,
        collator=lambda rows: {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]},
    )
    with pytest.raises(ValueError, match=LOST):
        trainer.train()


def test_it_is_refused_for_a_translation_model(tmp_path):
    trainer = make_seq2seq_trainer(tmp_path, StageTransitionCallback(2))
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: (
        cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch
    )
    with pytest.raises(ValueError, match=LOST):
        trainer.train()


def test_in_stage_2_any_loss_will_do(tmp_path, caplog):
    model = tiny_model()
    model.freeze_router()
    callback = RoutingStatisticsCallback()
    trainer = make_trainer(tmp_path, callback, model=model, trainer_class=OwnLossTrainer, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert WITHOUT_LABELS not in caplog.text


def test_a_loss_that_adds_them_trains_both_stages_as_the_model_s_own_does(tmp_path):
    runs = []
    for trainer_class in (Trainer, WholeLossTrainer):
        trainer = make_trainer(
            tmp_path,
            StageTransitionCallback(3),
            trainer_class=trainer_class,
            gradient_accumulation_steps=2,
            max_steps=5,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            optim="sgd",
        )
        trainer.train()
        runs.append((dict(trainer.model.named_parameters()), trainer.state.log_history, trainer.model))
    (expected, expected_history, plain), (actual, history, model) = runs
    assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert model.router_fingerprint() == plain.router_fingerprint() is not None
    for name in ("loss", "eval_loss"):
        losses = [entry[name] for entry in history if name in entry]
        assert losses == pytest.approx([entry[name] for entry in expected_history if name in entry], rel=1e-4)
    assert training_logs(history)[0]["distillation_loss"] > 0.1


def test_labels_keep_the_model_quiet_and_so_does_a_pass_that_does_not_learn(caplog):
    ids = random_ids(high=90, low=3)
    for model, batch in (
        (tiny_model(), {"input_ids": ids, "labels": ids}),
        (tiny_model(), {"input_ids": ids, "shift_labels": ids}),
        (tiny_seq2seq_model(), {"input_ids": ids, "labels": ids}),
    ):
        model.train()(**batch)
        with torch.no_grad():
            model(input_ids=ids, decoder_input_ids=ids) if model.config.is_encoder_decoder else model(ids)
        model.eval()(**batch)
    assert WITHOUT_LABELS not in caplog.text
    tiny_seq2seq_model().train()(input_ids=ids, decoder_input_ids=ids)
    assert WITHOUT_LABELS in caplog.text
