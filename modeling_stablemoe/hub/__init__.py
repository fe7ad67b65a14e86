# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Model cards, checks before a release, and publishing."""

from .cards import CardFacts, build_model_card, languages_of_pairs
from .publishing import NETWORK_ERROR, check_name, explain, format_shipment, require_login, send
from .release_checks import prepare


__all__ = [
    "NETWORK_ERROR",
    "CardFacts",
    "build_model_card",
    "check_name",
    "explain",
    "format_shipment",
    "languages_of_pairs",
    "prepare",
    "require_login",
    "send",
]
