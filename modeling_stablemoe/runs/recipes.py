# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Recipes and presets: YAML files that fill the command line of a script, JSON files that hold a model's shape."""

import glob
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import PreTrainedTokenizerBase, Seq2SeqTrainingArguments, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from modeling_stablemoe.checkpoints.architectures import CONFIGS
from modeling_stablemoe.checkpoints.folders import read_run
from modeling_stablemoe.data.parallel_corpus import LANGUAGE_PLACEHOLDER
from modeling_stablemoe.model.configuration_stablemoe import BACKBONE_FIELDS, StableMoEBaseConfig, StableMoEConfig

from .command_line import OptionParser, find_shipped, help_of, parse_overrides


HASH_TABLES = ("random", "balanced")


class NamesImplementations:
    """What options have that name implementations: `attn_implementation` and `experts_implementation`, each may be None."""

    @property
    def attention(self) -> dict[str, str]:
        """`dict`: the attention implementation, if it is named, as an argument of `from_config`."""
        return {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}

    @property
    def implementations(self) -> dict[str, str]:
        """`dict`: the implementations that were named, as arguments of `from_pretrained` and `from_config`."""
        experts = self.experts_implementation
        return self.attention | ({} if experts is None else {"experts_implementation": experts})


@dataclass
class ModelArguments(NamesImplementations):
    """The model to train."""

    model_preset: str | None = field(
        default=None,
        metadata={
            "help": "JSON file with the shape of a new model. Some are in configuration/models/, such as cpu-small.json. '' "
            "unsets that of a recipe."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to train further: a Hub name or a folder. Excludes a preset: with a recipe that has one, "
            "what it says of a new model is left out."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": """Fields of the preset to change, as JSON: '{"num_experts": 8, "dropout": 0.1}'. Of a checkpoint: rates of """
            "dropout, coefficients of losses and, until it is frozen, settings of stage 1; the shape stays."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2, ...; default: the best there is."}
    )
    experts_implementation: str | None = field(
        default=None, metadata={"help": "eager, grouped_mm or batched_mm; default: grouped_mm."}
    )

    def __post_init__(self):
        """Check that exactly one model is named; an empty string unsets what a recipe has set."""
        self.model_preset = self.model_preset or None
        self.model_name_or_path = self.model_name_or_path or None
        self.config_overrides = self.config_overrides or None
        if (self.model_preset is None) == (self.model_name_or_path is None):
            raise ValueError(
                "Name one model to train: `--model_preset` or `--model_name_or_path`."
                if self.model_preset is None
                else f"There are two models, {self.model_preset} and {self.model_name_or_path}: name one, `--model_preset` for a new "
                "one or `--model_name_or_path` for one that is there."
            )
        parse_overrides(self.config_overrides)

    @property
    def overrides(self) -> dict[str, Any]:
        """`dict`: `config_overrides`, parsed."""
        return parse_overrides(self.config_overrides)


@dataclass
class RoutingArguments:
    """The two stages, and measurements of the routing."""

    stage1_steps: str | None = field(
        default=None,
        metadata={
            "help": "Length of stage 1: steps ('600') or a share of all steps ('0.1'). Default: no transition, for dense "
            "models, a hash and checkpoints that are frozen already; '' unsets that of a recipe."
        },
    )
    settled_change: float | None = field(
        default=None,
        metadata={
            "help": "End stage 1 earlier, once at most this share of the tokens changes experts. That is 0.02, say, "
            "between two logs and twice in succession, and nothing may speak against freezing. --stage1_steps is "
            "the latest step then."
        },
    )
    hold_until_ready: str | None = field(
        default=None,
        metadata={
            "help": "Latest end of stage 1 where the routing is not worth freezing earlier. It is a step ('900') or a "
            "share of all steps ('0.4'), after --stage1_steps."
        },
    )
    best_of_stage2: bool = field(
        default=False,
        metadata={
            "help": "Let --load_best_model_at_end choose among checkpoints of stage 2 only. The model is frozen then. "
            "Default: the best of both stages, which may be one that is not frozen."
        },
    )
    hash_table: str | None = field(
        default=None,
        metadata={
            "help": "Table to route a new model by from the start. It is random, balanced by how often the tokens occur "
            "in the training text, or that of a frozen checkpoint, a folder. Default: random with `router_type` "
            '"hash", none otherwise. Tells what a table is worth, and with another router what the gate is.'
        },
    )
    split_tokens: int = field(
        default=0,
        metadata={
            "help": "How many of the most frequent token ids to route by the token before them, too. One that is a twentieth of "
            "all tokens makes one of 32 experts 1.6 times as busy as the mean, whatever the table."
        },
    )
    fluctuation_check_steps: int = field(
        default=0, metadata={"help": "Steps between checks of routing fluctuation (figures 2 and 7); 0: none."}
    )
    fluctuation_tokens: int = field(
        default=8192, metadata={"help": "Validation tokens that routing fluctuation is watched on."}
    )
    expert_load: Literal["history", "reporters", "none"] = field(
        default="history",
        metadata={
            "help": "Where the load of each expert goes with every log. Choices: 'history' (trainer_state.json, for "
            "plot_run.py), 'reporters' (TensorBoard and the like, and the console, too) or 'none'."
        },
    )

    def __post_init__(self):
        """Check what can be checked without the model; an empty string unsets an option of a recipe."""
        self.hash_table = self.hash_table or None
        if self.best_of_stage2 and not self.stage1_steps:
            raise ValueError(
                "`--best_of_stage2` needs a `--stage1_steps`: without a stage 1, all checkpoints are of one."
            )
        if not self.stage1_steps and (self.settled_change is not None or self.hold_until_ready):
            raise ValueError(
                "`--settled_change` and `--hold_until_ready` need a `--stage1_steps` to end earlier or later."
            )
        if self.split_tokens < 0:
            raise ValueError(f"`--split_tokens` is a number of token ids, 0 or more, got {self.split_tokens}.")
        if self.hash_table not in (None, *HASH_TABLES) and not Path(self.hash_table).is_dir():
            raise ValueError(
                f"`--hash_table` must be one of {list(HASH_TABLES)} or the folder of a frozen checkpoint, got "
                f"{self.hash_table!r}."
            )

    @property
    def stage1(self) -> int | float | None:
        """`int` (steps), `float` (share) or `None`: `stage1_steps` as `StageTransitionCallback` takes it."""
        return _parse_steps("stage1_steps", self.stage1_steps)

    @property
    def hold(self) -> int | float | None:
        """`int` (steps), `float` (share) or `None`: `hold_until_ready` as `StageTransitionCallback` takes it."""
        return _parse_steps("hold_until_ready", self.hold_until_ready)


def _parse_steps(option: str, text: str | None) -> int | float | None:
    if not text:
        return None
    text = str(text)
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"`--{option}` must be a number of steps such as 600 or a share such as 0.1, got {text!r}."
        ) from None


def read_preset(path: str | Path) -> tuple[type[StableMoEBaseConfig], dict[str, Any]]:
    """Read a model preset from a file.

    Args:
        path (`str` or `Path`): JSON file; its field `source` says where the numbers are from, `model_type` which kind
        of
            model it describes (default: "stablemoe").

    Returns:
        `tuple`: the class of its config, and the values of its fields.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is not a JSON object, or an unknown kind of model.
    """
    path = find_shipped(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no model preset {str(path)!r}; presets are under configuration/models/.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"The model preset {str(path)!r} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"The model preset {str(path)!r} must be a JSON object of config fields.")
    values.pop("source", None)
    model_type = values.pop("model_type", StableMoEConfig.model_type)
    if model_type not in CONFIGS:
        raise ValueError(
            f"The model preset {str(path)!r} has the unknown `model_type` {model_type!r}; choose one of {list(CONFIGS)}."
        )
    return CONFIGS[model_type], values


def load_preset(path: str | Path, **overrides: Any) -> StableMoEBaseConfig:
    """Make a config from a model preset.

    Args:
        path (`str` or `Path`): JSON file, such as those under `configuration/models/`.
        **overrides: fields to change; those that a `backbone_config` determines are changed there.

    Returns:
        `StableMoEConfig` or `StableMoESeq2SeqConfig`

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is no preset, an unknown field or a value out of range.
    """
    config_class, values = read_preset(path)
    if isinstance(values.get("backbone_config"), dict):
        determined = (*BACKBONE_FIELDS, "bos_token_id", "eos_token_id", "pad_token_id")
        values["backbone_config"] |= {name: overrides.pop(name) for name in determined if name in overrides}
    values |= overrides
    unknown = sorted(set(values) - {entry.name for entry in fields(config_class)})
    if unknown:
        raise ValueError(f"The model preset {str(path)!r} or its overrides name unknown fields: {unknown}.")
    return config_class(**values)


# Fields of a checkpoint that may be changed: the first while its routing is learned, the second at any time.
STAGE1_FIELDS = (
    "balance_loss_coef",
    "balance_loss_warmup_tokens",
    "balance_window_tokens",
    "center_balance_loss",
    "balance_gradient",
    "distillation_loss_coef",
    "distilled_router",
    "counts_half_life",
    "expert_bias_rate",
    "router_normalization",
    "router_half_life",
    "reset_gates_at_freeze",
    "max_frozen_load",
    "frozen_load_bands",
)
TRAINING_FIELDS = ("dropout", "attention_dropout", "label_smoothing", "router_aux_loss_coef", "expert_capacity_factor")


def change_checkpoint(config: StableMoEBaseConfig, overrides: dict[str, Any]) -> StableMoEBaseConfig:
    """Change how a checkpoint is trained; overrides that equal the present value are always accepted.

    Raises:
        ValueError: for an unknown field, one that fixes the shape of weights, or one that no longer has an effect.
    """
    known = {entry.name for entry in fields(config)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"`--config_overrides` names unknown fields: {unknown}.")
    changed = {name: value for name, value in overrides.items() if getattr(config, name) != value}
    is_frozen = config.router_fingerprint is not None
    free = [name for name in (*TRAINING_FIELDS, *(() if is_frozen else STAGE1_FIELDS)) if name in known]
    refused = [
        f"{name}: {getattr(config, name)!r} there, {changed[name]!r} here" for name in changed if name not in free
    ]
    if refused:
        state = "a frozen checkpoint" if is_frozen else "a checkpoint in stage 1"
        raise ValueError(
            f"`--config_overrides` cannot change {'; '.join(refused)}. Free in {state} are {', '.join(free)}; its weights "
            "fix the rest."
        )
    return type(config).from_dict({**config.to_dict(), **changed}) if changed else config


def model_fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the fields of a config that a new model takes from its tokenizer: vocabulary and special tokens."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer), **special}


def check_fit(config: StableMoEBaseConfig, num_tokens: int, **lengths: int):
    """Check before training that the data fit the model.

    Args:
        config (`StableMoEBaseConfig`): of the model.
        num_tokens (`int`): size of the tokenizer.
        **lengths: longest sequences in tokens, by the option that sets them.

    Raises:
        ValueError: if the vocabulary or the positions of the model are too few.
    """
    if num_tokens > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {num_tokens} tokens, the model's vocabulary {config.vocab_size}. Name the model's own "
            "tokenizer with `--tokenizer_name`, or call `resize_token_embeddings` on the model first."
        )
    for option, length in lengths.items():
        if length > config.max_position_embeddings:
            raise ValueError(
                f"Sequences of {length} tokens do not fit the model's {config.max_position_embeddings} positions. Lower "
                f"`--{option}`, or raise `max_position_embeddings` with `--config_overrides`."
            )


# Ranges of numeric options: at least the first, below the second. Trainer notices in the middle of a run, if at all:
# it accepts a negative weight decay, and trains three epochs for `max_steps=0`.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32)),
    **dict.fromkeys(("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"), (1, 2**63)),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "batch_tokens"), (1, 2**63)),
    **dict.fromkeys(("generation_max_length", "generation_num_beams"), (1, 2**63)),
    **dict.fromkeys(("dataloader_num_workers", "fluctuation_check_steps"), (0, 2**31)),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "num_train_epochs"), (0, math.inf)),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (0, math.inf)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1)),
    # Infinity is allowed: it logs the norm of the gradients without clipping them.
    "max_grad_norm": (0, math.nan),
}


class _Parser(OptionParser):
    """Refuses numbers outside the range of their option before they are used; an empty string unsets a list."""

    def parse_known_args(self, *args, **kwargs):
        namespace, rest = super().parse_known_args(*args, **kwargs)
        for name, value in vars(namespace).items():
            if value == [""]:
                setattr(namespace, name, [])
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)) and number != self.get_default(name):
                    _check_number(name, number)
        return namespace, rest


def _check_number(name: str, value: float):
    finite = (-(2**63), 2**63) if isinstance(value, int) else (-sys.float_info.max, math.inf)
    low, high = _RANGES.get(name, finite)
    if not value >= low or value >= high:  # NaN, too
        wanted = f"below {high}" if value >= high else f"at least {low}"
        wanted = wanted if name in _RANGES else "a finite number of no more than 64 bits"
        raise ValueError(f"argument --{name}: must be {wanted}, got {value}")


def parse_recipe(dataclass_types: Sequence[type], doc: str, argv: Sequence[str] | None = None) -> tuple:
    """Parse a command line that may start with a YAML recipe; options given after it win.

    Args:
        dataclass_types (sequence of `type`): argument classes, for `HfArgumentParser`.
        doc (`str`): docstring of the script, for `--help`.
        argv (sequence of `str`, *optional*): default: the process's own arguments.

    Returns:
        `tuple`: one instance of each class. A bad command line or recipe ends the process with status 2 and one line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclass_types, **help_of(doc))
    parser.usage = "%(prog)s [recipe.yaml] [--option value ...]"
    if any(issubclass(each, TrainingArguments) for each in dataclass_types):
        # `--do_train false` evaluates only. Trainer's 500 steps between logs are longer than many a run here.
        parser.set_defaults(do_train=True, logging_steps=25)
    if any(issubclass(each, Seq2SeqTrainingArguments) for each in dataclass_types):
        # Translations are what is scored, and an example is a batch of `--batch_tokens`.
        parser.set_defaults(predict_with_generate=True, per_device_train_batch_size=1)
    try:
        given = argv
        if argv and argv[0].endswith((".yaml", ".yml")):
            given = argv[1:]
            of_recipe = _recipe_to_argv(find_shipped(argv[0]))
            parser.origins = dict.fromkeys(_options_in(of_recipe) - _options_in(given), f"the recipe {argv[0]}")
            argv = of_recipe + _without_new_model(parser, of_recipe, given) + given
        _remember_data(parser, argv)
        arguments = parser.parse_args_into_dataclasses(args=argv)
        _require_files(parser, given, arguments)
        _require_trained_model(arguments)
        _adapt_to_cpu(arguments)
        _require_reporters(arguments)
        return arguments
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _without_new_model(parser: _Parser, of_recipe: list[str], given: list[str]) -> list[str]:
    """Unset what a recipe says of a new model, and of its stage 1 and its baselines, where the user names one that is there."""
    named = _options_in(given)
    if "model_name_or_path" not in named or "model_preset" in named:
        return []
    known, _ = parser.parse_known_args(of_recipe + given)
    if not known.model_name_or_path:
        return []
    unset = {"model_preset": "", "config_overrides": ""}
    if not known.do_train:
        unset |= {"stage1_steps": "", "ngram_baselines": "false"}
    elif _is_frozen(Path(known.model_name_or_path)):
        unset["stage1_steps"] = ""
    return [each for name in unset.keys() & set(parser.origins) for each in (f"--{name}", unset[name])]


def _is_frozen(model: Path) -> bool:
    """Return True for the folder of a model whose routing is frozen."""
    try:
        return json.loads((model / "config.json").read_text(encoding="utf-8")).get("router_fingerprint") is not None
    except (OSError, ValueError, AttributeError):
        return False


# Options that name data, and those that say how to read any.
_SOURCES = set("dataset_name parallel_datasets train_files validation_files test_files embedded_corpus".split())
_READING = {"text_column", "document_separator", "language_pairs"}
# Of the data options, those that are not about the text.
_NOT_REMEMBERED = {"tokenizer_name", "vocab_size", "preprocessing_num_workers"}


def _remember_data(parser: _Parser, argv: list[str]):
    """Let a model that is only evaluated read the text that its training held out, unless other text is named."""
    known, _ = parser.parse_known_args(argv)
    model = getattr(known, "model_name_or_path", None)
    if not model or getattr(known, "do_train", True):
        return
    run = read_run(model)
    given = _options_in(argv)
    if "output_dir" not in given:
        parser.set_defaults(output_dir="runs/evaluated")
    classes = ({entry.name for entry in fields(each)} for each in parser.dataclass_types)
    names = set().union(*(each for each in classes if "train_files" in each))
    names = (names & _READING if given & _SOURCES else names - _NOT_REMEMBERED) - given
    parser.set_defaults(**{name: run[name] for name in names & set(run)})
    parser.origins = parser.origins | dict.fromkeys(names & set(run), f"the run that made {model}")


def _options_in(argv: Sequence[str]) -> set[str]:
    return {each.partition("=")[0].lstrip("-").replace("-", "_") for each in argv if each.startswith("--")}


def _require_files(parser: _Parser, argv: Sequence[str], arguments: tuple):
    """Refuse files that do not exist and that the user has not named, who has named others: say who has.

    The rest is refused where it is read.
    """
    if not _options_in(argv) & _SOURCES:
        return
    for part in arguments:
        for option in sorted(_SOURCES & set(parser.origins) & set(vars(part))):
            names = getattr(part, option) if option.endswith("_files") else []
            for name in names:
                if not (glob.glob(name.replace(LANGUAGE_PLACEHOLDER, "*")) or Path(name).expanduser().exists()):
                    raise FileNotFoundError(
                        f"there is no {name}, which --{option} names{parser.origin_of(option)}; name yours, or unset it: "
                        f"--{option} ''"
                    )


def _require_trained_model(arguments: tuple):
    """Refuse to evaluate a new model, with random weights."""
    is_new = any(isinstance(part, ModelArguments) and part.model_name_or_path is None for part in arguments)
    if is_new and any(isinstance(part, TrainingArguments) and not part.do_train for part in arguments):
        raise ValueError(
            "--do_train false evaluates a trained model: name it with --model_name_or_path, in place of --model_preset"
        )


def _adapt_to_cpu(arguments: tuple):
    """On a CPU refuse `--fp16`, for which accelerate silently trains in float32, and pin no memory, of which torch warns."""
    for part in arguments:
        if isinstance(part, TrainingArguments) and part.device.type == "cpu":
            if part.fp16:
                raise ValueError("--fp16 does nothing on a CPU; train with --bf16 true, or in float32")
            part.dataloader_pin_memory = False


def _require_reporters(arguments: tuple):
    """Refuse a reporter whose package is not installed, which Trainer reports after all the text is read."""
    installed = get_available_reporting_integrations()
    for part in arguments:
        for name in part.report_to if isinstance(part, TrainingArguments) else []:
            if name not in installed and name in INTEGRATION_TO_CALLBACK:
                raise ValueError(f"--report_to {name} needs its package: `pip install {name}`, or --report_to none")


class YamlLoader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does; YAML 1.1 requires 1.0e-3."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _recipe_to_argv(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {str(path)!r}; recipes are under configuration/recipes/")
    try:
        loader = YamlLoader(path.read_text(encoding="utf-8"))
        recipe = loader.get_single_node()
        if not isinstance(recipe, yaml.MappingNode):
            raise ValueError(f"the recipe {str(path)!r} must be a mapping of option names to values")
        loader.flatten_mapping(recipe)  # resolves `<<`
        argv = []
        for name, value in recipe.value:
            if value.tag == "tag:yaml.org,2002:null":
                continue
            values = value.value if isinstance(value, yaml.SequenceNode) else [value]
            argv += [f"--{name.value}", *(_as_written(loader, item) for item in values)]
        return argv
    except yaml.YAMLError as error:
        raise ValueError(f"the recipe {str(path)!r} is not valid YAML: {error}") from error


def _as_written(loader: YamlLoader, node: yaml.Node) -> str:
    """Return a value as it would stand on the command line: `no` may be a language, and 010 is ten."""
    if not isinstance(node, yaml.ScalarNode):
        return json.dumps(loader.construct_object(node, deep=True), default=str)
    is_switch = node.tag == "tag:yaml.org,2002:bool" and node.value.lower() in ("on", "off")
    return str(node.value.lower() == "on") if is_switch else node.value


__all__ = [
    "ModelArguments",
    "NamesImplementations",
    "RoutingArguments",
    "YamlLoader",
    "change_checkpoint",
    "check_fit",
    "load_preset",
    "model_fields",
    "parse_recipe",
    "read_preset",
]
