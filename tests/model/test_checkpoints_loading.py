"""Tests of checkpoints of both families on disk: what is written, where it loads, what is refused, other vocabularies."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from helpers import ROOT
from helpers.checkpoints import edit_config, edit_weights, run_without_package
from helpers.models import (
    random_ids,
    tiny_classifier,
    tiny_config,
    tiny_model,
    tiny_seq2seq_config,
    tiny_seq2seq_model,
)
from modeling_stablemoe import (
    StableMoEConfig,
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoEForSequenceClassification,
    StableMoEModel,
    StableMoESeq2SeqConfig,
    StableMoESeq2SeqModel,
)


pytestmark = pytest.mark.pairs


IDS = random_ids(4, 9, low=3, high=91)
EVERY_ID = torch.arange(91).unsqueeze(0)
AUTO = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
CLASSES = {
    "causal": (StableMoEConfig, StableMoEForCausalLM, StableMoEModel),
    "seq2seq": (StableMoESeq2SeqConfig, StableMoEForConditionalGeneration, StableMoESeq2SeqModel),
}
AUTO_MAPS = {
    "causal": {
        "AutoConfig": "configuration_stablemoe.StableMoEConfig",
        "AutoModel": "modeling_stablemoe.StableMoEModel",
        "AutoModelForCausalLM": "modeling_stablemoe.StableMoEForCausalLM",
        "AutoModelForSequenceClassification": "modeling_stablemoe.StableMoEForSequenceClassification",
        "AutoModelForDecision": "modeling_stablemoe.StableMoEForCausalLM",
    },
    "seq2seq": {
        "AutoConfig": "configuration_stablemoe.StableMoESeq2SeqConfig",
        "AutoModel": "modeling_stablemoe_seq2seq.StableMoESeq2SeqModel",
        "AutoModelForSeq2SeqLM": "modeling_stablemoe_seq2seq.StableMoEForConditionalGeneration",
    },
}
CODE_FILES = {
    family: {f"{name.partition('.')[0]}.py" for name in auto_map.values()} for family, auto_map in AUTO_MAPS.items()
}
LAYERS = {
    "causal": ["model.moe_layers.0", "model.moe_layers.1"],
    "seq2seq": ["model.encoder.moe_layers.0", "model.decoder.moe_layers.0", "model.decoder.moe_layers.1"],
}
EMBEDDINGS = {
    "causal": ["model.embed_tokens.weight", "lm_head.weight"],
    "seq2seq": ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"],
}

every_family = pytest.mark.parametrize("family", AUTO)


def table(family: str, layer: int) -> str:
    return f"{LAYERS[family][layer]}.frozen_router.routing_table"


def build(family: str, stage: int = 2, **overrides):
    if family == "causal":
        model = tiny_model(**{"vocab_size": 91, "moe_layer_positions": [0, 2], **overrides})
    else:
        model = tiny_seq2seq_model(**overrides)
    if stage == 2:
        model.freeze_router()
    return model.eval()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict:
    """Frozen models and their folders, which tests leave as they are; they change `copied`."""
    models = {family: build(family) for family in AUTO}
    folders = {family: tmp_path_factory.mktemp(family) / "frozen" for family in AUTO}
    for family, model in models.items():
        model.save_pretrained(folders[family])
    return {family: (models[family], folders[family]) for family in AUTO}


@pytest.fixture
def source(sources, family):
    return sources[family][0]


@pytest.fixture
def checkpoint(sources, family) -> Path:
    return sources[family][1]


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


@torch.no_grad()
def assert_same_model(model, source):
    # Weights mapped from a file are aligned differently in memory, which costs the last bit of a product.
    assert model.routing_stage == source.routing_stage
    assert model.router_fingerprint() == model.config.router_fingerprint == source.router_fingerprint()
    assert torch.equal(model.route(EVERY_ID), source.route(EVERY_ID))
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if source.config.is_encoder_decoder else {})}
    assert_close(model.eval()(**inputs)[0], source(**inputs)[0], rtol=1e-4, atol=1e-5)


# What is written


@every_family
def test_a_checkpoint_holds_its_code_its_tables_and_the_embedding_once(family, checkpoint, source):
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json"} | CODE_FILES[family]
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAPS[family]
    assert config["architectures"] == [type(source).__name__]
    assert config["router_fingerprint"] == source.router_fingerprint()
    weights = load_file(checkpoint / "model.safetensors")
    assert [name for name in EMBEDDINGS[family] if name in weights] == EMBEDDINGS[family][:1]
    for layer in range(len(LAYERS[family])):
        assert weights[table(family, layer)].dtype == torch.int32
        assert torch.equal(weights[table(family, layer)].long(), source.route(EVERY_ID)[layer, 0])
    assert family == "causal" or not [name for name in weights if "embed_positions" in name]  # computed


@every_family
def test_the_backbone_alone_is_saved_whole(family, source, tmp_path):
    source.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAPS[family]
    assert_same_model(AutoModel.from_pretrained(tmp_path), source.model)


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


@pytest.mark.parametrize("module", ["__main__", __name__])
@pytest.mark.parametrize("kind", SUBCLASSED)
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
    assert "AutoModelForDecision" not in auto_map


# Loading with the package


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
@every_family
def test_round_trips_change_nothing(tmp_path, family, stage, tied):
    model = build(family, stage, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_model(loaded, model)
    weights = dict(loaded.named_parameters(remove_duplicate=False))
    assert len({id(weights[name]) for name in EMBEDDINGS[family]}) == (1 if tied else len(EMBEDDINGS[family]))
    assert list(weights) == [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter), name


@every_family
def test_auto_classes_load_the_classes_of_the_package(family, checkpoint, source):
    config_class, model_class, backbone_class = CLASSES[family]
    assert type(AutoConfig.from_pretrained(checkpoint)) is config_class
    model = AUTO[family].from_pretrained(checkpoint)
    assert type(model) is model_class
    assert_same_model(model, source)
    backbone, info = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert type(backbone) is backbone_class
    assert not any(info.values()), info
    assert_same_model(backbone, source.model)


@pytest.mark.parametrize("family", ["causal"])
@pytest.mark.skipif(not hasattr(transformers, "AutoModelForDecision"), reason="came with transformers 5.23")
def test_transformers_serve_finds_the_class_of_the_package(checkpoint, source):
    """Its first question of a checkpoint."""
    assert_same_model(transformers.AutoModelForDecision.from_pretrained(checkpoint), source)


# Loading without the package


CODE = """
    import sys
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers import AutoModelForSequenceClassification
    folder, repository = sys.argv[1:]
    auto = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
    auto["classifier"] = AutoModelForSequenceClassification
    ids, every_id = torch.load(folder + "/inputs.pt")
    inputs = {kind: {"input_ids": ids} for kind in auto}
    inputs["seq2seq"]["decoder_input_ids"] = ids

    @torch.no_grad()
    def facts(kind, path, home, **options):
        assert type(AutoConfig.from_pretrained(path, **options)).__module__.startswith(home)
        model = auto[kind].from_pretrained(path, **options)
        assert type(model).__module__.startswith(home), type(model)
        found = {"logits": model(**inputs[kind]).logits, "routes": model.route(every_id)}
        found["fingerprint"] = model.router_fingerprint()
        if kind != "classifier":
            found["generated"] = model.generate(ids, max_new_tokens=4, do_sample=False)
            assert AutoModel.from_pretrained(path, **options).router_fingerprint() == model.router_fingerprint()
        return model, found

    every = {}
    for kind in auto:
        model, first = facts(kind, f"{folder}/{kind}", "transformers_modules.", trust_remote_code=True)
        model.save_pretrained(f"{folder}/{kind}-again")
        second = facts(kind, f"{folder}/{kind}-again", "transformers_modules.", trust_remote_code=True)[1]
        every[kind] = [first, second]
    classifier = AutoModelForSequenceClassification.from_pretrained(folder + "/causal", trust_remote_code=True)
    every["head"] = classifier.router_fingerprint()
    try:
        AutoModelForCausalLM.from_pretrained(folder + "/damaged", trust_remote_code=True)
    except ValueError as error:
        assert "are not those that this checkpoint was saved with" in str(error), error
    else:
        raise AssertionError("loaded")
    sys.meta_path.pop(0)
    sys.path.insert(0, repository)
    import modeling_stablemoe
    for kind in auto:
        every[kind].append(facts(kind, f"{folder}/{kind}-again", "modeling_stablemoe.")[1])
    torch.save(every, folder + "/facts.pt")
