"""Tests of the script that converts dense checkpoints."""

import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import ROOT
from helpers.backbones import dense_model
from helpers.dense_models import tiny_gpt2, tiny_opt, word_tokenizer
from helpers.models import random_ids
from helpers.workplaces import Workplace, content, load_script, refuse, run_here


STAGE1 = {
    "balance_loss_coef": 0.0,
    "expert_bias_rate": 0.01,
    "distilled_router": "counts",
    "share_experts_in_stage1": True,
    "reset_gates_at_freeze": True,
    "max_frozen_load": 1.3,
}
EXPERTS = ["--num_experts", "3", "--config_overrides", json.dumps({"num_expert_sublayers": 1, **STAGE1})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the checkpoint `gpt2` and its tokenizer, and a corpus of its words."""
    folder = tmp_path_factory.mktemp("work")
    tiny_gpt2(n_positions=32).save_pretrained(folder / "gpt2")
    word_tokenizer().save_pretrained(folder / "gpt2")
    generator = random.Random(0)
    documents = [" ".join(f"w{1 + int(generator.random() ** 2 * 90)}" for _ in range(40)) for _ in range(120)]
    (folder / "corpus.txt").write_text("\n\n".join(documents) + "\n")
    return folder


@pytest.fixture(scope="module")
def converted(folder):
    """The folder `moe`, and what the script said."""
    return run_here("convert_dense", "gpt2", "moe", *EXPERTS, "--moe_layer_positions", "2", folder=folder)


@pytest.fixture
def script(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return load_script("convert_dense").main


def test_result_is_a_checkpoint_with_its_code_and_the_logits_of_the_dense_model(folder, converted):
    assert "3 experts of 1 sublayers after block 2 of 3" in converted
    assert "the same to the bit (max difference 0)" in converted
    names = {path.name for path in (folder / "moe").iterdir()}
    assert {"config.json", "generation_config.json", "configuration_stablemoe.py", "modeling_stablemoe.py"} <= names
    assert not [name for name in os.listdir(folder) if name.endswith(".partial")]
    model, dense = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("moe", "gpt2"))
    assert model.routing_stage == 1
    ids = AutoTokenizer.from_pretrained(folder / "moe")("w3 w14 w15", return_tensors="pt").input_ids.repeat(2, 3)
    assert torch.equal(model(ids).logits, dense(ids).logits)


def test_dry_run_converts_and_saves_nothing(folder, script, capsys):
    before = content(folder)
    script(["gpt2", "dry", "--dry_run", "--text", "w1 w2 w3 w4 w5", "--dtype", "bfloat16"])
    printed = capsys.readouterr().out
    assert "In bfloat16, the logits of 5 tokens are the same to the bit" in printed
    assert "32 experts of 3 sublayers after block 1 of 3" in printed
    assert "Nothing is saved" in printed
    assert content(folder) == before
    assert not (folder / "dry").exists()


def test_a_llama_brings_its_chat_template_special_tokens_and_generation_settings(folder, script, capsys):
    dense = dense_model("llama", vocab_size=99)
    dense.generation_config.do_sample, dense.generation_config.top_k = True, 7
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["w7"]})
    for saved in (dense, tokenizer):
        saved.save_pretrained(folder / "llama")
    preset = ROOT / "configuration" / "models" / "llama-cpu.json"
    script(["llama", "chat", "--model_preset", str(preset), "--moe_layer_positions", "1", "3"])
    assert "8 experts in place of the FFN of block 1, 3 of 3" in capsys.readouterr().out
    model, ours = AutoModelForCausalLM.from_pretrained(folder / "chat"), AutoTokenizer.from_pretrained(folder / "chat")
    assert model.config.share_experts_in_stage1
    assert model.generation_config.top_k == 7
    assert "w7" in ours.all_special_tokens
    ids = ours.apply_chat_template([{"role": "user", "content": "w3 w14 w15"}], return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, dense(**ids).logits)


def test_preset_gives_experts_and_settings_but_no_sizes(folder, script, tmp_path):
    preset = {"source": "made up", "hidden_size": 16, "dropout": 0.4, "num_experts": 7, "distilled_router_dim": 6}
    (tmp_path / "preset.json").write_text(json.dumps(preset | {"num_expert_sublayers": 1, "moe_layer_positions": [3]}))
    options = ["--model_preset", str(tmp_path / "preset.json"), "--config_overrides", '{"distilled_router_dim": 5}']
    script(["gpt2", str(tmp_path / "out"), *options, "--num_experts", "2"])
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.num_experts, config.distilled_router_dim, config.moe_layer_positions) == (2, 5, [3])
    assert (config.hidden_size, config.dropout) == (48, 0.1)


def test_opt_of_odd_heads_is_saved_without_tokenizer_and_said_to_be_rounded(script, tmp_path, capsys):
    tiny_opt(num_attention_heads=4).save_pretrained(tmp_path / "opt")
    source, target = str(tmp_path / "opt"), tmp_path / "new" / "moe"
    assert "no tokenizer loads" in refuse(script, [source, str(target)])
    assert not target.parent.exists()
    script([source, str(target), "--tokenizer_name", "", "--num_experts", "2"])
    assert re.search(r"the same up to rounding \(max difference \d\.\de-0[78]\)", capsys.readouterr().out)
    with pytest.raises((OSError, ValueError)):
        AutoTokenizer.from_pretrained(target)


def test_a_model_that_computes_something_else_is_not_saved(folder, script, monkeypatch):
    from modeling_stablemoe import StableMoEForCausalLM

    convert = StableMoEForCausalLM.from_dense

    def slip(*args, **options):
        model = convert(*args, **options)
        model.model.layers[1].mlp.up_proj.bias.data[0] += 0.5
        return model

    monkeypatch.setattr(StableMoEForCausalLM, "from_dense", slip)
    assert "computes something else: logits differ by" in refuse(script, ["gpt2", "slip"])
    assert not (folder / "slip").exists()


def test_failure_while_saving_leaves_nothing_behind(folder, script, monkeypatch):
    from modeling_stablemoe import StableMoEForCausalLM

    def fail(model, target, **options):
        (Path(target) / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(StableMoEForCausalLM, "save_pretrained", fail)
    before = sorted(os.listdir(folder))
    assert refuse(script, ["gpt2", "full"]) == "error: No space left on device"
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gpt2", "gpt2"], "'gpt2' is there already and not empty"),
        (["nothing", "new"], "cannot load 'nothing': there is no folder of that name"),
        (["gpt2", "new", "--config_overrides", '{"hidden_size": 3}'], "hidden_size: no options of a conversion"),
        (["gpt2", "new", "--model_preset", "nothing.json"], "There is no model preset"),
        (
            ["gpt2", "new", "--model_preset", str(ROOT / "configuration/models/paper-translation.json")],
            "is of a 'stablemoe-seq2seq' model",
        ),
        (["gpt2", "new", "--tokenizer_name", "nothing"], "no tokenizer loads"),
        (["gpt2", "new", "--text", ""], "The text to compare on is empty"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, converted, script, options, message):
    before = content(folder)
    assert message in refuse(script, options)
    assert content(folder) == before
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gpt2"], "output_dir"),
        (["gpt2", "new", "--config_overrides", "{3"], "is not valid JSON"),
        (["gpt2", "new", "--config_overrides", "[3]"], "must be a JSON object"),
    ],
)
def test_bad_command_line_ends_with_status_2(script, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        script(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


class FineTuning(Workplace):
    """The folder, and the training script on what was converted there."""

    script = "run_clm.py"

    def arguments(self, output: str, *more: str) -> list[str]:
        text = """--model_name_or_path moe --train_files corpus.txt --validation_share 0.1 --block_size 16 --stage1_steps 4
            --max_steps 10 --per_device_train_batch_size 4 --learning_rate 1e-2 --logging_steps 2 --save_strategy no
            --report_to none --use_cpu True --disable_tqdm True --do_train True"""
        return [*text.split(), "--document_separator", "", "--output_dir", output, *more]


def test_converted_model_is_fine_tuned_through_both_stages(folder, converted):
    FineTuning(folder).train_here("tuned", "--config_overrides", '{"dropout": 0.0, "max_frozen_load": 1.2}')
    results = json.loads((folder / "tuned/results.json").read_text())
    assert [(row["stage"], row["steps"]) for row in results["stages"]] == [(1, 4), (2, 10)]
    config = json.loads((folder / "tuned/config.json").read_text())
    assert (config["dropout"], config["max_frozen_load"], config["expert_bias_rate"]) == (0.0, 1.2, 0.01)
    before, after = (load_file(folder / name / "model.safetensors") for name in ("moe", "tuned"))
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert (before["model.moe_layers.0.expert_stack.sublayers.0.down_proj"] == 0).all()
    assert (after["model.moe_layers.0.expert_stack.sublayers.0.down_proj"] != 0).any(-1).any(-1).all()
    tuned, ids = AutoModelForCausalLM.from_pretrained(folder / "tuned"), random_ids(1, 5)
    assert tuned.routing_stage == 2
    assert tuned.route(ids).shape == (1, 1, 5)
    # The checkpoint's own tokenizer has read the corpus.
    assert AutoTokenizer.from_pretrained(folder / "tuned").get_vocab() == word_tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("moe", {"num_experts": 5}, "cannot change num_experts: 3 there, 5 here. Free in a checkpoint in stage 1 are"),
        ("moe", {"share_experts_in_stage1": False}, "cannot change share_experts_in_stage1: True there, False here"),
        ("moe", {"dropout": 1.5}, "`dropout` is a probability"),
        (
            "frozen",
            {"expert_bias_rate": 0.1},
            "cannot change expert_bias_rate: 0.01 there, 0.1 here. Free in a frozen",
        ),
    ],
)
def test_what_weights_fix_is_not_overridden(folder, converted, monkeypatch, name, overrides, message):
    monkeypatch.chdir(folder)
    if name == "frozen":
        model = AutoModelForCausalLM.from_pretrained("moe")
        model.freeze_router()
        model.save_pretrained("frozen")
        word_tokenizer().save_pretrained("frozen")
    arguments = FineTuning(folder).arguments("new", "--model_name_or_path", name)
    said = refuse(load_script("run_clm").main, [*arguments, "--config_overrides", json.dumps(overrides)])
    assert re.search(message, said)
    assert not (folder / "new").exists()
