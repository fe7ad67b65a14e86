"""Tables under FSDP2, on two real processes (gloo, CPU) as accelerate runs them on GPUs: installed before, or in training."""

import pytest
import torch
from accelerate.state import PartialState
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers import OlmoeForCausalLM

from helpers.forks import Fork, engine_environment
from helpers.moe_families import tiny_moe
from helpers.scripts import as_on_gpus
from helpers.trainers import make_trainer
from modeling_stablemoe.tables import (
    TableTransitionCallback,
    hash_tables,
    install_tables,
    installed_tables,
    load_tables,
    save_tables,
)


TABLES = hash_tables(torch.arange(1, 100), 3, 8, 2)


def train(folder, batch_size: int, with_tables: bool, resume=None, **options):
    """Four steps from the same weights; routing by tables from the beginning, or from the second step on."""
    model = tiny_moe("olmoe")
    if with_tables:
        install_tables(model, TABLES)
    callbacks = [] if with_tables else [TableTransitionCallback(2, 2, 1.5)]
    options = {
        "max_steps": 4,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 3,
        "resume_from_checkpoint": resume,
        **options,
    }
    trainer = make_trainer(folder, *callbacks, model=model, per_device_train_batch_size=batch_size, **options)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(folder)
    if trainer.is_world_process_zero():
        save_tables(trainer.model, folder)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("with_tables", [True, False], ids=["installed", "transition"])
def test_fsdp_comes_to_the_model_and_the_tables_of_one_process(tmp_path, with_tables):
    def worker():
        torch.set_num_threads(1)
        PartialState._prepare_backend = as_on_gpus.prepare_backend
        PartialState.set_device = as_on_gpus.set_device
        PartialState.default_device = property(lambda self: torch.device("cpu"))
        trainer = train(tmp_path / "fsdp", 2, with_tables, use_cpu=False)
        assert isinstance(trainer.model_wrapped, FSDPModule)
        if not with_tables:
            train(tmp_path / "resumed", 2, with_tables, str(tmp_path / "fsdp" / "checkpoint-3"), use_cpu=False)

    run = Fork(worker, 2, engine_environment("fsdp2"))
    assert set(run.wait()) == {0}, run.output[-5000:]
    alone = train(tmp_path / "alone", 4, with_tables)
    expected = installed_tables(alone.model)
    sharded, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("fsdp", "alone"))
    torch.testing.assert_close(sharded, whole, rtol=1e-3, atol=1e-4)
    model = OlmoeForCausalLM.from_pretrained(tmp_path / "fsdp")
    load_tables(model, tmp_path / "fsdp")
    assert torch.equal(installed_tables(model), expected)
    ids = torch.arange(3, 20).unsqueeze(0)
    torch.testing.assert_close(model.eval()(ids).logits, alone.model.eval()(ids).logits, rtol=1e-2, atol=1e-3)
    if not with_tables:
        resumed = load_file(tmp_path / "resumed" / "model.safetensors")
        torch.testing.assert_close(resumed, sharded, rtol=1e-3, atol=1e-4)
        load_tables(model, tmp_path / "resumed")
        assert torch.equal(installed_tables(model), expected)
