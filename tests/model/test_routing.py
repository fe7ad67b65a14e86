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
from modeling_stablemoe.model.layer_stablemoe import StableMoELayer
from modeling_stablemoe.model.routing_stablemoe import StableRouter


ALL_IDS = torch.arange(99).view(3, 33)


def layer_of(model) -> StableMoELayer:
    return model.model.moe_layers[0]


# The table


@given(seed=st.integers(0, 999), num_experts=st.integers(1, 9), width=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_frozen_table_is_what_evaluation_used_a_moment_before_for_every_id(dtype):
    model = tiny_model(moe_layer_positions=[0, 1, 2]).to(dtype).eval()
    with torch.no_grad():  # near-ties, that another order of summation would break
        for layer in model.model.moe_layers:
            distilled = layer.router.distilled_router
            distilled.centroids.copy_(distilled.centroids[:1] + 1e-3 * torch.randn_like(distilled.centroids))
        before = model(ALL_IDS, output_router_logits=True).expert_indices
        logits = model(ALL_IDS).logits
    said_before = model.route(ALL_IDS)
    model.freeze_router()
    assert torch.equal(torch.stack(before), said_before)
    assert torch.equal(model.route(ALL_IDS), said_before)
    with torch.no_grad():
        after = model(ALL_IDS, output_router_logits=True)
    assert torch.equal(torch.stack(after.expert_indices), said_before)
    assert torch.equal(after.logits, logits)
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
@settings(max_examples=15, deadline=None)
def test_ties_of_backbone_scores_go_to_the_lowest_expert(score):
    router = StableRouter(tiny_config(num_experts=len(score), hidden_size=4)).train()
    with torch.no_grad():
        router.distilled_router.embedding.zero_()
        router.distilled_router.centroids.zero_()
        router.centroids.copy_(torch.tensor(score).float().unsqueeze(-1) * torch.eye(4)[0])
    decision = Decision.of(router(torch.ones(1, 1, 4), torch.zeros(1, 1, dtype=torch.long)))
    assert int(decision.expert_index) == score.index(max(score))
    assert_close(decision.gate.item(), torch.tensor(float(max(score))).sigmoid().item())


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
    assert_close(decision.router_logits[:, [0, 1, 3, 4]], others)
    assert_close(decision.router_logits[:, 2], others.amin(-1))
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


# Who learns from what


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_the_task_teaches_the_centroids_through_the_gate_and_never_the_distilled_router(training, stage):
    model, ids = tiny_model(), random_ids()
    if stage == 2:
        model.freeze_router()
    model.train(training)(ids, labels=ids).task_loss.backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "model.moe_layers.0.router.centroids" in learned
    assert not [name for name in learned if "distilled_router" in name]


# Frozen routing


def frozen_in(model):
    return torch.stack(model(ALL_IDS, output_router_logits=True).expert_indices)


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.bfloat16, "eager"), (torch.float16, "grouped_mm"), (torch.float64, "batched_mm")]
)
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
@settings(max_examples=8, deadline=None)
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


def test_freezing_a_dense_model_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="no router to freeze"):
        tiny_model(moe_layer_positions=[]).freeze_router()


# How it starts


def test_a_new_layer_starts_from_orthogonal_centroids_normal_embeddings_and_as_the_identity():
    torch.manual_seed(0)
    layer = layer_of(StableMoEForCausalLM(tiny_config(vocab_size=4000)))
    for centroids in (layer.router.centroids, layer.router.distilled_router.centroids):
        assert_close(centroids @ centroids.T, 0.01 * torch.eye(5), rtol=1e-5, atol=1e-7)
    embedding = layer.router.distilled_router.embedding.detach()  # 32 000 numbers
    assert embedding.mean().abs() < 0.02
    assert_close(embedding.std(), torch.tensor(1.0), rtol=0.02, atol=0)
    assert_close((embedding.abs() < 1).float().mean(), torch.tensor(0.6827), rtol=0.02, atol=0)
    for sublayer in layer.expert_stack.sublayers:
        for name in ("down_proj", "down_proj_bias", "up_proj_bias", "layernorm_bias"):
            assert not sublayer.get_parameter(name).any(), name
        assert (sublayer.layernorm_weight == 1).all()
        assert_close(sublayer.up_proj.detach().std(), torch.tensor(0.02), rtol=0.03, atol=0)
        assert not torch.equal(sublayer.up_proj[0], sublayer.up_proj[1])
    hidden = torch.randn(3, 7, 32)
    for training in (True, False):
        assert torch.equal(layer.train(training)(hidden, random_ids()), hidden)
