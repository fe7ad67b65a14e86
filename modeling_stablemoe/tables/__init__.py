# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Tables from token ids to experts for the MoE models of transformers: make them, put them in, take them out."""

from .installing import (
    check_tables,
    fingerprint,
    install_tables,
    installed_layers,
    installed_tables,
    load_tables,
    moe_layers,
    remove_tables,
    save_tables,
)
from .making import (
    MadeTables,
    RouteCounter,
    RouteCounts,
    count_routes,
    counts_of_tables,
    hash_tables,
    make_tables,
    remap_tables,
)


__all__ = [
    "MadeTables",
    "RouteCounter",
    "RouteCounts",
    "check_tables",
    "count_routes",
    "counts_of_tables",
    "fingerprint",
    "hash_tables",
    "install_tables",
    "installed_layers",
    "installed_tables",
    "load_tables",
    "make_tables",
    "moe_layers",
    "remap_tables",
    "remove_tables",
    "save_tables",
]
