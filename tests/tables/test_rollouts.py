"""Reinforcement learning: the array of router replay, and the mismatch between rollouts and training, with TRL and without."""

import base64
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerState

from helpers.matrices import one_fast
from helpers.models import random_ids, tiny_model, tiny_seq2seq_model
from helpers.moe_families import tiny_moe
from helpers.trainers import tiny_tokenizer, training_logs
from modeling_stablemoe.tables import (
    RoutingMismatchCallback,
    hash_tables,
    install_tables,
    installed_tables,
    moe_layers,
    remove_tables,
    routed_experts,
)
from modeling_stablemoe.tables.installing import routers_of


def with_tables(family: str, layers: list[int] | None = None):
    model = tiny_moe(family)
    layers = moe_layers(model) if layers is None else layers
    install_tables(model, hash_tables(torch.arange(99), len(layers), 8, 2), layers)
    return model


def frozen_stablemoe(**overrides):
    model = tiny_model(moe_layer_positions=[0, 2], pad_token_id=2, **overrides).eval()
    model.freeze_router()
    return model


# The array of router replay


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "deepseek_v4"])
def test_routes_are_those_that_a_pass_takes_block_by_block(family):
    model = with_tables(family)
    ids = random_ids(1, 12)[0]
    routes = routed_experts(model, ids)
    assert routes.shape == (11, model.config.num_hidden_layers, 2)
    seen = {}
    for layer, router in routers_of(model).items():
        router.register_forward_hook(lambda _, args, output, layer=layer: seen.update({layer: output[2]}))
    model(ids[:-1].unsqueeze(0))
    for layer in range(model.config.num_hidden_layers):
        expected = seen.get(layer, torch.zeros(11, 2))  # a block without experts
        assert torch.equal(routes[:, layer], expected.int())
    assert len(seen) == len(moe_layers(model)) > 1
    # As SGLang sends it and slime reads it.
    sent = base64.b64encode(routes.numpy().tobytes()).decode("ascii")
    received = np.frombuffer(base64.b64decode(sent.encode("ascii")), dtype=np.int32)
    received = received.reshape(len(ids) - 1, model.config.num_hidden_layers, model.config.num_experts_per_tok)
    assert np.array_equal(received, routes.numpy())


@pytest.mark.parametrize("settings", [{}, {"num_experts_per_tok": 2}, {"distilled_router": "bigram"}], ids=str)
def test_routes_of_a_stablemoe_are_those_of_its_layers(settings):
    model = frozen_stablemoe(**settings)
    ids = random_ids(1, 9)[0]
    routes = routed_experts(model, ids)
    k = settings.get("num_experts_per_tok", 1)
    assert routes.shape == (8, 2, k)
    assert routes.dtype == torch.int32
    outputs = model(ids[:-1].unsqueeze(0), output_router_logits=True)
    for layer, expert in enumerate(outputs.expert_indices):
        assert torch.equal(routes[:, layer], expert.view(8, k).int())


def test_what_only_a_rollout_knows_is_refused():
    ids = random_ids(1, 9)[0]
    with pytest.raises(ValueError, match=r"Layers \[0, 2\] route by hidden states"):
        routed_experts(with_tables("olmoe", [1]), ids)
    with pytest.raises(ValueError, match=r"still learned: freeze it first"):
        routed_experts(tiny_model(), ids)
    with pytest.raises(ValueError, match="has an encoder"):
        routed_experts(tiny_seq2seq_model(), ids)


# The mismatch, counted by the callback


def roll_out_and_train(model, *tamper) -> float | None:
    """Generate four tokens for prompts of different lengths, train on the halves of what came out; return what is logged."""
    callback, state = RoutingMismatchCallback(), TrainerState()
    callback.on_train_begin(SimpleNamespace(), state, None, model=model)
    prompts = random_ids(4, 5, low=3)
    mask = (torch.arange(5) >= torch.tensor([[0], [1], [2], [3]])).long()
    prompts = prompts.masked_fill(mask == 0, model.config.pad_token_id)
    sampled = model.generate(
        prompts, attention_mask=mask, do_sample=True, max_new_tokens=4, min_new_tokens=4, output_scores=False
    )
    handles = [function() for function in tamper]
    mask = torch.cat([mask, torch.ones_like(sampled[:, 5:])], 1)
    for half in ([2, 0], [3, 1]):  # in another order
        model(input_ids=sampled[half], attention_mask=mask[half], use_cache=False).logits.sum().backward()
    with torch.no_grad():  # as a reference policy, say: not trained
        model(input_ids=sampled[:2], use_cache=False)
    for handle in handles:
        handle.remove()
    logs = {"loss": 1.0}
    callback.on_log(None, state, None, logs=logs, model=model)
    assert callback.on_log(None, state, None, logs={"loss": 1.0}, model=model) is None
    callback.on_train_end(None, state, None)
    assert not model.base_model._forward_hooks
    return logs["routing_mismatch"]


