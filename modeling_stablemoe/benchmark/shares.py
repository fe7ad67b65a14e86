# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""What a MoE layer spends its time on: torch's profiler, its operators sorted into groups.

Routing is what runs within the modules that route (router, frozen router, dispatch) on the way forward; everything else is
told by the name of the operator. Time between operators, Python's own, is not counted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from modeling_stablemoe.model.frozen_stablemoe import FrozenRouting
from modeling_stablemoe.model.layer_stablemoe import ExpertDispatch
from modeling_stablemoe.model.routing_stablemoe import Router


ROUTING, SORTING, GATHERING, PRODUCTS, OTHER = "routing", "sorting", "gathering", "products", "other"
GROUPS = (ROUTING, SORTING, GATHERING, PRODUCTS, OTHER)
# What the products would not need: the cost of having experts.
OVERHEAD = (ROUTING, SORTING, GATHERING)
# Parts of operators' names; the first group that has one wins.
WORDS = {
    SORTING: ("sort", "histc", "cumsum", "bincount", "searchsorted", "topk"),
    GATHERING: ("index", "gather", "scatter", "embedding", "take", "nonzero", "cat"),
    PRODUCTS: ("mm", "linear", "matmul", "grouped", "product"),
}
RANGE = "benchmark routing"


def group_of(name: str) -> str:
    """Tell the group of an operator outside the modules that route.

    Args:
        name (`str`): such as "aten::addmm"; an operator that is not torch's own and tells nothing else is a product.
    """
    namespace, _, operator = name.rpartition("::")
    for group, words in WORDS.items():
        if any(word in operator for word in words):
            return group
    return OTHER if namespace == "aten" else PRODUCTS


@contextmanager
def _mark_routing(layer: nn.Module) -> Iterator[None]:
    """Let the profiler see when the modules that route run."""
    ranges, handles = [], []

    def begin(*_):
        ranges.append(record_function(RANGE))
        ranges[-1].__enter__()

    def end(*_):
        ranges.pop().__exit__(None, None, None)

    for module in layer.modules():
        if isinstance(module, (Router, FrozenRouting, ExpertDispatch)):
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_routing(event) -> bool:
    while event is not None:
        if event.name == RANGE:
            return True
        event = event.cpu_parent
    return False


def measure_shares(
    layer: nn.Module, run: Callable[[], object], device: torch.device, passes: int
) -> dict[str, list[float]]:
    """Measure what a layer's time goes to.

    Args:
        layer (`torch.nn.Module`): that `run` runs.
        run (`Callable`): a pass.
        device (`torch.device`): whose time counts.
        passes (`int`): that are measured, after one that is not.

    Returns:
        `dict[str, list[float]]`: the share of each of `GROUPS` in the time of all operators, a number a pass.

    Raises:
        RuntimeError: if the profiler saw nothing, as on a device that it cannot watch.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    shares = {group: [] for group in GROUPS}
    run()
    for _ in range(passes):
        with _mark_routing(layer), profile(activities=activities) as profiler:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        seconds = _sum_up(profiler.events(), device)
        total = sum(seconds.values())
        if not total:
            raise RuntimeError("the profiler saw no operator")
        for group in GROUPS:
            shares[group].append(seconds[group] / total)
    return shares


def _sum_up(events, device: torch.device) -> dict[str, float]:
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        is_operator = "::" in event.name and not event.name.startswith(("autograd::", "torch::autograd::"))
        if event.device_type != DeviceType.CPU or not is_operator:
            continue  # kernels are counted with the operator that launched them
        cost = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds[ROUTING if _is_routing(event) else group_of(event.name)] += cost
    return seconds


__all__ = ["GROUPS", "OVERHEAD", "group_of", "measure_shares"]
