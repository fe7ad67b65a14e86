"""Tests of many parameters: which of their combinations the fast set runs."""

import itertools
from collections import defaultdict

import pytest


def one_fast(*values) -> list:
    """Return parameters of which the first is fast and the others are slow."""
    return [values[0], *(pytest.param(value, marks=pytest.mark.slow) for value in values[1:])]


def leave_most_combinations_to_slow(items: list[pytest.Item]):
    """Mark as `slow` what tests marked `pairs` do not need to meet each value, or, of three parameters, each two values."""
    tests = defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairs") and hasattr(item, "callspec") and not item.get_closest_marker("slow"):
            tests[item.parent.nodeid, item.originalname].append(item)
    for combinations in tests.values():
        met = dict(zip(combinations, _values_met(combinations), strict=True))
        missing = set().union(*met.values())
        while missing:
            chosen = max(met, key=lambda item: len(met[item] & missing))
            missing -= met.pop(chosen)
        for item in met:
            item.add_marker("slow")


def _values_met(items: list[pytest.Item]) -> list[set]:
    """Return the values, or the pairs of values of two parameters, that each item has."""
    columns = [tuple(id(item.callspec.params[name]) for item in items) for name in sorted(items[0].callspec.params)]
    # A parameter that follows from another is none of its own.
    kept = []
    for column in sorted(set(columns), key=lambda column: -len(set(column))):
        if not any(len(set(zip(other, column, strict=True))) == len(set(other)) for other in kept):
            kept.append(column)
    strength = 2 if len(kept) > 2 else 1
    return [set(itertools.combinations(enumerate(values), strength)) for values in zip(*kept, strict=True)]
