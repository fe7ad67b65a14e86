"""Gated experts: against the reference, and against transformers' own."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from helpers import reference
from helpers.doubles import BACKENDS, EXACT, SLOPE, arrays, double_model, layer_input, slopes_of
from helpers.models import gradients, random_ids, tiny_config, tiny_model, tiny_seq2seq_model
from modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.convert import prune_experts


GATED = {
    "expert_type": "gated",
    "num_expert_sublayers": 1,
    "num_shared_experts": 2,
    "intermediate_size": 40,
    "hidden_act": "silu",
}
IDS = random_ids()


@pytest.mark.parametrize("backend", ["eager", "batched_mm"])  # transformers' grouped product knows no float64
@pytest.mark.parametrize("routing", ["greedy", "frozen"])
def test_a_layer_is_that_of_the_reference(routing, backend):
    model = double_model(routing, backend, **GATED)
    (layer,) = model.model.moe_layers
    hidden, ids, mask, weights = layer_input()
    output = layer(hidden, (ids, mask))
    (output * weights).sum().backward()
    params = arrays(layer)
    table = layer.frozen_router.values().tolist() if routing == "frozen" else None

    tokens = hidden.detach().flatten(0, 1).numpy(), ids.flatten().tolist()
    options = {"routing": routing, "table": table, "mask": mask.flatten().tolist()}

    def run(params):
        return reference.moe_layer(params, "", *tokens, **options)[0]

    assert_close(output.detach().flatten(0, 1), torch.from_numpy(run(params)), **EXACT)
    names = ["norm.weight", "experts.gate_up_proj", "experts.down_proj", "shared_experts.up_proj.weight"]
    for name in [*names, "router.centroids"]:
        gradient = layer.get_parameter(name).grad
        by_gradient, by_differences = slopes_of(
            gradient, lambda params: (run(params) * weights.flatten(0, 1).numpy()).sum(), params, name
        )
        assert_close(by_gradient, by_differences, **SLOPE, msg=name)


def test_grouped_products_are_those_of_one_expert_after_the_other():
    gradients_of = {}
    for backend in BACKENDS:
        model = tiny_model(**GATED).train()
        model.set_experts_implementation(backend)
        model(IDS, labels=IDS).loss.backward()
        gradients_of[backend] = gradients(model)
    for backend in BACKENDS[1:]:
        for name, gradient in gradients_of["eager"].items():
            assert_close(gradients_of[backend][name], gradient, rtol=1e-4, atol=1e-5, msg=f"{backend}: {name}")


def test_widths_that_grouped_products_cannot_take_run_one_expert_after_the_other():
    model = tiny_model(**{**GATED, "intermediate_size": 37})
    assert model.config._experts_implementation == "eager"
    assert model(IDS).logits.isfinite().all()


def test_the_experts_are_laid_out_as_mixtral_s():
    config = tiny_config(**GATED)
    (layer,) = StableMoEForCausalLM(config).model.moe_layers
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    theirs = MixtralExperts(MixtralConfig(**sizes, num_local_experts=config.num_experts))
    theirs.config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    layer.experts.load_state_dict(theirs.state_dict())
    hidden, index, weights = torch.randn(9, 32), torch.randint(5, (9, 1)), torch.rand(9, 1)
    assert_close(layer.experts(hidden, index, weights), theirs(hidden, index, weights))


@pytest.mark.parametrize("make", [tiny_model, tiny_seq2seq_model])
def test_new_experts_change_nothing(make):
    shaken = make(**GATED)
    for layer in type(shaken)(shaken.config).moe_layers_by_name.values():
        hidden = torch.randn(2, 3, shaken.config.hidden_size)
        assert torch.equal(layer(hidden, torch.zeros(2, 3, dtype=torch.long)), hidden)


def test_experts_that_are_shared_in_stage_1_stay_equal_and_part_in_stage_2():
    model = StableMoEForCausalLM(tiny_config(**GATED, share_experts_in_stage1=True, moe_layer_positions=[1])).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    (layer,) = model.model.moe_layers

    def spread():
        return max(float((values - values[:1]).abs().max()) for values in layer.experts.parameters())

    for is_frozen in (False, True):
        if is_frozen:
            model.freeze_router()
        for _ in range(2):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
        assert layer.experts.down_proj.abs().max() > 0
        assert (spread() > 1e-6) == is_frozen


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_over_capacity_and_padding_pass_with_what_all_experts_take(backend):
    model = tiny_model(**GATED, expert_capacity_factor=0.5).train()
    model.set_experts_implementation(backend)
    (layer,) = model.model.moe_layers
    hidden, mask = torch.randn(1, 30, 32), torch.ones(1, 30, dtype=torch.bool)
    mask[0, :4] = False
    hidden[0, 0] = float("nan")  # padding may hold anything
    hidden.requires_grad_()
    change = layer(hidden, (torch.randint(5, (1, 30)), mask)) - hidden
    assert not change[0, 1:4].any()
    shared = layer.shared_experts(layer.norm(hidden))
    only_shared = torch.isclose(change[0, 4:], shared[0, 4:], atol=1e-6).all(-1)
    assert 0 < only_shared.sum() < 26, "some tokens have an expert, some are over capacity"
    change[0, 4:].sum().backward()
    assert hidden.grad[0, 4:].isfinite().all()


@pytest.mark.parametrize("k", [1, 2])
def test_a_pruned_model_has_the_logits_of_the_whole_one(k):
    model = tiny_model(**GATED, num_experts_per_tok=k).eval()
    ids = torch.arange(99)
    tables = torch.stack([ids % 5, (ids + 1) % 5], dim=-1)[:, :k].squeeze(-1)
    model.set_routing_tables(tables.unsqueeze(0))
    kept = ids[ids % 5 < 3]
    pruned = prune_experts(model, kept, confine_generation=False)
    assert pruned.config.num_experts == 2 + k
    rows = kept[2:32].view(2, -1)
    with torch.no_grad():
        assert_close(pruned(rows).logits, model(rows).logits)
    lost = pruned.route(ids[3::5].view(1, -1)).view(-1, k)
    assert lost.max() < 2 + k
    assert all(len(set(row)) == k for row in lost.tolist())


def test_adapters_reach_the_experts_as_those_of_any_moe():
    peft = pytest.importorskip("peft")
    model = tiny_model(**GATED)
    model.freeze_router()
    with torch.no_grad():
        expected = model(IDS).logits
    names = [name for name, _ in model.named_parameters() if name.endswith(("gate_up_proj", "experts.down_proj"))]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_parameters=names, target_modules=[]))
    with torch.no_grad():
        assert_close(adapted(IDS).logits, expected)
    adapted.train()(IDS, labels=IDS).loss.backward()
    assert [name for name, values in adapted.named_parameters() if values.grad is not None and "experts" in name]
    assert np.array_equal(adapted.get_base_model().route(IDS), model.route(IDS))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"expert_type": "gated", "num_expert_sublayers": 2},
            r"`num_expert_sublayers` \(2\): a gated expert is one FFN",
        ),
        ({"num_shared_experts": 1}, r"`num_shared_experts` \(1\) are gated experts"),
        ({"expert_type": "dense"}, "`expert_type` 'dense' is unknown"),
        (
            {"moe_placement": "ffn"},
            '`moe_placement` "ffn" puts gated experts in place of the gated FFNs of a `backbone_config`',
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny_config(**({"num_expert_sublayers": 1} | fields))
