"""Layer, losses and whole models of both families against the float64 NumPy reference, values and gradients."""

import re

import numpy as np
import pytest
import torch

from helpers import reference
from helpers.doubles import BACKENDS, EXACT, HEAD, POSITIONS, SLOPE, arrays, double_model, layer_input, slopes_of
from helpers.models import Decision, padded, random_ids, tiny_seq2seq_model
from modeling_stablemoe.model.losses_stablemoe import balance_loss, distillation_loss


pytestmark = pytest.mark.pairs


ROUTINGS = ["greedy", "distilled", "frozen"]


def reference_layer(params, hidden, token_ids, mask, routing, table, k, normalized):
    return reference.moe_layer(
        params,
        "",
        hidden.reshape(-1, 32),
        token_ids.flatten().tolist(),
        routing=routing,
        table=table,
        mask=mask.flatten().tolist(),
        k=k,
        normalized=normalized,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("width", "k", "normalized"), [(37, 1, False), (40, 1, False), (37, 2, False), (40, 3, False), (37, 3, True)]
)
def test_layer_output_equals_the_reference(routing, backend, width, k, normalized):
    fields = {"moe_intermediate_size": width, "num_experts_per_tok": k, "norm_topk_prob": normalized}
    layer = double_model(routing, backend, **fields).model.moe_layers[0]
    hidden, token_ids, mask, _ = layer_input()
    table = layer.frozen_router.values().tolist() if routing == "frozen" else None
    expected, *_, assigned = reference_layer(
        arrays(layer), hidden.detach().numpy(), token_ids, mask, routing, table, k, normalized
    )
    actual = layer(hidden, (token_ids, mask))
    torch.testing.assert_close(actual.detach().view(-1, 32), torch.from_numpy(expected), **EXACT)
    assert len(np.unique(assigned)) > 2
    assert (actual - hidden)[mask].abs().max() > 0.1, "experts that change nothing would prove nothing"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("k", "normalized"), [(1, False), (2, False), (2, True)])
def test_layer_gradients_equal_finite_differences_of_the_reference(routing, backend, k, normalized):
    fields = {"num_experts_per_tok": k, "norm_topk_prob": normalized}
    layer = double_model(routing, backend, **fields).model.moe_layers[0]
    hidden, token_ids, mask, weights = layer_input()
    table = layer.frozen_router.values().tolist() if routing == "frozen" else None
    (layer(hidden, (token_ids, mask)) * weights).sum().backward()

    def objective(params):
        output, *_ = reference_layer(params, params["hidden"], token_ids, mask, routing, table, k, normalized)
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
    index = decision.expert_index.flatten(0, 1)
    scores = {"router_logits": decision.router_logits, "expert_index": index, "mask": mask.flatten()}
    return {
        "balance": balance_loss(**scores),
        "centered balance": balance_loss(**scores, centered=True),
        "distillation": distillation_loss(
            distilled_logits=decision.distilled_logits, teacher_index=index, mask=mask.flatten()
        ),
    }


def reference_losses(params, token_ids, mask, k):
    real = mask.flatten().numpy()
    _, scores, distilled, assigned = reference.moe_layer(
        {name: values for name, values in params.items() if "router" in name},
        "",
        params["hidden"].reshape(-1, 32)[real],
        token_ids.flatten().numpy()[real],
        routing="greedy",
        mask=[False] * int(real.sum()),  # no expert is needed for the losses
        k=k,
    )
    return {
        "balance": reference.balance_loss(scores, assigned),
        "centered balance": reference.balance_loss(scores, assigned, centered=True),
        "distillation": reference.distillation_loss(distilled, assigned),
    }


@pytest.mark.parametrize(
    ("loss", "learners"),
    [
        ("balance", {"hidden", "router.centroids"}),
        ("centered balance", {"hidden", "router.centroids"}),
        ("distillation", {"router.distilled_router.embedding", "router.distilled_router.centroids"}),
    ],
)
@pytest.mark.parametrize("k", [1, 2])
def test_each_routing_loss_has_value_and_gradients_of_the_reference_and_no_other_gradients(loss, learners, k):
    layer = double_model("greedy", num_experts_per_tok=k).model.moe_layers[0]
    hidden, token_ids, mask, _ = layer_input()
    params = {**arrays(layer), "hidden": hidden.detach().numpy()}

    def objective(params):
        return reference_losses(params, token_ids, mask, k)[loss]

    actual = stage_one_losses(layer, hidden, token_ids, mask)[loss]
    torch.testing.assert_close(actual.detach(), torch.tensor(objective(params), dtype=torch.float64), **EXACT)
    assert actual.abs() > 0.01
    actual.backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()} | {"hidden": hidden.grad}
    for name in ("hidden", *(name for name in params if name.startswith("router."))):
        by_gradient, by_differences = slopes_of(gradients[name], objective, params, name, count=4)
        torch.testing.assert_close(by_gradient, by_differences, **SLOPE, msg=lambda text, name=name: f"{name}: {text}")
        if name in learners:
            assert by_gradient.abs().min() > 1e-4
    assert {name for name, gradient in gradients.items() if gradient is not None and gradient.any()} == learners


