# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Checks of a checkpoint before it is published: weights, routing, code, tokenizer and card must agree."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, TrainerState
from yaml import YAMLError

from modeling_stablemoe.measure.fluctuation import FIGURE_FILE
from modeling_stablemoe.measure.report import last_evaluation, summarize_run
from modeling_stablemoe.model.configuration_stablemoe import StableMoEBaseConfig

from . import reload_probe
from .cards import CARD_FILE, CardFacts, build_model_card, head_of, is_filled_card, measured_metrics
from .publishing import Shipment, rename, select_files


# Two ways of loading the same weights lay them out differently in memory, which changes the last bits of products.
_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
_FINGERPRINT = re.compile(r"\b[0-9a-f]{64}\b")
_IMAGE = re.compile(r"!\[[^\]]*\]\(([^):]+)\)")  # files of the folder; an address has a colon
_SAVE_AGAIN = "Load the model with the package and save it again, for its code files."


def prepare(folder: str | Path, name: str, license: str | None = None, language: list[str] | None = None) -> Shipment:
    """Check a checkpoint and collect what is to be sent; changes nothing in the folder.

    The card is filled if there is none; one that this package filled is changed to name the repository; one that
    somebody wrote is sent unchanged.

    Args:
        folder (`str` or `Path`): a checkpoint, or the output folder of a run.
        name (`str`): of the repository, "user/name".
        license (`str`, *optional*): for the card. Default: the one in the card.
        language (`list[str]`, *optional*): for the card. Default: those in the card.

    Returns:
        `Shipment`

    Raises:
        ValueError: for the first thing that is wrong, with the remedy.
        OSError: for a file that cannot be read.
    """
    folder = Path(folder)
    check_weight_files(folder)
    try:
        model, tokenizer = reload_probe.load(str(folder.resolve()))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{str(folder)!r} does not load: {error}") from error
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}: this is the tokenizer of "
            "another model. Save the right one to the folder."
        )
    files, left_out = select_files(folder)
    card = _card_of(folder, name, model)
    for field, value in (("license", license), ("language", language)):
        if value:
            card.data[field] = value
    check_card(card, model.config, _read_results(folder), set(files))
    check_without_package(folder, reload_probe.compute(model))  # last because it takes longest
    return Shipment(files, card, left_out)


def check_weight_files(folder: Path):
    """Refuse a folder that holds no StableMoE model in safetensors files.

    Raises:
        ValueError: naming what is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} holds no model: there is no config.json. Save one with `save_pretrained`.")
    if not (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds no weights in safetensors files, and pickles are not published. Load the model and "
            "save it with `save_pretrained`."
        )
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, StableMoEBaseConfig):
        raise ValueError(f"{str(folder)!r} holds a model of type {config.model_type!r}, not a StableMoE model.")


def check_without_package(folder: Path, expected: dict[str, Tensor]):
    """Load a checkpoint by its own code in a fresh interpreter without the package, and compare what it computes.

    Raises:
        ValueError: if it does not load there, or computes something else.
    """
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "computed.safetensors"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(work) / "modules")}
        finished = subprocess.run(
            [sys.executable, "-", str(folder.resolve()), str(output)],
            input=Path(reload_probe.__file__).read_text(),
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
        )
        if finished.returncode != 0:
            reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(
                f"{str(folder)!r} does not load with `trust_remote_code=True` where the package is not installed ({reason}). "
                f"{_SAVE_AGAIN}"
            )
        actual = load_file(output)
    if actual.keys() != expected.keys():
        raise ValueError(f"The code files in {str(folder)!r} are of another model. {_SAVE_AGAIN}")
    for key, value in expected.items():
        is_close = (
            torch.allclose(actual[key], value, **_TOLERANCE) if key == "output" else torch.equal(actual[key], value)
        )
        if not is_close:
            raise ValueError(f"The code files in {str(folder)!r} compute other {key.split('_')[0]}. {_SAVE_AGAIN}")


def _read_results(folder: Path) -> dict | None:
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def _card_of(folder: Path, name: str, model: PreTrainedModel) -> ModelCard:
    path = folder / CARD_FILE
    if path.exists():
        try:
            card = ModelCard.load(path)
        except (ValueError, YAMLError) as error:
            raise ValueError(f"The metadata of {str(path)!r} are wrong: {error}") from error
        return rename(card, name) if is_filled_card(path) else card
    results = _read_results(folder) or _results_of_state(folder, model)
    return build_model_card(
        model_name=name,
        config=model.config,
        results=results,
        model_class=type(model),
        figure=FIGURE_FILE if (folder / FIGURE_FILE).exists() else None,
        versions={"transformers": json.loads((folder / "config.json").read_text())["transformers_version"]},
    )


def _results_of_state(folder: Path, model: PreTrainedModel) -> dict:
    """Gather the results of a run from the Trainer's state; without one, nothing was measured."""
    path = folder / "trainer_state.json"
    state = TrainerState.load_from_json(str(path)) if path.exists() else TrainerState()
    measured = last_evaluation(state.log_history, has_language_head=model.can_generate())
    results = {**summarize_run(model, state, state.global_step), **measured}
    return results if path.exists() else {**results, "step": None}


def check_card(card: ModelCard, config: StableMoEBaseConfig, results: dict | None, files: set[str]):
    """Check a model card against the model, its `results.json` and the files that are sent.

    Raises:
        ValueError: for the first thing that is wrong.
    """
    data = card.data
    for key, expected in (("library_name", "transformers"), ("pipeline_tag", head_of(config).task)):
        if data.get(key) != expected:
            raise ValueError(f"The card says `{key}: {data.get(key)}`; for this model it is {expected!r}.")
    _check_facts(data)
    _check_numbers(data, results or {})
    _check_fingerprint("The card", set(_FINGERPRINT.findall(card.text)), config)
    _check_fingerprint("results.json", {(results or {}).get("router_fingerprint")} - {None}, config)
    missing = sorted(set(_IMAGE.findall(card.text)) - files)
    if missing:
        raise ValueError(f"The card shows {', '.join(missing)}, which is not among the files that are sent.")


def _check_numbers(data: ModelCardData, results: dict):
    """Check that the model index holds finite numbers that agree with the results."""
    values = {result.metric_type: result.metric_value for result in data.eval_results or []}
    for metric, value in values.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"The card's model index says {metric} = {value!r}, which is no finite number.")
    for metric, value in measured_metrics(results).items():
        if values.get(metric) != value:
            raise ValueError(
                f"The card's model index says {metric} = {values.get(metric)}, results.json {value}. One of them is of "
                f"another run: delete {CARD_FILE} to have it filled from results.json."
            )


def _check_fingerprint(source: str, named: set[str], config: StableMoEBaseConfig):
    """Refuse a page that names another routing than the model's."""
    if named and config.router_fingerprint not in named:
        raise ValueError(
            f"{source} names the routing {min(named)}, the model has {config.router_fingerprint}: it is of another model. "
            "Delete the file, or restore the one that was saved with the weights."
        )


def _check_facts(data: ModelCardData):
    """Check the identifiers of the Hub: license, languages, data sets, base model."""

    def listed(value) -> list[str]:
        return [] if value is None else [value] if isinstance(value, str) else list(value)

    try:
        CardFacts(data.get("license"), listed(data.get("language")), listed(data.get("datasets")))
        CardFacts(datasets=listed(data.get("base_model")))
    except ValueError as error:
        raise ValueError(f"The card's metadata are wrong. {error}") from error


__all__ = ["check_card", "check_weight_files", "check_without_package", "prepare"]
