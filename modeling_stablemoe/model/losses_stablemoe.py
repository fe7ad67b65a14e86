# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The losses of a routing that learns (StableMoE, eqs. 8 and 10; Switch) and the counts behind them.

Pure functions, no coefficients.

With K experts per token everything is counted in pairs of a token and one of its experts; K = 1 is the paper's.

Shape suffixes: T tokens, K experts per token, E experts.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


# What takes the arguments of `balance_loss` by name, but for `reduction`, and gives one number per token, `(T,)`; or their
# mean, a scalar, which cannot weigh sequences.
BalanceLoss = Callable[..., Tensor]


def is_distributed() -> bool:
    """Return True if several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_across_processes(values: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place, and return it; every process must call this."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def histogram(index: Tensor, mask: Tensor | None, size: int, dtype: torch.dtype = torch.long) -> Tensor:
    """Count how often each of `size` numbers occurs on real tokens, of `(T,)` or `(T, K)` numbers and the mask `(T,)`."""
    # A fixed number of bins and no boolean indexing: nothing here waits for the device.
    if mask is None:
        ones = torch.ones_like(index, dtype=dtype)
    else:
        ones = mask.to(dtype).view(-1, *[1] * (index.dim() - 1)).expand_as(index)
    return torch.zeros(size, dtype=dtype, device=index.device).scatter_add_(0, index.flatten(), ones.flatten())


def count_expert_load(*, expert_index: Tensor, mask: Tensor | None, num_experts: int) -> Tensor:
    """Count the real tokens sent to each expert, |A_i| of eq. 8, `(T,)` or `(T, K) -> (E,)`."""
    return histogram(expert_index, mask, num_experts)


def divisor_of(num_items_in_batch: Tensor | int, targets: Tensor) -> Tensor:
    """Return the divisor of a sum over target tokens: 1 without targets, so that it stays 0 and is not 0 / 0."""
    return torch.where(targets > 0, num_items_in_batch, 1)


def share_of_targets(targets: Tensor, num_items_in_batch: Tensor | int, device: torch.device) -> Tensor:
    """Return the share of a whole batch's targets that are in this micro-batch, `()`: the weight of a mean over it."""
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(device)
    targets = targets.to(device)
    return targets / divisor_of(num_items_in_batch, targets)


