# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The results of a training run from the Trainer's log history: numbers and short tables."""

import math
from collections.abc import Sequence

from transformers import PreTrainedModel, TrainerState
from transformers.trainer_pt_utils import get_model_param_count


_STAGE_HEADINGS = {
    "stage": "stage",
    "steps": "steps",
    "perplexity": "validation perplexity",
    "loss": "validation loss",
    "load_max_over_mean": "load max/mean",
    "fluctuation": "fluctuation",
}

# Endings of what Trainer logs about the speed of an evaluation.
_SPEEDS = ("_runtime", "_per_second", "_time")


def perplexity_of(loss: float) -> float:
    """Return the perplexity of a mean loss in nats; infinity for a loss that diverged."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def measure_of(loss: float | None, has_language_head: bool) -> dict[str, float | None]:
    """Return an evaluation loss under its name, as `perplexity` of a language head or `loss` of any other."""
    if not has_language_head:
        return {"loss": loss}
    return {"perplexity": None if loss is None else perplexity_of(loss)}


def stage_rows(
    log_history: Sequence[dict],
    frozen: bool = False,
    last_step: int | None = None,
    has_language_head: bool = True,
) -> list[dict]:
    """Summarize each stage of a run.

    Args:
        log_history (sequence of `dict`): `trainer.state.log_history` of the run.
        frozen (`bool`): whether the routing is frozen now; without a transition in the history it always was.
        last_step (`int`, *optional*): of the run. Default: that of the history.
        has_language_head (`bool`): whether the evaluation loss is that of tokens, so that it has a perplexity.

    Returns:
        `list[dict]`: one row per stage: `stage`, `steps` (the last step), `perplexity` (of the last evaluation;
            without a language head `loss`), `load_max_over_mean` (of the last training log) and `fluctuation` (of
            stage 1 at the last check before the transition, of stage 2 the largest); `None` if it was not measured.
    """
    transition = next((entry["step"] for entry in log_history if "transition_step" in entry), None)
    if last_step is None:
        last_step = max((entry["step"] for entry in log_history), default=0)
    if transition is None:
        bounds = [(2 if frozen else 1, 0, last_step)]
    else:
        bounds = [(1, 0, transition), (2, transition, last_step)]
    return [_row(*bound, transition, log_history, has_language_head) for bound in bounds]


def _row(
    stage: int, first: int, last: int, transition: int | None, log_history: Sequence[dict], has_language_head: bool
) -> dict:
    # An evaluation at the transition belongs to stage 1: the new table holds what that has learned.
    entries = [entry for entry in log_history if (first < entry["step"] or first == 0) and entry["step"] <= last]
    losses = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    # A training log covers the steps before it: the one at the transition belongs to stage 1.
    loads = [entry["load_max_over_mean"] for entry in entries if "load_max_over_mean" in entry and "loss" in entry]
    # The check at the transition is left out: it compares the learned routing with the table.
    changes = [
        entry["routing_fluctuation"]
        for entry in entries
        if "routing_fluctuation" in entry and entry["step"] != transition
    ]
    if stage == 1:
        change = changes[-1] if changes else None
    else:
        change = max(changes, default=None)
    return {
        "stage": stage,
        "steps": last,
        **measure_of(losses[-1] if losses else None, has_language_head),
        "load_max_over_mean": loads[-1] if loads else None,
        "fluctuation": change,
    }


def format_table(rows: Sequence[dict], headings: dict[str, str]) -> str:
    """Format rows as a Markdown table, without a newline at the end.

    Args:
        rows (sequence of `dict`): values by column; floats with 4 digits, a dash for what is `None` or missing.
        headings (`dict[str, str]`): the heading of each column, in order.
    """

    def cell(value) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(headings.values()), *([cell(row.get(column)) for column in headings] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(headings))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def format_stages(rows: Sequence[dict]) -> str:
    """Format the stages of a run as a Markdown table, without a newline at the end."""
    return format_table(rows, {column: heading for column, heading in _STAGE_HEADINGS.items() if column in rows[0]})


def describe_saved_model(results: dict) -> str | None:
    """Return a sentence on which model was saved, given the results of a run; `None` for that of the last step."""
    last_step = results["stages"][-1]["steps"]
    if results.get("step") in (None, last_step):
        return None
    sentence = f"The saved model is the best checkpoint, of step {results['step']} of {last_step}"
    if results["routing_stage"] == 1:
        sentence += ", in stage 1: its routing is not frozen"
    elif results["routing_stage"] == 2:
        sentence += ", in stage 2: its routing is frozen"
    return f"{sentence}."


def summarize_run(model: PreTrainedModel, state: TrainerState, step: int) -> dict:
    """Gather the results of a run of any kind, JSON-ready.

    Args:
        model (`PreTrainedModel`): of this package.
        state (`TrainerState`): of the run.
        step (`int`): of the model's weights, which may be those of a best checkpoint.

    Returns:
        `dict`: `parameters`, their number; `step`; `routing_stage` (`None` for a dense model); `router_fingerprint`;
            `stages`, a row per stage with `stage`, `steps`, `perplexity` (without a language head `loss`),
            `load_max_over_mean` and `fluctuation`; and `distillation_agreement_at_transition`, the share of tokens on
            which distilled and backbone router agreed when the routing was frozen; `None` if it was not.
    """
    fingerprint = model.config.router_fingerprint
    stage = 1 if fingerprint is None else 2
    transition = next((entry for entry in state.log_history if "transition_step" in entry), {})
    return {
        "parameters": get_model_param_count(model),
        "step": step,
        "routing_stage": stage if model.config.num_moe_layers else None,
        "router_fingerprint": fingerprint,
        "stages": stage_rows(state.log_history, stage == 2, state.global_step, model.can_generate()),
        "distillation_agreement_at_transition": transition.get("transition_agreement"),
    }


def last_evaluation(log_history: Sequence[dict], step: int | None = None, has_language_head: bool = True) -> dict:
    """Return the last evaluation of a run for a model card.

    Args:
        log_history (sequence of `dict`): `trainer.state.log_history`.
        step (`int`, *optional*): of the evaluation. Default: that of the last one.
        has_language_head (`bool`): whether the evaluation loss is that of tokens.

    Returns:
        `dict`: `evaluated_step`, `split`, `perplexity` and, if logged, `bleu` and `chrf`; without a language head
            `loss` in their place and `metrics`, all numbers logged with it; empty without an evaluation.
    """
    entries = [entry for entry in log_history if "eval_loss" in entry and step in (None, entry["step"])]
    if not entries:
        return {}
    logged = {
        name.removeprefix("eval_"): value
        for name, value in entries[-1].items()
        if name.startswith("eval_") and isinstance(value, (int, float)) and not name.endswith(_SPEEDS)
    }
    measured = measure_of(logged.pop("loss"), has_language_head)
    if has_language_head:
        measured |= {name: logged[name] for name in ("bleu", "chrf") if name in logged}
    else:
        measured["metrics"] = logged
    return {**measured, "evaluated_step": entries[-1]["step"], "split": "evaluation"}


def format_results(results: dict) -> str:
    """Format the results of a language model for people, without a newline at the end.

    Args:
        results (`dict`): of `summarize_run`, with `perplexity` and, optionally, `baselines`, perplexities by name.
    """
    lines = [format_stages(results["stages"])]
    agreement = results["distillation_agreement_at_transition"]
    if agreement is not None:
        lines.append(
            f"agreement when frozen: distilled and backbone router chose alike on {agreement:.1%} of the tokens"
        )
    for name, perplexity in results.get("baselines", {}).items():
        lines.append(f"validation perplexity, {name}: {perplexity:.2f}")
    bigram = min(results.get("baselines", {}).values(), default=0.0)
    if 0.0 < bigram < results["perplexity"]:
        lines.append(
            "The model is behind counts of pairs of tokens: it has been trained for too few steps, or on too little text."
        )
    saved = describe_saved_model(results)
    if saved is not None:
        lines.append(saved)
    return "\n".join([*lines, f"validation perplexity, this model: {results['perplexity']:.2f}"])
