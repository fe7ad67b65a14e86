# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Whether a translation checkpoint was trained in the direction that a command line names."""

import logging

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_stablemoe.data import TokenBatchCollator, encode_pairs


logger = logging.getLogger(__name__)

# Enough for a mean loss that tells directions apart, at a cost of one small batch.
_NUM_PAIRS = 16
# In nats per token: unlike languages alone make less, the wrong direction of a trained model several.
_CLEARLY_LESS = 1.0


def warn_of_wrong_direction(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, validation: Dataset):
    """Warn if a trained model predicts the sources from the targets far better than the targets from the sources.

    Args:
        model (`PreTrainedModel`): loaded from a checkpoint; it is left in the mode that it is in.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        validation (`Dataset`): of `load_parallel_corpus`.
    """
    of_rows = np.array(validation["pair"])
    for pair in validation.unique("pair"):
        rows = validation.select(np.flatnonzero(of_rows == pair)[:_NUM_PAIRS])
        turned = rows.rename_columns({"source": "target", "target": "source"})
        given, other = (_loss(model, tokenizer, each) for each in (rows, turned))
        if other < given - _CLEARLY_LESS:
            logger.warning(
                "Check the direction of %s: the checkpoint predicts its sources from its targets (loss %.2f) far better "
                "than its targets from its sources (%.2f). If it was trained the other way round, name `--language_pairs "
                "%s`, or exchange the columns or files.",
                pair,
                other,
                given,
                "-".join(reversed(pair.split("-"))),
            )


@torch.inference_mode()
def _loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> float:
    longest = model.config.max_position_embeddings
    encoded = encode_pairs(DatasetDict(validation=rows), tokenizer, longest, longest)["validation"]
    batch = TokenBatchCollator(tokenizer)([{name: row[name] for name in ("input_ids", "labels")} for row in encoded])
    was_training = model.training
    loss = model.eval()(**batch.to(model.device)).loss.item()
    model.train(was_training)
    return loss


__all__ = ["warn_of_wrong_direction"]
