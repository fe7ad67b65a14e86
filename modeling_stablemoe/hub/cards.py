# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The model card of a run, filled from what was measured."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id
from yaml import YAMLError

from modeling_stablemoe.measure.report import describe_saved_model, format_stages
from modeling_stablemoe.measure.translation_metrics import format_scores
from modeling_stablemoe.model.configuration_stablemoe import StableMoEBaseConfig
from modeling_stablemoe.model.tensors_stablemoe import unpack_ids


CARD_FILE = "README.md"
TEMPLATE_FILE = "hub_card.md"
# The oldest version that the tests pass with.
OLDEST_TRANSFORMERS = "5.15"
# Parameters below which a model knows the form of its text rather than the content.
_SMALL = 1_000_000_000
# The Hub's name for unknown data.
UNKNOWN = "unknown"

_METRIC_NAMES = {"bleu": "BLEU", "chrf": "chrF"}
_DIGITS = {"perplexity": 3, "bleu": 2, "chrf": 2}
_TAGS = ("stablemoe", "mixture-of-experts", "custom_code")
# Tags of cards that were written by a program.
_FILLED = {_TAGS[0], "generated_from_trainer"}
# ISO 639, and the two values that the Hub has besides.
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


class Head(NamedTuple):
    """What a model of one class is for.

    Attributes:
        kind (`str`): its name in the card.
        task (`str`): its task on the Hub.
        auto_class (`str`): the Auto class that loads it.
    """

    kind: str
    task: str
    auto_class: str


_HEADS = {
    "StableMoEForCausalLM": Head("language model", "text-generation", "AutoModelForCausalLM"),
    "StableMoEForConditionalGeneration": Head("translation model", "translation", "AutoModelForSeq2SeqLM"),
    "StableMoEForSequenceClassification": Head(
        "text classifier", "text-classification", "AutoModelForSequenceClassification"
    ),
    "StableMoEModel": Head("language model without a head", "feature-extraction", "AutoModel"),
    "StableMoESeq2SeqModel": Head("translation model without a head", "feature-extraction", "AutoModel"),
}


def head_of(config: StableMoEBaseConfig, model_class: type | None = None) -> Head:
    """Return the head of a model, by class or `config.architectures`; unknown classes get a language head."""
    if model_class is None:
        names = config.architectures or []
    else:
        names = [parent.__name__ for parent in model_class.__mro__]
    family = "StableMoEForConditionalGeneration" if config.is_encoder_decoder else "StableMoEForCausalLM"
    head = next((_HEADS[name] for name in names if name in _HEADS), _HEADS[family])
    if head.task == "text-classification" and problem_type_of(config) == "regression":
        return head._replace(kind="model that scores texts")
    return head


def problem_type_of(config: StableMoEBaseConfig) -> str:
    """Return `config.problem_type`, or what the number of labels implies as long as that is not set."""
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides what was measured; the card leaves out what is not known.

    Args:
        license (`str`, *optional*): as the Hub writes it, e.g. "apache-2.0".
        language (`list[str]`): ISO 639 codes, "code" or "multilingual".
        datasets (`list[str]`): Hub names of the data sets that the model was trained on.
        base_model (`str`, *optional*): Hub name or folder of the model that training started from.
        dataset_name (`str`, *optional*): evaluation data, by its Hub name if it has one. Default: the data sets.
        dataset_config (`str`, *optional*): configuration of the evaluation data.
        dataset_split (`str`, *optional*): its split.
        task (`str`, *optional*): a task of the Hub. Default: that of the model's head, such as "text-generation".
        tags (`list[str]`): more tags.

    Raises:
        ValueError: for a name that no data set on the Hub can have, or an unknown form of license or language.
    """

    license: str | None = None
    language: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    base_model: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    task: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self):
        for name in self.datasets:
            if not is_hub_name(name):
                raise ValueError(f"`datasets`: {name!r} is no name of a data set on the Hub, such as 'user/name'.")
        for code in self.language:
            if not _LANGUAGE.fullmatch(code):
                raise ValueError(
                    f"`language`: {code!r} is no ISO 639 code such as 'en', nor 'code' or 'multilingual'."
                )
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ValueError(f"`license`: {self.license!r} is no identifier of a license, such as 'apache-2.0'.")

    def updated(self, **known: Any) -> "CardFacts":
        """Return a copy with the values of `known` that are not `None`."""
        return replace(self, **{name: value for name, value in known.items() if value is not None})


def is_hub_name(name: str) -> bool:
    """Return True if `name` can be a repository on the Hub and is not a local path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def languages_of_pairs(pairs: list[str]) -> list[str]:
    """List the ISO 639 codes in names of language pairs such as "de-en", sorted."""
    parts = {part.split("_")[0] for pair in pairs for part in pair.split("-")}
    return sorted(part for part in parts if _LANGUAGE.fullmatch(part))


