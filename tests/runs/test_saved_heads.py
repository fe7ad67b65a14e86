"""Scripts keep the head that a checkpoint has, and make up none that it has not."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from helpers.models import shaken, tiny_config, tiny_seq2seq_config
from helpers.pages import BYTE_LEVEL_SIZE, byte_level_tokenizer
from helpers.workplaces import load_script, refuse
from modeling_stablemoe.checkpoints.architectures import MODELS, load_saved
from modeling_stablemoe.data.translation_tokenizer import train_translation_tokenizer
from modeling_stablemoe.hub import prepare
from modeling_stablemoe.hub.release_checks import check_card
from modeling_stablemoe.measure.inspection import route_texts


TASKS = {
    "StableMoEForCausalLM": "text-generation",
    "StableMoEForSequenceClassification": "text-classification",
    "StableMoEForConditionalGeneration": "translation",
}
CHAT_TEMPLATES = {"default": "{{ messages }}", "tool_use": "tools {{ messages }}"}
TEXT = "the cat and the dog and the script\n" * 4


def build(name: str, **overrides):
    """A model of the class `name`, whose head, if any, is tied to nothing."""
    torch.manual_seed(0)
    overrides["tie_word_embeddings"] = False
    if "Seq2Seq" in name or "Conditional" in name:
        special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        return shaken(MODELS[name](tiny_seq2seq_config(**{**special, **overrides})))
    return shaken(MODELS[name](tiny_config(**{"num_labels": 3, **overrides})))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A frozen checkpoint of every class, with its tokenizer, in a folder of its name; texts beside them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    pairs = train_translation_tokenizer(lambda: iter([[TEXT] * 9]), "bpe", 300)
    for name in MODELS:
        is_pair = "Seq2Seq" in name or "Conditional" in name
        tokenizer = pairs if is_pair else byte_level_tokenizer()
        model = build(name, vocab_size=len(pairs) if is_pair else BYTE_LEVEL_SIZE)
        tokenizer.chat_template = CHAT_TEMPLATES
        model.freeze_router()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    return folder


def texts_for(name: str) -> list[str]:
    is_pair = "Seq2Seq" in name or "Conditional" in name
    return ["--text_files", "text.txt", *(["--target_files", "text.txt"] if is_pair else [])]


def assert_same_kind(folder, expected):
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATES
    assert json.loads((folder / "config.json").read_text())["architectures"] == [expected.name]
    assert load_file(folder / "model.safetensors").keys() == load_file(expected / "model.safetensors").keys()


@pytest.mark.parametrize("name", MODELS)
def test_balancing_changes_the_tables_alone(name, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoints)
    options = ["--output_dir", str(tmp_path / "balanced"), "--max_load", "1.01", "--frequency_bands", "1"]
    load_script("balance_routing").main([name, *texts_for(name), *options])
    assert_same_kind(tmp_path / "balanced", checkpoints / name)
    weights, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "balanced", checkpoints / name)
    )
    assert {key.rpartition(".")[2] for key in before if not torch.equal(weights[key], before[key])} == {
        "routing_table"
    }


@pytest.mark.parametrize("name", MODELS)
def test_inspecting_and_pruning_take_any_checkpoint(name, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    load_script("inspect_routing").main([name, *texts_for(name), "--json", str(tmp_path / "numbers.json")])
    layers = json.loads((tmp_path / "numbers.json").read_text())["layers"]
    assert [layer["name"] for layer in layers] == list(load_saved(name).moe_layers_by_name)
    load_script("prune_experts").main([name, *texts_for(name), "--output_dir", str(tmp_path / "pruned")])
    assert_same_kind(tmp_path / "pruned", checkpoints / name)
    card = ModelCard.load(tmp_path / "pruned" / "README.md")
    check_card(card, AutoConfig.from_pretrained(tmp_path / "pruned"), None, set())
    assert card.data.pipeline_tag == TASKS.get(name, "feature-extraction")


@pytest.mark.parametrize("name", MODELS)
def test_publishing_takes_any_checkpoint_and_its_card_says_which(name, checkpoints, monkeypatch, forked_probe):
    monkeypatch.chdir(checkpoints)
    card = prepare(name, "user/name").card
    assert (card.data.pipeline_tag, card.data.eval_results) == (TASKS.get(name, "feature-extraction"), None)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("script", ["generate", "translate"])
def test_generation_refuses_what_has_no_head_for_it(script, name, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    wanted = {"generate": "StableMoEForCausalLM", "translate": "StableMoEForConditionalGeneration"}[script]
    output = tmp_path / "output.txt"
    options = {"generate": ["--prompt", "the", "--max_new_tokens", "2"]}.get(script)
    options = options or ["--input", "text.txt", "--output", str(output), "--max_length", "4"]
    if name == wanted:
        load_script(script).main([name, *options])
    else:
        assert f"was saved from a {name}; what is needed is a {wanted}" in refuse(
            load_script(script).main, [name, *options]
        )
    assert output.exists() == (name == wanted and script == "translate")


def test_a_checkpoint_with_other_weights_than_its_model_is_refused(tmp_path):
    build("StableMoEForSequenceClassification").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    score = weights.pop("score.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing keys: score.weight"):
        load_saved(tmp_path)
    more = {**weights, "score.weight": score, "scores": score.clone()}
    save_file(more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unexpected keys: scores"):
        load_saved(tmp_path)


def test_a_checkpoint_loads_from_a_subfolder_and_as_a_variant(tmp_path):
    model = build("StableMoEForSequenceClassification")
    build("StableMoEForSequenceClassification", hidden_size=16).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "inner", variant="whole", max_shard_size="30KB")
    loaded = load_saved(tmp_path, subfolder="inner", variant="whole")
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "router", [{}, {"router_type": "hash"}, {"router_type": "switch"}, {"distilled_router": "bigram"}]
)
def test_a_head_changes_nothing_of_what_is_routed(router, stage):
    models = [build(name, **router) for name in MODELS if "Seq2Seq" not in name and "Conditional" not in name]
    routed = []
    for model in models:
        model.base_model.load_state_dict(models[0].state_dict())
        if stage == 2 and model.routing_stage == 1 and model.config.distilled_router is not None:
            model.freeze_router()
        [text] = route_texts(model, [[5, 6, 7, 8, 9] * 20, [11, 12]])
        routed.append(text)
    for text in routed[1:]:
        assert torch.equal(text.layers[0].experts, routed[0].layers[0].experts)
        if routed[0].layers[0].backbone_experts is not None:
            assert torch.equal(text.layers[0].backbone_experts, routed[0].layers[0].backbone_experts)
