"""Tests with TRL's trainers on a tiny model."""

import json
import math

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import Trainer
from transformers.utils import logging as transformers_logging

from helpers.matrices import one_fast
from helpers.models import random_ids, tiny_model
from helpers.trainers import Recorder, make_trainer, tiny_tokenizer, training_logs
from modeling_stablemoe import (
    RoutingStatisticsCallback,
    StableMoEForCausalLM,
    StableMoEForSequenceClassification,
    StageTransitionCallback,
)


trl = pytest.importorskip("trl")


@pytest.fixture(autouse=True)
def _forget_warnings():
    """What has been said once may be said again."""
    transformers_logging.warning_once.cache_clear()


EVERY_ID = torch.arange(99).unsqueeze(0)


def words(seed, length=6):
    return " ".join(f"w{i}" for i in random_ids(1, length, seed, low=3, high=91)[0].tolist())


ROWS = {
    "sft": [{"text": words(i)} for i in range(16)],
    "dpo": [{"prompt": words(i), "chosen": f" {words(50 + i)}", "rejected": f" {words(90 + i)}"} for i in range(16)],
    "grpo": [{"prompt": words(i)} for i in range(16)],
}


def number_of_words(completions, **kwargs):
    return [float(len(set(completion.split()))) for completion in completions]


