# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""One MoE layer: router, experts, gate and residual, and what the routing is frozen into."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .blocks_stablemoe import StableMoEBlock
from .configuration_stablemoe import StableMoEBaseConfig
from .context_stablemoe import TokenContext, new_columns
from .experts_stablemoe import StableMoEExperts, drop_overflow, spread_sentinels
from .frozen_stablemoe import build_frozen_router
from .losses_stablemoe import is_distributed
from .products_stablemoe import sort_by_expert
from .routing_stablemoe import Router, build_router
from .tensors_stablemoe import is_at_hand, zero_through


class ExpertDispatch(nn.Module):
    """Sends tokens to the experts that the router chose, but for padding and, while training, tokens over capacity.

    A module, for transformers before 5.19 hooks what hands out expert ids: to make them this process's own.
    """

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.capacity_factor = config.expert_capacity_factor

    def forward(
        self, router_logits: Tensor | None, gate: Tensor, expert_index: Tensor, token_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Turn a router's decision into what experts take.

        Args:
            router_logits (`torch.Tensor` of shape `(T, E)`, *optional*): the scores.
            gate (`torch.Tensor` of shape `(batch, sequence)`): weights of the experts.
            expert_index (`torch.LongTensor` of shape `(batch, sequence)`): the expert of each token.
            token_mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): False on padding.

        Returns:
            `tuple`: the scores, unchanged, `(T, E)`; the gate, `(T, 1)`; and the expert of each token, `(T, 1)`, the
            sentinel `num_experts` for one that takes no part.
        """
        return router_logits, gate.reshape(-1, 1), self.send(expert_index, token_mask)

    def send(self, index: Tensor, token_mask: Tensor | None) -> Tensor:
        """Turn the experts that a router chose into those that get a token, `(batch, sequence) -> (T, 1)`; see `forward`."""
        if token_mask is not None:
            index = index.masked_fill(~token_mask, self.num_experts)
        if self.training and self.capacity_factor is not None:
            index = drop_overflow(index.flatten(), num_experts=self.num_experts, capacity_factor=self.capacity_factor)
        return index.view(-1, 1)

    def may_drop(self, token_mask: Tensor | None) -> bool:
        """Tell whether some tokens may be sent nowhere."""
        return token_mask is not None or (self.training and self.capacity_factor is not None)


class StableMoELayer(GradientCheckpointingLayer):
    """A layer of experts between two Transformer blocks: h' = h + g (S_a(h) - h) (StableMoE, eqs. 7 and 14).

    S_a is the stack of expert a, its residuals inside; a and g are the router's. The layer is in stage 1 until
    `frozen_router` is filled, in stage 2 from then on (with a hash, from the start).
    """

    # Called with the experts that tokens are sent to, `(T, 1)`, before the first block runs: experts that are kept elsewhere are fetched ahead.
    fetch_experts: Callable[[Tensor], object] | None = None

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.router = build_router(config)
        self.frozen_router = build_frozen_router(config)
        self.dispatch = ExpertDispatch(config)
        self.expert_stack = StableMoEExperts(config)
        self.shares_experts = config.share_experts_in_stage1
        self.register_state_dict_post_hook(_replicate_buffers)

    def forward(
        self,
        hidden_states: Tensor,
        token_ids: Tensor,
        token_mask: Tensor | None = None,
        context: TokenContext | None = None,
        recalled: dict[str, Tensor] | None = None,
        frozen_dispatch: tuple | None = None,
        output_scores: bool = False,
        by_backbone: bool = False,
    ) -> Tensor:
        """Send each token through its expert.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): h.
            token_ids (`torch.LongTensor` of shape `(batch, sequence)`): the tokens that the distilled router sees.
            token_mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): False on padding, which passes
                unchanged; `None` means there is none.
            context (`TokenContext`, *optional*): what came before, for a distilled router that looks back.
            recalled (`dict[str, torch.Tensor]`, *optional*): the router's running statistics, see `Router.recall`.
            frozen_dispatch (`tuple`, *optional*): of `dispatch_ahead`; without it the layer finds out itself.
            output_scores (`bool`): whether the router's scores are wanted though it is frozen; see `LearnedRouter.forward`.
            by_backbone (`bool`): likewise.

        Returns:
            `torch.Tensor` of shape `(batch, sequence, hidden_size)`: h'.
        """
        frozen_index = None
        if frozen_dispatch is not None:
            frozen_index = frozen_dispatch[0]
        elif self.frozen_router.is_frozen:
            frozen_index = self.frozen_router(token_ids, context)
        # Said only where it is asked for: a router of one's own need not know of it.
        asked = {"by_backbone": True} if by_backbone and frozen_index is None else {}
        router_logits, expert_index, gate, *_ = self.router(
            hidden_states, token_ids, frozen_index, token_mask, context, recalled, output_scores, **asked
        )
        tokens = hidden_states.flatten(0, -2)
        if frozen_dispatch is None:
            _, gate, index = self.dispatch(router_logits, gate, expert_index, token_mask)
            delta = self._run_experts(tokens, index, gate)
        else:
            _, index, expert_order = frozen_dispatch
            delta = self.expert_stack(tokens, index, gate.reshape(-1, 1), expert_order)
        hidden_states = hidden_states + delta.view_as(hidden_states)
        idle = self.bare_router.stage1_parameters()
        if idle and self.frozen_router.is_frozen and self.training and is_distributed():
            # With a gradient of zero: DistributedDataParallel stops at a parameter without gradient unless it looks for
            # unused ones, which activation checkpointing forbids, and ZeRO-3 would take the last one again.
            hidden_states = hidden_states + zero_through(idle, self).to(hidden_states.dtype)
        return hidden_states

    def _run_experts(self, tokens: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """Compute what the experts add to the tokens, `(T, D), (T, 1), (T, 1) -> (T, D)`."""
        if self.expert_stack.num_experts < self.num_experts:
            # Expert parallelism sends every token to some process.
            tokens, index, gate = spread_sentinels(tokens, index, gate, self.num_experts)
        if self.shares_experts and not self.frozen_router.is_frozen:
            return self.expert_stack.forward_shared(tokens, index, gate)
        return self.expert_stack(tokens, index, gate)

    def knows_ahead(self, token_ids: Tensor) -> bool:
        """Tell whether this layer's dispatch can be computed before its own forward pass begins.

        Not where a sharding engine or an offloading hook brings the frozen router with the layer, nor under expert
        parallelism, whose hooks turn experts into those of each process.
        """
        return (
            self.frozen_router.is_frozen
            and self.expert_stack.num_experts == self.num_experts
            and all(is_at_hand(values, token_ids.device) for values in self.frozen_router.buffers())
        )

    @property
    def bare_router(self) -> Router:
        """`Router`: the router itself, where PEFT has wrapped it to adapt its parameters (`target_parameters`)."""
        return self.router.get_base_layer() if hasattr(self.router, "get_base_layer") else self.router

    def route(self, token_ids: Tensor, context: TokenContext | None = None) -> Tensor:
        """Give the experts that inference would use: the frozen ones, or the distilled router's while it learns.

        Args:
            token_ids (`torch.LongTensor` of any shape; of shape `(batch, sequence)` where there is a context): in
                [0, vocab_size).
            context (`TokenContext`, *optional*): what came before, for a distilled router that looks back.

        Returns:
            `torch.LongTensor` of the shape of `token_ids`: in [0, num_experts).
        """
        if self.frozen_router.is_frozen:
            return self.frozen_router(token_ids, context)
        return self.bare_router.assign(token_ids, context)

    @property
    def is_routed_by_token(self) -> bool:
        """`bool`: whether token ids alone, a token's own or earlier ones too, decide which experts inference uses."""
        return self.frozen_router.is_frozen or self.bare_router.distilled_router is not None

    def resize(self, vocab_size: int):
        """Follow the vocabulary to a new size; see `resize` of the frozen router for the experts of new ids."""
        self.bare_router.resize(vocab_size)
        self.frozen_router.resize(vocab_size)


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


