"""Layer, losses and the language model's head against the float64 NumPy reference, values and gradients."""

import numpy as np
import pytest
import torch

from helpers import reference
from helpers.doubles import (
    BACKENDS,
    EXACT,
    HEAD,
    POSITIONS,
    SLOPE,
    arrays,
    double_model,
    layer_input,
    padded_batch,
    slopes_of,
)
from helpers.models import Decision
from modeling_stablemoe.model.losses_stablemoe import balance_loss, distillation_loss


ROUTINGS = ["greedy", "distilled", "frozen"]


def reference_layer(params, hidden, token_ids, mask, routing, table):
    return reference.moe_layer(
        params,
        "",
        hidden.reshape(-1, 32),
        token_ids.flatten().tolist(),
        routing=routing,
        table=table,
        mask=mask.flatten().tolist(),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("width", [37, 40])
def test_layer_output_equals_the_reference(routing, backend, width):
    layer = double_model(routing, backend, intermediate_size=width).model.moe_layers[0]
    hidden, token_ids, mask, _ = layer_input()
    table = layer.frozen_router.values().tolist() if routing == "frozen" else None
    expected, *_ = reference_layer(arrays(layer), hidden.detach().numpy(), token_ids, mask, routing, table)
    actual = layer(hidden, (token_ids, mask))
    torch.testing.assert_close(actual.detach().view(-1, 32), torch.from_numpy(expected), **EXACT)
    assert (actual - hidden)[mask].abs().max() > 0.1, "experts that change nothing would prove nothing"


@pytest.mark.parametrize("routing", ROUTINGS)
def test_router_takes_the_experts_and_scores_of_the_reference(routing):
    layer = double_model(routing).model.moe_layers[0]
    hidden, token_ids, mask, _ = layer_input()
    table = layer.frozen_router.values().tolist() if routing == "frozen" else None
    _, scores, distilled, assigned = reference_layer(
        arrays(layer), hidden.detach().numpy(), token_ids, mask, routing, table
    )
    frozen_index = layer.frozen_router(token_ids).view(-1, 1) if routing == "frozen" else None
    decision = Decision.of(layer.router(hidden, token_ids, frozen_index))
    assert decision.expert_index.flatten().tolist() == assigned.tolist()
    assert len(set(assigned.tolist())) > 2
    torch.testing.assert_close(decision.router_logits.detach(), torch.from_numpy(scores), **EXACT)
    gates = torch.from_numpy(reference.sigmoid(scores[np.arange(len(assigned)), assigned]))
    torch.testing.assert_close(decision.gate.detach().flatten(), gates, **EXACT)
    if routing == "frozen":
        assert decision.distilled_logits is None
    else:
        torch.testing.assert_close(decision.distilled_logits.detach(), torch.from_numpy(distilled), **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_layer_gradients_equal_finite_differences_of_the_reference(routing, backend):
    layer = double_model(routing, backend).model.moe_layers[0]
    hidden, token_ids, mask, weights = layer_input()
    table = layer.frozen_router.values().tolist() if routing == "frozen" else None
    (layer(hidden, (token_ids, mask)) * weights).sum().backward()

    def objective(params):
        output, *_ = reference_layer(params, params["hidden"], token_ids, mask, routing, table)
        return (output * weights.view(-1, 32).numpy()).sum()

    params = {**arrays(layer), "hidden": hidden.detach().numpy()}
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()} | {"hidden": hidden.grad}
    for name in params:
        if name == "frozen_router.routing_table":
            continue
        by_gradient, by_differences = slopes_of(gradients[name], objective, params, name, count=2)
        torch.testing.assert_close(by_gradient, by_differences, **SLOPE, msg=lambda text, name=name: f"{name}: {text}")
        if "distilled" in name:
            assert gradients[name] is None, f"{name} decides, but no output depends on it smoothly"
        else:
            assert by_gradient.abs().min() > 1e-4


def stage_one_losses(layer, hidden, token_ids, mask):
    decision = Decision.of(layer.router(hidden, token_ids))
    index = decision.expert_index.flatten()
    scores = {"router_logits": decision.router_logits, "expert_index": index, "mask": mask.flatten()}
    return {
        "balance": balance_loss(**scores),
        "centered balance": balance_loss(**scores, centered=True),
        "distillation": distillation_loss(
            distilled_logits=decision.distilled_logits, teacher_index=index, mask=mask.flatten()
        ),
    }


def reference_losses(params, token_ids, mask):
    real = mask.flatten().numpy()
    _, scores, distilled, assigned = reference.moe_layer(
        {name: values for name, values in params.items() if "router" in name},
        "",
        params["hidden"].reshape(-1, 32)[real],
        token_ids.flatten().numpy()[real],
        routing="greedy",
        mask=[False] * int(real.sum()),  # no expert is needed for the losses
    )
    return {
        "balance": reference.balance_loss(scores, assigned),
        "centered balance": reference.balance_loss(scores, assigned, centered=True),
        "distillation": reference.distillation_loss(distilled, assigned),
    }


@pytest.mark.parametrize("loss", ["balance", "centered balance", "distillation"])
def test_each_routing_loss_equals_the_reference(loss):
    layer = double_model("greedy").model.moe_layers[0]
    hidden, token_ids, mask, _ = layer_input()
    params = {**arrays(layer), "hidden": hidden.detach().numpy()}
    expected = torch.tensor(reference_losses(params, token_ids, mask)[loss], dtype=torch.float64)
    actual = stage_one_losses(layer, hidden, token_ids, mask)[loss].detach()
    torch.testing.assert_close(actual, expected, **EXACT)
    assert actual.abs() > 0.01


@pytest.mark.parametrize(
    ("loss", "learners"),
    [
        ("balance", {"hidden", "router.centroids"}),
        ("centered balance", {"hidden", "router.centroids"}),
        ("distillation", {"router.distilled_router.embedding", "router.distilled_router.centroids"}),
    ],
)
def test_each_routing_loss_has_the_gradients_of_the_reference_and_no_others(loss, learners):
    layer = double_model("greedy").model.moe_layers[0]
    hidden, token_ids, mask, _ = layer_input()
    params = {**arrays(layer), "hidden": hidden.detach().numpy()}
    stage_one_losses(layer, hidden, token_ids, mask)[loss].backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()} | {"hidden": hidden.grad}

    def objective(params):
        return reference_losses(params, token_ids, mask)[loss]

    for name in ("hidden", *(name for name in params if name.startswith("router."))):
        by_gradient, by_differences = slopes_of(gradients[name], objective, params, name, count=4)
        torch.testing.assert_close(by_gradient, by_differences, **SLOPE, msg=lambda text, name=name: f"{name}: {text}")
        if name in learners:
            assert by_gradient.abs().min() > 1e-4
    reached = {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    assert reached == learners


def reference_lm(params, token_ids, labels, mask, routing, tables):
    real = mask.bool()
    return reference.causal_lm(
        params,
        [row[kept].tolist() for row, kept in zip(token_ids, real, strict=True)],
        [row[kept].tolist() for row, kept in zip(labels, real, strict=True)],
        num_heads=4,
        num_layers=2,
        moe_positions=POSITIONS,
        routing=routing,
        tables=tables,
    )


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_language_model_equals_the_reference_in_logits_and_every_loss(routing, left):
    model = double_model(routing, moe_layer_positions=POSITIONS)
    token_ids, labels, mask = padded_batch(left)
    tables = [layer.frozen_router.values().tolist() for layer in model.model.moe_layers]
    expected = reference_lm(arrays(model), token_ids, labels, mask, routing, tables)
    with torch.no_grad():
        actual = model(token_ids, attention_mask=mask, labels=labels)
    logits = torch.from_numpy(np.concatenate(expected["logits"]))
    torch.testing.assert_close(actual.logits[mask.bool()], logits, **EXACT)
    values = {"task_loss": "task", "loss": "loss"}
    if routing != "distilled":
        values |= {"balance_loss": "balance", "distillation_loss": "distillation"}
    for name, reference_name in values.items():
        torch.testing.assert_close(float(actual[name]), float(expected[reference_name]), **HEAD)


@pytest.mark.parametrize("routing", ["greedy", "frozen"])
def test_every_parameter_of_the_language_model_has_the_gradient_of_the_reference(routing):
    model = double_model(routing, backend="grouped_mm", moe_layer_positions=POSITIONS)
    token_ids, labels, mask = padded_batch(left=True)
    tables = [layer.frozen_router.values().tolist() for layer in model.model.moe_layers]
    model(token_ids, attention_mask=mask, labels=labels).loss.backward()

    def objective(params):
        return reference_lm(params, token_ids, labels, mask, routing, tables)["loss"]

    params = arrays(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            pair = slopes_of(parameter.grad, objective, params, name, count=1)
            torch.testing.assert_close(*pair, **HEAD, msg=lambda text, name=name: f"{name}: {text}")
