# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Facts for a model card from the command line of a training script."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modeling_stablemoe.hub.cards import CardFacts, is_hub_name


@dataclass
class CardArguments:
    """Options for the model card that only the user knows; made for `HfArgumentParser`.

    Raises:
        ValueError: for a license or language in a form that the Hub does not accept.
    """

    license: str | None = field(
        default=None,
        metadata={
            "help": "License of the model for its card, as the Hub writes it, e.g. apache-2.0. Default: not said."
        },
    )
    language: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Languages of the model for its card: ISO 639 codes, e.g. en, or code. Default: those of "
            "--language_pairs where a model translates, else not said."
        },
    )

    def __post_init__(self):
        self.license = self.license or None
        self.facts([], None)

    def facts(
        self,
        corpora: Sequence[str],
        base_model: str | None,
        *,
        dataset_config: str | None = None,
        languages: Sequence[str] = (),
    ) -> CardFacts:
        """Gather the facts of the card, with files and folders by their bare names."""
        on_hub = [name for name in corpora if is_hub_name(name)]
        return CardFacts(
            license=self.license,
            language=list(self.language or languages),
            datasets=on_hub,
            base_model=base_model,
            dataset_name=", ".join(name if name in on_hub else Path(name).name for name in corpora) or None,
            dataset_config=dataset_config if on_hub else None,
        )


__all__ = ["CardArguments"]