def base_model(frozen=True, **overrides) -> StableMoEForCausalLM:
    model = tiny_model(moe_layer_positions=[0, 2], pad_token_id=2, **overrides)
    if frozen:
        model.freeze_router()
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A frozen model on disk: DPO loads its reference from where the model came from."""
    folder = tmp_path_factory.mktemp("frozen")
    base_model(dropout=0.0).save_pretrained(folder)
    return folder


def make(kind, folder, model, *callbacks, trainer_class=None, **arguments):
    options = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **({"max_completion_length": 6, "num_generations": 2} if kind == "grpo" else {"max_length": 24}),
        **arguments,
    }
    trainers = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    }
    trainer, config = trainers[kind]
    return (trainer_class or trainer)(
        model=model,
        args=config(**options),
        train_dataset=Dataset.from_list(ROWS[kind]),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
        **({"reward_funcs": number_of_words} if kind == "grpo" else {}),
    )


@pytest.mark.parametrize(("kind", "coefficient"), [("sft", None), ("dpo", 0.0), ("grpo", None)])
def test_a_frozen_model_is_trained_and_keeps_its_routing(checkpoint, tmp_path, kind, coefficient):
    model = StableMoEForCausalLM.from_pretrained(checkpoint)
    fingerprint, route = model.router_fingerprint(), model.route(EVERY_ID)
    before = {name: p.clone() for name, p in model.named_parameters()}
    arguments = {} if coefficient is None else {"router_aux_loss_coef": coefficient}
    trainer = make(kind, tmp_path / "run", model, **arguments)
    trainer.train()
    assert not torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, before["model.layers.0.self_attn.q_proj.weight"]
    )
    assert model.router_fingerprint() == model.config.router_fingerprint == fingerprint
    assert torch.equal(model.route(EVERY_ID), route)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in training_logs(trainer.state.log_history))
    trainer.save_model(tmp_path / "saved")
    loaded = StableMoEForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.router_fingerprint() == fingerprint
    assert torch.equal(loaded.route(EVERY_ID), route)


def first_loss(kind: str, model: StableMoEForCausalLM, trainer) -> float:
    """What a model that has just been loaded has to lose."""
    if kind == "dpo":  # it is its own reference
        return math.log(2)
    if kind == "grpo":  # advantages of a group add up to nothing
        return 0.0
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sft", {}),
        ("sft", {"moe_layer_positions": []}),
        ("dpo", {"router_type": "hash"}),
        ("grpo", {"distilled_router": "bigram"}),
    ],
)
def test_the_logged_loss_is_trl_s_own(tmp_path, kind, settings):
    model = tiny_model(**{"moe_layer_positions": [0, 2], "pad_token_id": 2, **settings})
    if model.routing_stage == 1 and model.config.num_moe_layers:
        model.freeze_router()
    model.save_pretrained(tmp_path / "model")
    loaded, same = (StableMoEForCausalLM.from_pretrained(tmp_path / "model") for _ in range(2))
    trainer = make(kind, tmp_path / "run", loaded, max_steps=1)
    expected = first_loss(kind, same, make(kind, tmp_path / "run", same) if kind == "sft" else None)
    trainer.train()
    (entry,) = training_logs(trainer.state.log_history)
    assert entry["loss"] == pytest.approx(expected, abs=2e-4)
    assert "aux_loss" not in entry
    # What is saved is what was set, also by a trainer that writes the coefficient it uses into the config.
    trainer.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["router_aux_loss_coef"] == 1.0


def test_the_balance_loss_that_trl_adds_moves_no_frozen_model(checkpoint, tmp_path):
    weights = []
    for coefficient in (5.0, 0.0):
        model = StableMoEForCausalLM.from_pretrained(checkpoint)
        make("sft", tmp_path, model, router_aux_loss_coef=coefficient).train()
        weights.append(dict(model.named_parameters()))
    assert not [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]


def test_a_reward_model_is_a_classifier_with_one_label(checkpoint, tmp_path):
    model = StableMoEForSequenceClassification.from_pretrained(checkpoint, num_labels=1)
    fingerprint = model.router_fingerprint()
    rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in ROWS["dpo"]]
    config = trl.RewardConfig(str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True, bf16=False)
    trainer = trl.RewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        callbacks=[RoutingStatisticsCallback()],
    )
    trainer.train()
    assert training_logs(trainer.state.log_history)[0].keys() >= {"margin", "load_max_over_mean"}
    assert model.router_fingerprint() == fingerprint


def test_statistics_of_a_frozen_model_are_missed_and_said_to_be(tmp_path, caplog):
    trainer = make("sft", tmp_path, base_model(), RoutingStatisticsCallback())
    trainer.train()
    assert "There are no statistics of this run" in caplog.text
    assert "load_max_over_mean" not in training_logs(trainer.state.log_history)[0]


# Stage 1: TRL replaces the head, and with it the routing losses


@pytest.mark.parametrize("kind", one_fast(*ROWS))
def test_stage_1_that_would_distil_nothing_is_refused(tmp_path, kind):
    base_model(frozen=False).save_pretrained(tmp_path)
    model = StableMoEForCausalLM.from_pretrained(tmp_path)
    trainer = make(kind, tmp_path, model, StageTransitionCallback(2))
    with pytest.raises(
        ValueError, match=r"FusedCausalLMOutput: .* Nothing would be distilled\. .*`compute_loss = Trainer"
    ):
        trainer.train()


def test_without_a_callback_the_model_itself_warns(tmp_path, caplog):
    make("sft", tmp_path, base_model(frozen=False), router_aux_loss_coef=0.0).train()
    assert "the routing is neither balanced nor distilled" in caplog.text
    caplog.clear()
    make("sft", tmp_path, base_model()).train()
    assert "neither balanced" not in caplog.text


class SFTWithRoutingLosses(trl.SFTTrainer):
    compute_loss = Trainer.compute_loss


def test_the_remedy_trains_both_stages_as_the_plain_trainer_does(tmp_path, caplog):
    arguments = {"max_steps": 4, "max_grad_norm": 1.0, "seed": 3, "lr_scheduler_type": "constant"}
    recorder = Recorder()
    model = base_model(frozen=False, dropout=0.0)
    trainer = make(
        "sft",
        tmp_path,
        model,
        StageTransitionCallback(2),
        recorder,
        trainer_class=SFTWithRoutingLosses,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        **arguments,
    )
    trainer.train()
    assert recorder.stages == [1, 2, 2, 2]
    logs = training_logs(trainer.state.log_history)
    assert logs[0]["loss"] == pytest.approx(
        logs[0]["task_loss"] + 0.3 * logs[0]["balance_loss"] + logs[0]["distillation_loss"], rel=1e-4
    )
    assert logs[-1]["loss"] == pytest.approx(logs[-1]["task_loss"], rel=1e-4)
    assert "routing losses count" not in caplog.text
    # The plain Trainer on the same rows, which TRL has made.
    plain = base_model(frozen=False, dropout=0.0)
    expected = make_trainer(
        tmp_path,
        StageTransitionCallback(2),
        model=plain,
        train_dataset=trainer.train_dataset,
        collator=trainer.data_collator,
        gradient_accumulation_steps=2,
        weight_decay=0.5,
        logging_steps=1,
        **arguments,
    )
    expected.train()
    assert model.router_fingerprint() == plain.router_fingerprint()
    assert_close(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=1e-4, atol=1e-5)


def test_a_changed_coefficient_is_warned_of_in_stage_1_alone(tmp_path, caplog):
    for frozen in (True, False):
        assert "router_aux_loss_coef" not in caplog.text
        callback = RoutingStatisticsCallback() if frozen else StageTransitionCallback(2)
        trainer = make(
            "sft",
            tmp_path,
            base_model(frozen),
            callback,
            trainer_class=SFTWithRoutingLosses,
            router_aux_loss_coef=0.001,
        )
        trainer.train()
    assert "`config.router_aux_loss_coef` was 1.0 when the trainer was made and is 0.001 now" in caplog.text
    first = training_logs(trainer.state.log_history)[0]
    assert first["loss"] == pytest.approx(first["task_loss"], rel=0.02)