def card_template() -> Path:
    """Return the path of `hub_card.md`: inside an installed package, beside the package in a clone."""
    package = Path(__file__).parents[1]
    installed = package / "card" / TEMPLATE_FILE
    return installed if installed.exists() else package.parent / TEMPLATE_FILE


def is_filled_card(path: Path) -> bool:
    """Return True if a program wrote the card (this package or Trainer), so that it may be replaced."""
    try:
        tags = (metadata_load(path) or {}).get("tags") or []
    except (ValueError, YAMLError):
        return False
    return not _FILLED.isdisjoint(tags)


def running_versions() -> dict[str, str]:
    """Return the versions of transformers and torch in this process."""
    return {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}


def measured_metrics(results: dict) -> dict[str, float]:
    """Return the finite metrics of `results` for the model index: perplexity or loss, BLEU, chrF and others."""
    scores = results.get("scores") or {}
    found = {
        "perplexity": results.get("perplexity"),
        "loss": results.get("loss"),
        "bleu": scores.get("mean_bleu", results.get("bleu")),
        "chrf": scores.get("mean_chrf", results.get("chrf")),
        **results.get("metrics", {}),
    }
    return {
        name: round(value, _DIGITS.get(name, 4))
        for name, value in found.items()
        if value is not None and math.isfinite(value)
    }


def build_model_card(
    template: str | Path | None = None,
    *,
    model_name: str,
    config: StableMoEBaseConfig,
    results: dict,
    model_class: type | None = None,
    dataset_name: str | None = None,
    facts: CardFacts | None = None,
    title: str | None = None,
    figure: str | None = None,
    versions: dict[str, str] | None = None,
) -> ModelCard:
    """Fill a model card.

    Args:
        template (`str` or `Path`, *optional*): a card with the fields of `hub_card.md`. Default: that.
        model_name (`str`): Hub name or folder name of the model.
        config (`StableMoEBaseConfig`): of the trained model.
        results (`dict`): `parameters`, `stages` and `distillation_agreement_at_transition` of the run; `tokens` that
            it has read, where that is known. What was evaluated: `perplexity` or, without a language head, `loss` and `metrics`, a `dict` of numbers by name; for
            a translation model also `scores` (of `score_translations`), or `bleu` and `chrf`. `split` (default:
            validation) and `evaluated_step` (default: the last) say on what and when; `step` and `routing_stage`
            (default: the last) say which model of the run this is.
        model_class (`type`, *optional*): of the model. Default: the class that `config` was saved with.
        dataset_name (`str`, *optional*): evaluation data. Default: that of `facts`.
        facts (`CardFacts`, *optional*): what else is known.
        title (`str`, *optional*): heading of the card. Default: the model's name.
        figure (`str`, *optional*): file beside the card that shows the routing fluctuation.
        versions (`dict[str, str]`, *optional*): versions that the model was trained with. Default: those running now.

    Returns:
        `ModelCard`: with the metadata that the Hub reads.
    """
    facts = (facts or CardFacts()).updated(dataset_name=dataset_name)
    fingerprint, scores = config.router_fingerprint, results.get("scores")
    head = head_of(config, model_class)
    data = _metadata(model_name, facts.task or head.task, measured_metrics(results), facts)
    return ModelCard.from_template(
        data,
        template_path=str(template or card_template()),
        title=title or model_name,
        model_name=model_name,
        kind=head.kind,
        auto_class=head.auto_class,
        problem_type=problem_type_of(config),
        is_encoder_decoder=config.is_encoder_decoder,
        is_frozen=fingerprint is not None,
        can_freeze=fingerprint is None and bool(config.num_moe_layers) and config.distilled_router is not None,
        base_model=_describe_base(facts.base_model),
        pruned=_describe_pruning(config),
        saved_model=describe_saved_model(results),
        routing=_describe_routing(config),
        fingerprint=f"`{fingerprint}`" if fingerprint else "none yet",
        experts=_describe_experts(config),
        load=_describe_load(results),
        parameters=f"{results['parameters']:,}",
        step=results.get("step"),
        tokens=f"about {results['tokens']:,}" if results.get("tokens") else None,
        is_small=results["parameters"] < _SMALL,
        languages=facts.language,
        length=f"{config.max_position_embeddings:,}",
        measured=_describe_measured(results),
        agreement=_describe_agreement(results, fingerprint is not None),
        stages_table=format_stages(results["stages"]),
        scores_table=None if scores is None else format_scores(scores),
        figure=figure,
        oldest_transformers=OLDEST_TRANSFORMERS,
        versions=running_versions() if versions is None else versions,
    )