def dispatch_ahead(
    layers: Sequence[StableMoELayer],
    token_ids: Tensor | None,
    token_mask: Tensor | None,
    context: TokenContext | None,
    sort: bool,
) -> list[tuple | None]:
    """Look up and sort the tokens of all frozen MoE layers at once, from the token ids alone.

    Args:
        layers (sequence of `StableMoELayer`): of one backbone.
        token_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): see `StableMoELayer.forward`.
        token_mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): likewise.
        context (`TokenContext`, *optional*): likewise.
        sort (`bool`): whether the experts' backend wants them sorted.

    Returns:
        `list`: one plain tuple per layer: the expert of each token, `(batch, sequence)`; the same for the experts, which get
        sentinels of what takes no part, `(T, 1)`; and that sorted, in the order of `ExpertOrder`, or `None`. `None` for each
        layer where one of them cannot know: see `knows_ahead`.
    """
    if not layers or not all(layer.knows_ahead(token_ids) for layer in layers):
        return [None] * len(layers)
    chosen = [layer.frozen_router(token_ids, context) for layer in layers]
    sent = [layer.dispatch.send(index, token_mask) for layer, index in zip(layers, chosen, strict=True)]
    for layer, index in zip(layers, sent, strict=True):
        if layer.fetch_experts is not None:
            layer.fetch_experts(index)
    orders: list[tuple | None] = [None] * len(layers)
    if sort:
        may_drop = any(layer.dispatch.may_drop(token_mask) for layer in layers)
        sorted_tokens = sort_by_expert(torch.stack(sent).squeeze(-1), layers[0].num_experts, may_drop)
        orders = [tuple(order) for order in sorted_tokens]
    return list(zip(chosen, sent, orders, strict=True))


