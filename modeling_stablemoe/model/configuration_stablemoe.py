# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the StableMoE models: names, defaults and validation, nothing else."""

import base64
import math
import re
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.distributed import DistributedConfig


# The default coefficient of the balance loss of each router of `routing_stablemoe.py`, whose `register_router` adds others:
# paper table 7; Fedus et al. (2022), section 2.2; BASE is balanced by its assignment, a hash is not learned.
ROUTER_TYPES = {"stable": 0.3, "switch": 0.01, "base": 0.0, "hash": 0.0}
# The kinds of distilled router of `distillation_stablemoe.py` (table 6).
DISTILLED_ROUTERS = ("word_embedding", "counts", "bigram", "cnn", "transformer_1", "transformer_2", "transformer_3")
# Of these the routing is a table over the vocabulary; the others look back at earlier tokens.
TABLE_ROUTERS = ("word_embedding", "counts")
BALANCE_GRADIENTS = ("all", "centroids")
ROUTER_NORMALIZATIONS = ("center", "standardize")
POSITION_EMBEDDING_TYPES = ("learned", "sinusoidal")
INITIALIZATIONS = ("normal", "fairseq")
EXPERT_TYPES = ("stack", "gated")
MOE_PLACEMENTS = ("between", "ffn")
# Of each sublayer of a stack of experts, and of gated experts; the first dimension of every one is `num_experts`.
EXPERT_PARAMETERS = ("layernorm_weight", "layernorm_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
GATED_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
# What tensor parallelism does to an MoE layer of gated experts, in the terms of transformers' plans.
GATED_EXPERTS_TP_PLAN = {
    "experts.gate_up_proj": "packed_colwise",
    "experts.down_proj": "rowwise",
    "experts": "moe_tp_experts",
}
SHARED_EXPERTS_TP_PLAN = {
    "shared_experts.gate_proj": "colwise",
    "shared_experts.up_proj": "colwise",
    "shared_experts.down_proj": "rowwise",
}

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Sizes and numbers of tokens are int64 in tensors, coefficients float32.
LARGEST_INTEGER = 2**63 - 1
LARGEST_NUMBER = torch.finfo(torch.float32).max


# What the package adds by name when it is imported. Code that travels with a checkpoint does without: loading, generating and
# fine-tuning reach none of it.
PACKAGE_FUNCTIONS: dict[str, Callable] = {}


def from_package(name: str, purpose: str) -> Callable:
    """Return a function of the package.

    Raises:
        ImportError: in the code of a checkpoint alone, naming the package; `purpose` begins the sentence.
    """
    if name not in PACKAGE_FUNCTIONS:
        raise ImportError(
            f"{purpose} is none of what a checkpoint's own code does. Install the package `modeling_stablemoe`, import it, and "
            "load the checkpoint without `trust_remote_code=True`."
        )
    return PACKAGE_FUNCTIONS[name]


class Rule(NamedTuple):
    """What one field may hold, whatever the others hold."""

    accepts: Callable[[Any], Any]
    says: str
    choices: Collection | None = None

    def check(self, name: str, value: Any):
        """Refuse a value.

        Raises:
            ValueError: naming field, value and what it may be.
        """
        if self.accepts(value):
            return
        if self.choices is None:
            raise ValueError(f"`{name}` {self.says}, got {value!r}.")
        raise ValueError(f"`{name}` {value!r} is unknown; choose one of {list(self.choices)}{self.says}.")


def _is_integer(value: Any, least: int = -LARGEST_INTEGER) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= LARGEST_INTEGER


def _are_integers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_integer, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= LARGEST_NUMBER


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_base64(value: Any) -> bool:
    try:
        return isinstance(value, str) and base64.b64decode(value, validate=True) is not None
    except ValueError:
        return False


def _is_float_type(value: Any) -> bool:
    if value == "auto":  # what `AutoConfig.from_pretrained(folder, dtype="auto")` sets: that of the weights
        return True
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _is_by_name(value: Any) -> bool:
    if not isinstance(value, dict) or not _are_strings(list(value)):
        return False
    numbers = list(value.values())
    return _are_integers(numbers) or _are_strings(numbers)


def _names_labels(value: Any) -> bool:
    # JSON makes strings of the keys.
    return (
        isinstance(value, dict)
        and _are_strings(list(value.values()))
        and len(value) > 0
        and (set(map(str, value)) == set(map(str, range(len(value)))))
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _choice(choices: Collection, says: str = "") -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in choices, says, choices)


def _tokens(least: int) -> Rule:
    return Rule(
        lambda value: _is_integer(value, least), f"is a number of tokens, an integer >= {least} and below 2**63"
    )


def _optional(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.accepts(value), f"{rule.says}, or None", rule.choices)


_COUNT = Rule(lambda value: _is_integer(value, 1), "must be a positive integer below 2**63")
_COEFFICIENT = Rule(_is_number, "must be a finite number >= 0 (in float32)")
_PROBABILITY = Rule(lambda value: _is_number(value) and value < 1, "is a probability in [0, 1)")
_SWITCH = Rule(lambda value: isinstance(value, bool), "must be True or False")
_TOKEN_ID = Rule(_is_integer, "must be a token id, an integer")
_POSITIONS = Rule(_are_integers, "must be a list of integers")


def _expert_parallel_plan(expert_type: str) -> dict[str, str]:
    """Return what transformers deals out to the processes of expert parallelism, and where it sends tokens."""
    if expert_type == "gated":
        experts, names = "moe_layers.*.experts", GATED_EXPERT_PARAMETERS
    else:
        experts, names = "moe_layers.*.expert_stack", [f"sublayers.*.{name}" for name in EXPERT_PARAMETERS]
    plan = {f"{experts}.{name}": "grouped_gemm" for name in names}
    if hasattr(DistributedConfig, "ep_size"):
        return plan | {experts: "ep_dispatch_experts"}
    # Before 5.19 every process has all tokens, and the ids of its own experts are made out of the router's.
    return plan | {"moe_layers.*.dispatch": "ep_router", experts: "moe_tp_experts"}


class StableMoEBaseConfig(PreTrainedConfig):
    r"""What [`StableMoEConfig`] and [`StableMoESeq2SeqConfig`] share: the widths of blocks and experts, and the routing.

    Args:
        vocab_size (`int`, *optional*, defaults to 50257): size V of the vocabulary; the routing tables have as many rows.
        hidden_size (`int`, *optional*, defaults to 768): width d of the hidden states.
        intermediate_size (`int`, *optional*, defaults to 3072): inner width of the FFNs, of blocks and experts alike.
        moe_intermediate_size (`int`, *optional*): inner width of the FFNs of experts, where it is another one: k experts per
            token of an equal share of the width cost what one of the whole width does. With a `backbone_config`
            `intermediate_size` is that of the experts already. Default: `intermediate_size`.
        num_attention_heads (`int`, *optional*, defaults to 12): attention heads; divides `hidden_size`.
        hidden_act (`str`, *optional*): activation of blocks and experts. Default: `"relu"`, the paper's; that of the
            backbone for gated experts in a `backbone_config`.
        max_position_embeddings (`int`, *optional*, defaults to 1024): positions, the longest sequence.
        position_embedding_type (`str`, *optional*, defaults to `"learned"`): `"learned"`, or `"sinusoidal"` as in the
            original Transformer, which has no parameters.
        scale_embedding (`bool`, *optional*, defaults to `False`): multiply token embeddings by sqrt(d), as the original
            Transformer does.
        do_layer_norm_before (`bool`, *optional*, defaults to `True`): LayerNorm before attention and FFN of a block and
            after the last block (pre-norm); else after each residual sum (post-norm), as in the original Transformer.
            Experts are pre-norm in either case.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): epsilon of every LayerNorm.
        initialization (`str`, *optional*, defaults to `"normal"`): what weights start from. `"normal"`: from
            N(0, `initializer_range`^2), biases from 0. `"fairseq"`, as the released code does: token and position embeddings
            from N(0, 1/d); q, k and v from Xavier's uniform distribution at a gain of 1/sqrt(2), the attention's output at 1
            and its bias at 0; all other matrices and biases of blocks and experts from U(-1/sqrt(n), 1/sqrt(n)), n the width
            of what they multiply; all experts of a layer equal. It belongs with `scale_embedding=True`. In either, the last
            matrix of an expert sublayer starts at 0: a new expert adds no more than its bias, which is 0 in `"normal"`.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of `"normal"` weights, and of a
            classifier's head.
        dropout (`float`, *optional*, defaults to 0.0): dropout on embeddings, attention and FFN outputs of the blocks.
        attention_dropout (`float`, *optional*, defaults to 0.0): dropout on attention probabilities.
        use_cache (`bool`, *optional*, defaults to `True`): return key/value caches by default.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`): the head shares the token embedding.
        num_experts (`int`, *optional*, defaults to 32): experts N of each MoE layer.
        num_experts_per_tok (`int`, *optional*, defaults to 1): experts k of each token, all different, at most
            `num_experts`: h' = h + sum_a g_a (S_a(h) - h) over them, each with the gate of its own score (of a hash 1 / k).
            1 is the paper's. With more, loads are of pairs of token and expert; `"base"`, which assigns one, is refused.
        norm_topk_prob (`bool`, *optional*, defaults to `False`): divide the gates of a token by their sum, so that its experts
            share 1 between them, as in Mixtral or DeepSeek-V4: with a table from the start (`set_routing_tables`,
            `--hash_table`) the scores weigh candidates that are fixed. For `num_experts_per_tok` > 1; a hash has no scores.
        expert_type (`str`, *optional*): `"stack"`, the paper's: each expert is a stack of FFN sublayers, each with a LayerNorm
            and a residual of its own; or `"gated"`, as in the MoE models of today: one gated FFN (SwiGLU with
            `hidden_act="silu"`) of `intermediate_size`, after an RMSNorm of the layer, in the layout that transformers' experts
            have. Default: `"stack"`; `"gated"` with a `backbone_config`.
        num_expert_sublayers (`int`, *optional*, defaults to 3): FFN sublayers stacked in one expert; 1 in gated ones.
        num_shared_experts (`int`, *optional*, defaults to 0): gated experts of each MoE layer that every token takes beside its
            own, without a gate.
        num_bigram_embeddings (`int`, *optional*, defaults to 0): rows of an embedding of pairs of tokens that each MoE layer
            adds beside its experts: of each token and the one before it, hashed, times a matrix and a sigmoid gate of the
            hidden state. It tells what parameters are worth that are looked up and no experts.
        split_token_ids (`list[int]`, *optional*): token ids that are routed by the token before them, too: each has a row of the
            routing table for every id that may precede it, beside its own, for where none does. An id of 5 % of all tokens
            makes one of 32 experts 1.6 times as busy as the mean, whatever the table; split, it is spread over all. All
            ids then look back by one token. For routing by tables: a hash, or `distilled_router` "word_embedding" or "counts".
        router_type (`str`, *optional*, defaults to `"stable"`): the routing strategy, a row of table 1: `"stable"`,
            `"switch"`, `"base"`, `"hash"` or the name of a router of your own, registered by `register_router`.
        distilled_router (`str`, *optional*): what the routing is distilled into while it is learned, so that it can be
            frozen (table 6). `"word_embedding"` sees the token alone and freezes into a table. So does `"counts"`, which
            waits for no gradient: each token id goes to the expert (the k experts) that it was sent to most often.
            These look back at earlier tokens, and freeze as weights: `"bigram"`, the mean of the embeddings of this token
            and the last; `"cnn"`, a causal convolution of width 5; `"transformer_1"`, `"transformer_2"` and `"transformer_3"`, so
            many causal layers. They cost more with every token of context, and float64 arithmetic, which MPS lacks.
            Default: `"word_embedding"` for `"stable"`, `None` for all others: Switch and BASE as published never
            freeze, and a hash is frozen from the start.
        distilled_router_dim (`int`, *optional*, defaults to 50): width of the distilled router's token embedding D.
        balance_loss_coef (`float`, *optional*): of the balance loss: alpha of eq. 8 (default 0.3) for `"stable"`, alpha
            of N sum_i f_i P_i (default 0.01) for `"switch"`; `"base"` and `"hash"` have no balance loss.
        distillation_loss_coef (`float`, *optional*, defaults to 1.0): weight of L_dis (1 in eq. 11; the released
            training command has 0.3).
        center_balance_loss (`bool`, *optional*, defaults to `False`): subtract from the factors of eq. 8 their mean over
            tokens, so that they sum to 0 over a batch and the loss moves gates apart, not all of them down. `False` is the
            paper's, which does the same where loads are even: with half a million tokens in a batch.
        balance_window_tokens (`int`, *optional*, defaults to 0): count the loads of the balance loss over about so many of the
            last tokens of stage 1, of all processes, by an exponential average; half a million is the paper's batch. 0 is the
            paper's form, which counts over the tokens of a forward pass.
        balance_gradient (`str`, *optional*, defaults to `"all"`): what learns from the balance loss: `"all"` is the
            paper's, centroids and hidden states; `"centroids"` keeps it out of the hidden states, which otherwise can shut
            every gate at once by moving along the centroids' negative sum.
        balance_loss_warmup_tokens (`int`, *optional*, defaults to 0): the balance loss counts in full after so many
            tokens of stage 1, of all processes, and in proportion before; 0 is the paper's.
        router_normalization (`str`, *optional*): what is done to hidden states before they are scored to choose experts in
            stage 1: `"center"` subtracts their running mean, `"standardize"` also divides each feature by its running
            standard deviation. The gate is of the raw states in both stages. The statistics are numbers without gradient;
            they follow the tokens of stage 1, of all processes, and travel with the weights. In training as in evaluation
            nothing but them is used, never those of the batch. Default: `None`, the paper's raw states.
        router_half_life (`int`, *optional*, defaults to 65536): tokens, of all processes, after which a token counts
            half in the running statistics of `router_normalization`.
        expert_bias_rate (`float`, *optional*, defaults to 0.0): balances without a loss (Wang et al., 2024): a bias per
            expert is added to the scores that choose experts, not to the gate; after each forward pass of stage 1 it
            rises by so much where an expert had less than its share of the tokens of all processes, and falls where it
            had more. 0 is the paper's.
        counts_half_life (`int`, *optional*): tokens, of all processes, after which a token counts half for `"counts"`.
            `None`: all tokens of stage 1 count the same.
        share_experts_in_stage1 (`bool`, *optional*, defaults to `False`): while the routing is learned all experts of a
            layer are equal and learn from all of its tokens; they part when it is frozen, each to learn from its own
            tokens. So no update is lost on an expert that will not serve the token. `False` is the paper's;
            `from_dense` with `moe_placement="ffn"` sets it, for the dense model's logits to the bit.
        reset_gates_at_freeze (`bool`, *optional*, defaults to `False`): set the centroids to zero when the routing is
            frozen, so that every sigmoid gate begins stage 2 at 1/2. Where the frozen expert of a token is not the
            backbone's choice its score is low, so its gate is shut, and a shut gate learns next to nothing. `False`, the
            paper's, keeps the centroids.
        max_frozen_load (`float`, *optional*): when the routing is frozen into a table, no expert gets more than this
            times the mean of the tokens of stage 1, `num_experts_per_tok` times their number over `num_experts`; the table
            keeps as much agreement as that allows. A token id that alone outweighs it gets an expert of its own, or as many
            as a token has. Stage 2 has no balance loss, so what is uneven then stays uneven. >= 1; `None`, the paper's,
            freezes the distilled router as it is.
        frozen_load_bands (`int`, *optional*, defaults to 1): with `max_frozen_load`, cut the token ids into so many bands
            from frequent to rare, each with as many tokens, and keep to the limit after every band: frequent ids are
            spread over all experts, too.
        router_aux_loss_coef (`float`, *optional*, defaults to 1.0): factor on the whole auxiliary loss,
            `loss = task_loss + router_aux_loss_coef * aux_loss` with
            `aux_loss = balance_loss_coef * L_bal + distillation_loss_coef * L_dis`. It is the one name that trainers
            of the ecosystem know, and TRL multiplies a balance loss of its own by it; so it reads 0 where there is nothing
            to balance, of a frozen routing and a dense model. Leave it at 1 for the paper's loss.
        expert_capacity_factor (`float`, *optional*): while training an expert takes no more than the first
            `factor * num_experts_per_tok * tokens / num_experts` of its tokens; it leaves the others unchanged (the released
            code has 2). `None` drops no token; inference never does.
        output_router_logits (`bool`, *optional*, defaults to `False`): return router logits and expert indices.
        router_fingerprint (`str`, *optional*): sha256 of the frozen routing, written by `freeze_router()` and
            checked on loading; `None` in stage 1.
        pruned_tokens (`list[str]`, *optional*): which token ids have lost an expert, written by `prune_experts` where
            any have: of the language model, or of encoder and decoder, one bit per id in base 64. A forward pass that
            meets one of them says so once.

    Raises:
        ValueError: if a field is out of range, also where it is set later, or does not fit another one, also when a model is
            built of the config or it is saved; the message names field, value and remedy.
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    moe_intermediate_size: int | None = None
    num_attention_heads: int = 12
    hidden_act: str | None = None
    max_position_embeddings: int = 1024
    position_embedding_type: str = "learned"
    scale_embedding: bool = False
    do_layer_norm_before: bool = True
    layer_norm_eps: float = 1e-5
    initialization: str = "normal"
    initializer_range: float = 0.02
    dropout: float = 0.0
    attention_dropout: float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    num_experts: int = 32
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = False
    expert_type: str | None = None
    num_expert_sublayers: int = 3
    num_shared_experts: int = 0
    num_bigram_embeddings: int = 0
    split_token_ids: list[int] | None = None
    router_type: str = "stable"
    distilled_router: str | None = None
    distilled_router_dim: int = 50
    balance_loss_coef: float | None = None
    distillation_loss_coef: float = 1.0
    center_balance_loss: bool = False
    balance_window_tokens: int = 0
    balance_gradient: str = "all"
    balance_loss_warmup_tokens: int = 0
    router_normalization: str | None = None
    router_half_life: int = 65536
    expert_bias_rate: float = 0.0
    counts_half_life: int | None = None
    share_experts_in_stage1: bool = False
    reset_gates_at_freeze: bool = False
    max_frozen_load: float | None = None
    frozen_load_bands: int = 1
    router_aux_loss_coef: float = 1.0
    expert_capacity_factor: float | None = None
    output_router_logits: bool = False
    router_fingerprint: str | None = None
    pruned_tokens: list[str] | None = None

    # Not a field itself. What transformers shards under FSDP2, by name in a language model's backbone, an encoder or a
    # decoder. Embeddings, which may be tied, and the last norm stay with the root.
    base_model_fsdp_plan = {"layers.*": "free_full_weight", "moe_layers.*": "free_full_weight"}
    # What each field may hold whatever the others hold, checked whenever it is set. Fields of `PreTrainedConfig` are among
    # them, where a misread value would act: what `@strict` of huggingface_hub says of them is no ValueError.
    _rules = {
        "hidden_act": _optional(_choice(ACT2FN)),
        "expert_type": _optional(_choice(EXPERT_TYPES)),
        "moe_intermediate_size": _optional(_COUNT),
        "split_token_ids": _optional(Rule(_are_integers, "must be a list of token ids")),
        **dict.fromkeys(
            ("num_shared_experts", "num_bigram_embeddings"),
            Rule(lambda value: _is_integer(value, 0), "must be an integer >= 0"),
        ),
        "position_embedding_type": _choice(POSITION_EMBEDDING_TYPES),
        "initialization": _choice(INITIALIZATIONS),
        "router_type": _choice(ROUTER_TYPES, ", or import the file that registers it first (`register_router`)"),
        "distilled_router": _optional(_choice(DISTILLED_ROUTERS)),
        "balance_gradient": _choice(BALANCE_GRADIENTS),
        "router_normalization": _optional(_choice(ROUTER_NORMALIZATIONS)),
        "problem_type": _optional(_choice(PROBLEM_TYPES)),
        "layer_norm_eps": Rule(
            lambda value: _is_number(value) and value > 0, "must be a finite number > 0 (in float32)"
        ),
        "balance_loss_coef": _optional(_COEFFICIENT),
        "max_frozen_load": _optional(
            Rule(
                lambda value: _is_number(value) and value >= 1, "is a multiple of the mean load, a finite number >= 1"
            )
        ),
        "expert_capacity_factor": Rule(
            lambda value: value is None or (_is_number(value) and value > 0),
            "must be None (no token is dropped) or > 0, and finite",
        ),
        "balance_loss_warmup_tokens": _tokens(0),
        "balance_window_tokens": _tokens(0),
        "router_half_life": _tokens(1),
        "counts_half_life": _optional(_tokens(1)),
        "eos_token_id": Rule(
            lambda value: value is None or _is_integer(value) or (_are_integers(value) and len(value) > 0),
            "must be a token id, an integer, several in a list, or None",
        ),
        "router_fingerprint": _optional(
            Rule(
                lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value),
                "must be 64 hexadecimal digits, as `freeze_router` writes them",
            )
        ),
        "pruned_tokens": _optional(
            Rule(
                lambda value: isinstance(value, list) and all(map(_is_base64, value)),
                "must be a list of strings, as `prune_experts` writes it",
            )
        ),
        "dtype": _optional(Rule(_is_float_type, 'must be a type of floating-point numbers, "float32" say, or "auto"')),
        "id2label": _optional(Rule(_names_labels, "must be a dictionary from 0, 1, ... to names")),
        "label2id": _optional(Rule(_is_by_name, "must be a dictionary from names to numbers")),
        "architectures": _optional(Rule(_are_strings, "must be a list of names of classes")),
        "transformers_version": _optional(Rule(lambda value: isinstance(value, str), "must be a string")),
        **dict.fromkeys(("distillation_loss_coef", "router_aux_loss_coef"), _COEFFICIENT),
        **dict.fromkeys(("initializer_range", "expert_bias_rate"), _COEFFICIENT),
        **dict.fromkeys(("dropout", "attention_dropout"), _PROBABILITY),
        **dict.fromkeys(("bos_token_id", "pad_token_id"), _optional(_TOKEN_ID)),
        **dict.fromkeys(("return_dict", "output_attentions", "output_hidden_states"), _optional(_SWITCH)),
        **dict.fromkeys(("scale_embedding", "do_layer_norm_before", "use_cache", "tie_word_embeddings"), _SWITCH),
        **dict.fromkeys(("share_experts_in_stage1", "reset_gates_at_freeze", "output_router_logits"), _SWITCH),
        **dict.fromkeys(("center_balance_loss", "norm_topk_prob"), _SWITCH),
        "is_encoder_decoder": _SWITCH,
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), _COUNT),
        **dict.fromkeys(("max_position_embeddings", "distilled_router_dim", "frozen_load_bands"), _COUNT),
        **dict.fromkeys(("num_experts", "num_experts_per_tok", "num_expert_sublayers", "num_labels"), _COUNT),
        "chunk_size_feed_forward": Rule(lambda value: _is_integer(value, 0), "must be an integer >= 0"),
    }
    # Fields that place MoE layers, each with the field that counts the blocks they stand between:
    _moe_positions = {}

    def __setattr__(self, name, value):
        # As transformers' own configs do, a field is checked when it is set, and all of them together when they are needed.
        name = self.attribute_map.get(name, name)
        super().__setattr__(name, self._checked(name, value))

    def _checked(self, name: str, value: Any) -> Any:
        """Return a value as JSON can hold it, numbers of NumPy as Python's, or refuse it."""
        if name not in self._rules:
            return value
        self._rules[name].check(name, value)
        if isinstance(value, (list, tuple)):
            return [_plain(item) for item in value]
        return _plain(value)

    def __post_init__(self, **kwargs):
        if kwargs.get("num_labels") is None:
            kwargs.pop("num_labels", None)
        for name in ("num_labels", "output_attentions"):  # transformers reads these before it sets them
            if name in kwargs:
                kwargs[name] = self._checked(name, kwargs[name])
        super().__post_init__(**kwargs)
        for positions, num_blocks in self._moe_positions.items():
            if getattr(self, positions) is None:
                setattr(self, positions, [getattr(self, num_blocks) // 2])
        if self.expert_type is None:
            self.expert_type = "stack"
        if self.hidden_act is None:
            self.hidden_act = "relu"
        if self.expert_type == "gated" and self.num_expert_sublayers == type(self).num_expert_sublayers:
            self.num_expert_sublayers = 1
        if self.distilled_router is None and self.router_type == "stable":
            self.distilled_router = "word_embedding"
        if self.balance_loss_coef is None:
            self.balance_loss_coef = ROUTER_TYPES[self.router_type]
        self.validate_architecture()
        for positions in self._moe_positions:
            setattr(self, positions, sorted(getattr(self, positions)))

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """`dict[str, str]`: what expert parallelism shards. Routers stay whole: each decides over all experts."""
        return _expert_parallel_plan(self.expert_type)

    @property
    def expert_size(self) -> int:
        """`int`: inner width of the FFNs of experts."""
        return self.intermediate_size if self.moe_intermediate_size is None else self.moe_intermediate_size

    @property
    def num_routing_rows(self) -> int:
        """`int`: rows R of a routing table: one per token id, and one more per id for each of `split_token_ids`."""
        return self.vocab_size * (1 + len(self.split_token_ids or ()))

    @property
    def num_moe_layers(self) -> int:
        """`int`: MoE layers of the whole model."""
        return sum(len(getattr(self, positions)) for positions in self._moe_positions)

    @property
    def routing_loss_factor(self) -> float:
        """`float`: `router_aux_loss_coef` as it was set, by which the routing losses of stage 1 enter the loss."""
        return self.__dict__["router_aux_loss_coef"]

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Make a config of a dictionary, refusing that of another kind of model.

        Raises:
            ValueError: if the dictionary belongs to another `model_type`.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is a {model_type!r} checkpoint, not a {cls.model_type!r} one. Load it with the class of its "
                "own kind: StableMoEForCausalLM is a language model, StableMoEForConditionalGeneration translates."
            )
        made = super().from_dict(config_dict, **kwargs)
        # Some of `kwargs` are set after the config is made.
        (made[0] if isinstance(made, tuple) else made).validate_architecture()
        return made

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the config, if it can be loaded again.

        Raises:
            ValueError: if fields have been set to what does not fit the others.
        """
        self.validate_architecture()
        super().save_pretrained(save_directory, *args, **kwargs)
        if "write_code" in PACKAGE_FUNCTIONS:
            PACKAGE_FUNCTIONS["write_code"](self, save_directory)

    def validate_architecture(self):
        """Check every field of the architecture against the others."""
        super().validate_architecture()
        if self.balance_loss_coef is None:
            _COEFFICIENT.check("balance_loss_coef", None)
        self._validate_sizes()
        self._validate_token_ids()
        self._validate_moe()

    def _validate_sizes(self):
        if self.hidden_size % self.num_attention_heads and self.get_text_config() is self:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be divisible by `num_attention_heads` "
                f"({self.num_attention_heads}): the heads share the hidden size evenly."
            )
        widths = ("hidden_size", "distilled_router_dim", "num_experts")
        for names in (
            *[("vocab_size", width) for width in widths],
            ("max_position_embeddings", "hidden_size"),
            ("num_experts", "hidden_size", "expert_size"),
            ("num_bigram_embeddings", "hidden_size"),
        ):
            if math.prod(getattr(self, name) for name in names) > LARGEST_INTEGER // 8:
                sizes = " x ".join(f"`{name}` ({getattr(self, name)})" for name in names)
                raise ValueError(f"{sizes}: no tensor can hold so many numbers; make them smaller.")

    def _validate_token_ids(self):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            token_ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(0 <= token_id < self.vocab_size for token_id in token_ids):
                raise ValueError(
                    f"`{name}` {value!r} lies outside the vocabulary 0..{self.vocab_size - 1}; raise `vocab_size` or "
                    "choose a token that is in it."
                )

    def _validate_moe(self):
        if self.router_type == "hash" and self.distilled_router is not None:
            raise ValueError(
                f"`distilled_router` {self.distilled_router!r} has nothing to learn from a hash, which is fixed from the "
                "start; leave it at None."
            )
        self._validate_experts()
        self._validate_experts_per_tok()
        self._validate_stage1_of_router()
        pruned, sides = self.pruned_tokens, len(self._moe_positions)
        if pruned is not None and len(pruned) != sides:
            raise ValueError(
                f"`pruned_tokens` must be None or a list of {sides} strings, as `prune_experts` writes it; got {pruned!r}."
            )
        for positions, num_blocks in self._moe_positions.items():
            self._validate_positions(positions, num_blocks)

    def _validate_experts(self):
        for name, choices in (("hidden_act", ACT2FN), ("expert_type", EXPERT_TYPES)):
            _choice(choices).check(name, getattr(self, name))
        if self.expert_type == "gated" and self.num_expert_sublayers != 1:
            raise ValueError(
                f"`num_expert_sublayers` ({self.num_expert_sublayers}): a gated expert is one FFN, no stack; leave it out, or "
                'choose `expert_type="stack"`.'
            )
        if self.num_shared_experts and self.expert_type != "gated":
            raise ValueError(
                f'`num_shared_experts` ({self.num_shared_experts}) are gated experts: set `expert_type="gated"`, or leave it at 0.'
            )

    def _validate_experts_per_tok(self):
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) is more than there are experts: lower it to "
                f"`num_experts` ({self.num_experts}) at most, or raise that."
            )
        if self.norm_topk_prob and (self.num_experts_per_tok == 1 or self.router_type == "hash"):
            raise ValueError(
                "`norm_topk_prob` divides the gates of a token by their sum: it takes `num_experts_per_tok` > 1 and a router with "
                "scores, which a hash has not; leave it at False."
            )
        if self.num_experts_per_tok > 1 and self.router_type == "base":
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) must be 1 with `router_type` 'base', whose balanced "
                "assignment gives each token one expert; choose another `router_type`, or leave it at 1."
            )

    def _validate_stage1_of_router(self):
        """Refuse settings that would do nothing with this router."""
        if self.counts_half_life is not None and self.distilled_router != "counts":
            raise ValueError(
                f'`counts_half_life` ({self.counts_half_life}) belongs to `distilled_router="counts"`; leave it at None.'
            )
        if self.max_frozen_load is not None and self.distilled_router not in TABLE_ROUTERS:
            raise ValueError(
                f"`max_frozen_load` ({self.max_frozen_load}) balances a table over the vocabulary, which `distilled_router` "
                f"{self.distilled_router!r} has not: choose one of {list(TABLE_ROUTERS)}, or leave it at None. A hash is "
                "balanced when it is made (`--hash_table balanced`)."
            )
        if self.split_token_ids is not None:
            self._validate_split_token_ids()
        if self.frozen_load_bands > 1 and self.max_frozen_load is None:
            raise ValueError(
                f"`frozen_load_bands` ({self.frozen_load_bands}) belongs to `max_frozen_load`; set that too, to 1.05 say."
            )
        if self.balance_window_tokens and self.router_type in ("base", "hash"):
            raise ValueError(
                f"`balance_window_tokens` ({self.balance_window_tokens}) belongs to a balance loss, which {self.router_type!r} "
                "has not; leave it at 0."
            )
        if self.center_balance_loss and self.router_type in ("switch", "base", "hash"):
            raise ValueError(
                f"`center_balance_loss` centres the balance loss of StableMoE, which {self.router_type!r} has not; leave it "
                "at False."
            )
        if self.expert_bias_rate and self.router_type == "base":
            raise ValueError(
                "`expert_bias_rate` has nothing to balance in BASE, which balances each batch; leave it at 0."
            )
        settings = ("expert_bias_rate", "router_normalization", "share_experts_in_stage1", "reset_gates_at_freeze")
        idle = [name for name in settings if self.router_type == "hash" and getattr(self, name)]
        if idle:
            raise ValueError(
                f"{', '.join(idle)}: a hash is fixed from the start and has no stage 1; leave them unset."
            )
        if self.share_experts_in_stage1 and self.distilled_router is None:
            raise ValueError(
                f"`share_experts_in_stage1` keeps experts equal until the routing is frozen, and that of {self.router_type!r} "
                "never is without a `distilled_router`: name one, or leave it at False."
            )

    def _validate_split_token_ids(self):
        ids = self.split_token_ids
        wrong = [token_id for token_id in ids if not 0 <= token_id < self.vocab_size]
        if wrong or len(set(ids)) != len(ids):
            raise ValueError(
                f"`split_token_ids` must be different token ids in 0..{self.vocab_size - 1}, got {ids}; leave out those that "
                "stand there twice or lie outside the vocabulary."
            )
        if self.router_type != "hash" and self.distilled_router not in TABLE_ROUTERS:
            raise ValueError(
                f"`split_token_ids` splits rows of routing tables, which `distilled_router` {self.distilled_router!r} has not: choose "
                f'one of {list(TABLE_ROUTERS)} or `router_type="hash"`, or leave it at None.'
            )

    def _validate_positions(self, name: str, num_blocks_name: str):
        positions, num_blocks = getattr(self, name), getattr(self, num_blocks_name)
        if positions is None:
            _POSITIONS.check(name, None)
        outside = [position for position in positions if not 0 <= position <= num_blocks]
        if outside:
            raise ValueError(
                f"`{name}` {outside} lie outside 0..{num_blocks_name} ({num_blocks}): k places a MoE layer after "
                "block k, 0 before the first block."
            )
        if len(set(positions)) != len(positions) and self.get_text_config() is not self:
            raise ValueError(
                f"`{name}` {positions} names a position twice, but a block of a backbone carries one MoE layer: place each at "
                "another block."
            )


def _get_router_aux_loss_coef(config: StableMoEBaseConfig) -> float:
    is_dense = all(config.__dict__.get(name) == [] for name in config._moe_positions)
    return 0.0 if is_dense or config.__dict__.get("router_fingerprint") else config.routing_loss_factor


def _set_router_aux_loss_coef(config: StableMoEBaseConfig, value: float):
    # A trainer that writes back the 0 that it has read, as SFTTrainer does, changes nothing.
    if "router_aux_loss_coef" not in config.__dict__ or value != config.router_aux_loss_coef:
        config.__dict__["router_aux_loss_coef"] = value


# After the class is made, so that it stays a field, with a default, to `dataclasses`. What is saved is what was set.
StableMoEBaseConfig.router_aux_loss_coef = property(_get_router_aux_loss_coef, _set_router_aux_loss_coef)


# Fields that a decoder of transformers has of its own: those that it determines, and those that are of the paper's blocks.
BACKBONE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)
_PAPER_BLOCK_FIELDS = (
    "position_embedding_type",
    "scale_embedding",
    "do_layer_norm_before",
    "initialization",
    "dropout",
    "attention_dropout",
    "moe_intermediate_size",
)


class StableMoEConfig(StableMoEBaseConfig):
    r"""Configuration of [`StableMoEModel`] and [`StableMoEForCausalLM`]; the fields of [`StableMoEBaseConfig`] and these.

    The defaults are the paper's base language model (Dai et al., ACL 2022, table 7).

    Args:
        num_hidden_layers (`int`, *optional*, defaults to 12): Transformer blocks L; MoE layers are not counted.
        moe_layer_positions (`list[int]`, *optional*): where MoE layers stand: k = after block k, 0 = before the first
            block. `None` is one layer in the middle, `[num_hidden_layers // 2]`; `[]` is the dense Transformer. Layers at one
            position run one after the other: three with `num_expert_sublayers=1` are one of three sublayers, each routed by
            itself.
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): config of a decoder-only language model of transformers
            (`LlamaConfig`, `Qwen3Config`, ...): MoE layers then stand between the blocks of that decoder, whose positions,
            attention, cache and head stay its own. It determines `vocab_size`, `hidden_size`, `num_hidden_layers`,
            `num_attention_heads`, `max_position_embeddings`, `tie_word_embeddings` and special tokens; `intermediate_size`,
            `hidden_act`, `layer_norm_eps` and `initializer_range` are of the experts. `None`, the default, is the paper's
            blocks.
        moe_placement (`str`, *optional*, defaults to `"between"`): `"between"`, the paper's: MoE layers stand between the
            blocks; or `"ffn"`: at position k, from 1, gated experts take the place of block k's own gated FFN, whose width and
            activation are theirs, as in Mixtral and all that came after. For a `backbone_config` with such FFNs.

    Raises:
        ValueError: if a field is out of range or does not fit another one; the message names field, value and remedy.
    """

    model_type = "stablemoe"
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "aux_loss",
        "router_logits",
        "expert_indices",
        "task_loss",
        "balance_loss",
        "distillation_loss",
        "distillation_agreement",
        "expert_load",
        "routing_health",
    ]

    sub_configs = {"backbone_config": AutoConfig}
    _moe_positions = {"moe_layer_positions": "num_hidden_layers"}
    _rules = StableMoEBaseConfig._rules | {
        "num_hidden_layers": _COUNT,
        "moe_layer_positions": _optional(_POSITIONS),
        "moe_placement": _choice(MOE_PLACEMENTS),
        "backbone_config": _optional(
            Rule(lambda value: isinstance(value, (dict, PreTrainedConfig)), "must be a config of transformers")
        ),
    }

    num_hidden_layers: int = 12
    moe_layer_positions: list[int] | None = None
    backbone_config: dict | PreTrainedConfig | None = None
    moe_placement: str = "between"

    def __post_init__(self, **kwargs):
        if self.backbone_config is not None:
            self._adopt_backbone()
        if self.moe_placement == "ffn" and self.moe_layer_positions is None:
            self.moe_layer_positions = [max(self.num_hidden_layers // 2, 1)]
        super().__post_init__(**kwargs)

    def _adopt_backbone(self):
        """Take from the backbone's config what it determines."""
        if self.expert_type is None:
            self.expert_type = "gated"
        activation = getattr(self.backbone_config, "hidden_activation", None)  # Gemma's name
        activation = activation or getattr(self.backbone_config, "hidden_act", None)
        if self.hidden_act is None and self.expert_type == "gated" and activation in ACT2FN:
            self.hidden_act = activation
        replaced = ("intermediate_size",) if self.moe_placement == "ffn" else ()
        for name in (*BACKBONE_FIELDS, *replaced):
            ours, default = getattr(self, name), getattr(type(self), name)
            theirs = getattr(self.backbone_config, name, default)
            if ours not in (default, theirs):
                raise ValueError(
                    f"`{name}` ({ours}) is not that of the backbone, a {self.backbone_config.model_type!r} with {theirs}: "
                    "leave it out, or change it in `backbone_config`."
                )
            setattr(self, name, theirs)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.backbone_config, name, None))

    def __setattr__(self, name, value):
        if name == "backbone_config" and isinstance(value, dict):
            fields = dict(value)
            model_type = fields.pop("model_type", None)
            if model_type is None:
                raise ValueError("`backbone_config` has no `model_type`, which says what it is the config of.")
            value = AutoConfig.for_model(model_type, **fields)
        super().__setattr__(name, value)
        if name in BACKBONE_FIELDS and self.__dict__.get("backbone_config") is not None:
            setattr(self.backbone_config, name, value)  # what the backbone determines is said in both

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """Return the config of the blocks, by which caches and masks are made: the backbone's, where there is one."""
        return self if self.backbone_config is None else self.backbone_config

    def validate_architecture(self):
        """Check every field of the architecture against the others."""
        if self.backbone_config is not None:
            for name in BACKBONE_FIELDS:  # programs that ask for the text config set them there
                setattr(self, name, getattr(self.backbone_config, name, getattr(self, name)))
        super().validate_architecture()
        if self.backbone_config is not None:
            idle = [name for name in _PAPER_BLOCK_FIELDS if getattr(self, name) != getattr(type(self), name)]
            if idle:
                raise ValueError(
                    f"{', '.join(f'`{name}`' for name in idle)}: of the paper's blocks, which a `backbone_config` takes the "
                    "place of; leave them out, or set what the backbone has for them in its config."
                )
        if self.moe_placement == "ffn":
            self._validate_in_place_of_ffn()
        if self.is_encoder_decoder:
            raise ValueError(
                "`is_encoder_decoder` must be False: for a model with an encoder, use StableMoESeq2SeqConfig."
            )

    def _validate_in_place_of_ffn(self):
        if self.backbone_config is None or self.expert_type != "gated":
            raise ValueError(
                '`moe_placement` "ffn" puts gated experts in place of the gated FFNs of a `backbone_config`: set that and '
                '`expert_type="gated"`, or choose "between".'
            )
        if 0 in self.moe_layer_positions:
            raise ValueError(
                '`moe_layer_positions` 0 stands before the first block; with `moe_placement="ffn"` k is the FFN of block k, from '
                "1."
            )


