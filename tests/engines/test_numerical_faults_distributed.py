"""Two real processes (gloo, CPU) of which one has nothing but padding, nothing to predict, or NaN."""

from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from helpers.many_processes import results, run_scenarios
from helpers.models import COUNTING, random_ids, tiny_model, tiny_seq2seq_model


WORLD = 2
KINDS = {
    "stable": {},
    "following": COUNTING,
    "switch": {"router_type": "switch"},
    "base": {"router_type": "base"},
    "hash": {"router_type": "hash"},
}
FAMILIES = {"causal": tiny_model, "seq2seq": tiny_seq2seq_model}
CASES = [*((kind, "causal") for kind in KINDS), ("following", "seq2seq")]
# The first has tokens, the second what the scenario says.
HALVES = [random_ids(2, 7, seed=seed, low=3, high=90) for seed in range(WORLD)]


def build(kind: str, family: str, **overrides):
    return FAMILIES[family](**(KINDS[kind] | overrides)).train()


def facts_about(model, outputs) -> dict:
    return {
        "loss": outputs.loss.item(),
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "statistics": statistics_of(model),
    }


def statistics_of(model) -> dict[str, torch.Tensor]:
    return {
        name: parameter.clone()
        for name, parameter in model.named_parameters()
        if not parameter.is_floating_point() and "frozen_router" not in name
    }


def inputs_of(ids, padding: bool = False, targets: bool = True) -> dict:
    return {
        "input_ids": ids,
        "attention_mask": torch.zeros_like(ids) if padding else torch.ones_like(ids),
        "labels": ids if targets else torch.full_like(ids, -100),
    }


EMPTY = inputs_of(HALVES[1], padding=True, targets=False)


def step(model, ids, **kwargs) -> dict:
    """One pass as the Trainer makes it: the sum over the targets of all processes, times their number."""
    count = model.count_targets(HALVES[0])
    parallel = DistributedDataParallel(model)
    outputs = parallel(**inputs_of(ids, **kwargs), num_items_in_batch=count)
    (outputs.loss * WORLD).backward()
    return facts_about(model, outputs)


def one_has_padding_alone(rank: int, folder: Path) -> dict:
    facts = {}
    for kind, family in CASES:
        ids, empty = HALVES[rank], rank == 1
        facts[kind, family] = step(build(kind, family), ids, padding=empty, targets=not empty)
    return facts


def both_have_padding_alone(rank: int, folder: Path) -> dict:
    return {
        (kind, family): step(build(kind, family), HALVES[rank], padding=True, targets=False) for kind, family in CASES
    }


def first_layer_alone(family: str) -> dict:
    """Before the first block no attention brings to a token what stands at another."""
    if family == "causal":
        return {"moe_layer_positions": [0]}
    return {"encoder_moe_layer_positions": [0], "decoder_moe_layer_positions": []}


def one_meets_nan(rank: int, folder: Path) -> dict:
    facts = {}
    for family in FAMILIES:
        model = build("following", family, **first_layer_alone(family))
        if rank == 1:
            (layer,) = model.moe_layers_by_name.values()
            layer.register_forward_pre_hook(lambda module, args: (args[0] * torch.nan, *args[1:]))
        facts[family] = step(model, HALVES[rank])
    return facts


SCENARIOS = [one_has_padding_alone, both_have_padding_alone, one_meets_nan]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """All scenarios, run once in two processes: starting them is what takes the time."""
    return run_scenarios(SCENARIOS, tmp_path_factory.mktemp("numerical_faults"))


def alone(model, **inputs) -> dict:
    outputs = model(**inputs, num_items_in_batch=model.count_targets(HALVES[0]))
    outputs.loss.backward()
    return facts_about(model, outputs)


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_a_process_with_padding_alone_changes_nothing_for_the_one_that_has_tokens(ran, kind, family):
    first, second = (result[kind, family] for result in results(ran, one_has_padding_alone))
    batch = inputs_of(HALVES[0])
    if family == "seq2seq":
        # An empty target still begins with a token, which the decoder routes: to the statistics it is as real as any.
        batch = {name: torch.cat([values, EMPTY[name]]) for name, values in batch.items()}
    expected = alone(build(kind, family), **batch)
    assert first["gradients"].keys() == second["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in first["gradients"].items():
        assert gradient.isfinite().all()
        assert torch.equal(second["gradients"][name], gradient)
        if family == "causal":
            assert_close(gradient, expected["gradients"][name], rtol=1e-5, atol=1e-7)
    assert second["loss"] == 0.0
    for name, values in expected["statistics"].items():
        assert torch.equal(first["statistics"][name], second["statistics"][name])
        if values.dtype == torch.int64:
            assert torch.equal(first["statistics"][name], values)
        else:  # floats by their bits, summed in another order
            assert_close(first["statistics"][name].view(torch.float32), values.view(torch.float32))


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_two_processes_with_padding_alone_learn_nothing_and_stay_finite(ran, kind, family):
    for facts in (result[kind, family] for result in results(ran, both_have_padding_alone)):
        assert facts["loss"] == 0.0
        assert all(not gradient.any() for gradient in facts["gradients"].values())
        if family == "causal":
            assert not any(values.any() for values in facts["statistics"].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_in_one_process_leaves_the_statistics_that_the_other_alone_would_have(ran, family):
    first, second = (result[family] for result in results(ran, one_meets_nan))
    expected = alone(build("following", family, **first_layer_alone(family)), **inputs_of(HALVES[0]))["statistics"]
    assert second["loss"] != second["loss"]
    for name, values in expected.items():
        assert torch.equal(first["statistics"][name], values), name
        assert torch.equal(second["statistics"][name], values), name
