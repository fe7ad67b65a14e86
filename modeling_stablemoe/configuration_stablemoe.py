# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the StableMoE models: names, defaults and validation, nothing else."""

from numbers import Integral, Real

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


# One entry a router class of `routing_stablemoe.py`.
ROUTER_TYPES = ("stable",)


class StableMoEConfig(PreTrainedConfig):
    r"""Configuration of [`StableMoEModel`] and [`StableMoEForCausalLM`].

    The defaults are the paper's base language model (Dai et al., ACL 2022, table 7).

    Args:
        vocab_size (`int`, *optional*, defaults to 50257): size V of the vocabulary; the routing tables have as many rows.
        hidden_size (`int`, *optional*, defaults to 768): width d of the hidden states.
        intermediate_size (`int`, *optional*, defaults to 3072): inner width of the FFNs, of blocks and experts alike.
        num_hidden_layers (`int`, *optional*, defaults to 12): Transformer blocks L; MoE layers are not counted.
        num_attention_heads (`int`, *optional*, defaults to 12): attention heads; divides `hidden_size`.
        hidden_act (`str`, *optional*, defaults to `"relu"`): activation of blocks and experts.
        max_position_embeddings (`int`, *optional*, defaults to 1024): learned positions, the longest sequence.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): epsilon of every LayerNorm.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of the initial weights.
        dropout (`float`, *optional*, defaults to 0.0): dropout on embeddings, attention and FFN outputs of the blocks.
        attention_dropout (`float`, *optional*, defaults to 0.0): dropout on attention probabilities.
        use_cache (`bool`, *optional*, defaults to `True`): return key/value caches by default.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`): the head shares the token embedding.
        num_experts (`int`, *optional*, defaults to 32): experts N of each MoE layer.
        num_expert_sublayers (`int`, *optional*, defaults to 3): FFN sublayers stacked in one expert.
        moe_layer_positions (`list[int]`, *optional*): where MoE layers stand: k = after block k, 0 = before the first
            block. `None` is one layer in the middle, `[num_hidden_layers // 2]`; `[]` is the dense Transformer.
        router_type (`str`, *optional*, defaults to `"stable"`): the routing strategy.
        distilled_router_dim (`int`, *optional*, defaults to 50): width of the distilled router's token embedding D.
        balance_loss_coef (`float`, *optional*, defaults to 0.3): alpha of eq. 8.
        distillation_loss_coef (`float`, *optional*, defaults to 1.0): weight of L_dis (1 in eq. 11; the released
            training command has 0.3).
        router_aux_loss_coef (`float`, *optional*, defaults to 1.0): factor on the whole auxiliary loss,
            `loss = task_loss + router_aux_loss_coef * aux_loss` with
            `aux_loss = balance_loss_coef * L_bal + distillation_loss_coef * L_dis`. It is the one name that trainers
            of the ecosystem know (TRL sets it, to 0.001 unless told otherwise); leave it at 1 for the paper's loss.
        expert_capacity_factor (`float`, *optional*): tokens past `factor * tokens / num_experts` on one expert pass the
            layer unchanged while training (the released code has 2). `None` drops no token; inference never does.
        output_router_logits (`bool`, *optional*, defaults to `False`): return `router_logits` and `expert_indices`.
        router_fingerprint (`str`, *optional*): sha256 of the frozen routing tables, written by `freeze_router()` and
            checked on loading; `None` in stage 1.

    Raises:
        ValueError: if a field is out of range or does not fit another one; the message names field, value and remedy.
    """

    model_type = "stablemoe"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "aux_loss",
        "router_logits",
        "expert_indices",
        "task_loss",
        "balance_loss",
        "distillation_loss",
        "distillation_agreement",
        "expert_load",
    ]

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "relu"
    max_position_embeddings: int = 1024
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
    moe_layer_positions: list[int] | None = None
    router_type: str = "stable"
    distilled_router_dim: int = 50
    balance_loss_coef: float = 0.3
    distillation_loss_coef: float = 1.0
    router_aux_loss_coef: float = 1.0
    expert_capacity_factor: float | None = None
    output_router_logits: bool = False
    router_fingerprint: str | None = None

    def __post_init__(self, **kwargs):
        if self.moe_layer_positions is None and isinstance(self.num_hidden_layers, Integral):
            self.moe_layer_positions = [self.num_hidden_layers // 2]
        super().__post_init__(**kwargs)
        self.validate_architecture()
        self.moe_layer_positions = sorted(self.moe_layer_positions)

    def validate_architecture(self):
        """Check every field of the architecture against its range and against the others."""
        super().validate_architecture()
        self._validate_numbers()
        self._validate_moe()
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` {self.pad_token_id} lies outside the vocabulary 0..{self.vocab_size - 1}; raise "
                "`vocab_size` or choose a token that is in it."
            )
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
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "num_experts",
            "num_expert_sublayers",
            "distilled_router_dim",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        for name in ("balance_loss_coef", "distillation_loss_coef", "router_aux_loss_coef", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}.")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
                raise ValueError(f"`{name}` is a probability in [0, 1), got {value!r}.")
        if not isinstance(self.layer_norm_eps, Real) or not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"`layer_norm_eps` must be a number in (0, 1), got {self.layer_norm_eps!r}.")

    def _validate_moe(self):
        if self.router_type not in ROUTER_TYPES:
            raise ValueError(f"`router_type` {self.router_type!r} is unknown; choose one of {list(ROUTER_TYPES)}.")
        positions = self.moe_layer_positions
        if not isinstance(positions, (list, tuple)) or any(
            isinstance(position, bool) or not isinstance(position, Integral) for position in positions
        ):
            raise ValueError(f"`moe_layer_positions` must be a list of integers, got {positions!r}.")
        outside = [position for position in positions if not 0 <= position <= self.num_hidden_layers]
        if outside:
            raise ValueError(
                f"`moe_layer_positions` {outside} lie outside 0..num_hidden_layers ({self.num_hidden_layers}): "
                "k places a MoE layer after block k, 0 before the first block."
            )
        if len(set(positions)) != len(positions):
            raise ValueError(
                f"`moe_layer_positions` {positions} names a position twice; for a larger MoE layer raise "
                "`num_expert_sublayers`."
            )
        factor = self.expert_capacity_factor
        if factor is not None and (
            isinstance(factor, bool) or not isinstance(factor, Real) or not 0 < factor < float("inf")
        ):
            raise ValueError(f"`expert_capacity_factor` must be None (no token is dropped) or > 0, got {factor!r}.")


__all__ = ["ROUTER_TYPES", "StableMoEConfig"]
