"""Expert parallelism on real processes (gloo, CPU): each holds its share of the experts, all together are the model."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import distributed
from transformers.distributed import DistributedConfig

from helpers import ROOT
from helpers.backbones import backed_model
from helpers.checkpoints import edit_config
from helpers.many_processes import results, run_scenarios
from helpers.models import random_ids, tiny_model, tiny_seq2seq_model
from helpers.trainers import make_trainer
from modeling_stablemoe import StableMoEForCausalLM, StableMoEForConditionalGeneration, StageTransitionCallback
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
# No larger than that, as an engine takes its time for every parameter.
SMALL = {"num_experts": EXPERTS, "num_expert_sublayers": 1}
CAUSAL = {**SMALL, "num_hidden_layers": 1, "moe_layer_positions": [0, 1]}
SETTINGS = {
    "causal": CAUSAL,
    # What changes how tokens are sent: a router that looks back, a table that is not learned.
    "looking back": {**CAUSAL, "distilled_router": "cnn"},
    "hash": {**CAUSAL, "router_type": "hash"},
    "two experts": {**CAUSAL, "num_experts_per_tok": 2},
    "seq2seq": {
        **SMALL,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_moe_layer_positions": [0],
        "decoder_moe_layer_positions": [1],
    },
}
# Family and stage.
FAST = ["causal 1", "seq2seq 2"]
SLOW = ["causal 2", "seq2seq 1", "looking back 2", "hash 2", "llama 1", "llama 2", "gated 1", "gated 2"]
SLOW += ["two experts 1", "two experts 2"]
SHARDED = ["seq2seq 1", "looking back 2", "seq2seq 2"]


def each(names):
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]
    )


def make(name: str):
    """The model of a checkpoint: its settings, and the stage."""
    settings, stage = name[:-2], int(name[-1])
    if settings in ("llama", "gated"):
        model = backed_model("llama/stack" if settings == "llama" else "llama/ffn", vocab_size=99)
    else:
        build = tiny_seq2seq_model if settings == "seq2seq" else tiny_model
        model = build(**SETTINGS[settings])
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
    layers = moe_layers_of(model).items()
    return {
        f"{name}.{layer.expert_name}.{key}": p
        for name, layer in layers
        for key, p in layer.expert_module.named_parameters()
    }


def as_rule(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def message_of(action) -> str:
    """The message of the ValueError that `action` must raise, on every process."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no ValueError"


# Scenarios: what each process does with the checkpoints of its folder; they return what the tests compare.


def checkpoints_in(folder: Path) -> list[str]:
    return [name for name in (*FAST, *SLOW) if (folder / name).exists()]


def use(rank: int, folder: Path) -> dict:
    results = {}
    for name in checkpoints_in(folder):
        model, inputs, logits = load(folder / name), inputs_of(name), {}
        with torch.no_grad():
            for backend in BACKENDS:
                model.set_experts_implementation(backend)
                logits[backend] = model(**inputs).logits
        inputs.pop("decoder_input_ids", None)
        results[name] = {
            "logits": logits,
            "generated": model.generate(**inputs, max_new_tokens=6, do_sample=False),
            "stage": model.routing_stage,
            "fingerprint": model.router_fingerprint(),
            "in config": model.config.router_fingerprint,
            "routes": model.route(EVERY_ID),
            "rows": {key: held(p).shape for key, p in parameters_of_experts(model).items()},
            "experts": [layer.expert_module.num_experts for layer in moe_layers_of(model).values()],
        }
    return results


def refusals(rank: int, folder: Path) -> dict:
    return {name: message_of(lambda name=name: load(folder / name)) for name in ("five experts", *MISFITS)}


@torch.no_grad()
def shared_experts(rank: int, folder: Path) -> dict:
    model = load(folder / "shared")
    return {"message": message_of(lambda: model(**inputs_of("shared")))}


