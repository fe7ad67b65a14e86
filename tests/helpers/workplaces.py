"""Folders where the scripts run: as users run them, in processes of their own, or in this process, in less time."""

import contextlib
import importlib.util
import io
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from helpers import ROOT
from helpers.interpreters import interpreters


WORDS = "the quick brown fox jumps over a lazy dog while seven wizards watch".split()
PRESET = {
    "source": "made up",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "num_experts": 9,
    "num_expert_sublayers": 1,
    "distilled_router_dim": 8,
    "dropout": 0.1,
}
TRANSLATION_PRESET = {
    "source": "made up",
    "model_type": "stablemoe-seq2seq",
    "hidden_size": 16,
    "intermediate_size": 24,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "num_experts": 3,
    "num_expert_sublayers": 1,
    "distilled_router_dim": 8,
    "dropout": 0.1,
    "do_layer_norm_before": True,
}


class Workplace:
    """A folder with a datasets cache of its own, and the commands to work there; `arguments` makes a command line.

    `script` is the name of the training script, `share_of_two` what makes two processes take the batches of one.
    """

    script: str
    share_of_two: tuple[str, ...] = ()

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **os.environ,
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }

    def attempt(self, *command: str | Path) -> subprocess.CompletedProcess:
        """Run what could stand after `python`, in a process of its own."""
        return interpreters().run(*command, cwd=self.folder, environment=self.environment)

    def run(self, *command: str | Path) -> str:
        """Run it to a good end; return what was printed."""
        done = self.attempt(*command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def train(self, output: str, *more: str, **options) -> str:
        return self.run(ROOT / "scripts" / self.script, *self.arguments(output, *more, **options))

    def train_here(self, output: str, *more: str, **options) -> str:
        """The same in this process."""
        return run_here(self.script.removesuffix(".py"), *self.arguments(output, *more, **options), folder=self.folder)


class CausalWorkplace(Workplace):
    """A folder with a corpus and a preset."""

    script = "run_clm.py"
    share_of_two = ("--per_device_train_batch_size", "2")

    def __init__(self, folder: Path):
        super().__init__(folder)
        if (folder / "preset.json").exists():
            return
        generator = random.Random(0)
        documents = [" ".join(generator.choices(WORDS, k=25)) for _ in range(200)]
        (folder / "corpus.txt").write_text("\n\n".join(documents) + "\n")
        (folder / "preset.json").write_text(json.dumps(PRESET))

    def arguments(self, output: str, *more: str, max_steps: int = 16) -> list[str]:
        text = f"""--model_preset preset.json --config_overrides {{"num_experts":3}} --train_files corpus.txt
            --vocab_size 280 --block_size 16 --validation_share 0.1 --stage1_steps 0.4 --fluctuation_check_steps 3
            --fluctuation_tokens 64 --max_steps {max_steps} --per_device_train_batch_size 4 --learning_rate 1e-2
            --lr_scheduler_type constant --weight_decay 0.1 --logging_steps 3 --save_strategy steps --save_steps 2 --save_total_limit 2
            --eval_strategy steps --eval_steps 5 --report_to none --use_cpu True --disable_tqdm True --do_train True"""
        return [*text.split(), "--document_separator", "", "--output_dir", str(self.folder / output), *more]


class TranslationWorkplace(Workplace):
    """A folder with a preset and a corpus of two languages, made of English by writing each word backwards or twice."""

    script = "run_translation.py"

    def __init__(self, folder: Path):
        super().__init__(folder)
        if (folder / "preset.json").exists():
            return
        generator = random.Random(0)
        for name, number in (("train", 120), ("validation", 11), ("test", 13)):
            rows = [generator.choices(WORDS, k=generator.randint(1, 5)) for _ in range(number)]
            lines = [
                {
                    "en": " ".join(row),
                    "back": " ".join(word[::-1] for word in row),
                    "twice": " ".join(word * 2 for word in row),
                }
                for row in rows
            ]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "preset.json").write_text(json.dumps(TRANSLATION_PRESET))

    def arguments(self, output: str, *more: str, max_steps: int = 16) -> list[str]:
        text = f"""--model_preset preset.json --language_pairs back-en twice-en --train_files train.jsonl
            --validation_files validation.jsonl --test_files test.jsonl --vocab_size 90 --batch_tokens 96
            --stage1_steps 0.4 --fluctuation_check_steps 3 --fluctuation_tokens 64 --max_steps {max_steps}
            --per_device_train_batch_size 1 --per_device_eval_batch_size 4 --learning_rate 1e-2
            --lr_scheduler_type inverse_sqrt --warmup_steps 4 --weight_decay 0.1 --logging_steps 3 --save_strategy steps
            --save_steps 2 --save_total_limit 2 --eval_strategy steps --eval_steps 8 --report_to none --use_cpu True
            --disable_tqdm True --predict_with_generate True --generation_num_beams 2 --generation_max_length 20
            --do_train True"""
        return [*text.split(), "--output_dir", str(self.folder / output), *more]


def run_here(script: str, *arguments, folder: Path) -> str:
    """Call `main` of a script in `folder`, in this process; return what it prints and logs."""
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    # transformers keeps its messages to itself, and scripts set its level.
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    levels = [logger.level for logger in loggers]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        loggers[0].setLevel(logging.INFO)
        for logger in loggers:
            logger.addHandler(handler)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                load_script(script).main([str(argument) for argument in arguments])
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)
    return printed.getvalue()


@dataclass(frozen=True)
class TrainedRun:
    """A finished run of a training script, shared by all tests: nobody changes it."""

    workplace: Workplace
    folder: Path  # the run's, `whole` in the workplace's
    output: str  # what the script printed

    @classmethod
    def shared(cls, kind: type[Workplace], folder: Path) -> "TrainedRun":
        """Train once for all processes that ask for `folder`, as a user does: by the script, in a process of its own."""
        with made_once(folder) as is_new:
            workplace = kind(folder)
            if is_new:
                (folder / "printed.txt").write_text(workplace.train("whole"))
        return cls(workplace, folder / "whole", (folder / "printed.txt").read_text())


@contextlib.contextmanager
def made_once(folder: Path):
    """Make the folder and yield True to the first that comes; False, once the folder is filled, to all who come later."""
    with FileLock(f"{folder}.lock"):
        mark = folder / ".made"
        is_new = not mark.exists()
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        yield is_new
        mark.touch()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_launched(launcher: subprocess.Popen):
    """Kill `accelerate launch` and the processes it started, which have sessions of their own."""
    for pid in (*children_of(launcher.pid), launcher.pid):
        os.kill(pid, signal.SIGKILL)
    launcher.communicate()


def load_script(name: str):
    """The script `name` as a module of this process: for command lines that go no further than the start."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def content(folder: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def assert_same_saved_weights(folder: Path, expected: Path):
    actual, expected = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def refuse(main, arguments) -> str:
    """Run `main`; return the one line that it ends with."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert isinstance(stop.value.code, str)  # printed to stderr, exit status 1
    assert "\n" not in stop.value.code
    return stop.value.code


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
