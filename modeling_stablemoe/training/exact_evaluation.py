# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Trainers whose evaluation gives the same numbers for any batch size and any number of processes."""

from torch import Tensor
from transformers import Seq2SeqTrainer, Trainer

from modeling_stablemoe.data.token_batches import row_lengths

from .routing_trainer import RoutingTrainerMixin


class ExactEvaluationMixin:
    """What a `Trainer` gains that evaluates exactly; it trains like its parent.

    - `eval_loss` is the mean over target tokens, so that exp(eval_loss) is the perplexity: `Trainer` averages the means of
      batches, which depends on how rows were put into batches. A balance loss, which models of transformers add to theirs in
      evaluation, too, is left out.
    - Every row counts once: `Trainer` counts those again that fill up the last batch of several processes.
    """

    _targets_per_row: float | None = None

    def mean_targets(self, dataset) -> float:
        """Average the number of target tokens over the rows of a data set."""
        raise NotImplementedError

    def num_targets(self, labels: Tensor) -> Tensor:
        """Count the target tokens in the labels of a batch."""
        raise NotImplementedError

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """Evaluate or predict."""
        self._targets_per_row = self.mean_targets(dataloader.dataset)
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss, in evaluation over the targets of this process."""
        if not model.training:
            num_items_in_batch = None
            if getattr(self.model.config, "output_router_logits", False):
                inputs = {**inputs, "output_router_logits": False}
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **kwargs):
        """Run one batch."""
        num_rows = self._num_new_rows(len(inputs["labels"]))
        labels = inputs["labels"].clone()
        labels[num_rows:] = -100
        loss, predictions, _ = super().prediction_step(
            model, {**inputs, "labels": labels}, prediction_loss_only, ignore_keys=ignore_keys, **kwargs
        )
        if loss is not None:
            # Batches are weighed by their rows from here on.
            loss = loss * self.num_targets(labels).to(loss.device) / (max(num_rows, 1) * self._targets_per_row)
        return loss, predictions, None if prediction_loss_only else labels.to(self.args.device)

    def _num_new_rows(self, batch_size: int) -> int:
        """Count the rows of this process's batch that fill up no last batch: they come first, over all processes."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return batch_size
        return min(max(state.remainder - self.args.process_index * batch_size, 0), batch_size)


class BlockTrainer(ExactEvaluationMixin, RoutingTrainerMixin, Trainer):
    """A `RoutingTrainer` of a language model on blocks of one length, which evaluates exactly."""

    def mean_targets(self, dataset) -> float:
        """Count them in one block: its first token has nothing to be predicted from."""
        return len(next(iter(dataset))["input_ids"]) - 1

    def num_targets(self, labels: Tensor) -> Tensor:
        """Count the labels that are predicted from an earlier token."""
        return labels[:, 1:].ne(-100).sum()


class TranslationTrainer(ExactEvaluationMixin, RoutingTrainerMixin, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` with `RoutingTrainerMixin` on pairs of any length, which evaluates exactly."""

    def mean_targets(self, dataset) -> float:
        """Average the lengths of the targets."""
        return float(row_lengths(dataset, "labels").mean())

    def num_targets(self, labels: Tensor) -> Tensor:
        """Count the labels that are not padding."""
        return labels.ne(-100).sum()


__all__ = ["BlockTrainer", "ExactEvaluationMixin", "TranslationTrainer"]
