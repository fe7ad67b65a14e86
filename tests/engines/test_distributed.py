"""Tests on two real processes (gloo, CPU): DistributedDataParallel, FSDP2 and accelerate's memory-efficient loading."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import TrainerControl, TrainerState

from helpers.many_processes import results, run_scenarios
from helpers.models import (
    COUNTING,
    Decision,
    random_ids,
    switch_checkpointing,
    tiny_config,
    tiny_model,
    tiny_seq2seq_model,
)
from modeling_stablemoe import StableMoEForCausalLM, StageTransitionCallback
from modeling_stablemoe.measure.meter import RoutingMeter
from modeling_stablemoe.measure.verdict import SettlingWatch


WORLD = 2
EVERY_ID = torch.arange(99).unsqueeze(0)
POSITIONS = [0, 2]


def model_on_every_rank() -> StableMoEForCausalLM:
    return tiny_model(moe_layer_positions=POSITIONS)


def batch(step: int, rank: int | None = None) -> torch.Tensor:
    """Four sequences, of which each rank takes two; the ranks' tokens differ, and so do their balance counts."""
    halves = random_ids(2, 9, seed=2 * step, high=40), random_ids(2, 9, seed=2 * step + 1, low=30)
    return torch.cat(halves) if rank is None else halves[rank]


def facts_about(model: StableMoEForCausalLM) -> dict:
    return {
        "stage": model.routing_stage,
        "fingerprint": model.router_fingerprint(),
        "in config": model.config.router_fingerprint,
        "routes": model.route(EVERY_ID),
    }


def train(model, steps, optimizer, rank: int | None = None, before_step=lambda: None) -> list[float]:
    model.train()
    losses = []
    for step in steps:
        ids = batch(step, rank)
        loss = model(ids, labels=ids).loss
        loss.backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)


# Scenarios: what each process does; they return what the tests compare.


def ddp_across_the_transition(rank: int, folder: Path) -> dict:
    model = model_on_every_rank()
    switch_checkpointing(model, {"use_reentrant": False})
    parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = adamw(model)
    train(parallel, range(3), optimizer, rank)
    before = model.route(EVERY_ID)
    model.freeze_router()
    train(parallel, range(3, 6), optimizer, rank)
    return {
        **facts_about(model),
        "routes before": before,
        "weights": {name: parameter.detach() for name, parameter in model.named_parameters()},
    }


def ddp_gradients(rank: int, folder: Path, as_trainer: bool = False) -> dict:
    model = model_on_every_rank()
    parallel = torch.nn.parallel.DistributedDataParallel(model.train())
    ids = batch(0, rank)
    if as_trainer:
        # What `Trainer` does: the loss is over the targets of all processes, times the processes that DDP averages over.
        outputs = parallel(ids, labels=ids, num_items_in_batch=torch.tensor(4 * 8))
        (outputs.loss * WORLD).backward()
    else:
        outputs = parallel(ids, labels=ids)
        outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"gradients": gradients, "aux_loss": outputs.aux_loss.detach(), "load": outputs.expert_load}


def ddp_gradients_as_trainer(rank: int, folder: Path) -> dict:
    return ddp_gradients(rank, folder, as_trainer=True)


def pairs(rank: int | None = None) -> dict[str, torch.Tensor]:
    """Four sentence pairs, of which each rank takes two."""
    sides = {"input_ids": random_ids(4, 7, seed=1, low=3, high=91), "labels": random_ids(4, 5, seed=2, low=3, high=91)}
    return sides if rank is None else {name: ids[2 * rank : 2 * rank + 2] for name, ids in sides.items()}


