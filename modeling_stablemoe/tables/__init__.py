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
from .mismatch import (
    PAIRS,
    PairMismatch,
    compare_routings,
    format_mismatch,
    measure_mismatch,
    mismatch_json,
)
from .rollouts import RoutingMismatchCallback, routed_experts
from .transition import TableTransitionCallback


__all__ = [
    "PAIRS",
    "FreezingReport",
    "LayerFreezing",
    "MadeTables",
    "PairMismatch",
    "RouteCounter",
    "RouteCounts",
    "RoutingMismatchCallback",
    "TableTransitionCallback",
    "check_tables",
    "compare_routings",
    "count_routes",
    "counts_of_tables",
    "fingerprint",
    "format_freezing",
    "format_mismatch",
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
    "measure_mismatch",
    "mismatch_json",
    "moe_layers",
    "plot_freezing",
    "remap_tables",
    "remove_tables",
    "routed_experts",
    "save_tables",
]
