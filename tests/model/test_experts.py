"""Expert stacks and their backends: one result, all gradients, sentinels, capacity, and the switch between them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import random_ids, tiny_config, tiny_model
from modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.model.experts_stablemoe import (
    ALL_STABLEMOE_EXPERTS_FUNCTIONS,
    StableMoEExperts,
    drop_overflow,
)


pytestmark = pytest.mark.pairs


N = 5
BACKENDS = ["eager", "grouped_mm", "batched_mm"]
FAST = ["grouped_mm", "batched_mm"]
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-11},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
ASSIGNMENTS = {
    "mixed": [3, 0, 1, 4, 3, 3, 2, 0, 1, 2, 4, 3],
    "experts 1 and 4 idle": [0, 2, 3, 3, 0, 2, 0, 0],
    "all on one": [2] * 9,
    "some sentinels": [N, 3, 0, N, N, 4, 1, N],
    "only sentinels": [N, N, N],
    "sentinels past N": [N + 7, 2, N, 999, 0, N + 1],
    "no token": [],
}


def experts_of(backend: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> StableMoEExperts:
    """Experts with every parameter random, the same for each backend; 37 is odd, 48 what a grouped kernel likes."""
    config = tiny_config(**overrides)
    config._experts_implementation = backend
    experts = StableMoEExperts(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * (0.5 if "norm" in name else 0.15)
            parameter.copy_(noise + (1.0 if "layernorm_weight" in name else 0.0))
    return experts.to(dtype)


def run(experts: StableMoEExperts, index, seed: int = 1):
    """Output and all gradients by name, inputs included, of a random linear objective."""
    dtype = next(experts.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(index), 32, generator=generator).to(dtype).requires_grad_()
    gate = torch.rand(len(index), 1, generator=generator).to(dtype).requires_grad_()
    output = experts(hidden, torch.tensor(index, dtype=torch.long).view(-1, 1), gate)
    (output * torch.randn(output.shape, generator=generator).to(dtype)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return output.detach(), {**gradients, "hidden": hidden.grad, "gate": gate.grad}


def assert_same(actual, expected, tolerance):
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = max(1.0, float(gradient.abs().max())) if gradient.numel() else 1.0
        torch.testing.assert_close(
            actual[1][name] / scale, gradient / scale, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# One result


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("case", "dtype", "width"),
    [
        *((case, torch.float64, 37) for case in ASSIGNMENTS),
        ("mixed", torch.float32, 48),
        ("some sentinels", torch.bfloat16, 48),
    ],
    ids=str,
)
def test_backend_has_the_output_and_every_gradient_of_eager(case, backend, dtype, width):
    # Where half precision rounds a sum to the other side of 0, the gradient of a relu is another, and rightly so.
    shape = {"intermediate_size": width, "hidden_act": "gelu" if dtype is torch.bfloat16 else "relu"}
    index = ASSIGNMENTS[case]
    expected = run(experts_of("eager", dtype, **shape), index)
    actual = run(experts_of(backend, dtype, **shape), index)
    assert_same(actual, expected, TOLERANCE[dtype])


@given(index=st.lists(st.integers(0, N + 2), min_size=1, max_size=40), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_backends_agree_on_any_assignment(index, seed):
    expected = run(experts_of("eager", seed=seed, intermediate_size=48), index, seed)
    for backend in FAST:
        assert_same(
            run(experts_of(backend, seed=seed, intermediate_size=48), index, seed), expected, TOLERANCE[torch.float32]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sentinels_add_exactly_nothing_and_receive_no_gradient(backend, dtype):
    index = ASSIGNMENTS["some sentinels"]
    output, gradients = run(experts_of(backend, dtype, intermediate_size=48), index)
    sentinel = torch.tensor(index) == N
    for tensor in (output, gradients["hidden"], gradients["gate"]):
        assert not tensor[sentinel].any()
        assert tensor[~sentinel].any(dim=-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sentinel_with_nan_spoils_neither_other_tokens_nor_any_gradient(backend):
    experts = experts_of(backend, intermediate_size=48)
    index = torch.tensor([[0], [N], [3], [N]])
    clean = torch.randn(4, 32)
    gate = torch.rand(4, 1)
    expected = experts(clean, index, gate).detach()
    dirty = clean.clone()
    dirty[[1, 3]] = torch.nan
    output = experts(dirty, index, gate)
    output.sum().backward()
    torch.testing.assert_close(output.detach(), expected, rtol=1e-6, atol=1e-6)
    for name, parameter in experts.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_without_tokens_has_gradients_of_exactly_zero(backend):
    _, gradients = run(experts_of(backend, intermediate_size=48), ASSIGNMENTS["experts 1 and 4 idle"])
    for name, gradient in gradients.items():
        if name.startswith("sublayers"):
            assert [bool(expert.any()) for expert in gradient] == [True, False, True, True, False], name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [37, 48])
def test_under_autocast_experts_run_in_bfloat16_and_the_residual_stays_float32(backend, width):
    model = tiny_model(intermediate_size=width)
    model.set_experts_implementation(backend)
    layer = model.model.moe_layers[0].train()
    hidden = torch.randn(3, 7, 32) * 100  # bfloat16 would round these by up to 1/2
    expected = layer(hidden, random_ids()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(hidden, random_ids())
    output.sum().backward()
    assert output.dtype == torch.float32
    change, expected_change = output.detach() - hidden, expected - hidden
    torch.testing.assert_close(change, expected_change, rtol=5e-2, atol=5e-2)
    assert not torch.equal(change, expected_change), "the products were not taken in bfloat16"
    for name, parameter in layer.expert_stack.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


# Capacity


def brute_force_drop(index: list[int], num_experts: int, factor: float) -> list[int]:
    real = sum(expert < num_experts for expert in index)
    capacity = max(1, int(factor * real / num_experts))
    taken = [0] * num_experts
    kept = []
    for expert in index:
        if expert == num_experts or taken[expert] >= capacity:
            kept.append(num_experts)
        else:
            taken[expert] += 1
            kept.append(expert)
    return kept


@given(
    num_experts=st.integers(1, 6),
    factor=st.sampled_from([0.01, 0.25, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0, 100.0]),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_drop_overflow_equals_a_loop_over_the_tokens(num_experts, factor, data):
    index = data.draw(st.lists(st.integers(0, num_experts), max_size=40))
    kept = drop_overflow(torch.tensor(index, dtype=torch.long), num_experts=num_experts, capacity_factor=factor)
    assert kept.tolist() == brute_force_drop(index, num_experts, factor)


def crowded_layer(factor):
    """A layer whose table sends every id to expert 1: capacity lets `factor / 5` of the tokens in."""
    model = tiny_model(expert_capacity_factor=factor)
    layer = model.model.moe_layers[0]
    layer.frozen_router.freeze(torch.ones(99, dtype=torch.long))
    return layer


def test_capacity_lets_tokens_past_it_through_unchanged_while_training():
    layer = crowded_layer(2.0).train()
    hidden = torch.randn(2, 10, 32)
    changed = (layer(hidden, random_ids(2, 10)) != hidden).any(-1)
    assert changed.flatten().tolist() == [True] * 8 + [False] * 12  # 2 * 20 / 5
    for unlimited in (crowded_layer(0.5).eval(), crowded_layer(None).train()):
        expected = unlimited(hidden, random_ids(2, 10))
        assert (expected != hidden).any(-1).all()
        actual = layer(hidden, random_ids(2, 10))
        torch.testing.assert_close(actual[changed], expected[changed], rtol=1e-5, atol=1e-5)


def test_padding_takes_no_capacity():
    layer = crowded_layer(1.0).train()
    hidden = torch.randn(2, 10, 32)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0] = False
    changed = (layer(hidden, (random_ids(2, 10), mask)) != hidden).any(-1)
    assert changed.flatten().tolist() == [False] * 10 + [True] * 2 + [False] * 8  # 1 * 10 / 5


def test_losses_and_loads_count_tokens_over_capacity_as_routed():
    ids = random_ids()
    unlimited = tiny_model().train()(ids, labels=ids)
    limited = tiny_model(expert_capacity_factor=0.5).train()(ids, labels=ids)
    assert torch.equal(limited.expert_load, unlimited.expert_load)
    torch.testing.assert_close(limited.balance_loss, unlimited.balance_loss, rtol=1e-6, atol=1e-7)
    assert not torch.equal(limited.logits, unlimited.logits), "the capacity was not reached"


# The switch


def spy_on(monkeypatch) -> list[str]:
    """Note which backend runs, and run it."""
    calls = []

    def noting(name, function):
        def forward(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return forward

    for name in FAST:
        function = ALL_STABLEMOE_EXPERTS_FUNCTIONS[name]
        monkeypatch.setitem(ALL_STABLEMOE_EXPERTS_FUNCTIONS._global_mapping, name, noting(name, function))
    return calls


def test_setting_an_implementation_changes_the_code_that_runs(monkeypatch):
    calls = spy_on(monkeypatch)
    model = tiny_model(moe_layer_positions=[0, 2])
    assert model.config._experts_implementation == "grouped_mm", "the default"
    for backend in ("batched_mm", "eager", "grouped_mm"):
        calls.clear()
        model.set_experts_implementation(backend)
        model(random_ids())
        assert model.config._experts_implementation == backend
        assert calls == ([] if backend == "eager" else [backend] * 2)


def test_an_implementation_is_chosen_on_loading_and_one_that_these_experts_lack_is_refused_everywhere(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = StableMoEForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert loaded.config._experts_implementation == "eager"
    for build in (
        lambda: model.set_experts_implementation("sonicmoe"),
        lambda: StableMoEForCausalLM(tiny_config(experts_implementation="sonicmoe")),
        lambda: StableMoEForCausalLM._from_config(tiny_config(), experts_implementation="sonicmoe"),
        lambda: StableMoEForCausalLM.from_pretrained(tmp_path, experts_implementation="sonicmoe"),
    ):
        with pytest.raises(ValueError, match='experts_implementation="sonicmoe".*choose one of.*eager'):
            build()
    assert model.config._experts_implementation == "grouped_mm"
