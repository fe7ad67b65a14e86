"""Equal batches give equal training, however they are cut up."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers import ROOT
from helpers.models import random_ids, tiny_model
from helpers.trainers import Gradients
from helpers.workplaces import free_port
from modeling_stablemoe.data.text import collate_blocks


SCRIPT = ROOT / "tests" / "helpers" / "scripts" / "train_two_stages.py"


def train(folder, batch_size, accumulation, *, max_steps=4, blocks=None, frozen=False, **config):
    """Train with plain SGD; return the gradients of every step and the final weights."""
    model = tiny_model(moe_layer_positions=[0, 2], **config)
    if frozen:
        model.freeze_router()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gradients = Gradients()
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=max_steps,
            max_grad_norm=0.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": row} for row in random_ids(24, 16, seed=1)] if blocks is None else blocks,
        data_collator=collate_blocks,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        callbacks=[gradients],
    ).train()
    return gradients.steps, model.state_dict()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(3, 2), (1, 6)])
def test_one_batch_equals_the_same_blocks_by_accumulation(tmp_path, batch_size, accumulation, frozen):
    options = {"balance_loss_coef": 0.0, "frozen": frozen}
    whole, whole_weights = train(tmp_path, 6, 1, **options)
    cut, cut_weights = train(tmp_path, batch_size, accumulation, **options)
    assert len(whole) == len(cut) == 4
    for expected, actual in zip(whole, cut, strict=True):
        assert any("distilled_router" in name for name in actual) == (not frozen)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cut_weights, whole_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batch_repeated_gives_exactly_its_own_gradient(tmp_path, accumulation):
    # With every coefficient: the loss of n equal micro-batches is the loss of one. Halves and quarters are exact.
    same = [{"input_ids": random_ids(1, 16)[0]}] * 16
    (once,), _ = train(tmp_path, 2, 1, max_steps=1, blocks=same)
    (repeated,), _ = train(tmp_path, 2, accumulation, max_steps=1, blocks=same)
    assert once.keys() == repeated.keys()
    assert not [name for name in once if not torch.equal(once[name], repeated[name])]


def balance_gradient(folder, batch_size, accumulation) -> torch.Tensor:
    """What the balance loss adds to the gradient of the first router."""
    blocks = [{"input_ids": row} for row in random_ids(32, 64, seed=2)]
    sides = [
        train(folder, batch_size, accumulation, max_steps=1, blocks=blocks, balance_loss_coef=coefficient)[0][0]
        for coefficient in (1.0, 0.0)
    ]
    name = next(name for name in sides[0] if name.endswith("router.centroids") and "distilled" not in name)
    return sides[0][name] - sides[1][name]


def test_balance_loss_does_not_grow_with_the_number_of_micro_batches(tmp_path):
    whole = balance_gradient(tmp_path, 32, 1)
    cut = balance_gradient(tmp_path, 8, 4)
    coefficient = (cut * whole).sum() / whole.square().sum()
    # Not exactly 1: loads are counted in each micro-batch. A sum over micro-batches would give 4.
    assert coefficient.item() == pytest.approx(1.0, abs=0.05)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("train_two_stages", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.train(tmp_path_factory.mktemp("one"), 4)


def run_two_processes(folder, *options) -> dict:
    # `--multi_gpu` is accelerate's word for one process a device; with `use_cpu` the devices are CPUs and talk gloo.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    command += [str(SCRIPT), str(folder), "2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.parametrize(
    "options", [(), ("checkpointing",), ("no_unused",), ("router_logits",)], ids=lambda o: "-".join(o) or "default"
)
def test_two_processes_equal_one_with_their_whole_batch_in_both_stages(tmp_path, one_process, options):
    two = run_two_processes(tmp_path, *options)
    assert (two["processes"], one_process["processes"]) == (2, 1)
    for step, (expected, actual) in enumerate(zip(one_process["gradients"], two["gradients"], strict=True)):
        if step >= 3:  # stage 2: D and E^ may have a gradient of zero, for the sake of the processes
            actual = {name: gradient for name, gradient in actual.items() if name in expected}
        # Balance and distillation included: loads are counted over all processes.
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two["weights"], one_process["weights"], rtol=1e-4, atol=1e-5)
    assert two["fingerprint"] == one_process["fingerprint"]
    # Under weight decay and momentum D and E^ stand still from the transition on, to the bit.
    for before, after in zip(two["distilled"][2:], two["distilled"][3:], strict=False):
        assert before
        assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert not torch.equal(*(next(iter(step.values())) for step in two["distilled"][:2]))
    # The log tells of the tokens of all processes.
    names = ["loss", "task_loss", "balance_loss", "distillation_loss", "distillation_agreement", "load_max_over_mean"]
    for expected, actual in zip(one_process["history"], two["history"], strict=True):
        for name in names:
            assert (name in expected) == (name in actual)
            if name in expected:
                assert actual[name] == pytest.approx(expected[name], rel=1e-4), name
