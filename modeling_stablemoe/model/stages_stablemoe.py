# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""The two stages of a whole model: freezing its routers, asking and checking its routing, saving and loading it."""

import copy
import hashlib
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import is_fsdp_enabled, is_local_dist_rank_0
from transformers.utils import logging

from .configuration_stablemoe import PACKAGE_FUNCTIONS
from .context_stablemoe import token_mask, whole_sequences
from .distillation_stablemoe import sees_context
from .frozen_stablemoe import BalancedTable, contents_to_load, repeated_experts
from .layer_stablemoe import StableMoELayer, moe_layers_of
from .tensors_stablemoe import is_quantized


logger = logging.get_logger(__name__)

# Whether a model is being built to take the weights of the checkpoint that its config is of.
_is_loading: ContextVar[bool] = ContextVar("is_loading", default=False)


class MismatchedShapesError(ValueError, RuntimeError):
    """Weights of other shapes than the config says: a user's error, and what `PreTrainedModel` raises for them."""


class TwoStageRoutingMixin:
    """What `PreTrainedModel` gains from MoE layers whose routing is learned in stage 1 and frozen in stage 2.

    The frozen routers (tables, or weights where the distilled router looks back at earlier tokens) are the one truth
    about the stage: they travel with the weights. `config.router_fingerprint` is their checksum, written with them and
    compared when a checkpoint is loaded.

    So a config belongs to one model: a model keeps a copy of what it is built of, the same object in all of its parts.
    """

    def __init__(self, config, *args, **kwargs):
        self.check_config(config)
        if "register_earlier_names" in PACKAGE_FUNCTIONS:
            PACKAGE_FUNCTIONS["register_earlier_names"]()
        super().__init__(config, *args, **kwargs)
        self.register_load_state_dict_pre_hook(_check_routing_to_load)
        self.register_load_state_dict_post_hook(_follow_loaded_routing)

    def post_init(self):
        """Initialise the weights; a routing that is fixed from the start is frozen from here on."""
        self._own_config()
        super().post_init()
        for layer in self.moe_layers_by_name.values():
            if next(
                layer.parameters()
            ).is_meta:  # the routing comes with the weights; -1 would pass for one of stage 1
                layer.to("meta")
        if _is_side(self) or not self._read_routing():
            return
        if not _is_loading.get():  # new weights: what the config says of a routing is of another model
            self.config.router_fingerprint, self.config.pruned_tokens = self.router_fingerprint(), None
        if self.config.router_type == "hash":
            for layer in self.moe_layers_by_name.values():
                layer.frozen_router.is_initial = True

    def _own_config(self):
        """Give the model a config of its own: others may be built of the same object, and be frozen or pruned."""
        given = [module.config for module in self.modules() if isinstance(module, TwoStageRoutingMixin)]
        own = copy.deepcopy(self.config)
        owned = {id(config): own for config in given}
        if getattr(own, "backbone_config", None) is not None:
            owned |= {id(config.backbone_config): own.backbone_config for config in given}
        for module in self.modules():
            for name in ("config", "moe_config"):
                config = owned.get(id(getattr(module, name, None)))
                if config is not None:
                    setattr(module, name, config)

    @classmethod
    def check_config(cls, config):
        """Refuse the config of another kind of model, and one whose fields have been set to what does not fit.

        Raises:
            ValueError: naming both kinds; or field, value and remedy.
        """
        if getattr(config, "model_type", None) != cls.config_class.model_type:
            raise ValueError(f"{cls.__name__} needs a {cls.config_class.__name__}, got a {type(config).__name__}.")
        config.validate_architecture()

    @property
    def moe_layers_by_name(self) -> dict[str, StableMoELayer]:
        """`dict[str, StableMoELayer]`: the MoE layers by qualified name, in the order in which tokens pass them."""
        return moe_layers_of(self)

    @property
    def routing_stage(self) -> int:
        """`int`: 1 while the routing is learned, 2 when it is frozen. A hash starts in 2, a dense model stays in 1."""
        layers = self.moe_layers_by_name
        for name, layer in layers.items():
            layer.frozen_router.follow(f"{name}.frozen_router")
        return 2 if layers and all(layer.frozen_router.is_frozen for layer in layers.values()) else 1

    def freeze_router(self) -> list[BalancedTable]:
        """Go from stage 1 to stage 2: freeze the distilled router, and route by that from now on (StableMoE, eq. 13).

        One that sees the token alone is evaluated for every token id, and its table is what is kept; of one that looks
        back at earlier tokens a copy of its weights is. The experts of all tokens are those that evaluation used a
        moment before, unless `config.max_frozen_load` sends some elsewhere to balance the table.

        Returns:
            `list[BalancedTable]`: with `max_frozen_load` the balanced table of each MoE layer and its qualities, else empty.
                Its `alone` are the token ids that outweigh the limit by themselves.

        Raises:
            RuntimeError: if the routing is frozen already.
            ValueError: if the model has no MoE layer, is the encoder or decoder of another model, or learns a routing
                that is not distilled; if weights to be frozen are NaN or infinite, naming the layer (where they make a
                table, that is a warning).
        """
        self._require_whole("freeze_router()")
        if self.routing_stage == 2:
            raise RuntimeError(
                f"The routing is frozen already (fingerprint {self.config.router_fingerprint}). To learn a routing "
                "anew, start from a stage-1 checkpoint."
            )
        self.require_distillation()
        layers = self.moe_layers_by_name
        # All are asked before any is frozen: a router may refuse.
        decided = [layer.bare_router.freeze(name) for name, layer in layers.items()]
        for layer, (contents, _) in zip(layers.values(), decided, strict=True):
            layer.frozen_router.freeze(contents)
            if self.config.reset_gates_at_freeze:
                layer.bare_router.reset_gates()
        self.config.router_fingerprint = self.router_fingerprint()
        return [balanced for _, balanced in decided if balanced is not None]

    def require_distillation(self):
        """Refuse a routing that is learned but not distilled, and so cannot be frozen.

        Raises:
            ValueError: naming the remedy.
        """
        if self.routing_stage == 1 and self.config.distilled_router is None:
            raise ValueError(
                f"A {self.config.router_type!r} router routes by hidden states and cannot be frozen: it has no "
                '`distilled_router`. Train it with `distilled_router="word_embedding"`, which then stands for it.'
            )

    def set_routing_tables(self, tables: Tensor):
        """Route by tables of one's own from now on: another hash, say. A stage-1 model is frozen by it.

        Args:
            tables (`torch.LongTensor` of shape `(moe layers, vocab_size)`): the expert of each token id; with more than one
                expert per token `(moe layers, vocab_size, num_experts_per_tok)`, all of an id different. With
                `split_token_ids` there are `config.num_routing_rows` in place of `vocab_size`: after those of the ids alone,
                for each split id those of every id that may stand before it.

        Raises:
            ValueError: if the shape is another, an expert is outside [0, num_experts) or an id has one twice, the model has
                no MoE layer or is the encoder or decoder of another model, or its distilled router looks back at earlier tokens.
        """
        self._require_whole("set_routing_tables()")
        self.require_tables()
        layers = self.moe_layers_by_name
        several = (self.config.num_experts_per_tok,) if self.config.num_experts_per_tok > 1 else ()
        expected = (len(layers), self.config.num_routing_rows, *several)
        if tuple(tables.shape) != expected:
            rows = "rows of the vocabulary and of `split_token_ids`" if self.config.split_token_ids else "vocabulary"
            dimensions = f"moe layers x {rows}" + (" x experts per token" if several else "")
            raise ValueError(f"`tables` must be of shape {expected}, {dimensions}, got {tuple(tables.shape)}.")
        if tables.min() < 0 or tables.max() >= self.config.num_experts:
            raise ValueError(f"`tables` must send every token to an expert in [0, {self.config.num_experts}).")
        repeated = repeated_experts(tables) if several else None
        if repeated is not None and repeated.any():
            layer, row, place = repeated.nonzero()[0].tolist()
            raise ValueError(
                f"`tables` must send every token to {several[0]} different experts: those of MoE layer {layer} send token "
                f"id {row} to expert {int(tables[layer, row, place])} twice."
            )
        for layer, table in zip(layers.values(), tables, strict=True):
            layer.frozen_router.freeze(table)
        self.config.pruned_tokens = None  # these tables say where every id belongs
        self.config.router_fingerprint = self.router_fingerprint()

    def split_tokens(self, token_ids: list[int]):
        """Route token ids by the token before them, too, and say so in `config.split_token_ids`.

        Each gets a row of the routing tables for every id that may stand before it. In stage 2 they begin as its own row: no
        token moves until `set_routing_tables` says where. In stage 1 so do those of the distilled router D; counts begin anew.

        Args:
            token_ids (`list[int]`): the heaviest, say; different ones in [0, vocab_size).

        Raises:
            ValueError: for ids outside the vocabulary or named twice, if some have been split before, if the model has no MoE
                layer, is the encoder or decoder of another model, or freezes its routing as weights.
        """
        self._require_whole("split_tokens()")
        self.require_tables()
        if self.config.split_token_ids:
            raise ValueError(
                f"Token ids {self.config.split_token_ids} have been split: build another model to split others."
            )
        changed = copy.deepcopy(self.config)
        changed.split_token_ids = [int(token_id) for token_id in token_ids]
        changed.validate_architecture()
        self.config.split_token_ids = changed.split_token_ids
        for layer in self.moe_layers_by_name.values():
            layer.split(changed.split_token_ids)
        if self.routing_stage == 2:
            self.config.router_fingerprint = self.router_fingerprint()

    def require_tables(self):
        """Refuse a routing that freezes as weights.

        Raises:
            ValueError: naming the remedy.
        """
        if sees_context(self.config):
            raise ValueError(
                f"A {self.config.distilled_router!r} router looks back at earlier tokens: it freezes as weights and has no "
                'tables to set. Build the model with `distilled_router="word_embedding"`, or with `router_type="hash"`.'
            )

    def _require_whole(self, method: str):
        if not self.moe_layers_by_name:
            raise ValueError("There is no router to freeze: `moe_layer_positions` is empty, this is a dense model.")
        if _is_side(self):
            raise ValueError(f"{type(self).__name__} is a part: call `{method}` on the model that holds it.")
        offloaded = [
            f"{name}.{part}.{key}"
            for name, layer in self.moe_layers_by_name.items()
            for part in ("router", "frozen_router")
            for key, values in (*getattr(layer, part).named_parameters(), *getattr(layer, part).named_buffers())
            if values.is_meta
        ]
        if offloaded:
            raise ValueError(
                f"`{method}`: {', '.join(offloaded)} are offloaded. Load the model without offloading, change its routing, "
                "save it, and offload what was saved."
            )

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the experts that inference would use.

        Where the distilled router looks back at earlier tokens, `input_ids` are whole sequences from their start. So
        they are where hidden states decide, as in Switch and BASE: a forward pass finds out.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`): in [0, vocab_size).
            attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 0 on padding, whose experts do not
                matter.

        Returns:
            `torch.LongTensor` of shape `(moe layers, batch, sequence)`: in [0, num_experts); with more than one expert per
                token `(moe layers, batch, sequence, num_experts_per_tok)`.

        Raises:
            ValueError: for an id outside the vocabulary; for an encoder-decoder whose hidden states decide.
        """
        self.base_model.check_token_ids(input_ids)
        layers = self.moe_layers_by_name.values()
        if not all(layer.is_routed_by_token for layer in layers):
            return self._route_by_hidden_states(input_ids, attention_mask)
        tokens = whole_sequences(input_ids, token_mask(attention_mask, input_ids.shape[1]))
        routes = [layer.route(tokens) for layer in layers]
        return torch.stack(routes) if routes else input_ids.new_zeros((0, *input_ids.shape))

    def _route_by_hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.config.is_encoder_decoder:
            raise ValueError(
                f"A {self.config.router_type!r} router routes by hidden states, so a token alone has no expert. Run the "
                "model on source and target with `output_router_logits=True` and read `expert_indices`."
            )
        modes = [(module, module.training) for module in self.modules()]
        outputs = self.eval().base_model(input_ids, attention_mask, use_cache=False, output_expert_indices=True)
        for module, mode in modes:
            module.training = mode
        return torch.stack(outputs.expert_indices)

    def router_fingerprint(self) -> str | None:
        """Compute the sha256 of the frozen routing.

        Returns:
            `str`: 64 hexadecimal digits, the same on every machine, dtype and device; `None` in stage 1.
        """
        if self.routing_stage == 1:
            return None
        layers = self.moe_layers_by_name.values()
        return fingerprint_of(layer.frozen_router.encode(layer.frozen_router.contents()) for layer in layers)

    def check_routing(self):
        """Check what is frozen against itself and against `config.router_fingerprint`, after loading.

        Raises:
            ValueError: naming the layer, if a table (or weights) is damaged, missing, or not the one that the config was
                saved with.
        """
        if not self._read_routing():
            return
        expected = self.config.router_fingerprint
        layers = self.moe_layers_by_name
        unfrozen = [name for name, layer in layers.items() if not layer.frozen_router.is_frozen]
        if expected is not None and (unfrozen or not layers):
            missing = f"the {_noun(layers)} of {', '.join(unfrozen)}" if layers else "every MoE layer"
            raise ValueError(
                f"The config says that the routing is frozen (`router_fingerprint` {expected}), but {missing} is "
                "missing from the weights. Restore the checkpoint from its source, or, to train stage 1 again, load it with "
                "`router_fingerprint=None`."
            )
        if unfrozen and len(unfrozen) < len(layers):
            raise ValueError(f"Some MoE layers are frozen and others are not: {', '.join(unfrozen)}. {_RESTORE}")
        check_fingerprint(self.router_fingerprint(), expected, layers)

    def follow_loaded_routing(self):
        """Update stage and fingerprint after frozen routers have been loaded.

        `load_state_dict` does this itself; an engine that loads its shards past it (ZeRO-3) leaves it to
        `StageTransitionCallback`. A config is not part of a state dict, so a fingerprint follows the routers into a stage.
        It never follows them to another routing.

        Raises:
            ValueError: if what was loaded is damaged, or not the routing that the config was saved with.
        """
        if not self._read_routing() or _is_side(self):
            return
        routers = [layer.frozen_router for layer in self.moe_layers_by_name.values()]
        frozen = [router.is_frozen for router in routers]
        if any(frozen) != all(frozen):
            return  # a sharded checkpoint: the next file brings the others
        if self.config.router_fingerprint is None or any(router.is_initial for router in routers):
            self.config.router_fingerprint = self.router_fingerprint()
        elif frozen and not any(frozen):
            logger.warning(
                "These weights are from stage 1: the model learns its routing again, the frozen one is gone."
            )
            self.config.router_fingerprint = None
        else:
            self.check_routing()

    def _read_routing(self) -> bool:
        """Let every layer derive its stage; return False where this process holds no weights to read it from."""
        for name, layer in self.moe_layers_by_name.items():
            if not layer.frozen_router.is_here():  # its weights belong to another process
                self._expect_routing()
                return False
            layer.frozen_router.refresh(f"{name}.frozen_router")
            layer.bare_router.restore_integers(f"{name}.router")
        return True

    def _expect_routing(self):
        """Take the stage from the config until another process, which loads the weights, sends them here (FSDP)."""
        for layer in self.moe_layers_by_name.values():
            layer.frozen_router.expect(self.config.router_fingerprint is not None)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the vocabulary as `PreTrainedModel` does, routers included.

        All old ids keep their expert. While the routing is learned, new rows of D start at N(0, 1); in a frozen model
        the new id v goes to expert v mod num_experts, and to others as far apart as can be with several per token (where the router looks back at earlier tokens: is taken for the id
        v mod the old vocabulary size), and the fingerprint follows.

        Raises:
            ValueError: if one of `split_token_ids` would be left out.
        """
        new_size = args[0] if args else kwargs.get("new_num_tokens")
        largest = max(self.config.split_token_ids or (), default=-1)
        if new_size is not None and new_size <= largest:
            raise ValueError(
                f"A vocabulary of {new_size} leaves out token id {largest}, one of `split_token_ids`: keep {largest + 1} ids at least."
            )
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size = self.config.get_text_config().vocab_size
        for layer in self.moe_layers_by_name.values():
            layer.resize(embeddings.weight.shape[0])
        if self.routing_stage == 2:
            self.config.router_fingerprint = self.router_fingerprint()
        return embeddings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Any:
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does, and check its routing.

        Raises:
            ValueError: for a frozen routing that is damaged or not the config's; for weights that cannot be read, with the
                file's own complaint, that have other shapes than the config says (a RuntimeError, too, as transformers'), or
                whose experts stand elsewhere or are of another type; and for routers that would be quantised, naming the
                tensors.
        """
        was_loading = _is_loading.set(True)
        returns_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except Exception as error:
            if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
                kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True, "device_map": "meta"}
                kwargs.pop("distributed_config", None)  # nothing is loaded, so nothing is sharded
                _, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
                raise MismatchedShapesError(_describe_mismatch(pretrained_model_name_or_path, info)) from error
            # By name: the code files of a checkpoint import nothing but torch and transformers.
            if type(error).__name__ != "SafetensorError":
                raise
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path!r} are not a readable safetensors file: {error}. It "
                "may have been cut off while saving or downloading; fetch it again or use an earlier checkpoint."
            ) from error
        finally:
            _is_loading.reset(was_loading)
        _refuse_other_experts(pretrained_model_name_or_path, model.moe_layers_by_name, info)
        _refuse_quantized_routers(model.moe_layers_by_name)
        if "experts_implementation" not in kwargs and _has_quantized_gates(model.moe_layers_by_name):
            # transformers' other backends multiply whole stacks, which torchao's tensors cannot.
            model.set_experts_implementation("eager")
        if is_fsdp_enabled() and not is_local_dist_rank_0():
            model._expect_routing()  # what stands in its frozen routers now, zeros in transformers 5.15, is no routing
        else:
            model.check_routing()
        is_learned = model.moe_layers_by_name and model.config.distilled_router and not model.config.router_fingerprint
        if is_learned and not PACKAGE_FUNCTIONS:
            logger.warning_once(_describe_package(model.config))
        return (model, info) if returns_info else model


_PARTS_OF_LAYERS = {"router", "frozen_router", "expert_stack", "experts"}
_RESTORE = "The checkpoint is damaged or mixed from two runs; restore it from its source."


def _describe_package(config) -> str:
    """Say what the code of a checkpoint cannot do with a routing that is still learned."""
    limited = "" if config.max_frozen_load is None else ", and freezing it under `max_frozen_load`,"
    return (
        "The routing of this checkpoint is still learned (stage 1). Its own code generates and trains; the callbacks of "
        f"Trainer{limited} need the package `modeling_stablemoe`, imported before the checkpoint is loaded."
    )


def _describe_mismatch(checkpoint: str, loading_info: dict) -> str:
    """Name the tensors that do not fit the config: the error of transformers only points at its log."""
    tensors = [
        f"{name} is {list(stored)} in the weights, {list(built)} by the config"
        for name, stored, built in sorted(loading_info["mismatched_keys"])
    ]
    return (
        f"The weights of {str(checkpoint)!r} do not fit its config: {'; '.join(tensors)}. Restore the config.json and the "
        "weights that were saved together. For other labels, pass `ignore_mismatched_sizes=True`: their head starts anew. "
        "To change the vocabulary, load them as they are, then call `resize_token_embeddings`."
    )


def _refuse_other_experts(checkpoint: str, layers: dict[str, StableMoELayer], loading_info: dict):
    """Refuse weights with other MoE layers than those of the config, which would start from random numbers, unnoticed."""
    missing = [
        key for key in sorted(loading_info["missing_keys"]) if key.startswith(tuple(f"{name}." for name in layers))
    ]
    surplus = [
        key for key in sorted(loading_info["unexpected_keys"]) if _PARTS_OF_LAYERS.intersection(key.split(".")[:-1])
    ]
    if any(key.endswith("_scale_inv") for key in surplus):
        raise ValueError(
            f"The experts of {str(checkpoint)!r} are quantised to FP8, which transformers runs on a GPU of compute capability "
            "8.9 or later only, and cannot turn back: load them there, or the checkpoint that they were quantised from."
        )
    if missing and surplus:
        raise ValueError(
            f"The weights of {str(checkpoint)!r} have other MoE layers than its config: `{surplus[0]}` has no place, and "
            f"`{missing[0]}` is missing. Load them with the config that they were saved with: `moe_layer_positions`, "
            "`moe_placement` and `expert_type` cannot be changed."
        )


def _refuse_quantized_routers(layers: dict[str, StableMoELayer]):
    """Refuse a quantisation that reaches routers or frozen routers: it would reroute tokens, unnoticed."""
    quantized = [
        f"{name}.{part}.{parameter}"
        for name, layer in layers.items()
        for part in ("router", "frozen_router")
        for parameter, values in getattr(layer, part).state_dict(keep_vars=True).items()
        if is_quantized(values)
    ]
    if quantized:
        raise ValueError(
            f"The `quantization_config` quantises {', '.join(quantized)}, but routing is exact only where routers are left as "
            "they are. Narrow its patterns, `re:.*\\.(expert_stack|experts)\\..*_proj` for the experts say, or add "
            r"`modules_to_not_convert=[r'.*router']`."
        )


def _has_quantized_gates(layers: dict[str, StableMoELayer]) -> bool:
    return any(
        is_quantized(parameter)
        for layer in layers.values()
        if layer.expert_name == "experts"
        for parameter in layer.expert_module.parameters()
    )


def fingerprint_of(routers: Iterable[bytes]) -> str:
    """Compute the checksum of the frozen routers of a model, in order, each written as bytes."""
    digest = hashlib.sha256(b"stablemoe-routing-1")
    for router in routers:
        digest.update(router)
    return digest.hexdigest()


def check_fingerprint(actual: str | None, expected: str | None, layers: dict[str, StableMoELayer]):
    """Refuse a routing that is not the one that a config was saved with.

    Raises:
        ValueError: naming the layers, if the `actual` fingerprint is not the `expected` one of the config.
    """
    if actual != expected:
        raise ValueError(
            f"The {_noun(layers)}s of {', '.join(layers)} are not those that this checkpoint was saved with: their "
            f"fingerprint is {actual}, the config has {expected}. {_RESTORE} If you changed the tables yourself, "
            "write the new fingerprint into config.json."
        )


def _noun(layers: dict[str, StableMoELayer]) -> str:
    """Return what the routing of all layers is frozen into; layers of one model do not differ in it."""
    return next((layer.frozen_router.noun for layer in layers.values()), "routing table")


def _is_side(model: TwoStageRoutingMixin) -> bool:
    """Return True for an encoder or a decoder: it shares the config of the whole model, but not all of its MoE layers."""
    return len(model.moe_layers_by_name) != model.config.num_moe_layers


def _check_routing_to_load(model: TwoStageRoutingMixin, state_dict: dict, prefix: str, *args):
    """Refuse a state dict with damaged tables, or with another frozen routing, before anything is overwritten."""
    if prefix or _is_side(model):
        return  # loaded as a part of a larger model, which has looked already
    layers = model.moe_layers_by_name
    encoded = []
    for name, layer in layers.items():
        contents = contents_to_load(layer.frozen_router, state_dict, f"{name}.frozen_router")
        if contents is None:
            return  # one file of several, whose routing is checked when all of it is there; or torch says what is wrong
        if layer.frozen_router.check(contents, f"{name}.frozen_router"):
            encoded.append(layer.frozen_router.encode(contents))
    is_initial = any(layer.frozen_router.is_initial for layer in layers.values())
    if encoded and model.config.router_fingerprint is not None and not is_initial:
        check_fingerprint(fingerprint_of(encoded), model.config.router_fingerprint, layers)


def _follow_loaded_routing(model: TwoStageRoutingMixin, incompatible_keys):
    model.follow_loaded_routing()


__all__ = ["MismatchedShapesError", "TwoStageRoutingMixin", "check_fingerprint", "fingerprint_of"]
