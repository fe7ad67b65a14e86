# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Experts: tokens and the expert of each in, the weighted change of each token out.

An expert FFN_i is a stack of pre-norm residual sublayers x + W2 act(W1 LayerNorm_i(x)), each expert with a LayerNorm of
its own (StableMoE; released code). All experts of a layer are stacked, one tensor per matrix. The backends answer to
transformers' `experts_implementation`; `eager` is the one to read, the others are tested against it.

Shape suffixes: T tokens, R routed tokens (no sentinels), D hidden size, E experts, F expert hidden size, X and Y any.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface, _batched_linear, use_experts_implementation
from transformers.utils import is_torchdynamo_compiling

from .configuration_stablemoe import EXPERT_PARAMETERS, StableMoEBaseConfig
from .products_stablemoe import ExpertOrder, grouped_layer_norm, grouped_linear, permute, sort_by_expert
from .tensors_stablemoe import dequantized, is_transformed, local_tensor


class ExpertSublayer(nn.Module):
    """One FFN sublayer of every expert.

    Under expert parallelism transformers leaves each process the rows of its own experts, and sets `num_experts` to how
    many those are.
    """

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        num_experts, hidden_size, intermediate_size = config.num_experts, config.hidden_size, config.expert_size
        self.num_experts = num_experts
        self.layernorm_weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.layernorm_bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.act_fn = ACT2FN[config.hidden_act]
        self.eps = config.layer_norm_eps
        self.register_load_state_dict_pre_hook(_rename_earlier_keys)

    def forward(self, hidden_TD: Tensor, compute: Callable) -> Tensor:
        """Compute W2 act(W1 LayerNorm_i(x) + b1) + b2, each token with the parameters of its expert i, as a backend does.

        A module's own parameters are brought for its `forward` by the engines that shard or offload them.

        Args:
            hidden_TD (`torch.Tensor` of shape `(T, D)`): x.
            compute (`Callable`): `(x, parameters of the experts by name, act_fn, eps) -> (T, D)`.

        Returns:
            `torch.Tensor` of shape `(T, D)`: what the sublayer adds to x.
        """
        return compute(hidden_TD, {name: self._held(name) for name in EXPERT_PARAMETERS}, self.act_fn, self.eps)

    def _held(self, name: str) -> Tensor:
        """Return a parameter's rows of this process's experts; rows of others would be taken for theirs unnoticed."""
        held = dequantized(local_tensor(getattr(self, name)))
        if held.shape[0] != self.num_experts:
            raise ValueError(
                f"`{name}` holds the rows of {held.shape[0]} experts, but this process has {self.num_experts}. An "
                "expert-parallel plan must deal out every parameter of the experts: leave `ep_plan` at None."
            )
        return held


def _rename_earlier_keys(module: ExpertSublayer, state_dict: dict[str, Tensor], prefix: str, *_):
    for name in ("weight", "bias"):
        if f"{prefix}norm_{name}" in state_dict:
            state_dict.setdefault(f"{prefix}layernorm_{name}", state_dict.pop(f"{prefix}norm_{name}"))


def _stack(sublayers: nn.ModuleList, hidden_TD: Tensor, compute: Callable) -> Tensor:
    """Run the sublayers with their residuals; return the change S(x) - x, summed as such and so not rounded away."""
    delta_TD = None
    for sublayer in sublayers:
        added_TD = sublayer(hidden_TD if delta_TD is None else hidden_TD + delta_TD, compute)
        added_TD = added_TD.to(torch.promote_types(added_TD.dtype, hidden_TD.dtype))
        delta_TD = added_TD if delta_TD is None else delta_TD + added_TD
    return delta_TD


def _ffn(norm: Callable, linear: Callable) -> Callable:
    """Make a sublayer's `compute` of what a backend does for all experts together.

    Args:
        norm (`Callable`): `(T, D), (E, D), (E, D), eps -> (T, D)`: normalise each token with its expert's weight and bias.
        linear (`Callable`): `(T, X), (E, Y, X), (E, Y) -> (T, Y)`: multiply each token by its expert's matrix, add the bias.
    """

    def compute(x_TD: Tensor, experts: dict[str, Tensor], act_fn: Callable, eps: float) -> Tensor:
        normed_TD = norm(x_TD, experts["layernorm_weight"], experts["layernorm_bias"], eps)
        inner_TF = act_fn(linear(normed_TD, experts["up_proj"], experts["up_proj_bias"]))
        return linear(inner_TF, experts["down_proj"], experts["down_proj_bias"])

    return compute


