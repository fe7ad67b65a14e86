"""Seeds, and the fixtures of all tests."""

import helpers  # noqa: F401, I001 - sets the environment before torch reads it

import pytest
from helpers.models import tiny_model
from transformers import set_seed

from modeling_stablemoe import StableMoEForCausalLM


@pytest.fixture(autouse=True)
def _seed():
    set_seed(0)


@pytest.fixture
def model() -> StableMoEForCausalLM:
    return tiny_model()


@pytest.fixture
def frozen_model() -> StableMoEForCausalLM:
    frozen = tiny_model()
    frozen.freeze_router()
    return frozen.eval()
