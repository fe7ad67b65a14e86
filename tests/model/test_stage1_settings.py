"""The settings of stage 1 that the paper does not have: what each does, and that off means the paper's form."""

import pytest
import torch
from torch.testing import assert_close

from helpers.models import Decision, random_ids, tiny_config, tiny_model, tiny_seq2seq_model
from helpers.trainers import assert_same_weights, make_trainer, weights
from modeling_stablemoe import StableMoEForCausalLM, StageTransitionCallback
from modeling_stablemoe.model.losses_stablemoe import balance_loss
from modeling_stablemoe.model.running_stablemoe import VARIANCE_EPSILON


pytestmark = pytest.mark.pairs


EVERY_ID = torch.arange(99).unsqueeze(0)
EVERYTHING = {
    "balance_gradient": "centroids",
    "balance_loss_warmup_tokens": 64,
    "balance_window_tokens": 50,
    "center_balance_loss": True,
    "router_normalization": "standardize",
    "expert_bias_rate": 0.01,
    "distilled_router": "counts",
    "share_experts_in_stage1": True,
    "reset_gates_at_freeze": True,
    "max_frozen_load": 1.2,
    "frozen_load_bands": 3,
}


def steps(model, number: int, learning_rate: float = 1e-2, mask=None, first: int = 0):
    """Train a few steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], learning_rate)
    model.train()
    for step in range(first, first + number):
        ids = random_ids(seed=step)
        model(ids, labels=ids, attention_mask=mask).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def traced(model) -> list:
    """Record what the routers of a model return while it trains."""
    decisions = []
    for layer in model.moe_layers_by_name.values():
        layer.router.register_forward_hook(lambda router, args, decision: decisions.append(Decision.of(decision)))
    return decisions


def layer_of(model):
    return next(iter(model.moe_layers_by_name.values()))


# Off


def test_the_paper_s_form_keeps_nothing_more():
    names = tiny_model().state_dict()
    assert not [name for name in names if "memory" in name or "counts" in name]


# They change nothing: a limit that no table exceeds, a bias that is lost in rounding, a mean that is never asked for.
NEUTRAL = {"max_frozen_load": 5.0, "frozen_load_bands": 1, "expert_bias_rate": 1e-30, "router_half_life": 3}


@pytest.mark.parametrize("settings", [{"max_frozen_load": 5.0}, NEUTRAL], ids=["a limit", "all"])
def test_settings_that_cannot_bind_leave_every_bit_as_it_was(settings):
    plain, other = steps(tiny_model(), 4), steps(tiny_model(**settings), 4)
    for model in (plain, other):
        model.freeze_router()
        steps(model, 2, first=4)
    extra = weights(other)
    assert_same_weights({name: extra[name] for name in plain.state_dict()}, weights(plain))


# The balance loss


def gradients_of_balance(**settings):
    model, ids = tiny_model(**settings).train(), random_ids()
    model(ids).balance_loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_balance_gradient_reaches_the_centroids_alone_if_asked():
    everywhere, centroids = gradients_of_balance(), gradients_of_balance(balance_gradient="centroids")
    assert list(centroids) == ["model.moe_layers.0.router.centroids"]
    assert_close(centroids["model.moe_layers.0.router.centroids"], everywhere["model.moe_layers.0.router.centroids"])
    assert "model.embed_tokens.weight" in everywhere


def test_the_balance_loss_warms_up_with_the_tokens_of_stage_1():
    model, plain = tiny_model(balance_loss_warmup_tokens=42), tiny_model()
    for share in (0.0, 0.5, 1.0, 1.0):  # a batch holds 21 tokens
        ids = random_ids()
        output, whole = model.train()(ids), plain.train()(ids)
        expected = share * 0.3 * whole.balance_loss + whole.distillation_loss
        assert_close(output.aux_loss, expected)
        assert_close(output.balance_loss, whole.balance_loss)  # what is logged is not weighed


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("window", [50, 10])
def test_the_balance_loss_counts_over_a_window(centered, window):
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[:, 5:] = 0  # 15 tokens a pass
    real = mask.flatten().bool()
    model = tiny_model(balance_window_tokens=window, center_balance_loss=centered).train()
    load = torch.zeros(5, dtype=torch.double)
    for step in range(4):
        ids = random_ids(seed=step)
        output = model(ids, labels=ids, attention_mask=mask, output_router_logits=True)
        index = output.expert_indices[0].flatten()
        load = load * max(0.0, 1 - 15 / window) + torch.bincount(index[real], minlength=5)
        scores = {"router_logits": output.router_logits[0], "expert_index": index}
        assert_close(output.balance_loss, balance_loss(**scores, mask=real, expert_load=load, centered=centered))
    memory = layer_of(model).router.memory
    assert_close(memory()["recent_load"].double(), load, rtol=1e-6, atol=1e-6)
    kept = memory.recent_load.clone()
    model.eval()(random_ids(), attention_mask=mask)
    assert torch.equal(memory.recent_load, kept)


# Normalised features


def test_the_first_batch_is_averaged_and_later_ones_count_by_their_half_life():
    model = tiny_model(router_normalization="standardize", router_half_life=30)
    decisions = traced(model)
    steps(model, 3)
    mean, square, seen = torch.zeros(32).double(), torch.zeros(32).double(), 0
    for decision in decisions:
        hidden = decision.trace.hidden_states.double()
        share = max(1 - 0.5 ** (21 / 30), 21 / (21 + seen))
        mean = (1 - share) * mean + share * hidden.mean(0)
        square = (1 - share) * square + share * hidden.square().mean(0)
        seen += 21
    kept = layer_of(model).router.memory()
    assert_close(kept["feature_mean"].double(), mean, rtol=1e-5, atol=1e-6)
    assert_close(kept["feature_variance"].double(), square - mean.square(), rtol=1e-4, atol=1e-5)
    assert int(kept["tokens"]) == 63


@pytest.mark.parametrize("normalization", ["center", "standardize"])
def test_experts_are_chosen_by_normalised_states_and_weighed_by_raw_ones(normalization):
    model = steps(tiny_model(router_normalization=normalization), 2)
    router, hidden, ids = layer_of(model).router, torch.randn(1, 6, 32) + 3, random_ids(1, 6)
    decision = Decision.of(router(hidden, ids))
    kept = router.memory()
    features = hidden[0] - kept["feature_mean"]
    if normalization == "standardize":
        features = features / (kept["feature_variance"] + VARIANCE_EPSILON).sqrt()
    assert torch.equal(decision.expert_index[0], (features @ router.centroids.T).argmax(-1))
    raw = (hidden[0] @ router.centroids.T).gather(-1, decision.expert_index[0].unsqueeze(-1)).squeeze(-1)
    assert_close(decision.gate[0], torch.sigmoid(raw))
    assert_close(decision.router_logits, features @ router.centroids.T, rtol=1e-5, atol=1e-5)


def test_statistics_are_saved_to_the_bit_and_survive_a_cast(tmp_path):
    model = steps(tiny_model(router_type="switch", router_normalization="standardize", expert_bias_rate=0.05), 3)
    model.save_pretrained(tmp_path)
    half = StableMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).to(torch.float16)
    for name, values in layer_of(half).router.memory().items():
        assert torch.equal(values, layer_of(model).router.memory()[name]), name


# The bias of experts


def test_the_bias_rises_where_an_expert_has_too_few_tokens_and_leaves_the_gate_alone():
    model = tiny_model(expert_bias_rate=0.25)
    decisions, expected = traced(model), torch.zeros(5)
    for step in range(4):
        steps(model, 1, learning_rate=0.0, first=step)
        decision = decisions[-1]
        assert torch.equal(decision.expert_index.flatten(), (decision.router_logits + expected).argmax(-1))
        chosen = decision.router_logits.gather(-1, decision.expert_index.view(-1, 1)).view(3, 7)
        assert_close(decision.gate, torch.sigmoid(chosen))
        load = torch.bincount(decision.expert_index.flatten(), minlength=5).double()
        expected = expected + 0.25 * torch.sign(load.mean() - load).float()
        assert_close(layer_of(model).router.memory()["expert_bias"], expected)


# Counts


def recount(decisions, half_life: int | None = None) -> torch.Tensor:
    counts = torch.zeros(99, 5, dtype=torch.double)
    for decision in decisions:
        if half_life is not None:
            counts *= 0.5 ** (decision.trace.table_rows.numel() / half_life)
        index = (decision.trace.table_rows.flatten(), decision.expert_index.flatten())
        counts.index_put_(index, torch.ones((), dtype=torch.double), accumulate=True)
    return counts


@pytest.mark.parametrize("half_life", [None, 50])
def test_counts_are_a_histogram_of_where_tokens_went(half_life):
    model = tiny_model(distilled_router="counts", counts_half_life=half_life)
    decisions = traced(model)
    steps(model, 5)
    counts = layer_of(model).router.distilled_router.counts()
    assert_close(counts.double(), recount(decisions, half_life), rtol=1e-6, atol=0.0)


def test_counts_are_a_histogram_under_accumulation_too(tmp_path):
    model = tiny_model(distilled_router="counts", moe_layer_positions=[1])
    decisions = traced(model)
    options = {"max_steps": 4, "gradient_accumulation_steps": 3}
    make_trainer(tmp_path, StageTransitionCallback(4), model=model, **options).train()
    counted = recount(decisions)
    assert counted.sum() == 4 * 3 * 2 * 16
    assert torch.equal(layer_of(model).router.distilled_router.counts().double(), counted)
    seen = counted.sum(-1) > 0
    table = layer_of(model).frozen_router.values().long()
    assert torch.equal(table[seen], counted.argmax(-1)[seen])


def test_padding_is_not_counted():
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 2:] = 0
    model = steps(tiny_model(distilled_router="counts"), 1, mask=mask)
    assert layer_of(model).router.distilled_router.counts().sum() == 16


def test_ids_that_were_never_seen_go_where_the_word_embedding_sends_them():
    model = steps(tiny_model(distilled_router="counts"), 2).eval()
    router = layer_of(model).router.distilled_router
    counts = router.counts()
    seen = counts.sum(-1) > 0
    assert 0 < seen.sum() < 99
    expected = torch.where(seen, counts.argmax(-1), router().argmax(-1))
    assert torch.equal(model.route(EVERY_ID)[0, 0], expected)
    evaluated = model(EVERY_ID[:, :60], output_router_logits=True)
    assert torch.equal(evaluated.expert_indices[0][0], expected[:60])
    model.freeze_router()
    assert torch.equal(model.route(EVERY_ID)[0, 0], expected)


def test_agreement_is_of_the_counts_and_no_table_has_more():
    model = tiny_model(distilled_router="counts")
    for _ in range(3):  # the same batch: the counts know it
        output = model.train()(random_ids())
    ids, indices = random_ids().flatten(), model.train()(random_ids(), output_router_logits=True).expert_indices[0]
    best = sum(int(torch.bincount(indices.flatten()[ids == v]).max()) for v in ids.unique())
    assert float(output.distillation_agreement) == pytest.approx(best / 21)


def test_the_vocabulary_can_grow_and_shrink():
    model = steps(tiny_model(**EVERYTHING), 2)
    router = layer_of(model).router
    counts, seen = router.distilled_router.counts().clone(), router.memory.token_counts.clone()
    model.resize_token_embeddings(105)
    assert torch.equal(router.distilled_router.counts()[:99], counts)
    assert not router.distilled_router.counts()[99:].any()
    assert not router.memory.token_counts[99:].any()
    model.resize_token_embeddings(50)
    assert torch.equal(router.memory.token_counts, seen[:50])
    model.freeze_router()
    assert model.route(torch.arange(50).unsqueeze(0)).max() < 5


# Shared experts


def test_experts_are_equal_through_stage_1_and_part_in_stage_2():
    torch.manual_seed(0)
    model = StableMoEForCausalLM(tiny_config(share_experts_in_stage1=True))
    stack = layer_of(model).expert_stack
    steps(model, 4, learning_rate=0.5)
    for name, parameter in stack.named_parameters():
        assert torch.equal(parameter, parameter[:1].expand_as(parameter)), name
    assert stack.sublayers[0].down_proj.abs().sum() > 0
    model.freeze_router()
    steps(model, 4, learning_rate=0.5, first=4)
    assert not torch.equal(stack.sublayers[0].up_proj[0], stack.sublayers[0].up_proj[1])


# Gates that begin stage 2 anew


def test_gates_begin_stage_2_at_one_half_and_learn_from_there():
    model, plain = tiny_model(reset_gates_at_freeze=True), tiny_model()
    for each in (model, plain):
        steps(each, 3)
    router = layer_of(model).router
    assert router.centroids.any()
    for each in (model, plain):
        each.freeze_router()
    assert torch.equal(model.route(EVERY_ID), plain.route(EVERY_ID))
    assert not router.centroids.any()
    decisions = traced(model)
    steps(model, 2, first=3)
    assert (decisions[0].gate == 0.5).all()
    assert not (decisions[1].gate == 0.5).any()
    assert layer_of(plain).router.centroids.any()


# Balanced freezing


@pytest.mark.parametrize("settings", [{}, {"distilled_router": "counts", "frozen_load_bands": 4}], ids=str)
def test_a_balanced_table_keeps_to_the_limit_on_the_tokens_of_stage_1(settings):
    plain = tiny_model(**{k: v for k, v in settings.items() if k != "frozen_load_bands"})
    model = tiny_model(max_frozen_load=1.1, **settings)
    ids = torch.cat([random_ids(3, 7, seed=step) for step in range(6)]).flatten()
    for each in (plain, model):
        steps(each, 6)
    plain.freeze_router()
    (balanced,) = model.freeze_router()
    loads = [torch.bincount(each.route(ids.unsqueeze(0))[0, 0], minlength=5) for each in (plain, model)]
    # Ids that were never seen count as one token each, hence the slack.
    assert loads[1].max() <= 1.1 * (len(ids) + 99) / 5
    assert loads[1].max() < loads[0].max()
    assert balanced.agreement <= balanced.bound <= balanced.best_agreement
    assert torch.equal(balanced.table, model.route(EVERY_ID)[0, 0])
    assert model.config.router_fingerprint == model.router_fingerprint()


def test_an_encoder_and_a_decoder_are_balanced_by_their_own_tokens():
    model = tiny_seq2seq_model(max_frozen_load=1.3, distilled_router="counts")
    source, target = random_ids(4, 9, high=91), random_ids(4, 6, seed=1, high=91)
    for _ in range(3):
        model.train()(input_ids=source, labels=target).loss.backward()
    routers = [layer.router for layer in model.moe_layers_by_name.values()]
    assert [int(router.memory.tokens) for router in routers] == [3 * 36, 3 * 24, 3 * 24]
    assert len(model.freeze_router()) == 3
    assert model.routing_stage == 2


# Everything together


def test_a_run_with_every_setting_resumes_to_the_same_bits(tmp_path):
    def trainer():
        model = tiny_model(dropout=0.1, **EVERYTHING)
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
        return make_trainer(tmp_path, StageTransitionCallback(6, settled_change=0.0), model=model, **saving)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert whole.model.routing_stage == 2
    assert_same_weights(weights(resumed.model), weights(whole.model))


# The configuration


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"balance_gradient": "none"}, "`balance_gradient` 'none' is unknown; choose one of"),
        ({"router_normalization": "batch"}, "`router_normalization` 'batch' is unknown; choose one of"),
        ({"share_experts_in_stage1": 1.5}, "`share_experts_in_stage1` must be True or False"),
        ({"balance_loss_warmup_tokens": -1}, "`balance_loss_warmup_tokens` is a number of tokens"),
        ({"balance_window_tokens": -1}, "`balance_window_tokens` is a number of tokens"),
        ({"balance_window_tokens": 9, "router_type": "base"}, "belongs to a balance loss, which 'base' has not"),
        ({"router_half_life": 0}, "`router_half_life` is a number of tokens"),
        ({"counts_half_life": 10}, 'belongs to `distilled_router="counts"`'),
        ({"distilled_router": "counts", "counts_half_life": 0}, "`counts_half_life` is a number of tokens"),
        ({"expert_bias_rate": -0.1}, "`expert_bias_rate` must be a finite number >= 0"),
        ({"expert_bias_rate": 0.1, "router_type": "base"}, "nothing to balance in BASE"),
        ({"max_frozen_load": 0.9}, "`max_frozen_load` is a multiple of the mean load"),
        ({"max_frozen_load": 1.1, "distilled_router": "bigram"}, "balances a table over the vocabulary"),
        ({"max_frozen_load": 1.1, "router_type": "hash"}, "balances a table over the vocabulary"),
        ({"frozen_load_bands": 4}, "belongs to `max_frozen_load`"),
        ({"frozen_load_bands": 0}, "`frozen_load_bands` must be a positive integer"),
        ({"router_type": "hash", "router_normalization": "center"}, "a hash is fixed from the start"),
        ({"router_type": "hash", "share_experts_in_stage1": True}, "a hash is fixed from the start"),
        ({"router_type": "switch", "share_experts_in_stage1": True}, "'switch' never is without a `distilled_router`"),
        ({"router_type": "hash", "reset_gates_at_freeze": True}, "a hash is fixed from the start"),
        ({"reset_gates_at_freeze": "yes"}, "`reset_gates_at_freeze` must be True or False"),
    ],
)
def test_settings_out_of_range_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny_config(**fields)
