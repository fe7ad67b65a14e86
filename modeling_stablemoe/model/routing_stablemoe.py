# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Routers: hidden states and tokens in, experts and their weights out. One class per row of table 1 of the paper.

A router knows nothing of experts and does not keep its frozen routing, which the layer looks up in `frozen_stablemoe.py`.

Shape suffixes: B batch, S sequence, T = B * S tokens, K experts per token, D hidden size, E experts, V vocabulary.
Everywhere: `router_logits_TE`, `routing_weights_TK`, `selected_experts_TK`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_stablemoe import ROUTER_TYPES, StableMoEBaseConfig, from_package
from .context_stablemoe import Tokens
from .distillation_stablemoe import distilled_router_class
from .frozen_stablemoe import BalancedTable
from .losses_stablemoe import BalanceLoss, balance_loss, switch_balance_loss
from .running_stablemoe import RouterMemory, needs_memory
from .tensors_stablemoe import (
    best_experts,
    copy_into,
    finite_tokens,
    restore_integers,
    score,
    score_chosen,
    whole_shape,
)


class Routing(NamedTuple):
    """What a router decided about the tokens of a pass, for the experts, for losses and for statistics.

    Between modules it is a plain tuple, read by `Routing(*routing)`: hooks of other programs take apart and rebuild what
    passes. Only logits and weights have gradients.

    Attributes:
        router_logits (`torch.Tensor` of shape `(T, E)`, *optional*): backbone scores s, float32 (float64 in a float64
            model). A hash has none, nor has a frozen routing unless they are asked for.
        routing_weights (`torch.Tensor` of shape `(T, K)`): the gate in [0, 1], float32 (float64 in a float64 model).
        selected_experts (`torch.LongTensor` of shape `(T, K)`): where tokens go, in [0, E); those of a token all different.
        teacher_experts (`torch.LongTensor` of shape `(T, K)`, *optional*): while the routing is learned, the choice of the
            backbone scores: in training where tokens go, in evaluation where they would go by them.
        distilled_logits (`torch.Tensor` of shape `(T, E)`, *optional*): distilled scores while there are any to learn.
        distilled_experts (`torch.LongTensor` of shape `(T, K)`, *optional*): the choice of the distilled router then.
        hidden_states (`torch.Tensor` of shape `(T, D)`): input of the MoE layer, not normalised.
        table_rows (`torch.LongTensor` of shape `(B, S)`): the row of each token in tables of routing, in [0, R): its id, unless
            that is split by the id before it.
    """

    router_logits: Tensor | None
    routing_weights: Tensor
    selected_experts: Tensor
    teacher_experts: Tensor | None
    distilled_logits: Tensor | None
    distilled_experts: Tensor | None
    hidden_states: Tensor
    table_rows: Tensor


# What a router's `forward` returns, in this order, and a model's output can hold for each MoE layer.
RECORDED = ("router_logits", "expert_indices", "distilled_router_logits", "routing_traces")