class StableMoESeq2SeqConfig(StableMoEBaseConfig):
    r"""Configuration of [`StableMoESeq2SeqModel`] and [`StableMoEForConditionalGeneration`].

    The fields of [`StableMoEBaseConfig`] and these. The defaults are the paper's translation model (Dai et al., ACL
    2022, table 8): blocks, positions and initialisation of the original Transformer.

    Args:
        vocab_size (`int`, *optional*, defaults to 64000): one vocabulary for source and target.
        hidden_size (`int`, *optional*, defaults to 512): as in the base.
        intermediate_size (`int`, *optional*, defaults to 2048): as in the base.
        num_attention_heads (`int`, *optional*, defaults to 8): of self- and cross-attention alike.
        max_position_embeddings (`int`, *optional*, defaults to 256): longest source and longest target.
        position_embedding_type (`str`, *optional*, defaults to `"sinusoidal"`): as in the base.
        scale_embedding (`bool`, *optional*, defaults to `True`): as in the base.
        do_layer_norm_before (`bool`, *optional*, defaults to `False`): as in the base.
        initializer_range (`float`, *optional*, defaults to 0.044): 1 / sqrt(512), so that scaled embeddings start with
            unit variance.
        dropout (`float`, *optional*, defaults to 0.1): as in the base.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`): encoder, decoder and head share one embedding.
        encoder_layers (`int`, *optional*, defaults to 6): Transformer blocks of the encoder.
        decoder_layers (`int`, *optional*, defaults to 6): Transformer blocks of the decoder.
        encoder_moe_layer_positions (`list[int]`, *optional*): where MoE layers stand in the encoder: k = after block k,
            0 = before the first block. `None` is one layer in the middle (table 8: after the third block); `[]` is none.
        decoder_moe_layer_positions (`list[int]`, *optional*): the same for the decoder.
        label_smoothing (`float`, *optional*, defaults to 0.1): share of the probability that the target of the task
            loss spreads over the vocabulary, while training only: in evaluation the loss is the plain cross-entropy.
        pad_token_id (`int`, *optional*, defaults to 0): fills up batches.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 1): ends every source and target.
        decoder_start_token_id (`int`, *optional*, defaults to 1): the token that every decoder input begins with.

    Raises:
        ValueError: if a field is out of range or does not fit another one; the message names field, value and remedy.
    """

    model_type = "stablemoe-seq2seq"
    attribute_map = {"num_hidden_layers": "encoder_layers"}
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "aux_loss",
        "encoder_aux_loss",
        "decoder_aux_loss",
        "encoder_router_logits",
        "decoder_router_logits",
        "encoder_expert_indices",
        "decoder_expert_indices",
        "task_loss",
        "balance_loss",
        "distillation_loss",
        "distillation_agreement",
        "expert_load",
        "routing_health",
    ]

    _moe_positions = {"encoder_moe_layer_positions": "encoder_layers", "decoder_moe_layer_positions": "decoder_layers"}
    _rules = StableMoEBaseConfig._rules | {
        **dict.fromkeys(("encoder_layers", "decoder_layers"), _COUNT),
        **dict.fromkeys(_moe_positions, _optional(_POSITIONS)),
        "label_smoothing": _PROBABILITY,
        "decoder_start_token_id": _optional(_TOKEN_ID),
    }

    vocab_size: int = 64000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    max_position_embeddings: int = 256
    position_embedding_type: str = "sinusoidal"
    scale_embedding: bool = True
    do_layer_norm_before: bool = False
    initializer_range: float = 0.044
    dropout: float = 0.1
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_moe_layer_positions: list[int] | None = None
    decoder_moe_layer_positions: list[int] | None = None
    label_smoothing: float = 0.1
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 1
    is_encoder_decoder: bool = True

    def validate_architecture(self):
        """Check every field of the architecture against the others."""
        super().validate_architecture()
        if not self.is_encoder_decoder:
            raise ValueError("`is_encoder_decoder` must be True: for a model without encoder, use StableMoEConfig.")
        for name in ("pad_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            if value is None or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"`{name}` {value!r} lies outside the vocabulary 0..{self.vocab_size - 1}: decoder inputs are made "
                    "of the labels, which needs it."
                )


__all__ = [
    "BACKBONE_FIELDS",
    "BALANCE_GRADIENTS",
    "DISTILLED_ROUTERS",
    "EXPERT_PARAMETERS",
    "EXPERT_TYPES",
    "GATED_EXPERTS_TP_PLAN",
    "GATED_EXPERT_PARAMETERS",
    "INITIALIZATIONS",
    "MOE_PLACEMENTS",
    "PACKAGE_FUNCTIONS",
    "POSITION_EMBEDDING_TYPES",
    "ROUTER_NORMALIZATIONS",
    "ROUTER_TYPES",
    "SHARED_EXPERTS_TP_PLAN",
    "TABLE_ROUTERS",
    "StableMoEBaseConfig",
    "StableMoEConfig",
    "StableMoESeq2SeqConfig",
    "from_package",
]
