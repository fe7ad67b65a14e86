# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Distilled routers: what a routing is distilled into while it is learned (StableMoE, eq. 12 and table 6).

All score features of the token against centroids, ŝ_{t,i} = Ê_i . f_t. The word embedding takes f_t = D(X_t), which
sees the token alone, so its routing is a table over the vocabulary. The others look back at earlier tokens.

Shape suffixes: B batch, S tokens to be routed, T of any shape, K experts per token, C tokens of the context, E experts,
V vocabulary, R distilled router width, L layers. Where K = 1, experts have no dimension of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast

from .configuration_stablemoe import StableMoEBaseConfig
from .context_stablemoe import Tokens, of_routed_tokens, real_first
from .losses_stablemoe import histogram, sum_across_processes
from .tensors_stablemoe import (
    best_experts,
    copy_into,
    from_bits,
    full_tensor,
    resize_rows,
    score,
    sinusoids,
    split_rows,
    take_local_buffers,
    to_bits,
)


logger = logging.get_logger(__name__)


class DistilledRouter(nn.Module):
    """What all distilled routers share: an embedding D of their own and centroids Ê.

    All that it holds are tensors of this very module, none of a module inside it: sharding and offloading engines bring
    them together for `forward`, and the frozen router holds a copy of its parameters by name.
    """

    # The buffers, which are integers.
    integer_dtypes: dict[str, torch.dtype] = {}

    # Whether earlier tokens matter.
    sees_context: bool
    # Whether `observe` does anything.
    observes = False

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.num_parts = config.num_routing_rows // config.vocab_size
        for name, shape in self.shapes(config).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.register_load_state_dict_pre_hook(take_local_buffers)

    @classmethod
    def shapes(cls, config: StableMoEBaseConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight, by name; the input width of a matrix comes last."""
        return {
            "embedding": (config.num_routing_rows, config.distilled_router_dim),  # D
            "centroids": (config.num_experts, config.distilled_router_dim),  # Ê
        }

    def choose(self, token_ids: Tensor, logits: Tensor) -> Tensor:
        """Return the experts that tokens would be sent to for which `forward` gave `logits`, `(T, E) -> (T, K)`."""
        return best_experts(logits, self.num_experts_per_tok)

    def observe(self, token_ids: Tensor, expert_index: Tensor, mask: Tensor | None):
        """Count where the backbone sends tokens in stage 1, `(T,)` and `(T, K)`: nothing to do unless a router counts."""

    def check_weights(self, name: str):
        """Check what is about to be frozen for NaN and infinity; every process must call this.

        Weights that are frozen as they are must be finite. A table can be made of any: a score that is not finite
        counts as the lowest one of its token id, so an id without any finite score goes to expert 0. That is a warning.

        Raises:
            ValueError: naming the MoE layer, if a router that looks back at earlier tokens holds NaN or infinite weights.
        """
        weights = {key: full_tensor(parameter).detach() for key, parameter in self.named_parameters()}
        # As they are stored: float64 may hold more than float32 does.
        diverged = [key for key, weight in weights.items() if not weight.float().isfinite().all()]
        if not diverged:
            return
        held = f"{', '.join(diverged)} hold NaN or infinite weights"
        remedy = "Training has diverged; lower the learning rate or clip gradients, and freeze an earlier checkpoint."
        if self.sees_context:
            raise ValueError(f"The distilled router of `{name}` cannot be frozen: {held}. {remedy}")
        logger.warning(
            "The distilled router of `%s` is frozen although %s: token ids without a finite score go to expert 0. %s",
            name,
            held,
            remedy,
        )

    @torch.no_grad()
    def split(self, token_ids: list[int]):
        """Add rows for the ids that may stand before these; they begin as those of these ids."""
        old, self.num_parts = self.embedding, 1 + len(token_ids)
        self.embedding = nn.Parameter(split_rows(old, token_ids), requires_grad=old.requires_grad)

    @torch.no_grad()
    def resize(self, vocab_size: int):
        """Keep the rows of the first `vocab_size` ids; new ids start as the initialisation starts them, at N(0, 1)."""
        old = self.embedding
        num_new = max(vocab_size - len(old) // self.num_parts, 0)
        new_rows = torch.randn(num_new, old.shape[1], dtype=old.dtype, device=old.device)
        resized = resize_rows(old, vocab_size, self.num_parts, new_rows)
        self.embedding = nn.Parameter(resized, requires_grad=old.requires_grad)


class WordEmbeddingRouter(DistilledRouter):
    """The router that sees only the token: ŝ_{t,i} = Ê_i . D(X_t) (StableMoE, eq. 12)."""

    sees_context = False

    def forward(self, tokens: tuple | Tensor | None = None) -> Tensor:
        """Score tokens, or the whole vocabulary, `(..., E)`: float32 (float64 in a float64 model)."""
        embedding, centroids = full_tensor(self.embedding), full_tensor(self.centroids)
        features = embedding if tokens is None else F.embedding(Tokens.of(tokens).table_rows, embedding)
        return score(features, centroids)

    def table(self) -> Tensor:
        """Compute â(v) = argmax_i Ê_i . D(v) (eq. 13) for the whole vocabulary, `(V, K)`; ties go to the lowest index.

        With more experts per token those of the K highest scores, best first. Evaluation in stage 1 and the freezing of the
        router both read this one product, so they agree to the bit.
        """
        with torch.no_grad():
            return best_experts(self(), self.num_experts_per_tok)

    def assign(self, tokens: tuple | Tensor) -> Tensor:
        """Return the experts that inference would use now, `(B, S, K)`."""
        return self.table()[Tokens.of(tokens).table_rows]

    def freeze(self) -> Tensor:
        """Return what stage 2 will route by: the table."""
        return self.table()

    @torch.no_grad()
    def expected_shares(self) -> Tensor:
        """Estimate the share of each expert in the backbone's choices for each id, `(V, E)`; rows sum to 1."""
        return self().softmax(-1)


class CountRouter(WordEmbeddingRouter):
    """The router that needs no gradient: each id goes to the K experts that the backbone sent it to most often.

    No table over the vocabulary agrees with more of the routing that was counted. An id that has not been seen goes where D and Ê send it, which learn beside the counts
    (eq. 10). Ties go to the lowest index.

    Attributes:
        expert_counts (`torch.IntTensor` of shape `(V, E)`): how many tokens of each id went to each expert in
            stage 1, of all processes, each counting half after `counts_half_life` more tokens; float32, stored as the
            integers of the same bits, so that no cast of the model changes them.
    """

    observes = True
    integer_dtypes = {"expert_counts": torch.int32}

    def __init__(self, config: StableMoEBaseConfig):
        super().__init__(config)
        self.half_life = config.counts_half_life
        self.register_buffer(
            "expert_counts", torch.zeros((config.num_routing_rows, config.num_experts), dtype=torch.int32)
        )

    def forward(self, tokens: tuple | Tensor | None = None, counts: bool = False) -> Tensor:
        """Score tokens, or the vocabulary; or return `counts()`, which the hooks of an offloaded model bring for `forward` only."""
        return from_bits(self.expert_counts) if counts else super().forward(tokens)

    def counts(self) -> Tensor:
        """Return the counts, whole: `torch.FloatTensor` of shape `(V, E)`."""
        return self(counts=True)

    def table(self) -> Tensor:
        """Compute the experts of each id, `(V, K)`."""
        return self._by_counts(self.counts(), super().table())

    def choose(self, token_ids: Tensor, logits: Tensor) -> Tensor:
        """Choose by counts, by scores where an id has none, `(T, E) -> (T, K)`."""
        return self._by_counts(self.counts()[token_ids.flatten()], super().choose(token_ids, logits))

    def _by_counts(self, counts: Tensor, otherwise: Tensor) -> Tensor:
        experts = best_experts(counts, self.num_experts_per_tok)
        seen = counts.amax(-1) > 0  # each time by K experts, so K of them have counts
        return torch.where(seen if experts.dim() == seen.dim() else seen.unsqueeze(-1), experts, otherwise)

    @torch.no_grad()
    def expected_shares(self) -> Tensor:
        """Estimate the same from the counts; the scores speak for ids that have not been seen."""
        counts = self.counts()
        total = counts.sum(-1, keepdim=True)
        return torch.where(
            total > 0, counts / total.clamp(min=torch.finfo(counts.dtype).tiny), super().expected_shares()
        )

    @torch.no_grad()
    def observe(self, token_ids: Tensor, expert_index: Tensor, mask: Tensor | None):
        """Count where the backbone sent tokens; every process must call this."""
        counts = self.counts()
        pairs = token_ids.unsqueeze(-1) * counts.shape[1] + expert_index
        new = sum_across_processes(histogram(pairs, mask, counts.numel(), torch.double))
        total = counts.double()
        if self.half_life is not None:
            total *= 0.5 ** (new.sum() / self.num_experts_per_tok / self.half_life)
        total += new.view_as(counts)
        copy_into(self.expert_counts, to_bits(total.float()))

    @torch.no_grad()
    def split(self, token_ids: list[int]):
        """Add rows to embedding and counts; with an id before it, none has been seen."""
        super().split(token_ids)
        self.expert_counts = split_rows(self.expert_counts, token_ids, copies=False)

    @torch.no_grad()
    def resize(self, vocab_size: int):
        """Resize embedding and counts; new ids have not been seen."""
        super().resize(vocab_size)
        self.expert_counts = resize_rows(self.expert_counts, vocab_size, self.num_parts)


class ContextRouter(DistilledRouter):
    """A router that looks back at earlier tokens, and so cannot be a table.

    It learns in float32. Wherever the routing of inference is meant, in the evaluation of stage 1 as in stage 2, its
    weights are rounded to float32 and all sums are taken in float64. A float32 sum depends on the shape of the batch
    around a token and on what a cache has taken out of it; in float64 the difference is so small that only a tie of
    two experts' scores could show it.

    The price: every step computes over the whole context, whose ids it needs, and a device that
    has no float64, such as MPS, cannot route by it.
    """

    sees_context = True

    def forward(self, tokens: tuple, exact: bool = False) -> Tensor:
        """Score tokens with their context, `(B, S, E)`, float32; in float64 if `exact`, for inference."""
        return self.scores({name: full_tensor(weight) for name, weight in self.named_parameters()}, tokens, exact)

    @classmethod
    def scores(cls, weights: dict[str, Tensor], tokens: tuple, exact: bool) -> Tensor:
        """Score tokens by weights that need not be a module's, `(B, S, E)`."""

        def cast(values: Tensor) -> Tensor:
            return values.float().double() if exact else values.to(torch.promote_types(values.dtype, torch.float32))

        others = {name: cast(weight) for name, weight in weights.items() if name != "embedding"}
        ids, sequences, places = real_first(tokens)
        with maybe_autocast(device_type=ids.device.type, enabled=False):
            features = cls.features(cast(F.embedding(ids, weights["embedding"])), sequences, others)
        features = of_routed_tokens(features, tokens, places)
        return score(features, others["centroids"])

    @staticmethod
    def features(embedded: Tensor, sequences: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Compute f_t of every token of the context from the tokens of its sequence up to it.

        Args:
            embedded (`torch.Tensor` of shape `(B, C, R)`): D(X_t).
            sequences (`torch.LongTensor` of shape `(B, C)`): the number of each token's sequence in its row; at least
                0.
            weights (`dict[str, torch.Tensor]`): all but the embedding, in the dtype of `embedded`.
        """
        raise NotImplementedError

    def assign(self, tokens: tuple) -> Tensor:
        """Return the experts that inference would use now, `(B, S, K)`."""
        with torch.no_grad():
            return best_experts(self(tokens, exact=True), self.num_experts_per_tok)

    @classmethod
    def assign_by(cls, weights: dict[str, Tensor], tokens: tuple, num_experts_per_tok: int) -> Tensor:
        """Do what `assign` does by weights that need not be a module's."""
        with torch.no_grad():
            return best_experts(cls.scores(weights, tokens, exact=True), num_experts_per_tok)

    def freeze(self) -> dict[str, Tensor]:
        """Return what stage 2 will route by: all weights, as inference rounds them."""
        return {name: full_tensor(weight).detach().float() for name, weight in self.named_parameters()}


class BigramRouter(ContextRouter):
    """f_t = (D(X_t) + D(X_{t-1})) / 2, and D(X_t) where no token precedes."""

    @staticmethod
    def features(embedded: Tensor, sequences: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Average each embedding with the one before."""
        previous = F.pad(embedded, (0, 0, 1, 0))[:, :-1]
        has_previous = F.pad(sequences, (1, 0), value=-1)[:, :-1] == sequences
        return torch.where(has_previous.unsqueeze(-1), (embedded + previous) / 2, embedded)


class ConvolutionRouter(ContextRouter):
    """f_t = b + sum_k W_k D(X_{t-4+k}), k = 0 ... 4: a causal convolution; tokens that are not there count as 0."""

    width = 5

    @classmethod
    def shapes(cls, config: StableMoEBaseConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight, by name."""
        R = config.distilled_router_dim
        # W_0 ... W_4 side by side, the oldest token's first.
        return {**super().shapes(config), "conv_weight": (R, cls.width * R), "conv_bias": (R,)}

    @staticmethod
    def features(embedded: Tensor, sequences: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Convolve the embeddings."""
        C, width = embedded.shape[1], ConvolutionRouter.width
        padded = F.pad(embedded, (0, 0, width - 1, 0))
        of = F.pad(sequences, (width - 1, 0), value=-1)
        windows = [
            padded[:, k : k + C].masked_fill((of[:, k : k + C] != sequences).unsqueeze(-1), 0.0) for k in range(width)
        ]
        return F.linear(torch.cat(windows, dim=-1), weights["conv_weight"], weights["conv_bias"])


class TransformerRouter(ContextRouter):
    """Causal Transformer layers over D(X_t) and sinusoidal positions: pre-norm, ReLU, no dropout, final norm.

    Their number is in the name, `"transformer_1"` to `"transformer_3"`; their weights are stacked, `(L, ...)`.
    """

    @classmethod
    def shapes(cls, config: StableMoEBaseConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight, by name."""
        L, R = int(config.distilled_router.removeprefix("transformer_")), config.distilled_router_dim
        return {
            **super().shapes(config),
            "attn_norm_weight": (L, R),
            "attn_norm_bias": (L, R),
            "qkv_weight": (L, 3 * R, R),
            "qkv_bias": (L, 3 * R),
            "out_weight": (L, R, R),
            "out_bias": (L, R),
            "mlp_norm_weight": (L, R),
            "mlp_norm_bias": (L, R),
            "up_weight": (L, 4 * R, R),
            "up_bias": (L, 4 * R),
            "down_weight": (L, R, 4 * R),
            "down_bias": (L, R),
            "norm_weight": (R,),
            "norm_bias": (R,),
        }

    @staticmethod
    def features(embedded: Tensor, sequences: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Run the layers."""
        C, R = embedded.shape[1:]
        causal = torch.ones(C, C, dtype=torch.bool, device=sequences.device).tril()
        visible = causal & (sequences[:, :, None] == sequences[:, None, :])
        hidden = embedded + sinusoids(visible.sum(-1) - 1, R, torch.float64).to(embedded.dtype)

        def norm(values: Tensor, name: str, layer: int) -> Tensor:
            return F.layer_norm(values, (R,), weights[f"{name}_weight"][layer], weights[f"{name}_bias"][layer])

        def linear(values: Tensor, name: str, layer: int) -> Tensor:
            return F.linear(values, weights[f"{name}_weight"][layer], weights[f"{name}_bias"][layer])

        for layer in range(weights["qkv_weight"].shape[0]):
            qkv = linear(norm(hidden, "attn_norm", layer), "qkv", layer)
            hidden = hidden + linear(_attend(qkv, visible), "out", layer)
            inner = linear(norm(hidden, "mlp_norm", layer), "up", layer).relu()
            hidden = hidden + linear(inner, "down", layer)
        return F.layer_norm(hidden, (R,), weights["norm_weight"], weights["norm_bias"])


def _attend(qkv: Tensor, visible: Tensor) -> Tensor:
    """Attend with the most of 5, 2 and 1 heads that divide the width, `(B, C, 3 R), (B, C, C) -> (B, C, R)`."""
    width = qkv.shape[-1] // 3
    heads = next(number for number in (5, 2, 1) if width % number == 0)
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.split(width, dim=-1))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible.unsqueeze(1))
    return attended.transpose(1, 2).flatten(-2)


# By `distilled_router` (paper table 6).
_DISTILLED_ROUTERS: dict[str, type[DistilledRouter]] = {
    "word_embedding": WordEmbeddingRouter,
    "counts": CountRouter,
    "bigram": BigramRouter,
    "cnn": ConvolutionRouter,
    "transformer_1": TransformerRouter,
    "transformer_2": TransformerRouter,
    "transformer_3": TransformerRouter,
}


def distilled_router_class(config: StableMoEBaseConfig) -> type[DistilledRouter] | None:
    """Return the class that `config.distilled_router` names; `None` where nothing is distilled."""
    return None if config.distilled_router is None else _DISTILLED_ROUTERS[config.distilled_router]


def sees_context(config: StableMoEBaseConfig) -> bool:
    """Return True if a token's expert depends on the tokens before it once the routing is frozen."""
    kind = distilled_router_class(config)
    return kind is not None and kind.sees_context


def needs_context(config: StableMoEBaseConfig) -> bool:
    """Return True if an MoE layer looks back at earlier tokens, for its routing, for rows of split ids or for an embedding of pairs."""
    return sees_context(config) or config.num_bigram_embeddings > 0 or bool(config.split_token_ids)


__all__ = [
    "BigramRouter",
    "ContextRouter",
    "ConvolutionRouter",
    "CountRouter",
    "DistilledRouter",
    "TransformerRouter",
    "WordEmbeddingRouter",
    "distilled_router_class",
    "needs_context",
    "sees_context",
]
