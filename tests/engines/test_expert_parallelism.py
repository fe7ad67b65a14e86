"""Expert parallelism on real processes (gloo, CPU): each holds its share of the experts, all together are the model."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import distributed
from transformers.distributed import DistributedConfig

from helpers import ROOT
from helpers.many_processes import results, run_scenarios
from helpers.models import random_ids, tiny_config, tiny_model, tiny_seq2seq_config, tiny_seq2seq_model
from helpers.trainers import make_trainer
from modeling_stablemoe import (
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StageTransitionCallback,
)
from modeling_stablemoe.measure.flops import count_parameters
from modeling_stablemoe.model.layer_stablemoe import moe_layers_of
from modeling_stablemoe.runs.recipes import load_preset


# Before, every process has all tokens (`tp_size`); from here on it may have tokens of its own (`fsdp_size`).
SENDS_TOKENS = hasattr(DistributedConfig, "ep_size")
sends_tokens = pytest.mark.skipif(
    not SENDS_TOKENS, reason="this transformers has expert parallelism for inference only"
)
# Before, the processes write no shards, or ones that are joined.
KEEPS_SHARDS = SENDS_TOKENS and hasattr(distributed, "consolidate_distributed_checkpoint")
PRESETS = ROOT / "configuration" / "models"
EXPERTS = 4
BACKENDS = ["eager", "grouped_mm", "batched_mm"]
EVERY_ID = torch.arange(90).unsqueeze(0)
SETTINGS = {
    "causal": {"moe_layer_positions": [0, 2]},
    # What changes how tokens are sent: a router that looks back, tokens over capacity, a table that is not learned.
    "looking back": {"distilled_router": "cnn"},
    "hash": {"router_type": "hash"},
    "seq2seq": {},
}
FAMILIES = ["causal", "seq2seq"]
SHARDED = ["causal 1", "causal 2", "looking back 2", "seq2seq 2"]
CHECKPOINTS = [f"{family} {stage}" for family in FAMILIES for stage in (1, 2)] + ["looking back 2", "hash 2"]


def make(name: str):
    """The model of a checkpoint: its settings, and the stage."""
    settings, stage = name[:-2], int(name[-1])
    build = tiny_seq2seq_model if settings == "seq2seq" else tiny_model
    model = build(num_experts=EXPERTS, **SETTINGS[settings])
    if stage == 2 and model.routing_stage == 1:
        model.freeze_router()
    return model.eval()


def class_of(name: str):
    return StableMoEForConditionalGeneration if name.startswith("seq2seq") else StableMoEForCausalLM


def load(path: Path, **sizes):
    """Load as users do: each process its own experts."""
    world = dist.get_world_size()
    if SENDS_TOKENS:
        sharding = DistributedConfig(**({"fsdp_size": world, "ep_size": world} | sizes))
    else:
        sharding = DistributedConfig(tp_size=world, enable_expert_parallel=True)
    return class_of(path.name).from_pretrained(path, distributed_config=sharding)


def inputs_of(name: str, seed: int = 0) -> dict:
    """A batch with padding on both sides."""
    ids = random_ids(4, 9, seed=seed, low=3, high=90)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[3, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | (
        {"decoder_input_ids": random_ids(4, 6, seed=seed + 9, low=3, high=90)} if "seq2seq" in name else {}
    )


def training_batch(name: str) -> dict:
    """Four sequences with the same number of targets each."""
    batch = {"input_ids": random_ids(4, 9, low=3, high=90)}
    labels = random_ids(4, 6, seed=7, low=3, high=90) if "seq2seq" in name else batch["input_ids"]
    return batch | {"labels": labels}


def share(batch: dict, rank: int) -> dict:
    """What one process has of a batch."""
    rows = len(batch["input_ids"]) // dist.get_world_size()
    return {key: value[rank * rows : (rank + 1) * rows] for key, value in batch.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def parameters_of_experts(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".expert_stack." in name}


def as_rule(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def message_of(action) -> str:
    """The message of the ValueError that `action` must raise, on every process."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no ValueError"


# Scenarios: what each process does; they return what the tests compare.


