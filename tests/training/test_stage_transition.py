"""The transition from stage 1 to stage 2, with the real Trainer."""

import logging
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from helpers.backbones import backed_model
from helpers.matrices import one_fast
from helpers.models import tiny_model, tiny_seq2seq_model
from helpers.trainers import (
    BLOCKS,
    STATISTICS,
    Recorder,
    assert_same_weights,
    make_seq2seq_trainer,
    make_trainer,
    training_logs,
    weights,
)
from modeling_stablemoe import (
    ModelCardCallback,
    RoutingFluctuationCallback,
    StableMoEForCausalLM,
    StageTransitionCallback,
)
from modeling_stablemoe.checkpoints.finding import find_stablemoe
from modeling_stablemoe.training import TrainingClockCallback


# The transition


@pytest.mark.parametrize(("stage1_steps", "step", "accumulation"), [(5, 5, 3), (0.4, 5, 1), (12, 12, 1), (0.01, 1, 1)])
def test_transition_happens_once_at_its_step_whatever_the_accumulation(tmp_path, stage1_steps, step, accumulation):
    model, recorder, forward_stages = tiny_model(), Recorder(), []
    model.register_forward_hook(lambda module, *_: forward_stages.append(module.routing_stage))
    trainer = make_trainer(
        tmp_path,
        StageTransitionCallback(stage1_steps),
        recorder,
        model=model,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    assert recorder.stages == [1] * (step - 1) + [2] * (12 - step + 1)
    assert forward_stages == [1] * step * accumulation + [2] * (12 - step) * accumulation
    transitions = [entry for entry in trainer.state.log_history if "transition_step" in entry]
    assert [entry["transition_step"] for entry in transitions] == [step]
    assert [entry["step"] for entry in transitions] == [step]


@pytest.mark.parametrize(
    "intervals",
    [
        {"logging_strategy": "no"},
        {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"},
    ],
)
def test_transition_does_not_depend_on_the_other_intervals(tmp_path, intervals):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, StageTransitionCallback(5), recorder, **intervals)
    trainer.train()
    assert recorder.stages == [1] * 4 + [2] * 8
    assert sum("transition_step" in entry for entry in trainer.state.log_history) == 1
    assert trainer.model.config.router_fingerprint == recorder.fingerprints[4]


def test_evaluation_of_the_transition_step_reads_what_stage_1_would_have_read(tmp_path):
    evaluation = {"eval_strategy": "steps", "eval_steps": 5, "max_steps": 5}
    frozen = make_trainer(tmp_path / "a", StageTransitionCallback(5), **evaluation)
    live = make_trainer(tmp_path / "b", **evaluation)
    losses = []
    for trainer in (frozen, live):
        trainer.train()
        losses += [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert frozen.model.routing_stage == 2
    assert live.model.routing_stage == 1
    assert len(losses) == 2
    assert losses[0] == losses[1]


def test_message_at_the_transition_says_steps_load_and_agreement(tmp_path, capsys):
    trainer = make_trainer(tmp_path, StageTransitionCallback(5))
    trainer.train()
    output = capsys.readouterr().out
    entry = next(entry for entry in trainer.state.log_history if "transition_step" in entry)
    assert "routing frozen after step 5 of 12" in output
    assert f"{entry['transition_agreement']:.1%} of the tokens" in output
    assert "agreement when frozen: " in output
    assert "chance: 20.0%)" in output
    before, after = entry["transition_load_max_over_mean"], entry["transition_table_load_max_over_mean"]
    assert f"over the mean: {before:.2f} in the last steps of stage 1, {after:.2f} by the frozen table" in output
    assert "the expert of each of 99 token ids in 1 MoE layer " in output
    assert "From here on a token always goes to the same expert" in output
    assert trainer.model.config.router_fingerprint in output
    assert output.count("routing frozen") == 1


def test_transition_report_equals_a_recount(tmp_path):
    counts = torch.zeros(99)
    model = tiny_model()

    def count(module, args, kwargs, output):
        if module.routing_stage == 1:
            counts.add_(torch.bincount(kwargs["input_ids"].flatten(), minlength=99))

    model.register_forward_hook(count, with_kwargs=True)
    trainer = make_trainer(tmp_path, StageTransitionCallback(5), model=model, gradient_accumulation_steps=2)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "transition_step" in entry)
    (layer,) = model.moe_layers_by_name.values()
    load = torch.stack([counts[layer.frozen_router.values() == expert].sum() for expert in range(5)])
    assert entry["transition_table_load_max_over_mean"] == pytest.approx((load.max() / load.mean()).item())


def test_message_at_the_transition_says_what_load_the_most_frequent_id_sets(tmp_path, capsys):
    rows = [{"input_ids": torch.where(torch.arange(16) < 8, 7, block["input_ids"])} for block in BLOCKS]
    ids = torch.stack([row["input_ids"] for row in rows])
    share = (ids == 7).float().mean().item()  # all rows are seen
    for k in (1, 2, 3):
        trainer = make_trainer(
            tmp_path, StageTransitionCallback(12), model=tiny_model(num_experts_per_tok=k), train_dataset=rows
        )
        trainer.train()
        bound = share * 5 / k
        allowed = "an even load" if k == 3 else f"no max/mean below {bound:.2f}"
        expected = f"is {share:.1%} of all: with 5 experts, {k} per token, that allows {allowed}"
        expected += "\n" if k == 1 else f"; with one per token, no max/mean below {5 * share:.2f}\n"
        assert expected in capsys.readouterr().out
        assert (bound <= 1) == (k == 3)
        entry = next(entry for entry in trainer.state.log_history if "transition_step" in entry)
        assert entry["transition_table_load_max_over_mean"] >= bound - 1e-6


def several_experts(family: str, **options):
    options |= {"num_experts_per_tok": 2, "moe_layer_positions": [0, 2], "max_frozen_load": 1.3}
    return backed_model("llama", vocab_size=99, **options) if family == "llama" else tiny_model(**options)


@pytest.mark.parametrize("family", ["paper", "llama"])
def test_several_experts_per_token_go_through_both_stages_and_on_from_checkpoints(tmp_path, capsys, family):
    def run(folder, step=None):
        recorder, watch = Recorder(), RoutingFluctuationCallback(BLOCKS, check_steps=3, num_tokens=64, batch_size=2)
        trainer = make_trainer(
            folder,
            StageTransitionCallback(TRANSITION, check_steps=1),
            watch,
            recorder,
            model=several_experts(family),
            save_strategy="steps",
            save_steps=3,
            logging_steps=1,
        )
        trainer.train(resume_from_checkpoint=None if step is None else str(tmp_path / "whole" / f"checkpoint-{step}"))
        return trainer, recorder, watch

    trainer, recorder, watch = run(tmp_path / "whole")
    output, model = capsys.readouterr().out, trainer.model
    assert recorder.stages == [1] * 4 + [2] * 8
    assert len(set(recorder.fingerprints[4:])) == 1
    assert watch.history.stage2_change() == 0
    assert watch.history.changes()[1] > 0
    assert f"the {TRANSITION * 2 * 16} tokens seen in stage 1" in output
    (entry,) = [entry for entry in trainer.state.log_history if "transition_step" in entry]
    assert 0 < entry["transition_agreement"] < 1
    assert 0 < entry["transition_expected_agreement"] <= 1
    assert entry["transition_largest_shared_load"] < 1.3 + 1e-6
    for logged in training_logs(trainer.state.log_history):
        assert 0 < logged["mean_gate"] < 1
        assert logged["load_max_over_mean"] >= 1
    assert [logged["routing_stage"] for logged in training_logs(trainer.state.log_history)] == [1] * 4 + [2] * 8
    for step in (3, 6):
        resumed, *_ = run(tmp_path / str(step), step)
        assert_same_weights(weights(resumed.model), weights(model))
        assert resumed.model.config.router_fingerprint == model.config.router_fingerprint
    saved = StableMoEForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-12")
    assert torch.equal(
        saved.route(BLOCKS[0]["input_ids"].unsqueeze(0)), model.route(BLOCKS[0]["input_ids"].unsqueeze(0))
    )


# Stage 2 stands still


def optimizers_for(model, name):
    if name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
        return (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)), {}
    return (None, None), {"optim": name, "weight_decay": 0.1}


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "sgd"])
def test_routing_and_distilled_router_never_move_in_stage_2(tmp_path, name):
    model, seen = tiny_model(moe_layer_positions=[0, 2]), []
    ids = torch.arange(99).unsqueeze(0)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            layers = model.moe_layers_by_name.values()
            seen.append(
                {
                    "route": model.route(ids[:, :60]),
                    "fingerprint": model.router_fingerprint(),
                    "distilled": [p.detach().clone() for layer in layers for p in layer.router.stage1_parameters()],
                    "centroids": [layer.router.centroids.detach().clone() for layer in layers],
                }
            )

    optimizers, arguments = optimizers_for(model, name)
    make_trainer(
        tmp_path, StageTransitionCallback(5), Watch(), model=model, optimizers=optimizers, max_steps=12, **arguments
    ).train()
    before, frozen, after = seen[0], seen[4], seen[5:]
    assert len(after) == 7
    for distilled in zip(before["distilled"], frozen["distilled"], strict=True):
        assert not torch.equal(*distilled)  # they did learn in stage 1
    for step in after:
        assert torch.equal(step["route"], frozen["route"])
        assert step["fingerprint"] == frozen["fingerprint"]
        for was, now in zip(frozen["distilled"], step["distilled"], strict=True):
            assert torch.equal(was, now)
    for was, now in zip(frozen["centroids"], after[-1]["centroids"], strict=True):
        assert not torch.equal(was, now)  # the gate goes on learning (eq. 14)


