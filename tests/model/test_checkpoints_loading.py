"""Tests of checkpoints on disk: what is written, where it loads, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from helpers.checkpoints import CODE_FILES, EVERY_ID, edit_config, edit_weights, run_without_package
from helpers.models import random_ids, tiny_config, tiny_model, tiny_seq2seq_config
from modeling_stablemoe import (
    StableMoEConfig,
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoEForSequenceClassification,
    StableMoEModel,
)


pytestmark = pytest.mark.pairs


IDS = random_ids(4, 9)
TABLE = "model.moe_layers.{}.frozen_router.routing_table"
AUTO_MAP = {
    "AutoConfig": "configuration_stablemoe.StableMoEConfig",
    "AutoModel": "modeling_stablemoe.StableMoEModel",
    "AutoModelForCausalLM": "modeling_stablemoe.StableMoEForCausalLM",
    "AutoModelForSequenceClassification": "modeling_stablemoe.StableMoEForSequenceClassification",
}


@pytest.fixture(scope="module")
def source() -> StableMoEForCausalLM:
    model = tiny_model(moe_layer_positions=[0, 2])
    model.freeze_router()
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory) -> Path:
    """A frozen model on disk; tests that change it take `copied`."""
    path = tmp_path_factory.mktemp("checkpoint") / "frozen"
    source.save_pretrained(path)
    return path


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


def assert_same_model(model, source):
    # Weights mapped from a file are aligned differently in memory, which costs the last bit of a product.
    assert model.routing_stage == 2
    assert model.router_fingerprint() == model.config.router_fingerprint == source.router_fingerprint()
    assert torch.equal(model.route(EVERY_ID), source.route(EVERY_ID))
    with torch.no_grad():
        assert_close(model(IDS)[0], source(IDS)[0], rtol=1e-5, atol=1e-5)


# What is written


def test_a_checkpoint_holds_weights_config_generation_config_and_code(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json"} | CODE_FILES


def test_the_written_config_holds_fingerprint_and_complete_auto_map(checkpoint, source):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["router_fingerprint"] == source.router_fingerprint()
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["StableMoEForCausalLM"]


def test_tables_are_written_as_integers_and_the_head_is_not_written_twice(checkpoint, source):
    weights = load_file(checkpoint / "model.safetensors")
    for i in range(2):
        assert weights[TABLE.format(i)].dtype == torch.int32
        assert torch.equal(weights[TABLE.format(i)].long(), source.route(EVERY_ID)[i, 0])
    assert "lm_head.weight" not in weights


def test_the_backbone_alone_writes_a_complete_auto_map(source, tmp_path):
    source.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert_same_model(AutoModel.from_pretrained(tmp_path), source.model)


# Loading with the package


SUBCLASSED = {
    "language model": (StableMoEForCausalLM, tiny_config),
    "classifier": (StableMoEForSequenceClassification, tiny_config),
    "backbone": (StableMoEModel, tiny_config),
    "translation model": (StableMoEForConditionalGeneration, tiny_seq2seq_config),
}


def auto_map_of(folder) -> dict[str, str]:
    """Read the classes that a checkpoint names, each in a file that is there."""
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    for name in auto_map.values():
        module, _, class_name = name.partition(".")
        assert f"class {class_name}(" in (folder / f"{module}.py").read_text()
    return auto_map


@pytest.mark.parametrize("kind", SUBCLASSED)
@pytest.mark.parametrize("module", ["__main__", __name__])
def test_a_subclass_of_ones_own_is_saved_with_the_code_of_the_class_above_it(tmp_path, kind, module):
    parent, make_config = SUBCLASSED[kind]
    mine = type("Mine", (parent,), {"__module__": module})
    parent(make_config()).save_pretrained(tmp_path / "parent")
    mine(make_config()).save_pretrained(tmp_path / "mine")
    assert auto_map_of(tmp_path / "mine") == auto_map_of(tmp_path / "parent")
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {p.name for p in (tmp_path / "parent").iterdir()}
    assert type(mine.from_pretrained(tmp_path / "mine")) is mine


def test_a_subclass_that_registers_itself_is_saved_with_its_file_beside_ours(tmp_path, monkeypatch):
    (tmp_path / "modeling_mine.py").write_text(
        "from modeling_stablemoe import StableMoEForCausalLM\n\n\nclass Mine(StableMoEForCausalLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from modeling_mine import Mine

    Mine.register_for_auto_class("AutoModelForCausalLM")
    Mine(tiny_config()).save_pretrained(tmp_path / "mine")
    auto_map = auto_map_of(tmp_path / "mine")
    assert auto_map["AutoModelForCausalLM"] == "modeling_mine.Mine"
    assert auto_map["AutoModel"] == "modeling_stablemoe.StableMoEModel"


def test_auto_classes_load_the_classes_of_the_package(checkpoint, source):
    assert type(AutoConfig.from_pretrained(checkpoint)) is StableMoEConfig
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model) is StableMoEForCausalLM
    assert_same_model(model, source)
    backbone = AutoModel.from_pretrained(checkpoint)
    assert type(backbone) is StableMoEModel
    assert_same_model(backbone, source.model)


@pytest.mark.skipif(not hasattr(transformers, "AutoModelForDecision"), reason="came with transformers 5.23")
def test_transformers_serve_finds_the_class_of_the_package(checkpoint, source):
    """Its first question, see `tests/clients/test_programs_that_run_models.py`."""
    assert_same_model(transformers.AutoModelForDecision.from_pretrained(checkpoint), source)


def test_loading_reports_no_missing_or_unexpected_weights(checkpoint):
    for cls in (StableMoEForCausalLM, StableMoEModel):
        _, info = cls.from_pretrained(checkpoint, output_loading_info=True)
        assert not any(info.values()), info


def test_a_stage_1_checkpoint_loads_in_stage_1(tmp_path):
    model = tiny_model(moe_layer_positions=[0, 2]).eval()
    model.save_pretrained(tmp_path)
    loaded = StableMoEForCausalLM.from_pretrained(tmp_path)
    assert (loaded.routing_stage, loaded.config.router_fingerprint) == (1, None)
    assert torch.equal(loaded.route(EVERY_ID), model.route(EVERY_ID))
    assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_the_routing(checkpoint, source):
    model = StableMoEForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.router_fingerprint() == source.router_fingerprint()
    assert torch.equal(model.route(EVERY_ID), source.route(EVERY_ID))
    assert_close(model(IDS).logits.float(), source(IDS).logits, rtol=0.05, atol=0.1)


def test_automatic_placement_loads_the_same_model(checkpoint, source):
    assert_same_model(StableMoEForCausalLM.from_pretrained(checkpoint, device_map="auto"), source)


def test_moe_layers_on_disk_give_the_same_model(checkpoint, source, tmp_path):
    placement = {"model.moe_layers": "disk", "lm_head": "cpu"}
    placement |= {f"model.{name}": "cpu" for name in ("embed_tokens", "embed_positions", "layers", "norm")}
    model = StableMoEForCausalLM.from_pretrained(checkpoint, device_map=placement, offload_folder=tmp_path)
    assert model.model.moe_layers[0].router.centroids.is_meta
    assert_same_model(model, source)
    assert torch.equal(model.generate(IDS, max_new_tokens=4), source.generate(IDS, max_new_tokens=4))


def test_damage_is_found_in_a_table_that_stays_on_disk(copied, tmp_path):
    edit_weights(copied, lambda weights: weights[TABLE.format(1)][7:8].add_(1).remainder_(5))
    placement = {"model.moe_layers": "disk", "lm_head": "cpu"}
    placement |= {f"model.{name}": "cpu" for name in ("embed_tokens", "embed_positions", "layers", "norm")}
    with pytest.raises(ValueError, match=r"The routing tables of model\.moe_layers\.0, .* are not those"):
        StableMoEForCausalLM.from_pretrained(copied, device_map=placement, offload_folder=tmp_path / "offload")


def test_a_sharded_checkpoint_loads_the_same_model(source, tmp_path):
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same_model(StableMoEForCausalLM.from_pretrained(tmp_path), source)


# Loading without the package


def test_remote_code_loads_generates_and_saves_the_same_model_where_the_package_is_not_installed(
    checkpoint, source, tmp_path
):
    code = """
        import sys
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        checkpoint, resaved, results = sys.argv[1:]
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
        assert type(config).__module__.startswith("transformers_modules."), type(config)
        ids, every_id = torch.load(results + "/inputs.pt")

        def facts(path):
            model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            backbone = AutoModel.from_pretrained(path, trust_remote_code=True)
            assert type(backbone).__name__ == "StableMoEModel"
            assert backbone.router_fingerprint() == model.router_fingerprint()
            with torch.no_grad():
                return model, {
                    "stage": model.routing_stage,
                    "logits": model(ids).logits,
                    "routes": model.route(every_id),
                    "fingerprint": model.router_fingerprint(),
                    "generated": model.generate(ids, max_new_tokens=4, do_sample=False),
                }

        model, first = facts(checkpoint)
        model.save_pretrained(resaved)
        torch.save([first, facts(resaved)[1]], results + "/facts.pt")
    """
    results, resaved = tmp_path / "results", tmp_path / "resaved"
    results.mkdir()
    torch.save((IDS, EVERY_ID), results / "inputs.pt")
    run_without_package(code, tmp_path / "elsewhere", checkpoint, resaved, results)
    for facts in torch.load(results / "facts.pt"):
        assert facts["stage"] == 2
        assert facts["fingerprint"] == source.router_fingerprint()
        assert torch.equal(facts["routes"], source.route(EVERY_ID))
        assert_close(facts["logits"], source(IDS).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(facts["generated"], source.generate(IDS, max_new_tokens=4, do_sample=False))
    assert CODE_FILES <= {path.name for path in resaved.iterdir()}
    assert json.loads((resaved / "config.json").read_text())["auto_map"].keys() == AUTO_MAP.keys()
    assert_same_model(StableMoEForCausalLM.from_pretrained(resaved), source)


def test_remote_code_refuses_a_damaged_checkpoint_too(copied, tmp_path):
    edit_config(copied, router_fingerprint="ab" * 32)
    code = """
        import sys
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        except ValueError as error:
            assert "are not those that this checkpoint was saved with" in str(error), error
        else:
            raise AssertionError("loaded")
    """
    run_without_package(code, tmp_path / "elsewhere", copied)


def test_code_files_import_only_torch_transformers_and_each_other(checkpoint):
    # What `transformers` checks before it runs remote code, plus the standard library.
    import ast

    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for name in CODE_FILES:
        for node in ast.walk(ast.parse((checkpoint / name).read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in CODE_FILES, (name, node.module)
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed, (name, node.module)


# Damage


NOT_THOSE = (
    r"^The routing tables of model\.moe_layers\.0, model\.moe_layers\.1 are not those that this checkpoint was saved "
    r"with: their fingerprint is [0-9a-f]{64}, the config has .* restore it from its source\."
)
MISMATCH = r"^The weights of '.*copied' do not fit its config: .*%s.* `resize_token_embeddings`\.$"


def set_row(layer: int, row: int, value: int):
    return lambda weights: weights[TABLE.format(layer)].__setitem__(row, value)


def change_row(weights):
    weights[TABLE.format(1)][5] = (weights[TABLE.format(1)][5] + 1) % 5


def shorten(weights):
    weights[TABLE.format(1)] = weights[TABLE.format(1)][:-1].clone()


def swap(weights):
    weights[TABLE.format(0)], weights[TABLE.format(1)] = weights[TABLE.format(1)], weights[TABLE.format(0)]


def drop(*layers: int):
    return lambda weights: [weights.pop(TABLE.format(layer)) for layer in layers]


DAMAGED_WEIGHTS = {
    "a row altered": (change_row, NOT_THOSE),
    "tables swapped": (swap, NOT_THOSE),
    "a row not frozen": (
        set_row(1, 5, -1),
        r"^The routing table `model\.moe_layers\.1\.frozen_router\.routing_table` is damaged: token id 5 has no expert, "
        r".* in \[0, 5\)\. Restore the checkpoint",
    ),
    "a row out of range": (
        set_row(0, 98, 5),
        r"^The routing table `model\.moe_layers\.0\.frozen_router\.routing_table` is damaged: token id 98 is sent to "
        r"expert 5, .* in \[0, 5\)\. Restore the checkpoint",
    ),
    "a row below range": (set_row(0, 0, -2), r"moe_layers\.0\..* is damaged: token id 0 is sent to expert -2"),
    "a table missing": (
        drop(1),
        r"^The config says that the routing is frozen .* but the routing table of model\.moe_layers\.1 is missing from "
        r"the weights\. Restore the checkpoint",
    ),
    "all tables missing": (drop(0, 1), r"routing table of model\.moe_layers\.0, model\.moe_layers\.1 is missing"),
    "a row missing": (
        shorten,
        MISMATCH % r"moe_layers\.1\.frozen_router\.routing_table is \[98\] in the weights, \[99\] by the config",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_WEIGHTS)
def test_damaged_weights_are_refused_naming_layer_and_remedy(copied, damage):
    edit, message = DAMAGED_WEIGHTS[damage]
    edit_weights(copied, edit)
    _assert_refused_untouched(copied, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_fingerprint": None}, NOT_THOSE),
        ({"router_fingerprint": "ab" * 32}, NOT_THOSE),
        (
            {"vocab_size": 98},
            MISMATCH % r"embed_tokens\.weight is \[99, 32\] in the weights, \[98, 32\] by the config",
        ),
        ({"vocab_size": 128}, MISMATCH % r"moe_layers\.0\.frozen_router\.routing_table is \[99\] .* \[128\]"),
        ({"num_experts": 4}, MISMATCH % r"moe_layers\.0\.router\.centroids is \[5, 32\] .* \[4, 32\]"),
        ({"moe_layer_positions": []}, r"frozen .* but every MoE layer is missing from the weights\. Restore"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(copied, fields, message):
    edit_config(copied, **fields)
    _assert_refused_untouched(copied, message)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_weights_cut_off_while_writing_are_refused(copied, share):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * share)])
    _assert_refused_untouched(copied, r"^The weights of .* are not a readable safetensors file: .* fetch it again")


def _assert_refused_untouched(path: Path, message: str):
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for load in (StableMoEForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_the_remedy_for_missing_tables_works(copied):
    edit_weights(copied, drop(0, 1))
    model = StableMoEForCausalLM.from_pretrained(copied, router_fingerprint=None)
    assert model.routing_stage == 1


def test_one_missing_table_is_refused_even_without_a_fingerprint(copied):
    edit_weights(copied, drop(0))
    with pytest.raises(ValueError, match=r"^Some MoE layers are frozen and others are not: model\.moe_layers\.0\."):
        StableMoEForCausalLM.from_pretrained(copied, router_fingerprint=None)


def test_the_remedy_for_another_vocabulary_works(checkpoint, source):
    model = StableMoEForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(128, mean_resizing=False)
    assert torch.equal(model.route(EVERY_ID), source.route(EVERY_ID))
