# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the StableMoE models: names, defaults and validation, nothing else."""

from numbers import Integral, Real

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.distributed import DistributedConfig


# The default coefficient of the balance loss of each router of `routing_stablemoe.py`, whose `register_router` adds others:
# paper table 7; Fedus et al. (2022), section 2.2; BASE is balanced by its assignment, a hash is not learned.
ROUTER_TYPES = {"stable": 0.3, "switch": 0.01, "base": 0.0, "hash": 0.0}
# One entry a kind of distilled router, see `distillation_stablemoe.py` (paper table 6).
DISTILLED_ROUTERS = ("word_embedding", "counts", "bigram", "cnn", "transformer_1", "transformer_2", "transformer_3")
# Of these the routing is a table over the vocabulary; the others look back at earlier tokens.
TABLE_ROUTERS = ("word_embedding", "counts")
BALANCE_GRADIENTS = ("all", "centroids")
ROUTER_NORMALIZATIONS = ("center", "standardize")
POSITION_EMBEDDING_TYPES = ("learned", "sinusoidal")
# Of each sublayer of a stack of experts; the first dimension of every one is `num_experts`.
EXPERT_PARAMETERS = ("norm_weight", "norm_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")


def _expert_parallel_plan() -> dict[str, str]:
    """Tell transformers what to deal out to the processes of expert parallelism, and where tokens are sent."""
    stack = "moe_layers.*.expert_stack"
    plan = {f"{stack}.sublayers.*.{name}": "grouped_gemm" for name in EXPERT_PARAMETERS}
    if hasattr(DistributedConfig, "ep_size"):
        return plan | {stack: "ep_dispatch_experts"}
    # Before 5.19 every process has all tokens, and the ids of its own experts are made out of the router's.
    return plan | {"moe_layers.*.dispatch": "ep_router", stack: "moe_tp_experts"}


