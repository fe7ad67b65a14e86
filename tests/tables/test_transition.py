"""Training that freezes the routing of a model of transformers half-way: what it counts, freezes, saves and resumes."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers.moe_families import tiny_moe
from helpers.trainers import make_trainer
from modeling_stablemoe.tables import (
    TableTransitionCallback,
    count_routes,
    installed_layers,
    installed_tables,
    load_tables,
    make_tables,
)
from modeling_stablemoe.tables.installing import routers_of


def transition(**options) -> TableTransitionCallback:
    return TableTransitionCallback(**{"step": 6, "count_steps": 4, "max_load": 1.5} | options)


class End(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def run(folder, callback, model=None, resume=None, early_end=None, **options):
    """A finished training of 10 steps, with balance losses as long as there is something to balance."""
    model = tiny_moe("olmoe", output_router_logits=True) if model is None else model
    trainer = make_trainer(folder, callback, End(early_end), model=model, **{"max_steps": 10, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def entry(trainer) -> dict:
    (found,) = [entry for entry in trainer.state.log_history if "frozen_layers" in entry]
    return found


def test_routes_of_the_last_steps_become_the_tables_and_stay(tmp_path):
    model, seen = tiny_moe("olmoe"), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]) if module.training else None, with_kwargs=True
    )
    callback = transition()
    # Nothing moves, so the routes can be counted afterwards. Passes of an evaluation do not count.
    trainer = run(
        tmp_path,
        callback,
        model,
        learning_rate=0.0,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
    )
    assert callback.frozen == installed_layers(model) == [0, 1, 2]
    tables = installed_tables(model)
    assert len(seen) == 20
    counts = count_routes(tiny_moe("olmoe"), [{"input_ids": ids} for ids in seen[4:12]])
    made = make_tables(counts, 1.5)
    assert torch.equal(tables, made.tables)
    found = entry(trainer)
    assert found["transition_step"] == found["step"] == 6
    kept = sum(balanced.agreement for balanced in made.balanced) / (3 * 2 * int(counts.tokens.sum()))
    assert found["table_agreement"] == pytest.approx(kept)
    assert found["table_load_max_over_mean"] == pytest.approx(
        max((balanced.load.max() / balanced.load.mean()).item() for balanced in made.balanced)
    )
    other = tiny_moe("olmoe")
    load_tables(other, tmp_path)
    assert torch.equal(installed_tables(other), tables)


def test_frozen_layers_are_not_balanced_and_their_gates_go_on_learning(tmp_path):
    model, aux = tiny_moe("olmoe", output_router_logits=True), []
    model.register_forward_hook(lambda module, args, output: aux.append(output.aux_loss) if module.training else None)
    gates = []

    class Watch(TableTransitionCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            super().on_step_end(args, state, control, model=model, **kwargs)
            gates.append(routers_of(model)[0].weight.detach().clone())

    run(tmp_path, Watch(6, 4, 1.5), model)
    assert all(loss is not None for loss in aux[:6])
    assert aux[6:] == [None] * 4
    assert not torch.equal(gates[-1], gates[6])


@pytest.mark.parametrize("step", [4, 8])
def test_resumed_run_ends_like_one_that_was_not_interrupted(tmp_path, step):
    # Its checkpoints hold the experts as its models do: of other families Trainer resumes all but the experts.
    start = partial(tiny_moe, "gpt_oss", output_router_logits=True)
    whole = run(tmp_path / "whole", transition(), start(), save_strategy="steps", save_steps=4)
    file = "routing_tables.safetensors" if step == 8 else "route_counts.safetensors"
    assert (tmp_path / "whole" / f"checkpoint-{step}" / file).is_file()
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
    resumed = run(tmp_path / "whole", transition(), start(), checkpoint, save_strategy="no")
    assert torch.equal(installed_tables(resumed.model), installed_tables(whole.model))
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
    assert entry(resumed) == entry(whole)


def test_checkpoint_without_its_tables_is_refused(tmp_path):
    run(tmp_path, transition(), save_strategy="steps", save_steps=8)
    checkpoint = tmp_path / "checkpoint-8"
    tables = load_file(checkpoint / "routing_tables.safetensors")["tables"]
    (checkpoint / "routing_tables.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(
        ValueError, match="frozen at step 6, and there is no routing_tables.safetensors to resume from"
    ):
        run(tmp_path, transition(), resume=str(checkpoint))
    model = tiny_moe("olmoe", output_router_logits=True)
    load_tables(model, tmp_path / "elsewhere.safetensors")
    run(tmp_path, transition(), model, resume=str(checkpoint))
    assert torch.equal(installed_tables(model), tables)


def test_layers_below_the_agreement_stay_learned(tmp_path):
    every = run(tmp_path / "every", transition(layers=[0, 2]), learning_rate=0.0)
    assert installed_layers(every.model) == [0, 2]
    none = run(tmp_path / "none", transition(min_agreement=1.0), save_strategy="steps", save_steps=8)
    assert installed_layers(none.model) == []
    assert entry(none)["frozen_layers"] == 0
    assert not list((tmp_path / "none").rglob("routing_tables.safetensors"))
    resumed = run(tmp_path / "none", transition(min_agreement=1.0), resume=str(tmp_path / "none" / "checkpoint-8"))
    assert installed_layers(resumed.model) == []
    # Their mean is reached by some of the two, and not by both.
    threshold = entry(every)["table_agreement"]
    some = run(tmp_path / "some", transition(layers=[0, 2], min_agreement=threshold), learning_rate=0.0)
    assert installed_layers(some.model) in ([0], [2])


def test_best_model_of_before_the_transition_has_no_tables(tmp_path, caplog):
    trainer = run(
        tmp_path,
        transition(),
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the loss falls, so the first is the best
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=5,
        save_steps=5,
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5")
    assert installed_layers(trainer.model) == []
    assert "is from before the transition: the tables are taken out again" in caplog.text


def test_share_of_all_steps_and_an_early_end(tmp_path, caplog):
    trainer = run(tmp_path / "share", transition(step=0.3, count_steps=9))
    assert entry(trainer)["transition_step"] == 3
    with pytest.raises(ValueError, match="at step 11 is not within training"):
        run(tmp_path / "late", transition(step=11))
    assert entry(run(tmp_path / "done", transition(step=10)))["transition_step"] == 10
    early = run(tmp_path / "early", transition(), early_end=3)
    assert installed_layers(early.model) == []
    assert "Training ended before step 6: the routing is not frozen" in caplog.text
    hooks = routers_of(early.model)[0]._forward_hooks.values()
    assert not any(isinstance(hook, partial) for hook in hooks)  # nobody counts any more


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 1.0}, "`step` is 1.0; pass an int >= 1, or a share"),
        ({"step": 0}, "`step` is 0"),
        ({"count_steps": 0}, "`count_steps` is 0"),
        ({"max_load": 0.9}, "`max_load` is 0.9"),
        ({"min_agreement": 2}, "`min_agreement` is 2"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        transition(**options)


def test_models_without_the_seam_are_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="How a PhimoeTopKRouter"):
        run(tmp_path, transition(), tiny_moe("phimoe", num_local_experts=8))