def test_every_token_that_training_sends_elsewhere_is_counted():
    model = tiny_moe("mixtral")
    assert roll_out_and_train(model) == 0.0

    def elsewhere():
        def shifted(router, args, output):  # of 2 sequences of 9 tokens the 7th token of each
            logits, weights, index = output
            index = index.clone().view(2, 9, 2)
            index[:, 6] = (index[:, 6] + 1) % 8
            return logits, weights, index.view(18, 2)

        # The last layer: what it does to a token, no other layer sees. Before the callback's own, which see what it returns.
        return routers_of(model)[2].register_forward_hook(shifted, prepend=True)

    # 4 sequences of 9, 8, 7 and 6 real tokens, without the last one of each.
    assert roll_out_and_train(model, elsewhere) == 4 / (8 + 7 + 6 + 5)


@pytest.mark.parametrize("kind", ["tables", "stablemoe"])
def test_no_trained_token_of_a_frozen_model_is_sent_elsewhere(kind):
    assert roll_out_and_train(with_tables("olmoe") if kind == "tables" else frozen_stablemoe()) == 0.0


def test_rollouts_that_the_model_did_not_make_are_said_to_be_missing(caplog):
    model, callback, state = tiny_moe("olmoe"), RoutingMismatchCallback(), TrainerState()
    callback.on_train_begin(SimpleNamespace(), state, None, model=model)
    model(random_ids(2, 7)).logits.sum().backward()
    logs = {"loss": 1.0}
    callback.on_log(None, state, None, logs=logs, model=model)
    assert logs == {"loss": 1.0}
    callback.on_train_begin(SimpleNamespace(), state, None, model=model)  # once more: what was interrupted is over
    assert len(model.base_model._forward_hooks) == 1
    callback.on_train_end(None, state, None)
    assert "there is no `routing_mismatch`" in caplog.text
    with pytest.raises(ValueError, match="`use_transformers_continuous_batching` mixes rollouts"):
        callback.on_train_begin(SimpleNamespace(use_transformers_continuous_batching=True), state, None, model=model)


# TRL


def words(seed: int) -> str:
    return " ".join(f"w{i}" for i in random_ids(1, 3 + seed % 4, seed, low=3, high=91)[0].tolist())


def number_of_words(completions, **kwargs):
    return [float(len(set(completion.split()))) for completion in completions]


def logged_mismatch(model, folder, **options) -> list[float]:
    """Train with GRPO: rollouts in float32, training in bfloat16."""
    trl = pytest.importorskip("trl")
    trainer = trl.GRPOTrainer(
        model=model,
        args=trl.GRPOConfig(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=True,
            gradient_checkpointing=options.pop("gradient_checkpointing", False),
            **options,
        ),
        train_dataset=Dataset.from_list([{"prompt": words(i)} for i in range(16)]),
        processing_class=tiny_tokenizer(),
        reward_funcs=number_of_words,
        callbacks=[RoutingMismatchCallback()],
    )
    trainer.train()
    return [entry["routing_mismatch"] for entry in training_logs(trainer.state.log_history)]


@pytest.mark.parametrize(
    "options",
    one_fast(
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "num_iterations": 2},
    ),
    ids=str,
)
def test_grpo_logs_the_mismatch_of_a_learned_router_and_none_of_frozen_ones(tmp_path, options):
    learned = logged_mismatch(tiny_moe("olmoe"), tmp_path, **options)
    assert len(learned) == 4
    assert 0 < sum(learned) < 4
    model = with_tables("olmoe")
    tables = installed_tables(model)
    assert logged_mismatch(model, tmp_path, router_aux_loss_coef=0.0, **options) == [0.0] * 4
    assert torch.equal(installed_tables(model), tables)
    model = frozen_stablemoe()
    fingerprint = model.router_fingerprint()
    assert logged_mismatch(model, tmp_path, **options) == [0.0] * 4
    assert model.router_fingerprint() == fingerprint


@pytest.mark.slow
def test_grpo_with_adapters_and_with_some_layers_frozen(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(with_tables("olmoe"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert logged_mismatch(adapted, tmp_path, router_aux_loss_coef=0.0) == [0.0] * 4
    assert len(logged_mismatch(with_tables("olmoe", [0, 1]), tmp_path)) == 4


def test_a_balance_loss_of_nothing_is_refused_with_the_option_of_trl(tmp_path):
    model = with_tables("olmoe")
    with pytest.raises(ValueError, match=r"TRL's trainers ask for them unless .*`router_aux_loss_coef=0.0`"):
        logged_mismatch(model, tmp_path)
    remove_tables(model)
