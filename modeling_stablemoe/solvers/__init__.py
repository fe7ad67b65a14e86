# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Tables that are balanced by counts."""

from .hash_tables import balanced_hash_table


__all__ = [
    "balanced_hash_table",
]
