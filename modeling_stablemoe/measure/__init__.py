# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Measures of routings and of runs: statistics, figures, pages, perplexities."""

from .flops import count_parameters, forward_flops
from .inspection import format_report, inspect_routing, route_texts
from .inspection_page import build_page
from .machine import ChildError, environment, run_alone
from .ngram import ngram_perplexities
from .report import describe_saved_model, format_results, format_stages, format_table, perplexity_of, summarize_run
from .run_figures import read_run, write_run_figures
from .translation_metrics import TranslationMetrics, format_scores


__all__ = [
    "ChildError",
    "TranslationMetrics",
    "build_page",
    "count_parameters",
    "describe_saved_model",
    "environment",
    "format_report",
    "format_results",
    "format_scores",
    "format_stages",
    "format_table",
    "forward_flops",
    "inspect_routing",
    "ngram_perplexities",
    "perplexity_of",
    "read_run",
    "route_texts",
    "run_alone",
    "summarize_run",
    "write_run_figures",
]