class Router(nn.Module):
    """What all routers share: who chooses the experts in which stage.

    A strategy has `learn`, how it decides while the routing is learned, and `follow`, how it weighs experts that are
    frozen. A learned routing that is distilled evaluates with the distilled router, as the released code does, so that
    freezing it changes nothing. One that is not distilled evaluates by its scores, and cannot be frozen.
    """

    # The balance loss of the strategy, if it has one: a static method with the arguments of `balance_loss`.
    balance_loss: BalanceLoss | None = None

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.num_experts, self.num_experts_per_tok = config.num_experts, config.num_experts_per_tok
        distilled_router = distilled_router_class(config)
        self.distilled_router = None if distilled_router is None else distilled_router(config)
        self.memory = RouterMemory(config) if needs_memory(config) else None
        self.max_frozen_load, self.frozen_load_bands = config.max_frozen_load, config.frozen_load_bands

    def forward(
        self,
        hidden_states: Tensor,
        tokens: tuple | Tensor,
        frozen_experts: Tensor | None = None,
        statistics: dict[str, Tensor] | None = None,
        output_router_logits: bool = True,
        by_backbone: bool = False,
    ) -> tuple:
        """Decide about each token.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, S, D)`): input h of the MoE layer.
            tokens (`tuple` or `torch.LongTensor` of shape `(B, S)`): in the order of `Tokens`, or ids alone.
            frozen_experts (`torch.LongTensor` of shape `(T, K)`, *optional*): the experts of a frozen routing (eq. 13).
            statistics (`dict[str, torch.Tensor]`, *optional*): of `recall`; default: as they are now.
            output_router_logits (`bool`): return the scores of a frozen routing, too.
            by_backbone (`bool`): evaluate by the scores, as in training, and not by the distilled router.

        Returns:
            `tuple`: in the order of `RECORDED`: `router_logits`, `(T, E)`; the selected experts, `(B, S)`, or `(B, S, K)`
                where K > 1; `distilled_logits`, `(T, E)`; and all of the `Routing`, a plain tuple.
        """
        tokens = Tokens.of(tokens)
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        teacher_TK = distilled_logits_TE = distilled_TK = None
        if frozen_experts is not None:
            selected_TK = frozen_experts
            logits_TE, weights_TK = self.follow(hidden_TD, selected_TK, output_router_logits)
        else:
            selected_TK = None
            if self.distilled_router is not None:
                distilled_logits_TE = self.distilled_router(tuple(tokens)).flatten(0, -2)
                distilled = self.distilled_router.choose(tokens.table_rows, distilled_logits_TE.detach())
                distilled_TK = distilled.view(-1, self.num_experts_per_tok)
                if not (self.training or by_backbone):
                    selected_TK = self.assign(tuple(tokens)).view(-1, self.num_experts_per_tok)
            logits_TE, weights_TK, teacher_TK = self.learn(hidden_TD, selected_TK, tokens.token_mask, statistics)
            selected_TK = teacher_TK if selected_TK is None else selected_TK
        routing = Routing(
            router_logits=logits_TE,
            routing_weights=weights_TK,
            selected_experts=selected_TK,
            teacher_experts=teacher_TK,
            distilled_logits=distilled_logits_TE,
            distilled_experts=distilled_TK,
            hidden_states=hidden_TD.detach(),
            table_rows=tokens.table_rows,
        )
        return logits_TE, self._by_token(selected_TK, tokens.token_ids), distilled_logits_TE, tuple(routing)

    def _by_token(self, experts: Tensor, token_ids: Tensor) -> Tensor:
        """Give experts, `(T, K)`, the shape of the token ids, with a last dimension where K > 1."""
        if self.num_experts_per_tok == 1:
            return experts.view_as(token_ids)
        # `torch.export` takes nothing apart that it has just put together.
        return experts.clone(memory_format=torch.contiguous_format).view(*token_ids.shape, self.num_experts_per_tok)

    def learn(
        self,
        hidden_states: Tensor,
        selected_experts: Tensor | None,
        token_mask: Tensor | None,
        statistics: dict[str, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decide while the routing is learned.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`): h.
            selected_experts (`torch.LongTensor` of shape `(T, K)`, *optional*): what the distilled router chose, in
                evaluation; by default the strategy chooses.
            token_mask (`torch.BoolTensor` of shape `(B, S)`, *optional*): False on padding, whose experts do not matter.
            statistics (`dict[str, torch.Tensor]`, *optional*): of `recall`; default: as they are now.

        Returns:
            `tuple`: `router_logits`, `(T, E)`; weights of the selected experts, `(T, K)`; and the strategy's own choice,
                `(T, K)`.
        """
        raise NotImplementedError

    def follow(
        self, hidden_states: Tensor, selected_experts: Tensor, output_router_logits: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Weigh experts that are frozen.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`): h.
            selected_experts (`torch.LongTensor` of shape `(T, K)`): the frozen experts.
            output_router_logits (`bool`): whether scores are asked for.

        Returns:
            `tuple`: `router_logits`, `(T, E)`, where there are any and they are asked for; and the weights, `(T, K)`.
        """
        raise NotImplementedError

    def assign(self, tokens: tuple | Tensor) -> Tensor:
        """Return the experts that inference would use now, of a routing that is distilled: in [0, E).

        `(B, S)`, or `(B, S, K)` where K > 1.
        """
        return self.distilled_router.assign(tokens)

    def stage1_parameters(self) -> list[nn.Parameter]:
        """List the parameters that learn in stage 1 only, D and Ê: the frozen routing stands for them in stage 2."""
        if self.distilled_router is None:
            return []
        return list(self.distilled_router.parameters())

    def restore_integers(self, name: str):
        """Convert statistics and counts that other code has stored in another dtype back to integers.

        Raises:
            ValueError: naming router `name`, if they are not whole numbers any more.
        """
        for key in ("distilled_router", "memory"):
            part = getattr(self, key)
            if part is not None:
                restore_integers(part, f"{name}.{key}", part.integer_dtypes)

    def split(self, token_ids: list[int]):
        """Give these ids a row for every id that may stand before them in what has a row per token id."""
        for part in (self.distilled_router, self.memory):
            if part is not None:
                part.split(token_ids)

    def resize(self, vocab_size: int):
        """Resize what has a row per token id."""
        for part in (self.distilled_router, self.memory):
            if part is not None:
                part.resize(vocab_size)

    def recall(self) -> dict[str, Tensor] | None:
        """Copy the running statistics that the choice of experts needs; `None` in evaluation, where they do not change.

        For a training pass of stage 1 whose activations may be recomputed after the statistics have moved on.
        """
        if self.memory is None or not self.training:
            return None
        return {name: values.clone() for name, values in self.memory().items() if name != "token_counts"}

    def observe(self, routing: Routing, mask: Tensor | None):
        """Update running statistics and counts by a training pass of stage 1; every process must call this.

        A token whose hidden state is NaN or infinite counts as padding here: one that has diverged, or a step that a
        loss scaler will skip, leaves nothing behind.
        """
        counts = self.distilled_router is not None and self.distilled_router.observes
        if self.memory is None and not counts:
            return
        mask = finite_tokens(routing.hidden_states, mask)
        rows_T, teacher_TK = routing.table_rows.flatten(), routing.teacher_experts
        if self.memory is not None:
            self.memory.observe(routing.hidden_states, rows_T, teacher_TK, mask)
        if counts:
            self.distilled_router.observe(rows_T, teacher_TK, mask)

    def freeze(self, name: str) -> tuple[Tensor | dict[str, Tensor], BalancedTable | None]:
        """Decide what stage 2 will route by (eq. 13), within `max_frozen_load` where that is set.

        Args:
            name (`str`): of the MoE layer, for errors and warnings.

        Returns:
            `tuple`: the expert of each token id, `(V,)`, or `(V, K)` where K > 1, or the weights by name of a distilled
                router that looks back at earlier tokens; and the table that was balanced, with its qualities, if it was.

        Raises:
            ValueError: if weights that are frozen as they are hold NaN or infinity.
        """
        self.distilled_router.check_weights(name)
        if self.max_frozen_load is None:
            return self.distilled_router.freeze(), None
        # An id that was never seen counts as seen once: many of them make a load, too.
        counts, k = self.memory()["token_counts"].clamp(min=1).double().cpu(), self.num_experts_per_tok
        agreement = self.distilled_router.expected_shares().double().cpu() * (k * counts).unsqueeze(-1)
        balance = from_package("balanced_table", "Freezing under a load limit (`max_frozen_load`)")
        balanced = balance(agreement, counts, self.max_frozen_load, self.frozen_load_bands, k)
        return balanced.table, balanced


class LearnedRouter(Router):
    """A router that scores hidden states against centroids: s_{t,i} = E_i . h_t (eq. 5).

    They differ in two columns of table 1: `assignment` and `gate`.
    """

    # Whether the score of its own expert is all that a token's gate depends on, as the sigmoid's is: then a frozen routing
    # takes one score per token, however many experts there are.
    gates_by_own_score = True

    def __init_subclass__(cls, **kwargs):
        """Assume that a class with a gate of its own needs all scores, unless it says that one is enough."""
        super().__init_subclass__(**kwargs)
        if "gate" in vars(cls) and "gates_by_own_score" not in vars(cls):
            cls.gates_by_own_score = False

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__(config)
        self.centroids = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))  # E
        self.is_normalized, self.shares_weight = config.router_normalization is not None, config.norm_topk_prob
        self.balances_hidden_states = config.balance_gradient == "all"

    def learn(
        self,
        hidden_states: Tensor,
        selected_experts: Tensor | None,
        token_mask: Tensor | None,
        statistics: dict[str, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score, choose and weigh (eqs. 5 to 7)."""
        scores_TE = score(hidden_states, self.centroids)
        logits_TE, preference_TE = self._with_settings_of_stage1(hidden_states, scores_TE, statistics)
        teacher_TK = self._teach(preference_TE, token_mask)
        selected_TK = teacher_TK if selected_experts is None else selected_experts
        # Evaluation weighs as a frozen routing does, so that freezing does not change so much as the rounding of a gate.
        is_by_all = self.training or not self.gates_by_own_score
        return logits_TE, self._weigh(hidden_states, selected_TK, scores_TE if is_by_all else None), teacher_TK

    def follow(
        self, hidden_states: Tensor, selected_experts: Tensor, output_router_logits: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Weigh by the backbone score (eq. 14)."""
        scores_TE = None
        if output_router_logits or not self.gates_by_own_score:
            scores_TE = score(hidden_states, self.centroids)
        weights_TK = self._weigh(hidden_states, selected_experts, None if self.gates_by_own_score else scores_TE)
        # Nothing is learned of a fixed routing: a trainer that adds a balance loss of its own (TRL) moves no gate by it.
        return scores_TE.detach() if output_router_logits else None, weights_TK

    def assignment(self, router_logits: Tensor, token_mask: Tensor | None) -> Tensor:
        """Choose the experts of each token by its scores, `(T, E) -> (T,)` or `(T, K)`: greedily, unless a strategy differs.

        `(T,)` is one expert per token. Several are all different, the best first.
        """
        return best_experts(router_logits, self.num_experts_per_tok)

    def gate(self, router_logits: Tensor, selected_experts: Tensor) -> Tensor:
        """Weigh the experts of each token, `(T, E), (T, K) -> (T, K)`: by the sigmoid of their scores by default."""
        return torch.sigmoid(router_logits.gather(-1, selected_experts))

    def _teach(self, preference: Tensor, token_mask: Tensor | None) -> Tensor:
        """Let the strategy choose, `(T, K)`."""
        teacher_TK = self.assignment(preference, token_mask)
        if teacher_TK.dim() == 1:
            teacher_TK = teacher_TK.unsqueeze(-1)
        if teacher_TK.shape[-1] != self.num_experts_per_tok:
            raise ValueError(
                f"`assignment` of {type(self).__name__} gives {teacher_TK.shape[-1]} expert(s) per token, but "
                f"`num_experts_per_tok` is {self.num_experts_per_tok}: return indices of shape (tokens, num_experts_per_tok), "
                "or change the config's field."
            )
        return teacher_TK

    def _weigh(self, hidden_states: Tensor, selected_experts: Tensor, scores: Tensor | None) -> Tensor:
        """Weigh the experts of each token by all scores or, without them, by those of its experts alone."""
        if scores is None:
            scores = score_chosen(hidden_states, self.centroids, selected_experts)
            places = torch.arange(selected_experts.shape[-1], device=selected_experts.device)
            selected_experts = places.expand_as(selected_experts)
        weights_TK = self.gate(scores, selected_experts)
        if not self.shares_weight:
            return weights_TK
        # Gates that are shut may all be 0.
        return weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).tiny)

    @torch.no_grad()
    def reset_gates(self):
        """Forget the centroids, which a frozen routing does not need: every score is 0, every sigmoid gate 1/2."""
        copy_into(self.centroids, self.centroids.new_zeros(whole_shape(self.centroids)))

    def _with_settings_of_stage1(
        self, hidden_states: Tensor, scores: Tensor, statistics: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Apply settings that the paper does not have; return what is balanced and what experts are chosen by, `(T, E)`.

        The gate is of the raw scores in any case, so that stage 2 does not need the statistics.
        """
        if self.memory is not None and statistics is None:
            statistics = self.memory()
        if self.is_normalized:  # `router_normalization`
            hidden_states = self.memory.normalize(hidden_states, statistics)
            scores = score(hidden_states, self.centroids)
        preference = scores
        if statistics is not None and "expert_bias" in statistics:  # `expert_bias_rate`
            preference = scores.detach() + statistics["expert_bias"]
        if not self.balances_hidden_states:  # `balance_gradient`: the same numbers, through the centroids alone
            scores = score(hidden_states.detach(), self.centroids)
        return scores, preference


class StableRouter(LearnedRouter):
    """StableMoE: greedy while it is learned, fixed from then on; sigmoid gate in both stages (eqs. 5 to 7, 12 to 14).

    The gate is of the backbone score in every case, so the centroids E keep learning in stage 2.
    """

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__(config)
        self.centers_balance_loss = config.center_balance_loss

    def balance_loss(self, **tokens: Tensor) -> Tensor:
        """Balance the loads (eq. 8), one number per token."""
        return balance_loss(**tokens, reduction="none", centered=self.centers_balance_loss)


class SwitchRouter(LearnedRouter):
    """Switch Transformer (Fedus et al., 2022): greedy, softmax gate."""

    balance_loss = staticmethod(partial(switch_balance_loss, reduction="none"))

    def gate(self, router_logits: Tensor, selected_experts: Tensor) -> Tensor:
        """Weigh the experts of each token by their probability, `(T, E), (T, K) -> (T, K)`."""
        return torch.softmax(router_logits, dim=-1).gather(-1, selected_experts)


class BaseRouter(LearnedRouter):
    """BASE Layer (Lewis et al., 2021): balanced while training, greedy at inference; sigmoid gate.

    Each process balances its own tokens, and so all together are balanced. With fewer tokens than experts no expert
    gets two. A token without any finite score likes all experts equally: it takes the place that is left.
    """

    def assignment(self, router_logits: Tensor, token_mask: Tensor | None) -> Tensor:
        """Balance the real tokens while training, `(T, E) -> (T,)`."""
        if not self.training:
            return router_logits.argmax(-1)
        balanced_assignment = from_package("balanced_assignment", "Training a BASE router")
        if token_mask is None:
            return balanced_assignment(router_logits)
        expert_index = router_logits.argmax(-1)
        real = token_mask.flatten()
        expert_index[real] = balanced_assignment(router_logits[real])
        return expert_index


class HashRouter(Router):
    """Hash Layer (Roller et al., 2021): a table over the vocabulary that is never learned; hard gate, 1 / K.

    It has no parameters: the table is the layer's frozen router, random until `set_routing_tables` sets another.
    """

    def follow(
        self, hidden_states: Tensor, selected_experts: Tensor, output_router_logits: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Weigh all experts of a token alike, 1 in all; there are no scores."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        share = 1 / selected_experts.shape[-1]
        return None, torch.full(selected_experts.shape, share, dtype=dtype, device=hidden_states.device)


# The names of `router_type`; the one place where a strategy is chosen.
ROUTERS: dict[str, type[Router]] = {
    "stable": StableRouter,
    "switch": SwitchRouter,
    "base": BaseRouter,
    "hash": HashRouter,
}


def register_router(name: str, balance_loss_coef: float = 0.0) -> Callable[[type[Router]], type[Router]]:
    """Decorate the class of a router of your own, so that configs know it by name.

    A config, and a checkpoint, of that name can be read where the file that registers it has been imported.

    Args:
        name (`str`): the value of `router_type`.
        balance_loss_coef (`float`): default of the config's field, for a class with a `balance_loss`.

    Raises:
        ValueError: for the name of another router, a class that is no [`Router`], or one with a `forward` of its own.
    """

    def register(router_class: type[Router]) -> type[Router]:
        if not issubclass(router_class, Router):
            raise ValueError(f"`{router_class.__name__}` must be a subclass of Router or LearnedRouter.")
        if router_class.forward is not Router.forward:
            raise ValueError(
                f"`{router_class.__name__}` has a `forward` of its own. What differs between routers are `learn` and `follow` "
                "(of a LearnedRouter `assignment` and `gate`): write these instead."
            )
        known = ROUTERS.get(name)
        # A file that is run twice, in a notebook say, defines its class again.
        if known is not None and (known.__module__, known.__qualname__) != (
            router_class.__module__,
            router_class.__qualname__,
        ):
            raise ValueError(f"`router_type` {name!r} is {known.__name__} already; choose another name.")
        ROUTERS[name], ROUTER_TYPES[name] = router_class, balance_loss_coef
        return router_class

    return register


def build_router(config: StableMoEBaseConfig) -> Router:
    """Build the router that `config.router_type` names.

    Raises:
        ValueError: if the name is unknown.
    """
    if config.router_type not in ROUTERS:
        raise ValueError(f"`router_type` {config.router_type!r} is unknown; choose one of {sorted(ROUTERS)}.")
    return ROUTERS[config.router_type](config)


__all__ = [
    "RECORDED",
    "BaseRouter",
    "HashRouter",
    "LearnedRouter",
    "Router",
    "Routing",
    "StableRouter",
    "SwitchRouter",
    "build_router",
    "register_router",
]
