# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""`Seq2SeqTrainer` whose evaluation gives the same numbers for any batch size and any number of processes."""

from transformers import Seq2SeqTrainer

from .token_batches import row_lengths


class TranslationTrainer(Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that evaluates exactly; it trains like its parent.

    - `eval_loss` is the mean over target tokens, so that exp(eval_loss) is the perplexity: the parent averages the
      means of batches, which depends on how sentences were put into batches.
    - Every sentence counts once: the parent counts those again that fill up the last batch of several processes.
    """

    _targets_per_row: float | None = None

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """Evaluate or predict; arguments as those of `Trainer.evaluation_loop`."""
        self._targets_per_row = float(row_lengths(dataloader.dataset, "labels").mean())
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """Run one batch; arguments as those of `Seq2SeqTrainer.prediction_step`."""
        num_rows = self._num_new_rows(len(inputs["labels"]))
        labels = inputs["labels"].clone()
        labels[num_rows:] = -100
        loss, predictions, _ = super().prediction_step(
            model, {**inputs, "labels": labels}, prediction_loss_only, ignore_keys=ignore_keys, **gen_kwargs
        )
        if loss is not None:
            # Batches are weighed by their rows from here on.
            loss = loss * labels.ne(-100).sum().to(loss.device) / (max(num_rows, 1) * self._targets_per_row)
        return loss, predictions, None if prediction_loss_only else labels.to(self.args.device)

    def _num_new_rows(self, batch_size: int) -> int:
        """Count the rows of this process's batch that fill up no last batch: they come first, over all processes."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return batch_size
        return min(max(state.remainder - self.args.process_index * batch_size, 0), batch_size)


__all__ = ["TranslationTrainer"]
