# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What a forward pass says of its tokens: their ids, which are real, and the earlier ones that a router may look back at.

Shape suffixes: B batch, S tokens to be routed, C tokens of the context.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.utils import is_torchdynamo_compiling

from .configuration_stablemoe import StableMoEBaseConfig


class Tokens(NamedTuple):
    """The tokens of a pass, as routers see them.

    Between modules it is a plain tuple, read by `Tokens.of`: hooks of other programs take apart and rebuild what passes.

    Attributes:
        token_ids (`torch.LongTensor` of shape `(B, S)`): in [0, V).
        token_mask (`torch.BoolTensor` of shape `(B, S)`, *optional*): False on padding; `None` means all are real.
        context_ids (`torch.LongTensor` of shape `(B, C)`, *optional*): from the start of each sequence; nothing depends on
            what follows the last token to be routed. `None`, with all that follow, where routers see the token alone.
        context_mask (`torch.BoolTensor` of shape `(B, C)`, *optional*): False on padding; `None` means all are real.
        positions (`torch.LongTensor` of shape `(S,)`, *optional*): where in the context the tokens to be routed stand.
        sequences (`torch.LongTensor` of shape `(B, C)`, *optional*): of packed rows the number of each token's sequence in
            its row, which does not fall from one token to the next; `None` where a row is one sequence.
        rows (`torch.LongTensor` of shape `(B, S)`, *optional*): the row of each token in tables of routing, in [0, R); `None`
            where that is its id.
    """

    token_ids: Tensor
    token_mask: Tensor | None = None
    context_ids: Tensor | None = None
    context_mask: Tensor | None = None
    positions: Tensor | None = None
    sequences: Tensor | None = None
    rows: Tensor | None = None

    @property
    def table_rows(self) -> Tensor:
        """`torch.LongTensor` of shape `(B, S)`: the row of each token in tables of routing."""
        return self.token_ids if self.rows is None else self.rows

    @classmethod
    def of(cls, tokens: tuple | Tensor) -> "Tokens":
        """Name the parts of a plain tuple; ids alone are real tokens, each seen by itself."""
        return cls(tokens) if isinstance(tokens, Tensor) else cls(*tokens)


def whole_sequences(token_ids: Tensor, mask: Tensor | None = None, sequences: Tensor | None = None) -> tuple:
    """Return whole sequences, all of which are to be routed, `(B, S)` each, as a tuple in the order of `Tokens`."""
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)
    return token_ids, mask, token_ids, mask, positions, sequences


def real_first(tokens: tuple) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put the padding of a context behind its real tokens, so that none of them sees it, wherever it stood.

    Returns:
        `tuple`: ids and numbers of sequences in that order, `(B, C)` each; and where each of the context stands there, `(B, C)`,
            `None` where nothing has moved.
    """
    _, _, ids, mask, _, sequences, _ = Tokens.of(tokens)
    if sequences is None:
        sequences = torch.zeros_like(ids)
    if mask is None:
        return ids, sequences, None
    places = torch.where(mask, mask.cumsum(-1), mask.sum(-1, keepdim=True) + (~mask).cumsum(-1)) - 1
    ids, sequences = (torch.empty_like(values).scatter(-1, places, values) for values in (ids, sequences))
    return ids, sequences, places


def of_routed_tokens(values: Tensor, tokens: tuple, places: Tensor | None) -> Tensor:
    """Pick the tokens to be routed out of values in the order of `real_first`, `(B, C) -> (B, S)` or `(B, C, F) -> (B, S, F)`."""
    positions = Tokens.of(tokens).positions
    if places is None:
        return values[:, positions]
    # `take_along_dim` would fix batch and length in an exported program.
    places = places[:, positions]
    return values.gather(1, places if values.dim() == 2 else places.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def previous_ids(tokens: tuple) -> Tensor:
    """Return the id before each token to be routed in its sequence, `(B, S)`; -1 where there is none, or none is known."""
    if Tokens.of(tokens).context_ids is None:
        return torch.full_like(Tokens.of(tokens).token_ids, -1)
    ids, sequences, places = real_first(tokens)
    before, of = (F.pad(values, (1, 0), value=-1)[:, :-1] for values in (ids, sequences))
    return of_routed_tokens(before.masked_fill(of != sequences, -1), tokens, places)


def with_rows(tokens: tuple | Tensor, config: StableMoEBaseConfig) -> tuple:
    """Add the rows of tokens in tables of routing, unless they are there: V h + p of the h-th split id, from 1, after id p."""
    tokens = Tokens.of(tokens)
    if not config.split_token_ids or tokens.rows is not None:
        return tuple(tokens)
    previous, rows = previous_ids(tuple(tokens)), tokens.token_ids
    # Numbers, not a tensor of them, which would have to be sent to the device in every pass.
    for part, token_id in enumerate(config.split_token_ids, start=1):
        is_split = (tokens.token_ids == token_id) & (previous >= 0)
        rows = torch.where(is_split, part * config.vocab_size + previous, rows)
    return tuple(tokens._replace(rows=rows))


def packed_sequences(
    shape: tuple[int, int], position_ids: Tensor | None, cu_seq_lens: Tensor | None = None
) -> Tensor | None:
    """Number the sequences that are packed into each row, `(B, S)`, as attention tells them apart.

    A sequence begins wherever a position is not the one before it and 1; `cu_seq_lens`, where sequences begin and end,
    of all rows in one, go before that. `None` without both.
    """
    if cu_seq_lens is not None:
        places = torch.arange(shape[0] * shape[1], dtype=cu_seq_lens.dtype, device=cu_seq_lens.device)
        return torch.bucketize(places, cu_seq_lens, right=True).view(shape)
    if position_ids is None:
        return None
    begins = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    return begins.cumsum(-1).expand(shape)


def cached_sequences(
    cache: Cache, num_blocks: int, token_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Add tokens to the ids that a cache holds; return `context_ids`, `context_mask`, `positions` of `Tokens`.

    The ids are one more layer of the cache, after those of `num_blocks` blocks, shaped like the keys of one head of
    width 1. So whatever is done to keys and values (beams reordered, candidates cropped, rows repeated or selected) is
    done to them.

    Raises:
        ValueError: for a cache that is offloaded, or holds keys of tokens whose ids it does not hold.
    """
    layer = _id_layer(cache, num_blocks)
    if cache.layers[0].is_initialized:
        _check_lengths(cache.layers[0], layer)
    positions = torch.arange(token_ids.shape[1], device=token_ids.device) + layer.get_seq_length()
    states = token_ids.long()[:, None, :, None]
    ids = layer.update(states, states)[0][:, 0, :, 0]
    if attention_mask is None:
        return ids, None, positions
    # A static cache has room for tokens to come; of a mask that is wider, nothing is read.
    return ids, F.pad(attention_mask.bool(), (0, ids.shape[1] - attention_mask.shape[1])), positions


