"""Checkpoints of earlier versions, kept in `earlier`, load, route and compute as they did when they were saved.

They were written with transformers 5.15 when routing tables and counts were still parameters; `expected.safetensors` holds
their inputs, logits and experts.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import modeling_stablemoe
from helpers.backbones import backed_model
from modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.convert.pruning import load_pruned
from modeling_stablemoe.earlier_checkpoints import current_name


EARLIER = sorted(path.parent for path in Path(__file__).parent.glob("earlier/*/config.json"))


def load(folder: Path):
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(modeling_stablemoe, name).from_pretrained(folder)


@torch.no_grad()
def assert_as_saved(model, folder: Path):
    expected = load_file(folder / "expected.safetensors")
    with safe_open(folder / "expected.safetensors", framework="pt") as file:
        fingerprint = file.metadata()["fingerprint"] or None
    inputs = {name: ids for name, ids in expected.items() if name.endswith("ids")}
    outputs = model(**inputs, output_router_logits=True)
    assert torch.equal(torch.stack(tuple(outputs.expert_indices)), expected["experts"])
    assert_close(outputs.logits, expected["logits"], rtol=1e-5, atol=1e-5)
    assert model.router_fingerprint() == model.config.router_fingerprint == fingerprint
    assert model.routing_stage == (1 if folder.name.endswith("stage-1") else 2)


def test_there_is_one_of_each_kind():
    assert len(EARLIER) == 9


@pytest.mark.parametrize("folder", EARLIER, ids=lambda folder: folder.name)
def test_an_earlier_checkpoint_computes_what_it_did_and_so_do_its_state_dict_and_a_copy_saved_again(folder, tmp_path):
    model = load(folder)
    assert_as_saved(model, folder)
    model.save_pretrained(tmp_path)
    assert_as_saved(load(tmp_path), folder)
    kept, written = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert any(".norm_weight" in name for name in kept)
    kept = {current_name(name): values for name, values in kept.items()}
    assert {name: (values.dtype, values.shape) for name, values in written.items()} == {
        name: (values.dtype, values.shape) for name, values in kept.items()
    }
    assert all(torch.equal(values.nan_to_num(), kept[name].nan_to_num()) for name, values in written.items())
    # Its state dict loads, too.
    fresh = type(model)(model.config).eval()
    state_dict = load_file(folder / "model.safetensors")
    unchanged = set(state_dict)
    fresh.load_state_dict(state_dict, strict=False)  # a head may be the embedding
    assert set(state_dict) == unchanged
    assert_as_saved(fresh, folder)


def test_an_earlier_checkpoint_is_pruned(tmp_path):
    folder = Path(__file__).parent / "earlier" / "frozen"
    model = load(folder)
    ids = torch.arange(7).unsqueeze(0)
    pruned = load_pruned(folder, token_ids=ids.flatten())
    assert_close(pruned(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["stage-1", "counts-stage-1", "translation-stage-1"])
def test_an_earlier_checkpoint_of_stage_1_freezes_what_it_evaluates(kind):
    model = load(Path(__file__).parent / "earlier" / kind)
    ids = torch.arange(31).unsqueeze(0)
    before = model.route(ids)
    model.freeze_router()
    if model.config.max_frozen_load is None:  # a limit sends some tokens elsewhere
        assert torch.equal(model.route(ids), before)
    assert model.routing_stage == 2


@pytest.mark.parametrize("family", ["llama/ffn", "gemma2", "olmoe"])
def test_experts_that_are_named_one_by_one_are_read_and_saved_as_stacks(family, tmp_path):
    model = backed_model(family)
    model.freeze_router()
    model.save_pretrained(tmp_path)
    stacked = load_file(tmp_path / "model.safetensors")
    single = {}
    for name, values in stacked.items():
        layer, is_ours, parameter = name.rpartition(".experts.")
        if not is_ours or not any(layer == ours for ours in model.moe_layers_by_name):
            single[name] = values
        elif parameter == "down_proj":
            single |= {f"{layer}.experts.{i}.down_proj.weight": rows.clone() for i, rows in enumerate(values)}
        else:
            for i, rows in enumerate(values):
                for part, half in zip(("gate_proj", "up_proj"), rows.chunk(2), strict=True):
                    single[f"{layer}.experts.{i}.{part}.weight"] = half.clone()
    assert len(single) > len(stacked)
    save_file(single, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = StableMoEForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(values, model.state_dict()[name]) for name, values in again.state_dict().items())
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == stacked.keys()