def ddp_gradients_of_pairs(rank: int, folder: Path) -> dict:
    model = tiny_seq2seq_model().train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    (parallel(**pairs(rank), num_items_in_batch=torch.tensor(4 * 5)).loss * WORLD).backward()
    return {"gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def following(**settings) -> tuple[StableMoEForCausalLM, list]:
    """A model with running statistics and counts, the same on every rank, and a record of what its routers decide."""
    model = tiny_model(moe_layer_positions=POSITIONS, **(COUNTING | settings))
    decisions = []
    for layer in model.moe_layers_by_name.values():
        layer.router.register_forward_hook(lambda router, args, decision: decisions.append(Decision.of(decision)))
    return model, decisions


def statistics_of(model) -> dict:
    """All that the routers of a model follow, whole."""
    kept = {}
    for name, layer in model.moe_layers_by_name.items():
        kept |= {f"{name}.{key}": values.clone() for key, values in layer.router.memory().items()}
        kept[f"{name}.counts"] = layer.router.distilled_router.counts().clone()
    return kept


def ddp_statistics(rank: int, folder: Path) -> dict:
    model, decisions = following()
    parallel = torch.nn.parallel.DistributedDataParallel(model.train())
    for step in range(3):
        ids = batch(step, rank)
        parallel(ids, labels=ids).loss.backward()
    return {
        "statistics": statistics_of(model),
        "routed": [
            (decision.trace.table_rows.flatten(), decision.expert_index.flatten(), decision.trace.hidden_states)
            for decision in decisions
        ],
        "balanced": [layer.table for layer in model.freeze_router()],
        **facts_about(model),
    }


def watching(rank: int, folder: Path) -> dict:
    model = model_on_every_rank()
    meter = RoutingMeter(model)
    watch = SettlingWatch(meter)
    for step in range(3):
        ids = batch(step, rank)
        model.train()(ids, labels=ids).loss.backward()
        meter.end_step()
        with torch.no_grad():
            for layer in model.moe_layers_by_name.values():
                layer.router.distilled_router.embedding.mul_(-1.0)
        watch.check()
    # A machine of its own: the second process does not see the file of the first.
    place = folder / f"watch-{rank}"
    place.mkdir()
    watch.save(place / "watch.safetensors")
    resumed = SettlingWatch(RoutingMeter(model))
    resumed.load(folder / "watch-0" / "watch.safetensors" if rank == 0 else folder / "nowhere" / "watch.safetensors")
    meters = {"before": meter, "after": resumed._meter}
    return {
        "written": (place / "watch.safetensors").is_file(),
        "changes": (watch.changes, resumed.changes),
        "counts": {name: each.counted_tokens().cpu() for name, each in meters.items()},
        "recent": {name: each.recent().metrics(stage=1) for name, each in meters.items()},
    }


def fsdp_statistics(rank: int, folder: Path) -> dict:
    model = shard_as_accelerate(following(share_experts_in_stage1=True)[0], rank)
    losses = train(model, range(3), adamw(model), rank)
    before = statistics_of(model)
    model.freeze_router()
    losses += train(model, range(3, 5), adamw(model), rank)
    return {**facts_about(model), "before": before, "after": statistics_of(model), "losses": losses}


def evaluation_on_one_rank(rank: int, folder: Path) -> dict:
    if rank == 0:
        model = model_on_every_rank().eval()
        return {"aux_loss": model(batch(0, 0), output_router_logits=True).aux_loss.detach()}
    return {}


def shard(model: StableMoEForCausalLM, **kwargs):
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (*model.model.layers, *model.model.moe_layers, model):
        fully_shard(module, mesh=mesh, **kwargs)
    return model


def shard_as_accelerate(model: StableMoEForCausalLM, rank: int):
    """With `cpu_ram_efficient_loading`: rank 0 has the weights, the others receive them."""
    state = model.state_dict()
    model = model.to("meta")
    model.tie_weights()
    shard(model)
    fsdp2_load_full_state_dict(SimpleNamespace(is_main_process=rank == 0), model, state)
    model.tie_weights()
    return model


def full_weights(model) -> dict[str, torch.Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def fsdp_across_the_transition(rank: int, folder: Path) -> dict:
    model = shard(model_on_every_rank())
    optimizer = adamw(model)
    losses = train(model, range(3), optimizer, rank)
    before = model.route(EVERY_ID)
    model.freeze_router()
    frozen = facts_about(model)
    losses += train(model, range(3, 8), optimizer, rank)
    kept = {n: p.full_tensor().clone() for n, p in model.named_parameters() if "distilled" in n}
    state, control = TrainerState(global_step=8, max_steps=10), TrainerControl()
    callback = StageTransitionCallback(3)
    callback.on_train_begin(SimpleNamespace(output_dir=str(folder)), state, control, model=model)
    train(model, range(8, 10), optimizer, rank, lambda: callback.on_pre_optimizer_step(None, state, control))
    return {
        **facts_about(model),
        "routes before": before,
        "when frozen": frozen,
        "losses": losses,
        "all sharded": all(isinstance(p, DTensor) for p in model.parameters()),
        "distilled router kept": all(
            torch.equal(dict(model.named_parameters())[n].full_tensor(), kept[n]) for n in kept
        ),
        "weights": full_weights(model),
        "logits": model.eval()(batch(0)).logits.detach(),
    }


def fsdp_bf16(rank: int, folder: Path) -> dict:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # More experts than bfloat16 can count: 257 and above would be rounded.
    torch.manual_seed(0)
    model = tiny_model(num_experts=521, moe_layer_positions=[1], num_expert_sublayers=1, intermediate_size=8)
    plain = model.route(EVERY_ID)
    shard(model, mp_policy=policy)
    optimizer = adamw(model)
    model.freeze_router()
    losses = train(model, range(2), optimizer, rank)
    outputs = model.eval()(batch(0), output_router_logits=True)
    return {
        **facts_about(model),
        "routes before": plain,
        "losses": losses,
        "used": torch.stack(outputs.expert_indices),
        "expected": model.route(batch(0)),
        "dtype": outputs.logits.dtype,
        "table": full_weights(model).get("model.moe_layers.0.frozen_router.routing_table"),  # on rank 0 only
    }


def fsdp_looking_back(rank: int, folder: Path) -> dict:
    model = tiny_model(moe_layer_positions=POSITIONS, distilled_router="transformer_1")
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = adamw(model)
    train(model, range(3), optimizer, rank)
    before = model.route(batch(0))
    model.freeze_router()
    train(model, range(3, 6), optimizer, rank)
    outputs = model.eval()(batch(0), output_router_logits=True)
    return {
        **facts_about(model),
        "routes of a batch": [before, model.route(batch(0)), torch.stack(outputs.expert_indices)],
        "weights": full_weights(model),
    }


def efficient_loading(rank: int, folder: Path, name: str = "frozen") -> dict:
    """What `accelerate launch` with FSDP2 and `cpu_ram_efficient_loading` does: rank 0 reads, the others receive."""
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "LOCAL_RANK": str(rank)}
    os.environ.update(variables)
    try:
        model = StableMoEForCausalLM.from_pretrained(folder / name)
    finally:
        for variable in variables:
            del os.environ[variable]
    model = shard_as_accelerate(model, rank)
    with torch.no_grad():
        return {**facts_about(model), "logits": model.eval()(batch(0)).logits}


def efficient_loading_in_stage_1(rank: int, folder: Path) -> dict:
    return efficient_loading(rank, folder, "learning")


SCENARIOS = [
    ddp_across_the_transition,
    ddp_gradients,
    ddp_gradients_as_trainer,
    ddp_gradients_of_pairs,
    ddp_statistics,
    watching,
    fsdp_statistics,
    evaluation_on_one_rank,
    fsdp_across_the_transition,
    fsdp_bf16,
    fsdp_looking_back,
    efficient_loading,
    efficient_loading_in_stage_1,
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """All scenarios, run once in two processes: starting them is what takes the time."""
    folder = tmp_path_factory.mktemp("distributed")
    model = model_on_every_rank()
    model.save_pretrained(folder / "learning")
    model.freeze_router()
    model.save_pretrained(folder / "frozen")
    return run_scenarios(SCENARIOS, folder)


def whole_batch_gradients() -> dict:
    model, ids = model_on_every_rank().train(), batch(0)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    return {
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "aux_loss": outputs.aux_loss.detach(),
        "load": outputs.expert_load,
    }


def test_ddp_trains_through_the_transition_with_checkpointing_and_without_looking_for_unused_parameters(ran):
    first, second = results(ran, ddp_across_the_transition)
    assert first["stage"] == second["stage"] == 2
    assert first["fingerprint"] == second["fingerprint"] == first["in config"] == second["in config"]
    assert torch.equal(first["routes"], first["routes before"])
    assert torch.equal(first["routes"], second["routes"])
    assert_close(first["weights"], second["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("scenario", [ddp_gradients, ddp_gradients_as_trainer])
def test_two_processes_have_the_gradient_of_one_with_both_batches(ran, scenario):
    expected = whole_batch_gradients()
    first, second = results(ran, scenario)
    # A token counted on one process alone would make this test pass for a balance loss that counts locally.
    assert not torch.equal(first["load"], second["load"])
    assert torch.equal(first["load"] + second["load"], expected["load"])
    assert_close(first["gradients"], expected["gradients"], rtol=1e-5, atol=1e-6)
    assert_close(second["gradients"], expected["gradients"], rtol=1e-5, atol=1e-6)
    mean = (first["aux_loss"] + second["aux_loss"]) / WORLD
    if scenario is ddp_gradients_as_trainer:
        mean = mean * WORLD
    assert_close(mean, expected["aux_loss"], rtol=1e-5, atol=0)


def test_two_processes_have_the_gradient_of_one_with_all_pairs(ran):
    model = tiny_seq2seq_model().train()
    model(**pairs()).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("router.centroids" in name for name in expected)
    for result in results(ran, ddp_gradients_of_pairs):
        assert_close(result["gradients"], expected, rtol=1e-5, atol=1e-6)


def test_counts_and_statistics_are_of_the_tokens_of_both_processes(ran):
    first, second = results(ran, ddp_statistics)
    for name, values in first["statistics"].items():
        assert torch.equal(values, second["statistics"][name]), name
    # Two layers by turns, three batches.
    for layer, name in enumerate(following()[0].moe_layers_by_name):
        routed = [result["routed"][layer::2] for result in (first, second)]
        counted = torch.zeros(99, 5)
        for ids, experts, _ in (*routed[0], *routed[1]):
            for token_id, expert in zip(ids.tolist(), experts.tolist(), strict=True):
                counted[token_id, expert] += 1
        assert torch.equal(first["statistics"][f"{name}.counts"], counted)
        assert torch.equal(first["statistics"][f"{name}.token_counts"], counted.sum(-1).long())
        assert int(first["statistics"][f"{name}.tokens"]) == 3 * 36
        # Fewer tokens than the half-life: a plain average, and a spread around the means of the batches before.
        hidden = torch.cat([states for *_, states in (*routed[0], *routed[1])])
        assert_close(first["statistics"][f"{name}.feature_mean"], hidden.mean(0), rtol=1e-4, atol=1e-5)
        assert_close(
            first["statistics"][f"{name}.feature_variance"], hidden.var(0, correction=0), rtol=1e-3, atol=1e-4
        )
    assert first["fingerprint"] == second["fingerprint"] == first["in config"]
    for ours, theirs in zip(first["balanced"], second["balanced"], strict=True):
        assert torch.equal(ours, theirs)


def test_all_processes_go_on_watching_from_the_file_of_the_first(ran):
    first, second = results(ran, watching)
    assert (first["written"], second["written"]) == (True, False)
    for result in (first, second):
        before, after = result["changes"]
        assert before == after == first["changes"][0]
        assert max(before) > 0
        assert torch.equal(result["counts"]["before"], result["counts"]["after"])
        assert result["counts"]["after"].sum() == 2 * 3 * 36
        assert result["recent"]["after"] == pytest.approx(result["recent"]["before"])


def test_a_sharded_model_follows_what_one_process_follows(ran):
    first, second = results(ran, fsdp_statistics)
    plain = following(share_experts_in_stage1=True)[0]
    losses = train(plain, range(3), adamw(plain))
    for name, values in statistics_of(plain).items():
        assert torch.equal(first["before"][name], second["before"][name]), name
        assert torch.equal(first["before"][name], first["after"][name]), name
        if not name.endswith(("counts", "bias")):  # a sum in another order may send a token elsewhere
            assert_close(
                first["before"][name], values, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert first["fingerprint"] == second["fingerprint"] == first["in config"]
    mean_losses = [(ours + theirs) / 2 for ours, theirs in zip(first["losses"], second["losses"], strict=True)]
    assert mean_losses[:3] == pytest.approx(losses, rel=1e-2)


def test_evaluation_on_one_process_does_not_wait_for_the_others(ran):
    expected = model_on_every_rank().eval()(batch(0, 0), output_router_logits=True).aux_loss.detach()
    assert_close(results(ran, evaluation_on_one_rank)[0]["aux_loss"], expected, rtol=1e-5, atol=0)


def test_fsdp_trains_through_the_transition_and_leaves_the_routing(ran):
    first, second = results(ran, fsdp_across_the_transition)
    for result in (first, second):
        assert result["all sharded"]
        assert result["stage"] == 2
        assert torch.equal(result["when frozen"]["routes"], result["routes before"])
        assert torch.equal(result["routes"], result["routes before"])
        assert result["fingerprint"] == result["in config"] == result["when frozen"]["fingerprint"]
        assert result["distilled router kept"]  # where the callback takes its zero gradient
        assert all(torch.tensor(result["losses"]).isfinite())
    assert first["fingerprint"] == second["fingerprint"]
    plain = model_on_every_rank()
    assert not torch.equal(plain.route(EVERY_ID), first["routes"])  # it has learned in stage 1


def test_fsdp_learns_what_one_process_learns(ran):
    plain = model_on_every_rank()
    plain_losses = train(plain, range(3), adamw(plain))
    first, second = results(ran, fsdp_across_the_transition)
    sharded = torch.tensor([first["losses"][:3], second["losses"][:3]]).mean(0)
    assert_close(sharded, torch.tensor(plain_losses), rtol=1e-4, atol=0)


def test_the_full_weights_of_a_sharded_model_load_into_a_plain_one(ran):
    first, _ = results(ran, fsdp_across_the_transition)
    plain = StableMoEForCausalLM(tiny_config(moe_layer_positions=POSITIONS)).eval()
    plain.load_state_dict(first["weights"])
    assert plain.routing_stage == 2
    assert plain.router_fingerprint() == plain.config.router_fingerprint == first["fingerprint"]
    assert_close(plain(batch(0)).logits, first["logits"], rtol=1e-4, atol=1e-5)


def test_fsdp_in_bfloat16_keeps_a_table_that_bfloat16_could_not_hold(ran):
    for result in results(ran, fsdp_bf16):
        assert result["routes"].max() > 256
        assert result["routes"].bfloat16().long().ne(result["routes"]).any()
        assert torch.equal(result["routes"], result["routes before"])
        assert torch.equal(result["used"], result["expected"])
        assert result["dtype"] == torch.bfloat16
        assert all(torch.tensor(result["losses"]).isfinite())
    table = results(ran, fsdp_bf16)[0]["table"]
    assert table.dtype == torch.int32
    assert torch.equal(table.long(), result["routes"][0, 0])


def test_fsdp_in_bfloat16_freezes_the_weights_of_a_router_that_looks_back(ran):
    for result in results(ran, fsdp_looking_back):
        before, said, used = result["routes of a batch"]
        assert torch.equal(before, said)
        assert torch.equal(before, used)
        assert result["fingerprint"] == result["in config"]
    first, second = results(ran, fsdp_looking_back)
    plain = tiny_model(moe_layer_positions=POSITIONS, distilled_router="transformer_1")
    plain.load_state_dict(first["weights"])
    assert plain.router_fingerprint() == first["fingerprint"] == second["fingerprint"]


@pytest.mark.parametrize("scenario", [efficient_loading_in_stage_1, efficient_loading])
def test_memory_efficient_loading_brings_tables_and_stage_to_every_rank(ran, scenario):
    plain = model_on_every_rank().eval()
    if scenario is efficient_loading:
        plain.freeze_router()
    for result in results(ran, scenario):
        assert result["stage"] == plain.routing_stage
        assert result["fingerprint"] == result["in config"] == plain.router_fingerprint()
        assert torch.equal(result["routes"], plain.route(EVERY_ID))
        assert_close(result["logits"], plain(batch(0)).logits.detach(), rtol=1e-5, atol=1e-5)