def _metadata(model_name: str, task: str, metrics: dict[str, float], facts: CardFacts) -> ModelCardData:
    measured_on = facts.dataset_name or ", ".join(facts.datasets) or UNKNOWN
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        license=facts.license,
        language=facts.language or None,
        datasets=facts.datasets or None,
        base_model=facts.base_model if facts.base_model and is_hub_name(facts.base_model) else None,
        tags=list(dict.fromkeys([*_TAGS, *facts.tags])),
        model_name=model_name,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=measured_on,
                dataset_name=measured_on,
                dataset_config=facts.dataset_config,
                dataset_split=facts.dataset_split,
                metric_type=metric,
                metric_name=_METRIC_NAMES.get(metric, metric.replace("_", " ").capitalize()),
                metric_value=value,
            )
            for metric, value in metrics.items()
        ]
        or None,
    )


def _describe_base(base_model: str | None) -> str | None:
    if base_model is None:
        return None
    if is_hub_name(base_model):
        return f"[{base_model}](https://huggingface.co/{base_model})"
    return f"`{Path(base_model).name}`, a local checkpoint"


def _describe_routing(config: StableMoEBaseConfig) -> str:
    if not config.num_moe_layers:
        return "none: a dense model"
    return "frozen (stage 2)" if config.router_fingerprint else "still learned (stage 1)"


def _describe_pruning(config: StableMoEBaseConfig) -> str | None:
    """Describe the part of the vocabulary for which a pruned model has experts."""
    if config.pruned_tokens is None:
        return None
    kept = [config.vocab_size - int(unpack_ids(packed)[: config.vocab_size].sum()) for packed in config.pruned_tokens]
    sides = [
        f"{number:,}" + f" ({side})" * (len(kept) > 1)
        for number, side in zip(kept, ("sources", "targets"), strict=False)
    ]
    return (
        f"It is **pruned for a part of its vocabulary**: of {config.vocab_size:,} token ids {' and '.join(sides)} have the "
        "expert of the whole model in every layer. Text of these alone gets the logits of the whole model; other text does not."
    )


def _describe_experts(config: StableMoEBaseConfig) -> str | None:
    if not config.num_moe_layers:
        return None
    layers = "1 MoE layer" if config.num_moe_layers == 1 else f"each of {config.num_moe_layers} MoE layers"
    per_token = f", {config.num_experts_per_tok} per token" if config.num_experts_per_tok > 1 else ""
    if config.expert_type == "stack":
        return f"{config.num_experts} of {config.num_expert_sublayers} sublayers in {layers}{per_token}"
    shared = f" and {config.num_shared_experts} shared" if config.num_shared_experts else ""
    return f"{config.num_experts} gated{shared} in {layers}{per_token}"


def _describe_load(results: dict) -> str:
    """Describe how evenly the experts were used, by the last training log in the stage of the model."""
    loads = {row["stage"]: row["load_max_over_mean"] for row in results["stages"]}
    load = loads.get(results.get("routing_stage") or results["stages"][-1]["stage"])
    return "not measured" if load is None else f"{load:.2f}"


def _describe_agreement(results: dict, is_frozen: bool) -> str:
    agreement = results["distillation_agreement_at_transition"]
    if agreement is None:
        return "not measured"
    return f"{agreement:.1%}" if is_frozen else "not frozen"  # a model of before the transition


def _describe_measured(results: dict) -> dict[str, str]:
    split, step = results.get("split", "validation"), results.get("evaluated_step")
    when = "" if step is None or step == results.get("step") else f", at step {step}"
    texts = {
        f"{split} {_METRIC_NAMES.get(name, name.replace('_', ' '))}{when}": f"{value:.{2 if name in _DIGITS else 4}f}"
        for name, value in measured_metrics(results).items()
    }
    measure = "loss" if "loss" in results["stages"][-1] else "perplexity"
    return texts or {f"{split} {measure}": "not measured"}


__all__ = [
    "CARD_FILE",
    "CardFacts",
    "build_model_card",
    "card_template",
    "head_of",
    "is_filled_card",
    "is_hub_name",
    "languages_of_pairs",
    "measured_metrics",
    "running_versions",
]