# Resuming

TRANSITION = 5


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run with a checkpoint at every step, dropout and accumulation."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = resumable_trainer(folder, tiny_model(dropout=0.1), save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer


def resumable_trainer(folder, model, stage1_steps=TRANSITION, **arguments):
    return make_trainer(
        folder,
        StageTransitionCallback(stage1_steps),
        model=model,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        **arguments,
    )


def group_sizes(trainer) -> list[int]:
    return [len(group["params"]) for group in trainer.optimizer.param_groups]


@pytest.mark.parametrize(
    ("step", "start"),
    [(TRANSITION - 2, "fresh"), (TRANSITION, "fresh"), (TRANSITION + 3, "from_pretrained")],
)
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path, whole_run, step, start):
    checkpoint = f"{whole_run.args.output_dir}/checkpoint-{step}"
    if start == "fresh":
        model = tiny_model(seed=7, dropout=0.1)  # other weights: those that count are the checkpoint's
    else:
        model = StableMoEForCausalLM.from_pretrained(checkpoint)
        # Loading maps the file's own, unaligned memory, where CPU kernels add up in another order.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    trainer = resumable_trainer(tmp_path, model)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 12
    assert_same_weights(weights(trainer.model), weights(whole_run.model))
    assert trainer.model.config.router_fingerprint == whole_run.model.config.router_fingerprint
    assert group_sizes(trainer) == group_sizes(whole_run)
    transitions = [entry["step"] for entry in trainer.state.log_history if "transition_step" in entry]
    assert transitions == [TRANSITION]
    # From the first log on that is of steps after the checkpoint alone.
    names = [*STATISTICS, "loss", "step"]
    logs = [
        [{name: entry.get(name) for name in names} for entry in training_logs(run.state.log_history)]
        for run in (trainer, whole_run)
    ]
    resumed, whole = ([entry for entry in each if entry["step"] >= step + 3] for each in logs)
    assert resumed == whole != []