def new_columns(values: Tensor, length: int, cache: Cache | None) -> Tensor:
    """Pick the columns of a pass out of values that begin where the sequences do, such as an attention mask.

    The cache is as before the blocks add the tokens of the pass.

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


def token_mask(attention_mask: Tensor | None, sequence_length: int, cache: Cache | None = None) -> Tensor | None:
    """Read which tokens of a pass are real, `(B, S)`; `None` means that all are.

    An attention mask of another shape than `(B, past + S or more)` belongs to the attention implementation and does
    not show padding. The cache is as before the blocks add the tokens of the pass.

    Raises:
        ValueError: if the mask ends before the tokens do, where looking costs nothing.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    return new_columns(attention_mask, sequence_length, cache).bool()


def mask_of_pass(attention_mask: Tensor | None, cache: Cache | None, *inputs: Tensor | None) -> Tensor | None:
    """Read which tokens of a pass are real before it runs, for use after it: by then the blocks have filled the cache.

    Without a cache that is `attention_mask` itself. `inputs` are ids or embeddings of the pass.
    """
    given = next((tokens for tokens in inputs if tokens is not None), None)
    if cache is None or given is None:
        return attention_mask
    return token_mask(attention_mask, given.shape[1], cache)


def final_token_mask(attention_mask: Tensor | None, sequence_length: int) -> Tensor | None:
    """Read which tokens of a batch are real whose mask ends where it does, as in training: a cache may have moved on."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -sequence_length:].bool()


def count_real_tokens(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Count the tokens of a batch of ids or embeddings, `(B, S, ...)`, that are not padding, on their device."""
    mask = final_token_mask(attention_mask, tokens.shape[1])
    if mask is None:
        return torch.full((), tokens.shape[0] * tokens.shape[1], device=tokens.device)
    return mask.sum()


def _id_layer(cache: Cache, num_blocks: int) -> CacheLayerMixin:
    """Find the layer of a cache that holds token ids, appending it where there is none yet."""
    if cache.offloading:
        raise ValueError(
            "This model looks back at token ids, which live in the cache, and an offloaded cache cannot hold them. "
            'Generate without `cache_implementation="offloaded"` or "offloaded_static".'
        )
    while len(cache.layers) < num_blocks:  # a cache without a config makes its layers as they are needed
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) == num_blocks:
        static = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
        if static and all(layer.is_sliding for layer in static):
            raise ValueError(
                "This model looks back at token ids, and a static cache whose blocks all have sliding windows does not say how "
                "many to keep. Generate without `cache_implementation`."
            )
        longest = max((layer.max_cache_len for layer in static), default=0)
        cache.layers.append(StaticLayer(max_cache_len=longest) if static else DynamicLayer())
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
            f"The cache holds keys of {int(cached)} tokens but the ids of {int(known)}, and this model looks back at ids. "
            "Pass a cache that this model has filled from the start, or none."
        )


__all__ = [
    "Tokens",
    "cached_sequences",
    "count_real_tokens",
    "final_token_mask",
    "mask_of_pass",
    "new_columns",
    "of_routed_tokens",
    "packed_sequences",
    "previous_ids",
    "real_first",
    "token_mask",
    "whole_sequences",
    "with_rows",
]