def _norm_by_rows(rows: Callable) -> Callable:
    """Make a norm for `_ffn` of a function `(E, X) -> (T, X)` that gives each token its expert's row."""

    def norm(x_TD: Tensor, weight_ED: Tensor, bias_ED: Tensor, eps: float) -> Tensor:
        standardized_TD = F.layer_norm(x_TD, x_TD.shape[-1:], eps=eps).to(weight_ED.dtype)
        return torch.addcmul(rows(bias_ED), standardized_TD, rows(weight_ED))

    return norm


def eager_experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    expert_order: tuple | None = None,
):
    """Run the experts one after the other: the readable reference."""
    index_T = top_k_index.squeeze(-1)
    routed = (index_T < self.num_experts).nonzero().squeeze(-1)  # the others, sentinels, pass unchanged
    index_R = index_T[routed]
    tokens_of_expert = [(index_R == expert).nonzero().squeeze(-1) for expert in range(self.num_experts)]

    def linear(x_RX: Tensor, weight_EYX: Tensor, bias_EY: Tensor) -> Tensor:
        # Taking the experts apart once keeps the backward pass from filling a whole stack for each expert.
        parts = zip(tokens_of_expert, weight_EYX.unbind(0), strict=True)
        products = [F.linear(x_RX[tokens], weight_YX) for tokens, weight_YX in parts]
        return torch.cat(products)[torch.cat(tokens_of_expert).argsort()] + bias_EY[index_R]

    norm = _norm_by_rows(lambda parameter_EX: parameter_EX[index_R])
    delta_RD = _stack(self.sublayers, hidden_states[routed], _ffn(norm, linear))
    weighted_RD = (delta_RD * top_k_weights[routed]).to(hidden_states.dtype)
    return torch.zeros_like(hidden_states).index_add(0, routed, weighted_RD)


def grouped_mm_experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    expert_order: tuple | None = None,
):
    """Sort the tokens by expert once, then one grouped product over all experts for each matrix."""
    if plain_backend := _plain_backend(top_k_index):
        return plain_backend(self, hidden_states, top_k_index, top_k_weights)
    if _takes_turns(hidden_states):
        return _run_in_turn(self, hidden_states, top_k_index, top_k_weights, expert_order)
    expert_order = _order_of(expert_order, top_k_index, self.num_experts)
    # Rows past the last offset belong to sentinels. A grouped product may leave anything there, in the forward and in
    # the backward pass: they are masked on the way in and out.
    sentinel_T1 = None
    if expert_order.has_sentinels and hidden_states.device.type != "cpu":
        sentinel_T1 = (expert_order.expert_index == self.num_experts).unsqueeze(-1)

    def masked(x_TX: Tensor) -> Tensor:
        return x_TX if sentinel_T1 is None else x_TX.masked_fill(sentinel_T1, 0.0)

    def norm(x_TD: Tensor, weight_ED: Tensor, bias_ED: Tensor, eps: float) -> Tensor:
        return grouped_layer_norm(x_TD, weight_ED, bias_ED, expert_order, eps)

    def linear(x_TX: Tensor, weight_EYX: Tensor, bias_EY: Tensor) -> Tensor:
        return grouped_linear(x_TX, weight_EYX, bias_EY, expert_order)

    sorted_TD = masked(permute(hidden_states, expert_order.order, expert_order.inverse))
    delta_TD = masked(_stack(self.sublayers, sorted_TD, _ffn(norm, linear)))
    return (permute(delta_TD, expert_order.inverse, expert_order.order) * top_k_weights).to(hidden_states.dtype)


def _plain_backend(top_k_index: Tensor) -> Callable | None:
    """Choose a backend of PyTorch's own operators where these alone have rules: for `torch.jit.trace` and `torch.func`.

    A trace of grouped products would keep the loads of its example, whatever the tokens it is run on.
    """
    if is_torchdynamo_compiling() or not is_transformed():
        return None
    # Loads that differ from sample to sample of a `vmap` have no common sizes: there each token gets its own weights.
    return batched_mm_experts_forward if _is_batched(top_k_index) else eager_experts_forward


