# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""A head that classifies whole sequences, or scores them (regression), from their last token."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .context_stablemoe import mask_of_pass, token_mask
from .losses_stablemoe import share_of_targets
from .outputs_stablemoe import StableMoESequenceClassifierOutputWithPast
from .versions_stablemoe import takes_cache_by_either_name


class SequenceClassificationMixin:
    """What a model gains that has `model`, a causal backbone, and `score`, a linear layer from its states to labels."""

    @takes_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableMoESequenceClassifierOutputWithPast:
        """Score each label for each sequence.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): padded on either side.
            attention_mask (`torch.Tensor` of shape `(batch, past + sequence)`, *optional*): 0 on padding, not routed.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): by default counted over real tokens.
            cache (`Cache`, *optional*): of earlier positions; `past_key_values` is another name of this argument.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, hidden_size)`, *optional*): in place of
                token embeddings, routed by `input_ids` too where given, else as the nearest tokens.
            labels (`torch.Tensor`, *optional*): by `config.problem_type`, which the first labels determine where it is
                `None`: classes, of shape `(batch,)`, -100 is ignored (`"single_label_classification"`); zeros and ones,
                of shape `(batch, num_labels)` (`"multi_label_classification"`); numbers, of shape `(batch,)` or `(batch,
                num_labels)` (`"regression"`).
            use_cache (`bool`, *optional*): return the cache.
            output_router_logits (`bool`, *optional*): return `router_logits`, `expert_indices` and, in eval mode too,
                `aux_loss`; default `config.output_router_logits`.
            **kwargs: `num_items_in_batch`, the labels of the whole (accumulated, world-wide) batch that the loss is a
                mean over, and those of `StableMoEModel.forward`.

        Returns:
            `StableMoESequenceClassifierOutputWithPast`

        Raises:
            ValueError: for several sequences if neither `pad_token_id` nor a mask shows their ends; for bad input as of
                the backbone.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        mask = mask_of_pass(attention_mask, cache, input_ids, inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **self.routing_outputs(output_router_logits),
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        last = self._last_tokens(input_ids, mask, hidden_states)
        logits = self.score(hidden_states[torch.arange(last.shape[0], device=last.device), last])

        targets = None if labels is None else self.count_targets(labels)
        task_loss, routing = None, {}
        if labels is not None:
            task_loss = self._task_loss(logits, labels, targets, num_items_in_batch)
        if self.training or output_router_logits:
            is_target = None if labels is None else labels.ne(-100)
            routing = self.routing_fields(outputs, (mask,), is_target, num_items_in_batch)
        return self.head_output(
            StableMoESequenceClassifierOutputWithPast,
            outputs,
            logits=logits,
            task_loss=task_loss,
            routing=routing,
            output_router_logits=output_router_logits,
        )

    def _task_loss(
        self, logits: Tensor, labels: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Take the mean over labels, for the share of `num_items_in_batch` that they are.

        transformers' losses for several labels and for regression know no `num_items_in_batch`, so that they would grow
        with the number of micro-batches.
        """
        loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits.float(), config=self.config)
        # A mean over no targets is NaN: 0 / 0.
        loss = torch.where(targets.to(loss.device) > 0, loss, 0.0)
        return (
            loss if num_items_in_batch is None else loss * share_of_targets(targets, num_items_in_batch, loss.device)
        )

    def _last_tokens(self, input_ids: Tensor | None, attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor:
        """Find the last token of each sequence that is not padding, `(batch,)`, as transformers' own heads do.

        That is the rightmost one that is not `pad_token_id`. Without ids, or without such an id, transformers takes the
        last position; here `attention_mask` decides, where there is one.
        """
        batch, length = hidden_states.shape[:2]
        pad_token_id, device = self.config.pad_token_id, hidden_states.device
        if input_ids is not None and pad_token_id is not None:
            is_token = input_ids.ne(pad_token_id).to(device)
        else:
            is_token = token_mask(attention_mask, length)
            if is_token is None and input_ids is not None and batch > 1:
                raise ValueError(
                    f"There are {batch} sequences, and neither `pad_token_id` nor `attention_mask` tells where they end. "
                    "Set `model.config.pad_token_id = tokenizer.pad_token_id`, or pass the mask that the tokenizer gives."
                )
            if is_token is None:
                return torch.full((batch,), length - 1, device=device)
        positions = torch.arange(length, device=device)
        return (positions * is_token.to(device)).argmax(-1)

    def count_targets(self, labels: Tensor | None = None, shift_labels: Tensor | None = None) -> Tensor:
        """Count the labels that the task loss is a mean over, as `Trainer` counts them."""
        return labels.ne(-100).sum()

    def routed_tokens(self, *args, **kwargs) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return what each MoE layer routes of a batch, for statistics: token ids and the mask of real tokens."""
        return self.model.routed_tokens(*args, **kwargs)


__all__ = ["SequenceClassificationMixin"]