def test_resuming_a_frozen_run_with_a_longer_stage_1_is_an_error(tmp_path, whole_run):
    trainer = resumable_trainer(tmp_path, tiny_model(dropout=0.1), stage1_steps=11)
    with pytest.raises(ValueError, match="should last until step 11 and this is step 8.*it was started with"):
        trainer.train(resume_from_checkpoint=f"{whole_run.args.output_dir}/checkpoint-8")


def test_resuming_past_the_transition_with_a_stage_1_checkpoint_freezes_at_once(tmp_path, whole_run):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, StageTransitionCallback(2), recorder, model=tiny_model(seed=7, dropout=0.1))
    trainer.train(resume_from_checkpoint=f"{whole_run.args.output_dir}/checkpoint-4")
    assert recorder.stages == [2] * 8
    (transition,) = [entry for entry in trainer.state.log_history if "transition_step" in entry]
    assert transition["step"] == 4


# What is refused


@pytest.mark.parametrize(
    ("stage1_steps", "message"),
    [
        *((share, r"must lie inside \(0, 1\)") for share in (0.0, 1.0, -0.1, 1.5, math.nan, math.inf)),
        *((steps, "at least 1 step") for steps in (0, -3)),
        *((value, "must be an int .* or a float") for value in (True, "5", "0.1", None)),
    ],
)
def test_a_stage_1_that_cannot_be_is_refused(stage1_steps, message):
    with pytest.raises(ValueError, match=message):
        StageTransitionCallback(stage1_steps)


