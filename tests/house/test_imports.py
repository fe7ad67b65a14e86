# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Importing the package costs no more than importing a model of transformers: it imports nothing else."""

import json
import subprocess
import sys

import modeling_stablemoe


# What needs more than models is imported when it is asked for.
CODE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, MixtralForCausalLM
before = set(sys.modules)
import modeling_stablemoe
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_the_import_brings_the_models_and_nothing_else():
    printed = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    imported = json.loads(printed.splitlines()[-1])
    assert "modeling_stablemoe.model.routing_stablemoe" in imported
    assert [name for name in imported if not name.startswith("modeling_stablemoe")] == []
    rooms = {name.split(".")[1] for name in imported if name.count(".")}
    assert rooms & {"training", "data", "measure", "hub", "runs", "offload", "checkpoints"} == set()


def test_every_public_name_is_there_and_another_is_an_attribute_error():
    for name in modeling_stablemoe.__all__:
        assert getattr(modeling_stablemoe, name) is not None
    assert not hasattr(modeling_stablemoe, "StableMoE")