@torch.no_grad()
def inference(rank: int, folder: Path) -> dict:
    results = {}
    for name in CHECKPOINTS:
        model = load(folder / name)
        logits = {}
        for backend in BACKENDS:
            model.set_experts_implementation(backend)
            logits[backend] = model(**inputs_of(name)).logits
        results[name] = {
            "logits": logits,
            "stage": model.routing_stage,
            "fingerprint": model.router_fingerprint(),
            "in config": model.config.router_fingerprint,
            "routes": model.route(EVERY_ID),
            "rows": {key: held(p).shape for key, p in parameters_of_experts(model).items()},
            "experts": [layer.expert_stack.num_experts for layer in moe_layers_of(model).values()],
        }
    return results


@torch.no_grad()
def generation(rank: int, folder: Path) -> dict:
    results = {}
    for name in CHECKPOINTS:
        inputs = inputs_of(name)
        inputs.pop("decoder_input_ids", None)
        results[name] = load(folder / name).generate(**inputs, max_new_tokens=6, do_sample=False)
    return results


def refusals(rank: int, folder: Path) -> dict:
    return {
        name: message_of(lambda name=name: load(folder / name))
        for name in ("five experts", "another routing", "damaged table", "misfit")
    }


@torch.no_grad()
def shared_experts(rank: int, folder: Path) -> dict:
    model = load(folder / "shared")
    return {"message": message_of(lambda: model(**inputs_of("shared")))}


def saving(rank: int, folder: Path) -> dict:
    model = load(folder / "causal 2")
    return {"saved": message_of(lambda: model.save_pretrained(folder / "saved")), "train": message_of(model.train)}


@torch.no_grad()
def tokens_of_its_own(rank: int, folder: Path) -> dict:
    inputs = {key: value[: 3 - rank] for key, value in inputs_of("causal", seed=rank).items()}
    return {"logits": load(folder / "causal 2")(**inputs).logits}


def gradients(rank: int, folder: Path) -> dict:
    results = {}
    for name in CHECKPOINTS:
        model = load(folder / name).train()
        outputs = model(**share(training_batch(name), rank))
        outputs.loss.backward()
        results[name] = {
            "loss": outputs.loss.detach(),
            "gradients": {key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None},
        }
    return results


def shared_batch(rank: int, folder: Path) -> dict:
    """All processes work on the same batch, and share the FFNs of the blocks, too."""
    plan = {"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.down_proj": "rowwise"}
    model = load(folder / "causal 1", fsdp_size=1, tp_size=dist.get_world_size(), tp_plan=plan)
    with torch.no_grad():
        logits = model(**inputs_of("causal")).logits
    model.train()(**training_batch("causal")).loss.backward()
    return {
        "logits": logits,
        "gradients": {key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None},
    }


