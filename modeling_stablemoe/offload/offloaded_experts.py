# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""A MoE layer's experts when most are kept off the device: a few slots on it are filled before the layer runs.

Shape suffixes: T tokens, K experts per token, D hidden size, E experts, W tokens of one wave.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from modeling_stablemoe.model.experts_stablemoe import StableMoEExperts, spread_sentinels
from modeling_stablemoe.model.gated_stablemoe import StableMoEGatedExperts

from .expert_store import FileRows, MemoryRows, expert_parameters


@dataclass
class OffloadStatistics:
    """Counts over all MoE layers since the last `reset`.

    Attributes:
        layer_passes (`int`): forward passes of MoE layers.
        waves (`int`): groups of experts that the passes computed; more than `layer_passes` if a pass needed more
            experts than there are slots.
        requests (`int`): experts that the passes needed, each counted once per layer and pass.
        hits (`int`): those that were in a slot, or on their way there, when the layer began.
        resident (`int`): those that were in a slot from an earlier forward pass.
        bytes_moved (`int`): bytes copied or read into slots.
    """

    layer_passes: int = 0
    waves: int = 0
    requests: int = 0
    hits: int = 0
    resident: int = 0
    bytes_moved: int = 0
    _seconds: float = 0.0
    _waits: list = field(default_factory=list, repr=False)

    @property
    def hit_rate(self) -> float:
        """`float`: hits / requests; NaN without requests."""
        return self.hits / self.requests if self.requests else float("nan")

    @property
    def seconds_waited(self) -> float:
        """`float`: seconds that layers waited for experts; on CUDA the device's time, which this synchronizes with."""
        self._add_up(len(self._waits))
        return self._seconds

    def add_wait(self, began: torch.cuda.Event, ended: torch.cuda.Event):
        """Keep two CUDA events; the time between them is added up later, so that nothing waits here."""
        self._waits.append((began, ended))
        if len(self._waits) > 200:
            self._add_up(100)

    def _add_up(self, count: int):
        for began, ended in self._waits[:count]:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        del self._waits[:count]

    def reset(self):
        """Set all counts to 0."""
        self.__init__()

    def __str__(self) -> str:
        """Return the counts as one line of text."""
        return (
            f"{self.requests} experts needed in {self.layer_passes} layer passes ({self.waves} waves): "
            f"{100 * self.hit_rate:.1f} % there or on their way in time, {self.resident} there from before; "
            f"{self.bytes_moved / 1e6:.1f} MB moved, {self.seconds_waited:.3f} s waited"
        )


class Transfers:
    """Runs copies to slots one after the other, on a CUDA stream of its own or in a thread if the CPU takes part."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, copy: Callable[[], None], device: torch.device, after, in_background: bool) -> Future:
        """Run `copy` after the CUDA event `after`; the future holds the event that follows it, or `None` on a CPU."""
        run = partial(self._run, copy, device, after)
        if in_background:
            return self.pool.submit(run)
        future = Future()
        future.set_result(run())
        return future

    @torch.no_grad()
    def _run(self, copy: Callable[[], None], device: torch.device, after):
        if device.type != "cuda":
            return copy()
        stream = self.streams.get(device) or self.streams.setdefault(device, torch.cuda.Stream(device))
        with torch.cuda.stream(stream):
            stream.wait_event(after)
            copy()
            done = torch.cuda.Event()
            done.record(stream)
        return done

    def close(self):
        """Finish the copies and end the thread."""
        self.pool.shutdown()


@dataclass
class Plan:
    """The experts that a layer's forward pass needs."""

    index: Tensor  # (T * K,), the experts of each token, on the CPU; E for sentinels
    announced: Tensor | None  # the same on the device, if `prefetch` was given it
    needed: list[int]  # distinct experts
    resident: int  # how many of them were in a slot
    thread: int  # id of the thread that runs the pass