class StableMoEBaseConfig(PreTrainedConfig):
    r"""What [`StableMoEConfig`] and [`StableMoESeq2SeqConfig`] share: the widths of blocks and experts, and the routing.

    Args:
        vocab_size (`int`, *optional*, defaults to 50257): size V of the vocabulary; the routing tables have as many rows.
        hidden_size (`int`, *optional*, defaults to 768): width d of the hidden states.
        intermediate_size (`int`, *optional*, defaults to 3072): inner width of the FFNs, of blocks and experts alike.
        num_attention_heads (`int`, *optional*, defaults to 12): attention heads; divides `hidden_size`.
        hidden_act (`str`, *optional*, defaults to `"relu"`): activation of blocks and experts.
        max_position_embeddings (`int`, *optional*, defaults to 1024): positions, the longest sequence.
        position_embedding_type (`str`, *optional*, defaults to `"learned"`): `"learned"`, or `"sinusoidal"` as in the
            original Transformer, which has no parameters.
        scale_embedding (`bool`, *optional*, defaults to `False`): multiply token embeddings by sqrt(d), as the original
            Transformer does.
        do_layer_norm_before (`bool`, *optional*, defaults to `True`): LayerNorm before attention and FFN of a block and
            after the last block (pre-norm); else after each residual sum (post-norm), as in the original Transformer.
            Experts are pre-norm in either case.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): epsilon of every LayerNorm.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of the initial weights.
        dropout (`float`, *optional*, defaults to 0.0): dropout on embeddings, attention and FFN outputs of the blocks.
        attention_dropout (`float`, *optional*, defaults to 0.0): dropout on attention probabilities.
        use_cache (`bool`, *optional*, defaults to `True`): return key/value caches by default.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`): the head shares the token embedding.
        num_experts (`int`, *optional*, defaults to 32): experts N of each MoE layer.
        num_expert_sublayers (`int`, *optional*, defaults to 3): FFN sublayers stacked in one expert.
        router_type (`str`, *optional*, defaults to `"stable"`): the routing strategy, a row of table 1: `"stable"`,
            `"switch"`, `"base"`, `"hash"` or the name of a router of your own (see `register_router`).
        distilled_router (`str`, *optional*): what the routing is distilled into while it is learned, so that it can be
            frozen (table 6). `"word_embedding"` sees the token alone and freezes into a table. So does `"counts"`, which
            waits for no gradient: each token id goes to the expert that it was sent to most often (see `CountRouter`).
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
        balance_gradient (`str`, *optional*, defaults to `"all"`): what learns from the balance loss: `"all"` is the
            paper's, centroids and hidden states; `"centroids"` keeps it out of the hidden states, which else can shut
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
        expert_bias_rate (`float`, *optional*, defaults to 0.0): balances without a loss (Wang et al., 2024): a bias an
            expert is added to the scores that choose experts, not to the gate; after each forward pass of stage 1 it
            rises by so much where an expert had less than its share of the tokens of all processes, and falls where it
            had more. 0 is the paper's.
        counts_half_life (`int`, *optional*): tokens, of all processes, after which a token counts half for `"counts"`.
            `None`: all tokens of stage 1 count the same.
        share_experts_in_stage1 (`bool`, *optional*, defaults to `False`): while the routing is learned all experts of a
            layer are equal and learn from all of its tokens; they part when it is frozen, each to learn from its own
            tokens. So no update is lost on an expert that will not serve the token. `False` is the paper's.
        reset_gates_at_freeze (`bool`, *optional*, defaults to `False`): set the centroids to zero when the routing is
            frozen, so that every sigmoid gate begins stage 2 at 1/2. Where the frozen expert of a token is not the
            backbone's choice its score is low, so its gate is shut, and a shut gate learns next to nothing. `False`, the
            paper's, keeps the centroids.
        max_frozen_load (`float`, *optional*): when the routing is frozen into a table, no expert gets more than this
            times the mean of the tokens of stage 1; the table keeps as much agreement as that allows (see
            `balanced_table`). Stage 2 has no balance loss, so what is uneven then stays uneven. >= 1; `None`, the paper's,
            freezes the distilled router as it is.
        frozen_load_bands (`int`, *optional*, defaults to 1): with `max_frozen_load`, cut the token ids into so many bands
            from frequent to rare, each with as many tokens, and keep to the limit after every band: frequent ids are
            spread over all experts, too (see `balanced_table_in_bands`).
        router_aux_loss_coef (`float`, *optional*, defaults to 1.0): factor on the whole auxiliary loss,
            `loss = task_loss + router_aux_loss_coef * aux_loss` with
            `aux_loss = balance_loss_coef * L_bal + distillation_loss_coef * L_dis`. It is the one name that trainers
            of the ecosystem know (TRL sets it, to 0.001 unless told otherwise); leave it at 1 for the paper's loss.
        expert_capacity_factor (`float`, *optional*): tokens past `factor * tokens / num_experts` on one expert pass the
            layer unchanged while training (the released code has 2). `None` drops no token; inference never does.
        output_router_logits (`bool`, *optional*, defaults to `False`): return router logits and expert indices.
        router_fingerprint (`str`, *optional*): sha256 of the frozen routing, written by `freeze_router()` and
            checked on loading; `None` in stage 1.
        pruned_tokens (`list[str]`, *optional*): which token ids have lost an expert, written by `prune_experts` where
            any have: of the language model, or of encoder and decoder, a bit an id (see `pack_ids`). A forward pass that
            meets one of them says so once.

    Raises:
        ValueError: if a field is out of range or does not fit another one; the message names field, value and remedy.
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    hidden_act: str = "relu"
    max_position_embeddings: int = 1024
    position_embedding_type: str = "learned"
    scale_embedding: bool = False
    do_layer_norm_before: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    dropout: float = 0.0
    attention_dropout: float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    num_experts: int = 32
    num_expert_sublayers: int = 3
    router_type: str = "stable"
    distilled_router: str | None = None
    distilled_router_dim: int = 50
    balance_loss_coef: float | None = None
    distillation_loss_coef: float = 1.0
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

    # No fields themselves. What transformers shards under expert parallelism and FSDP2, by name in a language model's
    # backbone, an encoder or a decoder. Routers stay whole: each decides over all experts. Embeddings, which may be tied,
    # and the last norm stay with the root.
    base_model_ep_plan = _expert_parallel_plan()
    base_model_fsdp_plan = {"layers.*": "free_full_weight", "moe_layers.*": "free_full_weight"}
    # Fields in [0, 1):
    _probabilities = ("dropout", "attention_dropout")
    # Fields that place MoE layers, each with the field that counts the blocks they stand between:
    _moe_positions = {}

    def __post_init__(self, **kwargs):
        for positions, num_blocks in self._moe_positions.items():
            if getattr(self, positions) is None and isinstance(getattr(self, num_blocks), Integral):
                setattr(self, positions, [getattr(self, num_blocks) // 2])
        if self.distilled_router is None and self.router_type == "stable":
            self.distilled_router = "word_embedding"
        if self.balance_loss_coef is None:
            self.balance_loss_coef = ROUTER_TYPES.get(str(self.router_type), 0.0)
        super().__post_init__(**kwargs)
        self.validate_architecture()
        for positions in self._moe_positions:
            setattr(self, positions, sorted(getattr(self, positions)))

    @property
    def num_moe_layers(self) -> int:
        """`int`: MoE layers of the whole model."""
        return sum(len(getattr(self, positions)) for positions in self._moe_positions)

    @property
    def num_experts_per_tok(self) -> int:
        """`int`: 1: the name that other libraries ask for."""
        return 1

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
        return super().from_dict(config_dict, **kwargs)

    def validate_architecture(self):
        """Check every field of the architecture against its range and against the others."""
        super().validate_architecture()
        self._validate_numbers()
        self._validate_moe()
        if self.pad_token_id is not None and not (
            isinstance(self.pad_token_id, Integral) and 0 <= self.pad_token_id < self.vocab_size
        ):
            raise ValueError(
                f"`pad_token_id` {self.pad_token_id!r} lies outside the vocabulary 0..{self.vocab_size - 1}; raise "
                "`vocab_size` or choose a token that is in it."
            )
        if self.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            raise ValueError(
                f"`position_embedding_type` {self.position_embedding_type!r} is unknown; choose one of "
                f"{list(POSITION_EMBEDDING_TYPES)}."
            )
        for name in ("scale_embedding", "do_layer_norm_before"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` {self.hidden_act!r} is unknown; transformers has {sorted(ACT2FN)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be divisible by `num_attention_heads` "
                f"({self.num_attention_heads}): the heads share the hidden size evenly."
            )

    def _validate_numbers(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "max_position_embeddings",
            "num_experts",
            "num_expert_sublayers",
            "distilled_router_dim",
            "frozen_load_bands",
            *self._moe_positions.values(),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        for name in ("balance_loss_coef", "distillation_loss_coef", "router_aux_loss_coef", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}.")
        for name in self._probabilities:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
                raise ValueError(f"`{name}` is a probability in [0, 1), got {value!r}.")
        eps = self.layer_norm_eps
        if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 < eps < float("inf"):
            raise ValueError(f"`layer_norm_eps` must be a finite number > 0, got {eps!r}.")

    def _validate_moe(self):
        if not isinstance(self.router_type, str) or self.router_type not in ROUTER_TYPES:
            raise ValueError(
                f"`router_type` {self.router_type!r} is unknown; choose one of {list(ROUTER_TYPES)}, or import the file "
                "that registers it first (`register_router`)."
            )
        if self.distilled_router not in (None, *DISTILLED_ROUTERS):
            raise ValueError(
                f"`distilled_router` {self.distilled_router!r} is unknown; choose one of {list(DISTILLED_ROUTERS)}."
            )
        if self.router_type == "hash" and self.distilled_router is not None:
            raise ValueError(
                f"`distilled_router` {self.distilled_router!r} has nothing to learn from a hash, which is fixed from the "
                "start; leave it at None."
            )
        self._validate_stage1()
        pruned, sides = self.pruned_tokens, len(self._moe_positions)
        if pruned is not None and (not isinstance(pruned, list) or len(pruned) != sides):
            raise ValueError(
                f"`pruned_tokens` must be None or a list of {sides} strings, as `prune_experts` writes it."
            )
        for positions, num_blocks in self._moe_positions.items():
            self._validate_positions(positions, num_blocks)
        factor = self.expert_capacity_factor
        if factor is not None and (
            isinstance(factor, bool) or not isinstance(factor, Real) or not 0 < factor < float("inf")
        ):
            raise ValueError(f"`expert_capacity_factor` must be None (no token is dropped) or > 0, got {factor!r}.")

    def _validate_stage1(self):
        for name, choices in (
            ("balance_gradient", BALANCE_GRADIENTS),
            ("router_normalization", (None, *ROUTER_NORMALIZATIONS)),
            ("share_experts_in_stage1", (False, True)),
            ("reset_gates_at_freeze", (False, True)),
        ):
            value = getattr(self, name)
            if not isinstance(value, (str, bool, type(None))) or value not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")
        for name, least, optional in (
            ("balance_loss_warmup_tokens", 0, False),
            ("router_half_life", 1, False),
            ("counts_half_life", 1, True),
        ):
            value = getattr(self, name)
            if optional and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"`{name}` is a number of tokens, an integer >= {least}; got {value!r}.")
        rate, limit = self.expert_bias_rate, self.max_frozen_load
        if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= rate < float("inf"):
            raise ValueError(f"`expert_bias_rate` must be a finite number >= 0, got {rate!r}.")
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, Real) or not 1 <= limit < float("inf")
        ):
            raise ValueError(
                f"`max_frozen_load` is a multiple of the mean load, a number >= 1 or None; got {limit!r}."
            )
        self._validate_stage1_of_router()

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
        if self.frozen_load_bands > 1 and self.max_frozen_load is None:
            raise ValueError(
                f"`frozen_load_bands` ({self.frozen_load_bands}) belongs to `max_frozen_load`; set that too, to 1.05 say."
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

    def _validate_positions(self, name: str, num_blocks_name: str):
        positions, num_blocks = getattr(self, name), getattr(self, num_blocks_name)
        if not isinstance(positions, (list, tuple)) or any(
            isinstance(position, bool) or not isinstance(position, Integral) for position in positions
        ):
            raise ValueError(f"`{name}` must be a list of integers, got {positions!r}.")
        outside = [position for position in positions if not 0 <= position <= num_blocks]
        if outside:
            raise ValueError(
                f"`{name}` {outside} lie outside 0..{num_blocks_name} ({num_blocks}): k places a MoE layer after "
                "block k, 0 before the first block."
            )
        if len(set(positions)) != len(positions):
            raise ValueError(
                f"`{name}` {positions} names a position twice; for a larger MoE layer raise `num_expert_sublayers`."
            )


class StableMoEConfig(StableMoEBaseConfig):
    r"""Configuration of [`StableMoEModel`] and [`StableMoEForCausalLM`]; the fields of [`StableMoEBaseConfig`] and these.

    The defaults are the paper's base language model (Dai et al., ACL 2022, table 7).

    Args:
        num_hidden_layers (`int`, *optional*, defaults to 12): Transformer blocks L; MoE layers are not counted.
        moe_layer_positions (`list[int]`, *optional*): where MoE layers stand: k = after block k, 0 = before the first
            block. `None` is one layer in the middle, `[num_hidden_layers // 2]`; `[]` is the dense Transformer.

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

    _moe_positions = {"moe_layer_positions": "num_hidden_layers"}

    num_hidden_layers: int = 12
    moe_layer_positions: list[int] | None = None