"""


def test_remote_code_loads_generates_saves_and_refuses_damage_where_the_package_is_not_installed(sources, tmp_path):
    models = {family: source for family, (source, _) in sources.items()}
    models["classifier"] = tiny_classifier(vocab_size=91).eval()
    models["classifier"].freeze_router()
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
    shutil.copytree(tmp_path / "causal", tmp_path / "damaged")
    edit_config(tmp_path / "damaged", router_fingerprint="ab" * 32)
    torch.save((IDS, EVERY_ID), tmp_path / "inputs.pt")
    run_without_package(CODE, tmp_path / "elsewhere", tmp_path, ROOT)
    every = torch.load(tmp_path / "facts.pt")
    assert every["head"] == models["causal"].router_fingerprint()
    for kind, model in models.items():
        inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if kind == "seq2seq" else {})}
        for facts in every[kind]:
            assert facts["fingerprint"] == model.router_fingerprint()
            assert torch.equal(facts["routes"], model.route(EVERY_ID))
            assert_close(facts["logits"], model(**inputs).logits, rtol=1e-4, atol=1e-5)
            if "generated" in facts:
                assert torch.equal(facts["generated"], model.generate(IDS, max_new_tokens=4, do_sample=False))
    for family, model in sources.items():
        again = tmp_path / f"{family}-again"
        assert CODE_FILES[family] <= {path.name for path in again.iterdir()}
        assert json.loads((again / "config.json").read_text())["auto_map"].keys() == AUTO_MAPS[family].keys()
        assert_same_model(AUTO[family].from_pretrained(again), model[0])


@every_family
def test_code_files_import_only_torch_transformers_and_each_other(family, checkpoint):
    # What `transformers` checks before it runs remote code, plus the standard library.
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for name in CODE_FILES[family]:
        for node in ast.walk(ast.parse((checkpoint / name).read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in CODE_FILES[family], (name, node.module)
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed, (name, node.module)


# Damage


def not_those(family: str) -> str:
    return (
        rf"^The routing tables of {', '.join(LAYERS[family])} are not those that this checkpoint was saved with: their "
        r"fingerprint is [0-9a-f]{64}, the config has .* restore it from its source\."
    )


MISFIT = r"^The weights of '.*copied' do not fit its config: .*%s.* `resize_token_embeddings`\.$"


def change_row(weights, *names):
    weights[names[1]][5] = (weights[names[1]][5] + 1) % 5


def swap(weights, *names):
    weights[names[0]], weights[names[1]] = weights[names[1]], weights[names[0]]


def set_row(layer: int, row: int, value: int):
    return lambda weights, *names: weights[names[layer]].__setitem__(row, value)


def shorten(weights, *names):
    weights[names[1]] = weights[names[1]][:-1].clone()


def drop(*layers: int):
    return lambda weights, *names: [weights.pop(name) for name in {names[layer] for layer in layers}]


DAMAGED = {
    "a row altered": (change_row, None),
    "tables swapped": (swap, None),
    "a row not frozen": (
        set_row(1, 5, -1),
        r"^The routing table `{1}\.frozen_router\.routing_table` is damaged: token id 5 has no expert, .* in \[0, 5\)\. "
        r"Restore the checkpoint",
    ),
    "a row out of range": (
        set_row(0, 90, 5),
        r"^The routing table `{0}\.frozen_router\.routing_table` is damaged: token id 90 is sent to expert 5, .* in "
        r"\[0, 5\)\. Restore the checkpoint",
    ),
    "a row below range": (set_row(0, 0, -2), r"{0}\..* is damaged: token id 0 is sent to expert -2"),
    "the first table missing": (
        drop(0),
        r"^The config says that the routing is frozen .* but the routing table of {0} is missing from the weights\. "
        r"Restore the checkpoint",
    ),
    "the other tables missing": (drop(1, -1), r"routing table of {1}.* is missing"),
    "a row missing": (
        shorten,
        MISFIT % r"{1}\.frozen_router\.routing_table is \[90\] in the weights, \[91\] by the config",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
@every_family
def test_damaged_weights_are_refused_naming_layer_and_remedy(family, copied, damage):
    edit, message = DAMAGED[damage]
    names = [table(family, layer) for layer in range(len(LAYERS[family]))]
    edit_weights(copied, lambda weights: edit(weights, *names))
    for layer, name in enumerate(LAYERS[family]) if message else ():
        message = message.replace(f"{{{layer}}}", name.replace(".", r"\."))
    assert_refused_untouched(family, copied, message or not_those(family))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_fingerprint": None}, None),
        ({"router_fingerprint": "ab" * 32}, None),
        (
            {"vocab_size": 90},
            MISFIT % r"embed_tokens\.weight is \[91, {0}\] in the weights, \[90, {0}\] by the config",
        ),
        ({"vocab_size": 128}, MISFIT % r"moe_layers\.0\.frozen_router\.routing_table is \[91\] .* \[128\]"),
        ({"num_experts": 4}, MISFIT % r"moe_layers\.0\.router\.centroids is \[5, {0}\] .* \[4, {0}\]"),
    ],
)
@every_family
def test_a_config_that_does_not_fit_the_weights_is_refused(family, copied, source, fields, message):
    edit_config(copied, **fields)
    width = str(source.config.hidden_size)
    assert_refused_untouched(family, copied, (message or not_those(family)).replace("{0}", width))


@pytest.mark.parametrize("family", ["causal"])
def test_a_config_without_moe_layers_for_frozen_weights_is_refused(family, copied):
    edit_config(copied, moe_layer_positions=[])
    message = r"frozen .* but every MoE layer is missing from the weights\. Restore"
    assert_refused_untouched(family, copied, message)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
@every_family
def test_weights_cut_off_while_writing_are_refused(family, copied, share):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * share)])
    message = r"^The weights of .* are not a readable safetensors file: .* fetch it again"
    assert_refused_untouched(family, copied, message)


def assert_refused_untouched(family: str, path: Path, message: str):
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for loader in (CLASSES[family][1], AUTO[family]):
        with pytest.raises(ValueError, match=message):
            loader.from_pretrained(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("family", ["causal"])
def test_damage_is_found_in_a_table_that_stays_on_disk(family, copied, tmp_path):
    edit_weights(copied, lambda weights: weights[table(family, 1)][7:8].add_(1).remainder_(5))
    placement = {"model.moe_layers": "disk", "lm_head": "cpu"}
    placement |= {f"model.{name}": "cpu" for name in ("embed_tokens", "embed_positions", "layers", "norm")}
    with pytest.raises(ValueError, match=not_those(family)):
        StableMoEForCausalLM.from_pretrained(copied, device_map=placement, offload_folder=tmp_path / "offload")


@pytest.mark.parametrize("family", ["causal"])
def test_remedies_for_missing_tables_and_another_vocabulary_work(family, checkpoint, copied, source):
    model = StableMoEForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(128, mean_resizing=False)
    assert torch.equal(model.route(EVERY_ID), source.route(EVERY_ID))
    edit_weights(copied, lambda weights: weights.pop(table(family, 0)))
    with pytest.raises(ValueError, match=r"^Some MoE layers are frozen and others are not: model\.moe_layers\.0\."):
        StableMoEForCausalLM.from_pretrained(copied, router_fingerprint=None)
    edit_weights(copied, lambda weights: weights.pop(table(family, 1)))
    assert StableMoEForCausalLM.from_pretrained(copied, router_fingerprint=None).routing_stage == 1


KINDS = {"causal": "stablemoe", "seq2seq": "stablemoe-seq2seq"}


@every_family
def test_a_checkpoint_of_the_other_family_is_refused(family, checkpoint):
    (other,) = KINDS.keys() - {family}
    message = rf"^This is a '{KINDS[family]}' checkpoint, not a '{KINDS[other]}' one\. Load it with .* of its own kind"
    for loader in CLASSES[other]:
        with pytest.raises(ValueError, match=message):
            loader.from_pretrained(checkpoint)


# Other vocabularies


@pytest.mark.parametrize("size", [97, 80])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backbone", [False, True], ids=["whole", "backbone"])
def test_both_sides_follow_the_vocabulary(tmp_path, backbone, tied, stage, size):
    whole = build("seq2seq", stage, tie_word_embeddings=tied)
    model = whole.model if backbone else whole
    stacks = whole.model
    kept = min(size, 91)
    routes, rows = model.route(EVERY_ID[:, :kept]), stacks.decoder.embed_tokens.weight[:kept].detach().clone()
    assert model.resize_token_embeddings(size, mean_resizing=False) is stacks.encoder.embed_tokens
    assert model.config.vocab_size == size
    embeddings = [stacks.encoder.embed_tokens, stacks.decoder.embed_tokens, *([] if backbone else [whole.lm_head])]
    assert [tuple(module.weight.shape) for module in embeddings] == [(size, 24)] * len(embeddings)
    assert len({id(module.weight) for module in embeddings}) == (1 if tied else len(embeddings))
    assert torch.equal(stacks.decoder.embed_tokens.weight[:kept], rows)
    every_id = torch.arange(size).unsqueeze(0)
    assert torch.equal(model.route(every_id)[..., :kept], routes)
    for layer in model.moe_layers_by_name.values():
        assert layer.frozen_router.routing_table.shape == (size,)
        assert layer.router.distilled_router.embedding.shape == (size, 7)
    assert model.routing_stage == stage
    assert model.config.router_fingerprint == model.router_fingerprint()
    if stage == 2 and size > 91:
        assert model.route(every_id)[..., 91:].tolist() == [[[v % 5 for v in range(91, size)]]] * 3
    if backbone:
        return
    last = torch.full((1, 4), size - 1)
    assert whole.train()(last, labels=last).loss.isfinite()
    whole.eval().save_pretrained(tmp_path)
    loaded = StableMoEForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.route(every_id), whole.route(every_id))
    assert_close(loaded(last, labels=last).logits, whole(last, labels=last).logits, rtol=1e-4, atol=1e-5)


def test_new_rows_of_an_untied_decoder_follow_the_same_rule_as_those_of_the_encoder():
    # By the mean of the old rows, with next to no variance, where that is asked for.
    for mean_resizing, spread in ((True, False), (False, True)):
        model = tiny_seq2seq_model(tie_word_embeddings=False, initializer_range=3.0)
        model.resize_token_embeddings(200, mean_resizing=mean_resizing)
        for stack in (model.model.encoder, model.model.decoder):
            assert (stack.embed_tokens.weight[91:].std() > 2).item() is spread


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_embedding_is_shared_where_embeddings_are_tied(tied):
    model = tiny_seq2seq_model(tie_word_embeddings=tied)
    embedding = torch.nn.Embedding(91, 24)
    model.set_input_embeddings(embedding)
    assert model.get_input_embeddings() is embedding
    assert (model.model.decoder.embed_tokens is embedding) is tied


def test_a_head_that_is_untied_later_is_saved(tmp_path):
    model = tiny_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path)
    assert torch.equal(StableMoEForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)
