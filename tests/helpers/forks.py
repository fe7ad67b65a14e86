"""Runs of the training script in forked children of the test process: killable, and without the seconds of imports."""

import fcntl
import functools
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import Trainer
from transformers.trainer_callback import DefaultFlowCallback, TrainerState

from helpers import ROOT
from helpers.workplaces import PRESET, CausalWorkplace, free_port, load_script
from modeling_stablemoe.checkpoints import manifests
from modeling_stablemoe.checkpoints.folders import last_complete_checkpoint
from modeling_stablemoe.model.stages_stablemoe import TwoStageRoutingMixin
from modeling_stablemoe.training.transition import StageTransitionCallback


LATEST = ("--resume_from_checkpoint", "latest")
ENGINES = {
    "one": (1, None),
    "ddp": (2, None),
    "fsdp": (2, "fsdp2"),
}


class ShortWorkplace(CausalWorkplace):
    """Ten steps, frozen after the fourth, saved after every second: nothing else takes time."""

    dropout = 0.1

    def __init__(self, folder: Path):
        super().__init__(folder)
        (folder / "preset.json").write_text(json.dumps({**PRESET, "num_experts": 3, "dropout": self.dropout}))

    def arguments(self, output: str, *more: str, max_steps: int = 10) -> list[str]:
        short = ("--config_overrides", "", "--eval_strategy", "no", "--fluctuation_check_steps", "0")
        return super().arguments(output, *short, *more, max_steps=max_steps)


class Fork:
    """A function that runs in forked children, one for each process of an engine.

    `ranks[k]` is the process id of process k. What the children print is in `output`.
    """

    def __init__(self, function: Callable[[], object], processes: int = 1, environment=None):
        # A pipe, since a limit on the size of files would hold for a log, too.
        self._read, self._write = os.pipe()
        fcntl.fcntl(self._write, fcntl.F_SETPIPE_SZ, 1 << 20)
        environment = {**(environment or {}), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if processes > 1:
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": free_port(),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "GLOO_SOCKET_IFNAME": "lo",
            }
        sys.stdout.flush()
        self.ranks = [self._fork(function, rank, environment, processes > 1) for rank in range(processes)]
        os.close(self._write)
        self.codes: dict[int, int] = {}
        self.output = ""

    def _fork(self, function, rank: int, environment: dict, is_distributed: bool) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.dup2(self._write, 1)
            os.dup2(self._write, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            os.environ.update(environment)
            if is_distributed:
                os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            function()
            code = 0
        except SystemExit as stop:
            sys.stdout.write(f"{stop.code}\n")
        except BaseException:  # noqa: BLE001 - nothing of the tests may run on in a child
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self) -> bool:
        """Whether all have ended."""
        for pid in self.ranks:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.ranks)

    def wait(self, timeout: float = 120) -> list[int]:
        """Wait for the end; one that fails ends the others, as a launcher does."""
        deadline = time.monotonic() + timeout
        while not self.poll():
            if any(self.codes.values()) or time.monotonic() > deadline:
                self.kill()
            time.sleep(0.005)
        with os.fdopen(self._read) as pipe:
            self.output = pipe.read()
        return [self.codes[pid] for pid in self.ranks]

    def kill(self, *ranks: int):
        """Kill some processes, or all."""
        for rank in ranks or range(len(self.ranks)):
            if self.ranks[rank] not in self.codes:
                os.kill(self.ranks[rank], signal.SIGKILL)


@functools.cache
def script_main(name: str) -> Callable:
    return load_script(name).main


def engine_environment(configuration: str | None) -> dict:
    """What `accelerate launch` sets for a file of `configuration/accelerate`."""
    if configuration is None:
        return {}
    config = yaml.safe_load((ROOT / "configuration" / "accelerate" / f"{configuration}.yaml").read_text())
    fsdp = {
        name.upper() if name.startswith("fsdp") else f"FSDP_{name.upper()}": str(value)
        for name, value in config["fsdp_config"].items()
    }
    return {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "no", **fsdp}


def fork_script(workplace, output: str, *more: str, engine: str = "one", before=None, **options) -> Fork:
    """Run the training script of a workplace under an engine; `before` is called first, in each child."""
    processes, configuration = ENGINES[engine]
    arguments = workplace.arguments(output, *more, **options)
    main = script_main(workplace.script.removesuffix(".py"))  # imported here, so that children need not
    if engine != "one":
        arguments += workplace.share_of_two

    def run():
        os.chdir(workplace.folder)
        datasets.config.HF_DATASETS_CACHE = workplace.folder / "cache"
        torch.set_num_threads(1)
        if configuration is not None:
            arguments.extend(["--use_cpu", "False"])
            from helpers.scripts import as_on_gpus

            PartialState._prepare_backend = as_on_gpus.prepare_backend
            PartialState.set_device = as_on_gpus.set_device
            PartialState.default_device = property(lambda self: torch.device("cpu"))
        if before is not None:
            before()
        main(arguments)

    return Fork(run, processes, engine_environment(configuration))


def finish(workplace, output, *more, engine="one"):
    run = fork_script(workplace, output, *more, engine=engine)
    assert set(run.wait()) == {0}, run.output[-3000:]
    return workplace.folder / output


def last_step(folder):
    checkpoint = last_complete_checkpoint(folder)
    return None if checkpoint is None else int(checkpoint.name.split("-")[1])


# What a fault may hit, in the order of a save; the first is before any.
POINTS = {
    "transition": (TwoStageRoutingMixin, "freeze_router"),
    "weights": (Trainer, "save_model"),
    "optimizer": (Trainer, "_save_optimizer_and_scheduler"),
    "random state": (Trainer, "_save_rng_state"),
    "trainer state": (TrainerState, "save_to_json"),
    "watch": (StageTransitionCallback, "on_save"),
    "manifest": (manifests, "write_manifest"),
    "rotation": (manifests, "rotate_checkpoints"),
}


def fault(point: str, step: int, action: Callable[[], object], rank: int | None = None) -> Callable[[], None]:
    """Make something for `fork_script` to call first: `action` happens as `point` of `step` begins, on one rank or all."""
    owner, name = POINTS[point]
    reached = {"step": 0}

    def install():
        original = getattr(owner, name)

        def faulty(*args, **kwargs):
            if reached["step"] == step and rank in (None, int(os.environ.get("RANK", "0"))):
                os.write(1, f"fault: {point}\n".encode())
                action()
            return original(*args, **kwargs)

        def count(self, args, state, control, **kwargs):
            reached["step"] = state.global_step + 1

        DefaultFlowCallback.on_step_begin = count
        setattr(owner, name, faulty)

    return install


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk():
    """Let every file end after a few bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