# Whole models


# transformers computes the cross-entropy in float32, whatever the model; the package, sinusoidal positions too.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
START, EOS, IGNORED = 1, 0, -100
PAD = {"causal": 1, "seq2seq": 2}
SMOOTHING = 0.15
OPTIONS = {
    "pre-norm, learned": {"before": True, "sinusoidal": False, "scale": False, "k": 1},
    "post-norm, sinusoidal, scaled": {"before": False, "sinusoidal": True, "scale": True, "k": 1},
    "pre-norm, sinusoidal": {"before": True, "sinusoidal": True, "scale": False, "k": 1},
    "post-norm, learned, scaled": {"before": False, "sinusoidal": False, "scale": True, "k": 1},
    "pre-norm, learned, two experts": {"before": True, "sinusoidal": False, "scale": False, "k": 2},
    "post-norm, learned, scaled, three experts": {"before": False, "sinusoidal": False, "scale": True, "k": 3},
}


def build(family: str, routing: str, options: dict, **overrides):
    overrides |= {
        "do_layer_norm_before": options["before"],
        "position_embedding_type": "sinusoidal" if options["sinusoidal"] else "learned",
        "scale_embedding": options["scale"],
        "num_experts_per_tok": options["k"],
    }
    if family == "causal":
        return double_model(routing, moe_layer_positions=POSITIONS, **overrides)
    model = tiny_seq2seq_model(label_smoothing=SMOOTHING, **overrides).double()
    if routing == "frozen":
        model.freeze_router()
        with torch.no_grad():  # the table stands for D and E^, whatever becomes of them
            for layer in model.moe_layers_by_name.values():
                layer.router.distilled_router.embedding.normal_()
    return model.train(routing != "distilled")


