"""Scenarios on several real processes (gloo, CPU): one start serves many."""

import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, GradientState


def start(worker: Callable, *args, world: int = 2, seconds: float = 300):
    """Run `worker(rank, *args)` in every process, to the end of all."""
    # Forks need not import anything, but cannot use a CUDA device or the threads that autograd has for one.
    method = "spawn" if torch.cuda.is_available() else "fork"
    context = mp.start_processes(_as_new, args=(worker, *args), nprocs=world, join=False, start_method=method)
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the processes did not end: one of them waits for another"
    finally:
        for child in context.processes:
            child.terminate()


def _as_new(rank: int, worker: Callable, *args):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    worker(rank, *args)


def run_scenarios(scenarios: Sequence[Callable], folder: Path, world: int = 2, one_group: bool = False) -> Path:
    """Call `scenario(rank, folder)` for all scenarios in every process; `results` gives what they return.

    Each has a group of processes of its own, so that one that fails on one rank leaves none waiting in the next; with
    `one_group` all share one.
    """
    start(_process, scenarios, folder, world, one_group, world=world)
    return folder


def results(folder: Path, scenario: Callable, world: int = 2) -> list[dict]:
    """What a scenario returned, by rank."""
    loaded = [torch.load(_file(folder, scenario, world, rank), weights_only=False) for rank in range(world)]
    assert all(isinstance(result, dict) for result in loaded), "\n".join(r for r in loaded if isinstance(r, str))
    return loaded


def _file(folder: Path, scenario: Callable, world: int, rank: int) -> Path:
    return folder / f"{scenario.__name__}.{world}.{rank}.pt"


def _process(rank: int, scenarios: Sequence[Callable], folder: Path, world: int, one_group: bool):
    torch.set_num_threads(1)
    if one_group:
        # What a launcher sets; the group is ready when accelerate reads it, so nobody listens there.
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    if "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # nothing listens to the outside
    for scenario in scenarios:
        if not dist.is_initialized():
            store = dist.FileStore(str(folder / f"{scenario.__name__}.{world}.store"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=45))
        dist.barrier()  # one that ends without a collective would else close the connection that another still opens
        try:
            torch.manual_seed(rank)
            result = scenario(rank, folder)
        except Exception:  # noqa: BLE001 - the test reports it
            result = traceback.format_exc()
        torch.save(result, _file(folder, scenario, world, rank))
        if not one_group:
            dist.destroy_process_group()
    if one_group:
        dist.destroy_process_group()