def saving(rank: int, folder: Path) -> dict:
    model = load(folder / "seq2seq 2")
    path = folder / "seq2seq saved"
    return {"saved": message_of(lambda: model.save_pretrained(path)), "train": message_of(model.train)}


@torch.no_grad()
def tokens_of_its_own(rank: int, folder: Path) -> dict:
    inputs = {key: value[: 3 - rank] for key, value in inputs_of("causal", seed=rank).items()}
    return {"logits": load(folder / "causal 1")(**inputs).logits}


def gradients(rank: int, folder: Path) -> dict:
    results = {}
    for name in checkpoints_in(folder):
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
    for name in checkpoints_in(folder):
        if not name.endswith("1"):
            continue
        model = load(folder / name)
        losses = steps(model, share(training_batch(name), rank))
        model.save_pretrained(folder / f"{name[:-2]} trained")
        with torch.no_grad():
            logits = model.eval()(**inputs_of(name)).logits
        results[name] = {"losses": losses, "logits": logits, "fingerprint": model.router_fingerprint()}
    return results


def trainer(rank: int, folder: Path) -> dict:
    model = load(folder / "causal 1")
    running = make_trainer(folder / "run", StageTransitionCallback(2), model=model, max_steps=3)
    running.train()
    running.save_model(str(folder / "causal by trainer"))
    return {"stage": model.routing_stage, "fingerprint": model.router_fingerprint(), "routes": model.route(EVERY_ID)}


@torch.no_grad()
def shards(rank: int, folder: Path, ep_size: int = 2) -> dict:
    """Every process saves what it holds, and they load it again."""
    results = {}
    for name in checkpoints_in(folder):
        if name in SHARDED:
            path = folder / f"shards {ep_size}" / name
            load(folder / name, ep_size=ep_size).save_pretrained(path, distributed_checkpoint=True)
            model = load(path, ep_size=ep_size)
            results[name] = {"logits": model(**inputs_of(name)).logits, "fingerprint": model.router_fingerprint()}
    return results


def shards_of_fsdp(rank: int, folder: Path) -> dict:
    return shards(rank, folder, ep_size=1)


def two_of_four(rank: int, folder: Path) -> dict:
    """Two processes have the same experts, and shard them between themselves."""
    model = load(folder / "causal 1", ep_size=2).train()
    model(**share(training_batch("causal"), rank)).loss.backward()
    return {"gradients": {key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None}}


MISFITS = ("another routing", "misfit")


def save_misfits(folder: Path):
    tiny_model(num_experts=5).save_pretrained(folder / "five experts")
    tiny_model(num_experts=EXPERTS, share_experts_in_stage1=True).save_pretrained(folder / "shared")
    model = make("causal 2")
    for name in MISFITS:
        model.save_pretrained(folder / name)
    tensors = load_file(folder / "another routing" / "model.safetensors")
    tensors["model.moe_layers.0.frozen_router.routing_table"][7] = (model.route(EVERY_ID)[0, 0, 7] + 1) % EXPERTS
    save_file(tensors, folder / "another routing" / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder / "misfit", num_experts=2 * EXPERTS)


def run_processes(folder: Path, names: list[str], scenarios: list, world: int = 2) -> Path:
    for name in names:
        make(name).save_pretrained(folder / name)
    # One group for all: torch remembers the groups of equal meshes by name.
    return run_scenarios(scenarios, folder, world, one_group=True)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save_misfits(folder)
    scenarios = [use, refusals, shared_experts, saving]
    scenarios += [tokens_of_its_own, gradients, transition] if SENDS_TOKENS else []
    return run_processes(folder, FAST, scenarios + ([shards] if KEEPS_SHARDS else []))


@pytest.fixture(scope="module")
def ran_slow(tmp_path_factory) -> Path:
    scenarios = [use, *([gradients, shared_batch, transition, trainer] if SENDS_TOKENS else [])]
    scenarios += [shards, shards_of_fsdp] if KEEPS_SHARDS else []
    return run_processes(tmp_path_factory.mktemp("slow"), [*FAST, *SLOW], scenarios)


