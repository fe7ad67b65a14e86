"""The code that travels: one generated file for each model family, beside the configuration."""

import ast
import subprocess
import sys

import pytest

from helpers.checkpoints import run_without_package
from helpers.models import tiny_config, tiny_model, tiny_seq2seq_model
from modeling_stablemoe import StableMoEForCausalLM, StableMoEForSequenceClassification
from modeling_stablemoe.hub.bundle import SOURCES, bundle


NAMES = ["modeling_stablemoe", "modeling_stablemoe_seq2seq"]


def definitions(source: str) -> list[tuple[str, str]]:
    """Name and code of all that a source defines: functions, classes, constants."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append((node.name, ast.unparse(node)))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [(ast.unparse(target), ast.unparse(node)) for target in targets]
    return [(name, code) for name, code in found if name != "__all__"]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_defines_what_its_sources_do_and_each_name_once(name):
    defined = definitions(bundle(name))
    kinds: dict[str, set[str]] = {}
    for key, code in defined:
        kinds.setdefault(key, set()).add(code)
    assert not {key: codes for key, codes in kinds.items() if len(codes) > 1}
    parts = [
        line[2:] for line in bundle(name).splitlines() if line.startswith("# ") and line.endswith("_stablemoe.py")
    ]
    parts += [f"{name}.py"]
    assert len(parts) > 15
    written = set(defined)
    for part in parts:
        assert set(definitions((SOURCES / part).read_text())) <= written, part


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_the_file_is_undefined_or_defined_twice(name, tmp_path):
    (tmp_path / f"{name}.py").write_text(bundle(name))
    check = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", str(tmp_path)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_file_of_the_model_travels_in_one_of_them():
    parts = {line[2:] for name in NAMES for line in bundle(name).splitlines() if line.startswith("# ")}
    names = {path.name for path in SOURCES.glob("*.py")} - {"__init__.py", "configuration_stablemoe.py"}
    assert names <= parts


@pytest.mark.parametrize(("make", "name"), [(tiny_model, NAMES[0]), (tiny_seq2seq_model, NAMES[1])])
def test_a_checkpoint_carries_two_files(make, name, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_stablemoe.py", f"{name}.py"}
    assert (tmp_path / f"{name}.py").read_text() == bundle(name)
    assert (tmp_path / "configuration_stablemoe.py").read_text() == (
        SOURCES / "configuration_stablemoe.py"
    ).read_text()


def test_a_config_alone_carries_its_own_file_alone(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_stablemoe.py"}


def test_what_a_checkpoint_s_code_alone_does_and_what_it_does_not(tmp_path):
    tiny_model().save_pretrained(tmp_path / "stable")
    tiny_model(max_frozen_load=1.2).save_pretrained(tmp_path / "limit")
    tiny_model(router_type="base").save_pretrained(tmp_path / "base")
    tiny_seq2seq_model().save_pretrained(tmp_path / "translation")
    StableMoEForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "classifier")
    code = """
        import logging, os, sys
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

        def load(kind, auto=AutoModelForCausalLM):
            return auto.from_pretrained(os.path.join(sys.argv[1], kind), trust_remote_code=True).train()

        def refuse(act, purpose):
            try:
                act()
            except ImportError as error:
                assert str(error).startswith(purpose) and "Install the package `modeling_stablemoe`" in str(error), error
            else:
                raise AssertionError(purpose)

        said = []
        logging.getLogger().addHandler(handler := logging.Handler())
        handler.emit = lambda record: said.append(record.getMessage())
        ids = torch.arange(2, 16).view(2, 7)
        for kind, auto in (("stable", AutoModelForCausalLM), ("translation", AutoModelForSeq2SeqLM)):
            model = load(kind, auto)
            model(input_ids=ids, labels=ids).loss.backward()
            model.freeze_router()
            model(input_ids=ids, labels=ids).loss.backward()
            assert model.routing_stage == 2
        classifier = load("classifier", AutoModelForSequenceClassification)
        classifier(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        assert [each for each in said if "(stage 1)" in each and "the callbacks of Trainer need the package" in each]
        limited, base = load("limit"), load("base")
        assert [each for each in said if "Trainer, and freezing it under `max_frozen_load`, need the package" in each]
        said.clear()
        model.save_pretrained("frozen")
        AutoModelForSeq2SeqLM.from_pretrained("frozen", trust_remote_code=True)
        assert not [each for each in said if "(stage 1)" in each]
        limited(input_ids=ids, labels=ids).loss.backward()
        refuse(limited.freeze_router, "Freezing under a load limit (`max_frozen_load`)")
        assert limited.routing_stage == 1
        refuse(lambda: base(input_ids=ids), "Training a BASE router")
        base.eval()(input_ids=ids)
        refuse(lambda: type(base).from_dense("gpt2"), "`from_dense`")
    """
    run_without_package(code, tmp_path / "elsewhere", tmp_path)


def test_a_subclass_of_one_s_own_is_saved_with_the_code_of_the_class_above(tmp_path):
    class Mine(StableMoEForCausalLM):
        pass

    Mine(tiny_config()).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_stablemoe.py", "modeling_stablemoe.py"}
