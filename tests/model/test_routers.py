"""The contract that every router keeps: reference values, gradients, padding, backends, saving, training, generation."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from helpers import reference
from helpers.checkpoints import run_without_package
from helpers.doubles import EXACT, SLOPE, arrays, layer_input, slopes_of
from helpers.models import Decision, random_ids, tiny_config, tiny_model, tiny_seq2seq_model
from helpers.trainers import BLOCKS, Recorder, make_trainer, training_logs
from modeling_stablemoe import (
    RoutingStatisticsCallback,
    StableMoEForCausalLM,
    StableMoESeq2SeqConfig,
    StageTransitionCallback,
)
from modeling_stablemoe.model.losses_stablemoe import balance_loss, switch_balance_loss


pytestmark = pytest.mark.pairs


DISTILLED = {"distilled_router": "word_embedding"}
KINDS = {
    "stable": {"router_type": "stable"},
    "switch": {"router_type": "switch"},
    "base": {"router_type": "base"},
    "hash": {"router_type": "hash"},
    "switch distilled": {"router_type": "switch", **DISTILLED},
    "base distilled": {"router_type": "base", **DISTILLED},
    "switch, two experts": {"router_type": "switch", "num_experts_per_tok": 2},
    "hash, three experts": {"router_type": "hash", "num_experts_per_tok": 3},
}
FREEZABLE = ["stable", "switch distilled", "base distilled"]
every_kind = pytest.mark.parametrize("kind", KINDS)
IDS = random_ids(4, 10)


def model_of(kind: str, **overrides) -> StableMoEForCausalLM:
    return tiny_model(**KINDS[kind], **overrides)


def reference_routing(kind: str, training: bool) -> str:
    if kind.startswith("hash"):
        return "frozen"
    if training:
        return "balanced" if kind.startswith("base") else "greedy"
    return "distilled" if kind in FREEZABLE else "greedy"


def reference_output(kind, params, hidden, token_ids, mask, training, table):
    return reference.moe_layer(
        params,
        "",
        hidden.reshape(-1, 32),
        token_ids.flatten().tolist(),
        routing=reference_routing(kind, training),
        table=table,
        mask=mask.flatten().tolist(),
        router=KINDS[kind]["router_type"],
        k=KINDS[kind].get("num_experts_per_tok", 1),
    )


# 15 real tokens, 3 for each of the 5 experts.
def masked_input():
    hidden, token_ids, mask, weights = layer_input()
    mask[1, :1] = False
    assert int(mask.sum()) == 15
    return hidden, token_ids, mask, weights


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("training", [True, False])
@every_kind
def test_layer_output_equals_the_reference(kind, training, backend):
    model = model_of(kind).double()
    model.set_experts_implementation(backend)
    layer = model.model.moe_layers[0].train(training)
    hidden, token_ids, mask, _ = masked_input()
    table, states = layer.frozen_router.values().tolist(), hidden.detach().numpy()
    expected, _, _, assigned = reference_output(kind, arrays(layer), states, token_ids, mask, training, table)
    actual = layer(hidden, (token_ids, mask))
    assert_close(actual.detach().view(-1, 32), torch.from_numpy(expected), **EXACT)
    assert torch.equal(actual[~mask], hidden[~mask])
    assert len(set(assigned.flatten().tolist())) > 2


@pytest.mark.parametrize("kind", ["switch", "base", "hash", "switch, two experts"])
def test_layer_gradients_equal_finite_differences_of_the_reference(kind):
    layer = model_of(kind).double().model.moe_layers[0].train()
    hidden, token_ids, mask, weights = masked_input()
    (layer(hidden, (token_ids, mask)) * weights).sum().backward()
    table = layer.frozen_router.values().tolist()

    def objective(params):
        output, *_ = reference_output(kind, params, params["hidden"], token_ids, mask, True, table)
        return (output * weights.view(-1, 32).numpy()).sum()

    params = {**arrays(layer), "hidden": hidden.detach().numpy()}
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()} | {"hidden": hidden.grad}
    for name in params:
        if name == "frozen_router.routing_table":
            assert gradients[name] is None
            continue
        pair = slopes_of(gradients[name], objective, params, name, count=2)
        assert_close(*pair, **SLOPE, msg=lambda text, name=name: f"{name}: {text}")
        assert pair[0].abs().min() > 1e-5


@pytest.mark.parametrize("masked", [True, False])
def test_switch_balance_loss_equals_the_reference_in_value_and_gradient(masked):
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(12) % 3 > 0 if masked else torch.ones(12, dtype=torch.bool)
    loss = switch_balance_loss(router_logits=logits, expert_index=logits.argmax(-1), mask=mask if masked else None)
    assigned = logits.detach().argmax(-1)[mask].numpy()

    def objective(params):
        return reference.switch_balance_loss(params["logits"][mask.numpy()], assigned)

    params = {"logits": logits.detach().numpy()}
    assert_close(float(loss.detach()), float(objective(params)), **EXACT)
    loss.backward()
    assert_close(*slopes_of(logits.grad, objective, params, "logits"), **SLOPE)
    assert not logits.grad[~mask].any()


@every_kind
def test_each_router_has_the_losses_of_its_row_of_table_1(kind):
    model = model_of(kind, moe_layer_positions=[0, 2]).train()
    outputs = model(IDS, labels=IDS, output_router_logits=True)
    config = model.config
    assert config.balance_loss_coef == {"stable": 0.3, "switch": 0.01, "base": 0.0, "hash": 0.0}[config.router_type]
    expected = torch.zeros(())
    for layer, logits in enumerate(outputs.router_logits or ()):
        index = outputs.expert_indices[layer].flatten(0, 1)
        if config.router_type in ("stable", "switch"):
            function = balance_loss if config.router_type == "stable" else switch_balance_loss
            expected = expected + function(router_logits=logits, expert_index=index)
    assert_close(outputs.balance_loss, expected)
    assert (outputs.distillation_loss > 0) == (kind in FREEZABLE)
    assert outputs.distillation_agreement.isnan() == (kind not in FREEZABLE)
    aux = config.balance_loss_coef * outputs.balance_loss + outputs.distillation_loss
    assert_close(outputs.aux_loss, aux)
    assert_close(outputs.loss, outputs.task_loss + aux)
    assert (outputs.router_logits is None) == (config.router_type == "hash")
    assert outputs.expert_load.sum(-1).tolist() == [40 * config.num_experts_per_tok] * 2
    outputs.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_distillation_of_base_learns_where_the_tokens_were_really_sent():
    model = model_of("base distilled").train()
    outputs = model(IDS, labels=IDS, output_router_logits=True)
    sent = outputs.expert_indices[0].flatten()
    assert not torch.equal(sent, outputs.router_logits[0].argmax(-1))
    logits = model.model.moe_layers[0].router.distilled_router(IDS).flatten(0, 1)
    assert_close(outputs.distillation_loss, torch.nn.functional.cross_entropy(logits, sent))


@pytest.mark.parametrize("kind", ["base", "base distilled"])
@pytest.mark.parametrize("padding", [0, 7])
def test_base_balances_the_real_tokens_while_training_and_is_greedy_at_inference(kind, padding):
    model = model_of(kind)
    mask = torch.ones_like(IDS)
    mask[0, 10 - padding :] = 0
    outputs = model.train()(IDS, attention_mask=mask, output_router_logits=True)
    real = 40 - padding
    assert sorted(outputs.expert_load[0].tolist()) == sorted(real // 5 + (i < real % 5) for i in range(5))
    layer = model.model.moe_layers[0].eval()
    hidden = torch.randn(4, 10, 32)
    decision = Decision.of(layer.router(hidden, IDS))
    if kind == "base":
        assert torch.equal(decision.expert_index.flatten(), decision.router_logits.argmax(-1))
    else:
        assert torch.equal(decision.expert_index, layer.router.assign(IDS))


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing_for_real_tokens(kind, training):
    model = model_of(kind, moe_layer_positions=[0, 2]).train(training)
    pads = torch.full((4, 3), 1)
    padded = torch.cat([pads, IDS], 1)
    mask = torch.cat([torch.zeros_like(pads), torch.ones_like(IDS)], 1)
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 3] = -100
    alone = model(IDS, labels=IDS, output_router_logits=True)
    together = model(padded, attention_mask=mask, labels=labels, output_router_logits=True)
    assert_close(together.logits[:, 3:], alone.logits, rtol=1e-4, atol=1e-5)
    assert_close(together.loss, alone.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(together.expert_load, alone.expert_load)
    for padded_index, index in zip(together.expert_indices, alone.expert_indices, strict=True):
        assert torch.equal(padded_index[:, 3:], index)


def test_checkpoints_load_and_train_with_the_package_and_where_it_is_not_installed(tmp_path):
    for kind in KINDS:
        model = model_of(kind, moe_layer_positions=[0, 2]).eval()
        model.save_pretrained(tmp_path / kind)
        torch.save((IDS, model(IDS).logits.detach()), tmp_path / kind / "expected.pt")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert loaded.config.router_type == KINDS[kind]["router_type"]
        assert loaded.config.distilled_router == model.config.distilled_router
        assert (loaded.routing_stage, loaded.router_fingerprint()) == (model.routing_stage, model.router_fingerprint())
        assert torch.equal(loaded.route(IDS), model.route(IDS))
    code = """
        import sys, torch
        from transformers import AutoModelForCausalLM
        folder, *kinds = sys.argv[1:]
        for kind in kinds:
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/{kind}", trust_remote_code=True).eval()
            ids, logits = torch.load(f"{folder}/{kind}/expected.pt")
            torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
            try:
                model.train()(ids, labels=ids).loss.backward()
            except ImportError as error:  # BASE's assignment is the package's
                assert kind == "base" and str(error).startswith("Training a BASE router"), error
            else:
                assert kind != "base"
    """
    run_without_package(code, tmp_path / "elsewhere", tmp_path, "switch", "base", "hash")


@pytest.mark.parametrize("kind", ["switch", "base", "hash"])
def test_generation_is_the_same_with_and_without_cache(kind):
    model = model_of(kind, moe_layer_positions=[0, 2]).eval()
    options = {"max_new_tokens": 8, "eos_token_id": None, "attention_mask": torch.ones_like(IDS), "num_beams": 3}
    cached, whole = (model.generate(IDS, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, whole)


@every_kind
def test_route_gives_the_experts_of_a_forward_pass_and_leaves_the_mode(kind):
    model = model_of(kind, moe_layer_positions=[0, 2])
    for training in (True, False):
        model.train(training)
        routes = model.route(IDS)
        assert all(module.training == training for module in model.modules())
        indices = model.eval()(IDS, output_router_logits=True).expert_indices
        assert torch.equal(routes, torch.stack(indices))


def test_an_encoder_decoder_that_routes_by_hidden_states_says_how_to_ask():
    model = tiny_seq2seq_model(router_type="switch")
    with pytest.raises(ValueError, match=r"routes by hidden states.*expert_indices"):
        model.route(random_ids(high=91))


@pytest.mark.parametrize("kind", ["switch", "base distilled", "hash"])
def test_an_encoder_decoder_trains_and_generates(kind):
    model = tiny_seq2seq_model(**KINDS[kind])
    ids, labels = random_ids(3, 8, high=90), random_ids(3, 6, seed=1, high=90)
    outputs = model.train()(input_ids=ids, labels=labels, output_router_logits=True)
    outputs.loss.backward()
    if kind == "switch":
        assert outputs.encoder_aux_loss != 0
    assert all(p.grad is not None for p in model.parameters() if p.is_floating_point())
    if kind in FREEZABLE:
        model.freeze_router()
        outputs = model(input_ids=ids, labels=labels)
        assert (outputs.aux_loss, model.routing_stage) == (0, 2)
    tokens = [model.eval().generate(ids, num_beams=2, max_new_tokens=6, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("kind", FREEZABLE)
def test_freezing_keeps_what_evaluation_routed_a_moment_before(kind):
    model = model_of(kind, moe_layer_positions=[0, 2]).eval()
    every_id = torch.arange(99).unsqueeze(0)[:, :60]
    before, logits = model.route(every_id), model(IDS).logits
    model.freeze_router()
    assert torch.equal(model.route(every_id), before)
    assert_close(model(IDS).logits, logits, rtol=0, atol=0)
    frozen = model.train()(IDS, labels=IDS, output_router_logits=True)
    assert torch.equal(torch.stack(frozen.expert_indices), model.route(IDS))
    assert (frozen.aux_loss, frozen.balance_loss) == (0, 0)
    assert_close(frozen.loss, frozen.task_loss, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["switch", "base"])
def test_a_routing_that_is_not_distilled_is_not_frozen(kind, tmp_path):
    model = model_of(kind)
    with pytest.raises(ValueError, match=r"has no `distilled_router`. Train it with `distilled_router"):
        model.freeze_router()
    with pytest.raises(ValueError, match=r"has no `distilled_router`"):
        make_trainer(tmp_path, StageTransitionCallback(5), model=model).train()
    assert model.routing_stage == 1


# The hash


def test_a_hash_is_random_frozen_from_the_start_and_the_same_for_the_same_seed(tmp_path):
    first, again, other = (tiny_model(seed, router_type="hash", moe_layer_positions=[0, 2]) for seed in (0, 0, 1))
    assert first.routing_stage == 2
    assert first.config.router_fingerprint == first.router_fingerprint() == again.router_fingerprint()
    assert first.router_fingerprint() != other.router_fingerprint()
    tables = [layer.frozen_router.values() for layer in first.model.moe_layers]
    assert not torch.equal(*tables)
    for table in tables:
        assert table.bincount(minlength=5).min() > 5  # of 99 ids, 19.8 expected
    with pytest.raises(RuntimeError, match="frozen already"):
        first.freeze_router()
    with pytest.raises(ValueError, match=r"frozen already.*or one with a hash"):
        make_trainer(tmp_path, StageTransitionCallback(5), model=first).train()


def test_tables_of_ones_own_are_routed_by_and_damaged_ones_refused():
    model = model_of("hash", moe_layer_positions=[0, 2])
    before = model.router_fingerprint()
    tables = torch.stack([torch.arange(99) % 5, torch.arange(99) % 3])
    model.set_routing_tables(tables)
    assert torch.equal(model.route(IDS), torch.stack([IDS % 5, IDS % 3]))
    assert model.config.router_fingerprint == model.router_fingerprint() != before
    for bad, problem in ((tables[:1], "shape"), (tables + 3, r"\[0, 5\)"), (tables - 1, r"\[0, 5\)")):
        with pytest.raises(ValueError, match=f"`tables` must .*{problem}"):
            model.set_routing_tables(bad)
    assert torch.equal(model.route(IDS), torch.stack([IDS % 5, IDS % 3]))
    stage1 = tiny_model()
    stage1.set_routing_tables(tables[:1])
    assert stage1.routing_stage == 2
    with pytest.raises(ValueError, match="no router to freeze"):
        tiny_model(moe_layer_positions=[]).set_routing_tables(tables)


def test_a_hash_follows_the_vocabulary():
    model = model_of("hash")
    before = model.route(torch.arange(99).unsqueeze(0)[:, :50])
    model.resize_token_embeddings(104)
    assert torch.equal(model.route(torch.arange(50).unsqueeze(0)), before)
    assert model.route(torch.arange(99, 104).unsqueeze(0))[0, 0].tolist() == [99 % 5, 0, 1, 2, 3]
    assert model.config.router_fingerprint == model.router_fingerprint()


# With the Trainer


@pytest.mark.parametrize("kind", ["switch", "base distilled", "hash"])
def test_the_trainer_trains_every_router_and_logs_its_statistics(kind, tmp_path):
    model, recorder = model_of(kind), Recorder()
    trainer = make_trainer(
        tmp_path, RoutingStatisticsCallback(), recorder, model=model, train_dataset=BLOCKS[:2], max_steps=12
    )
    trainer.train()
    first, *_, last = training_logs(trainer.state.log_history)
    assert last["task_loss"] < first["task_loss"] - 0.1
    expected = {"task_loss", "load_max_over_mean", "routing_stage"}
    expected |= {"balance_loss"} if kind != "hash" else set()
    expected |= {"distillation_loss", "distillation_agreement"} if kind in FREEZABLE else set()
    statistics = expected | {"balance_loss", "distillation_loss", "distillation_agreement"}
    assert set(last) & statistics == expected
    assert set(training_logs(recorder.logs)[-1]) & statistics == expected
    assert last["routing_stage"] == (2 if kind == "hash" else 1)
    if kind.startswith("base"):
        assert last["load_max_over_mean"] < 1.1
    assert not any("transition_step" in entry for entry in trainer.state.log_history)


# The configuration


def test_what_a_router_type_brings_with_it():
    for router_type, distilled, coefficient in (
        ("stable", "word_embedding", 0.3),
        ("switch", None, 0.01),
        ("base", None, 0.0),
        ("hash", None, 0.0),
    ):
        config = tiny_config(router_type=router_type)
        assert (config.distilled_router, config.balance_loss_coef) == (distilled, coefficient)
        assert tiny_config(router_type=router_type, balance_loss_coef=0.5).balance_loss_coef == 0.5
        assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert StableMoESeq2SeqConfig().distilled_router == "word_embedding"


def test_a_hash_distils_nothing_and_unknown_distilled_routers_are_refused():
    with pytest.raises(ValueError, match=r"`distilled_router` 'word_embedding' has nothing to learn from a hash"):
        tiny_config(router_type="hash", distilled_router="word_embedding")
    with pytest.raises(ValueError, match=r"`distilled_router` 'nope' is unknown; choose one of"):
        tiny_config(distilled_router="nope")
