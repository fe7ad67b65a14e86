"""The sequence-to-sequence model, and the language model with its options, against the float64 NumPy reference."""

import re

import numpy as np
import pytest
import torch

from helpers import reference
from helpers.doubles import POSITIONS, arrays, double_model, padded_batch, slopes_of
from helpers.models import padded, random_ids, tiny_seq2seq_model


ROUTINGS = ["greedy", "distilled", "frozen"]
# transformers computes the cross-entropy in float32, whatever the model; the package, sinusoidal positions too.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 1e-9, "atol": 1e-9}
PAD, START, EOS, IGNORED = 2, 1, 0, -100
SMOOTHING = 0.15
OPTIONS = {
    "pre-norm, learned": {"before": True, "sinusoidal": False, "scale": False},
    "post-norm, sinusoidal, scaled": {"before": False, "sinusoidal": True, "scale": True},
    "pre-norm, sinusoidal": {"before": True, "sinusoidal": True, "scale": False},
    "post-norm, learned, scaled": {"before": False, "sinusoidal": False, "scale": True},
}

# One of each kind is enough: the reference is slow.
LEARNERS = re.compile(
    r"embed_|\.centroids|distilled_router\.embedding|encoder\.layers\.1\.(self_attn\.v|input_layernorm\.weight)"
    r"|decoder\.layers\.2\.(cross_attn\.(k|o)_proj|cross_attn_layernorm|self_attn\.q_proj)\S*weight"
    r"|sublayers\.1\.up_proj$|model\.\w+\.norm\.weight"
)


def config_of(options: dict) -> dict:
    return {
        "do_layer_norm_before": options["before"],
        "position_embedding_type": "sinusoidal" if options["sinusoidal"] else "learned",
        "scale_embedding": options["scale"],
    }


def double_seq2seq(routing: str, options: dict, **overrides):
    model = tiny_seq2seq_model(**config_of(options), label_smoothing=SMOOTHING, **overrides).double()
    if routing == "frozen":
        model.freeze_router()
        with torch.no_grad():  # the table stands for D and E^, whatever becomes of them
            for layer in model.moe_layers_by_name.values():
                layer.router.distilled_router.embedding.normal_()
    return model.train(routing != "distilled")


def pairs(ignored: bool):
    """Sources and targets of different lengths; with `ignored`, some tokens inside a target are not predicted."""
    sources = [random_ids(1, length, seed=length, low=3, high=91)[0] for length in (6, 3, 5)]
    targets = [random_ids(1, length, seed=10 + length, low=3, high=91)[0] for length in (3, 5, 4)]
    targets = [torch.cat([target, torch.tensor([EOS])]) for target in targets]
    if ignored:
        targets[1][1:3] = IGNORED
        targets[2][2] = IGNORED
    return sources, targets


def batch_of(sources, targets, side: str) -> dict[str, torch.Tensor]:
    mask = padded([torch.ones_like(row) for row in sources], 0, side)
    return {
        "input_ids": padded(sources, PAD, side),
        "attention_mask": mask,
        "labels": padded(targets, IGNORED),
    }


