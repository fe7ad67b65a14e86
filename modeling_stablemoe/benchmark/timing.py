# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Timing by turns: every contender of a cell runs once a round, in one process, so that a ratio is of one moment."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch


# A turn shorter than this is made of several runs.
SHORTEST_TURN = 0.01
MOST_RUNS = 50
# The share of a cell's time from which on a run is long: one is enough to warm up then.
LONG_TURN = 0.05
# Contenders share code; past torch's limit of 8 it would run uncompiled and say nothing.
MOST_RECOMPILED = 64
# Rounds that are measured however slow a cell is: fewer have no spread.
LEAST_ROUNDS = 3


def do_nothing():
    """Do nothing."""


@dataclass
class Arm:
    """A contender.

    Args:
        name (`str`): in tables.
        run (`Callable`): what is timed.
        reset (`Callable`): called after every run, not timed.
        is_kept (`bool`): whether it takes part in every round, however slow it is.
    """

    name: str
    run: Callable[[], object]
    reset: Callable[[], object] = do_nothing
    is_kept: bool = False


@dataclass
class Pace:
    """How long a cell is measured.

    Args:
        rounds (`int`): turns of each arm, after the warm-up.
        warm_up (`int`): turns of each arm that are not counted; one, where a turn is long.
        seconds (`float`): no round begins after so many, but for the first three.
        give_up (`float`): an arm that takes so many times as long as the fastest sits out after the warm-up.
        first_runs_compile (`bool`): whether the first runs of an arm say nothing of the later ones.
    """

    rounds: int = 7
    warm_up: int = 2
    seconds: float = 60.0
    give_up: float = 10.0
    first_runs_compile: bool = False


@dataclass
class Turns:
    """What came of a cell.

    Args:
        seconds (`dict[str, list[float]]`): of a run of each arm, a number a round.
        left_out (`dict[str, str]`): arms that were not measured, and why.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def time_runs(arm: Arm, device: torch.device, runs: int = 1) -> float:
    """Let an arm run.

    Args:
        arm (`Arm`): to run.
        device (`torch.device`): where; on a GPU events on its own stream are read, so that nothing waits in between.
        runs (`int`): how often, one after the other.

    Returns:
        `float`: mean seconds of a run.
    """
    if device.type != "cuda":
        seconds = 0.0
        for _ in range(runs):
            began = time.perf_counter()
            arm.run()
            seconds += time.perf_counter() - began
            arm.reset()
        return seconds / runs
    pairs = []
    torch.cuda.synchronize(device)
    for _ in range(runs):
        pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        pairs[-1][0].record()
        arm.run()
        pairs[-1][1].record()
        arm.reset()
    torch.cuda.synchronize(device)
    return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000 / runs


def take_turns(
    arms: Sequence[Arm], pace: Pace, device: torch.device, on_round: Callable[[], object] = do_nothing
) -> Turns:
    """Let the arms run by turns, each round beginning with another one.

    Args:
        arms (sequence of `Arm`): an arm that raises a `RuntimeError` while it warms up (out of memory, does not compile) is
            left out.
        pace (`Pace`): how long.
        device (`torch.device`): where.
        on_round (`Callable`): called after every round.

    Returns:
        `Turns`
    """
    turns, warm = Turns(), {}
    for arm in arms:
        try:
            warm[arm.name] = _warm_up(arm, pace, device, min(warm.values(), default=float("inf")))
        except RuntimeError as error:
            turns.left_out[arm.name] = first_line(error)
            arm.reset()
            free_memory(device)
    if not warm:
        return turns
    fastest = min(warm.values())
    running = []
    for arm in arms:
        if arm.name in warm and (arm.is_kept or warm[arm.name] <= pace.give_up * fastest):
            running.append(arm)
        elif arm.name in warm:
            turns.left_out[arm.name] = f"took {warm[arm.name] / fastest:.0f} times as long as the fastest"
    runs = int(max(1, min(MOST_RUNS, SHORTEST_TURN / max(fastest, 1e-9))))
    _measure(running, turns, pace, device, runs, on_round)
    return turns


def _warm_up(arm: Arm, pace: Pace, device: torch.device, fastest: float) -> float:
    """Let an arm run a few times, or once if that is long or hopelessly slow; return the seconds of the last run."""
    seconds = 0.0
    for _ in range(pace.warm_up):
        seconds = time_runs(arm, device)
        is_hopeless = seconds > 3 * pace.give_up * fastest and not arm.is_kept
        if not pace.first_runs_compile and (is_hopeless or seconds > pace.seconds * LONG_TURN):
            break
    return seconds


def _measure(arms: Sequence[Arm], turns: Turns, pace: Pace, device: torch.device, runs: int, on_round: Callable):
    began = time.perf_counter()
    for number in range(pace.rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - began > pace.seconds:
            break
        first = number % len(arms)  # none is always first
        for arm in [*arms[first:], *arms[:first]]:
            turns.seconds.setdefault(arm.name, []).append(time_runs(arm, device, runs))
        on_round()


def first_line(error: Exception) -> str:
    """Tell what went wrong in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def begin_compiling():
    """Forget what was compiled, and let one function be compiled for many arms."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = MOST_RECOMPILED


def free_memory(device: torch.device):
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Sum up repeated measurements.

    Args:
        values (sequence of `float`): one at least.

    Returns:
        `dict[str, float]`: `median`, and the quartiles `low` and `high`.
    """
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def compare(seconds: dict[str, list[float]], name: str, base: str) -> dict[str, float] | None:
    """Compare two arms round by round.

    Args:
        seconds (`dict`): see `Turns`.
        name (`str`): the one arm.
        base (`str`): the other.

    Returns:
        `dict[str, float]`: `spread` of how many times as long `name` took; `None` if one of them was not measured.
    """
    if name not in seconds or base not in seconds:
        return None
    return spread([one / other for one, other in zip(seconds[name], seconds[base], strict=True)])


def fastest_of(seconds: dict[str, list[float]], names: Sequence[str]) -> str | None:
    """Name the fastest arm by its median; `None` if none of them was measured."""
    measured = [name for name in names if name in seconds]
    return min(measured, key=lambda name: median(seconds[name]), default=None)


__all__ = [
    "Arm",
    "Pace",
    "Turns",
    "begin_compiling",
    "compare",
    "fastest_of",
    "first_line",
    "free_memory",
    "spread",
    "take_turns",
    "time_runs",
]
