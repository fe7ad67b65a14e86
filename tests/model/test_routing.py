"""Routing: scores and tables, what learns from what, frozen routing that nothing moves, and how it all starts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers.logs import recorded_warnings
from helpers.models import Decision, random_ids, tiny_config, tiny_model
from modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.model.distillation_stablemoe import WordEmbeddingRouter
from modeling_stablemoe.model.frozen_stablemoe import FrozenRouter
from modeling_stablemoe.model.layer_stablemoe import StableMoELayer
from modeling_stablemoe.model.routing_stablemoe import StableRouter


BACKENDS = ["eager", "grouped_mm", "batched_mm"]
ALL_IDS = torch.arange(99).view(3, 33)


def layer_of(model) -> StableMoELayer:
    return model.model.moe_layers[0]


def distilled_names(model) -> set[str]:
    return {name for name, _ in model.named_parameters() if "distilled_router" in name}


def gradients_of(model, loss) -> set[str]:
    """The names of the parameters that `loss` reaches with a gradient that is not zero."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


# The table


@given(seed=st.integers(0, 999), num_experts=st.integers(1, 9), width=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_table_is_the_argmax_of_centroids_times_embedding_and_ties_go_to_the_lowest_expert(seed, num_experts, width):
    router = WordEmbeddingRouter(tiny_config(num_experts=num_experts, distilled_router_dim=width))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # small integers: products are exact, and ties are many
        router.embedding.copy_(torch.randint(-2, 3, router.embedding.shape, generator=generator))
        router.centroids.copy_(torch.randint(-2, 3, router.centroids.shape, generator=generator))
    embedding, centroids = router.embedding.tolist(), router.centroids.tolist()
    expected = []
    for features in embedding:
        scores = [sum(a * b for a, b in zip(centroid, features, strict=True)) for centroid in centroids]
        expected.append(scores.index(max(scores)))
    assert router.table().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_frozen_table_is_what_evaluation_used_a_moment_before_for_every_id(dtype):
    model = tiny_model(moe_layer_positions=[0, 1, 2]).to(dtype).eval()
    with torch.no_grad():  # near-ties, that another order of summation would break
        for layer in model.model.moe_layers:
            distilled = layer.router.distilled_router
            distilled.centroids.copy_(distilled.centroids[:1] + 1e-3 * torch.randn_like(distilled.centroids))
        before = model(ALL_IDS, output_router_logits=True).expert_indices
        one_by_one = [model(ALL_IDS[:1, i : i + 1], output_router_logits=True).expert_indices for i in range(5)]
    said_before = model.route(ALL_IDS)
    model.freeze_router()
    assert torch.equal(torch.stack(before), said_before)
    assert torch.equal(torch.stack([torch.cat(x, 1) for x in zip(*one_by_one, strict=True)]), said_before[:, :1, :5])
    assert torch.equal(model.route(ALL_IDS), said_before)
    with torch.no_grad():
        after = model(ALL_IDS, output_router_logits=True).expert_indices
    assert torch.equal(torch.stack(after), said_before)
    assert all(len(layer.unique()) > 1 for layer in said_before), "a single expert would agree by itself"


def test_evaluation_of_single_tokens_agrees_with_the_table_where_rounding_decides():
    model = tiny_model(distilled_router_dim=50).eval()
    distilled = layer_of(model).router.distilled_router
    with torch.no_grad():  # experts so alike that a product of another shape, summed in another order, chooses others
        distilled.centroids.copy_(distilled.centroids[:1] + 1e-7 * torch.randn_like(distilled.centroids))
    one_by_one = torch.cat([model.route(token_id.view(1, 1)) for token_id in torch.arange(99)], dim=-1)
    model.freeze_router()
    assert torch.equal(one_by_one[0, 0], layer_of(model).frozen_router.values().long())


def test_training_in_stage_1_routes_by_the_backbone_and_evaluation_by_the_distilled_router():
    model = tiny_model()
    recorded = []
    layer_of(model).router.register_forward_hook(lambda _, __, decision: recorded.append(Decision.of(decision)))
    ids = random_ids()
    with torch.no_grad():
        model.train()(ids)
        model.eval()(ids)
    trained, evaluated = recorded
    assert torch.equal(trained.expert_index.flatten(), trained.router_logits.argmax(-1))
    assert torch.equal(evaluated.expert_index.flatten(), evaluated.distilled_logits.argmax(-1))
    assert torch.equal(evaluated.expert_index[0], model.route(ids)[0, 0])
    assert not torch.equal(trained.expert_index, evaluated.expert_index)


@given(score=st.lists(st.integers(-2, 2), min_size=2, max_size=6))
@settings(max_examples=30, deadline=None)
def test_ties_of_backbone_scores_go_to_the_lowest_expert(score):
    router = StableRouter(tiny_config(num_experts=len(score), hidden_size=4)).train()
    with torch.no_grad():
        router.distilled_router.embedding.zero_()
        router.distilled_router.centroids.zero_()
        router.centroids.copy_(torch.tensor(score).float().unsqueeze(-1) * torch.eye(4)[0])
    decision = Decision.of(router(torch.ones(1, 1, 4), torch.zeros(1, 1, dtype=torch.long)))
    assert int(decision.expert_index) == score.index(max(score))
    torch.testing.assert_close(decision.gate.item(), torch.tensor(float(max(score))).sigmoid().item())


def test_the_gate_is_the_sigmoid_of_the_backbone_score_of_the_chosen_expert_in_every_stage():
    model = tiny_model()
    hidden, ids = torch.randn(3, 33, 32), ALL_IDS
    router = layer_of(model).router
    table = model.route(ids)[0]
    decisions = [
        router.train()(hidden, ids),
        router.eval()(hidden, ids),
        router.train()(hidden, ids, table.view(-1, 1)),
    ]
    for decision in map(Decision.of, decisions):
        chosen = decision.router_logits.gather(-1, decision.expert_index.view(-1, 1)).view(3, 33)
        assert_close(decision.gate, chosen.sigmoid(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(decision.router_logits, hidden.view(-1, 32) @ router.centroids.T)
    assert torch.equal(decision.expert_index, table)


# Precision


def test_router_scores_are_float32_under_autocast_and_take_the_same_expert():
    layer = layer_of(tiny_model()).train()
    hidden, ids = torch.randn(3, 33, 32), ALL_IDS
    with torch.no_grad():
        expected = Decision.of(layer.router(hidden, ids))
        with torch.autocast("cpu", torch.bfloat16):
            actual = Decision.of(layer.router(hidden, ids))
            assert (hidden @ hidden.mT).dtype == torch.bfloat16, "autocast is on"
    for name in ("router_logits", "gate", "distilled_logits", "expert_index"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.router_logits.dtype == actual.gate.dtype == actual.distilled_logits.dtype == torch.float32


def test_routing_losses_are_float32_under_autocast_and_in_a_bfloat16_model():
    ids = random_ids()
    model = tiny_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(ids, labels=ids, output_router_logits=True)
    half = model.bfloat16()(ids, labels=ids, output_router_logits=True)
    for outputs in (autocast, half):
        tensors = [outputs.loss, outputs.aux_loss, outputs.balance_loss, outputs.distillation_loss]
        assert {tensor.dtype for tensor in (*tensors, *outputs.router_logits)} == {torch.float32}


# Scores that are not finite


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_score_that_is_not_finite_counts_as_the_lowest_finite_score_of_its_token(bad):
    router = layer_of(tiny_model()).router.train()
    with torch.no_grad():
        router.centroids[2] = 0.0
        router.centroids[2, 0] = bad  # times a positive number: `bad` for each token
        hidden = torch.rand(1, 9, 32) + 0.1
        decision = Decision.of(router(hidden, ALL_IDS[:1, :9]))
    others = (hidden[0] @ router.centroids.detach().T)[:, [0, 1, 3, 4]]
    torch.testing.assert_close(decision.router_logits[:, [0, 1, 3, 4]], others)
    torch.testing.assert_close(decision.router_logits[:, 2], others.amin(-1))
    assert (decision.expert_index != 2).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_without_any_finite_score_is_routed_and_leaves_the_others_alone(bad):
    layer = layer_of(tiny_model()).train()
    hidden = torch.randn(1, 9, 32)
    expected = Decision.of(layer.router(hidden, ALL_IDS[:1, :9]))
    hidden[0, 4] = bad
    decision = Decision.of(layer.router(hidden, ALL_IDS[:1, :9]))
    assert torch.isfinite(decision.router_logits).all()
    assert torch.equal(decision.router_logits[4], torch.zeros(5))
    assert decision.gate[0, 4] == 0.5
    keep = torch.arange(9) != 4
    assert torch.equal(decision.router_logits[keep], expected.router_logits[keep])
    assert torch.equal(decision.expert_index[:, keep], expected.expert_index[:, keep])


def test_scores_that_are_not_finite_are_reported_once_and_never_stop_a_step():
    model = tiny_model().train()
    with torch.no_grad():
        layer_of(model).router.centroids[1] = torch.nan
        layer_of(model).router.distilled_router.centroids[0] = torch.inf
    ids = random_ids()
    with recorded_warnings() as messages:
        for _ in range(3):
            outputs = model(ids, labels=ids, output_router_logits=True)
            outputs.loss.backward()
    assert len(messages) == 1
    assert "lower the learning rate" in messages[0]
    assert torch.isfinite(outputs.loss)
    assert (outputs.expert_indices[0] != 1).all()


def test_finite_scores_are_not_reported():
    ids = random_ids()
    with recorded_warnings() as messages:
        tiny_model().train()(ids, labels=ids)
    assert messages == []


def test_scores_whose_sum_alone_overflows_are_finite():
    router = layer_of(tiny_model()).router.train()
    hidden = torch.rand(1, 9, 32) + 0.1
    with torch.no_grad():
        router.centroids.copy_(torch.rand_like(router.centroids) * 1e37)
        with recorded_warnings() as messages:
            logits = router(hidden, ALL_IDS[:1, :9])[0]
    assert not logits.sum().isfinite()
    assert torch.equal(logits, hidden[0] @ router.centroids.detach().T)
    assert messages == []


def test_a_distilled_router_with_nan_still_freezes_to_a_whole_table():
    model = tiny_model()
    with torch.no_grad():
        layer_of(model).router.distilled_router.embedding[7] = torch.nan
        layer_of(model).router.distilled_router.centroids[0] = torch.nan
    model.freeze_router()
    table = layer_of(model).frozen_router.values()
    assert model.routing_stage == 2
    assert table[7] == 0
    assert (table[8:] != 0).all()


# Who learns from what


def test_distillation_reaches_the_distilled_router_alone():
    model = tiny_model().train()
    ids = random_ids()
    assert gradients_of(model, model(ids, labels=ids).distillation_loss) == distilled_names(model)


def test_balance_reaches_the_backbone_but_neither_distilled_router_nor_experts_nor_what_comes_after():
    model = tiny_model().train()
    ids = random_ids()
    reached = gradients_of(model, model(ids, labels=ids).balance_loss)
    before = {"model.embed_tokens.weight", "model.embed_positions.weight", "model.moe_layers.0.router.centroids"}
    # A gradient of k_proj.bias is rounding: adding one vector to every key changes no attention.
    first_block = {name for name, _ in model.named_parameters() if name.startswith("model.layers.0.")}
    assert reached | {"model.layers.0.self_attn.k_proj.bias"} == before | first_block


@pytest.mark.parametrize("training", [True, False])
def test_the_task_loss_never_reaches_the_distilled_router(training):
    model = tiny_model().train(training)
    ids = random_ids()
    reached = gradients_of(model, model(ids, labels=ids).task_loss)
    assert not reached & distilled_names(model)
    assert "model.moe_layers.0.router.centroids" in reached


def test_in_stage_2_nothing_reaches_the_distilled_router_and_the_centroids_learn_through_the_gate():
    model = tiny_model()
    model.freeze_router()
    ids = random_ids()
    reached = gradients_of(model.train(), model(ids, labels=ids).loss)
    assert all(model.get_parameter(name).grad is None for name in distilled_names(model))
    assert "model.moe_layers.0.router.centroids" in reached


def test_every_expert_with_tokens_gets_a_gradient_and_every_other_a_gradient_of_zero():
    model = tiny_model()
    layer_of(model).frozen_router.freeze(torch.arange(99) % 2 * 3)  # experts 0 and 3 only
    model.config.router_fingerprint = model.router_fingerprint()
    ids = random_ids()
    gradients_of(model.train(), model(ids, labels=ids).loss)
    gradient = layer_of(model).expert_stack.sublayers[0].up_proj.grad
    assert [bool(expert.any()) for expert in gradient] == [True, False, False, True, False]


# Frozen routing


def frozen_in(model, **kwargs):
    return torch.stack(model(ALL_IDS, output_router_logits=True, **kwargs).expert_indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_frozen_routing_is_the_same_in_every_dtype_backend_and_mode(frozen_model, dtype, backend):
    expected = frozen_model.route(ALL_IDS)
    fingerprint = frozen_model.router_fingerprint()
    model = frozen_model.to(dtype)
    model.set_experts_implementation(backend)
    for training in (False, True):
        assert torch.equal(frozen_in(model.train(training)), expected)
    assert model.router_fingerprint() == fingerprint


@given(cut=st.integers(1, 32), rows=st.permutations([0, 1, 2]))
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_frozen_routing_does_not_depend_on_the_batch_around_a_token(cut, rows):
    model = tiny_model()
    model.freeze_router()
    expected = model.route(ALL_IDS)
    batch = ALL_IDS[rows]
    parts = [
        model.eval()(part, output_router_logits=True).expert_indices[0] for part in (batch[:, :cut], batch[:, cut:])
    ]
    assert torch.equal(torch.cat(parts, dim=1), expected[0, rows])


@torch.no_grad()
def test_nothing_that_happens_to_embeddings_and_centroids_moves_frozen_routing(frozen_model):
    expected = frozen_model.route(ALL_IDS)
    for parameter in frozen_model.parameters():
        if parameter.is_floating_point():
            parameter.normal_()
    assert torch.equal(frozen_in(frozen_model), expected)
    assert torch.equal(frozen_model.route(ALL_IDS), expected)


def test_training_with_weight_decay_leaves_the_table_bit_for_bit(frozen_model):
    expected, fingerprint = frozen_model.route(ALL_IDS), frozen_model.router_fingerprint()
    optimizer = torch.optim.AdamW([p for p in frozen_model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        frozen_model.train()(random_ids(), labels=random_ids()).loss.backward()
        optimizer.step()
    assert torch.equal(frozen_model.route(ALL_IDS), expected)
    assert frozen_model.router_fingerprint() == fingerprint


@torch.no_grad()
def test_frozen_routing_and_fingerprint_survive_saving_and_loading(frozen_model, tmp_path):
    frozen_model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = StableMoEForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.routing_stage == 2
        assert torch.equal(frozen_in(loaded), frozen_model.route(ALL_IDS))
        assert loaded.router_fingerprint() == loaded.config.router_fingerprint == frozen_model.router_fingerprint()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_model_is_one_graph_with_the_routing_and_the_logits_of_the_plain_one(frozen_model):
    plain = frozen_model(ALL_IDS, output_router_logits=True)
    # The graph is what is tested here; generating machine code for it would take most of a minute.
    compiled = torch.compile(frozen_model, fullgraph=True, backend="aot_eager")
    outputs = compiled(ALL_IDS, output_router_logits=True)
    assert torch.equal(torch.stack(outputs.expert_indices), frozen_model.route(ALL_IDS))
    torch.testing.assert_close(outputs.logits, plain.logits, rtol=1e-5, atol=1e-5)


def test_freezing_twice_is_an_error_that_says_so(frozen_model):
    with pytest.raises(RuntimeError, match="frozen already"):
        frozen_model.freeze_router()


def test_freezing_a_dense_model_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="no router to freeze"):
        tiny_model(moe_layer_positions=[]).freeze_router()


@pytest.mark.parametrize(
    ("row", "problem"), [(-1, "token id 5 has no expert"), (5, "token id 5 is sent to expert 5"), (-2, "to expert -2")]
)
def test_a_damaged_table_is_refused_with_its_name_and_the_row(row, problem):
    router = FrozenRouter(tiny_config())
    table = torch.zeros(99, dtype=torch.long)
    table[5] = row
    with pytest.raises(ValueError, match=f"`frozen_router.routing_table`.*{problem}"):
        router.freeze(table)


def test_a_new_table_is_unfrozen_and_a_written_one_is_looked_up():
    router = FrozenRouter(tiny_config())
    assert not router.is_frozen
    assert (router.values() == -1).all()
    table = torch.arange(99) % 5
    router.freeze(table)
    assert router.is_frozen
    assert torch.equal(router(ALL_IDS), ALL_IDS % 5)
    assert router(ALL_IDS).dtype == torch.long


@given(new_size=st.integers(1, 150), frozen=st.booleans())
@settings(max_examples=30, deadline=None)
def test_resizing_keeps_old_rows_and_sends_new_ids_to_v_mod_n_once_frozen(new_size, frozen):
    router = FrozenRouter(tiny_config())
    table = torch.arange(99).flip(0) % 5 if frozen else torch.full((99,), -1)
    if frozen:
        router.freeze(table)
    router.resize(new_size)
    expected = [int(table[v]) if v < 99 else v % 5 if frozen else -1 for v in range(new_size)]
    assert router.values().tolist() == expected
    assert not router.routing_table.requires_grad


@pytest.mark.parametrize("new_size", [60, 130])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_model_resized_either_way_routes_old_ids_as_before(new_size, frozen):
    model = tiny_model().eval()
    if frozen:
        model.freeze_router()
    old_ids = torch.arange(min(new_size, 99)).view(1, -1)
    expected = model.route(old_ids)
    model.resize_token_embeddings(new_size)
    assert torch.equal(model.route(old_ids), expected)
    assert model.route(torch.tensor([[new_size - 1]])).numel() == 1
    assert model.config.router_fingerprint == model.router_fingerprint()
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[new_size - 1, 3]])).logits).all()


def test_an_unknown_router_type_is_refused_by_name():
    config = tiny_config()
    with pytest.raises(ValueError, match="'sticky' is unknown; choose one of .*stable"):
        config.router_type = "sticky"


# How it starts


@pytest.fixture(scope="module")
def fresh() -> StableMoEForCausalLM:
    torch.manual_seed(0)
    return StableMoEForCausalLM(tiny_config(vocab_size=4000))


@pytest.mark.parametrize("name", ["router.centroids", "router.distilled_router.centroids"])
def test_centroids_start_orthogonal_with_gain_a_tenth(fresh, name):
    centroids = layer_of(fresh).get_parameter(name).detach()
    torch.testing.assert_close(centroids @ centroids.T, 0.01 * torch.eye(5), rtol=1e-5, atol=1e-7)


def test_distilled_embeddings_start_standard_normal(fresh):
    embedding = layer_of(fresh).router.distilled_router.embedding.detach()  # 32 000 numbers
    assert embedding.mean().abs() < 0.02
    torch.testing.assert_close(embedding.std(), torch.tensor(1.0), rtol=0.02, atol=0)
    torch.testing.assert_close((embedding.abs() < 1).float().mean(), torch.tensor(0.6827), rtol=0.02, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_a_new_layer_is_the_identity(fresh, training):
    hidden = torch.randn(3, 7, 32)
    assert torch.equal(layer_of(fresh).train(training)(hidden, random_ids()), hidden)


def test_new_experts_start_with_a_zero_output_a_unit_norm_and_small_distinct_inner_weights(fresh):
    for sublayer in layer_of(fresh).expert_stack.sublayers:
        for name in ("down_proj", "down_proj_bias", "up_proj_bias", "layernorm_bias"):
            assert not sublayer.get_parameter(name).any(), name
        assert (sublayer.layernorm_weight == 1).all()
        torch.testing.assert_close(sublayer.up_proj.detach().std(), torch.tensor(0.02), rtol=0.03, atol=0)
        assert not torch.equal(sublayer.up_proj[0], sublayer.up_proj[1])


def test_a_new_model_is_in_stage_1_without_a_fingerprint(fresh):
    assert fresh.routing_stage == 1
    assert fresh.router_fingerprint() is None
    assert fresh.config.router_fingerprint is None
