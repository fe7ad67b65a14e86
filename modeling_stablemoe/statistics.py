# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Routing statistics of training: sums over tokens, so that micro-batches, steps and processes add up exactly."""

import math
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .frozen_stablemoe import FrozenRouter
from .losses_stablemoe import is_distributed
from .stages_stablemoe import TwoStageRoutingMixin


@dataclass
class RoutingTotals:
    """Sums over the tokens of some forward passes.

    Attributes:
        sums (`torch.DoubleTensor` of shape `(7,)`): targets, task loss (nats), routed tokens, balance loss (gate mass),
            distillation loss (nats), tokens on which distilled and backbone router agree (mean over layers), tokens
            routed in stage 1.
        load (`torch.DoubleTensor` of shape `(moe layers, num_experts)`): tokens sent to each expert.
    """

    sums: Tensor
    load: Tensor

    def __add__(self, other: "RoutingTotals") -> "RoutingTotals":
        """Add the sums of other forward passes."""
        return RoutingTotals(self.sums + other.sums, self.load + other.load)

    def across_processes(self) -> "RoutingTotals":
        """Add up the sums of all processes; every process must call this."""
        packed = _sum_across_processes(torch.cat([self.sums, self.load.flatten()]))
        return RoutingTotals(packed[: len(self.sums)], packed[len(self.sums) :].view_as(self.load))

    def metrics(self, stage: int) -> dict[str, float]:
        """Turn sums into means.

        Args:
            stage (`int`): routing stage to report.

        Returns:
            `dict[str, float]`: `task_loss` (nats per target token), `load_max_over_mean` (of the worst layer) and
            `routing_stage`; where there are tokens of stage 1 also `balance_loss` and, if the routing is distilled,
            `distillation_loss` (per token, summed over layers, without their coefficients; tokens of stage 2 count with
            0, as they do in the loss that is trained) and `distillation_agreement` (share of the tokens of stage 1).
        """
        targets, task, tokens, balance, distillation, agreed, learned = self.sums.tolist()
        metrics = {"routing_stage": stage, "load_max_over_mean": imbalance(self.load)}
        if targets:
            metrics["task_loss"] = task / targets
        if learned:
            metrics["balance_loss"] = balance / tokens
        if learned and not math.isnan(agreed):
            metrics["distillation_loss"] = distillation / tokens
            metrics["distillation_agreement"] = agreed / learned
        return metrics


def _sum_across_processes(values: Tensor) -> Tensor:
    if is_distributed():
        dist.all_reduce(values)
    return values


def imbalance(load: Tensor) -> float:
    """Compute max/mean of the experts' loads, of the worst layer; 1 is balanced.

    Args:
        load (`torch.Tensor` of shape `(moe layers, num_experts)`): tokens.

    Returns:
        `float`: in [1, num_experts]; NaN without tokens.
    """
    return (load.amax(-1) / load.mean(-1)).max().item()


class RoutingMeter:
    """Watches the training forward passes of a model; nothing here waits for the device until it is asked.

    Args:
        model (`TwoStageRoutingMixin`): the model with its head.
        recent_steps (`int`): optimizer steps that `recent` covers.
    """

    def __init__(self, model: TwoStageRoutingMixin, recent_steps: int = 50):
        self.model = model
        self._step: RoutingTotals | None = None
        self._window: RoutingTotals | None = None
        self._recent: deque[RoutingTotals] = deque(maxlen=recent_steps)
        # How often each MoE layer saw each token id in stage 1: weighs the rows of the tables that are frozen.
        self.token_counts: Tensor | None = None
        self._hook = model.register_forward_hook(self._observe, with_kwargs=True)

    def close(self):
        """Stop watching."""
        self._hook.remove()

    @torch.no_grad()
    def _observe(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if not module.training or output.expert_load is None:
            return
        load = output.expert_load.double()
        tokens = load.sum(-1).mean()  # layers of an encoder and a decoder route different numbers
        targets = task = torch.zeros((), device=load.device)
        labels = kwargs.get("labels")
        if labels is not None:
            targets = module.count_targets(labels, kwargs.get("shift_labels")).to(load.device)
            divisor = kwargs.get("num_items_in_batch")
            task = output.task_loss * (targets if divisor is None else divisor)
        sums = [targets, task.squeeze(), tokens, output.balance_loss * tokens, output.distillation_loss * tokens]
        learns = module.routing_stage == 1  # in stage 2 there is nothing to agree on: NaN
        sums += [output.distillation_agreement * tokens, tokens] if learns else [torch.zeros_like(tokens)] * 2
        totals = RoutingTotals(torch.stack([value.detach().double() for value in sums]), load)
        self._step = totals if self._step is None else self._step + totals
        if learns:
            self._count_tokens(module.routed_tokens(*args, **kwargs))

    def _count_tokens(self, routed: list[tuple[Tensor | None, Tensor | None]]):
        if self.token_counts is None:
            self.token_counts = torch.zeros(len(routed), self.model.config.vocab_size, dtype=torch.long)
        for layer, (token_ids, mask) in enumerate(routed):
            if token_ids is None:  # embeddings only: there are no ids to count
                continue
            self.token_counts = self.token_counts.to(token_ids.device)
            ones = torch.ones_like(token_ids) if mask is None else mask
            self.token_counts[layer].scatter_add_(0, token_ids.flatten(), ones.flatten().long())

    def end_step(self):
        """Close an optimizer step."""
        if self._step is None:
            return
        self._recent.append(self._step)
        self._window = self._step if self._window is None else self._window + self._step
        self._step = None

    def pop_window(self) -> RoutingTotals | None:
        """Return the totals of all processes since the last call, if there were steps; every process must call this."""
        window, self._window = self._window, None
        return None if window is None else window.across_processes()

    @property
    def num_recent_steps(self) -> int:
        """`int`: optimizer steps that `recent` covers at present."""
        return len(self._recent)

    def recent(self) -> RoutingTotals | None:
        """Return the totals of all processes over the last steps, if there were any; every process must call this."""
        if not self._recent:
            return None
        return sum(list(self._recent)[1:], start=self._recent[0]).across_processes()

    def table_load(self) -> Tensor | None:
        """Send the tokens of stage 1, of all processes, through the frozen tables; every process must call this.

        Returns:
            `torch.DoubleTensor` of shape `(moe layers, num_experts)`: tokens; `None` where there were none to count, or
            weights are frozen instead of tables.
        """
        layers = self.model.moe_layers_by_name.values()
        if self.token_counts is None or not all(isinstance(layer.frozen_router, FrozenRouter) for layer in layers):
            return None
        loads = []
        for layer, counts in zip(layers, _sum_across_processes(self.token_counts.double()), strict=True):
            experts = layer.frozen_router.values().long().to(counts.device)
            load = torch.zeros(layer.num_experts, dtype=torch.double, device=counts.device)
            loads.append(load.scatter_add_(0, experts, counts))
        return torch.stack(loads)


__all__ = ["RoutingMeter", "RoutingTotals", "imbalance"]
