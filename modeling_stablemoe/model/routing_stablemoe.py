# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Routers: hidden states and token ids in, which expert and which gate out. One class a row of paper table 1.

A router knows nothing of experts or losses, and does not keep its frozen routing: see `frozen_stablemoe.py`.

Shape suffixes: B batch, S sequence, T = B * S tokens, D hidden size, E experts, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_stablemoe import ROUTER_TYPES, StableMoEBaseConfig, from_package
from .context_stablemoe import TokenContext
from .distillation_stablemoe import distilled_router_class
from .frozen_stablemoe import BalancedTable
from .losses_stablemoe import BalanceLoss, balance_loss, switch_balance_loss
from .running_stablemoe import RouterMemory, needs_memory
from .tensors_stablemoe import copy_into, finite_tokens, restore_integers, score, score_chosen, whole_shape


class RoutingTrace(NamedTuple):
    """What a router saw and decided, for losses and statistics; nothing here has a gradient.

    Between modules it is a plain tuple, and `RoutingTrace(*trace)` reads it: hooks of other programs rebuild what passes.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(T, D)`): input of the MoE layer, not normalised.
        token_ids (`torch.LongTensor` of shape `(T,)`): in [0, V).
        gate (`torch.Tensor` of shape `(T,)`): in [0, 1].
        teacher_index (`torch.LongTensor` of shape `(T,)`, *optional*): the backbone router's choice while it learns: where
            the tokens went in training, where they would go by its scores in evaluation.
        distilled_index (`torch.LongTensor` of shape `(T,)`, *optional*): the choice of the distilled router while there
            is one that learns.
    """

    hidden_states: Tensor
    token_ids: Tensor
    gate: Tensor
    teacher_index: Tensor | None
    distilled_index: Tensor | None


