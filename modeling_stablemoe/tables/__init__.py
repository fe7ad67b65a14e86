# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Tables from token ids to experts for the MoE models of transformers: make them, put them in, take them out."""

from .freezing import (
    FreezingReport,
    LayerFreezing,
    format_freezing,
    freezing_card,
    freezing_json,
    mean_loss,
    measure_freezing,
    plot_freezing,
)
from .installing import (
    check_tables,
    fingerprint,
    install_tables,
    installed_layers,
    installed_tables,
    learned_layers,
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
from .transition import TableTransitionCallback


__all__ = [
    "FreezingReport",
    "LayerFreezing",
    "MadeTables",
    "RouteCounter",
    "RouteCounts",
    "TableTransitionCallback",
    "check_tables",
    "count_routes",
    "counts_of_tables",
    "fingerprint",
    "format_freezing",
    "freezing_card",
    "freezing_json",
    "hash_tables",
    "install_tables",
    "installed_layers",
    "installed_tables",
    "learned_layers",
    "load_tables",
    "make_tables",
    "mean_loss",
    "measure_freezing",
    "moe_layers",
    "plot_freezing",
    "remap_tables",
    "remove_tables",
    "save_tables",
]