def _is_batched(tensor: Tensor) -> bool:
    """Return True for a tensor that has a dimension of `torch.func.vmap`, at whatever level of nested transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _order_of(expert_order: tuple | None, top_k_index: Tensor, num_experts: int) -> ExpertOrder:
    """Read the order that came with the tokens, or sort them now."""
    if expert_order is None:
        return sort_by_expert(top_k_index.view(1, -1), num_experts)[0]
    return ExpertOrder(*expert_order)


def _takes_turns(hidden_states: Tensor) -> bool:
    """Return True if experts run faster in turn: on a CPU, where nothing learns and nothing is compiled."""
    return hidden_states.device.type == "cpu" and not torch.is_grad_enabled() and not is_torchdynamo_compiling()


def _run_in_turn(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    expert_order: tuple | None,
) -> Tensor:
    """Run each expert that has tokens through a sublayer while its tokens are in the cache; copy no weight."""
    if len(hidden_states) == 1:  # nothing to sort
        expert = int(top_k_index)
        groups = [(expert, slice(0, 1))] if expert < self.num_experts else []
        delta_TD = _stack(self.sublayers, hidden_states, _in_turn(groups))
        return (delta_TD * top_k_weights).to(hidden_states.dtype)
    order = _order_of(expert_order, top_k_index, self.num_experts)
    sorted_TD = hidden_states.index_select(0, order.order)
    delta_TD = _stack(self.sublayers, sorted_TD, _in_turn(order.groups()))
    return (delta_TD.index_select(0, order.inverse) * top_k_weights).to(hidden_states.dtype)


def _in_turn(groups: list[tuple[int, slice]]) -> Callable:
    """Make a sublayer's `compute` that runs one expert after the other; tokens of no group, sentinels, get 0.

    Args:
        groups (`list[tuple[int, slice]]`): experts and the places of their tokens, ascending.
    """

    def compute(x_TD: Tensor, experts: dict[str, Tensor], act_fn: Callable, eps: float) -> Tensor:
        changes = []
        for expert, places in groups:
            own = {name: values[expert] for name, values in experts.items()}
            dtype = torch.promote_types(x_TD.dtype, own["layernorm_weight"].dtype)
            weight_D, bias_D = own["layernorm_weight"].to(dtype), own["layernorm_bias"].to(dtype)
            normed_RD = F.layer_norm(x_TD[places].to(dtype), x_TD.shape[-1:], weight_D, bias_D, eps)
            inner_RF = act_fn(
                F.linear(normed_RD.to(own["layernorm_weight"].dtype), own["up_proj"], own["up_proj_bias"])
            )
            changes.append(F.linear(inner_RF, own["down_proj"], own["down_proj_bias"]))
        num_tokens = groups[-1][1].stop if groups else 0
        if num_tokens < len(x_TD):
            changes.append(torch.zeros_like(x_TD[num_tokens:]))
        return changes[0] if len(changes) == 1 else torch.cat(changes)

    return compute


def batched_mm_experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    expert_order: tuple | None = None,
):
    """Gather the expert of each token and multiply in a batch: for few tokens, as in decoding."""
    index_T = top_k_index.squeeze(-1)
    sentinel_T1 = (index_T >= self.num_experts).unsqueeze(-1)
    index_T = index_T.clamp(max=self.num_experts - 1)

    def rows(parameter_EX: Tensor) -> Tensor:
        return parameter_EX.index_select(0, index_T)

    def linear(x_TX: Tensor, weight_EYX: Tensor, bias_EY: Tensor) -> Tensor:
        return _batched_linear(x_TX, weight_EYX[index_T], rows(bias_EY))

    routed_TD = hidden_states.masked_fill(sentinel_T1, 0.0)
    delta_TD = _stack(self.sublayers, routed_TD, _ffn(_norm_by_rows(rows), linear)).masked_fill(sentinel_T1, 0.0)
    return (delta_TD * top_k_weights).to(hidden_states.dtype)


def shared_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor):
    """Run all experts as one, the mean of their parameters: each gets the same share of every token's gradient.

    Of several experts per token, `(T, K)` of index and weights, one pass serves all.
    """
    sentinel_TK = top_k_index >= self.num_experts

    def mean(parameter_EX: Tensor) -> Tensor:
        return parameter_EX.mean(0)

    def linear(x_TX: Tensor, weight_EYX: Tensor, bias_EY: Tensor) -> Tensor:
        return F.linear(x_TX, weight_EYX.mean(0)) + bias_EY.mean(0)

    routed_TD = hidden_states.masked_fill(sentinel_TK.all(-1, keepdim=True), 0.0)
    weight_T1 = top_k_weights.masked_fill(sentinel_TK, 0.0).sum(-1, keepdim=True)
    return (_stack(self.sublayers, routed_TD, _ffn(_norm_by_rows(mean), linear)) * weight_T1).to(hidden_states.dtype)


def spread_sentinels(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Give sentinels an expert in rotation and no weight, and tokens that go nowhere zeros to work on.

    So that all are sent to some expert.
    """
    sentinel_TK = top_k_index >= num_experts
    by_turns_TK = torch.arange(top_k_index.numel(), device=top_k_index.device).view_as(top_k_index) % num_experts
    index_TK = torch.where(sentinel_TK, by_turns_TK, top_k_index)
    hidden_TD = hidden_states.masked_fill(sentinel_TK.all(-1, keepdim=True), 0.0)
    return hidden_TD, index_TK, top_k_weights.masked_fill(sentinel_TK, 0.0)