def token_weights(targets: Tensor, token_mask: Tensor | None, length: int, dtype: torch.dtype) -> Tensor:
    """Weigh the tokens of each sequence so that together they count for its share of the targets of this micro-batch.

    A mean over the tokens of a micro-batch depends on which sequences are in it; sum_r targets_r mean_r over its
    sequences does not, so k + k sequences give what 2k together give. Where all sequences have the same targets per
    token, every weight is exactly 1, and the weighted mean is the plain one to the bit.

    Args:
        targets (`torch.LongTensor` of shape `(B,)`): how many tokens of each sequence the task loss predicts.
        token_mask (`torch.BoolTensor` of shape `(B, S)`, *optional*): True on real tokens; `None` means all are real.
        length (`int`): S.
        dtype (`torch.dtype`): of the weights, `(B * S,)`: with mean 1 over the real tokens; 0 where there are no
            targets.
    """
    tokens_B = torch.full_like(targets, length) if token_mask is None else token_mask.sum(-1)
    # Products of integers: those of equal shares are equal, and their quotient is 1.
    numerator_B, denominator_B = targets * tokens_B.sum(), tokens_B * targets.sum()
    weight_B = numerator_B.to(dtype) / denominator_B.clamp(min=1).to(dtype)
    return weight_B.repeat_interleave(length)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average `values` over the real tokens, `(T,) -> ()`; 0 where no token is real."""
    if mask is None:
        return values.mean()
    # `where` and not a product: padding may hold NaN.
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def balance_loss(
    *,
    router_logits: Tensor,
    expert_index: Tensor,
    mask: Tensor | None = None,
    expert_load: Tensor | None = None,
    reduction: str = "mean",
    centered: bool = False,
) -> Tensor:
    """Balance the experts' loads, in gate mass per token.

    L_bal / alpha / T = 1/T sum_i c_i sum_{t in A_i} sigmoid(s_{t,i}) with c_i = (|A_i| - n) / n and n = K T / N.

    A_i are the tokens that have i among their K experts, so the sum is over pairs of token and expert, and the number of a
    token is the sum over its experts.

    Source: StableMoE, eq. 8, where K = 1 and n = T / N. The count factor is a number: the gradient flows through the sigmoid
    only, into the centroids and the hidden states. Deviations: a mean over tokens (the head restores the paper's sum over
    target tokens) and padding takes no part.

    The factors sum to 0 over experts, not over pairs: more pairs are where there are too many. Over pairs their mean is
    m = sum_i |A_i| / (K T) c_i = 1/N sum_i c_i^2, the variance of the loads in units of n, so that besides balancing
    the loss pushes every gate down by m. `centered` takes c_i - m for c_i, which leaves the push of one expert against
    another as it is, and equals the paper's as loads become even.

    Args:
        router_logits (`torch.Tensor` of shape `(T, E)`): backbone scores s, eq. 5.
        expert_index (`torch.LongTensor` of shape `(T,)` or `(T, K)`): the experts each token was sent to, in [0, E).
        mask (`torch.BoolTensor` of shape `(T,)`, *optional*): True on real tokens; `None` means all are real.
        expert_load (`torch.Tensor` of shape `(E,)`, *optional*): |A_i| over more tokens than these, namely those of
            all processes; default: counted here.
        reduction (`str`): `"mean"`, or `"none"` for the numbers of the tokens that it is the mean of, padding included.
        centered (`bool`): subtract from the factors their mean over the pairs that `expert_load` counts.

    Returns:
        `torch.Tensor` of shape `()`: in (-K, N); 0 when every expert has the same load, N - K times the mean gate when
        K experts have all tokens. If `centered`, K times the covariance of factor and gate over pairs: 0 in either case, and
        in any where all gates are equal. Of shape `(T,)` with `reduction="none"`.
    """
    num_experts = router_logits.shape[-1]
    if expert_load is None:
        expert_load = count_expert_load(expert_index=expert_index, mask=mask, num_experts=num_experts)
    load_E = expert_load.to(router_logits.dtype)
    fair_share = (load_E.sum() / num_experts).clamp(min=1 / num_experts)
    overload_E = (load_E - fair_share) / fair_share
    if centered:
        overload_E = overload_E - overload_E.square().mean()
    expert_TK = expert_index.unsqueeze(-1) if expert_index.dim() == 1 else expert_index
    gate_TK = torch.sigmoid(router_logits.gather(-1, expert_TK))
    return _reduce((overload_E[expert_TK] * gate_TK).sum(-1), mask, reduction)


def switch_balance_loss(
    *,
    router_logits: Tensor,
    expert_index: Tensor,
    mask: Tensor | None = None,
    expert_load: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Balance the experts' loads as Switch Transformer does: N sum_i f_i P_i.

    Source: Fedus et al. (2022), eqs. 4 to 6 without alpha. f_i, the share of tokens sent to expert i, is a number; the
    gradient flows through P_i, the mean probability of expert i. With K experts per token f_i is the share of the pairs of
    token and expert. Deviation: padding takes no part.

    Args:
        router_logits (`torch.Tensor` of shape `(T, E)`): scores before the softmax.
        expert_index (`torch.LongTensor` of shape `(T,)` or `(T, K)`): the experts each token was sent to, in [0, E).
        mask (`torch.BoolTensor` of shape `(T,)`, *optional*): True on real tokens; `None` means all are real.
        expert_load (`torch.Tensor` of shape `(E,)`, *optional*): tokens sent to each expert, of all processes; default:
            counted here.
        reduction (`str`): `"mean"`, or `"none"` for the numbers of the tokens that it is the mean of, padding included.

    Returns:
        `torch.Tensor` of shape `()`: in [0, N / K]; 1 when loads or probabilities are even. Of shape `(T,)` with
        `reduction="none"`.
    """
    num_experts = router_logits.shape[-1]
    if expert_load is None:
        expert_load = count_expert_load(expert_index=expert_index, mask=mask, num_experts=num_experts)
    share_E = expert_load.to(router_logits.dtype) / expert_load.sum().clamp(min=1)
    # sum_i f_i P_i, the sum over experts first: one number per token, to be averaged.
    return num_experts * _reduce(torch.softmax(router_logits, dim=-1) @ share_E, mask, reduction)


