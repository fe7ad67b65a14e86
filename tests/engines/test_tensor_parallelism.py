"""Tensor parallelism on real processes (gloo, CPU): a decoder's own plan, and the experts in its blocks with it."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers.distributed import DistributedConfig

from helpers.backbones import backed_model
from helpers.many_processes import results, run_scenarios
from helpers.models import random_ids
from modeling_stablemoe import StableMoEForCausalLM


CASES = {"between": ("llama", {"num_shared_experts": 1}), "ffn": ("llama/ffn", {})}
IDS = random_ids(2, 9, low=3, high=64)


@torch.no_grad()
def forward(rank: int, folder: Path) -> dict:
    found = {}
    for name in CASES:
        model = StableMoEForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(tp_size=2))
        experts = next(iter(model.moe_layers_by_name.values())).experts
        held = {
            key: getattr(values, "to_local", lambda values=values: values)()
            for key, values in experts.named_parameters()
        }
        found[name] = {
            "logits": model(IDS).logits,
            "widths": {key: list(values.shape) for key, values in held.items()},
        }
    return found


@pytest.mark.slow
def test_experts_are_split_by_their_width_and_compute_the_same(tmp_path):
    models = {name: backed_model(family, **options) for name, (family, options) in CASES.items()}
    for name, model in models.items():
        model.freeze_router()
        model.save_pretrained(tmp_path / name)
    run_scenarios([forward], tmp_path, one_group=True)
    for found in results(tmp_path, forward):
        for name, model in models.items():
            with torch.no_grad():
                assert_close(found[name]["logits"], model(IDS).logits, rtol=1e-4, atol=1e-5)
            width = model.config.intermediate_size
            assert found[name]["widths"] == {"gate_up_proj": [4, width, 32], "down_proj": [4, 32, width // 2]}
