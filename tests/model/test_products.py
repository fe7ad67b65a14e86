"""Products of tokens sorted by expert: the operators a CPU runs, and that a forward pass sorts and looks up once."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.models import random_ids, tiny_model, tiny_seq2seq_model
from modeling_stablemoe.model.products_stablemoe import grouped_layer_norm, grouped_linear, permute, sort_by_expert


pytestmark = pytest.mark.pairs


E, X, Y = 4, 5, 3


class CountedOperators(TorchDispatchMode):
    """Counts the operators that a block of code runs, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def order_of(index: list[int]):
    return sort_by_expert(torch.tensor([index]).view(1, -1), E)[0]


def parameters(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


# The order


@given(st.lists(st.lists(st.integers(0, E + 3), min_size=6, max_size=6), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_tokens_are_sorted_by_expert_layer_by_layer_and_find_their_way_back(index):
    index = torch.tensor(index)
    for of_layer, sorted_tokens in zip(index, sort_by_expert(index, E), strict=True):
        expected = of_layer.clamp(max=E).sort(stable=True)
        assert torch.equal(sorted_tokens.expert_index, expected.values)
        assert torch.equal(sorted_tokens.order, expected.indices)
        assert torch.equal(sorted_tokens.order[sorted_tokens.inverse], torch.arange(6))
        assert sorted_tokens.offsets.tolist() == [int((of_layer <= expert).sum()) for expert in range(E)]


def test_rows_come_back_and_so_do_their_gradients():
    tokens = order_of([2, 0, 1, 0])
    (rows,) = parameters((4, 3))
    there = permute(rows, tokens.order, tokens.inverse)
    assert torch.equal(there, rows[tokens.order])
    assert torch.equal(permute(there, tokens.inverse, tokens.order), rows)
    assert torch.autograd.gradcheck(lambda x: permute(x, tokens.order, tokens.inverse), (rows,))
    assert torch.autograd.gradgradcheck(lambda x: permute(x, tokens.order, tokens.inverse).square(), (rows,))


# The operators


@pytest.mark.parametrize("index", [[1, 0, 3, 1], [E, 2, E, 2]], ids=str)
def test_the_gradients_of_products_and_norms_are_those_of_finite_differences(index):
    tokens = order_of(index)
    x, weight, bias, scale, shift = parameters((len(index), X), (E, Y, X), (E, Y), (E, X), (E, X))
    assert torch.autograd.gradcheck(lambda *inputs: grouped_linear(*inputs, tokens), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *inputs: grouped_layer_norm(*inputs, tokens, 1e-5), (x, scale, shift))


@pytest.mark.parametrize("index", [[1, 0, 3, 1], [E, 2, E, 2]], ids=str)
def test_the_gradients_have_gradients_themselves(index):
    tokens = order_of(index)
    x, weight, bias, scale, shift = parameters((len(index), X), (E, Y, X), (E, Y), (E, X), (E, X))
    operators, frozen_experts = torch.ops.stablemoe, (weight.detach(), bias.detach())
    for linear in (
        lambda *inputs: grouped_linear(*inputs, tokens),
        lambda *inputs: operators.grouped_linear(*inputs, tokens.offsets),
    ):
        assert torch.autograd.gradgradcheck(linear, (x, weight, bias), fast_mode=True)
        assert torch.autograd.gradgradcheck(
            lambda x, linear=linear: linear(x, *frozen_experts).sin(), (x,), fast_mode=True
        )
    for norm in (
        lambda *inputs: grouped_layer_norm(*inputs, tokens, 1e-5),
        lambda *inputs: operators.grouped_layer_norm(*inputs, tokens.offsets, 1e-5)[0],
    ):
        assert torch.autograd.gradgradcheck(norm, (x, scale, shift), fast_mode=True)


@pytest.mark.slow
def test_the_operators_are_sound_for_the_compiler():
    tokens = order_of([1, 0, 3, E])
    x, weight, bias, scale, shift = parameters((4, X), (E, Y, X), (E, Y), (E, X), (E, X))
    operators = torch.ops.stablemoe
    torch.library.opcheck(operators.grouped_linear, (x, weight, bias, tokens.offsets))
    torch.library.opcheck(operators.grouped_layer_norm, (x, scale, shift, tokens.offsets, 1e-5))


# Once a forward pass


@pytest.mark.parametrize(
    ("stage", "backend", "sorts"), [(2, "grouped_mm", 1), (1, "grouped_mm", 3), (2, "batched_mm", 0)]
)
def test_tokens_are_sorted_once_where_the_routing_is_known_and_per_layer_where_it_is_learned(stage, backend, sorts):
    model = tiny_model(moe_layer_positions=[0, 1, 2]).train()
    model.set_experts_implementation(backend)
    if stage == 2:
        model.freeze_router()
    with CountedOperators() as counted:
        model(random_ids())
    assert counted.counts["sort"] == sorts


@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("build", [tiny_model, tiny_seq2seq_model])
def test_what_is_known_ahead_is_what_each_layer_would_find_out(build, mode, capacity, monkeypatch):
    model = build(expert_capacity_factor=capacity)
    model.freeze_router()
    getattr(model, mode)()
    batch = {"input_ids": random_ids(), "labels": random_ids(), "attention_mask": torch.ones_like(random_ids())}
    batch["attention_mask"][0, :3] = 0
    ahead = model(**batch)
    for layer in model.moe_layers_by_name.values():
        monkeypatch.setattr(layer, "knows_ahead", lambda token_ids: False)
    alone = model(**batch)
    assert torch.equal(ahead.logits, alone.logits)
    assert torch.equal(ahead.loss, alone.loss)


def test_decoding_one_token_reads_one_expert_and_gives_what_a_batch_gives():
    model, ids = tiny_model(moe_layer_positions=[0, 1, 2]), random_ids()[:1]
    model.freeze_router()
    with torch.no_grad():
        together = model.eval()(ids).logits
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        with CountedOperators() as counted:
            alone = model(ids[:, -1:], past_key_values=cache).logits
    assert_close(alone[:, 0], together[:, -1])
    assert not [name for name in counted.counts if name.startswith("grouped")]