def token_mask(attention_mask: Tensor | None, sequence_length: int, cache: Cache | None = None) -> Tensor | None:
    """Read from an attention mask which of the tokens of a pass are real.

    Args:
        attention_mask (`torch.Tensor`, *optional*): of shape `(batch, past + sequence or more)`, 0 on padding. A mask of
            any other kind belongs to the attention implementation and tells nothing of padding.
        sequence_length (`int`): tokens of the pass.
        cache (`Cache`, *optional*): of earlier tokens, before the blocks add those of the pass.

    Returns:
        `torch.BoolTensor` of shape `(batch, sequence)`, or `None`: every token is real.

    Raises:
        ValueError: see `new_columns`.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    return new_columns(attention_mask, sequence_length, cache).bool()


def mask_of_pass(attention_mask: Tensor | None, cache: Cache | None, *inputs: Tensor | None) -> Tensor | None:
    """Read what `token_mask` does, for use after the pass: by then the blocks have added its tokens to the cache.

    Args:
        attention_mask (`torch.Tensor`, *optional*): as given to the pass.
        cache (`Cache`, *optional*): as given to the pass.
        *inputs (`torch.Tensor`, *optional*): ids or embeddings of the pass, of shape `(batch, sequence, ...)`.

    Returns:
        `torch.Tensor`, *optional*: without a cache `attention_mask` itself.
    """
    given = next((tokens for tokens in inputs if tokens is not None), None)
    if cache is None or given is None:
        return attention_mask
    return token_mask(attention_mask, given.shape[1], cache)


def final_token_mask(attention_mask: Tensor | None, sequence_length: int) -> Tensor | None:
    """Do what `token_mask` does for a batch whose mask ends where it does, as in training: a cache may have moved on."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -sequence_length:].bool()


def count_real_tokens(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Count the tokens of a batch that are not padding.

    Args:
        tokens (`torch.Tensor` of shape `(batch, sequence, ...)`): ids or embeddings.
        attention_mask (`torch.Tensor`, *optional*): see `final_token_mask`.

    Returns:
        `torch.LongTensor` of shape `()`, on the device of `tokens`.
    """
    mask = final_token_mask(attention_mask, tokens.shape[1])
    if mask is None:
        return torch.full((), tokens.shape[0] * tokens.shape[1], device=tokens.device)
    return mask.sum()


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


__all__ = [
    "StableMoELayer",
    "count_real_tokens",
    "dispatch_ahead",
    "final_token_mask",
    "mask_of_pass",
    "moe_layers_of",
    "token_mask",
]
