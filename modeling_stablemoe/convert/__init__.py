# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Other checkpoints into StableMoE's, and StableMoE's into smaller or more even ones."""

from .dense import check_overrides, load_dense
from .pruning import Pruning, load_pruned, open_weights, plan_pruning, prune_experts, read_configs, read_tables
from .pruning_report import compare_on_text, format_pruning, format_random_tables
from .rebalancing import format_balances, rebalance
from .saving import compare_logits, ids_to_compare, routing_of_preset, save_converted


__all__ = [
    "Pruning",
    "check_overrides",
    "compare_logits",
    "compare_on_text",
    "format_balances",
    "format_pruning",
    "format_random_tables",
    "ids_to_compare",
    "load_dense",
    "load_pruned",
    "open_weights",
    "plan_pruning",
    "prune_experts",
    "read_configs",
    "read_tables",
    "rebalance",
    "routing_of_preset",
    "save_converted",
]
