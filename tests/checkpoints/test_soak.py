"""A run that is killed again and again, at random moments, ends in the bits of the run that nothing interrupts.

Run: `python -m pytest tests/checkpoints/test_soak.py -m slow -s`; `SOAK_CYCLES=1000` sets the number of kills.
"""

import mmap
import os
import random
import shutil
import time
from collections import Counter

import pytest
from transformers import Trainer

from helpers.forks import LATEST, ShortWorkplace, finish, fork_script, last_step
from helpers.workplaces import assert_same_saved_weights
from modeling_stablemoe.checkpoints.manifests import CheckpointManifestCallback
from modeling_stablemoe.training.transition import StageTransitionCallback


CYCLES = int(os.environ.get("SOAK_CYCLES", "200"))
PHASES = ["before training", "training", "inside a save", "at the transition", "after the last step"]
STARTING, TRAINING, SAVING, TRANSITION, ENDING = range(5)
STEPS = 24


class Phases:
    """What a forked child is doing, for its parent to see: install `mark` in the child, read `now` in the parent."""

    def __init__(self):
        self._shared = mmap.mmap(-1, 1)

    @property
    def now(self) -> int:
        return self._shared[0]

    def reset(self):
        self._shared[0] = STARTING

    def mark(self):
        self._wrap(Trainer, "_run_epoch", TRAINING, ENDING)
        self._wrap(Trainer, "_save_checkpoint", SAVING, SAVING)  # the manifest comes after it
        self._wrap(CheckpointManifestCallback, "on_save", SAVING, TRAINING)
        self._wrap(StageTransitionCallback, "_freeze", TRANSITION, TRAINING)

    def _wrap(self, owner, name: str, during: int, after: int):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self._shared[0] = during
            result = original(*args, **kwargs)
            self._shared[0] = after
            return result

        setattr(owner, name, wrapped)


def kill_somewhere(run, phases: Phases, generator: random.Random, seconds: float) -> str | None:
    """Kill a run at a random moment; tell in which phase that was, or `None` for a run that had ended before.

    `seconds` is about how long training takes. One kill in ten comes while the run still starts; of the others, half
    anywhere, half where moments are short and matter.
    """
    if generator.random() < 0.1:
        time.sleep(generator.uniform(0, 1))
    else:
        wait_for(run, phases, TRAINING)
        wanted = generator.choice([None, None, SAVING, TRANSITION, ENDING])
        if wanted != TRANSITION:
            time.sleep(generator.uniform(0, seconds / 2) * generator.random())  # the earlier the likelier
        if wanted is not None:
            wait_for(run, phases, wanted)
            time.sleep(generator.uniform(0, 0.002 if wanted == TRANSITION else 0.05))
    if run.poll():
        return None
    run.kill()
    return PHASES[phases.now]


def wait_for(run, phases: Phases, wanted: int):
    """Wait until a run is in a phase, or past it and at its end."""
    deadline = time.monotonic() + 120
    while phases.now not in (wanted, ENDING) and not run.poll() and time.monotonic() < deadline:
        time.sleep(0.0005)


def seconds_of_training(workplace, phases: Phases, *more: str) -> float:
    """Let a run end undisturbed, in the folder `whole`; give how long it trained."""
    run = fork_script(workplace, "whole", *more, before=phases.mark)
    wait_for(run, phases, TRAINING)
    started = time.monotonic()
    wait_for(run, phases, ENDING)
    seconds = time.monotonic() - started
    assert run.wait() == [0], run.output[-3000:]
    return seconds


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_soak_of_kills_and_resumes(tmp_path):
    workplace, generator, phases = ShortWorkplace(tmp_path), random.Random(0), Phases()
    steps = ("--max_steps", str(STEPS))
    finish(workplace, "warm", *steps)  # fills the cache of the data
    seconds = seconds_of_training(workplace, phases, *steps)
    folder, whole = tmp_path / "run", tmp_path / "whole"
    survived, ends, step = Counter(), 0, None
    while sum(survived.values()) < CYCLES:
        more = LATEST if folder.exists() else ()
        phases.reset()
        run = fork_script(workplace, "run", *steps, *more, before=phases.mark)
        phase = kill_somewhere(run, phases, generator, seconds)
        codes = run.wait()
        assert phase is not None or codes == [0], run.output[-3000:]
        assert "Traceback" not in run.output
        # No kill may cost a checkpoint that was whole.
        before, step = step, last_step(folder)
        assert before is None or step >= before
        if phase == "training":
            phase = "before the first checkpoint" if step is None else "between saves"
        if phase is not None:
            survived[phase] += 1
        else:
            assert_same_saved_weights(folder, whole)
            shutil.rmtree(folder)
            ends, step = ends + 1, None
    finish(workplace, "run", *steps, *(LATEST if folder.exists() else ()))
    assert_same_saved_weights(folder, whole)
    print(f"\n{sum(survived.values())} kills survived, {ends + 1} runs ended in the same bits: {dict(survived)}")  # noqa: T201
    if CYCLES >= 200:
        assert len(survived) == len(PHASES) + 1
