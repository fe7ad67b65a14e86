# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What the machinery around a model asks of it: backends of the experts, checkpointing, sharding engines, saved code."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import distributed
from transformers.distributed import DistributedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import output_capturing

from .configuration_stablemoe import PACKAGE_FUNCTIONS
from .experts_stablemoe import ALL_STABLEMOE_EXPERTS_FUNCTIONS
from .layer_stablemoe import moe_layers_of


class IntegrationMixin:
    """What `PreTrainedModel` leaves to a model with stacked experts, integer buffers and code files of its own."""

    # The classes that a checkpoint's code files hold, for `trust_remote_code`; set by each model family.
    _auto_map: dict[str, str] = {}

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save weights, frozen routers, config and the code files that load them, as `PreTrainedModel` does.

        A model that transformers has sharded is gathered: every process must call this.

        Raises:
            ValueError: under expert parallelism of a transformers that cannot gather the experts; for
                `distributed_checkpoint` where the shards would be joined.
        """
        self._require_gathering("save_pretrained")
        self.follow_loaded_routing()
        if kwargs.get("distributed_checkpoint"):
            self._refuse_joining_shards(kwargs.get("push_to_hub", False))
        if self._auto_class is not None:
            self.config.auto_map = dict(self._auto_map)
            if type(self).is_remote_code() and self._written_class() is not type(self):
                # The class that was registered is a user's own: nobody may be served the one above it.
                self.config.auto_map.pop("AutoModelForDecision", None)
        if len(args) < 2 and kwargs.get("state_dict") is None and (fetched := self._fetch_offloaded()):
            kwargs["state_dict"] = {name: fetched.get(name, value) for name, value in self.state_dict().items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        if not (args[0] if args else kwargs.get("is_main_process", True)):
            return
        written = self._written_class()
        if self._auto_class is not None and written is not type(self) and "write_code" not in PACKAGE_FUNCTIONS:
            custom_object_save(written, save_directory)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel would write to all buffers before every pass. Those of a routing are equal on all
        # processes, tables and counts alike; a hash that is random is not. PEFT wraps the model under two more names.
        if self.config.router_type == "hash":
            return []
        names = [
            f"{layer}.{name}" for layer, module in moe_layers_of(self).items() for name, _ in module.named_buffers()
        ]
        return [prefix + name for prefix in ("", "base_model.model.") for name in names]

    def _fetch_offloaded(self) -> dict[str, Tensor]:
        """Read what hooks of accelerate have offloaded where `PreTrainedModel.save_pretrained` does not find it.

        It looks only after `device_map` has made the hooks, and not where a module has several, as one that two sides
        have in common.
        """
        modules: dict[nn.Module, dict[str, Tensor]] = {}
        fetched = {}
        for name, module in self.named_modules(remove_duplicate=False):
            hook = getattr(module, "_hf_hook", None)
            is_found = hasattr(self, "hf_device_map") and hasattr(hook, "weights_map")
            if hook is None or is_found or not any(values.is_meta for values in _own_tensors(module).values()):
                continue
            if module not in modules:
                hook.pre_forward(module)
                modules[module] = {key: values.detach().cpu().clone() for key, values in _own_tensors(module).items()}
                hook.post_forward(module, None)
            fetched |= {f"{name}.{key}".lstrip("."): values for key, values in modules[module].items()}
        tied = {name: fetched[source] for name, source in self.all_tied_weights_keys.items() if source in fetched}
        return fetched | tied

    @classmethod
    def _written_class(cls) -> type:
        """Return the class that is in a file of ours: a user's subclass is in another, what FSDP2 makes in one of torch."""
        ours = set(cls._auto_map.values())
        return next((c for c in cls.__mro__ if f"{c.__module__.rpartition('.')[2]}.{c.__name__}" in ours), cls)

    @classmethod
    def is_remote_code(cls) -> bool:
        """Return True if transformers is to copy the file that the class is in.

        That of a subclass only if it was registered itself (`register_for_auto_class`): else its checkpoints are those of
        the class above it. The package writes one file for all of its own, with the config.
        """
        is_written_with_config = "write_code" in PACKAGE_FUNCTIONS and cls._written_class() is cls
        return super().is_remote_code() and "_auto_class" in vars(cls) and not is_written_with_config

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        """Shard a model before its weights are loaded.

        Tied weights are tied first: FSDP2 keeps those one that are one when it shards. transformers ties them later, when
        they are two copies that go separate ways with the first step.

        Raises:
            ValueError: if expert parallelism cannot give every process the same number of experts.
        """
        if distributed_config is not None:
            _check_num_experts(model.config.num_experts, distributed_config)
            model.tie_weights()
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        # transformers 5.23 asks a stack how many experts it has when it hooks it, which is known once the parameters are
        # dealt out. It expects those in the stack itself and so before it; here they stand in its sublayers.
        expanded, parameters = super()._expand_parallel_plan(plan), dict(self.named_parameters())
        return dict(sorted(expanded.items(), key=lambda rule: rule[0] not in parameters))

    def __getstate__(self) -> dict:
        """Leave out transformers' hooks that record outputs: they are local functions, which cannot be pickled."""
        return dict(_without_recorders(self, {}).__dict__)

    def __setstate__(self, state: dict):
        """Install again the hooks that `__getstate__` leaves out."""
        super().__setstate__(state)
        # transformers notes what a class records when it builds a model, which unpickling does not do.
        dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(type(self)), self._can_record_outputs)
        if state.get("_output_capturing_hooks_installed"):
            self._output_capturing_hooks_installed = False
            output_capturing.maybe_install_capturing_hooks(self)

    def train(self, mode: bool = True):
        """Switch between training and evaluation.

        Raises:
            ValueError: for a model that could not be saved, under expert parallelism of an older transformers.
        """
        if mode:
            self._require_gathering("train")
        return super().train(mode)

    def _require_gathering(self, method: str):
        for layer in moe_layers_of(self).values():
            experts = layer.expert_module
            if experts.num_experts < layer.num_experts and not hasattr(next(experts.parameters()), "device_mesh"):
                raise ValueError(
                    f"`{method}`: under expert parallelism this version of transformers cannot gather the experts of all "
                    "processes to save them, so it is for inference alone. Upgrade to transformers >= 5.21, or load the "
                    "checkpoint without `enable_expert_parallel`."
                )

    def _refuse_joining_shards(self, push_to_hub: bool):
        # torch asks `finfo` how large the numbers are (pytorch/pytorch#192485). Later versions of transformers have a
        # function that joins, and join by themselves only what they push.
        joins = push_to_hub or not hasattr(distributed, "consolidate_distributed_checkpoint")
        if joins and not all(values.is_floating_point() for values in self.buffers()):
            raise ValueError(
                "`distributed_checkpoint=True`: with `push_to_hub=True`, and in older versions of transformers always, the "
                "shards are joined to one file, and torch cannot join integers, such as frozen routers. Leave "
                "`distributed_checkpoint` out: the first process then gathers the weights and writes them."
            )

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the source of this class's module; ours stands in another file.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Resolve `experts_implementation`, refusing backends that these experts do not have.

        Raises:
            ValueError: naming the backends there are.
        """
        if self.config.expert_type == "gated":  # with all backends of transformers
            widths = (self.config.hidden_size, self.config.expert_size)
            is_odd = any(
                width % 8 for width in widths
            )  # `torch.nn.functional.grouped_mm` takes rows of whole 16 bytes
            return super().get_correct_experts_implementation(requested_experts or ("eager" if is_odd else None))
        available = ["eager", *ALL_STABLEMOE_EXPERTS_FUNCTIONS.valid_keys()]
        if requested_experts is not None and requested_experts not in available:
            raise ValueError(
                f'`experts_implementation="{requested_experts}"` does not know stacked StableMoE experts; choose one '
                f"of {available}."
            )
        return super().get_correct_experts_implementation(requested_experts)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=None, **kwargs):
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "Re-entrant activation checkpointing cuts the routing losses off from the router, which would silently "
                "learn nothing. Pass `{'use_reentrant': False}` as the checkpointing arguments, or none."
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        if getattr(self.config, "backbone_config", None) is not None:
            for layer in moe_layers_of(self).values():
                layer._gradient_checkpointing_func = _call  # its block, which it is in, is computed again as a whole


def _call(function: Callable, *args: Any) -> Any:
    return function(*args)


def _without_recorders(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """Copy a module down to those that transformers has hooked to record outputs, without the hooks; share all else.

    Models inside it are shared, too: they are pickled by their own rule. `twins` are the copies so far: a module that
    is held twice stays one.
    """
    if module not in twins:
        children = {
            name: child if child is None or isinstance(child, IntegrationMixin) else _without_recorders(child, twins)
            for name, child in module._modules.items()
        }
        hooks = {
            key: hook
            for key, hook in module._forward_hooks.items()
            if getattr(hook, "__module__", None) != output_capturing.__name__
        }
        twins[module] = module
        if len(hooks) < len(module._forward_hooks) or children != dict(module._modules):
            twins[module] = twin = object.__new__(type(module))
            twin.__dict__ |= module.__dict__
            twin.__dict__["_modules"] = type(module._modules)(children)
            twin.__dict__["_forward_hooks"] = type(module._forward_hooks)(hooks)
    return twins[module]


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])


def _check_num_experts(num_experts: int, distributed_config: DistributedConfig):
    """Refuse to deal out experts unevenly."""
    if not distributed_config.enable_expert_parallel:
        return
    # Before 5.19 the processes of expert parallelism are those of tensor parallelism.
    num_processes = getattr(distributed_config, "ep_size", None) or distributed_config.tp_size
    if num_experts % num_processes:
        raise ValueError(
            f"`num_experts` ({num_experts}) must be divisible by the {num_processes} processes of expert parallelism: each "
            "holds the same number of experts. Use another number of processes."
        )


__all__ = ["IntegrationMixin"]
