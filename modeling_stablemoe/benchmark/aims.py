# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What the benchmark is measured against: aims, each a ratio of two arms and how large it may be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .layer_parts import FORWARD, TRAINING
from .layers import TRANSFORMERS_BLOCKS
from .models import DENSE, EQUAL_DENSE
from .timing import compare, fastest_of, spread


Spread = dict[str, float]


@dataclass(frozen=True)
class Aim:
    """An aim.

    Args:
        title (`str`): what is compared.
        part (`str`): of the benchmark.
        limit (`Callable`): given a cell and whether it ran on a GPU, the largest ratio, or `None` where the aim says
            nothing of it.
        ratio (`Callable`): given a record and our own backend, the spread of the ratio, or `None` if it was not measured.
    """

    title: str
    part: str
    limit: Callable[[dict, bool], float | None]
    ratio: Callable[[dict, str], Spread | None]

    def check(self, record: dict, own_backend: str, is_gpu: bool) -> tuple[Spread | None, float | None]:
        """Measure a record by this aim.

        Args:
            record (`dict`): a cell of the JSON file, of any part.
            own_backend (`str`): see the function of that name.
            is_gpu (`bool`): where it ran.

        Returns:
            `tuple`: the ratio and its limit; `None` where there is none.
        """
        if record["part"] != self.part:
            return None, None
        return self.ratio(record, own_backend), self.limit(record["cell"], is_gpu)


def is_met(ratio: Spread, limit: float) -> bool:
    """Tell whether a ratio, its median, is within its limit."""
    return ratio["median"] <= limit


def layer_over_dense(record: dict, own_backend: str) -> Spread | None:
    """Compare our layer with the dense stack."""
    return compare(record["arms"], f"stablemoe {own_backend}", "dense")


def transformers_arms(arms: Sequence[str]) -> list[str]:
    """Choose the arms that are blocks of transformers."""
    return [name for name in arms if name.split()[0] in TRANSFORMERS_BLOCKS]


def layer_over_transformers(record: dict, own_backend: str) -> Spread | None:
    """Compare our layer with the fastest of transformers' blocks."""
    fastest = fastest_of(record["arms"], transformers_arms(list(record["arms"])))
    return None if fastest is None else compare(record["arms"], f"stablemoe {own_backend}", fastest)


def step_over_flops(record: dict, name: str) -> Spread | None:
    """Compare a model's step with what its FLOPs cost in the dense model of the shared shape."""
    ratio, models = compare(record["arms"], name, DENSE), record.get("models", {})
    if ratio is None or DENSE not in models or name not in models:
        return None
    flops = models[name]["flops"] / models[DENSE]["flops"]
    return {key: value / flops for key, value in ratio.items()}


def token_over_dense(record: dict, own_backend: str) -> Spread | None:
    """Compare a generated token with one of the dense model that has as many active parameters."""
    return compare(record["arms"], f"stage 2 {own_backend}, token", f"{EQUAL_DENSE}, token")


def _layer_limit(direction: str, on_cpu: float, on_gpu: float) -> Callable[[dict, bool], float | None]:
    def limit(cell: dict, is_gpu: bool) -> float | None:
        if cell["pass"] != direction or cell["experts"] != 32 or cell["tokens"] < (32768 if is_gpu else 4096):
            return None
        return on_gpu if is_gpu else on_cpu

    return limit


DENSE_TRAINING = Aim(
    "layer / dense stack of equal FLOPs, forward + backward, 32 experts, >= 4096 tokens (GPU: 32768)",
    "layer",
    _layer_limit(TRAINING, 1.25, 1.15),
    layer_over_dense,
)
DENSE_FORWARD = Aim(
    "layer / dense stack of equal FLOPs, forward, 32 experts, >= 4096 tokens (GPU: 32768)",
    "layer",
    _layer_limit(FORWARD, 1.1, 1.1),
    layer_over_dense,
)
BLOCKS = Aim(
    "layer / the fastest of transformers' own blocks", "layer", lambda cell, is_gpu: 1.0, layer_over_transformers
)
EXPERTS = Aim(
    "512 experts / 8 experts, 32768 tokens",
    "experts",
    lambda cell, is_gpu: 1.3 if cell["tokens"] == 32768 else None,
    lambda record, own_backend: compare(record["arms"], "512", "8"),
)
HASH = Aim(
    "training step, stage 2 / Hash",
    "step",
    lambda cell, is_gpu: 1.0,
    lambda record, own_backend: compare(record["arms"], "stage 2", "hash"),
)
STAGE1 = Aim(
    "training step, stage 1 / stage 2",
    "step",
    lambda cell, is_gpu: 1.05,
    lambda record, own_backend: compare(record["arms"], "stage 1", "stage 2"),
)
FLOPS = Aim(
    "training step, stage 2 / what its FLOPs cost in the dense model",
    "step",
    lambda cell, is_gpu: 1.15,
    lambda record, own_backend: step_over_flops(record, "stage 2"),
)
DECODING = Aim(
    "a token at batch 1 / the dense model of equal active parameters",
    "generation",
    lambda cell, is_gpu: 1.1 if cell["batch"] == 1 else None,
    token_over_dense,
)
AIMS = (DENSE_TRAINING, DENSE_FORWARD, BLOCKS, EXPERTS, HASH, STAGE1, FLOPS, DECODING)


def check_all(cells: Sequence[dict], own_backend: str, is_gpu: bool) -> list[dict]:
    """Check every cell by every aim that speaks of it.

    Args:
        cells (sequence of `dict`): of the JSON file.
        own_backend (`str`): see the function of that name.
        is_gpu (`bool`): where they ran.

    Returns:
        `list[dict]`: `aim`, `cell`, `ratio`, `at_most` and `is_met`.
    """
    checks = []
    for aim in AIMS:
        for record in cells:
            ratio, limit = aim.check(record, own_backend, is_gpu)
            if ratio is not None and limit is not None:
                check = {"aim": aim.title, "cell": record["cell"], "ratio": ratio, "at_most": limit}
                checks.append({**check, "is_met": is_met(ratio, limit)})
    return checks


def ratios_of(record: dict) -> dict[str, Spread]:
    """Compare the arms of a record with the one that its part measures them by.

    Args:
        record (`dict`): a cell of the JSON file.

    Returns:
        `dict[str, Spread]`: by arm, those that could be compared: with the dense stack, the fewest experts, the dense
        model; of memory, with the dense model of equal FLOPs. Shares are ratios themselves.
    """
    part, arms, ratios = record["part"], record["arms"], {}
    for name, values in arms.items():
        if part == "shares":
            ratios[name] = spread(values)
            continue
        bases = {
            "layer": "dense",
            "experts": min(arms, key=lambda other: (len(other), other)),
            "step": DENSE,
            "generation": f"{EQUAL_DENSE}, {name.rpartition(', ')[2]}",
            "memory": EQUAL_DENSE,
        }
        ratio = compare(arms, name, bases[part])
        if ratio is not None:
            ratios[name] = ratio
    return ratios


__all__ = [
    "AIMS",
    "BLOCKS",
    "DECODING",
    "DENSE_FORWARD",
    "DENSE_TRAINING",
    "EXPERTS",
    "FLOPS",
    "HASH",
    "STAGE1",
    "Aim",
    "check_all",
    "is_met",
    "layer_over_dense",
    "layer_over_transformers",
    "ratios_of",
    "step_over_flops",
    "token_over_dense",
    "transformers_arms",
]
