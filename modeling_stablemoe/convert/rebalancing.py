# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Balancing the routing of a trained checkpoint, with any router, on texts that it has routed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling_stablemoe.measure.inspection import LayerRouting, RoutedText
from modeling_stablemoe.measure.meter import evenness
from modeling_stablemoe.measure.report import format_table
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin
from modeling_stablemoe.model.tensors_stablemoe import best_experts
from modeling_stablemoe.solvers.balancing import balanced_table


@dataclass(frozen=True)
class LayerBalance:
    """The effect of balancing one MoE layer, on the tokens of the text.

    Attributes:
        name (`str`): qualified name of the layer.
        tokens (`int`): number of tokens of the text.
        load_before (`float`): max/mean of the experts' loads before.
        load_after (`float`): max/mean under the balanced table.
        best_agreement (`float`): largest share of the tokens, in [0, 1], that a table without a limit keeps at their
            expert; of their experts, where a token has several.
        agreement (`float`): share that the balanced table keeps there.
        bound (`float`): upper bound on that share for any table within the limit with the same frequent ids.
        alone (`int`): number of ids that exceed the limit by themselves, each with an expert of its own.
    """

    name: str
    tokens: int
    load_before: float
    load_after: float
    best_agreement: float
    agreement: float
    bound: float
    alone: int


def rebalance(
    model: TwoStageRoutingMixin, texts: Sequence[RoutedText], max_load: float, num_bands: int = 1
) -> list[LayerBalance]:
    """Give a model routing tables that are balanced on texts, and keep most tokens at their experts.

    This freezes a model of stage 1, whose tokens are kept where its backbone router sends them. An id that does not
    occur in the texts keeps its experts, or gets expert `id mod num_experts`, and others as far apart as can be, if hidden
    states decide, and counts as one token.

    Args:
        model (`TwoStageRoutingMixin`): with tables, or with a router that tables can replace.
        texts (sequence of `RoutedText`): of `route_texts`; every MoE layer must have routed one.
        max_load (`float`): tokens allowed on one expert, in mean loads; >= 1.
        num_bands (`int`): bands of token frequency that are balanced one after the other; 1 places all ids together.

    Returns:
        `list[LayerBalance]`: one per MoE layer.

    Raises:
        ValueError: if a layer has routed none of the texts, for a `max_load` below 1, or for a model that cannot have
            tables, or whose tables have split ids.
    """
    model.require_tables()
    if model.config.split_token_ids:
        raise ValueError(
            "Tables that route some token ids by the token before them, too (`split_token_ids`), are balanced when they are made "
            "(`--hash_table balanced`) or frozen (`max_frozen_load`)."
        )
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
    vocab_size, num_experts, k = model.config.vocab_size, model.config.num_experts, model.config.num_experts_per_tok
    learns = model.routing_stage == 1 and layer.backbone_experts is not None
    chosen_TK = (layer.backbone_experts if learns else layer.experts).view(-1, k)
    pairs = (token_ids.unsqueeze(-1) * num_experts + chosen_TK).flatten()
    counts = torch.bincount(pairs, minlength=vocab_size * num_experts).view(vocab_size, num_experts).double()
    agreement, weights = counts.clone(), counts.sum(-1) / k
    unseen = (weights == 0).nonzero().squeeze(-1)
    module, ids = model.moe_layers_by_name[layer.name], torch.arange(vocab_size, device=model.device)
    if module.is_routed_by_token:
        stays_VK = module.route(ids).view(-1, k)
    else:
        stays_VK = (ids.unsqueeze(-1) + torch.arange(k, device=ids.device) * (num_experts // k)) % num_experts
    agreement[unseen.unsqueeze(-1), stays_VK.cpu()[unseen]] = 1.0
    weights[unseen] = 1.0
    balanced = balanced_table(agreement, weights, max_load, num_bands, k)
    tables = (balanced.table, best_experts(counts, k))
    kept, best = (counts.gather(1, table.view(-1, k)).sum().item() for table in tables)
    pairs_routed = counts.sum().item()
    loads = [
        torch.bincount(experts.flatten(), minlength=num_experts).double()
        for experts in (layer.experts, balanced.table[token_ids])
    ]
    before, after = evenness(torch.stack(loads))["load_max_over_mean"].tolist()
    bound = min(best, kept + balanced.bound - balanced.agreement)
    return balanced.table, LayerBalance(
        name=layer.name,
        tokens=len(token_ids),
        load_before=before,
        load_after=after,
        best_agreement=best / pairs_routed,
        agreement=kept / pairs_routed,
        bound=bound / pairs_routed,
        alone=len(balanced.alone),
    )


def format_balances(balances: Sequence[LayerBalance]) -> str:
    """Format the effect of balancing as a Markdown table, one row per MoE layer."""
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