def distillation_loss(
    *, distilled_logits: Tensor, teacher_index: Tensor, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the distilled router against the backbone router's choice, in nats per token.

    With K experts per token the choice is the uniform distribution over them, and its entropy, which cannot be less, is left
    out: -1/K sum_a log softmax(ŝ_t)_a - ln K, a Kullback-Leibler divergence. It is least where the distilled probability of an
    expert is its share of the pairs of token and expert: the K highest scores are then those of the K experts that the
    backbone chooses most often.

    Source: StableMoE, eq. 10, where K = 1. The teacher is a constant and the distilled router has its own embedding, so the
    gradient reaches D and Ê only. Deviations: a mean over tokens, and padding takes no part.

    Args:
        distilled_logits (`torch.Tensor` of shape `(T, E)`): unnormalised scores of the distilled router, eq. 12.
        teacher_index (`torch.LongTensor` of shape `(T,)` or `(T, K)`): a_t of eq. 6, in [0, E).
        mask (`torch.BoolTensor` of shape `(T,)`, *optional*): True on real tokens; `None` means all are real.
        reduction (`str`): `"mean"`, or `"none"` for the numbers of the tokens that it is the mean of, padding included.

    Returns:
        `torch.Tensor` of shape `()`, >= 0; of shape `(T,)` with `reduction="none"`.
    """
    if teacher_index.dim() > 1:
        loss_T = -torch.log_softmax(distilled_logits, dim=-1).gather(-1, teacher_index).mean(-1)
        loss_T = loss_T - math.log(teacher_index.shape[-1])
    else:
        loss_T = F.cross_entropy(distilled_logits, teacher_index, reduction="none")
    return _reduce(loss_T, mask, reduction)


def _reduce(values: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    return values if reduction == "none" else masked_mean(values, mask)


def routing_losses(
    *,
    balance_loss_function: BalanceLoss | None,
    num_experts: int,
    router_logits: Sequence[Tensor | None],
    distilled_logits: Sequence[Tensor | None],
    selected_experts: Sequence[Tensor],
    teacher_experts: Sequence[Tensor | None],
    mask: Tensor | None = None,
    across_processes: bool = False,
    token_weight: Tensor | None = None,
    windows: Sequence[Callable[[Tensor], Tensor]] = (),
) -> dict[str, Tensor]:
    """Sum the losses of a routing that learns over the MoE layers of one side (StableMoE, eq. 11) and count the loads.

    The sequences have one entry per MoE layer.

    Args:
        balance_loss_function (`Callable`, *optional*): that of the routing strategy, if it has one: `balance_loss` or what
            takes the same arguments.
        num_experts (`int`): N.
        router_logits (sequence of `torch.Tensor` of shape `(T, E)`): backbone scores; `None` for a hash.
        distilled_logits (sequence of `torch.Tensor` of shape `(T, E)`): distilled scores; `None` where nothing is distilled.
        selected_experts (sequence of `torch.LongTensor` of shape `(T, K)`): where the tokens were sent.
        teacher_experts (sequence of `torch.LongTensor` of shape `(T, K)`): the choice of the backbone router; `None` once the
            routing is fixed: in stage 2 there is no loss but the task's.
        mask (`torch.BoolTensor` of shape `(T,)`, *optional*): True on real tokens; `None` means all are real.
        across_processes (`bool`): count the loads of the balance loss over the tokens of all processes (a collective).
        token_weight (`torch.Tensor` of shape `(T,)`, *optional*): of `token_weights`; `None` weighs all tokens alike.
        windows (sequence of `Callable`): add earlier loads to those counted over all processes, `(E,)` each; empty where
            there are none to add.

    Returns:
        `dict`: `balance_loss` and `distillation_loss`, without coefficients, `()`; the same with tokens weighed, as they enter
            the loss, `weighted_balance_loss` and `weighted_distillation_loss`; and `expert_load`, `(layers, E)`, tokens of
            this process sent to each expert: all K T pairs. On the device of the first layer.
    """
    device = selected_experts[0].device
    mask, token_weight = (None if values is None else values.to(device) for values in (mask, token_weight))
    balance, distillation, loads = [], [], []
    for layer, selected in enumerate(selected_experts):
        loads.append(count_expert_load(expert_index=selected.to(device), mask=mask, num_experts=num_experts))
        if teacher_experts[layer] is None:
            continue
        teacher = (
            teacher_experts[layer].to(device).squeeze(-1)
        )  # `(T,)` where K = 1, as strategies of one expert expect
        if balance_loss_function is not None:
            load = count_expert_load(expert_index=teacher, mask=mask, num_experts=num_experts)
            if across_processes:
                sum_across_processes(load)
                load = windows[layer](load) if windows else load
            logits = router_logits[layer].to(device)
            balance.append(
                balance_loss_function(router_logits=logits, expert_index=teacher, mask=mask, expert_load=load)
            )
        if distilled_logits[layer] is not None:
            logits = distilled_logits[layer].to(device)
            distillation.append(distillation_loss(distilled_logits=logits, teacher_index=teacher, reduction="none"))
    losses = {"expert_load": torch.stack(loads)}
    scores = next((logits for logits in router_logits if logits is not None), None)
    zero = torch.zeros((), device=device, dtype=None if scores is None else scores.dtype)
    for name, layers in (("balance_loss", balance), ("distillation_loss", distillation)):
        losses[name] = losses[f"weighted_{name}"] = zero
        if layers:
            # A strategy may give means, `()`, in place of numbers per token: these cannot be weighed.
            means = [values if values.dim() == 0 else masked_mean(values, mask) for values in layers]
            losses[name] = losses[f"weighted_{name}"] = torch.stack(means).sum()
        if layers and token_weight is not None:
            weighted = [values if values.dim() == 0 else masked_mean(values * token_weight, mask) for values in layers]
            losses[f"weighted_{name}"] = torch.stack(weighted).sum()
    return losses


def label_smoothed_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    label_smoothing: float = 0.0,
    **kwargs,
) -> Tensor:
    """Compute the cross-entropy of logits and labels at the same positions, in nats per target token, in float32.

    Args:
        logits (`torch.Tensor` of shape `(B, S, V)`): any float dtype.
        labels (`torch.LongTensor` of shape `(B, S)`): -100 is ignored.
        vocab_size (`int`): V.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): divisor of the sum; default: the targets of this
            batch.
        label_smoothing (`float`): share of the target's probability that is spread evenly over the vocabulary.
        **kwargs: other arguments that transformers gives to loss functions.
    """
    labels_T = labels.flatten().to(logits.device)
    total = F.cross_entropy(
        logits.reshape(-1, vocab_size).float(), labels_T, reduction="sum", label_smoothing=label_smoothing
    )
    targets = labels_T.ne(-100).sum()
    if num_items_in_batch is None:
        return total / targets.clamp(min=1)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / divisor_of(num_items_in_batch, targets)


def causal_targets(labels: Tensor | None = None, shift_labels: Tensor | None = None) -> Tensor:
    """Mark the tokens that a causal language-modelling loss predicts, as `Trainer` counts them.

    Of `labels`, not shifted, `(B, S) -> (B, S - 1)`; or of `shift_labels`, where given.
    """
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return targets.ne(-100)


def count_causal_targets(labels: Tensor | None = None, shift_labels: Tensor | None = None) -> Tensor:
    """Count the tokens that a causal language-modelling loss predicts, as `causal_targets` marks them."""
    return causal_targets(labels, shift_labels).sum()


__all__ = [
    "BalanceLoss",
    "balance_loss",
    "causal_targets",
    "count_causal_targets",
    "count_expert_load",
    "distillation_loss",
    "divisor_of",
    "histogram",
    "is_distributed",
    "label_smoothed_loss",
    "masked_mean",
    "routing_losses",
    "share_of_targets",
    "sum_across_processes",
    "switch_balance_loss",
    "token_weights",
]
