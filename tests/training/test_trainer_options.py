"""Trainer's own options across the transition."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from helpers import ROOT
from helpers.matrices import one_fast
from helpers.models import tiny_model, tiny_seq2seq_model
from helpers.trainers import assert_same_weights, make_seq2seq_trainer, make_trainer, weights
from helpers.workplaces import CausalWorkplace, TranslationWorkplace
from modeling_stablemoe import StableMoEForCausalLM, StableMoEForConditionalGeneration, StageTransitionCallback
from modeling_stablemoe.checkpoints.folders import require_optimizer
from modeling_stablemoe.runs.run import evaluate_saved_model, summarize_run, write_results


TRANSITION = 5
KINDS = {
    "causal": (make_trainer, tiny_model, StableMoEForCausalLM),
    "seq2seq": (make_seq2seq_trainer, tiny_seq2seq_model, StableMoEForConditionalGeneration),
}
EVERY_STEP = {
    "max_steps": 8,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}
WATCH = "stage1_watch.safetensors"


class Losses(TrainerCallback):
    """Makes evaluation say that the loss is `losses[step]`, 9 at other steps, and keeps what it really was."""

    def __init__(self, losses):
        self.losses, self.measured = losses, {}

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.measured[state.global_step] = metrics["eval_loss"]
        metrics["eval_loss"] = self.losses.get(state.global_step, 9.0)


def train(folder, *callbacks, losses, kind="causal", transition=None, resume=None, **arguments):
    make = KINDS[kind][0]
    transition = transition or StageTransitionCallback(TRANSITION)
    trainer = make(folder, Losses(losses), transition, *callbacks, **{**EVERY_STEP, **arguments})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def checkpoints(folder) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in Path(folder).glob("checkpoint-*"))


def assert_stage(model, stage):
    assert model.routing_stage == stage
    assert (model.config.router_fingerprint is None) == (stage == 1)
    assert model.config.router_fingerprint == model.router_fingerprint()


# The best checkpoint


@pytest.mark.parametrize(("kind", "best", "stage"), [("causal", 3, 1), ("causal", TRANSITION, 2), ("seq2seq", 7, 2)])
def test_the_best_checkpoint_is_the_model_that_training_leaves(tmp_path, caplog, kind, best, stage):
    trainer = train(tmp_path, losses={best: 1.0}, kind=kind)
    assert_stage(trainer.model, stage)
    model_class = KINDS[kind][2]
    assert_same_weights(weights(trainer.model), weights(model_class.from_pretrained(tmp_path / f"checkpoint-{best}")))
    trainer.save_model(tmp_path / "final")
    saved = model_class.from_pretrained(tmp_path / "final")
    assert_stage(saved, stage)
    assert_same_weights(weights(saved), weights(trainer.model))
    about_the_end = [message for message in caplog.messages if "not frozen" in message]
    if stage == 1:
        [message] = about_the_end
        assert f"of step {best}, was loaded" in message
        assert f"the transition was at step {TRANSITION}" in message
        assert "`best_of_stage2=True`" in message
        saved.freeze_router()  # as the message advises
    else:
        assert not about_the_end


@pytest.mark.parametrize(
    ("kind", "losses"),
    [("seq2seq", {3: 1.0, 7: 2.0}), ("causal", {1: 1.0})],
)
def test_best_of_stage2_chooses_among_frozen_checkpoints(tmp_path, caplog, kind, losses):
    transition = StageTransitionCallback(TRANSITION, best_of_stage2=True)
    trainer = train(tmp_path, losses=losses, kind=kind, transition=transition)
    # Of equal losses the first is the best.
    best = min((step for step in range(TRANSITION, 9)), key=lambda step: losses.get(step, 9.0))
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == losses.get(best, 9.0)
    assert_stage(trainer.model, 2)
    expected = KINDS[kind][2].from_pretrained(tmp_path / f"checkpoint-{best}")
    assert_same_weights(weights(trainer.model), weights(expected))
    assert "not frozen" not in caplog.text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run whose best checkpoint is of stage 1."""
    return train(tmp_path_factory.mktemp("whole"), losses={3: 1.0})


def checkpoint_of(trainer, step: int) -> str:
    return f"{trainer.args.output_dir}/checkpoint-{step}"


def test_a_resumed_run_remembers_a_best_checkpoint_of_before_the_transition(tmp_path, whole):
    resumed = train(tmp_path, losses={}, resume=checkpoint_of(whole, 6))
    assert resumed.state.best_global_step == 3
    assert_stage(resumed.model, 1)
    assert_same_weights(weights(resumed.model), weights(whole.model))


def test_best_of_stage2_given_at_a_resume_forgets_the_best_of_stage_1(tmp_path, whole):
    transition = StageTransitionCallback(TRANSITION, best_of_stage2=True)
    resumed = train(tmp_path, losses={8: 2.0}, transition=transition, resume=checkpoint_of(whole, 6))
    assert resumed.state.best_global_step == 8
    assert_stage(resumed.model, 2)


