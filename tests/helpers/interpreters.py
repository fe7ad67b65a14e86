"""New interpreters without the seconds in which torch and transformers are imported.

    with Interpreters({**os.environ, "HF_HUB_OFFLINE": "1"}) as interpreters:
        interpreters.run("-c", "print(1)", cwd=folder).stdout

A process imports those two once, but nothing of the package, and forks whenever something is to run. What runs there has
its own working directory, environment, standard output and exit status, as after `python ...`.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


# What scripts and checkpoints need of them; importing one of these imports datasets and accelerate, too.
PRELOADED = (
    "torch.distributed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation",
    "transformers.trainer",
    "transformers.trainer_seq2seq",
)


class Interpreters:
    """New interpreters, from `__enter__` to `__exit__`.

    Args:
        environment (`dict[str, str]`): of the process that imports; libraries read their settings of it once and for all.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment = {**environment, "OMP_NUM_THREADS": "1"}
        self._server = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._server is not None:
            self._server.kill()
            self._server.communicate()

    def run(
        self, *command: str | Path, cwd: Path, environment: dict[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess:
        """Run what could stand after `python`: `-c` and code, `-m` and a module, or a path; then arguments."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
        with tempfile.TemporaryDirectory() as folder:
            outputs = [f"{folder}/{name}" for name in ("stdout", "stderr")]
            request = {
                "command": [str(part) for part in command],
                "cwd": str(cwd),
                "environment": environment or self.environment,
                "outputs": outputs,
            }
            self._server.stdin.write(json.dumps(request).encode() + b"\n")
            pid = int(self._server.stdout.readline())
            if not select.select([self._server.stdout], [], [], timeout)[0]:
                os.kill(pid, signal.SIGKILL)
            status = int(self._server.stdout.readline())
            printed = [Path(path).read_text() for path in outputs]
        return subprocess.CompletedProcess(command, status, *printed)


@functools.cache
def interpreters() -> Interpreters:
    """Those of this process of the tests; they end with it."""
    ours = ("PYTHONPATH", "HF_HOME", "HF_MODULES_CACHE", "HF_DATASETS_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    home = tempfile.TemporaryDirectory()
    atexit.register(home.cleanup)
    return Interpreters({**environment, "HF_HOME": home.name, "HF_HUB_OFFLINE": "1"})


def _serve():
    del sys.path[0]  # the folder of this file
    for name in PRELOADED:
        __import__(name)
    gc.freeze()  # or collecting in a child would copy what they share
    for line in sys.stdin.buffer:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            _end(_become(**request))
        print(pid, flush=True)  # noqa: T201 - to the tests
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201


def _become(command: list[str], cwd: str, environment: dict[str, str], outputs: list[str]) -> int:
    """Run a command in this process, as if it had just begun; return its exit status."""
    import datasets

    for descriptor, path in enumerate([os.devnull, *outputs]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if "HF_DATASETS_CACHE" in environment:
        datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind, *arguments = command
    try:
        if kind == "-c":
            sys.argv = ["-c", *arguments[1:]]
            sys.path.insert(0, "")
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(kind).parent))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:  # noqa: BLE001 - as the interpreter itself
        traceback.print_exception(type(error), error, error.__traceback__.tb_next)
        return 1
    return 0


def _end(status: int):
    """End without the seconds in which an interpreter takes itself apart."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()


__all__ = ["Interpreters", "interpreters"]