class Router(nn.Module):
    """What all routers share.

    `forward` returns a plain tuple, which hooks of other programs may take apart and rebuild:

    - router_logits (`torch.Tensor` of shape `(T, E)`, *optional*): backbone scores s, float32 (float64 in a float64
      model); a hash has none, nor has a frozen routing that nobody asked for them.
    - expert_index (`torch.LongTensor` of shape `(B, S)`): the expert of each token, in [0, E).
    - gate (`torch.Tensor` of shape `(B, S)`): its weight, in [0, 1], float32 (float64 in a float64 model).
    - distilled_logits (`torch.Tensor` of shape `(T, E)`, *optional*): distilled scores while there are any to learn.
    - trace (`tuple`): what losses and statistics are made of, in the order of `RoutingTrace`.

    A learned routing that is distilled evaluates with the distilled router, as the released code does, so that freezing
    it changes nothing. One that is not evaluates greedily, and cannot be frozen.
    """

    # The balance loss of the strategy, if it has one, a static method: see `losses_stablemoe.BalanceLoss`.
    balance_loss: BalanceLoss | None = None

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.num_experts = config.num_experts
        distilled_router = distilled_router_class(config)
        self.distilled_router = None if distilled_router is None else distilled_router(config)
        self.memory = RouterMemory(config) if needs_memory(config) else None
        self.max_frozen_load, self.frozen_load_bands = config.max_frozen_load, config.frozen_load_bands

    def index_by_token(
        self, token_ids: Tensor, frozen_index: Tensor | None, context: TokenContext | None, by_backbone: bool = False
    ) -> Tensor | None:
        """Give the experts of tokens where the ids alone decide; `None` where the hidden states do.

        Args:
            token_ids (`torch.LongTensor` of shape `(B, S)`): in [0, V).
            frozen_index (`torch.LongTensor` of shape `(B, S)`, *optional*): the frozen experts; `None` in stage 1.
            context (`TokenContext`, *optional*): see `assign`.
            by_backbone (`bool`): leave the distilled router out; see `LearnedRouter.forward`.
        """
        if frozen_index is not None:
            return frozen_index
        if self.training or by_backbone or self.distilled_router is None:
            return None
        return self.assign(token_ids, context)

    def distilled_logits(
        self, token_ids: Tensor, frozen_index: Tensor | None, context: TokenContext | None
    ) -> Tensor | None:
        """Score tokens with the distilled router while it learns, `(T, E)`; see `index_by_token`."""
        if frozen_index is not None or self.distilled_router is None:
            return None
        return self.distilled_router(token_ids, context).flatten(0, -2)

    def assign(self, token_ids: Tensor, context: TokenContext | None = None) -> Tensor:
        """Give the experts that inference would use now, of a routing that is distilled.

        Args:
            token_ids (`torch.LongTensor` of any shape; of shape `(B, S)` where there is a context): in [0, V).
            context (`TokenContext`, *optional*): what came before, for a distilled router that looks back.

        Returns:
            `torch.LongTensor` of the shape of `token_ids`: in [0, E).
        """
        return self.distilled_router.assign(token_ids, context)

    def stage1_parameters(self) -> list[nn.Parameter]:
        """List the parameters that learn in stage 1 only, D and E^: the frozen routing stands for them in stage 2."""
        if self.distilled_router is None:
            return []
        return list(self.distilled_router.parameters())

    def restore_integers(self, name: str):
        """Bring statistics and counts that other code has stored in another dtype back to integers.

        Args:
            name (`str`): of the router, for errors.

        Raises:
            ValueError: if they are no integers any more.
        """
        for key in ("distilled_router", "memory"):
            part = getattr(self, key)
            if part is not None:
                restore_integers(part, f"{name}.{key}", part.integer_dtypes)

    def resize(self, vocab_size: int):
        """Follow the vocabulary to a new size; see `DistilledRouter.resize`."""
        for part in (self.distilled_router, self.memory):
            if part is not None:
                part.resize(vocab_size)

    def recall(self) -> dict[str, Tensor] | None:
        """Copy what the choice of experts needs of the running statistics.

        For a training pass of stage 1 whose activations may be recomputed after the statistics have moved on; `None` in
        evaluation, where they stand still.
        """
        if self.memory is None or not self.training:
            return None
        return {name: values.clone() for name, values in self.memory().items() if name != "token_counts"}

    def observe(self, trace: tuple, mask: Tensor | None):
        """Follow a training pass of stage 1 with running statistics and counts; every process must call this.

        A token whose hidden state is NaN or infinite counts as padding here: one that has diverged, or a step that a
        loss scaler will skip, leaves nothing behind.

        Args:
            trace (`tuple`): of the pass, in the order of `RoutingTrace`.
            mask (`torch.BoolTensor` of shape `(T,)`, *optional*): True on real tokens; `None` means all are real.
        """
        counts = self.distilled_router is not None and self.distilled_router.observes
        if self.memory is None and not counts:
            return
        trace = RoutingTrace(*trace)
        mask = finite_tokens(trace.hidden_states, mask)
        if self.memory is not None:
            self.memory.observe(trace.hidden_states, trace.token_ids, trace.teacher_index, mask)
        if counts:
            self.distilled_router.observe(trace.token_ids, trace.teacher_index, mask)

    def freeze(self, name: str) -> tuple[Tensor | dict[str, Tensor], BalancedTable | None]:
        """Decide what stage 2 will route by (eq. 13), within `max_frozen_load` where that is set.

        Args:
            name (`str`): of the MoE layer, for errors and warnings.

        Returns:
            `tuple`: the expert of each token id, a `torch.LongTensor` of shape `(V,)`, or the weights by name of a
            distilled router that looks back at earlier tokens; and what balancing the table came to, if it was.

        Raises:
            ValueError: if such weights are NaN or infinite; see `DistilledRouter.check_weights`.
        """
        self.distilled_router.check_weights(name)
        if self.max_frozen_load is None:
            return self.distilled_router.freeze(), None
        # An id that was never seen counts as seen once: many of them make a load, too.
        counts = self.memory()["token_counts"].clamp(min=1).double().cpu()
        agreement = self.distilled_router.expected_shares().double().cpu() * counts.unsqueeze(-1)
        balance = from_package("balanced_table", "Freezing under a load limit (`max_frozen_load`)")
        balanced = balance(agreement, counts, self.max_frozen_load, self.frozen_load_bands)
        return balanced.table, balanced