def test_a_run_resumed_with_best_of_stage2_keeps_the_best_of_stage_2(tmp_path):
    for resume in (None, str(tmp_path / "checkpoint-7")):
        transition = StageTransitionCallback(TRANSITION, best_of_stage2=True)
        trainer = train(tmp_path, losses={3: 1.0, 6: 2.0}, transition=transition, resume=resume)
        assert trainer.state.best_global_step == 6


def test_the_message_names_the_real_transition_where_the_routing_settled_early(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("modeling_stablemoe.measure.verdict.LEAST_AGREEMENT_OVER_CHANCE", -1.0)
    monkeypatch.setattr("modeling_stablemoe.measure.verdict.LARGEST_TABLE_LOAD", 99.0)
    monkeypatch.setattr("modeling_stablemoe.measure.verdict.MOST_CLOSED_GATES", 1.0)
    transition = StageTransitionCallback(8, settled_change=0.99, check_steps=1)
    trainer = train(tmp_path, EarlyStoppingCallback(4), losses={2: 1.0}, transition=transition)
    assert trainer.state.global_step == 6
    assert_stage(trainer.model, 1)
    assert "the transition was at step 3" in caplog.text
    assert "Training ended" not in caplog.text


# Early stopping


def test_early_stopping_in_stage_1_leaves_a_model_that_is_not_frozen_and_says_so(tmp_path, caplog):
    trainer = train(tmp_path, EarlyStoppingCallback(2), losses={1: 1.0})
    assert trainer.state.global_step == 3
    assert_stage(trainer.model, 1)
    assert "ended at step 3, before the transition at step 5" in caplog.text
    assert "`best_of_stage2=True`" in caplog.text
    assert not any("transition_step" in entry for entry in trainer.state.log_history)


def test_early_stopping_while_the_transition_is_held_says_that(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("modeling_stablemoe.measure.verdict.LEAST_AGREEMENT_OVER_CHANCE", 1.1)  # never worth it
    transition = StageTransitionCallback(3, hold_until_ready=8, check_steps=1)
    trainer = train(tmp_path, EarlyStoppingCallback(4), losses={1: 1.0}, transition=transition)
    assert trainer.state.global_step == 5
    assert_stage(trainer.model, 1)
    assert "ended at step 5, while the transition was held, until step 8 at the latest" in caplog.text


@pytest.mark.parametrize(
    ("order", "losses", "stop", "best"),
    [
        # Stage 1 is better than all that follows, and gets worse long enough to stop a run.
        (1, {1: 1.0, TRANSITION: 3.0, 6: 4.0, 7: 4.0}, 7, TRANSITION),
        (-1, {1: 1.0, TRANSITION: 3.0, 6: 4.0, 7: 4.0}, 7, TRANSITION),
        # Stage 1 is worse than the first evaluation of stage 2.
        (1, {4: 3.0, TRANSITION: 2.0, 6: 1.0}, 8, 6),
    ],
)
def test_best_of_stage2_keeps_stage_1_out_of_the_patience(tmp_path, order, losses, stop, best):
    transition = StageTransitionCallback(TRANSITION, best_of_stage2=True)
    callbacks = [transition, EarlyStoppingCallback(2)][::order]
    trainer = make_trainer(tmp_path, Losses(losses), *callbacks, **EVERY_STEP)
    trainer.train()
    assert (trainer.state.global_step, trainer.state.best_global_step) == (stop, best)
    assert_stage(trainer.model, 2)


# Which checkpoints remain


def test_best_of_stage2_lets_rotation_delete_the_best_of_stage_1(tmp_path):
    transition = StageTransitionCallback(TRANSITION, best_of_stage2=True)
    train(tmp_path, losses={3: 1.0, 6: 2.0}, transition=transition, save_total_limit=2)
    assert checkpoints(tmp_path) == [6, 8]


@pytest.mark.parametrize("kind", one_fast("causal", "seq2seq"))
def test_every_survivor_resumes_to_the_same_bits(tmp_path, kind):
    last = {"load_best_model_at_end": False, "max_steps": 8}
    whole = train(tmp_path / "whole", losses={}, kind=kind, **last)
    train(tmp_path / "rotated", losses={3: 1.0}, kind=kind, save_total_limit=3)
    assert checkpoints(tmp_path / "rotated") == [3, 7, 8]
    for step in (3, 7):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "rotated", folder)
        model = KINDS[kind][1](seed=5)
        resumed = train(folder, losses={}, kind=kind, resume=str(folder / f"checkpoint-{step}"), model=model, **last)
        assert_same_weights(weights(resumed.model), weights(whole.model))
        assert resumed.model.config.router_fingerprint == whole.model.config.router_fingerprint
        assert transition_entry(resumed) == transition_entry(whole)


def transition_entry(trainer) -> dict:
    [entry] = [entry for entry in trainer.state.log_history if "transition_step" in entry]
    return entry


def test_a_checkpoint_that_stands_elsewhere_brings_what_stage_1_has_seen_if_it_is_named(tmp_path, whole, caplog):
    checkpoint = str(tmp_path / "elsewhere")
    shutil.copytree(checkpoint_of(whole, 3), checkpoint)
    named = train(tmp_path / "named", losses={}, resume=checkpoint, resume_from_checkpoint=checkpoint)
    assert transition_entry(named) == transition_entry(whole)
    assert WATCH not in caplog.text
    train(tmp_path / "unnamed", losses={}, resume=checkpoint)
    assert f"There is no {WATCH}" in caplog.text


# When checkpoints are saved, and of what


@pytest.mark.parametrize(("option", "saved"), [(False, [1, 3]), (True, [1, 2, 3, 4, TRANSITION, 7])])
def test_save_strategy_best_across_the_transition(tmp_path, option, saved):
    transition = StageTransitionCallback(TRANSITION, best_of_stage2=option)
    losses = {3: 1.0, TRANSITION: 5.0, 6: 6.0, 7: 4.0}
    trainer = train(tmp_path, losses=losses, transition=transition, save_strategy="best")
    assert checkpoints(tmp_path) == saved
    assert_stage(trainer.model, 2 if option else 1)
    for step in saved:
        assert (tmp_path / f"checkpoint-{step}" / WATCH).exists() == (step < TRANSITION)


def test_save_only_model_keeps_the_stage_but_is_no_checkpoint_to_resume(tmp_path):
    options = {"losses": {}, "load_best_model_at_end": False}
    train(tmp_path, save_only_model=True, **options)
    for step in (3, 6):
        folder = tmp_path / f"checkpoint-{step}"
        assert not (folder / "optimizer.pt").exists()
        assert_stage(StableMoEForCausalLM.from_pretrained(folder), 1 if step < TRANSITION else 2)
        with pytest.raises(
            ValueError, match="cannot be resumed: it was saved with `save_only_model`.*--model_name_or_path"
        ):
            require_optimizer(folder)
    require_optimizer(tmp_path / "checkpoint-8")  # of the last step: there is nothing to resume


# What a run reports


@pytest.mark.parametrize(("best", "stage"), [(3, 1), (6, 2)])
def test_results_and_card_are_of_the_saved_model(tmp_path, best, stage):
    losses = Losses({best: 1.0})
    trainer = make_trainer(tmp_path, losses, StageTransitionCallback(TRANSITION), **EVERY_STEP)
    trainer.train()
    trainer.remove_callback(losses)
    results = {"perplexity": evaluate_saved_model(trainer), **summarize_run(trainer)}
    write_results(trainer, results, ROOT / "hub_card.md", "made up")
    results = json.loads((tmp_path / "results.json").read_text())
    perplexities = {step: torch.tensor(loss).double().exp().item() for step, loss in losses.measured.items()}
    assert results["perplexity"] == pytest.approx(perplexities[best], rel=1e-6)
    assert (results["step"], results["routing_stage"]) == (best, stage)
    assert (results["router_fingerprint"] is None) == (stage == 1)
    # The table is of the run: what the saved model was measured at must not enter it.
    assert [row["steps"] for row in results["stages"]] == [TRANSITION, 8]
    assert results["stages"][1]["perplexity"] == pytest.approx(perplexities[8], rel=1e-6)
    card = (tmp_path / "README.md").read_text()
    assert ("frozen (stage 2)" in card) == (stage == 2)
    assert ("**not frozen yet**" in card) == (stage == 1)
    assert ("when frozen | not frozen |" in card) == (stage == 1)
    assert f"best checkpoint, of step {best} of 8" in card
    assert ("its routing is not frozen" in card) == (stage == 1)


def run_script(workplace, *more) -> tuple[str, dict, dict]:
    # The largest loss counts as the best: that of the first evaluation, in stage 1.
    options = """--load_best_model_at_end True --metric_for_best_model loss --greater_is_better True --eval_steps 1
        --save_steps 1"""
    output = workplace.train_here("run", *options.split(), *more, max_steps=6)
    folder = workplace.folder / "run"
    results = json.loads((folder / "results.json").read_text())
    return output, results, load_file(folder / "model.safetensors")


@pytest.fixture(params=one_fast(CausalWorkplace, TranslationWorkplace))
def workplace(request, tmp_path):
    return request.param(tmp_path)


def test_script_says_that_its_best_model_is_of_stage_1(workplace):
    output, results, tensors = run_script(workplace)
    assert results["step"] == 1
    assert (results["routing_stage"], results["router_fingerprint"]) == (1, None)
    assert all((value == -1).all() for name, value in tensors.items() if name.endswith("routing_table"))
    assert "The saved model is the best checkpoint, of step 1 of 6, in stage 1: its routing is not frozen." in output
    assert "`best_of_stage2=True`" in output
    assert "still learned (stage 1)" in (workplace.folder / "run" / "README.md").read_text()
    config = json.loads((workplace.folder / "run" / "config.json").read_text())
    assert config.get("router_fingerprint") is None


@pytest.mark.slow
def test_script_with_best_of_stage2_saves_a_frozen_model(workplace):
    output, results, tensors = run_script(workplace, "--best_of_stage2", "True")
    assert results["step"] >= 2
    assert results["routing_stage"] == 2
    assert all((value >= 0).all() for name, value in tensors.items() if name.endswith("routing_table"))
    assert "not frozen" not in output
