"""Routing fluctuation: the history, its report and the callback."""

import json
import shutil

import pytest
import torch
from transformers import TrainerCallback, default_data_collator

from helpers.matrices import one_fast
from helpers.models import padded, random_ids, shaken, tiny_config, tiny_model, tiny_seq2seq_model
from helpers.trainers import BLOCKS, assert_same_weights, make_trainer, weights
from modeling_stablemoe import (
    RoutingFluctuationCallback,
    StableMoEForSequenceClassification,
    StageTransitionCallback,
)
from modeling_stablemoe.measure import fluctuation
from modeling_stablemoe.measure.fluctuation import RoutingHistory, plot_fluctuation
from modeling_stablemoe.training import RoutingTrainer


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    """Drawing a picture takes longer than a run of these; one test does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fluctuation, "plot_fluctuation", lambda summary: None)
        yield


def history_of(*checks) -> RoutingHistory:
    history = RoutingHistory()
    for step, stage, experts in checks:
        history.record(step, stage, torch.tensor(experts))
    return history


KNOWN = (
    (0, 1, [0, 1, 2, 3]),
    (10, 1, [0, 1, 2, 0]),  # one of four
    (20, 1, [1, 2, 2, 0]),  # two
    (30, 2, [1, 1, 2, 0]),  # one
    (40, 2, [1, 1, 2, 0]),
)


def test_changes_are_the_share_of_tokens_whose_expert_changed():
    history = RoutingHistory()
    returned = [history.record(step, stage, torch.tensor(experts)) for step, stage, experts in KNOWN]
    assert returned == history.changes() == [None, 0.25, 0.5, 0.25, 0.0]


def test_summary_holds_the_cumulative_curve_and_the_shares_still_changing():
    # Token 0 settles after 10, token 1 (right, wrong, right) after 20, token 2 never moves, token 3 after 0.
    summary = history_of(*KNOWN).summary()
    assert summary["tokens"] == 4
    assert summary["steps"] == summary["last_fluctuation"]["steps"] == [0, 10, 20, 30, 40]
    assert summary["stages"] == [1, 1, 1, 2, 2]
    assert summary["last_fluctuation"]["cumulative_share"] == [0.25, 0.5, 0.75, 1.0, 1.0]
    # After 8 steps two tokens had not settled, after 20 and 32 none.
    assert summary["share_still_changing_after"] == {"0.2": 0.5, "0.5": 0.0, "0.8": 0.0}


def test_a_token_that_changes_between_two_checks_has_not_settled_by_the_first():
    few = history_of((0, 1, [0, 1, 2, 3]), (40, 2, [1, 2, 3, 3])).summary()
    assert few["last_fluctuation"]["cumulative_share"] == [0.25, 1.0]


def test_a_share_since_the_last_check_is_no_slope_across_the_transition():
    pytest.importorskip("matplotlib")
    figure = plot_fluctuation(history_of(*KNOWN).summary())
    changed, settled = (axes.lines[0] for axes in figure.axes)
    assert (changed.get_drawstyle(), settled.get_drawstyle()) == ("steps-pre", "steps-post")
    assert plot_fluctuation(history_of(KNOWN[0]).summary()) is None  # there is nothing to see in a single check


def test_of_several_experts_the_share_that_changed_counts_and_their_order_does_not():
    history = history_of(
        (0, 1, [[0, 1], [2, 3], [4, 0]]),
        (10, 1, [[1, 0], [2, 4], [1, 2]]),  # none, one and both of two
        (20, 2, [[1, 0], [4, 2], [2, 1]]),
    )
    assert history.changes() == [None, 0.5, 0.0]
    assert history.last_fluctuation_steps().tolist() == [0, 0, 0]
    history.record(30, 2, torch.tensor([[0, 1], [4, 1], [1, 2]]))
    assert history.last_fluctuation_steps().tolist() == [0, 20, 0]
    assert history.summary()["tokens"] == 3


def test_stage_2_change_counts_only_checks_within_stage_2():
    assert history_of(*KNOWN).stage2_change() == 0.0
    assert history_of(*KNOWN[:4]).stage2_change() is None
    assert history_of(*KNOWN[:3]).stage2_change() is None
    moved = history_of(*KNOWN, (50, 2, [1, 1, 2, 1]), (60, 2, [1, 1, 2, 1]))
    assert moved.stage2_change() == 0.25
    assert moved.summary()["largest_change_in_stage2"] == 0.25


def test_history_is_saved_and_cut_at_the_step_that_is_resumed(tmp_path):
    history_of(*KNOWN).save(tmp_path / "history.safetensors")
    loaded = RoutingHistory()
    loaded.load(tmp_path / "history.safetensors", last_step=25)
    assert loaded.steps == [0, 10, 20]
    assert loaded.stages == [1, 1, 1]
    assert [experts.tolist() for experts in loaded.experts] == [experts for _, _, experts in KNOWN[:3]]
    assert loaded.record(30, 2, torch.tensor([1, 1, 2, 0])) == 0.25
    assert [path.name for path in tmp_path.iterdir()] == ["history.safetensors"]


def test_a_history_of_several_experts_is_saved_as_such(tmp_path):
    history = history_of((0, 1, [[0, 1], [2, 3]]), (10, 1, [[1, 0], [2, 4]]))
    history.save(tmp_path / "history.safetensors")
    loaded = RoutingHistory()
    loaded.load(tmp_path / "history.safetensors", last_step=10)
    assert loaded.changes() == history.changes() == [None, 0.25]


def fluctuation_run(folder, *callbacks, model=None, **arguments):
    """Two MoE layers: what reaches the second depends on how tokens were routed in the first."""
    watch = RoutingFluctuationCallback(BLOCKS, check_steps=3, num_tokens=100, batch_size=2)
    trainer = make_trainer(
        folder,
        *callbacks,
        StageTransitionCallback(8),
        watch,
        model=tiny_model(moe_layer_positions=[0, 2]) if model is None else model,
        **arguments,
    )
    return trainer, watch


@pytest.mark.parametrize("k", [1, 2])
def test_fluctuation_compares_the_experts_that_training_would_use(tmp_path, k):
    model, chosen = tiny_model(moe_layer_positions=[0, 2], num_experts_per_tok=k), {}
    batch = torch.stack([block["input_ids"] for block in BLOCKS[:7]])  # 112 tokens: 100, rounded up

    class Training(TrainerCallback):
        @torch.no_grad()
        def route(self, state):
            model.train()  # the tiny model has no dropout
            indices = model(input_ids=batch, output_router_logits=True).expert_indices
            chosen[state.global_step] = torch.cat([index.view(-1, k) for index in indices])

        def on_train_begin(self, args, state, control, **kwargs):
            self.route(state)

        def on_step_end(self, args, state, control, **kwargs):
            self.route(state)

    trainer, watch = fluctuation_run(tmp_path, Training(), model=model, trainer_class=RoutingTrainer)
    trainer.train()
    assert watch.history.steps == [0, 3, 6, 8, 9, 12]
    assert watch.history.stages == [1, 1, 1, 2, 2, 2]
    expected = [chosen[step] for step in watch.history.steps]
    history = trainer.state.log_history
    logged = {entry["step"]: entry["routing_fluctuation"] for entry in history if "routing_fluctuation" in entry}
    for index, step in enumerate(watch.history.steps):
        # Rows are examples, batches of 2: the tokens of a layer follow one another again.
        assert torch.equal(watch.history.experts[index].view(-1, k).long(), expected[index]), step
        if index:
            kept = [
                len(set(before) & set(after)) / k
                for before, after in zip(expected[index - 1].tolist(), expected[index].tolist(), strict=True)
            ]
            assert logged[step] == pytest.approx(1 - sum(kept) / len(kept))
    assert logged[3] > 0
    assert logged[9] == logged[12] == 0


DISTILLED = ["transformer_1", "word_embedding", "counts", "bigram", "cnn"]


def experts_of(model, **inputs):
    with torch.no_grad():
        return torch.cat([index.flatten() for index in model(**inputs, output_router_logits=True).expert_indices])


@pytest.mark.parametrize("kind", one_fast(*DISTILLED))
def test_a_model_is_asked_for_its_backbones_choice(kind):
    ids, mask = random_ids(4, 9), torch.ones(4, 9, dtype=torch.long)
    mask[1:3, 5:] = 0
    real = mask.bool().flatten().repeat(2)
    model = tiny_model(moe_layer_positions=[0, 2], distilled_router=kind)
    trained = experts_of(model.train(), input_ids=ids, attention_mask=mask)  # the tiny model has no dropout
    asked = experts_of(model.eval(), input_ids=ids, attention_mask=mask, route_by_backbone=True)
    assert torch.equal(asked[real], trained[real])
    evaluated = experts_of(model, input_ids=ids, attention_mask=mask)
    assert not torch.equal(asked[real], evaluated[real])
    model.freeze_router()
    assert torch.equal(experts_of(model, input_ids=ids, attention_mask=mask, route_by_backbone=True), evaluated)


def test_a_translation_model_is_asked_for_its_backbones_choice():
    ids, labels = random_ids(4, 9, high=90), random_ids(4, 6, seed=1, high=90)
    model = tiny_seq2seq_model()
    trained = experts_of(model.train(), input_ids=ids, labels=labels)
    assert torch.equal(experts_of(model.eval(), input_ids=ids, labels=labels, route_by_backbone=True), trained)
    assert not torch.equal(experts_of(model, input_ids=ids, labels=labels), trained)


def test_padding_of_rows_that_come_padded_is_neither_watched_nor_seen(tmp_path):
    lengths = [3, 7, 5, 6]
    rows = [row[:length] for row, length in zip(random_ids(4, 7), lengths, strict=True)]
    bare = [{"input_ids": row} for row in rows]
    right, left = (
        [
            {"input_ids": ids, "attention_mask": mask}
            for ids, mask in zip(padded(rows, 1, side), padded([torch.ones(n) for n in lengths], 0, side), strict=True)
        ]
        for side in ("right", "left")
    )
    watched = []
    for name, dataset in (("bare", iter(bare)), ("right", right), ("left", left)):
        watch = RoutingFluctuationCallback(dataset, num_tokens=20)
        make_trainer(tmp_path / name, watch, model=tiny_model(moe_layer_positions=[0, 2]), max_steps=1).train()
        watched.append(watch.history.experts)
    # 20 tokens are the first four rows, of which padding would have made two.
    assert [experts[0].numel() for experts in watched] == [2 * sum(lengths)] * 3
    for other in watched[1:]:
        assert torch.equal(torch.stack(other), torch.stack(watched[0]))


@pytest.mark.parametrize("labels", [1, [0, 1]], ids=str)
def test_labels_of_a_classifier_are_no_tokens(tmp_path, labels):
    rows = [{"input_ids": row, "labels": labels, "label": labels, "idx": 7} for row in random_ids(4, 6)]
    torch.manual_seed(0)
    model = shaken(StableMoEForSequenceClassification(tiny_config(moe_layer_positions=[0, 2], num_labels=2)))
    expected = experts_of(model.train(), input_ids=torch.stack([row["input_ids"] for row in rows]))
    watch = RoutingFluctuationCallback(rows)
    trained = [{"input_ids": row["input_ids"], "labels": index % 2} for index, row in enumerate(rows)]
    model.config.problem_type = "single_label_classification"
    make_trainer(
        tmp_path, watch, model=model, max_steps=1, train_dataset=trained, collator=default_data_collator
    ).train()
    assert torch.equal(watch.history.experts[0].long(), expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was watched to its end, and what watched it."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, watch = fluctuation_run(folder)
    trainer.train()
    return folder, watch


def test_report_is_written_as_json_and_as_a_picture(whole, tmp_path, monkeypatch):
    folder, watch = whole
    summary = json.loads((folder / "routing_fluctuation.json").read_text())
    assert summary == watch.history.summary()
    assert summary["largest_change_in_stage2"] == 0
    image = pytest.importorskip("matplotlib.image")
    monkeypatch.setattr(fluctuation, "plot_fluctuation", plot_fluctuation)
    watch.history.write_report(tmp_path)
    pixels = image.imread(tmp_path / "routing_fluctuation.png")
    assert pixels.shape == (600, 1500, 4)
    assert pixels.std() > 0.01
    assert {path.name for path in tmp_path.iterdir()} == {"routing_fluctuation.json", "routing_fluctuation.png"}


def test_watching_fluctuation_leaves_weights_mode_and_random_numbers_as_they_are(tmp_path):
    modes = []

    class Modes(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            modes.append(all(module.training for module in model.modules()))

    plain = make_trainer(tmp_path / "a", StageTransitionCallback(8), model=tiny_model(dropout=0.2))
    watch = RoutingFluctuationCallback(BLOCKS, check_steps=1, num_tokens=100)
    watched = make_trainer(
        tmp_path / "b", StageTransitionCallback(8), watch, Modes(), model=tiny_model(dropout=0.2), logging_steps=1
    )
    states = []
    for trainer in (plain, watched):
        torch.manual_seed(5)
        trainer.train()
        states.append(torch.get_rng_state())
    assert_same_weights(weights(watched.model), weights(plain.model))
    assert torch.equal(*states)
    assert modes == [True] * 12
    assert watch.history.steps == list(range(13))


def test_a_new_run_in_an_old_folder_without_a_transition_checks_the_last_step(tmp_path, whole):
    folder = shutil.copytree(whole[0], tmp_path / "old")
    watch = RoutingFluctuationCallback(BLOCKS, check_steps=5, num_tokens=64)
    make_trainer(folder, watch).train()
    assert watch.history.steps == [0, 5, 10, 12]
    assert json.loads((folder / "routing_fluctuation.json").read_text())["largest_change_in_stage2"] is None


@pytest.mark.parametrize(("name", "value"), [("check_steps", 0), ("num_tokens", True), ("batch_size", 1.5)])
def test_numbers_of_the_fluctuation_callback_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 1"):
        RoutingFluctuationCallback(BLOCKS, **{name: value})


def test_data_set_that_cannot_be_watched_is_refused():
    with pytest.raises(ValueError, match="holds no tokens"):
        RoutingFluctuationCallback([])
    with pytest.raises(ValueError, match="holds no tokens"):
        RoutingFluctuationCallback([{"input_ids": []}])
    with pytest.raises(ValueError, match=r"need a column `input_ids`; there are \['text'\]"):
        RoutingFluctuationCallback([{"text": "a"}])


def test_a_history_of_other_tokens_is_refused_on_resuming(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tmp_path, RoutingFluctuationCallback(BLOCKS, check_steps=2, num_tokens=32), **saving).train()
    resumed = make_trainer(tmp_path, RoutingFluctuationCallback(BLOCKS, check_steps=2, num_tokens=64), **saving)
    with pytest.raises(ValueError, match="of other tokens than this run's.*delete the file"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
