"""Tests of PEFT adapters on attention, experts and routers."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, default_data_collator

from helpers.checkpoints import EVERY_ID, run_without_package
from helpers.matrices import one_fast
from helpers.models import random_ids, tiny_model
from helpers.trainers import Recorder, make_trainer, training_logs
from modeling_stablemoe import (
    RoutingFluctuationCallback,
    RoutingStatisticsCallback,
    StableMoEForCausalLM,
    StableMoEForSequenceClassification,
    StageTransitionCallback,
)
from modeling_stablemoe.checkpoints.adapters import ROUTING_FILE, load_routing, save_routing
from modeling_stablemoe.checkpoints.folders import what_is_missing
from modeling_stablemoe.checkpoints.manifests import MANIFEST_FILE, CheckpointManifestCallback


peft = pytest.importorskip("peft")

IDS = random_ids(4, 9)
EXPERTS = [
    "expert_stack.sublayers.0.up_proj",
    "expert_stack.sublayers.0.down_proj",
    "expert_stack.sublayers.1.down_proj",
]
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
WAYS = {
    "attention": ATTENTION,
    "experts": {"target_modules": [], "target_parameters": ["up_proj", "down_proj"]},
    "both": {**ATTENTION, "target_parameters": EXPERTS},
    "all linear": {"target_modules": "all-linear"},
    "head": {**ATTENTION, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "router": {**ATTENTION, "modules_to_save": [".router"]},
    "adapted router": {**ATTENTION, "target_parameters": ["router.centroids"]},
}
# Everything that learns in stage 1 besides the adapters.
STAGE1 = {"modules_to_save": ["distilled_router"]}


def base_model(frozen=False, **overrides) -> StableMoEForCausalLM:
    model = tiny_model(moe_layer_positions=[0, 2], **overrides)
    if frozen:
        model.freeze_router()
    return model


def adapted(model, initialised=True, **options):
    torch.manual_seed(1)
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, init_lora_weights=initialised, **options)
    )


TRAINED = {"weight_decay": 0.5}


def train(folder, model, *callbacks, **arguments):
    trainer = make_trainer(folder, *callbacks, model=model, **{"max_steps": 4, **TRAINED, **arguments})
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return trainer


# On a frozen checkpoint


@pytest.mark.parametrize("way", ["both", "all linear", "head", "router", "adapted router"])
def test_adapters_learn_and_the_frozen_routing_stays(tmp_path, way):
    source = base_model(frozen=True)
    source.save_pretrained(tmp_path / "base")
    model = adapted(StableMoEForCausalLM.from_pretrained(tmp_path / "base"), **WAYS[way])
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = train(tmp_path, model, RoutingStatisticsCallback())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    idle = {name for name in learned if "distilled_router" in name}  # nothing reads it in stage 2
    assert moved == learned - idle
    assert all(entry["routing_stage"] == 2 for entry in training_logs(trainer.state.log_history))
    assert model.base_model.model.router_fingerprint() == source.router_fingerprint()
    # Adapters are saved alone; on the base they give the same model, merged or not.
    trainer.save_model(tmp_path / "adapters")
    base = StableMoEForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
        merged = loaded.merge_and_unload()
        assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert type(merged) is StableMoEForCausalLM
    assert merged.router_fingerprint() == merged.config.router_fingerprint == source.router_fingerprint()
    assert torch.equal(merged.route(EVERY_ID), source.route(EVERY_ID))


def test_a_classifier_with_adapters_learns_its_head_and_keeps_the_routing(tmp_path):
    source = base_model(frozen=True)
    source.save_pretrained(tmp_path)
    classifier = StableMoEForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    model = peft.get_peft_model(classifier, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_parameters=EXPERTS))
    head = classifier.score.weight.clone()
    rows = [{"input_ids": row, "labels": index % 3} for index, row in enumerate(random_ids(12, 6))]
    train(tmp_path, model, train_dataset=rows, collator=default_data_collator)
    assert not torch.equal(classifier.score.weight, head)
    assert classifier.router_fingerprint() == source.router_fingerprint()


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
def test_each_expert_has_a_low_rank_change_of_its_own(backend):
    source, config = base_model(frozen=True).eval(), {"target_modules": [], "target_parameters": EXPERTS}
    model = base_model(frozen=True)
    model.set_experts_implementation(backend)
    model = adapted(model, initialised=False, **config).eval()
    wrappers = {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{wrapper.parameter_name}": wrapper
        for name, wrapper in model.named_modules()
        if hasattr(wrapper, "parameter_name")
    }
    assert len(wrappers) == 2 * len(EXPERTS)
    # By hand, expert by expert: row e r + i of A is a direction of the input of expert e, column i E + e of B one of its
    # output, times alpha / r = 3.
    with torch.no_grad():
        for name, wrapper in wrappers.items():
            a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
            parameter = source.get_parameter(name)
            for expert in range(5):
                change = sum(torch.outer(a[2 * expert + i], b[:, 5 * i + expert]) for i in range(2))
                parameter[expert] += 3.0 * (change if change.shape == parameter.shape[1:] else change.T)
        expected = source(IDS).logits
        assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(base_model(frozen=True).eval()(IDS).logits, expected, atol=0.1)
        merged = model.merge_and_unload()
        for name in wrappers:
            assert_close(merged.get_parameter(name), source.get_parameter(name), rtol=1e-5, atol=1e-5)
        assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["batched_mm", "grouped_mm"])
def test_adapters_of_experts_have_the_gradients_of_eager(backend):
    gradients = []
    for name in ("eager", backend):
        model = base_model(frozen=True)
        model.set_experts_implementation(name)
        model = adapted(model, initialised=False, **WAYS["experts"]).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_low_precision_and_kbit_preparation_leave_the_integers_alone():
    fingerprint = base_model(frozen=True).router_fingerprint()
    model = peft.prepare_model_for_kbit_training(base_model(frozen=True).to(torch.bfloat16))
    model = adapted(model, **WAYS["both"])
    dtypes = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert dtypes == {torch.float32}
    model = adapted(base_model(frozen=True).to(torch.bfloat16), **WAYS["both"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.base_model.model.router_fingerprint() == fingerprint


def test_adapters_and_merged_models_load_in_a_fresh_interpreter_by_remote_code(tmp_path):
    base_model(frozen=True).save_pretrained(tmp_path / "base")
    model = adapted(StableMoEForCausalLM.from_pretrained(tmp_path / "base"), initialised=False, **WAYS["both"]).eval()
    model.save_pretrained(tmp_path / "adapters")
    with torch.no_grad():
        torch.save((IDS, model(input_ids=IDS).logits, model.route(EVERY_ID)), tmp_path / "expected.pt")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    code = """
        import sys, torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        folder = sys.argv[1]
        ids, logits, route = torch.load(folder + "/expected.pt")
        base = AutoModelForCausalLM.from_pretrained(folder + "/base", trust_remote_code=True)
        adapted = PeftModel.from_pretrained(base, folder + "/adapters").eval()
        torch.testing.assert_close(adapted(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)
        merged = AutoModelForCausalLM.from_pretrained(folder + "/merged", trust_remote_code=True)
        torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
        for model in (merged, adapted.merge_and_unload()):
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            assert torch.equal(model.route(torch.arange(99).unsqueeze(0)), route)
            assert model.router_fingerprint() == model.config.router_fingerprint
    """
    run_without_package(code, tmp_path / "elsewhere", tmp_path)


# Across the transition


STAGED = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}
CONFIGS = {
    "word_embedding": ({}, STAGE1),
    # Counts live in the base model, which adapters do not hold.
    "counts": (
        {"distilled_router": "counts", "max_frozen_load": 1.3, "expert_bias_rate": 0.1},
        {"target_parameters": [*EXPERTS, "router.centroids"]},
    ),
}


def staged_model(kind):
    config, options = CONFIGS[kind]
    return adapted(base_model(**config), **{**WAYS["both"], **options})


@pytest.fixture(scope="module", params=CONFIGS)
def staged(request, tmp_path_factory):
    """A run with adapters through both stages, with checkpoints of either."""
    folder, recorder = tmp_path_factory.mktemp(request.param), Recorder()
    trainer = train(folder, staged_model(request.param), StageTransitionCallback(4), recorder, **STAGED)
    return request.param, trainer, recorder


def test_a_wrapped_model_passes_the_transition(staged):
    _, trainer, recorder = staged
    assert recorder.stages == [1, 1, 1, 2, 2, 2, 2, 2]
    first, *_, last = training_logs(trainer.state.log_history)
    assert first["distillation_agreement"] > 0
    assert last["loss"] == pytest.approx(last["task_loss"], rel=1e-4)
    model = trainer.model.base_model.model
    assert recorder.fingerprints[3:] == [model.config.router_fingerprint] * 5
    assert model.router_fingerprint() == model.config.router_fingerprint


def at_steps(*pairs):
    """Kinds of runs, and the step of the checkpoint to go on from."""
    return pytest.mark.parametrize(("staged", "step"), pairs, indirect=["staged"])


@at_steps(("word_embedding", 4), ("counts", 2))
def test_a_run_with_adapters_resumes_to_the_same_bits(staged, tmp_path, step):
    kind, trainer, _ = staged
    model = staged_model(kind)
    resumed = train(
        tmp_path,
        model,
        StageTransitionCallback(4),
        resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-{step}",
        **STAGED,
    )
    expected = dict(trainer.model.named_parameters())
    # Once frozen, D and Ê do not matter.
    assert not [n for n, p in model.named_parameters() if not torch.equal(p, expected[n])]
    assert resumed.model.base_model.model.config.router_fingerprint is not None
    last, expected = (training_logs(each.state.log_history)[-1] for each in (resumed, trainer))
    assert last | {"tokens_per_second": 0.0} == expected | {"tokens_per_second": 0.0}


@at_steps(("counts", 6))
def test_adapters_resume_with_their_routing_wherever_their_checkpoint_is(staged, tmp_path, step):
    kind, trainer, _ = staged
    moved = tmp_path / "last-checkpoint"
    shutil.copytree(f"{trainer.args.output_dir}/checkpoint-{step}", moved)
    # The output folder holds another run, of the same steps and another routing.
    other = staged_model(kind)
    other.base_model.model.model.embed_tokens.weight.data.mul_(-3)
    train(tmp_path / "run", other, StageTransitionCallback(4), **STAGED)
    resumed = make_trainer(tmp_path / "run", StageTransitionCallback(4), model=staged_model(kind), **TRAINED, **STAGED)
    resumed.train(resume_from_checkpoint=str(moved))
    expected = trainer.model.state_dict()
    different = [n for n, values in resumed.model.state_dict().items() if not torch.equal(values, expected[n])]
    assert not different
    fingerprints = [each.base_model.model.router_fingerprint() for each in (trainer.model, resumed.model, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@at_steps(("word_embedding", 2), ("word_embedding", 6), ("counts", 2))
def test_adapters_without_their_routing_are_not_resumed(staged, tmp_path, step):
    kind, trainer, _ = staged
    moved = tmp_path / "last-checkpoint"
    shutil.copytree(f"{trainer.args.output_dir}/checkpoint-{step}", moved)
    # As saved before adapters held the routing, too: it is beside them alone.
    tensors = load_file(moved / "adapter_model.safetensors")
    adapters = {name: values for name, values in tensors.items() if values.is_floating_point()}
    assert adapters.keys() != tensors.keys()
    save_file(adapters, moved / "adapter_model.safetensors", {"format": "pt"})
    resumed = make_trainer(tmp_path / "run", StageTransitionCallback(4), model=staged_model(kind), **TRAINED, **STAGED)
    if step == 6 or "counts" in kind:
        with pytest.raises(
            ValueError, match=r"without the routing of their run.*resume_from_checkpoint=.*load_routing"
        ):
            resumed.train(resume_from_checkpoint=str(moved))
    # Named, it is found.
    model = staged_model(kind)
    train(tmp_path / "named", model, StageTransitionCallback(4), resume_from_checkpoint=str(moved), **STAGED)
    trained = trainer.model.base_model.model
    assert model.base_model.model.router_fingerprint() == trained.router_fingerprint()


def test_a_router_that_counts_and_remembers_is_trained_as_a_whole(tmp_path):
    options = {"distilled_router": "counts", "max_frozen_load": 1.3, "expert_bias_rate": 0.1}
    trained, resumed = (adapted(base_model(**options), **WAYS["router"]) for _ in range(2))
    train(tmp_path / "whole", trained, StageTransitionCallback(4), **STAGED)
    trainer = make_trainer(tmp_path / "resumed", StageTransitionCallback(4), model=resumed, **TRAINED, **STAGED)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    loaded = peft.PeftModel.from_pretrained(base_model(**options), tmp_path / "whole" / "checkpoint-8")
    fingerprints = {each.base_model.model.router_fingerprint() for each in (trained, resumed, loaded)}
    assert len(fingerprints) == 1
    assert None not in fingerprints


def test_adapters_and_their_routing_load_on_the_base_they_were_trained_on(staged, tmp_path):
    kind, trainer, _ = staged
    checkpoint = f"{trainer.args.output_dir}/checkpoint-8"
    model = peft.PeftModel.from_pretrained(base_model(**CONFIGS[kind][0]), checkpoint).eval()
    assert model.base_model.model.routing_stage == 2  # PEFT has loaded it with the adapters
    load_routing(model, checkpoint)  # once more: nothing changes
    trained = trainer.model.eval()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    for each in (merged, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert each.routing_stage == 2
        assert each.router_fingerprint() == trained.base_model.model.router_fingerprint()
        with torch.no_grad():
            assert_close(each(IDS).logits, trained(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_routing_of_another_base_model_is_refused(staged, tmp_path):
    _, trainer, _ = staged
    checkpoint = f"{trainer.args.output_dir}/checkpoint-8"
    other = base_model(**CONFIGS[staged[0]][0], seed=3)
    other.freeze_router()
    with pytest.raises(ValueError, match="is not the routing of this model"):
        peft.PeftModel.from_pretrained(other, checkpoint)
    other = base_model(**CONFIGS[staged[0]][0], seed=3)
    other.freeze_router()
    with pytest.raises(ValueError, match=r"not the one that the adapters in .* were trained with"):
        load_routing(other, checkpoint)
    with pytest.raises(ValueError, match=r"other MoE layers, experts or tokens\. Load the base model"):
        load_routing(tiny_model(moe_layer_positions=[1]), checkpoint)
    with pytest.raises(FileNotFoundError):
        load_routing(other, tmp_path)


def test_routing_is_saved_without_a_trainer_too(tmp_path):
    model = adapted(base_model(), **WAYS["both"])
    model.base_model.model.freeze_router()
    model.save_pretrained(tmp_path)
    save_routing(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path)
    load_routing(loaded, tmp_path)
    assert loaded.base_model.model.router_fingerprint() == model.base_model.model.router_fingerprint()


def test_the_best_adapters_come_with_the_stage_of_their_step(tmp_path, caplog):
    class Worsen(TrainerCallback):
        """Makes the first evaluation the best."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    trainer = make_trainer(
        tmp_path,
        Worsen(),
        StageTransitionCallback(4),
        model=adapted(base_model(), **WAYS["both"], **STAGE1),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        **STAGED,
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    model = trainer.model.base_model.model
    assert (model.routing_stage, model.config.router_fingerprint) == (1, None)
    assert "its routing is not frozen" in caplog.text


class Trial(Trainer):
    """Saves where a trial of `hyperparameter_search` does, without a program to search with."""

    def _get_output_dir(self, trial):
        return f"{self.args.output_dir}/{self.run_name}"


class Searching(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        state.is_hyper_param_search = True


@pytest.mark.parametrize("frozen", one_fast(False, True))
def test_trials_of_a_search_save_in_folders_of_their_own(tmp_path, frozen):
    routes = {}
    for run_name in ("run-0", "run-1"):
        model = adapted(base_model(frozen, seed=len(routes)), **WAYS["both"], **({} if frozen else STAGE1))
        callback = RoutingStatisticsCallback() if frozen else StageTransitionCallback(3)
        callbacks = [Searching(), callback, CheckpointManifestCallback()]
        options = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 1,
            "logging_steps": 1,
        }
        trainer = make_trainer(tmp_path, *callbacks, model=model, trainer_class=Trial, **options)
        trainer.run_name = run_name
        trainer.train()
        routes[run_name] = model.base_model.model.route(IDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-0", "run-1"]
    for run_name, route in routes.items():
        assert [path.name for path in (tmp_path / run_name).iterdir()] == ["checkpoint-4"]  # `save_total_limit`
        checkpoint = tmp_path / run_name / "checkpoint-4"
        assert what_is_missing(checkpoint) is None
        assert MANIFEST_FILE in os.listdir(checkpoint)
        loaded = base_model(frozen, seed=int(run_name[-1]))
        load_routing(loaded, checkpoint)
        assert torch.equal(loaded.route(IDS), route)


@pytest.mark.parametrize("way", ["router", "adapted router"])
def test_fluctuation_is_that_of_the_backbone_router_whatever_is_adapted(tmp_path, way):
    with torch.no_grad():
        indices = base_model().train()(IDS, output_router_logits=True).expert_indices  # the tiny model has no dropout
    watch = RoutingFluctuationCallback([{"input_ids": row} for row in IDS], check_steps=1)
    model = adapted(base_model(), **WAYS[way])
    names = model.state_dict().keys()
    train(tmp_path, model, StageTransitionCallback(2), watch)
    assert torch.equal(watch.history.experts[0].long(), torch.stack(indices).flatten())
    assert watch.history.stages == [1, 1, 2, 2, 2]
    route = model.base_model.model.route(IDS)
    assert torch.equal(watch.history.experts[-1].long(), route.flatten())
    assert model.state_dict().keys() == names


def test_stage_1_that_distils_nothing_is_warned_of(tmp_path, caplog):
    train(tmp_path, adapted(base_model(), **ATTENTION), StageTransitionCallback(2))
    assert 'add `modules_to_save=["distilled_router"]`' in caplog.text
    caplog.clear()
    train(tmp_path, adapted(base_model(), **ATTENTION, **STAGE1), StageTransitionCallback(2))
    assert "no parameter that learns" not in caplog.text


def test_checkpoints_of_whole_models_get_no_routing_file(tmp_path):
    train(tmp_path, base_model(), StageTransitionCallback(2), save_strategy="steps", save_steps=2)
    assert not list(tmp_path.rglob(ROUTING_FILE))
    assert json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())["router_fingerprint"]
