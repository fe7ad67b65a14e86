# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""One MoE layer: router, experts, gate and residual, and what the routing is frozen into.

Shape suffixes: T tokens, K experts per token, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .bigram_stablemoe import BigramEmbedding
from .blocks_stablemoe import StableMoEBlock
from .configuration_stablemoe import StableMoEBaseConfig
from .context_stablemoe import Tokens, with_rows
from .experts_stablemoe import StableMoEExperts, drop_overflow, spread_sentinels
from .frozen_stablemoe import build_frozen_router
from .gated_stablemoe import StableMoEGatedExperts, StableMoESharedExperts
from .losses_stablemoe import is_distributed
from .products_stablemoe import sort_by_expert
from .routing_stablemoe import Router, Routing, build_router
from .tensors_stablemoe import is_at_hand, zero_through


class ExpertDispatch(nn.Module):
    """Sends tokens to the experts that the router chose, except for padding and, while training, tokens over capacity.

    A module because transformers before 5.19 hooks whatever returns expert ids, to make them those of this process.
    """

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.capacity_factor = config.expert_capacity_factor

    def forward(
        self,
        router_logits: Tensor | None,
        routing_weights: Tensor,
        selected_experts: Tensor,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Replace the experts that a token does not go to by the sentinel `num_experts`; leave logits and weights."""
        if token_mask is not None:
            selected_experts = selected_experts.masked_fill(~token_mask.reshape(-1, 1), self.num_experts)
        if self.training and self.capacity_factor is not None:
            selected_experts = drop_overflow(
                selected_experts.flatten(), num_experts=self.num_experts, capacity_factor=self.capacity_factor
            ).view_as(selected_experts)
        return router_logits, routing_weights, selected_experts

    def may_drop(self, token_mask: Tensor | None) -> bool:
        """Return True if some tokens may be sent nowhere."""
        return token_mask is not None or (self.training and self.capacity_factor is not None)


class StableMoELayer(GradientCheckpointingLayer):
    """A layer of experts between two Transformer blocks: h' = h + sum_a g_a (S_a(h) - h) (StableMoE, eqs. 7 and 14).

    The sum is over the token's experts a, `num_experts_per_tok` many, one in the paper. S_a is the stack of expert a, its
    residuals inside; a and g_a are the router's. Of gated experts S_a(h) - h is the FFN of expert a of the normalised h. What
    every token takes is added: that of shared experts, and of a bigram embedding. The layer is in stage 1 until
    `frozen_router` is filled, in stage 2 from then on (with a hash, from the start).
    """

    # Whether the layer normalises what gated experts read; where an FFN stood, its block does.
    has_norm = True

    # Called with the experts that tokens are sent to, `(T, K)`, before the first block runs: experts that are kept elsewhere
    # are fetched ahead.
    fetch_experts: Callable[[Tensor], object] | None = None

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.router = build_router(config)
        self.frozen_router = build_frozen_router(config)
        self.dispatch = ExpertDispatch(config)
        self.norm = self.shared_experts = None
        if config.expert_type == "stack":
            self.expert_stack = StableMoEExperts(config)
        else:
            self.experts = StableMoEGatedExperts(config)
            if self.has_norm:
                self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.num_shared_experts:
                self.shared_experts = StableMoESharedExperts(config)
        self.bigram_embedding = BigramEmbedding(config) if config.num_bigram_embeddings else None
        self.shares_experts = config.share_experts_in_stage1
        self.register_state_dict_post_hook(_replicate_buffers)

    def forward(
        self,
        hidden_states: Tensor,
        tokens: tuple | Tensor,
        frozen_experts: Tensor | None = None,
        expert_order: tuple | None = None,
        statistics: dict[str, Tensor] | None = None,
        output_router_logits: bool = False,
        route_by_backbone: bool = False,
    ) -> Tensor:
        """Send each token through its experts.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): h.
            tokens (`tuple` or `torch.LongTensor` of shape `(batch, sequence)`): in the order of `Tokens`, or ids alone.
                Padding passes unchanged.
            frozen_experts (`torch.LongTensor` of shape `(T, K)`, *optional*): of `look_up_ahead`, as the next one; without
                them the layer looks them up itself.
            expert_order (`tuple`, *optional*): those pairs of token and expert sorted by expert, in the order of `ExpertOrder`.
            statistics (`dict[str, torch.Tensor]`, *optional*): of `Router.recall`, for a pass that may be recomputed.
            output_router_logits (`bool`): whether the scores of a frozen router are asked for.
            route_by_backbone (`bool`): evaluate stage 1 by the scores and not by the distilled router.

        Returns:
            `torch.Tensor` of shape `(batch, sequence, hidden_size)`: h'.
        """
        change = self._change(
            hidden_states, tokens, frozen_experts, expert_order, statistics, output_router_logits, route_by_backbone
        )
        return self._with_idle_parameters(hidden_states + change)

    def _change(
        self,
        hidden_states: Tensor,
        tokens: tuple | Tensor,
        frozen_experts: Tensor | None,
        expert_order: tuple | None,
        *options: Any,
    ) -> Tensor:
        """Compute what the experts add to the tokens, of the shape of `hidden_states`."""
        tokens = Tokens.of(self.with_rows(tokens))
        if frozen_experts is None and self.frozen_router.is_frozen:
            frozen_experts = self.look_up(tuple(tokens))
        *_, routing = self.router(hidden_states, tuple(tokens), frozen_experts, *options)
        routing = Routing(*routing)
        _, weights_TK, sent_TK = self.dispatch(
            routing.router_logits, routing.routing_weights, routing.selected_experts, tokens.token_mask
        )
        hidden_TD = hidden_states.flatten(0, -2)
        if self.norm is not None:
            hidden_TD = self.norm(hidden_TD)
        may_drop = self.dispatch.may_drop(tokens.token_mask)
        change_TD = self._run_experts(hidden_TD, sent_TK, self._weigh(weights_TK), expert_order, may_drop)
        for_all = [] if self.shared_experts is None else [self.shared_experts(hidden_TD)]
        if self.bigram_embedding is not None:
            for_all.append(self.bigram_embedding(hidden_TD, tuple(tokens)))
        for added_TD in for_all:
            if tokens.token_mask is not None:
                added_TD = added_TD.masked_fill(~tokens.token_mask.reshape(-1, 1), 0.0)
            change_TD = change_TD + added_TD
        return change_TD.view_as(hidden_states)

    def _weigh(self, routing_weights: Tensor) -> Tensor:
        """Turn the router's weights, `(T, K)`, into those of the experts: between blocks they are the same."""
        return routing_weights

    def _with_idle_parameters(self, hidden_states: Tensor) -> Tensor:
        """Give the parameters that learn in stage 1 only a gradient of zero where several processes train stage 2.

        DistributedDataParallel stops at a parameter without gradient unless it looks for unused ones, which activation
        checkpointing forbids, and ZeRO-3 would take the last one again.
        """
        if not (self.training and self.frozen_router.is_frozen and is_distributed()):
            return hidden_states
        idle = self.bare_router.stage1_parameters()
        return hidden_states + zero_through(idle, self).to(hidden_states.dtype) if idle else hidden_states

    def _run_experts(self, tokens: Tensor, selected_experts: Tensor, routing_weights: Tensor, *how: Any) -> Tensor:
        """Compute the weighted sum of the experts of each token, `(T, hidden_size)`."""
        num_tokens, num_experts_per_tok = selected_experts.shape
        runs_one = self.shares_experts and not self.frozen_router.is_frozen
        if num_experts_per_tok == 1 or self.expert_name == "experts" or runs_one:
            return self._run(tokens, selected_experts, routing_weights, *how)
        # A stack of experts takes pairs of a token and one expert.
        tokens = tokens.repeat_interleave(num_experts_per_tok, dim=0)
        pairs = selected_experts.reshape(-1, 1), routing_weights.reshape(-1, 1)
        return self._run(tokens, *pairs, *how).view(num_tokens, num_experts_per_tok, -1).sum(1)

    def _run(
        self,
        tokens: Tensor,
        selected_experts: Tensor,
        routing_weights: Tensor,
        expert_order: tuple | None,
        may_drop: bool,
    ) -> Tensor:
        """Run the module of the experts on what it takes."""
        experts = self.expert_module
        if expert_order is not None:
            return experts(tokens, selected_experts, routing_weights, expert_order)
        # Expert parallelism sends every token to some process; transformers' backends know no sentinels without it.
        if experts.num_experts < self.num_experts or (may_drop and self.expert_name == "experts"):
            tokens, selected_experts, routing_weights = spread_sentinels(
                tokens, selected_experts, routing_weights, self.num_experts
            )
        if self.shares_experts and not self.frozen_router.is_frozen:
            return experts.forward_shared(tokens, selected_experts, routing_weights)
        return experts(tokens, selected_experts, routing_weights)

    @property
    def expert_name(self) -> str:
        """`str`: name of the module of the experts: of transformers' own for gated ones."""
        return "experts" if "experts" in self._modules else "expert_stack"

    @property
    def expert_module(self) -> nn.Module:
        """`torch.nn.Module`: the routed experts."""
        return getattr(self, self.expert_name)

    def knows_ahead(self, device: torch.device) -> bool:
        """Return True if the layer's experts can be looked up on `device` before its own forward pass begins.

        They cannot where a sharding engine or an offloading hook brings the frozen router with the layer, nor under expert
        parallelism, whose hooks turn experts into those of each process.
        """
        return (
            self.frozen_router.is_frozen
            and self.expert_module.num_experts == self.num_experts
            and all(is_at_hand(values, device) for values in self.frozen_router.buffers())
        )

    def look_up(self, tokens: tuple) -> Tensor:
        """Look up the frozen experts of each token, `(T, K)`."""
        return self.frozen_router(self.with_rows(tokens)).view(-1, self.frozen_router.num_experts_per_tok)

    def with_rows(self, tokens: tuple | Tensor) -> tuple:
        """Add the rows of tokens in tables of routing, where those of some ids are split and the backbone has not yet."""
        return with_rows(tokens, self.config)

    @property
    def bare_router(self) -> Router:
        """`Router`: the router itself, where PEFT has wrapped it to adapt its parameters (`target_parameters`)."""
        return self.router.get_base_layer() if hasattr(self.router, "get_base_layer") else self.router

    def route(self, tokens: tuple | Tensor) -> Tensor:
        """Return the experts that inference would use, frozen or the distilled router's.

        Of the shape of the ids; with more than one expert per token a last dimension of as many.
        """
        tokens = self.with_rows(tokens)
        return self.frozen_router(tokens) if self.frozen_router.is_frozen else self.bare_router.assign(tokens)

    @property
    def is_routed_by_token(self) -> bool:
        """`bool`: whether token ids alone, a token's own or earlier ones too, decide which experts inference uses."""
        return self.frozen_router.is_frozen or self.bare_router.distilled_router is not None

    def split(self, token_ids: list[int]):
        """Route these ids by the id before them, too."""
        self.bare_router.split(token_ids)
        self.frozen_router.split(token_ids)

    def resize(self, vocab_size: int):
        """Follow the vocabulary to a new size; the frozen router has a rule for the experts of new ids."""
        self.bare_router.resize(vocab_size)
        self.frozen_router.resize(vocab_size)