class LearnedRouter(Router):
    """A router that scores hidden states against centroids: s_{t,i} = E_i . h_t (eq. 5).

    What tells one from another are two columns of paper table 1: `assignment` and `gate`. With `router_normalization` the
    choice of experts and the balance loss go by the scores of normalised states; the gate is of the raw ones in either
    stage, as the paper's, so stage 2 does not need the statistics.
    """

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__(config)
        self.centroids = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))  # E
        self.is_normalized = config.router_normalization is not None
        self.balances_hidden_states = config.balance_gradient == "all"

    def forward(
        self,
        hidden_states: Tensor,
        token_ids: Tensor,
        frozen_index: Tensor | None = None,
        token_mask: Tensor | None = None,
        context: TokenContext | None = None,
        recalled: dict[str, Tensor] | None = None,
        output_scores: bool = True,
        by_backbone: bool = False,
    ) -> tuple:
        """Decide for each token.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, S, D)`): input h of the MoE layer.
            token_ids (`torch.LongTensor` of shape `(B, S)`): X, in [0, V).
            frozen_index (`torch.LongTensor` of shape `(B, S)`, *optional*): the frozen expert of each token (eq. 13);
                `None` in stage 1.
            token_mask (`torch.BoolTensor` of shape `(B, S)`, *optional*): False on padding, whose expert is of no
                consequence.
            context (`TokenContext`, *optional*): what came before, for a distilled router that looks back.
            recalled (`dict[str, torch.Tensor]`, *optional*): the running statistics; default: as they are now.
            output_scores (`bool`): return `router_logits` of a frozen routing, too, which takes the scores of the
                chosen experts alone.
            by_backbone (`bool`): evaluate stage 1 by the scores, which training goes by, and not by the distilled router.

        Returns:
            `tuple`: see `Router`.
        """
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        if frozen_index is not None:
            return self._follow(hidden_states, token_ids, frozen_index, output_scores)
        if self.memory is not None and recalled is None:
            recalled = self.memory()
        scores = gate_scores = score(hidden_states, self.centroids)
        features = hidden_states
        if self.is_normalized:
            features = self.memory.normalize(hidden_states, recalled)
            scores = score(features, self.centroids)
        expert_index = self.index_by_token(token_ids, frozen_index, context, by_backbone)
        teacher_index = self.assignment(self._with_bias(scores, recalled), token_mask)
        expert_index = teacher_index.view_as(token_ids) if expert_index is None else expert_index
        # Evaluation weighs as a frozen routing does, so that freezing does not change so much as the rounding of a gate.
        by_all = self.training or not self.gates_by_own_score
        gate = self._weigh(hidden_states, expert_index, gate_scores if by_all else None)
        distilled_logits = self.distilled_logits(token_ids, frozen_index, context)
        if not self.balances_hidden_states:
            # The same numbers, of which the balance loss reaches the centroids alone.
            scores = score(features.detach(), self.centroids)
        trace = self._trace(hidden_states, token_ids, gate, teacher_index, distilled_logits)
        return scores, expert_index, gate, distilled_logits, trace

    def _follow(self, hidden_states, token_ids, frozen_index, output_scores) -> tuple:
        """Decide where the experts are frozen, and only the gates are left to decide."""
        scores = None
        if output_scores or not self.gates_by_own_score:
            scores = score(hidden_states, self.centroids)
        gate = self._weigh(hidden_states, frozen_index, None if self.gates_by_own_score else scores)
        trace = self._trace(hidden_states, token_ids, gate, None, None)
        # Nothing is learned of a fixed routing: a trainer that adds a balance loss of its own (TRL) moves no gate by it.
        return scores.detach() if output_scores else None, frozen_index, gate, None, trace

    def _weigh(self, hidden_states: Tensor, expert_index: Tensor, scores: Tensor | None) -> Tensor:
        """Weigh the expert of each token, `(T, D), (B, S), (T, E) -> (B, S)`; without scores by that of its expert alone."""
        chosen = expert_index.view(-1, 1)
        if scores is None:
            scores = score_chosen(hidden_states, self.centroids, expert_index.flatten())
            chosen = torch.zeros_like(chosen)
        return self.gate(scores, chosen).view_as(expert_index)

    @property
    def gates_by_own_score(self) -> bool:
        """`bool`: whether the score of its own expert is all that a token's gate depends on, as the sigmoid's is."""
        return type(self).gate is LearnedRouter.gate

    def _trace(self, hidden_states, token_ids, gate, teacher_index, distilled_logits) -> tuple:
        distilled_index = None
        if distilled_logits is not None:
            distilled_index = self.distilled_router.choose(token_ids, distilled_logits.detach())
        return hidden_states.detach(), token_ids.flatten(), gate.detach().flatten(), teacher_index, distilled_index

    def _with_bias(self, router_logits: Tensor, recalled: dict[str, Tensor] | None) -> Tensor:
        """Add what balances the choice of experts, and leaves the gates alone."""
        if recalled is None or "expert_bias" not in recalled:
            return router_logits
        return router_logits.detach() + recalled["expert_bias"]

    def assignment(self, router_logits: Tensor, token_mask: Tensor | None) -> Tensor:
        """Choose the expert of each token by its scores, `(T, E) -> (T,)`: greedily, unless a strategy says else."""
        return router_logits.argmax(-1)

    @torch.no_grad()
    def reset_gates(self):
        """Forget the centroids, which a frozen routing does not need: every score is 0, every sigmoid gate 1/2."""
        copy_into(self.centroids, self.centroids.new_zeros(whole_shape(self.centroids)))

    def gate(self, router_logits: Tensor, expert_index: Tensor) -> Tensor:
        """Weigh the expert of each token, `(T, E), (T, 1) -> (T, 1)`: by the sigmoid of its score, unless told else."""
        return torch.sigmoid(router_logits.gather(-1, expert_index))


