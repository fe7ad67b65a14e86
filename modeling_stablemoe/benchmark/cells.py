# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The smallest piece of the benchmark: a cell, whose arms are measured together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """What came of a cell.

    Args:
        arms (`dict[str, list[float]]`): numbers of each arm, one a round: seconds, bytes or shares, as the part says.
            All arms ran by turns, so that the n-th numbers of two of them are of one moment.
        left_out (`dict[str, str]`): arms that were not measured, and why.
        facts (`dict`): what else there is to tell, JSON-ready.
    """

    arms: dict[str, list[float]]
    left_out: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Cell:
    """Something to measure.

    Args:
        part (`str`): of the benchmark.
        cell (`dict`): what tells it from the others of its part, JSON-ready.
        measure (`Callable`): called with a function to call after every round; returns a `Result`.
    """

    part: str
    cell: dict[str, Any]
    measure: Callable[[Callable[[], object]], Result]

    @property
    def label(self) -> str:
        """`str`: to show while it is measured."""
        return f"{self.part}: " + ", ".join(
            f"{name} {value}" for name, value in self.cell.items() if value is not False
        )


__all__ = ["Cell", "Result"]
