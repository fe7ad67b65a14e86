# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What a router remembers of the tokens of stage 1: numbers that no gradient reaches.

Kept as integers, floats by their bits, like the frozen routing and for the same reasons: they survive a cast of the model, mixed precision and sharding engines without losing a bit, so routing and gates
are the same everywhere. They follow the tokens of all processes and stand still in stage 2.

Shape suffixes: T tokens, K experts per token, D hidden size, E experts, V vocabulary.
"""

import torch
from torch import Tensor, nn

from .configuration_stablemoe import StableMoEBaseConfig
from .losses_stablemoe import histogram, sum_across_processes
from .tensors_stablemoe import copy_into, from_bits, resize_rows, split_rows, take_local_buffers, to_bits


# Keeps a feature that never varies finite.
VARIANCE_EPSILON = 1e-6


class RouterMemory(nn.Module):
    """The running statistics that a config asks for.

    Persistent buffers, all integers: `tokens` `(1,)`, routed so far; `feature_mean` and `feature_variance`,
    `(D,)`, with `router_normalization`; `expert_bias`, `(E,)`, with `expert_bias_rate`; `recent_load`, `(E,)`, tokens sent to
    each expert of late (a token counts for each of its experts), with `balance_window_tokens`; `token_counts`, `(V,)`, how
    often each id was routed, with `max_frozen_load`.

    They stay finite whatever they see. The bias moves by `expert_bias_rate` a pass at most, and stands still where
    loads are even or there are no tokens: an expert without tokens rises until a token prefers it, whatever the gap of
    the scores.
    """

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.num_parts = config.num_routing_rows // config.vocab_size
        self.half_life = config.router_half_life
        self.normalization = config.router_normalization
        self.bias_rate = config.expert_bias_rate
        self.window = (
            config.balance_window_tokens * config.num_experts_per_tok
        )  # in pairs of token and expert, as loads are
        self.integer_dtypes: dict[str, torch.dtype] = {}
        self.register_load_state_dict_pre_hook(take_local_buffers)
        self._register("tokens", 1, torch.int64)
        if config.router_normalization is not None:
            self._register("feature_mean", config.hidden_size, torch.int32)
            self._register("feature_variance", config.hidden_size, torch.int32)
        if config.expert_bias_rate:
            self._register("expert_bias", config.num_experts, torch.int32)
        if config.balance_window_tokens:
            self._register("recent_load", config.num_experts, torch.int32)
        if config.max_frozen_load is not None:
            self._register("token_counts", config.num_routing_rows, torch.int64)

    def _register(self, name: str, size: int, dtype: torch.dtype):
        self.register_buffer(name, torch.zeros(size, dtype=dtype))
        self.integer_dtypes[name] = dtype

    def forward(self) -> dict[str, Tensor]:
        """Return what is kept, by name, floats as floats: a `forward`, for the hooks of offloading."""
        return {
            name: from_bits(values) if self.integer_dtypes[name] == torch.int32 else values
            for name, values in self.named_buffers()
        }

    def normalize(self, hidden_states: Tensor, statistics: dict[str, Tensor]) -> Tensor:
        """Center, and standardize, hidden states by running statistics, `(T, D) -> (T, D)`; float32 at least.

        h itself until tokens have been observed, and without `router_normalization`. `statistics` are those of `forward`.
        """
        if self.normalization is None:
            return hidden_states
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        features = hidden_states.to(dtype) - statistics["feature_mean"]
        if self.normalization == "center":
            return features
        deviation = (statistics["feature_variance"] + VARIANCE_EPSILON).sqrt()
        return features / torch.where(statistics["tokens"] > 0, deviation, 1.0)

    @torch.no_grad()
    def load_of_window(self, expert_load: Tensor, recent_load: Tensor | None = None) -> Tensor:
        """Add the loads of a pass to those of the last `balance_window_tokens` tokens, and forget as many."""
        if recent_load is None:
            recent_load = self()["recent_load"]
        return recent_load * (1 - expert_load.sum() / self.window).clamp(min=0.0) + expert_load

    @torch.no_grad()
    def observe(self, hidden_states: Tensor, token_ids: Tensor, expert_index: Tensor, mask: Tensor | None):
        """Update the statistics by a training pass of stage 1, `(T, D), (T,), (T, K)`; every process must call this."""
        kept = self()
        sums = {"tokens": self._count(token_ids, mask)}
        if self.normalization is not None:
            sums |= self._feature_sums(hidden_states, mask, kept["feature_mean"])
        if "expert_bias" in kept or "recent_load" in kept:
            sums["load"] = histogram(expert_index, mask, self.num_experts, torch.double)
        if "token_counts" in kept:
            sums["ids"] = histogram(token_ids, mask, len(kept["token_counts"]), torch.double)
        sums = sum_all_across_processes(sums)
        if self.normalization is not None:
            self._follow_features(kept, sums)
        if "expert_bias" in kept:
            behind = torch.sign(sums["load"].mean() - sums["load"])
            copy_into(self.expert_bias, to_bits(kept["expert_bias"] + self.bias_rate * behind.float()))
        if "recent_load" in kept:
            copy_into(self.recent_load, to_bits(self.load_of_window(sums["load"], kept["recent_load"]).float()))
        if "token_counts" in kept:
            copy_into(self.token_counts, kept["token_counts"] + sums["ids"].long())
        copy_into(self.tokens, kept["tokens"] + sums["tokens"].long())

    @staticmethod
    def _count(token_ids: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return torch.full((1,), float(token_ids.numel()), dtype=torch.double, device=token_ids.device)
        return mask.sum().double().view(1)

    @staticmethod
    def _feature_sums(hidden_states: Tensor, mask: Tensor | None, center: Tensor) -> dict[str, Tensor]:
        """Sum distances from the running mean: of h itself, a large mean would drown what varies."""
        distance = hidden_states.float() - center
        if mask is not None:
            distance = torch.where(mask.unsqueeze(-1), distance, 0.0)  # padding may hold NaN
        return {"shift": distance.sum(0).double(), "square": distance.square().sum(0).double()}

    def _follow_features(self, kept: dict[str, Tensor], sums: dict[str, Tensor]):
        """Move mean and variance towards those of a batch: a plain average at first, an exponential one later.

        A feature whose squares overflow in this batch stays as it is.
        """
        new, seen = sums["tokens"], kept["tokens"]
        shift, square = (sums[name] / new.clamp(min=1) for name in ("shift", "square"))
        # A batch of padding alone moves nothing.
        share = torch.maximum(1 - 0.5 ** (new / self.half_life), new / (new + seen).clamp(min=1))
        spread = (1 - share) * kept["feature_variance"] + share * square
        variance = spread - (share * shift).square()
        moved = {
            "feature_mean": (kept["feature_mean"] + share * shift).float(),
            "feature_variance": variance.clamp(min=0.0).float(),
        }
        finite = moved["feature_mean"].isfinite() & moved["feature_variance"].isfinite()
        for name, values in moved.items():
            copy_into(getattr(self, name), to_bits(torch.where(finite, values, kept[name])))

    @torch.no_grad()
    def split(self, token_ids: list[int]):
        """Count these ids by the id before them, too."""
        self.num_parts = 1 + len(token_ids)
        if hasattr(self, "token_counts"):
            self.token_counts = split_rows(self.token_counts, token_ids, copies=False)

    @torch.no_grad()
    def resize(self, vocab_size: int):
        """Resize the counts of token ids; new ids have not been seen."""
        if hasattr(self, "token_counts"):
            self.token_counts = resize_rows(self.token_counts, vocab_size, self.num_parts)


def needs_memory(config: StableMoEBaseConfig) -> bool:
    """Return True if a config asks for any running statistics."""
    return (
        config.router_normalization is not None
        or config.expert_bias_rate > 0
        or config.balance_loss_warmup_tokens > 0
        or config.balance_window_tokens > 0
        or config.max_frozen_load is not None
    )


def sum_all_across_processes(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add up several tensors over all processes, one-dimensional and of one dtype, in one collective."""
    packed = sum_across_processes(torch.cat(list(values.values())))
    return dict(zip(values, packed.split([len(part) for part in values.values()]), strict=True))


__all__ = ["RouterMemory", "needs_memory", "sum_all_across_processes"]