def rows_of(family: str, ignored: bool = True) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs and labels of different lengths; with `ignored`, some tokens inside a row are not predicted."""
    if family == "causal":
        inputs = [random_ids(1, length, seed=length, low=3, high=99)[0] for length in (7, 4, 6)]
        labels = [row.clone() for row in inputs]
        for row in labels:
            row[0] = IGNORED  # padding before it would have to predict it
    else:
        inputs = [random_ids(1, length, seed=length, low=3, high=91)[0] for length in (6, 3, 5)]
        labels = [random_ids(1, length, seed=10 + length, low=3, high=91)[0] for length in (3, 5, 4)]
        labels = [torch.cat([row, torch.tensor([EOS])]) for row in labels]
    if ignored:
        labels[1][1:3] = IGNORED
        labels[2][2] = IGNORED
    return inputs, labels


def batch_of(family: str, inputs, labels, side: str) -> dict[str, torch.Tensor]:
    return {
        "input_ids": padded(inputs, PAD[family], side),
        "attention_mask": padded([torch.ones_like(row) for row in inputs], 0, side),
        "labels": padded(labels, IGNORED, side if family == "causal" else "right"),
    }


def expected_of(family: str, params, model, inputs, labels, routing: str, options: dict) -> dict:
    def side(stack, num_layers, positions):
        tables = [layer.frozen_router.values().tolist() for layer in stack.moe_layers]
        return {"num_layers": num_layers, "moe_positions": positions, "tables": tables}

    rows = [[row.tolist() for row in each] for each in (inputs, labels)]
    if family == "causal":
        return reference.causal_lm(
            params, *rows, num_heads=4, **side(model.model, 2, POSITIONS), routing=routing, **options
        )
    return reference.seq2seq(
        params,
        *rows,
        num_heads=3,
        encoder=side(model.model.encoder, 2, [1]),
        decoder=side(model.model.decoder, 3, [0, 2]),
        routing=routing,
        start=START,
        pad=PAD[family],
        smoothing=SMOOTHING if model.training else 0.0,
        num_experts=5,
        **options,
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", PAD)
def test_a_model_equals_the_reference_in_logits_loads_and_every_loss(family, name, routing, side):
    options = OPTIONS[name]
    model = build(family, routing, options)
    inputs, labels = rows_of(family)
    batch = batch_of(family, inputs, labels, side)
    expected = expected_of(family, arrays(model), model, inputs, labels, routing, options)
    with torch.no_grad():
        actual = model(**batch, output_router_logits=True)
    real = batch["attention_mask"] if family == "causal" else padded([torch.ones_like(row) for row in labels], 0)
    logits = torch.from_numpy(np.concatenate(expected["logits"]))
    torch.testing.assert_close(actual.logits[real.bool()], logits, **FLOAT32 if options["sinusoidal"] else EXACT)
    assert family == "causal" or actual.expert_load.tolist() == expected["loads"]
    values = {"task_loss": expected["task"], "loss": expected["loss"]}
    if routing != "distilled":
        values |= {"balance_loss": expected["balance"], "distillation_loss": expected["distillation"]}
        values |= {f"{name}_aux_loss": value for name, value in expected.get("auxiliary", {}).items()}
        values["aux_loss"] = expected["loss"] - expected["task"]
    for key, value in values.items():
        torch.testing.assert_close(float(actual[key]), float(value), **FLOAT32, msg=lambda m, key=key: f"{key}: {m}")
    if routing == "greedy":
        assert float(actual.loss) > float(actual.task_loss) + 0.1


@pytest.mark.parametrize(
    ("name", "routing"),
    [
        ("pre-norm, learned", "greedy"),
        ("pre-norm, learned", "frozen"),
        ("pre-norm, learned, two experts", "greedy"),
    ],
)
def test_every_parameter_of_the_language_model_has_the_gradient_of_the_reference(name, routing):
    options = OPTIONS[name]
    model = build("causal", routing, options)
    model.set_experts_implementation("grouped_mm")
    inputs, labels = rows_of("causal")
    model(**batch_of("causal", inputs, labels, "left")).loss.backward()

    def objective(params):
        return expected_of("causal", params, model, inputs, labels, routing, options)["loss"]

    params = arrays(model)
    for name, parameter in model.named_parameters():
        pair = slopes_of(parameter.grad, objective, params, name, count=1)
        torch.testing.assert_close(*pair, **HEAD, msg=lambda text, name=name: f"{name}: {text}")


# One of each kind is enough: the reference is slow.
LEARNERS = re.compile(
    r"embed_|\.centroids|distilled_router\.embedding|encoder\.layers\.1\.(self_attn\.v|input_layernorm\.weight)"
    r"|decoder\.layers\.2\.(cross_attn\.(k|o)_proj|cross_attn_layernorm|self_attn\.q_proj)\S*weight"
    r"|sublayers\.1\.up_proj$|model\.\w+\.norm\.weight"
)


@pytest.mark.parametrize(
    ("name", "routing"),
    [
        ("post-norm, sinusoidal, scaled", "greedy"),
        ("post-norm, learned, scaled", "frozen"),
        ("post-norm, learned, scaled, three experts", "greedy"),
        pytest.param("pre-norm, learned", "greedy", marks=pytest.mark.slow),
    ],
)
def test_parameters_of_an_encoder_decoder_have_the_gradients_of_the_reference(name, routing):
    options = OPTIONS[name]
    model = build("seq2seq", routing, options)
    rows = rows_of("seq2seq", ignored=False)  # no pad token as input: its embedding is frozen by intention
    model(**batch_of("seq2seq", *rows, "left")).loss.backward()

    def objective(params):
        return expected_of("seq2seq", params, model, *rows, routing, options)["loss"]

    params, learned = arrays(model), set()
    for name, parameter in model.named_parameters():
        if LEARNERS.search(name):
            pair = slopes_of(parameter.grad, objective, params, name, count=1)
            torch.testing.assert_close(*pair, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
            if pair[0].abs() > 1e-4:
                learned.add(name)
    # The kinds that must not hide among tensors without a gradient.
    routers = [f"{layer}.router" for layer in model.moe_layers_by_name]
    assert learned >= {"model.encoder.embed_tokens.weight", *(f"{router}.centroids" for router in routers)}
    distilled = {f"{router}.distilled_router.{kind}" for router in routers for kind in ("embedding", "centroids")}
    assert learned & distilled == (distilled if routing == "greedy" else set())
    assert any("cross_attn.k_proj" in name for name in learned)


def test_embedding_of_the_pad_token_learns_from_the_head_alone():
    # It is an input only where a label inside a target is ignored; `nn.Embedding(padding_idx=...)` keeps it still.
    gradients = []
    for is_tied in (True, False):
        model = build("seq2seq", "frozen", OPTIONS["pre-norm, learned"])
        if not is_tied:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model(**batch_of("seq2seq", *rows_of("seq2seq"), "right")).loss.backward()
        gradients.append(model.lm_head.weight.grad[PAD["seq2seq"]])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradients[0].abs().max() > 1e-4
