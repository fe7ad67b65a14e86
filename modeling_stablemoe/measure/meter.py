# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Routing statistics of training: sums over tokens, so that micro-batches, steps and processes add up exactly."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from modeling_stablemoe.model.configuration_stablemoe import StableMoEBaseConfig
from modeling_stablemoe.model.experts_stablemoe import count_overflow
from modeling_stablemoe.model.health_stablemoe import RoutingHealth
from modeling_stablemoe.model.losses_stablemoe import is_distributed, sum_across_processes
from modeling_stablemoe.model.outputs_stablemoe import StableMoECausalLMOutputWithPast, StableMoESeq2SeqLMOutput
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin


logger = logging.get_logger(__name__)

# What `RoutingTotals.sums` holds. Checkpoints rely on this order: new names go to the end.
SUMS = (
    "targets",
    "task_loss",  # nats
    "tokens",  # routed; a mean over layers
    "balance_loss",  # gate mass, times tokens
    "distillation_loss",  # nats, times tokens
    "tokens_of_stage1",
    # The fields of `RoutingHealth`: means over layers, times tokens.
    "mean_gate",
    "closed_gates",
    "common_direction",
    "distillation_agreement",  # of the tokens of stage 1
    "distillation_agreement_by_id",
    "router_entropy",
    "overflow",  # tokens past capacity; a mean over layers, and over the experts of a token
    "tokens_read",  # of source and target together
)


@dataclass
class RoutingTotals:
    """Sums over the tokens of some forward passes.

    Attributes:
        sums (`torch.DoubleTensor` of shape `(len(SUMS),)`): in the order of `SUMS`. NaN for what does not exist:
            agreement if nothing is distilled, entropy if there are no scores, overflow if there is no capacity.
        load (`torch.DoubleTensor` of shape `(moe layers, num_experts)`): tokens sent to each expert; a token counts for each
            of its experts.
    """

    sums: Tensor
    load: Tensor

    def __add__(self, other: "RoutingTotals") -> "RoutingTotals":
        """Add the sums of other forward passes."""
        return RoutingTotals(self.sums + other.sums, self.load + other.load)

    def across_processes(self) -> "RoutingTotals":
        """Add up the sums of all processes, on the CPU; every process must call this."""
        # In one transfer, as each one waits for the device.
        packed = sum_across_processes(torch.cat([self.sums, self.load.flatten()])).cpu()
        return RoutingTotals(packed[: len(self.sums)], packed[len(self.sums) :].view_as(self.load))

    def total(self, name: str) -> float:
        """Return one of the sums, by its name in `SUMS`."""
        return self.sums[SUMS.index(name)].item()

    def metrics(self, stage: int) -> dict[str, float]:
        """Turn sums into means.

        NaN stays NaN, as the Trainer's own `grad_norm` does: a loss or a hidden state of these passes that was not
        finite shows in `task_loss` or `common_direction`. Loads, gates, agreement, the routing losses and the means of
        later passes stay finite.

        Args:
            stage (`int`): routing stage to report.

        Returns:
            `dict[str, float]`: `routing_stage`; `load_max_over_mean`, `load_min_over_mean` and `load_entropy` of the
                worst layer, `dead_experts` of all layers; `mean_gate`, `closed_gates`, `common_direction`, with scores
                `router_entropy`, with a capacity `overflow` (share of the tokens past it); with labels `task_loss`
                (nats per target token); with tokens of stage 1 `balance_loss` and, if the routing is distilled,
                `distillation_loss` (both per token, summed over layers, without coefficients, 0 for tokens of stage 2
                as in the loss that is trained), `distillation_agreement` (share of the tokens of stage 1) and
                `distillation_agreement_by_id`.
        """
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        tokens, learned = sums["tokens"], sums["tokens_of_stage1"]
        metrics = {"routing_stage": stage, **LayerLoads(self.load).worst()}
        if tokens:
            metrics |= {name: sums[name] / tokens for name in ("mean_gate", "closed_gates", "common_direction")}
            optional = ("router_entropy", "overflow")
            metrics |= {name: sums[name] / tokens for name in optional if not math.isnan(sums[name])}
        if sums["targets"]:
            metrics["task_loss"] = sums["task_loss"] / sums["targets"]
        if learned:
            metrics["balance_loss"] = sums["balance_loss"] / tokens
        if learned and not math.isnan(sums["distillation_agreement"]):
            metrics["distillation_loss"] = sums["distillation_loss"] / tokens
            for name in ("distillation_agreement", "distillation_agreement_by_id"):
                metrics[name] = sums[name] / learned
        return metrics