def expert_capacity(expert_load: Tensor, capacity_factor: float) -> Tensor:
    """Compute how many tokens an expert keeps, floor(capacity_factor * K * tokens / E), at least 1: `(..., E) -> (...)`.

    Of the loads of one forward pass of one process, in which a token counts for each of its K experts.
    """
    return (expert_load.sum(-1) * capacity_factor / expert_load.shape[-1]).floor().clamp(min=1)


def count_overflow(expert_load: Tensor, capacity_factor: float) -> Tensor:
    """Count the tokens past capacity, which `drop_overflow` sends nowhere, `(..., E) -> (...)`."""
    return (expert_load - expert_capacity(expert_load, capacity_factor).unsqueeze(-1)).clamp(min=0).sum(-1)


def drop_overflow(expert_index: Tensor, *, num_experts: int, capacity_factor: float) -> Tensor:
    """Replace the experts of tokens past capacity by the sentinel `num_experts`, in the order of the tokens.

    `expert_index` has the experts of each token one after the other. An expert keeps floor(capacity_factor * K * tokens /
    num_experts) tokens, at least one (released code: a factor of 2, K = 1).
    Tokens, experts' shares and so the capacity are those of this process.
    """
    sorted_T, order_T = torch.sort(expert_index, stable=True)
    ones_T = torch.ones_like(sorted_T)
    load_E = torch.zeros(num_experts + 1, dtype=torch.long, device=sorted_T.device).scatter_add_(0, sorted_T, ones_T)
    first_E = load_E.cumsum(0) - load_E
    rank_T = torch.arange(sorted_T.shape[0], device=sorted_T.device) - first_E[sorted_T]
    capacity = expert_capacity(load_E[:-1], capacity_factor)
    kept_T = torch.where(rank_T < capacity, sorted_T, num_experts)
    return torch.empty_like(expert_index).scatter_(0, order_T, kept_T)


class StableMoEExpertsInterface(ExpertsInterface):
    """The backends of `StableMoEExperts`, under transformers' names.

    The mapping is this class's own: transformers' global functions know neither a LayerNorm nor a stack per expert.
    """

    _global_mapping = {"grouped_mm": grouped_mm_experts_forward, "batched_mm": batched_mm_experts_forward}


ALL_STABLEMOE_EXPERTS_FUNCTIONS = StableMoEExpertsInterface()


class Parts(nn.ModuleList):
    """Modules that are not a chain: the output of one is not the input of the next.

    Block-wise quantisers (auto-round) take whatever class is called a `ModuleList` for such a chain.
    """


@use_experts_implementation(experts_interface=ALL_STABLEMOE_EXPERTS_FUNCTIONS, has_bias=True, has_gate=False)
class StableMoEExperts(nn.Module):
    """The experts of one MoE layer.

    W2 and its bias start at zero, so a new expert changes nothing (released code).
    """

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.sublayers = Parts([ExpertSublayer(config) for _ in range(config.num_expert_sublayers)])

    @property
    def num_experts(self) -> int:
        """`int`: experts of this process: all of them, but for expert parallelism."""
        return self.sublayers[0].num_experts

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        expert_order: tuple | None = None,
    ) -> Tensor:
        """Compute the weighted change w_t (S_i(h_t) - h_t) of each token, S_i the stack of its expert i.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`): h.
            top_k_index (`torch.LongTensor` of shape `(T, 1)`): the expert of each token; `num_experts` or more is a
                sentinel, for a token that passes unchanged.
            top_k_weights (`torch.Tensor` of shape `(T, 1)`): w, the gate.
            expert_order (`tuple`, *optional*): `top_k_index`, sorted, where that has been done already; in the order of
                `ExpertOrder`.

        Returns:
            `torch.Tensor` of shape `(T, D)`: what to add to h; 0 for sentinels.
        """
        return eager_experts_forward(self, hidden_states, top_k_index, top_k_weights)

    def forward_shared(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute what `forward` does where all experts are equal, and keep them equal while they learn.

        No update is lost on an expert that will not serve the token later. Which expert a token has makes no difference,
        except for sentinels.

        Raises:
            ValueError: under expert parallelism, where a process has not all experts to take the mean of.
        """
        if self.num_experts < self.config.num_experts:
            raise ValueError(
                f"`share_experts_in_stage1` runs the mean of all {self.config.num_experts} experts in stage 1, but this "
                f"process holds {self.num_experts} of them. Train stage 1 without expert parallelism (FSDP2 shards the "
                "experts, too), call `freeze_router()` and save: stage 2 runs with it."
            )
        return shared_experts_forward(self, hidden_states, top_k_index, top_k_weights)


__all__ = [
    "ALL_STABLEMOE_EXPERTS_FUNCTIONS",
    "ExpertSublayer",
    "Parts",
    "StableMoEExperts",
    "count_overflow",
    "drop_overflow",
    "expert_capacity",
    "spread_sentinels",
]
