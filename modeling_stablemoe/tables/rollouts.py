# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Reinforcement learning: the routes that router replay asks for, without replay, and how far rollout and training agree.

Shape suffixes: L layers, S tokens of a sequence, K experts of a token.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_stablemoe.model.context_stablemoe import final_token_mask
from modeling_stablemoe.model.losses_stablemoe import is_distributed, sum_across_processes
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin
from modeling_stablemoe.model.versions_stablemoe import name_cache
from modeling_stablemoe.training.logging_callback import LoggingCallback

from .installing import HASH_TABLE, RouterWithTable, is_learned, routers_of
from .recording import RoutedPass, RouteRecorder, choosers_of


logger = logging.getLogger(__name__)


@torch.no_grad()
def routed_experts(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return the experts of a sequence as pipelines of reinforcement learning record them, read off the tables of the model.

    It is the array that SGLang's `return_routed_experts` and vLLM's `enable_return_routed_experts` return of a rollout, and that
    slime and miles replay in training: a row for each token but the last, which no pass reads; of a model of transformers a column
    for each block, those without experts filled with zeros; integers of 32 bits.

    Args:
        model (`PreTrainedModel`): a StableMoE without encoder whose routing is frozen, or a model of transformers whose layers with
            experts all route by tables; with any head.
        input_ids (`torch.LongTensor` of shape `(tokens,)`): prompt and completion, without padding.

    Returns:
        `torch.IntTensor` of shape `(tokens - 1, layers, k)`, on the CPU. Layers of a StableMoE are its MoE layers.

    Raises:
        ValueError: if a layer routes by what it reads, so that only the rollout itself knows where it went.
    """
    read = input_ids[:-1]
    if isinstance(model, TwoStageRoutingMixin):
        choosers_of(model)  # refuses encoders and dense models
        if model.routing_stage == 1:
            raise ValueError(
                "The routing of this StableMoE is still learned: freeze it first, with `freeze_router()`."
            )
        routes = model.route(read.unsqueeze(0).to(model.device))[:, 0]
        return routes.reshape(len(routes), len(read), -1).transpose(0, 1).int().cpu()
    routers = routers_of(model)
    learned = [layer for layer, router in routers.items() if is_learned(router)]
    if learned:
        raise ValueError(
            f"Layers {learned} route by hidden states: where a rollout went, only the engine that made it knows. Record it there, or "
            "freeze these layers (`install_tables`)."
        )
    tables = {
        layer: router.routing_table if isinstance(router, RouterWithTable) else router.get_buffer(HASH_TABLE)
        for layer, router in routers.items()
    }
    k = next(iter(tables.values())).shape[1]
    routes = torch.zeros(len(read), model.config.num_hidden_layers, k, dtype=torch.int32)
    for layer, table in tables.items():
        routes[:, layer] = table[read.to(table.device)].int().cpu()
    return routes


class _Rollout(NamedTuple):
    """A sequence that was generated, without its last token, on the CPU."""

    ids_S: Tensor
    routes_LSK: Tensor


class RoutingMismatchCallback(LoggingCallback):
    """Logs how many tokens of its own rollouts a trainer sends to other experts than the generation did, as `routing_mismatch`.

    It is the share of tokens whose experts differ in at least one layer, between the passes of `generate` and those that are trained
    on, since the last log: rounding, precision, and whatever training has moved in between. For trainers that generate with the
    model that they train, as TRL's `GRPOTrainer` and `RLOOTrainer` do without vLLM. Works with any decoder of transformers with
    experts and with a StableMoE, PEFT around it or not.

    Raises:
        ValueError: at the start of training, for a model without experts or with an encoder, or for rollouts by continuous batching.
    """

    def __init__(self):
        self._recorder: RouteRecorder | None = None
        self._passes: list[tuple[Tensor, Tensor, Tensor | None]] = []  # ids, routes, mask
        self._rollouts: list[_Rollout] = []
        self._is_trained_on = False
        self._has_compared = False
        self._counts = torch.zeros(2, dtype=torch.long)  # tokens with other experts, tokens

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Watch the passes of the model."""
        if getattr(args, "use_transformers_continuous_batching", False):  # a field of TRL's
            raise ValueError(
                "`use_transformers_continuous_batching` mixes rollouts in a pass, where this callback cannot tell them apart. Leave it "
                'out, or measure with `measure_mismatch(model, sequences, ["continuous"])`.'
            )
        bare = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        if self._recorder is not None:  # of a training that was interrupted
            self._recorder.__exit__()
        self._recorder = RouteRecorder(bare, self._see)
        self._recorder.__enter__()

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        """Add the share to a log of training."""
        if logs is None or "loss" not in logs:
            return
        counts = self._counts
        if is_distributed():
            counts = sum_across_processes(counts.to(model.device)).cpu()
        if counts[1]:
            self._add(logs, state, {"routing_mismatch": int(counts[0]) / int(counts[1])})
            self._has_compared = True
        self._counts = torch.zeros_like(counts)

    def on_train_end(self, args, state, control, **kwargs):
        """Watch no longer; warn if nothing that was trained on had been generated here."""
        self._recorder.__exit__()
        self._passes, self._rollouts = [], []
        if not self._has_compared and state.is_world_process_zero:
            logger.warning("No trained sequence was generated by the model itself: there is no `routing_mismatch`.")

    def _see(self, routed: RoutedPass):
        cache = name_cache(routed.arguments, "cache").get("cache")
        if cache is None:
            if torch.is_grad_enabled():
                self._compare(routed)
            return
        if self._is_trained_on:
            self._rollouts, self._is_trained_on = [], False
        if cache.get_seq_length() == routed.input_ids.shape[1]:  # the first pass of a generation
            self._close()
        self._passes.append((routed.input_ids, routed.routes, _mask_of(routed)))

    def _close(self):
        """Take the passes of a generation apart into its sequences."""
        if not self._passes:
            return
        ids, routes, masks = zip(*self._passes, strict=True)
        ids_BS, routes_LBSK = torch.cat(ids, 1).cpu(), torch.cat(routes, 2).cpu()
        for row, ids_S in enumerate(ids_BS):
            num_padded = 0 if masks[0] is None else int((~masks[0][row]).sum())
            self._rollouts.append(_Rollout(ids_S[num_padded:], routes_LBSK[:, row, num_padded:]))
        self._passes = []

    def _compare(self, routed: RoutedPass):
        """Compare sequences that are trained on with the rollouts that they are."""
        self._close()
        self._is_trained_on = True
        mask_BS = _mask_of(routed)
        ids_BS, routes_LBSK = routed.input_ids.cpu(), routed.routes.cpu()
        is_real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS.cpu()
        for row, is_real_S in enumerate(is_real_BS):
            ids_S = ids_BS[row, is_real_S][:-1]
            rollout = next((each for each in self._rollouts if torch.equal(each.ids_S[: len(ids_S)], ids_S)), None)
            if rollout is not None:
                routes_LSK = routes_LBSK[:, row, is_real_S][:, :-1]
                differs_S = (rollout.routes_LSK[:, : len(ids_S)] != routes_LSK).any(-1).any(0)
                self._counts += torch.tensor([int(differs_S.sum()), len(ids_S)])


def _mask_of(routed: RoutedPass) -> Tensor | None:
    """Return True for the real tokens of a pass, `(B, S)`; None where all are."""
    return final_token_mask(routed.arguments.get("attention_mask"), routed.input_ids.shape[1])


__all__ = ["RoutingMismatchCallback", "routed_experts"]
