# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The tokens that a router may look back at, and how a key/value cache carries them from one step to the next.

Shape suffixes: B batch, S tokens to be routed, C tokens of the context.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.utils import is_torchdynamo_compiling


# The sequences so far, as a plain tuple, which hooks of other programs may take apart and rebuild:
#   ids, `torch.LongTensor` of shape `(B, C)`: from the start of each sequence; nothing depends on what follows the last
#     token to be routed;
#   mask, `torch.BoolTensor` of shape `(B, C)`, or None where every token is real: False on padding;
#   positions, `torch.LongTensor` of shape `(S,)`: where in the context the tokens to be routed stand;
#   sequences, `torch.LongTensor` of shape `(B, C)`, or None where a row is one sequence: of packed rows the number of each
#     token's sequence in its row, which does not fall from one token to the next.
TokenContext = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def whole_context(token_ids: Tensor, mask: Tensor | None = None, sequences: Tensor | None = None) -> TokenContext:
    """Make the context of whole sequences, every token of which is to be routed.

    Args:
        token_ids (`torch.LongTensor` of shape `(B, S)`): from the start of each sequence.
        mask (`torch.BoolTensor` of shape `(B, S)`, *optional*): False on padding.
        sequences (`torch.LongTensor` of shape `(B, S)`, *optional*): see `TokenContext`.

    Returns:
        `TokenContext`
    """
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)
    return token_ids, mask, positions, sequences


def packed_sequences(
    shape: tuple[int, int], position_ids: Tensor | None, cu_seq_lens: Tensor | None = None
) -> Tensor | None:
    """Number the sequences that are packed into each row, as attention tells them apart.

    Args:
        shape (`tuple[int, int]`): B and S.
        position_ids (`torch.LongTensor` of shape `(B or 1, S)`, *optional*): a sequence begins wherever one is not the
            one before it and 1.
        cu_seq_lens (`torch.IntTensor` of shape `(sequences + 1,)`, *optional*): where sequences begin and end, of all rows
            in one; goes before `position_ids`.

    Returns:
        `torch.LongTensor` of shape `(B, S)`, *optional*: see `TokenContext`.
    """
    if cu_seq_lens is not None:
        places = torch.arange(shape[0] * shape[1], dtype=cu_seq_lens.dtype, device=cu_seq_lens.device)
        return torch.bucketize(places, cu_seq_lens, right=True).view(shape)
    if position_ids is None:
        return None
    begins = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    return begins.cumsum(-1).expand(shape)


def cached_context(
    cache: Cache, num_blocks: int, token_ids: Tensor, attention_mask: Tensor | None = None
) -> TokenContext:
    """Add tokens to the ids that a cache holds, and give all of them.

    The ids are one more layer of the cache, after those of the blocks, shaped like the keys of one head of width 1. So
    whatever is done to keys and values (beams reordered, candidates cropped, rows repeated or selected) is done to them.

    Args:
        cache (`Cache`): before the blocks have added these tokens to it.
        num_blocks (`int`): blocks that keep keys and values in it.
        token_ids (`torch.LongTensor` of shape `(B, S)`): the new tokens.
        attention_mask (`torch.Tensor` of shape `(B, past + S or more)`, *optional*): 0 on padding.

    Returns:
        `TokenContext`

    Raises:
        ValueError: for a cache that is offloaded, or holds keys of tokens whose ids it does not hold; for an attention
            mask of another width.
    """
    layer = _id_layer(cache, num_blocks)
    if cache.layers[0].is_initialized:
        _check_lengths(cache.layers[0], layer)
    positions = torch.arange(token_ids.shape[1], device=token_ids.device) + layer.get_seq_length()
    states = token_ids.long()[:, None, :, None]
    ids = layer.update(states, states)[0][:, 0, :, 0]
    if attention_mask is None:
        return ids, None, positions, None
    # A static cache has room for tokens to come; of a mask that is wider, nothing is read.
    return ids, F.pad(attention_mask.bool(), (0, ids.shape[1] - attention_mask.shape[1])), positions, None


def new_columns(values: Tensor, length: int, cache: Cache | None) -> Tensor:
    """Pick those of a pass out of values that begin where the sequences do: attention reads a mask from the left.

    Args:
        values (`torch.Tensor` of shape `(B, past + S or more)`): such as an attention mask.
        length (`int`): S, tokens of the pass.
        cache (`Cache`, *optional*): before the blocks have added these tokens to it.

    Returns:
        `torch.Tensor` of shape `(B, S)`

    Raises:
        ValueError: if the values end before the tokens do, where looking costs nothing.
    """
    past = 0 if cache is None else cache.get_seq_length()
    # A static cache counts on the device, where looking would cost a wait.
    is_counted_on_device = isinstance(past, Tensor)
    if not is_torchdynamo_compiling() and not (is_counted_on_device and past.device.type != "cpu"):
        num_tokens = int(past) + length
        if values.shape[1] < num_tokens:
            raise ValueError(
                f"`attention_mask` covers {values.shape[1]} tokens, cache and input together have {num_tokens}: "
                "pass it for the whole sequence, (batch, past + sequence)."
            )
    if is_counted_on_device:
        return values.index_select(1, torch.arange(length, device=values.device) + past.to(values.device))
    return values[:, past : past + length]


def _id_layer(cache: Cache, num_blocks: int) -> CacheLayerMixin:
    """Find the layer of a cache that holds token ids, appending it where there is none yet."""
    if cache.offloading:
        raise ValueError(
            "This router looks back at token ids, which live in the cache, and an offloaded cache cannot hold them. "
            'Generate without `cache_implementation="offloaded"` or "offloaded_static".'
        )
    while len(cache.layers) < num_blocks:  # a cache without a config makes its layers as they are needed
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) == num_blocks:
        first = cache.layers[0]
        static = isinstance(first, StaticLayer)
        cache.layers.append(StaticLayer(max_cache_len=first.max_cache_len) if static else DynamicLayer())
    return cache.layers[num_blocks]


def _check_lengths(block: CacheLayerMixin, layer: CacheLayerMixin):
    """Refuse a cache that other code has filled: it holds keys of tokens whose ids nobody knows."""
    cached, known = block.get_seq_length(), layer.get_seq_length()
    # Only where looking costs nothing: a static cache counts on the device.
    if block.is_compileable and (is_torchdynamo_compiling() or block.device.type != "cpu"):
        return
    if layer.is_initialized and layer.keys.dtype != torch.long:
        known = 0
    if int(cached) != int(known):
        raise ValueError(
            f"The cache holds keys of {int(cached)} tokens but the ids of {int(known)}, and this router looks back at ids. "
            "Pass a cache that this model has filled from the start, or none."
        )


__all__ = ["TokenContext", "cached_context", "new_columns", "packed_sequences", "whole_context"]