class OffloadedExperts(nn.Module):
    """Replaces experts whose weights are kept off the device, for inference, with the same outputs.

    Experts stay in their slots until others need the room; the least recently used go first.

    Args:
        stack (`StableMoEExperts` or `StableMoEGatedExperts`): the experts; their parameters may be on the meta device.
        rows (`dict[str, MemoryRows or FileRows]`): where the values of each parameter are.
        num_slots (`int`): K, how many experts the device has room for.
        device (`torch.device`): where to compute.
        transfers (`Transfers`): shared by all layers.
        statistics (`OffloadStatistics`): shared by all layers.
    """

    def __init__(
        self,
        stack: StableMoEExperts | StableMoEGatedExperts,
        rows: dict[str, MemoryRows | FileRows],
        num_slots: int,
        device: torch.device,
        transfers: Transfers,
        statistics: OffloadStatistics,
    ):
        super().__init__()
        self.num_experts, self.num_slots = stack.num_experts, num_slots
        self.rows, self.transfers, self.statistics = rows, transfers, statistics
        self.slots = _build_slots(stack, num_slots, device)
        self.slot_of: OrderedDict[int, int] = OrderedDict()  # by expert, the most recently used last
        self.free = list(range(num_slots))
        self.on_their_way: dict[int, Future] = {}
        self.plan: Plan | None = None
        self.lock = threading.RLock()  # one thread at a time uses the slots
        self.used = None  # the CUDA event after which slots may be overwritten
        self._mark_used()
        self.register_state_dict_pre_hook(_refuse_state_dict)
        self.register_load_state_dict_pre_hook(_refuse_state_dict)

    @property
    def device(self) -> torch.device:
        """`torch.device`: where the slots are."""
        return next(self.slots.parameters()).device

    def prefetch(self, expert_index: Tensor):
        """Start to fetch the experts of the next forward pass, at most as many as there are slots.

        The host waits for the device here, to read the indices.

        Args:
            expert_index (`torch.LongTensor` of any shape): the experts of each token, in [0, num_experts], as `forward`
                will be given them.

        Raises:
            ValueError: while training.
        """
        self._require_inference()
        with self.lock:
            self.plan = self._make_plan(expert_index.flatten(), announced=True)
            self._fetch_first(self._waves(self.plan.needed))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_) -> Tensor:
        """Return what the experts' own `forward` returns.

        Raises:
            ValueError: while training.
            OSError: if experts cannot be read, with the file and the remedy; the other experts still work.
        """
        # The layer may also pass the tokens' order by expert, which is of no use here: they are sorted by slot.
        self._require_inference()
        with self.lock:
            plan = self._take_plan(top_k_index.flatten())
            if plan.announced is not None and plan.announced.device.type != "cpu":
                # Should never differ. Comparing on the host would make it wait, so a difference shows as NaN.
                differs_TK = plan.announced.view_as(top_k_index) != top_k_index
                top_k_weights = top_k_weights.masked_fill(differs_TK, float("nan"))
            waves = self._waves(plan.needed)
            self._count(plan, waves)
            try:
                self._fetch_first(waves)
                return self._run(waves, plan.index.view(top_k_index.shape), hidden_states, top_k_weights)
            finally:
                self._mark_used()

    def settle(self):
        """Wait until all copies are done."""
        with self.lock:
            for future in self.on_their_way.values():
                if future.exception() is None and future.result() is not None:
                    future.result().synchronize()
            self._forget_failed()

    def _apply(self, fn, recurse: bool = True):
        # A move or a cast copies the slots, which must be filled by then.
        self.settle()
        super()._apply(fn, recurse)
        self._mark_used()
        return self

    # Planning

    def _require_inference(self):
        if self.training:
            raise ValueError(
                "Offloaded experts are for inference, but the model is in training mode: call `model.eval()`, or `remove()` of "
                "what `offload_experts` returned before training."
            )

    def _make_plan(self, index_T: Tensor, announced: bool) -> Plan:
        on_host = index_T.to("cpu").clamp(max=self.num_experts)
        needed = torch.bincount(on_host, minlength=self.num_experts)[: self.num_experts].nonzero().flatten().tolist()
        self._forget_failed()
        resident = sum(expert in self.slot_of for expert in needed)
        return Plan(on_host, index_T if announced else None, needed, resident, threading.get_ident())

    def _take_plan(self, index_T: Tensor) -> Plan:
        """Return the plan that `prefetch` made for this pass, or make one now."""
        plan, self.plan = self.plan, None
        if plan is not None and plan.thread == threading.get_ident() and plan.index.shape == index_T.shape:
            if index_T.device.type != "cpu" or torch.equal(plan.index, index_T):
                self._forget_failed()  # so that they are tried again
                return plan
        return self._make_plan(index_T, announced=False)

    def _waves(self, needed: list[int]) -> list[list[int]]:
        """Return one wave if all experts fit the slots, otherwise waves of which two fit at a time."""
        if len(needed) <= self.num_slots:
            return [needed]
        wanted = set(needed)
        there = [expert for expert in self.slot_of if expert in wanted]
        order = there + [expert for expert in needed if expert not in self.slot_of]
        size = max(self.num_slots // 2, 1)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _count(self, plan: Plan, waves: list[list[int]]):
        statistics = self.statistics
        statistics.layer_passes += 1
        statistics.waves += len(waves)
        statistics.requests += len(plan.needed)
        statistics.hits += sum(expert in self.slot_of for expert in plan.needed)
        statistics.resident += plan.resident

    # Slots

    def _fetch_first(self, waves: list[list[int]]):
        ahead = min(len(waves), self._waves_that_fit)
        self._fetch([expert for wave in waves[:ahead] for expert in wave])

    @property
    def _waves_that_fit(self) -> int:
        return 2 if self.num_slots > 1 else 1

    def _fetch(self, experts: Collection[int], keep: Collection[int] = ()):
        """Fetch experts into slots that are free or hold neither these experts nor those of `keep`."""
        wanted = {*experts, *keep}
        moves = []
        for expert in experts:
            if expert in self.slot_of:
                self.slot_of.move_to_end(expert)
                continue
            slot = self.free.pop() if self.free else self._evict(wanted)
            self.slot_of[expert] = slot
            moves.append((expert, slot))
        if moves:
            in_background = self.device.type != "cuda" or not all(rows.in_memory for rows in self.rows.values())
            copy = partial(self._copy, moves)
            future = self.transfers.start(copy, self.device, self.used, in_background)
            self.on_their_way |= dict.fromkeys((expert for expert, _ in moves), future)

    def _evict(self, wanted: Collection[int]) -> int:
        expert = next(each for each in self.slot_of if each not in wanted)
        self.on_their_way.pop(expert, None)
        return self.slot_of.pop(expert)

    def _copy(self, moves: list[tuple[int, int]]):
        targets = [(self.rows[name], parameter) for name, parameter in expert_parameters(self.slots)]
        for expert, slot in moves:
            for rows, parameter in targets:
                rows.read(expert, parameter.detach()[slot])
                self.statistics.bytes_moved += rows.row_bytes

    def _await(self, experts: list[int]):
        """Wait until experts are in their slots: on the host, and on CUDA in the current stream."""
        futures = dict.fromkeys(self.on_their_way[expert] for expert in experts if expert in self.on_their_way)
        if not futures:
            return
        began = time.perf_counter()
        try:
            events = [future.result() for future in futures]
        except Exception:
            self._forget_failed()
            raise
        self.statistics._seconds += time.perf_counter() - began
        if self.device.type == "cuda":
            self._await_events(events)
        for expert in experts:
            future = self.on_their_way.get(expert)
            if future is not None and (future.result() is None or future.result().query()):
                del self.on_their_way[expert]

    def _await_events(self, events: list):
        stream = torch.cuda.current_stream(self.device)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record(stream)
        for event in events:
            stream.wait_event(event)
        ended.record(stream)
        self.statistics.add_wait(began, ended)

    def _forget_failed(self):
        """Free the slots of experts that could not be read, so that the next pass tries again."""
        for expert, future in list(self.on_their_way.items()):
            if future.done() and future.exception() is not None:
                del self.on_their_way[expert]
                self.free.append(self.slot_of.pop(expert))

    def _mark_used(self):
        if self.device.type == "cuda":
            self.used = torch.cuda.Event()
            self.used.record(torch.cuda.current_stream(self.device))

    # Computing

    def _run(self, waves: list[list[int]], index_TK: Tensor, hidden_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """Compute one wave after the other, while the next is being fetched."""
        if len(waves) == 1:
            self._await(waves[0])
            return self._compute(waves[0], index_TK, hidden_TD, weights_TK)
        delta_TD = torch.zeros_like(hidden_TD)
        for number, wave in enumerate(waves):
            self._await(wave)
            tokens_W = torch.isin(index_TK, torch.tensor(wave)).any(-1).nonzero().flatten()
            there_W = tokens_W.to(hidden_TD.device, non_blocking=True)
            delta_WD = self._compute(wave, index_TK[tokens_W], hidden_TD[there_W], weights_TK[there_W])
            delta_TD = delta_TD.index_add(0, there_W, delta_WD)
            self._mark_used()
            following = number + self._waves_that_fit
            if following < len(waves):
                self._fetch(waves[following], keep=[each for wave in waves[number + 1 : following] for each in wave])
        return delta_TD

    def _compute(self, experts: list[int], index_TK: Tensor, hidden_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """Run tokens through the slots of their experts; tokens of other experts become sentinels, which add zero."""
        slot_E = torch.full((self.num_experts + 1,), self.num_slots)
        slot_E[experts] = torch.tensor([self.slot_of[expert] for expert in experts], dtype=torch.long)
        slots_TK = slot_E[index_TK]
        has_sentinels = bool((slots_TK == self.num_slots).any())
        slots_TK = slots_TK.to(hidden_TD.device, non_blocking=True)
        if has_sentinels and isinstance(self.slots, StableMoEGatedExperts):
            return self.slots(*spread_sentinels(hidden_TD, slots_TK, weights_TK, self.num_slots))
        return self.slots(hidden_TD, slots_TK, weights_TK)


def _build_slots(
    stack: StableMoEExperts | StableMoEGatedExperts, num_slots: int, device: torch.device
) -> StableMoEExperts | StableMoEGatedExperts:
    """Build `num_slots` experts of zeros of the class and in the dtypes of `stack`."""
    with torch.device("meta"):
        slots = type(stack)(stack.config)
    for name, parameter in stack.named_parameters():
        owner_name, _, key = name.rpartition(".")
        owner = slots.get_submodule(owner_name)
        owner.num_experts = num_slots
        rows = torch.zeros((num_slots, *parameter.shape[1:]), dtype=parameter.dtype, device=device)
        setattr(owner, key, nn.Parameter(rows, requires_grad=False))
    return slots


def _refuse_state_dict(*_):
    raise ValueError(
        "The experts of this model are offloaded, so its state dict would lack them. The checkpoint that it was loaded from "
        "still has them all; to save or load weights, call `remove()` of what `offload_experts` returned first."
    )
