"""Runs of the training script in forked children of the test process: killable, and without the seconds of imports."""

import functools
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from workplaces import ROOT, load_script


ENGINES = {
    "one": (1, None),
    "ddp": (2, None),
    "fsdp": (2, "fsdp2"),
}


class Fork:
    """A function that runs in forked children, one for each process of an engine.

    `ranks[k]` is the process id of process k. What the children print is in `output`.
    """

    def __init__(self, function: Callable[[], object], log: Path, processes: int = 1, environment=None):
        self.log = log
        environment = {**(environment or {}), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if processes > 1:
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "GLOO_SOCKET_IFNAME": "lo",
            }
        log.write_text("")
        sys.stdout.flush()
        self.ranks = [self._fork(function, rank, environment, processes > 1) for rank in range(processes)]
        self.codes: dict[int, int] = {}

    def _fork(self, function, rank: int, environment: dict, is_distributed: bool) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
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

    @property
    def output(self) -> str:
        return self.log.read_text()

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
        return [self.codes[pid] for pid in self.ranks]

    def kill(self, *ranks: int):
        """Kill some processes, or all."""
        for rank in ranks or range(len(self.ranks)):
            if self.ranks[rank] not in self.codes:
                os.kill(self.ranks[rank], signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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
        arguments += ["--per_device_train_batch_size", "2"]

    def run():
        os.chdir(workplace.folder)
        datasets.config.HF_DATASETS_CACHE = workplace.folder / "cache"
        torch.set_num_threads(1)
        if configuration is not None:
            arguments.extend(["--use_cpu", "False"])
            sys.path.insert(0, str(ROOT / "tests" / "scripts"))
            import as_on_gpus

            PartialState._prepare_backend = as_on_gpus.prepare_backend
            PartialState.set_device = as_on_gpus.set_device
            PartialState.default_device = property(lambda self: torch.device("cpu"))
        if before is not None:
            before()
        main(arguments)

    log = workplace.folder / f"{Path(output).name}.log"
    return Fork(run, log, processes, engine_environment(configuration))