def evenness(load: Tensor) -> dict[str, Tensor]:
    """Measure how evenly tokens are spread over the experts of each MoE layer.

    Args:
        load (`torch.DoubleTensor` of shape `(..., num_experts)`): tokens sent to each expert.

    Returns:
        `dict[str, torch.Tensor]` of shape `(...)`: `load_max_over_mean`, in [1, num_experts]; `load_min_over_mean`, in
            [0, 1]; `load_entropy`, the entropy of the experts' shares over ln(num_experts), in [0, 1], 1 if all are
            equal; and `dead_experts`, the number without a token. All but the last are NaN without tokens.
    """
    mean, share = load.mean(-1), load / load.sum(-1, keepdim=True)
    entropy = torch.special.entr(share).sum(-1) / math.log(load.shape[-1]) if load.shape[-1] > 1 else share[..., 0]
    return {
        "load_max_over_mean": load.amax(-1) / mean,
        "load_min_over_mean": load.amin(-1) / mean,
        "load_entropy": entropy.clamp(max=1.0),  # rounding
        "dead_experts": (load == 0).sum(-1),
    }


class LayerLoads:
    """The loads of the experts of each MoE layer, as they are logged.

    Args:
        load (`torch.DoubleTensor` of shape `(moe layers, num_experts)`): tokens sent to each expert, on the CPU.

    Attributes:
        relative (`list[list[float]]`): by layer and expert, tokens over the mean of the layer; NaN without tokens.
        by_layer (`dict[str, torch.Tensor]` of shape `(moe layers,)`): the `evenness` of each layer.
    """

    def __init__(self, load: Tensor):
        self.relative = (load / load.mean(-1, keepdim=True)).tolist()
        self.by_layer = evenness(load)

    def worst(self) -> dict[str, float]:
        """Return each number of the layer where it is worst, and the sum of dead experts over layers."""
        combine = {"load_max_over_mean": torch.max, "dead_experts": torch.sum}
        return {name: combine.get(name, torch.min)(values).item() for name, values in self.by_layer.items()}

    def named(self, layers: Sequence[str]) -> dict[str, float]:
        """Return the numbers of each layer, as `load_entropy/layer_0`, but the least load; none of a single layer."""
        if len(layers) == 1:
            return {}
        return {
            f"{name}/{layer}": value
            for name in ("load_max_over_mean", "load_entropy", "dead_experts")
            for layer, value in zip(layers, self.by_layer[name].tolist(), strict=True)
        }

    def experts(self, layers: Sequence[str]) -> dict[str, float]:
        """Return `relative` as `expert_load/layer_0/expert_0`."""
        return {
            f"expert_load/{layer}/expert_{expert}": value
            for layer, values in zip(layers, self.relative, strict=True)
            for expert, value in enumerate(values)
        }


def layer_names(config: StableMoEBaseConfig) -> list[str]:
    """Name the MoE layers in the order of their loads: `layer_0`, ..., or `encoder_0`, ..., `decoder_0`, ..."""
    if not config.is_encoder_decoder:
        return [f"layer_{index}" for index in range(config.num_moe_layers)]
    sides = {"encoder": config.encoder_moe_layer_positions, "decoder": config.decoder_moe_layer_positions}
    return [f"{side}_{index}" for side, positions in sides.items() for index in range(len(positions))]


def is_first_process() -> bool:
    """Return True in the first process of several, and where there is only one."""
    return not is_distributed() or dist.get_rank() == 0


def imbalance(load: Tensor) -> float:
    """Return the largest max/mean of the experts' loads, `(moe layers, num_experts)`, over layers; 1 is balanced."""
    return evenness(load)["load_max_over_mean"].max().item()


