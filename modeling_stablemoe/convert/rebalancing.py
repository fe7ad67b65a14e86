# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Balancing the routing of a checkpoint after the fact: any router, by a text that it has routed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling_stablemoe.measure.inspection import LayerRouting, RoutedText
from modeling_stablemoe.measure.report import format_table
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin
from modeling_stablemoe.solvers.balancing import balanced_table


@dataclass(frozen=True)
class LayerBalance:
    """What balancing one MoE layer came to, on the tokens of the text.

    Attributes:
        name (`str`): of the layer.
        tokens (`int`): of the text.
        load_before (`float`): max/mean of the routing as it was.
        load_after (`float`): max/mean under the balanced table.
        best_agreement (`float`): share of the tokens that any table could have kept where they were, in [0, 1].
        agreement (`float`): share that the balanced table keeps there.
        bound (`float`): share that no other table within the limit exceeds, given its more frequent ids.
        alone (`int`): ids that outweigh the limit by themselves, each with an expert of its own.
    """

    name: str
    tokens: int
    load_before: float
    load_after: float
    best_agreement: float
    agreement: float
    bound: float
    alone: int


def count_choices(token_ids: Tensor, experts: Tensor, vocab_size: int, num_experts: int) -> Tensor:
    """Count how many tokens of each id went to each expert: `torch.DoubleTensor` of shape `(V, E)`."""
    pairs = torch.bincount(token_ids * num_experts + experts, minlength=vocab_size * num_experts)
    return pairs.view(vocab_size, num_experts).double()


def rebalance(
    model: TwoStageRoutingMixin, texts: Sequence[RoutedText], max_load: float, num_bands: int = 1
) -> list[LayerBalance]:
    """Give a model routing tables that are balanced on texts, and keep most of their tokens where they were.

    A model of stage 1 is frozen by it: its tokens were where the backbone router sent them. An id that the texts do not
    hold stays where it was, or, where hidden states decide, goes to the expert of its number modulo `num_experts`;
    it counts as one token.

    Args:
        model (`TwoStageRoutingMixin`): with a table, or with a routing that one can stand for.
        texts (sequence of `RoutedText`): what every MoE layer has routed; see `route_texts`.
        max_load (`float`): tokens allowed on one expert, in mean loads; see `balanced_table`.
        num_bands (`int`): see `balanced_table`.

    Returns:
        `list[LayerBalance]`: one a MoE layer.

    Raises:
        ValueError: if a layer has routed none of the texts, for a `max_load` below 1, or for a model that has no
            tables (see `require_tables`).
    """
    model.require_tables()
    routed = {layer.name: (text.token_ids, layer) for text in texts for layer in text.layers}
    missing = [name for name in model.moe_layers_by_name if name not in routed]
    if missing:
        raise ValueError(f"Nothing was routed by {', '.join(missing)}: a decoder needs targets (`--target_files`).")
    tables, balances = [], []
    for name in model.moe_layers_by_name:
        table, balance = _balance(model, *routed[name], max_load, num_bands)
        tables.append(table)
        balances.append(balance)
    model.set_routing_tables(torch.stack(tables))
    return balances


def _balance(
    model: TwoStageRoutingMixin, token_ids: Tensor, layer: LayerRouting, max_load: float, num_bands: int
) -> tuple[Tensor, LayerBalance]:
    vocab_size, num_experts = model.config.vocab_size, model.config.num_experts
    learns = model.routing_stage == 1 and layer.backbone_experts is not None
    counts = count_choices(token_ids, layer.backbone_experts if learns else layer.experts, vocab_size, num_experts)
    agreement, weights = counts.clone(), counts.sum(-1)
    unseen = (weights == 0).nonzero().squeeze(-1)
    module, ids = model.moe_layers_by_name[layer.name], torch.arange(vocab_size, device=model.device)
    stays = module.route(ids) if module.is_routed_by_token else ids % num_experts
    agreement[unseen, stays.cpu()[unseen]] = 1.0
    weights[unseen] = 1.0
    balanced = balanced_table(agreement, weights, max_load, num_bands)
    kept, best = (counts.gather(1, table.unsqueeze(-1)).sum().item() for table in (balanced.table, counts.argmax(-1)))
    tokens = counts.sum().item()
    loads = [
        torch.bincount(experts, minlength=num_experts).double()
        for experts in (layer.experts, balanced.table[token_ids])
    ]
    before, after = ((load.max() / load.mean()).item() for load in loads)
    bound = min(best, kept + balanced.bound - balanced.agreement)
    return balanced.table, LayerBalance(
        name=layer.name,
        tokens=int(tokens),
        load_before=before,
        load_after=after,
        best_agreement=best / tokens,
        agreement=kept / tokens,
        bound=bound / tokens,
        alone=len(balanced.alone),
    )


def format_balances(balances: Sequence[LayerBalance]) -> str:
    """Lay out what balancing came to as a Markdown table."""
    rows = [
        {
            "name": balance.name,
            "tokens": f"{balance.tokens:,}",
            "before": f"{balance.load_before:.2f}",
            "after": f"{balance.load_after:.2f}",
            "agreement": f"{balance.agreement:.1%}",
            "best": f"{balance.best_agreement:.1%}",
            "bound": f"{balance.bound:.2%}",
            "alone": str(balance.alone),
        }
        for balance in balances
    ]
    headings = {
        "name": "MoE layer",
        "tokens": "tokens",
        "before": "load max/mean before",
        "after": "after",
        "agreement": "tokens kept",
        "best": "by the best table without a limit",
        "bound": "at most possible",
        "alone": "ids above the limit, with an expert of their own",
    }
    return format_table(rows, headings)


__all__ = ["LayerBalance", "count_choices", "format_balances", "rebalance"]