def steps(model, batch: dict) -> list[float]:
    """Three steps of stage 1 and three of stage 2."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for step in range(6):
        if step == 3:
            model.freeze_router()
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def transition(rank: int, folder: Path) -> dict:
    results = {}
    for name in ("causal 1", "seq2seq 1"):
        model = load(folder / name)
        losses = steps(model, share(training_batch(name), rank))
        model.save_pretrained(folder / f"{name[:-2]} trained")
        with torch.no_grad():
            logits = model.eval()(**inputs_of(name)).logits
        results[name] = {"losses": losses, "logits": logits, "fingerprint": model.router_fingerprint()}
    return results


def trainer(rank: int, folder: Path) -> dict:
    model = load(folder / "causal 1")
    running = make_trainer(folder / "run", StageTransitionCallback(2), model=model, max_steps=5)
    running.train()
    running.save_model(str(folder / "causal by trainer"))
    return {"stage": model.routing_stage, "fingerprint": model.router_fingerprint(), "routes": model.route(EVERY_ID)}


@torch.no_grad()
def shards(rank: int, folder: Path) -> dict:
    """Every process saves what it holds, and they load it again, by FSDP2 alone and with experts of their own."""
    results = {}
    for name in SHARDED:
        for ep_size in (1, dist.get_world_size()):
            path = folder / f"shards {ep_size}" / name
            load(folder / name, ep_size=ep_size).save_pretrained(path, distributed_checkpoint=True)
            model = load(path, ep_size=ep_size)
            results[name, ep_size] = {
                "logits": model(**inputs_of(name)).logits,
                "fingerprint": model.router_fingerprint(),
            }
    return results


def two_of_four(rank: int, folder: Path) -> dict:
    """Two processes have the same experts, and shard them between themselves."""
    model = load(folder / "causal 1", ep_size=2).train()
    model(**share(training_batch("causal"), rank)).loss.backward()
    return {"gradients": {key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None}}


SCENARIOS = {
    2: [
        inference,
        generation,
        refusals,
        shared_experts,
        saving,
        *([tokens_of_its_own, gradients, shared_batch, transition, trainer] if SENDS_TOKENS else []),
        *([shards] if KEEPS_SHARDS else []),
    ],
    4: [inference, *([two_of_four] if SENDS_TOKENS else [])],
}


def save_checkpoints(folder: Path):
    for name in CHECKPOINTS:
        make(name).save_pretrained(folder / name)
    tiny_model(num_experts=5).save_pretrained(folder / "five experts")
    tiny_model(num_experts=EXPERTS, share_experts_in_stage1=True).save_pretrained(folder / "shared")
    for name, row in (
        ("another routing", (make("causal 2").route(EVERY_ID)[0, 0, 7] + 1) % EXPERTS),
        ("damaged table", 9),
    ):
        make("causal 2").save_pretrained(folder / name)
        tensors = load_file(folder / name / "model.safetensors")
        tensors["model.moe_layers.0.frozen_router.routing_table"][7] = row
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    make("causal 2").save_pretrained(folder / "misfit")
    config = json.loads((folder / "misfit" / "config.json").read_text())
    (folder / "misfit" / "config.json").write_text(json.dumps(config | {"num_experts": 2 * EXPERTS}))


def run_processes(world: int, folder: Path) -> Path:
    save_checkpoints(folder)
    # One group for all: torch remembers the groups of equal meshes by name.
    return run_scenarios(SCENARIOS[world], folder, world, one_group=True)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    return run_processes(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def ran_by_four(tmp_path_factory) -> Path:
    return run_processes(4, tmp_path_factory.mktemp("four"))


def gradients_of_one_process(name: str) -> dict:
    model = make(name).train()
    outputs = model(**training_batch(name))
    outputs.loss.backward()
    return {
        "loss": outputs.loss.detach(),
        "gradients": {key: p.grad for key, p in model.named_parameters() if p.grad is not None},
    }


def assert_same_gradients(actual: dict, expected: dict):
    # What has learned all that it will learn takes part for the sharding engines' sake.
    assert not any(actual[name].any() for name in actual.keys() - expected.keys())
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# The plan


@pytest.mark.parametrize("config", [tiny_config(num_experts=6), tiny_seq2seq_config(num_experts=6)], ids=FAMILIES)
def test_the_plan_deals_out_every_parameter_of_the_experts_and_nothing_of_a_router(config):
    family = StableMoEForCausalLM if config.model_type == "stablemoe" else StableMoEForConditionalGeneration
    model = family(config)
    dealt_out = {rule for rule, how in model._ep_plan.items() if how == "grouped_gemm"}
    per_expert = {as_rule(name) for name, p in parameters_of_experts(model).items() if p.shape[0] == 6}
    assert dealt_out == per_expert == {as_rule(name) for name in parameters_of_experts(model)}
    others = set(model._ep_plan) - dealt_out
    assert others
    assert others <= {as_rule(name) for name, _ in model.named_modules()}


@pytest.mark.parametrize(
    ("num_experts", "parameters"), [(64, 3_223_977_984), (128, 6_447_955_968), (1024, 51_583_647_744)]
)
def test_the_parameters_behind_the_table_of_memory(num_experts, parameters):
    config = load_preset(PRESETS / "paper-large.json")
    config.num_experts = num_experts
    with torch.device("meta"):
        model = StableMoEForCausalLM(config)
    assert count_parameters(model)["experts"] == parameters
    assert count_parameters(model)["shared"] == pytest.approx(358e6, rel=0.003)
    # All of it is dealt out, and stands in one layer: what an engine that gathers layers gathers at once.
    assert sum(p.numel() for p in parameters_of_experts(model).values()) == parameters
    assert {as_rule(name) for name in parameters_of_experts(model)} <= model._ep_plan.keys()
    assert len(moe_layers_of(model)) == 1


# Inference


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_one_process(ran, name, backend):
    with torch.no_grad():
        expected = make(name)(**inputs_of(name)).logits
    for result in results(ran, inference):
        assert_close(result[name]["logits"][backend], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_generation_is_that_of_one_process(ran, name):
    inputs = inputs_of(name)
    inputs.pop("decoder_input_ids", None)
    expected = make(name).generate(**inputs, max_new_tokens=6, do_sample=False)
    for result in results(ran, generation):
        assert torch.equal(result[name], expected)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_each_process_holds_its_share_of_the_experts(ran, name):
    shapes = {key: p.shape for key, p in parameters_of_experts(make(name)).items()}
    for result in results(ran, inference):
        assert set(result[name]["experts"]) == {EXPERTS // 2}
        assert result[name]["rows"] == {key: (EXPERTS // 2, *shape[1:]) for key, shape in shapes.items()}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_routing_is_whole_on_every_process(ran, name):
    model = make(name)
    for result in results(ran, inference):
        assert result[name]["stage"] == model.routing_stage
        assert result[name]["fingerprint"] == result[name]["in config"] == model.router_fingerprint()
        assert torch.equal(result[name]["routes"], model.route(EVERY_ID))


@pytest.mark.slow
def test_four_processes_with_one_expert_each_are_the_model(ran_by_four):
    for name in CHECKPOINTS:
        with torch.no_grad():
            expected = make(name)(**inputs_of(name)).logits
        for result in results(ran_by_four, inference, 4):
            assert set(result[name]["experts"]) == {1}
            for logits in result[name]["logits"].values():
                assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@sends_tokens
def test_processes_may_have_tokens_of_their_own_and_not_as_many(ran):
    for rank, result in enumerate(results(ran, tokens_of_its_own)):
        with torch.no_grad():
            expected = make("causal 2")(**inputs_of("causal", seed=rank)).logits[: 3 - rank]
        assert_close(result["logits"], expected, rtol=1e-5, atol=1e-5)


# What is refused


def test_experts_that_cannot_be_dealt_out_evenly_are_refused(ran):
    for result in results(ran, refusals):
        assert result["five experts"].startswith("`num_experts` (5) must be divisible by the 2 processes")


@pytest.mark.parametrize("name", ["another routing", "damaged table", "misfit"])
def test_a_checkpoint_that_does_not_fit_is_refused_as_in_one_process(ran, name):
    expected = message_of(lambda: StableMoEForCausalLM.from_pretrained(ran / name))
    for result in results(ran, refusals):
        assert result[name] == expected != "no ValueError"


def test_experts_that_are_run_as_one_are_refused(ran):
    for result in results(ran, shared_experts):
        assert "`share_experts_in_stage1` runs the mean of all 4 experts" in result["message"]


def test_a_plan_that_leaves_out_a_norm_is_refused():
    stack = tiny_model(num_experts=EXPERTS).model.moe_layers[0].expert_stack
    sublayer = stack.sublayers[1]
    for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias", "layernorm_bias"):
        setattr(sublayer, name, torch.nn.Parameter(getattr(sublayer, name)[:2].detach()))
    sublayer.num_experts = 2
    index = torch.zeros(3, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`layernorm_weight` holds the rows of 4 experts, but this process has 2\."):
        stack(torch.randn(3, 32), index, torch.ones(3, 1))


# Saving


@sends_tokens
def test_what_is_saved_is_the_whole_model(ran):
    assert [result["saved"] for result in results(ran, saving)] == ["no ValueError"] * 2
    expected, saved = load_file(ran / "causal 2" / "model.safetensors"), load_file(ran / "saved" / "model.safetensors")
    assert saved.keys() - expected.keys() <= {"lm_head.weight"}  # tied, and written twice by transformers
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    assert (
        StableMoEForCausalLM.from_pretrained(ran / "saved").router_fingerprint()
        == make("causal 2").router_fingerprint()
    )


@pytest.mark.skipif(SENDS_TOKENS, reason="this transformers gathers the experts")
def test_half_a_model_is_neither_saved_nor_trained(ran):
    for result in results(ran, saving):
        assert "cannot gather the experts" in result["saved"]
        assert "cannot gather the experts" in result["train"]
    assert not (ran / "saved").exists()


@pytest.mark.skipif(not KEEPS_SHARDS, reason="this transformers keeps no shards")
@pytest.mark.parametrize("name", SHARDED)
def test_shards_are_the_whole_model_for_the_processes_and_for_one(ran, name):
    model = make(name)
    for ep_size in (1, 2):
        alone = class_of(name).from_pretrained(ran / f"shards {ep_size}" / name).eval()
        assert_close(alone.state_dict(), model.state_dict(), rtol=0, atol=0)
        for result in results(ran, shards):
            loaded = result[name, ep_size]
            assert loaded["fingerprint"] == alone.router_fingerprint() == model.router_fingerprint()
            assert_close(loaded["logits"], model(**inputs_of(name)).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["causal 1", "seq2seq 2"])
def test_shards_that_would_be_joined_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=r"torch cannot join integers, such as frozen routers\. Leave `distributed_"):
        make(name).save_pretrained(tmp_path / "shards", distributed_checkpoint=True, push_to_hub=True)
    assert not (tmp_path / "shards").exists()


# Training


@sends_tokens
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_gradients_are_those_of_one_process_with_the_whole_batch(ran, name):
    expected = gradients_of_one_process(name)
    both = results(ran, gradients)
    for result in both:
        assert_same_gradients(result[name]["gradients"], expected["gradients"])
    mean = (both[0][name]["loss"] + both[1][name]["loss"]) / 2
    assert_close(mean, expected["loss"], rtol=1e-5, atol=0)


@sends_tokens
@pytest.mark.slow
def test_gradients_are_right_where_two_processes_have_the_same_experts(ran_by_four):
    expected = gradients_of_one_process("causal 1")
    for result in results(ran_by_four, two_of_four, 4):
        assert_same_gradients(result["gradients"], expected["gradients"])


@sends_tokens
def test_processes_may_share_a_batch(ran):
    with torch.no_grad():
        logits = make("causal 1")(**inputs_of("causal")).logits
    expected = gradients_of_one_process("causal 1")
    for result in results(ran, shared_batch):
        assert_close(result["logits"], logits, rtol=1e-5, atol=1e-5)
        assert_same_gradients(result["gradients"], expected["gradients"])


@sends_tokens
@pytest.mark.parametrize("name", ["causal 1", "seq2seq 1"])
def test_training_through_the_transition_is_that_of_one_process(ran, name):
    model = make(name)
    losses = steps(model, training_batch(name))
    with torch.no_grad():
        logits = model.eval()(**inputs_of(name)).logits
    both = [result[name] for result in results(ran, transition)]
    assert losses[5] < losses[0]
    mean = [sum(pair) / 2 for pair in zip(both[0]["losses"], both[1]["losses"], strict=True)]
    assert mean == pytest.approx(losses, rel=1e-4)
    saved = class_of(name).from_pretrained(ran / f"{name[:-2]} trained").eval()
    assert saved.routing_stage == 2
    with torch.no_grad():
        saved_logits = saved(**inputs_of(name)).logits
    for result in both:
        assert result["fingerprint"] == model.router_fingerprint() == saved.router_fingerprint()
        assert_close(result["logits"], logits, rtol=1e-3, atol=1e-3)
        assert_close(result["logits"], saved_logits, rtol=1e-5, atol=1e-5)


@sends_tokens
def test_trainer_switches_the_stage_and_saves_the_whole_model(ran):
    first, second = results(ran, trainer)
    saved = StableMoEForCausalLM.from_pretrained(ran / "causal by trainer")
    assert first["stage"] == second["stage"] == saved.routing_stage == 2
    assert first["fingerprint"] == second["fingerprint"] == saved.router_fingerprint()
    assert torch.equal(first["routes"], saved.route(EVERY_ID))
