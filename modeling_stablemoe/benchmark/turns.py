# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Contenders timed by turns in one process, so that a ratio compares times that were taken next to each other."""

import gc
import time
from collections.abc import Callable, Collection, Sequence
from statistics import median, quantiles

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from modeling_stablemoe.measure.machine import first_line


Spread = dict[str, float]

# Seconds of a turn, made of several runs where one is shorter.
SHORTEST_TURN = 0.02
# Rounds that are measured however slow a cell is: fewer have no spread.
LEAST_ROUNDS = 3
# Operators that a profile names, those that take most of the time.
MOST_OPERATORS = 12


def take_turns(
    runs: dict[str, Callable[[], object]], *, rounds: int, seconds: float = 60.0, give_up: float = 10.0, always=()
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time contenders round by round, each round starting with another one.

    No round starts after `seconds`, except for the first three. Left out is what raises a `RuntimeError` the first time
    (out of memory, does not compile), and what takes `give_up` times as long as the fastest, unless `always` names it.

    Returns:
        `tuple`: seconds of a run by name, one per round, and by name why a contender was left out.
    """
    threads = torch.get_num_threads()
    timers = {name: Timer("run()", globals={"run": run}, num_threads=threads) for name, run in runs.items()}
    first, left_out = {}, {}
    for name, timer in timers.items():
        try:
            first[name] = timer.blocked_autorange(min_run_time=0).median
        except RuntimeError as error:
            left_out[name] = f"{type(error).__name__}: {first_line(error)}"
            free_memory()
    for name in set(first).difference(always):
        if first[name] > give_up * min(first.values()):
            left_out[name] = f"took {first[name] / min(first.values()):.0f} times as long as the fastest"
    names = [name for name in first if name not in left_out]
    times: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        start = number % max(len(names), 1)
        for name in names[start:] + names[:start]:
            times[name].append(timers[name].blocked_autorange(min_run_time=SHORTEST_TURN).median)
    return times, left_out


def spread(values: Sequence[float]) -> Spread:
    """Return `median`, and the quartiles `low` and `high`."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low": low, "high": high}


def compare(times: dict[str, list[float]], name: str, base: str) -> Spread | None:
    """Return the spread of `name` / `base`, taken round by round; `None` if one of them was not measured."""
    if name not in times or base not in times:
        return None
    return spread([one / other for one, other in zip(times[name], times[base], strict=True)])


def fastest_of(times: dict[str, list[float]], names: Collection[str]) -> str | None:
    """Return the name with the smallest median; `None` if none of them was measured."""
    measured = [name for name in names if name in times]
    return min(measured, key=lambda name: median(times[name]), default=None)


def profile_operators(run: Callable[[], object], device: torch.device, passes: int = 3) -> dict[str, list[float]]:
    """Return the share of each operator in the time of all, one per pass: the largest, and "others".

    The time between operators, Python's own, is not counted.
    """
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    found = []
    run()
    for _ in range(passes):
        with profile(activities=activities) as profiler:
            run()
            if is_cuda:
                torch.cuda.synchronize(device)
        events = [event for event in profiler.key_averages() if "::" in event.key and "autograd::" not in event.key]
        costs = {e.key: e.self_device_time_total if is_cuda else e.self_cpu_time_total for e in events}
        total = sum(costs.values())
        if not total:
            raise RuntimeError("the profiler saw no operator")
        found.append({name: cost / total for name, cost in costs.items()})
    together = {name: sum(costs.get(name, 0.0) for costs in found) for name in found[-1]}
    largest = sorted(together, key=together.get, reverse=True)[:MOST_OPERATORS]
    shares = {name: [costs.get(name, 0.0) for costs in found] for name in largest}
    return {**shares, "others": [1 - sum(each) for each in zip(*shares.values(), strict=True)]}


def free_memory():
    """Give back what nothing refers to any longer."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
