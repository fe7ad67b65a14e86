"""A real `Trainer` on two real processes (gloo): each way to run DistributedDataParallel, across the transition."""

import os
import traceback
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import TrainerCallback

from helpers.many_processes import start
from helpers.models import tiny_model
from helpers.trainers import make_trainer
from helpers.workplaces import free_port
from modeling_stablemoe import StageTransitionCallback


WORLD = 2
TRANSITION = 3
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
WAYS = {
    "as it is": {},
    "unused parameters are not looked for": {"ddp_find_unused_parameters": False},
    "checkpointed": CHECKPOINTED,
    "checkpointed and accumulated": {**CHECKPOINTED, **ACCUMULATED, "ddp_find_unused_parameters": False},
    "static graph": {"ddp_static_graph": True, "ddp_find_unused_parameters": False},
    "static graph, checkpointed": {"ddp_static_graph": True, "ddp_find_unused_parameters": False, **CHECKPOINTED},
    "loss of each process": {"average_tokens_across_devices": False},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "bfloat16": {"bf16": True},
    "two experts per token": {"num_experts_per_tok": 2},
    # What a Trainer would go by that takes the auxiliary loss out of the loss to scale it (transformers, issue 48690).
    "router logits": {"output_router_logits": True},
}
FAST = ["as it is", "router logits"]
SLOW = [way for way in WAYS if way not in FAST]
# Of the history: the tokens of both processes, each counted once.
LOGGED = [
    "task_loss",
    "balance_loss",
    "distillation_loss",
    "distillation_agreement",
    "load_max_over_mean",
    "router_entropy",
]


class Diverge(TrainerCallback):
    """Changes what one rank has learned just before the transition, unseen by DistributedDataParallel."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == TRANSITION - 1 and args.process_index == 1:
            model.model.moe_layers[0].router.distilled_router.embedding.data.neg_()


def trainer_of(
    folder: Path, *callbacks, output_router_logits: bool = False, num_experts_per_tok: int = 1, **arguments
):
    model = tiny_model(
        moe_layer_positions=[0, 2], output_router_logits=output_router_logits, num_experts_per_tok=num_experts_per_tok
    )
    # Momentum and decay, which must leave D and Ê alone; the epsilon keeps rounding from becoming whole steps.
    optimizer = {"optim": "adamw_torch", "adam_epsilon": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.0}
    options = {"max_steps": 6, "logging_steps": 1, **optimizer, **arguments}
    return make_trainer(folder, *callbacks, StageTransitionCallback(TRANSITION), model=model, **options)


def outcome(folder: Path, *callbacks, **arguments) -> dict:
    """Train; return the model, its history, and the names of the distilled routers' weights that moved in stage 2."""

    class Frozen(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == TRANSITION:
                self.distilled = {k: v.clone() for k, v in model.state_dict().items() if "distilled_router" in k}

    frozen = Frozen()
    trainer = trainer_of(folder, *callbacks, frozen, **arguments)
    trainer.train()
    weights = trainer.model.state_dict()
    return {
        "fingerprint": trainer.model.router_fingerprint(),
        "weights": weights,
        "distilled router moved": [k for k, v in frozen.distilled.items() if not torch.equal(v, weights[k])],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "stages": [entry["routing_stage"] for entry in trainer.state.log_history if "loss" in entry],
        "logged": [
            {name: entry[name] for name in LOGGED if name in entry}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "loads": [
            [entry["expert_load"], entry["load_entropy"], entry["dead_experts"]]
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
    }


def process(rank: int, folder: Path, port: str, ways: list[str]):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
    runs = {**{way: ((), WAYS[way]) for way in ways}, "diverged": ((Diverge(),), {})}
    for name, (callbacks, arguments) in runs.items():
        AcceleratorState._reset_state()
        GradientState._reset_state()
        try:
            result = outcome(folder / name, *callbacks, **arguments)
        except Exception:  # noqa: BLE001 - the test reports it
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}.{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    start(process, folder, free_port(), FAST, seconds=400)
    return folder


@pytest.fixture
def ran_way(request, ran, way) -> Path:
    """The folder where `way` has run: those that are slow run all together, once."""
    return request.getfixturevalue("ran_slow_ways") if way in SLOW else ran


@pytest.fixture(scope="module")
def ran_slow_ways(ran) -> Path:
    start(process, ran, free_port(), SLOW, seconds=400)
    return ran


every_way = pytest.mark.parametrize("way", [*FAST, *(pytest.param(way, marks=pytest.mark.slow) for way in SLOW)])


def results(ran: Path, name: str) -> list:
    return [torch.load(ran / f"{name}.{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """One process on the batches of both."""
    AcceleratorState._reset_state()
    return outcome(tmp_path_factory.mktemp("alone"), per_device_train_batch_size=4)


@every_way
def test_both_processes_pass_the_transition_and_stay_alike(ran_way, way):
    first, second = results(ran_way, way)
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    assert first["stages"] == [1, 1, 2, 2, 2, 2]  # the log at the transition tells what is from then on
    assert first["fingerprint"] == second["fingerprint"] is not None
    assert not [name for name in first["weights"] if not torch.equal(first["weights"][name], second["weights"][name])]
    assert not first["distilled router moved"]


@every_way
def test_two_processes_learn_what_one_does_on_both_batches(ran_way, alone, way, tmp_path):
    if way in ("checkpointed and accumulated", "bfloat16"):
        pytest.skip("other numbers")
    if way == "two experts per token":
        alone = outcome(tmp_path, per_device_train_batch_size=4, **WAYS[way])
    first, _ = results(ran_way, way)
    assert first["fingerprint"] == alone["fingerprint"]
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    for of_two, of_one in zip(first["logged"], alone["logged"], strict=True):
        assert {name: of_two[name] for name in of_one} == pytest.approx(of_one, rel=1e-4)
    for of_two, of_one in zip(first["loads"], alone["loads"], strict=True):
        torch.testing.assert_close(torch.tensor(of_two[0]), torch.tensor(of_one[0]), rtol=0, atol=1e-4)
        assert of_two[1:] == pytest.approx(of_one[1:], rel=1e-4)


def test_a_rank_whose_table_differs_is_named_on_every_rank(ran):
    for result in results(ran, "diverged"):
        assert isinstance(result, str), "training went on"
        assert "ValueError: The processes do not route alike at the transition" in result
        assert "rank 1 has the frozen routing" in result