@pytest.fixture
def ran_name(request, name) -> Path:
    """The folder where the processes have used the checkpoint `name`."""
    return request.getfixturevalue("ran_slow" if name in SLOW else "ran")


@pytest.fixture(scope="module")
def ran_by_four(tmp_path_factory) -> Path:
    return run_processes(tmp_path_factory.mktemp("four"), ["causal 1"], [two_of_four], 4)


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


@pytest.mark.parametrize("build", [tiny_model, tiny_seq2seq_model])
def test_the_plan_deals_out_every_parameter_of_the_experts_and_nothing_of_a_router(build):
    model = build(num_experts=6)
    dealt_out = {rule for rule, how in model._ep_plan.items() if how == "grouped_gemm"}
    per_expert = {as_rule(name) for name, p in parameters_of_experts(model).items() if p.shape[0] == 6}
    assert dealt_out == per_expert == {as_rule(name) for name in parameters_of_experts(model)}
    others = set(model._ep_plan) - dealt_out
    assert others
    assert others <= {as_rule(name) for name, _ in model.named_modules()}


@pytest.mark.parametrize("num_experts", [64, 128, 1024])
def test_the_parameters_behind_the_table_of_memory(num_experts):
    with torch.device("meta"):
        model = StableMoEForCausalLM(load_preset(PRESETS / "paper-large.json", num_experts=num_experts))
    assert count_parameters(model)["experts"] == num_experts * 50_374_656
    assert count_parameters(model)["shared"] == pytest.approx(358e6, rel=0.003)
    # All of it is dealt out, and stands in one layer: what an engine that gathers layers gathers at once.
    assert {as_rule(name) for name in parameters_of_experts(model)} <= model._ep_plan.keys()
    assert len(moe_layers_of(model)) == 1


# Inference