class RoutingMeter:
    """Adds up the routing statistics of a model's training passes, without waiting for the device until they are read.

    Args:
        model (`TwoStageRoutingMixin`): the model with its head.
        recent_steps (`int`): optimizer steps that `recent` covers.

    Attributes:
        token_counts (`torch.LongTensor` of shape `(moe layers, R)`, *optional*): how often each layer looked up each
            row of its table in stage 1, in this process: weighs the rows of the tables that are frozen.
    """

    def __init__(self, model: TwoStageRoutingMixin, recent_steps: int = 50):
        self.model = model
        self._step: RoutingTotals | None = None
        self._window: RoutingTotals | None = None
        self._recent: deque[RoutingTotals] = deque(maxlen=recent_steps)
        self.token_counts: Tensor | None = None
        self._resumed_counts: Tensor | None = None
        self._saw_other_passes = False
        self._hook = model.register_forward_hook(self._observe, with_kwargs=True)

    def close(self):
        """Stop watching."""
        self._hook.remove()

    @torch.no_grad()
    def _observe(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if not module.training:
            self._saw_other_passes = True
            return
        if not self._is_known(output) or output.expert_load is None:
            return
        if not output.logits.requires_grad and not output.aux_loss.requires_grad:
            return  # not a pass that trains, such as sampling between steps
        load = output.expert_load.double()
        k = self.model.config.num_experts_per_tok  # for each of which a token counts in the load
        tokens = load.sum(-1).mean() / k  # layers of an encoder and a decoder route different numbers
        targets = task = torch.zeros((), device=load.device)
        labels = kwargs.get("labels")
        if labels is not None:
            targets = module.count_targets(labels, kwargs.get("shift_labels")).to(load.device)
            divisor = kwargs.get("num_items_in_batch")
            task = output.task_loss * (targets if divisor is None else divisor)
        losses = {"balance_loss": output.balance_loss, "distillation_loss": output.distillation_loss}
        means = losses | dict(zip(RoutingHealth._fields, output.routing_health, strict=True))
        weighted = torch.stack(list(means.values())).double() * tokens  # one kernel for all
        sums = dict(zip(means, weighted, strict=True))
        sums |= {"targets": targets, "task_loss": task.squeeze(), "tokens": tokens, "tokens_of_stage1": tokens}
        capacity_factor = self.model.config.expert_capacity_factor
        if capacity_factor is None:
            sums["overflow"] = load.new_full((), torch.nan)
        else:
            sums["overflow"] = count_overflow(load, capacity_factor).mean() / k
        if self.model.config.is_encoder_decoder:
            sums["tokens_read"] = self.model.count_tokens(*args, **kwargs).to(load.device)
        else:
            sums["tokens_read"] = load[0].sum() / k  # every layer routes every token
        learns = module.routing_stage == 1
        if not learns:  # there is nothing to agree on
            of_stage1 = ("tokens_of_stage1", "distillation_agreement", "distillation_agreement_by_id")
            sums |= dict.fromkeys(of_stage1, torch.zeros_like(tokens))
        totals = RoutingTotals(torch.stack([sums[name].detach().double() for name in SUMS]), load)
        self._step = totals if self._step is None else self._step + totals
        if learns:
            self._count_tokens(module.routed_tokens(*args, **kwargs))

    def _is_known(self, output) -> bool:
        """Return True if a forward pass returns routing statistics; refuse one of stage 1 that does not."""
        if isinstance(output, (StableMoECausalLMOutputWithPast, StableMoESeq2SeqLMOutput)):
            return True
        problem = (
            f"The model's forward pass gives a {type(output).__name__}: another head has taken the place of its own, as "
            "TRL's trainers do, and knows neither routing losses nor statistics."
        )
        if self.model.routing_stage == 1:
            raise ValueError(
                f"{problem} Nothing would be distilled. Train stage 1 with transformers' Trainer, or with a subclass of "
                "SFTTrainer that has `compute_loss = Trainer.compute_loss`."
            )
        logger.warning_once(f"{problem} There are no statistics of this run; its routing is frozen and stays so.")
        return False

    def _count_tokens(self, routed: list[tuple[Tensor | None, Tensor | None]]):
        if self.token_counts is None:
            device = next((token_ids.device for token_ids, _ in routed if token_ids is not None), None)
            self.token_counts = torch.zeros(
                len(routed), self.model.config.num_routing_rows, dtype=torch.long, device=device
            )
        for layer, (token_ids, mask) in enumerate(routed):
            if token_ids is None:  # the model was given embeddings
                continue
            self.token_counts = self.token_counts.to(token_ids.device)
            ones = torch.ones_like(token_ids) if mask is None else mask
            self.token_counts[layer].scatter_add_(0, token_ids.flatten(), ones.flatten().long())

    def pop_other_passes(self) -> bool:
        """Return True if there were passes in evaluation mode since the last call."""
        seen, self._saw_other_passes = self._saw_other_passes, False
        return seen

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

    def recent_steps(self) -> dict[str, Tensor] | None:
        """Return `sums` and `load` of the last steps, a row per step, over all processes, on the CPU.

        Every process must call this; `resume_recent` takes the result.
        """
        if not self._recent:
            return None
        steps = RoutingTotals(
            torch.stack([step.sums for step in self._recent]), torch.stack([step.load for step in self._recent])
        )
        return {name: sum_across_processes(getattr(steps, name).clone()).cpu() for name in ("sums", "load")}

    def resume_recent(self, steps: dict[str, Tensor]):
        """Continue from the `recent_steps` of an earlier part of the run."""
        # They are sums over all processes: only one of them adds them.
        share = float(is_first_process())
        device = self.model.device
        # Earlier versions kept fewer sums.
        all_sums = F.pad(steps["sums"], (0, len(SUMS) - steps["sums"].shape[-1]))
        self._recent.extend(
            RoutingTotals(share * sums.to(device), share * load.to(device))
            for sums, load in zip(all_sums, steps["load"], strict=True)
        )

    def counted_tokens(self) -> Tensor | None:
        """Return how often each MoE layer routed each token id in stage 1; every process must call this.

        Returns:
            `torch.DoubleTensor` of shape `(moe layers, V)`, of all processes; `None` if nothing was counted.
        """
        if self.token_counts is None:
            return self._resumed_counts
        counts = sum_across_processes(self.token_counts.double())
        return counts if self._resumed_counts is None else counts + self._resumed_counts.to(counts.device)

    def resume_counts(self, counts: Tensor):
        """Continue from the `counted_tokens` of an earlier part of the run."""
        self._resumed_counts = counts.double()