def test_stage_1_longer_than_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Stage 1 of 13 steps is longer than training \(12 steps\)"):
        make_trainer(tmp_path, StageTransitionCallback(13)).train()


def make_callback(kind):
    return StageTransitionCallback(5) if kind == "transition" else RoutingFluctuationCallback(BLOCKS, 5, 64)


@pytest.mark.parametrize("kind", ["transition", "fluctuation"])
def test_dense_model_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="dense.*`moe_layer_positions` is empty"):
        make_trainer(tmp_path, make_callback(kind), model=tiny_model(moe_layer_positions=[])).train()


@pytest.mark.parametrize("kind", ["transition", "fluctuation"])
def test_model_of_another_kind_is_refused(tmp_path, kind):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=8, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not a StableMoE model"):
        make_trainer(tmp_path, make_callback(kind), model=model).train()


def test_model_that_is_frozen_already_is_refused(tmp_path):
    model = tiny_model()
    model.freeze_router()
    with pytest.raises(ValueError, match="frozen already.*leave StageTransitionCallback out"):
        make_trainer(tmp_path, StageTransitionCallback(5), model=model).train()


def test_training_that_ends_in_stage_1_is_warned_about(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(tmp_path, StageTransitionCallback(5), Stop())
    with caplog.at_level(logging.WARNING, logger="modeling_stablemoe.training.transition"):
        trainer.train()
    assert "ended at step 3, before the transition at step 5: the routing is not frozen" in caplog.text
    assert trainer.model.routing_stage == 1


class Adapter(nn.Module):
    """Wraps a model as adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base_model = nn.ModuleDict({"inner": base})

    def forward(self, **kwargs):
        return self.base_model["inner"](**kwargs)


def test_model_inside_a_wrapper_is_found_and_frozen(tmp_path):
    wrapped = Adapter(tiny_model())
    assert find_stablemoe(wrapped) is wrapped.base_model["inner"]
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        StageTransitionCallback(5),
        RoutingFluctuationCallback(BLOCKS, 5, 64),
        recorder,
        model=wrapped,
        remove_unused_columns=False,
    )
    trainer.train()
    assert recorder.stages == [1] * 4 + [2] * 8
    assert training_logs(trainer.state.log_history)[0].keys() >= STATISTICS
    with pytest.raises(ValueError, match="Adapter is not a StableMoE model"):
        find_stablemoe(Adapter(nn.Linear(2, 2)))


def test_resuming_from_a_checkpoint_with_an_altered_table_is_an_error(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, StageTransitionCallback(2), max_steps=4, **saving).train()
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    tensors = load_file(file)
    [name] = [name for name in tensors if name.endswith("routing_table")]
    tensors[name][7] = (tensors[name][7] + 1) % 5
    save_file(tensors, file, metadata={"format": "pt"})
    resumed = make_trainer(tmp_path, StageTransitionCallback(2), max_steps=6, **saving)
    with pytest.raises(ValueError, match="not those that it was saved with.*earlier checkpoint"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# Begun again in the middle


class OutOfMemory(TrainerCallback):
    """Fails once, at a step, as where the batch is too large."""

    def __init__(self, step):
        self.step, self.begun = step, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.begun.append((state.global_step, model.routing_stage, model.router_fingerprint()))

    def on_step_begin(self, args, state, control, **kwargs):
        if len(self.begun) == 1 and state.global_step == self.step:
            raise RuntimeError("CUDA out of memory.")


RESTARTED = {
    "gates and experts": {
        "reset_gates_at_freeze": True,
        "share_experts_in_stage1": True,
        "distilled_router": "counts",
        "max_frozen_load": 1.3,
    },
    "transformer_1": {"distilled_router": "transformer_1"},
    "translation": None,
}


@pytest.mark.parametrize("kind", one_fast(*RESTARTED))
def test_a_smaller_batch_found_after_the_transition_begins_in_stage_1(tmp_path, kind, caplog):
    full, recorder, seen = OutOfMemory(6), Recorder(), []

    class Look(TrainerCallback):
        """Notes the first MoE layer after each step."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            layer = next(iter(model.moe_layers_by_name.values()))
            first, *others = layer.expert_stack.sublayers[0].up_proj
            seen.append((layer.router.centroids.any().item(), all(torch.equal(first, other) for other in others)))

    is_translation = RESTARTED[kind] is None
    model = tiny_seq2seq_model() if is_translation else tiny_model(**RESTARTED[kind])
    if kind == "gates and experts":
        for layer in model.model.moe_layers:
            for sublayer in layer.expert_stack.sublayers:
                for values in sublayer.parameters():
                    values.data[:] = values.data[:1].clone()
    trainer = (make_seq2seq_trainer if is_translation else make_trainer)(
        tmp_path,
        StageTransitionCallback(4),
        full,
        recorder,
        Look(),
        model=model,
        max_steps=8,
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
    )
    trainer.train()
    assert full.begun == [(0, 1, None), (0, 1, None)]
    assert recorder.stages == [1, 1, 1, 2, 2, 2] + [1, 1, 1, 2, 2, 2, 2, 2]
    assert recorder.fingerprints[-1] == model.config.router_fingerprint == model.router_fingerprint()
    assert "the routing frozen meanwhile is gone" in caplog.text
    if kind == "gates and experts":
        # Both go back to before the transition, after which gates are reset and experts part.
        assert [has_gates for has_gates, _ in seen[6:9]] == [True] * 3
        assert [are_equal for _, are_equal in seen] == [True] * 4 + [False] * 2 + [True] * 4 + [False] * 4


def test_a_frozen_model_is_refused_as_before_where_no_batch_size_is_sought(tmp_path):
    trainer = make_trainer(tmp_path, StageTransitionCallback(4), OutOfMemory(6), max_steps=8)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    with pytest.raises(ValueError, match="frozen already"):
        trainer.train()


def test_callbacks_leave_the_trainer_its_list_and_the_model_as_they_are(tmp_path):
    left = []
    for name in ("plain", "watched"):
        callbacks = [
            StageTransitionCallback(2),
            RoutingFluctuationCallback(BLOCKS, check_steps=1, num_tokens=32),
            ModelCardCallback(),
            TrainingClockCallback(),
        ]
        trainer = make_trainer(tmp_path / name, *(callbacks if name == "watched" else []), max_steps=3)
        given = list(trainer.callback_handler.callbacks)
        trainer.train()
        trainer.save_model()
        assert trainer.callback_handler.callbacks == given
        left.append([vars(trainer).keys(), *(vars(module).keys() for module in trainer.model.modules())])
    assert left[0] == left[1]
