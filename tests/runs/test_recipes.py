"""Tests of model presets and recipes."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, TrainingArguments

from helpers import ROOT
from helpers.workplaces import load_script
from modeling_stablemoe import StableMoEConfig
from modeling_stablemoe.compare.comparison import check_config, read_systems
from modeling_stablemoe.compare.tables import TableSystem
from modeling_stablemoe.compare.upcycling import mixtral_config
from modeling_stablemoe.convert.dense import config_of_dense
from modeling_stablemoe.data.text import DataArguments
from modeling_stablemoe.runs.recipes import ModelArguments, RoutingArguments, load_preset, parse_recipe


PRESETS = sorted(ROOT.glob("configuration/models/*.json"))
RECIPES = sorted(ROOT.glob("configuration/recipes/*.yaml"))
CLM_TYPES = (ModelArguments, DataArguments, RoutingArguments, TrainingArguments)


def relative(path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "preset.json"
    path.write_text(json.dumps({"source": "made up", "vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2}))
    return path


def recipe(tmp_path, **values) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def parse(*argv):
    return parse_recipe(CLM_TYPES, "Train.", argv)


# Presets


def test_preset_fills_the_config_and_overrides_win(preset):
    config = load_preset(preset, num_experts=7, hidden_size=16)
    assert isinstance(config, StableMoEConfig)
    assert (config.vocab_size, config.hidden_size, config.num_experts) == (11, 16, 7)
    assert not hasattr(config, "source")


def test_what_a_backbone_determines_is_changed_in_its_config():
    config = load_preset(ROOT / "configuration/models/llama-cpu.json", vocab_size=99, pad_token_id=3, num_experts=2)
    assert (config.vocab_size, config.pad_token_id, config.num_experts) == (99, 3, 2)
    assert (config.backbone_config.vocab_size, config.backbone_config.pad_token_id) == (99, 3)


def test_missing_preset_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model preset .*nothing.json"):
        load_preset(tmp_path / "nothing.json")


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[1]", "must be a JSON object")])
def test_preset_that_is_no_json_object_is_refused(preset, text, message):
    preset.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_preset(preset)


def test_unknown_field_of_a_preset_or_override_is_refused(preset):
    with pytest.raises(ValueError, match=r"unknown fields: \['num_expert'\]"):
        load_preset(preset, num_expert=7)
    preset.write_text(json.dumps({"hidden": 8}))
    with pytest.raises(ValueError, match=r"unknown fields: \['hidden'\]"):
        load_preset(preset)


@pytest.mark.parametrize("path", PRESETS, ids=relative)
def test_preset_of_the_repository_loads_and_says_where_it_is_from(path):
    values = json.loads(path.read_text())
    assert next(iter(values)) == "source"
    assert values["source"]
    if "encoder_layers" not in values:
        load_preset(path)


# Recipes


def test_recipe_fills_the_command_line(tmp_path, preset):
    path = recipe(
        tmp_path,
        model_preset=str(preset),
        config_overrides={"num_experts": 3},
        train_files=["a.txt", "b c.txt"],
        document_separator="",
        stage1_steps=0.1,
        learning_rate="3e-4",
        max_steps=7,
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        tokenizer_name=None,
    )
    model, data, routing, training = parse(path)
    assert model.overrides == {"num_experts": 3}
    assert data.train_files == ["a.txt", "b c.txt"]
    assert data.document_separator == ""
    assert data.tokenizer_name is None
    assert routing.stage1 == 0.1
    assert (training.learning_rate, training.max_steps, training.use_cpu) == (3e-4, 7, True)


def test_options_after_the_recipe_win(tmp_path, preset):
    path = recipe(tmp_path, model_preset=str(preset), train_files=["a.txt", "b.txt"], max_steps=7, use_cpu=True)
    _, data, routing, training = parse(
        path, "--max_steps", "9", "--train_files", "c.txt", "--stage1_steps", "5", "--output_dir", str(tmp_path)
    )
    assert training.max_steps == 9
    assert data.train_files == ["c.txt"]
    assert routing.stage1 == 5


@pytest.mark.parametrize("is_frozen", [True, False])
def test_what_a_recipe_says_of_a_new_model_is_left_out_for_one_that_is_there(tmp_path, preset, is_frozen):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"router_fingerprint": "0" * 64 if is_frozen else None}))
    overrides = '{"num_experts": 3}'
    path = recipe(tmp_path, model_preset=str(preset), config_overrides=overrides, stage1_steps=5, use_cpu=True)
    there = "--model_name_or_path", str(model)
    of_model, _, routing, _ = parse(path, *there)
    assert (of_model.model_preset, of_model.overrides) == (None, {})
    assert routing.stage1 == (None if is_frozen else 5)
    of_model, _, routing, training = parse(path, *there, "--do_train", "false")
    assert (routing.stage1, training.output_dir) == (None, "runs/evaluated")
    of_model, *_ = parse(path, *there, "--config_overrides", '{"dropout": 0.1}')
    assert of_model.overrides == {"dropout": 0.1}


def refuse(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    *usage, message = capsys.readouterr().err.splitlines()
    assert len(usage) < 4
    return message


def test_bad_recipes_end_with_status_2_and_one_line(tmp_path, preset, capsys):
    assert "there is no recipe" in refuse(capsys, str(tmp_path / "nothing.yaml"))
    unknown = recipe(tmp_path, model_preset=str(preset), lerning_rate=1.0)
    assert "--lerning_rate" in refuse(capsys, unknown)
    Path(unknown).write_text("- a\n- b\n")
    assert "must be a mapping" in refuse(capsys, unknown)
    Path(unknown).write_text("a: [1\nb: 2")
    with pytest.raises(SystemExit, match="2"):
        parse(unknown)
    assert "is not valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("learning_rate", "1e-3", 1e-3),
        ("max_steps", "1_000", 1000),
        ("max_steps", "010", 10),  # YAML's octal 8
        ("use_cpu", "yes", True),
        ("bf16", "off", False),
        ("eval_strategy", "no", "no"),  # YAML's false
        ("data_seed", "~", None),
        ("run_name", "2026-11-28", "2026-11-28"),  # YAML's date
        ("train_files", "[1:30, no]", ["1:30", "no"]),  # YAML's ninety
    ],
)
def test_a_value_of_a_recipe_is_what_it_is_on_the_command_line(option, text, value, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model_preset: a.json\noutput_dir: {tmp_path}\nuse_cpu: true\n{option}: {text}\n")
    found = [getattr(part, option) for part in parse(str(path)) if hasattr(part, option)]
    assert found == [value]
    assert isinstance(found[0], type(value))


def test_overrides_of_a_recipe_are_numbers_as_in_json(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model_preset: a.json\nuse_cpu: true\n"
        "config_overrides: {dropout: 1e-1, initializer_range: 2.0E-2, num_experts: 8, router_type: 'no'}\n"
    )
    model, *_ = parse(str(path), "--output_dir", str(tmp_path))
    assert model.overrides == {"dropout": 0.1, "initializer_range": 0.02, "num_experts": 8, "router_type": "no"}


BAD_NUMBERS = [
    ("max_steps", "1e5"),
    ("max_steps", "100.0"),
    ("max_steps", "0"),
    ("max_steps", str(10**20)),
    ("seed", str(2**32)),
    ("learning_rate", "nan"),
    ("learning_rate", ".inf"),
    ("learning_rate", "inf"),
    ("learning_rate", "-0.001"),
    ("learning_rate", "yes"),
    ("max_grad_norm", "nan"),
    ("adam_beta2", "1.0"),
    ("warmup_steps", "nan"),
    ("save_total_limit", str(2**63)),
    ("block_size", str(-(10**20))),
    ("fluctuation_check_steps", "-1"),
]


def assert_number_is_refused(capsys, option: str, value: str, argv: list[str]):
    message = refuse(capsys, *argv, "--model_preset", "a.json", "--use_cpu", "true")
    assert f"argument --{option}" in message
    assert value in message


@pytest.mark.parametrize(("option", "value"), BAD_NUMBERS)
def test_a_number_that_no_option_can_have_is_refused_by_the_name_of_the_option(option, value, tmp_path, capsys):
    assert_number_is_refused(capsys, option, value, ["--output_dir", str(tmp_path), f"--{option}={value}"])


# Where YAML has a number, a truth value or a word of its own.
@pytest.mark.parametrize(("option", "value"), BAD_NUMBERS[:10])
def test_a_recipe_with_such_a_number_is_refused_in_the_same_way(option, value, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{option}: {value}\n")
    assert_number_is_refused(capsys, option, value, [str(path), "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Name one model to train"),
        (["--model_preset", "a.json", "--model_name_or_path", "b"], "There are two models, a.json and b"),
        (["--model_preset", "a.json", "--config_overrides", "{num: 3}"], "is not valid JSON"),
        (["--model_preset", "a.json", "--config_overrides", "[3]"], "must be a JSON object"),
        (["--model_preset", "a.json", "--max_step", "3"], "--max_step"),
    ],
)
def test_bad_options_end_with_status_2_and_one_line(capsys, argv, message):
    assert message in refuse(capsys, *argv)


@pytest.mark.parametrize(("text", "value"), [(None, None), ("", None), ("1", 1), ("1.0", 1.0), (5, 5), (0.5, 0.5)])
def test_stage1_steps_is_an_int_of_steps_or_a_float_share(text, value):
    stage1 = RoutingArguments(stage1_steps=text).stage1
    assert stage1 == value
    assert type(stage1) is type(value)


def test_stage1_steps_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="must be a number of steps such as 600 or a share such as 0.1"):
        RoutingArguments(stage1_steps="10%").stage1  # noqa: B018 - the property raises


def script_of(path):
    """The script that a recipe is for."""
    text = path.read_text()
    if "\ndense_config: " in text:
        return "compare_upcycling"
    if "\ncount_steps: " in text:
        return "compare_tables"
    if "\nsystems: " in text:
        return "compare_routers"
    return "run_translation" if "predict_with_generate" in text else "run_clm"


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_of_the_repository_parses(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    # On a machine without GPU too.
    argv = [str(path), "--output_dir", str(tmp_path), "--use_cpu", "True", "--bf16", "False", "--fp16", "False"]
    arguments = {type(part).__name__: part for part in load_script(script_of(path)).parse_arguments(argv)}
    if "DenseArguments" in arguments:
        dense = arguments["DenseArguments"]
        dense = AutoConfig.for_model(dense.model_type, **dense.fields)
        for system in read_systems(arguments["UpcyclingArguments"].systems):
            make = mixtral_config if "model_type" in system.config else config_of_dense
            assert make(dense, **system.config).hidden_size == dense.hidden_size
        return
    if "TableArguments" in arguments:
        blocks = arguments["DataArguments"].block_size
        for system in read_systems(arguments["CompareArguments"].systems, kind=TableSystem):
            values = {name: value for name, value in system.config.items() if name != "model_type"}
            check_config(system.config["model_type"], values)
            assert AutoConfig.for_model(**system.config).max_position_embeddings == blocks
        return
    model = arguments["ModelArguments"]
    if model.model_preset is not None:
        load_preset(model.model_preset, **model.overrides)
    if "CompareArguments" in arguments:
        systems = read_systems(arguments["CompareArguments"].systems)
        assert "stablemoe" in {system.name for system in systems}
        for system in systems:
            load_preset(model.model_preset, **model.overrides, **system.config)
    else:
        stage1 = arguments["RoutingArguments"].stage1
        assert stage1 is None or stage1 > 0


def test_an_empty_string_unsets_what_a_recipe_has_set():
    model = ModelArguments(model_preset="", config_overrides="", model_name_or_path="somewhere")
    assert (model.model_preset, model.config_overrides, model.model_name_or_path) == (None, None, "somewhere")


def test_what_ends_stage_1_earlier_or_later_needs_a_stage_1():
    for options in ({"settled_change": 0.1}, {"hold_until_ready": "0.5"}):
        with pytest.raises(ValueError, match="need a `--stage1_steps`"):
            RoutingArguments(**options)
    held = RoutingArguments(stage1_steps="10", hold_until_ready="0.5")
    assert (held.stage1, held.hold) == (10, 0.5)
    assert RoutingArguments(stage1_steps="10", hold_until_ready="").hold is None