@each([*FAST, *SLOW])
def test_processes_compute_and_generate_what_one_does(ran_name, name):
    model, inputs = make(name), inputs_of(name)
    with torch.no_grad():
        logits = model(**inputs).logits
    inputs.pop("decoder_input_ids", None)
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    for result in results(ran_name, use):
        for backend in BACKENDS:
            assert_close(result[name]["logits"][backend], logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(result[name]["generated"], generated)


@each([*FAST, *SLOW])
def test_each_process_holds_its_share_of_the_experts_and_the_whole_routing(ran_name, name):
    model = make(name)
    shapes = {key: p.shape for key, p in parameters_of_experts(model).items()}
    for result in results(ran_name, use):
        assert set(result[name]["experts"]) == {EXPERTS // 2}
        assert result[name]["rows"] == {key: (EXPERTS // 2, *shape[1:]) for key, shape in shapes.items()}
        assert result[name]["stage"] == model.routing_stage
        assert result[name]["fingerprint"] == result[name]["in config"] == model.router_fingerprint()
        assert torch.equal(result[name]["routes"], model.route(EVERY_ID))


@sends_tokens
def test_processes_may_have_tokens_of_their_own_and_not_as_many(ran):
    for rank, result in enumerate(results(ran, tokens_of_its_own)):
        with torch.no_grad():
            expected = make("causal 1")(**inputs_of("causal", seed=rank)).logits[: 3 - rank]
        assert_close(result["logits"], expected, rtol=1e-5, atol=1e-5)


# What is refused


def test_experts_that_cannot_be_dealt_out_evenly_are_refused(ran):
    for result in results(ran, refusals):
        assert result["five experts"].startswith("`num_experts` (5) must be divisible by the 2 processes")


@pytest.mark.parametrize("name", MISFITS)
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
    expected = load_file(ran / "seq2seq 2" / "model.safetensors")
    saved = load_file(ran / "seq2seq saved" / "model.safetensors")
    tied = {"lm_head.weight", "model.decoder.embed_tokens.weight"}
    assert saved.keys() - expected.keys() <= tied  # transformers writes them twice
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    again = StableMoEForConditionalGeneration.from_pretrained(ran / "seq2seq saved")
    assert again.router_fingerprint() == make("seq2seq 2").router_fingerprint()


@pytest.mark.skipif(SENDS_TOKENS, reason="this transformers gathers the experts")
def test_half_a_model_is_neither_saved_nor_trained(ran):
    for result in results(ran, saving):
        assert "cannot gather the experts" in result["saved"]
        assert "cannot gather the experts" in result["train"]
    assert not (ran / "seq2seq saved").exists()


@pytest.mark.skipif(not KEEPS_SHARDS, reason="this transformers keeps no shards")
@each(SHARDED)
@pytest.mark.parametrize("scenario", [shards, pytest.param(shards_of_fsdp, marks=pytest.mark.slow)])
def test_shards_are_the_whole_model_for_the_processes_and_for_one(request, name, scenario):
    ran = request.getfixturevalue("ran" if (name, scenario) == ("seq2seq 2", shards) else "ran_slow")
    model = make(name)
    alone = class_of(name).from_pretrained(ran / f"shards {2 if scenario is shards else 1}" / name).eval()
    assert_close(alone.state_dict(), model.state_dict(), rtol=0, atol=0)
    for result in results(ran, scenario):
        assert result[name]["fingerprint"] == alone.router_fingerprint() == model.router_fingerprint()
        assert_close(result[name]["logits"], model(**inputs_of(name)).logits, rtol=1e-4, atol=1e-5)


def test_shards_that_would_be_joined_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"torch cannot join integers, such as frozen routers\. Leave `distributed_"):
        make("seq2seq 2").save_pretrained(tmp_path / "shards", distributed_checkpoint=True, push_to_hub=True)
    assert not (tmp_path / "shards").exists()


# Training


@sends_tokens
@each([*FAST, *SLOW])
def test_gradients_are_those_of_one_process_with_the_whole_batch(ran_name, name):
    expected = gradients_of_one_process(name)
    both = results(ran_name, gradients)
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
@pytest.mark.slow
def test_processes_may_share_a_batch(ran_slow):
    with torch.no_grad():
        logits = make("causal 1")(**inputs_of("causal")).logits
    expected = gradients_of_one_process("causal 1")
    for result in results(ran_slow, shared_batch):
        assert_close(result["logits"], logits, rtol=1e-5, atol=1e-5)
        assert_same_gradients(result["gradients"], expected["gradients"])


@sends_tokens
@each(["causal 1", "seq2seq 1"])
def test_training_through_the_transition_is_that_of_one_process(ran_name, name):
    model = make(name)
    losses = steps(model, training_batch(name))
    with torch.no_grad():
        logits = model.eval()(**inputs_of(name)).logits
    both = [result[name] for result in results(ran_name, transition)]
    assert losses[5] < losses[0]
    mean = [sum(pair) / 2 for pair in zip(both[0]["losses"], both[1]["losses"], strict=True)]
    assert mean == pytest.approx(losses, rel=1e-4)
    saved = class_of(name).from_pretrained(ran_name / f"{name[:-2]} trained").eval()
    assert saved.routing_stage == 2
    with torch.no_grad():
        saved_logits = saved(**inputs_of(name)).logits
    for result in both:
        assert result["fingerprint"] == model.router_fingerprint() == saved.router_fingerprint()
        assert_close(result["logits"], logits, rtol=1e-3, atol=1e-3)
        assert_close(result["logits"], saved_logits, rtol=1e-5, atol=1e-5)


@sends_tokens
@pytest.mark.slow
def test_trainer_switches_the_stage_and_saves_the_whole_model(ran_slow):
    first, second = results(ran_slow, trainer)
    saved = StableMoEForCausalLM.from_pretrained(ran_slow / "causal by trainer")
    assert first["stage"] == second["stage"] == saved.routing_stage == 2
    assert first["fingerprint"] == second["fingerprint"] == saved.router_fingerprint()
    assert torch.equal(first["routes"], saved.route(EVERY_ID))
