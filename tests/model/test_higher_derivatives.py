"""Derivatives beyond the gradient: Hessian-vector products, and the transforms of `torch.func`, with every backend."""

import pytest
import torch
from torch.autograd import functional
from torch.testing import assert_close

from helpers.models import random_ids, tiny_config, tiny_model, tiny_seq2seq_model
from modeling_stablemoe import StableMoEForSequenceClassification


pytestmark = pytest.mark.pairs


BACKENDS = ["grouped_mm", "batched_mm"]


def classifier(**overrides):
    model = StableMoEForSequenceClassification(tiny_config(num_labels=3, **overrides))
    model.load_state_dict(tiny_model(**overrides).state_dict(), strict=False)
    return model


BUILDERS = {"language model": tiny_model, "translation": tiny_seq2seq_model, "classifier": classifier}


def smooth(build, **overrides):
    """A model in float64, whose activation has a second derivative; nor has PyTorch's fused attention one on a CPU."""
    return build(hidden_act="gelu", attn_implementation="eager", dropout=0.0, **overrides).double()


def batch_of(model) -> dict[str, torch.Tensor]:
    ids = random_ids(high=91)
    return {"input_ids": ids, "labels": torch.tensor([0, 2, 1]) if hasattr(model, "score") else ids}


def hessian_vector_product(model, batch) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters.values()]
    options = {"allow_unused": True, "materialize_grads": True}
    gradient = torch.autograd.grad(model(**batch).loss, list(parameters.values()), create_graph=True, **options)
    slope = sum((g * direction).sum() for g, direction in zip(gradient, directions, strict=True))
    return dict(zip(parameters, torch.autograd.grad(slope, list(parameters.values()), **options), strict=True))


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        # The loss and the gates are computed in float32 at least, whatever the model's dtype.
        assert_close(actual[name], values, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_hessian_vector_product_has_every_term_with_every_backend(kind, stage):
    model = smooth(BUILDERS[kind]).train()
    if stage == 2:
        model.freeze_router()
    model.set_experts_implementation("eager")
    expected = hessian_vector_product(model, batch_of(model))
    experts = [name for name in expected if name.endswith("up_proj") and "expert_stack" in name]
    assert all(expected[name].abs().max() > 1e-4 for name in experts)
    for backend in BACKENDS:
        model.set_experts_implementation(backend)
        assert_same(hessian_vector_product(model, batch_of(model)), expected)


def test_a_gradient_that_is_differentiated_is_the_gradient():
    model = smooth(tiny_model).train()
    parameters = [p for name, p in model.named_parameters() if "expert_stack" in name]
    loss = model(**batch_of(model)).loss
    plain = torch.autograd.grad(loss, parameters, retain_graph=True)
    for again, gradient in zip(torch.autograd.grad(loss, parameters, create_graph=True), plain, strict=True):
        assert_close(again, gradient, rtol=1e-10, atol=1e-12)


class OfExperts:
    """A scalar function of some parameters of a model's experts, which depends on its logits."""

    def __init__(self, backend: str):
        self.model = smooth(tiny_model).eval()
        self.model.set_experts_implementation(backend)
        prefix = "model.moe_layers.0.expert_stack.sublayers.0."
        self.names = [prefix + name for name in ("layernorm_weight", "up_proj_bias", "down_proj_bias")]
        self.point = tuple(self.model.get_parameter(name).detach().clone() for name in self.names)
        generator = torch.Generator().manual_seed(0)
        self.direction = tuple(torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in self.point)

    def __call__(self, *values, input_ids=None):
        state = dict(zip(self.names, values, strict=True))
        ids = random_ids() if input_ids is None else input_ids
        return torch.func.functional_call(self.model, state, (ids,)).logits.square().mean()


def products_of(f: OfExperts) -> dict[str, tuple[torch.Tensor, ...]]:
    gradient = torch.func.grad(f, argnums=(0, 1, 2))
    return {
        "functional.hvp": functional.hvp(f, f.point, f.direction)[1],
        "functional.vhp": functional.vhp(f, f.point, f.direction)[1],
        "functional.jvp": (functional.jvp(f, f.point, f.direction)[1],),
        "func.grad": gradient(*f.point),
        "func.jvp": (torch.func.jvp(f, f.point, f.direction)[1],),
        "func.grad of grad": torch.func.grad(
            lambda *p: sum((g * d).sum() for g, d in zip(gradient(*p), f.direction, strict=True)), argnums=(0, 1, 2)
        )(*f.point),
        "func.jvp of grad": torch.func.jvp(gradient, f.point, f.direction)[1],
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_of_derivative_is_that_of_the_eager_experts(backend):
    actual, expected = products_of(OfExperts(backend)), products_of(OfExperts("eager"))
    for form, values in expected.items():
        assert max(float(value.detach().abs().max()) for value in values) > 1e-4, form
        assert_close(actual[form], values, rtol=1e-9, atol=1e-12, msg=lambda text, form=form: f"{form}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_per_sample_are_those_of_each_sample_alone(backend):
    f, ids = OfExperts(backend), random_ids()
    gradient = torch.func.grad(lambda p, sample: f(*p, input_ids=sample.unsqueeze(0)))
    together = torch.func.vmap(gradient, in_dims=(None, 0))(f.point, ids)
    for row, sample in enumerate(ids):
        alone = [p.requires_grad_() for p in f.point]
        expected = torch.autograd.grad(f(*alone, input_ids=sample.unsqueeze(0)), alone)
        assert_close(tuple(values[row] for values in together), expected, rtol=1e-9, atol=1e-12)


def test_a_derivative_that_the_grouped_products_lack_is_an_error():
    f = OfExperts("grouped_mm")
    value = f(*[p.requires_grad_() for p in f.point])
    with pytest.raises(RuntimeError, match="[Bb]atching rule"):
        torch.autograd.grad(value, f.point, torch.ones(1).double(), is_grads_batched=True)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        f(*map(torch.autograd.forward_ad.make_dual, f.point, f.direction))
