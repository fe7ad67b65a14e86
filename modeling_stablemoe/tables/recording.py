# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Which experts the tokens of a pass were sent to, in any MoE of transformers and in a StableMoE.

Shape suffixes: L layers with experts, B batch, S sequence, T tokens, K experts of a token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin

from .installing import routers_of


class RoutedPass(NamedTuple):
    """What a decoder was given, and where it sent it; on the device of the model.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(B, S)`): tokens.
        routes (`torch.LongTensor` of shape `(L, B, S, K)`): experts, in ascending order.
        first (`torch.LongTensor` of shape `(L, B, S)`): the expert of the largest weight.
        arguments (`dict`): what else the decoder was given, by name.
    """

    input_ids: Tensor
    routes: Tensor
    first: Tensor
    arguments: dict[str, Any]


class RouteRecorder:
    """Hands each pass of a decoder on, by forward hooks, while it is used as a context.

    Args:
        model (`PreTrainedModel`): a decoder of transformers with experts, or a StableMoE without encoder, with any head.
        on_pass (callable): is given each `RoutedPass` when it is over.

    Raises:
        ValueError: for a model without experts or with an encoder; during a pass, if it is not given `input_ids`.
    """

    def __init__(self, model: PreTrainedModel, on_pass: Callable[[RoutedPass], object]):
        self._decoder, self._on_pass = model.base_model, on_pass
        self._choosers = choosers_of(model)
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles: list = []

    def __enter__(self) -> "RouteRecorder":
        self._handles = [self._decoder.register_forward_hook(self._hand_on, with_kwargs=True)]
        for layer, chooser in enumerate(self._choosers):
            self._handles.append(chooser.register_forward_hook(partial(self._see, layer)))
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _see(self, layer: int, chooser: nn.Module, args: tuple, output: tuple):
        # Logits, if any, weights, and the choice, which some versions of transformers return first, and logits last.
        index_TK = next(values for values in output if values is not None and not values.is_floating_point())
        self._seen[layer] = index_TK, index_TK.gather(1, output[1].detach().argmax(-1, keepdim=True))

    def _hand_on(self, decoder: nn.Module, args: tuple, kwargs: dict, output: object):
        input_ids = args[0] if args else kwargs.get("input_ids")
        if input_ids is None:
            raise ValueError(
                "Routes are recorded with their tokens, which `inputs_embeds` do not tell: pass `input_ids`."
            )
        in_order = [self._seen[layer] for layer in range(len(self._choosers))]
        self._seen.clear()
        routes_LBSK, first_LBS1 = (
            torch.stack([each.to(input_ids.device).view(*input_ids.shape, -1) for each in layers])
            for layers in zip(*in_order, strict=True)
        )
        self._on_pass(RoutedPass(input_ids, routes_LBSK.sort(-1).values, first_LBS1.squeeze(-1), kwargs))


def choosers_of(model: PreTrainedModel) -> list[nn.Module]:
    """List the modules that return where the tokens of a layer go, one per layer with experts, in order.

    Raises:
        ValueError: for a model without experts, or with an encoder.
    """
    if not isinstance(model, TwoStageRoutingMixin):
        return list(routers_of(model).values())
    if model.config.is_encoder_decoder or not model.moe_layers_by_name:
        kind = "has an encoder" if model.config.is_encoder_decoder else "has no MoE layer"
        raise ValueError(
            f"This {type(model).__name__} {kind}: its routes are not those of one sequence. Pass a decoder with experts."
        )
    return [layer.dispatch for layer in model.moe_layers_by_name.values()]


__all__ = ["RouteRecorder", "RoutedPass", "choosers_of"]
