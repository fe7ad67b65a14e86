# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The model card of a run, filled from what was measured."""

from pathlib import Path

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration_stablemoe import StableMoEBaseConfig
from .report import STAGE_HEADINGS, describe_saved_model, format_table
from .translation_metrics import format_scores


def build_model_card(
    template: str | Path, *, model_name: str, config: StableMoEBaseConfig, results: dict, dataset_name: str
) -> ModelCard:
    """Fill a model card.

    Args:
        template (`str` or `Path`): a card with the fields of `hub_card.md`.
        model_name (`str`): Hub name or folder name of the model.
        config (`StableMoEBaseConfig`): of the trained model.
        results (`dict`): `perplexity`, `parameters`, `stages` and `distillation_agreement_at_transition` of the run,
            and, for a translation model, `scores` (of `score_translations`); `split` says what was measured on, unless
            it was the validation split; `step` and `routing_stage` say which model of the run it is, unless the last.
        dataset_name (`str`): what was measured on.

    Returns:
        `ModelCard`: with metadata that the Hub understands.
    """
    fingerprint = config.router_fingerprint
    agreement = results["distillation_agreement_at_transition"]
    if agreement is not None and fingerprint is None:
        agreement = "not frozen"  # a model of before the transition
    elif agreement is not None:
        agreement = f"{agreement:.1%}"
    scores = results.get("scores")
    task = "translation" if config.is_encoder_decoder else "text-generation"
    metrics = {"perplexity": round(results["perplexity"], 3)}
    if scores is not None:
        metrics |= {"bleu": round(scores["mean_bleu"], 2), "chrf": round(scores["mean_chrf"], 2)}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["stablemoe", "mixture-of-experts", "custom_code"],
        model_name=model_name,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=dataset_name,
                dataset_name=dataset_name,
                metric_type=name,
                metric_value=value,
            )
            for name, value in metrics.items()
        ],
    )
    return ModelCard.from_template(
        data,
        template_path=str(template),
        model_name=model_name,
        translates=config.is_encoder_decoder,
        is_frozen=fingerprint is not None,
        can_freeze=fingerprint is None and bool(config.num_moe_layers) and config.distilled_router is not None,
        saved_model=describe_saved_model(results),
        routing=_describe_routing(config),
        fingerprint=f"`{fingerprint}`" if fingerprint else "none yet",
        experts=(
            f"{config.num_experts} of {config.num_expert_sublayers} sublayers in each of "
            f"{config.num_moe_layers} MoE layers"
        ),
        parameters=f"{results['parameters']:,}",
        split=results.get("split", "validation"),
        perplexity=f"{results['perplexity']:.2f}",
        agreement=agreement or "not measured",
        stages_table=format_table(results["stages"], STAGE_HEADINGS),
        scores_table=None if scores is None else format_scores(scores),
        transformers_version=transformers.__version__,
        torch_version=torch.__version__.split("+")[0],
    )


def _describe_routing(config: StableMoEBaseConfig) -> str:
    if not config.num_moe_layers:
        return "none: a dense model"
    return "frozen (stage 2)" if config.router_fingerprint else "still learned (stage 1)"


__all__ = ["build_model_card"]