class StableRouter(LearnedRouter):
    """StableMoE: greedy while it is learned, fixed from then on; sigmoid gate in both stages (eqs. 5 to 7, 12 to 14).

    The gate is of the backbone score in every case, so the centroids E keep learning in stage 2.
    """

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__(config)
        self.centers_balance_loss = config.center_balance_loss

    def balance_loss(self, **tokens: Tensor) -> Tensor:
        """Balance the loads (eq. 8); arguments and result as of `losses_stablemoe.balance_loss`, per token."""
        return balance_loss(**tokens, reduction="none", centered=self.centers_balance_loss)


class SwitchRouter(LearnedRouter):
    """Switch Transformer (Fedus et al., 2022): greedy, softmax gate."""

    balance_loss = staticmethod(partial(switch_balance_loss, reduction="none"))

    def gate(self, router_logits: Tensor, expert_index: Tensor) -> Tensor:
        """Weigh the expert of each token by its probability; see `LearnedRouter.gate`."""
        return torch.softmax(router_logits, dim=-1).gather(-1, expert_index)


class BaseRouter(LearnedRouter):
    """BASE Layer (Lewis et al., 2021): balanced while training, greedy at inference; sigmoid gate.

    Each process balances its own tokens, and so all together are balanced. With fewer tokens than experts no expert
    gets two. A token without any finite score likes all experts equally: it takes the place that is left.
    """

    def assignment(self, router_logits: Tensor, token_mask: Tensor | None) -> Tensor:
        """Balance the real tokens while training; see `LearnedRouter.assignment`."""
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
    """Hash Layer (Roller et al., 2021): a table over the vocabulary that is never learned; hard gate, 1.

    It has no parameters: the table is the layer's frozen router, random until `set_routing_tables` sets another.
    """

    def forward(
        self,
        hidden_states: Tensor,
        token_ids: Tensor,
        frozen_index: Tensor,
        token_mask: Tensor | None = None,
        context: TokenContext | None = None,
        recalled: dict[str, Tensor] | None = None,
        output_scores: bool = True,
    ) -> tuple:
        """Decide for each token; arguments and result as of `LearnedRouter.forward`."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        gate = torch.ones(frozen_index.shape, dtype=dtype, device=hidden_states.device)
        trace = hidden_states.detach().flatten(0, -2), token_ids.flatten(), gate.flatten(), None, None
        return None, frozen_index, gate, None, trace


# The names of `router_type`; the one place where a strategy is chosen.
ROUTERS: dict[str, type[Router]] = {
    "stable": StableRouter,
    "switch": SwitchRouter,
    "base": BaseRouter,
    "hash": HashRouter,
}


def register_router(name: str, balance_loss_coef: float = 0.0) -> Callable[[type[Router]], type[Router]]:
    """Make a router of your own known to configs; a decorator of the class.

    A config, and a checkpoint, of that name can be read where the file that registers it has been imported.

    Args:
        name (`str`): the value of `router_type`.
        balance_loss_coef (`float`): default of the config's field, for a class with a `balance_loss`.

    Raises:
        ValueError: for the name of another router, or a class that is no [`Router`].
    """

    def register(router_class: type[Router]) -> type[Router]:
        if not issubclass(router_class, Router):
            raise ValueError(f"`{router_class.__name__}` must be a subclass of Router or LearnedRouter.")
        known = ROUTERS.get(name)
        # A file that is run twice, in a notebook say, makes its class anew.
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
    "BaseRouter",
    "HashRouter",
    "LearnedRouter",
    "Router",
    "RoutingTrace",
    "StableRouter",
    "SwitchRouter",
    "build_router",
    "register_router",
]