class StableMoESeq2SeqConfig(StableMoEBaseConfig):
    r"""Configuration of [`StableMoESeq2SeqModel`] and [`StableMoEForConditionalGeneration`].

    The fields of [`StableMoEBaseConfig`] and these. The defaults are the paper's translation model (Dai et al., ACL
    2022, table 8): blocks, positions and initialisation of the original Transformer.

    Args:
        vocab_size (`int`, *optional*, defaults to 64000): one vocabulary for source and target.
        hidden_size (`int`, *optional*, defaults to 512): see `StableMoEBaseConfig`.
        intermediate_size (`int`, *optional*, defaults to 2048): see `StableMoEBaseConfig`.
        num_attention_heads (`int`, *optional*, defaults to 8): of self- and cross-attention alike.
        max_position_embeddings (`int`, *optional*, defaults to 256): longest source and longest target.
        position_embedding_type (`str`, *optional*, defaults to `"sinusoidal"`): see `StableMoEBaseConfig`.
        scale_embedding (`bool`, *optional*, defaults to `True`): see `StableMoEBaseConfig`.
        do_layer_norm_before (`bool`, *optional*, defaults to `False`): see `StableMoEBaseConfig`.
        initializer_range (`float`, *optional*, defaults to 0.044): 1 / sqrt(512), so that scaled embeddings start with
            unit variance.
        dropout (`float`, *optional*, defaults to 0.1): see `StableMoEBaseConfig`.
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

    _probabilities = ("dropout", "attention_dropout", "label_smoothing")
    _moe_positions = {"encoder_moe_layer_positions": "encoder_layers", "decoder_moe_layer_positions": "decoder_layers"}

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
        """Check every field of the architecture against its range and against the others."""
        super().validate_architecture()
        if not self.is_encoder_decoder:
            raise ValueError("`is_encoder_decoder` must be True: for a model without encoder, use StableMoEConfig.")
        for name in ("pad_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"`{name}` {value!r} lies outside the vocabulary 0..{self.vocab_size - 1}: decoder inputs are made "
                    "of the labels, which needs it."
                )


__all__ = [
    "BALANCE_GRADIENTS",
    "DISTILLED_ROUTERS",
    "EXPERT_PARAMETERS",
    "POSITION_EMBEDDING_TYPES",
    "ROUTER_NORMALIZATIONS",
    "ROUTER_TYPES",
    "TABLE_ROUTERS",
    "StableMoEBaseConfig",
    "StableMoEConfig",
    "StableMoESeq2SeqConfig",
]
