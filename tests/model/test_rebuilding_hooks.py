"""Programs whose hooks rebuild what passes between modules: the same losses, gradients, logits and tokens."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from transformers.utils import ModelOutput

from helpers.models import COUNTING, random_ids, tiny_classifier, tiny_model, tiny_seq2seq_model
from modeling_stablemoe.model.pretrained_stablemoe import check_range


pytestmark = pytest.mark.pairs


BUILDERS = {"language model": tiny_model, "translation": tiny_seq2seq_model, "classifier": tiny_classifier}
ROUTERS = {
    "stable": {},
    "following": COUNTING,
    "switch": {"router_type": "switch"},
    "hash": {"router_type": "hash"},
    "shared": {"share_experts_in_stage1": True},
    **{kind: {"distilled_router": kind} for kind in ("bigram", "cnn", "transformer_2")},
}


def as_plain(value):
    """Rebuild as compressed-tensors and auto-round do when they move tensors: a tuple of any kind becomes a tuple."""
    if isinstance(value, torch.Tensor):
        return value.view_as(value)
    if isinstance(value, ModelOutput):
        return type(value)(**{key: as_plain(v) for key, v in value.items()})
    if isinstance(value, dict):
        return {key: as_plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(as_plain(v) for v in value)
    return value


def as_its_type(value):
    """Rebuild as others do, by calling the type with what there is, which a named tuple does not take."""
    if isinstance(value, torch.Tensor):
        return value.view_as(value)
    if isinstance(value, list | tuple):
        return type(value)(as_its_type(v) for v in value)
    return value


def rebuild_everything(model, rebuild):
    for module in model.modules():
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (rebuild(args), {key: rebuild(v) for key, v in kwargs.items()}), with_kwargs=True
        )
        module.register_forward_hook(lambda _, args, output: rebuild(output))
    return model


def batch_of(model) -> dict[str, torch.Tensor]:
    ids = random_ids(high=91)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.tensor([0, 2, 1]) if hasattr(model, "score") else ids,
    }


def step(model) -> dict[str, torch.Tensor]:
    outputs = model.train()(**batch_of(model))
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": outputs.loss, "aux_loss": outputs.aux_loss, **gradients}


def infer(model) -> dict[str, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        outputs = model(**batch_of(model), output_router_logits=True)
        results = {"logits": outputs.logits, "loss": outputs.loss}
        for layer, index in enumerate(outputs.expert_indices):
            results[f"experts of layer {layer}"] = index
        if model.can_generate():
            asked = {name: value for name, value in batch_of(model).items() if name != "labels"}
            results["tokens"] = model.generate(**asked, max_new_tokens=2, num_beams=2, do_sample=False)
    return results


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        # A view between two modules is one more place where gradients meet, which adds them in another order.
        assert_close(actual[name], values, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# The routers that pass most between modules.
CASES = [("following", as_plain), ("bigram", as_its_type), ("transformer_2", as_plain)]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(ROUTERS, [as_plain, as_its_type])
    if case not in CASES and (case[1] is as_plain or case[0] in ("following", "transformer_2"))
]


@pytest.mark.parametrize(("router", "rebuild"), CASES)
@pytest.mark.parametrize("kind", BUILDERS)
def test_rebuilt_tuples_change_nothing_in_either_stage(kind, router, rebuild):
    expected, actual = BUILDERS[kind](**ROUTERS[router]), BUILDERS[kind](**ROUTERS[router])
    rebuild_everything(actual, rebuild)
    assert_same(step(actual), step(expected))
    assert_same(infer(actual), infer(expected))
    if expected.routing_stage == 1 and expected.config.distilled_router is not None:
        expected.freeze_router()
        actual.freeze_router()
        assert actual.router_fingerprint() == expected.router_fingerprint()
        assert_same(step(actual), step(expected))
        assert_same(infer(actual), infer(expected))


@pytest.mark.parametrize("router", ["stable", "following", "hash", "bigram"])
@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("stage", [1, 2])
def test_block_wise_quantisers_take_the_model_apart_into_blocks_and_moe_layers(kind, router, stage):
    """llm-compressor traces the way between them, and calibrates each in turn on what those before it give."""
    helpers = pytest.importorskip("llmcompressor.pipelines.sequential.helpers")
    arguments = pytest.importorskip("llmcompressor.args.dataset_arguments")
    model = BUILDERS[kind](**ROUTERS[router]).eval()
    if stage == 2 and model.routing_stage == 1:
        model.freeze_router()
    values = {"input_ids": random_ids(high=91)}
    if kind == "translation":
        values["decoder_input_ids"] = random_ids(high=91, seed=1)
    scores = []
    head = model.score if kind == "classifier" else model.lm_head
    head.register_forward_hook(lambda _, args, output: scores.append(output))
    with torch.no_grad():
        model(**values)
        targets = sorted(model._no_split_modules)
        parts = helpers.trace_subgraphs(model, values, targets, arguments.DatasetArguments().tracing_ignore)
        for part in parts:
            values |= part.forward(model, **{name: values[name] for name in part.input_names})
    expected, actual = scores
    assert_close(actual, expected)
    if kind == "language model":
        assert len(parts) == 1 + len(model.model.layers) + len(model.model.moe_layers)


def test_a_symbolic_trace_is_not_asked_for_values():
    class Checked(torch.nn.Module):
        def forward(self, ids):
            check_range(ids, 5, "id", "")
            return ids + 1

    assert torch.fx.symbolic_trace(Checked())(torch.tensor([3])).item() == 4
