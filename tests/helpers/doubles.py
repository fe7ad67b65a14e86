"""Models in float64, to hold against the reference, and the slopes of losses."""

import numpy as np
import torch

from helpers import reference
from helpers.models import random_ids, tiny_model


BACKENDS = ["eager", "grouped_mm", "batched_mm"]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
# A central difference in float64 is good to about 1e-9.
SLOPE = {"rtol": 1e-6, "atol": 1e-8}
# transformers computes the cross-entropy in float32, whatever the model.
HEAD = {"rtol": 2e-6, "atol": 2e-6}
POSITIONS = [0, 2]


def double_model(routing: str, backend: str = "eager", **overrides):
    model = tiny_model(**overrides).double()
    model.set_experts_implementation(backend)
    if routing == "frozen":
        model.freeze_router()
        with torch.no_grad():  # the table stands for D and Ê, whatever becomes of them
            for layer in model.model.moe_layers:
                layer.router.distilled_router.embedding.normal_()
    return model.train(routing != "distilled")


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def layer_input(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 7, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, :3] = False
    mask[2, 5:] = False
    weights = torch.randn(3, 7, 32, generator=generator, dtype=torch.float64)
    return hidden, random_ids(), mask, weights


def slopes_of(gradient: torch.Tensor | None, function, params, name: str, count: int = 3):
    """The slopes along random directions, by the gradient and by finite differences."""
    generator = np.random.default_rng(0)
    by_gradient, by_differences = [], []
    for _ in range(count):
        direction = generator.standard_normal(params[name].shape)
        by_gradient.append(0.0 if gradient is None else float((gradient.numpy() * direction).sum()))
        by_differences.append(reference.slope(function, params, name, direction))
    return torch.tensor(by_gradient, dtype=torch.float64), torch.tensor(by_differences, dtype=torch.float64)