class StableMoEFeedForward(StableMoELayer):
    """Gated experts in place of the FFN of a block: y = 1/K sum_k (1 + c g_k) FFN_{a_k}(x), to which the block adds its input.

    c, one number, starts at 0: experts that are copies of the FFN that stood there compute what it did, to the bit where K
    is a power of two. A hash has no scores: its y is the mean.
    """

    has_norm = False

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__(config)
        self.gate_scale = None if config.router_type == "hash" else nn.Parameter(torch.empty(1))
        # All that the layer is given but the hidden states: the block, which has them, calls with these alone.
        self.given: tuple | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Send each token through its experts.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): x.

        Returns:
            `torch.Tensor` of shape `(batch, sequence, hidden_size)`: y; 0 for padding.

        Raises:
            ValueError: outside its block, which says what the tokens are.
        """
        given, self.given = self.given, None
        if given is None:
            raise ValueError(
                "Experts in place of an FFN are told the tokens by their block: run the model, or the block."
            )
        return self._with_idle_parameters(self._change(hidden_states, *given))

    def _weigh(self, routing_weights: Tensor) -> Tensor:
        if self.gate_scale is None:
            return routing_weights
        return (1 + self.gate_scale * routing_weights) / routing_weights.shape[-1]


def _replicate_buffers(layer: StableMoELayer, state_dict: dict[str, Tensor], prefix: str, local_metadata):
    """Hand buffers out as replicated tensors where all parameters are sharded, as accelerate expects of FSDP2."""
    parameter = next(layer.parameters())
    if not hasattr(parameter, "device_mesh"):
        return
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    for name, values in layer.named_buffers(prefix.removesuffix(".")):
        entry = state_dict.get(name, values)
        # With `keep_vars` the buffer itself is asked for: transformers marks it as initialised.
        if entry is not values and not hasattr(entry, "device_mesh"):
            placements = [Replicate()] * mesh.ndim
            state_dict[name] = DTensor.from_local(entry, mesh, placements, run_check=False)


def look_up_ahead(
    layers: Sequence[StableMoELayer], tokens: tuple, sort: bool
) -> list[tuple[Tensor | None, tuple | None]]:
    """Look up the experts of all frozen MoE layers at once, before the first block runs, and sort the tokens by them.

    Returns `frozen_experts` and `expert_order` of each layer's `forward`; both `None` where a layer cannot know, the
    order where the experts' backend does not `sort`.
    """
    tokens = Tokens.of(tokens)
    if not layers or not all(layer.knows_ahead(tokens.token_ids.device) for layer in layers):
        return [(None, None)] * len(layers)
    selected = [layer.look_up(tuple(tokens)) for layer in layers]
    if not sort and all(layer.fetch_experts is None for layer in layers):
        return [(selected_TK, None) for selected_TK in selected]
    sent = []
    for layer, selected_TK in zip(layers, selected, strict=True):
        *_, sent_TK = layer.dispatch(None, selected_TK, selected_TK, tokens.token_mask)
        sent.append(sent_TK)
        if layer.fetch_experts is not None:
            layer.fetch_experts(sent_TK)
    if not sort:
        return [(selected_TK, None) for selected_TK in selected]
    may_drop = any(layer.dispatch.may_drop(tokens.token_mask) for layer in layers)
    orders = sort_by_expert(torch.stack(sent).flatten(1), layers[0].num_experts, may_drop)
    return [(selected_TK, tuple(order)) for selected_TK, order in zip(selected, orders, strict=True)]


def moe_layers_of(model: nn.Module) -> dict[str, StableMoELayer]:
    """Find the MoE layers of a model, by qualified name, in the order in which tokens pass them."""
    found: dict[str, StableMoELayer] = {}

    def walk(module: nn.Module, name: str):
        if isinstance(module, StableMoELayer):
            if module not in found.values():
                found[name] = module
            return
        for child_name, child in module.named_children():
            if not isinstance(child, StableMoEBlock):  # most modules of a model stand in its blocks, which are dense
                walk(child, f"{name}.{child_name}" if name else child_name)

    walk(model, "")
    return found


__all__ = ["StableMoEFeedForward", "StableMoELayer", "look_up_ahead", "moe_layers_of"]
