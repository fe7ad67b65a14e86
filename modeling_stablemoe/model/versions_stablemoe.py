# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What transformers 5.15 to 5.23 name differently from 5.24 and later: the key/value cache, `past_key_values` before `cache`."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast


# What the installed transformers calls a cache in arguments and outputs.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def name_cache(kwargs: dict[str, Any], name: str = CACHE_NAME) -> dict[str, Any]:
    """Return `kwargs` with the cache, if there is one under either of its names, under `name`.

    Raises:
        ValueError: if two caches are given.
    """
    given = [key for key in ("cache", "past_key_values") if key in kwargs]
    caches = [kwargs[key] for key in given if kwargs[key] is not None]
    if len(caches) > 1:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: pass one of them.")
    others = {key: value for key, value in kwargs.items() if key not in given}
    return others | {name: caches[0] if caches else None} if given else others


def takes_cache_by_either_name(forward: Callable) -> Callable:
    """Decorate a function with an argument `cache` so that callers may name it `past_key_values` as well."""

    @wraps(forward)
    def renamed(*args, **kwargs):
        return forward(*args, **(name_cache(kwargs, "cache") if "past_key_values" in kwargs else kwargs))

    # `generate` looks the name up that it will pass, tracers (llm-compressor's) the one that the function itself has.
    signature = inspect.signature(forward)
    if CACHE_NAME != "cache":
        cache = signature.parameters["cache"]
        parameters = [
            each.replace(name=CACHE_NAME) if each is cache else each for each in signature.parameters.values()
        ]
        variadic = parameters.pop()
        parameters += [cache.replace(kind=inspect.Parameter.KEYWORD_ONLY), variadic]
        signature = signature.replace(parameters=parameters)
    renamed.__signature__ = signature
    return renamed


def cache_argument(cache: Cache | None) -> dict[str, Any]:
    """Return the argument by which a decoder of transformers takes a cache.

    Before 5.24 the paged cache of continuous batching passes through its blocks to the attention functions, as `cache`.
    """
    return {CACHE_NAME if cache is None or isinstance(cache, Cache) else "cache": cache}


def update_cache(
    cache: Cache, key: Tensor, value: Tensor, layer_idx: int, attention_kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Add keys and values, `(batch, heads, sequence, head_dim)`, to a cache, and return those to attend to.

    It may be the paged cache of continuous batching, which changes the arguments that the attention function will get.
    """
    if CACHE_NAME == "cache" or isinstance(cache, Cache):
        return cache.update(key, value, layer_idx, kwargs=attention_kwargs)
    # Before 5.24 the attention functions write to a paged cache themselves, and look for it here.
    attention_kwargs["cache"] = cache
    return key, value


class StableMoEGenerationMixin(GenerationMixin):
    """`GenerationMixin`, for which callers may name a cache `cache` or `past_key_values`."""

    def generate(self, *args, **kwargs):
        """Generate token ids as `GenerationMixin` does."""
        return super().generate(*args, **name_cache(kwargs))

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` looks `inputs_embeds` up in its signature
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        """Make the inputs of the next step as `GenerationMixin` does."""
        return super().prepare_inputs_for_generation(*args, **name_cache(kwargs))

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Make the cache as `GenerationMixin` does; the first place where inputs and final lengths are known.

        Raises:
            ValueError: if generation may pass the last position of the paper's blocks, instead of at the step that does. What
                a `backbone_config` does with longer sequences is its own.
        """
        if getattr(self.config, "backbone_config", None) is None:
            self._check_last_position(model_kwargs, generation_mode, max_cache_length)
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _check_last_position(
        self, model_kwargs: dict[str, Any], generation_mode: GenerationMode, max_cache_length: int
    ):
        padding = 0
        positions = model_kwargs.get("position_ids")
        if positions is not None and positions.numel():  # without any token the forward pass says so
            padding = positions.shape[-1] - 1 - int(positions[..., -1].max())
        elif (mask := model_kwargs.get("decoder_attention_mask")) is not None:
            padding = int(mask.eq(0).sum(-1).min())
        length = max_cache_length - padding
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            length += 1  # the last token that is drafted is read, too
        excess = length - self.config.max_position_embeddings
        if excess > 0:
            raise ValueError(
                f"Generation may go on to position {length - 1}, outside 0.."
                f"{self.config.max_position_embeddings - 1} of `max_position_embeddings`: lower `max_new_tokens` or "
                f"`max_length` by {excess}, or shorten the prompt."
            )


class CacheByEitherName:
    """Lets the field that holds a cache be read by its new name in outputs of older versions.

    Newer versions translate the old name themselves. Comes last among the base classes, so that a field goes before it.
    """

    @property
    def cache(self) -> Cache | None:
        """`Cache`, *optional*: keys and values so far."""
        return self.past_key_values


__all__ = [
    "CACHE_NAME",
    "CacheByEitherName",
    "StableMoEGenerationMixin",
    "cache_argument",
    "name_cache",
    "takes_cache_by_either_name",
    "update_cache",
]
