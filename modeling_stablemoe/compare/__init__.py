# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Several systems trained on the same data, and their results side by side."""

from .comparison import Comparison, System, check_comparable, read_systems
from .comparison_report import write_report
from .speed import measure_speed, speed_table
from .tables import TableArguments, TableComparison, TableSystem, write_table_report
from .upcycling import DenseArguments, UpcyclingComparison, check_names


__all__ = [
    "Comparison",
    "DenseArguments",
    "System",
    "TableArguments",
    "TableComparison",
    "TableSystem",
    "UpcyclingComparison",
    "check_comparable",
    "check_names",
    "measure_speed",
    "read_systems",
    "speed_table",
    "write_report",
    "write_table_report",
]