def reference_seq2seq(params, model, sources, targets, routing: str, options: dict) -> dict:
    def side(stack, num_layers, positions):
        tables = [layer.frozen_router.values().tolist() for layer in stack.moe_layers]
        return {"num_layers": num_layers, "moe_positions": positions, "tables": tables}

    return reference.seq2seq(
        params,
        [row.tolist() for row in sources],
        [row.tolist() for row in targets],
        num_heads=3,
        encoder=side(model.model.encoder, 2, [1]),
        decoder=side(model.model.decoder, 3, [0, 2]),
        routing=routing,
        start=START,
        pad=PAD,
        smoothing=SMOOTHING if model.training else 0.0,
        num_experts=5,
        **options,
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", OPTIONS)
def test_model_equals_the_reference_in_logits_loads_and_every_loss(name, routing, side):
    options = OPTIONS[name]
    model = double_seq2seq(routing, options)
    sources, targets = pairs(ignored=True)
    expected = reference_seq2seq(arrays(model), model, sources, targets, routing, options)
    batch = batch_of(sources, targets, side)
    with torch.no_grad():
        actual = model(**batch, output_router_logits=True)
    logits = torch.cat([row[: len(target)] for row, target in zip(actual.logits, targets, strict=True)])
    tolerance = FLOAT32 if options["sinusoidal"] else EXACT
    torch.testing.assert_close(logits, torch.from_numpy(np.concatenate(expected["logits"])), **tolerance)
    assert actual.expert_load.tolist() == expected["loads"]
    values = {"task_loss": expected["task"], "loss": expected["loss"]}
    if routing != "distilled":
        values |= {"balance_loss": expected["balance"], "distillation_loss": expected["distillation"]}
        values |= {f"{side}_aux_loss": value for side, value in expected["auxiliary"].items()}
        values["aux_loss"] = sum(expected["auxiliary"].values())
    for key, value in values.items():
        torch.testing.assert_close(float(actual[key]), float(value), **FLOAT32, msg=lambda m, key=key: f"{key}: {m}")
    if routing == "greedy":
        assert min(expected["auxiliary"].values()) > 0.1
        assert float(actual["loss"]) > float(actual["task_loss"]) + 0.2


@pytest.mark.parametrize(
    ("name", "routing"),
    [
        ("pre-norm, learned", "greedy"),
        ("post-norm, sinusoidal, scaled", "greedy"),
        ("post-norm, learned, scaled", "frozen"),
    ],
)
def test_parameters_of_every_kind_have_the_gradients_of_the_reference(name, routing):
    options = OPTIONS[name]
    model = double_seq2seq(routing, options)
    sources, targets = pairs(ignored=False)  # no pad token as input: its embedding is frozen by intention
    model(**batch_of(sources, targets, "left")).loss.backward()

    def objective(params):
        return reference_seq2seq(params, model, sources, targets, routing, options)["loss"]

    params, learned = arrays(model), set()
    for name, parameter in model.named_parameters():
        if LEARNERS.search(name):
            by_gradient, by_differences = slopes_of(parameter.grad, objective, params, name, count=1)
            torch.testing.assert_close(
                by_gradient, by_differences, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
            if by_gradient.abs() > 1e-4:
                learned.add(name)
    # The kinds that must not hide among tensors without a gradient.
    routers = [f"{layer}.router" for layer in model.moe_layers_by_name]
    assert learned >= {"model.encoder.embed_tokens.weight", *(f"{router}.centroids" for router in routers)}
    distilled = {f"{router}.distilled_router.{kind}" for router in routers for kind in ("embedding", "centroids")}
    assert learned & distilled == (distilled if routing == "greedy" else set())
    assert any("cross_attn.k_proj" in name for name in learned)


def test_embedding_of_the_pad_token_learns_from_the_head_alone():
    # It is an input only where a label inside a target is ignored; `nn.Embedding(padding_idx=...)` keeps it still.
    options = OPTIONS["pre-norm, learned"]
    model = double_seq2seq("frozen", options)
    sources, targets = pairs(ignored=True)
    outputs = model(**batch_of(sources, targets, "right"))
    outputs.loss.backward()
    gradient = model.lm_head.weight.grad[PAD].clone()
    untied = double_seq2seq("frozen", options)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    untied(**batch_of(sources, targets, "right")).loss.backward()
    torch.testing.assert_close(gradient, untied.lm_head.weight.grad[PAD], rtol=1e-9, atol=1e-12)
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", list(OPTIONS)[1:])
def test_language_model_with_the_same_options_equals_the_reference(name, routing):
    options = OPTIONS[name]
    model = double_model(routing, moe_layer_positions=POSITIONS, **config_of(options))
    token_ids, labels, mask = padded_batch(left=True)
    real = mask.bool()
    expected = reference.causal_lm(
        arrays(model),
        [row[kept].tolist() for row, kept in zip(token_ids, real, strict=True)],
        [row[kept].tolist() for row, kept in zip(labels, real, strict=True)],
        num_heads=4,
        num_layers=2,
        moe_positions=POSITIONS,
        routing=routing,
        tables=[layer.frozen_router.values().tolist() for layer in model.model.moe_layers],
        **options,
    )
    with torch.no_grad():
        actual = model(token_ids, attention_mask=mask, labels=labels)
    logits = torch.from_numpy(np.concatenate(expected["logits"]))
    tolerance = FLOAT32 if options["sinusoidal"] else EXACT
    torch.testing.assert_close(actual.logits[real], logits, **tolerance)
    torch.testing.assert_close(float(actual.loss), float(expected["loss"]), **FLOAT32)
