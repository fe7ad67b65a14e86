# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What every head does with the routing of a pass: from what routers decided to the loss that is trained, and to the output.

One way for all model families. A side is a backbone with MoE layers: the only one of a language model and a classifier,
encoder and decoder of a translation model, whose names begin its fields of the output.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput, is_torchdynamo_compiling, logging

from .backbone_stablemoe import StableMoEBackbone
from .context_stablemoe import token_mask
from .health_stablemoe import RoutingHealth, mean_health, routing_health
from .losses_stablemoe import routing_losses, share_of_targets, token_weights
from .routing_stablemoe import RECORDED, Routing
from .versions_stablemoe import CACHE_NAME


logger = logging.get_logger(__name__)

# Fields of an output that are computed here, where the routing was recorded.
ROUTING_FIELDS = (
    "aux_loss",
    "encoder_aux_loss",
    "decoder_aux_loss",
    "balance_loss",
    "distillation_loss",
    "expert_load",
    "distillation_agreement",
    "routing_health",
)


class RoutingHeadMixin:
    """What a `StableMoEPreTrainedModel` gains that has a head on `model`."""

    @property
    def sides(self) -> dict[str, StableMoEBackbone]:
        """`dict[str, StableMoEBackbone]`: the backbones, by what their fields of the output begin with."""
        return {"": self.model}

    def routing_outputs(self, output_router_logits: bool) -> dict[str, bool]:
        """Return what the backbones are to record: in training, all that losses and statistics need.

        Scores of a frozen routing are left out unless someone asks for them: nothing is learned of them, and they would
        cost what the number of experts is.
        """
        recorded = {f"output_{name}": self.training or output_router_logits for name in RECORDED}
        if self.training and not output_router_logits and self.routing_stage == 2:
            recorded["output_router_logits"] = False
        return recorded

    def routing_fields(
        self,
        outputs: ModelOutput,
        attention_masks: tuple[Tensor | None, ...],
        is_target: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> dict[str, Any]:
        """Compute what an output says of the routing, and let routers follow a pass that learns; eq. 11 up to its last sum.

        The task loss is divided by `num_items_in_batch`, so the auxiliary loss of each micro-batch, a mean, must count
        for its share of it: else it would grow with the number of micro-batches and processes.

        Args:
            outputs (`ModelOutput`): of the backbones, with `routing_traces` of each side.
            attention_masks (`tuple[torch.Tensor]`): of each side, as `mask_of_pass` returns them.
            is_target (`torch.BoolTensor` of shape `(batch, ...)`, *optional*): what the task loss predicts of each
                sequence, if there are labels.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): targets of the whole batch.

        Returns:
            `dict`: of `ROUTING_FIELDS`, on the device of the last hidden state; of a pass through no MoE layer `aux_loss`
                alone, 0.
        """
        device = outputs.last_hidden_state.device  # layers may be on several
        routings = self._routings_of(outputs, is_required=self.training and is_target is not None)
        if not routings:
            return {"aux_loss": torch.zeros((), device=device)}
        is_learning = self._is_learning(outputs.last_hidden_state, routings)
        masks = dict(zip(self.sides, attention_masks, strict=True))
        losses, health = {}, []
        for name, of_side in routings.items():
            mask = token_mask(masks[name], of_side[0].table_rows.shape[1])
            of_losses = self._losses_of_side(
                self.sides[name], of_side, mask, is_learning, is_target, num_items_in_batch
            )
            losses[name] = {field: values.to(device) for field, values in of_losses.items()}
            health += [self._health_of(routing, mask) for routing in of_side]
        if is_learning:
            self._observe(routings, masks)
            if is_target is None:
                self._warn_of_missing_labels()
        loads = torch.cat([side["expert_load"] for side in losses.values()])
        mean = mean_health(health, loads.sum(-1))
        return {
            **{f"{name}aux_loss": side["aux_loss"] for name, side in losses.items()},
            "aux_loss": sum((side["aux_loss"] for side in losses.values()), start=torch.zeros((), device=device)),
            "balance_loss": torch.stack([side["balance_loss"] for side in losses.values()]).sum(),
            "distillation_loss": torch.stack([side["distillation_loss"] for side in losses.values()]).sum(),
            "expert_load": loads,
            "distillation_agreement": mean.distillation_agreement,
            "routing_health": mean,
        }

    def _losses_of_side(
        self,
        backbone: StableMoEBackbone,
        routings: list[Routing],
        mask: Tensor | None,
        is_learning: bool,
        is_target: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """Compute the routing losses of one side's MoE layers, its loads, and `aux_loss`, what of them enters the loss."""
        is_weighed = num_items_in_batch is not None and is_target is not None
        moe_layers = backbone.moe_layers_in_order
        memories = [layer.bare_router.memory for layer in moe_layers]
        losses = routing_losses(
            balance_loss_function=moe_layers[0].bare_router.balance_loss,
            num_experts=self.config.num_experts,
            router_logits=[routing.router_logits for routing in routings],
            distilled_logits=[routing.distilled_logits for routing in routings],
            selected_experts=[routing.selected_experts for routing in routings],
            teacher_experts=[routing.teacher_experts for routing in routings],
            mask=None if mask is None else mask.flatten(),
            # Evaluation and sampling may run on one process alone, where a collective would wait forever.
            across_processes=is_learning,
            token_weight=_token_weight(is_target, mask, routings[0]) if is_weighed else None,
            windows=[memory.load_of_window for memory in memories] if self.config.balance_window_tokens else (),
        )
        aux_loss = self.config.distillation_loss_coef * losses.pop("weighted_distillation_loss")
        weighted_balance_loss = losses.pop("weighted_balance_loss")
        if self.config.balance_loss_coef:
            aux_loss = aux_loss + self._balance_loss_coef() * weighted_balance_loss
        if is_weighed:
            aux_loss = aux_loss * share_of_targets(is_target.sum(), num_items_in_batch, aux_loss.device)
        return losses | {"aux_loss": aux_loss}

    def head_output(
        self,
        output_class: type[ModelOutput],
        outputs: ModelOutput,
        *,
        logits: Tensor,
        task_loss: Tensor | None,
        routing: dict[str, Any],
        output_router_logits: bool,
    ) -> ModelOutput:
        """Put together what a head returns: the loss that is trained (eqs. 11 and 15), and the rest.

        Args:
            output_class (`type`): of the output.
            outputs (`ModelOutput`): of the backbones, whose fields of the same names are kept.
            logits (`torch.Tensor`): of the head.
            task_loss (`torch.Tensor` of shape `()`, *optional*): without labels there is no loss.
            routing (`dict`): of `routing_fields`; empty where the routing was not recorded.
            output_router_logits (`bool`): whether router logits and expert indices were asked for.
        """
        loss = task_loss
        if self.training and loss is not None and self.config.num_moe_layers:
            loss = loss + self.config.routing_loss_factor * routing["aux_loss"].to(loss.device)
        # By name: a symbolic trace of the head has values for `outputs` and `routing` that cannot be unpacked.
        fields = {"loss": loss, "logits": logits, "task_loss": task_loss, CACHE_NAME: outputs.cache}
        for name in output_class.__dataclass_fields__:
            if name in fields:
                continue
            if name in ROUTING_FIELDS:
                fields[name] = routing.get(name)
            elif not name.endswith(RECORDED[:2]):
                fields[name] = outputs.get(name)
            elif output_router_logits:
                fields[name] = outputs.get(name) or None  # a hash has no scores
        return output_class(**fields)

    def _routings_of(self, outputs: ModelOutput, is_required: bool) -> dict[str, list[Routing]]:
        """Read what each side's routers decided, one `Routing` per MoE layer; sides without any are left out.

        Raises:
            ValueError: if it `is_required` in stage 1, and outputs that the caller gives for a side do not hold it.
        """
        routings = {}
        for name, backbone in self.sides.items():
            recorded = outputs.get(f"{name}routing_traces")
            if recorded:
                routings[name] = [Routing(*routing) for routing in recorded]
            elif recorded is None and is_required and backbone.moe_layers_in_order and self.routing_stage == 1:
                raise ValueError(
                    "`encoder_outputs` hold no routing, which training needs for the routing losses. Run the encoder "
                    "with `output_router_logits=True, output_expert_indices=True, output_distilled_router_logits=True, "
                    "output_routing_traces=True`, or pass `input_ids`."
                )
        return routings

    def _is_learning(self, last_hidden_state: Tensor, routings: dict[str, list[Routing]]) -> bool:
        """Return True if a pass belongs to a step that learns: in training mode, and with a gradient of anything.

        Only such a step moves counts and running statistics. Programs sample between steps without leaving training mode,
        and run a second pass under `torch.no_grad()`. A step may train routers alone, or one side on outputs of the other
        that were made before.
        """
        of_layers = [routing for of_side in routings.values() for routing in of_side]
        scores = [values for routing in of_layers for values in (routing.router_logits, routing.distilled_logits)]
        tensors = [last_hidden_state, *(values for values in scores if values is not None)]
        return self.training and any(tensor.requires_grad for tensor in tensors)

    def _health_of(self, routing: Routing, mask: Tensor | None) -> RoutingHealth:
        return routing_health(
            hidden_states=routing.hidden_states,
            token_ids=routing.table_rows.flatten(),
            gate=routing.routing_weights.detach(),
            teacher_index=routing.teacher_experts,
            distilled_index=routing.distilled_experts,
            vocab_size=self.config.num_routing_rows,
            router_logits=routing.router_logits,
            mask=_flat(mask, routing.table_rows.device),
        )

    def _observe(self, routings: dict[str, list[Routing]], masks: dict[str, Tensor | None]):
        """Update what routers count and remember in stage 1; every process must call this."""
        for name, of_side in routings.items():
            for layer, routing in zip(self.sides[name].moe_layers_in_order, of_side, strict=True):
                if not layer.frozen_router.is_frozen:
                    mask = token_mask(masks[name], routing.table_rows.shape[1])
                    layer.bare_router.observe(routing, _flat(mask, routing.table_rows.device))

    def _balance_loss_coef(self) -> Tensor | float:
        """Return the coefficient of the balance loss by now: `balance_loss_warmup_tokens` raises it to the config's."""
        if not self.config.balance_loss_warmup_tokens:
            return self.config.balance_loss_coef
        first = next(iter(self.moe_layers_by_name.values()))
        tokens = first.bare_router.memory()["tokens"][0]
        return self.config.balance_loss_coef * (tokens / self.config.balance_loss_warmup_tokens).clamp(max=1.0)

    def _warn_of_missing_labels(self):
        # Trainer's `compute_loss_func` and its label smoothing take them away.
        if self.routing_stage == 1 and not is_torchdynamo_compiling():
            logger.warning_once(
                "Stage 1 is trained without `labels`, on a loss that is not the model's: the routing is balanced and distilled "
                "only if `config.router_aux_loss_coef * outputs.aux_loss` is added to that loss. Where Trainer's "
                "`compute_loss_func` makes the loss, it is given these outputs."
            )


def _token_weight(is_target: Tensor, mask: Tensor | None, routing: Routing) -> Tensor:
    """Weigh the tokens of each sequence by the targets that it has, `(T,)`."""
    device = routing.table_rows.device
    batch, length = routing.table_rows.shape
    targets = is_target.to(device).reshape(batch, -1).sum(-1)
    return token_weights(targets, None if mask is None else mask.to(device), length, routing.routing_weights.dtype)


def _flat(mask: Tensor | None, device: torch.device) -> Tensor | None:
    return None if mask is None else mask.flatten().to(device)


__all__ = ["ROUTING_FIELDS", "RoutingHeadMixin"]
