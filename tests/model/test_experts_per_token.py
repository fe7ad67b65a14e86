"""Several experts per token: choice, losses, capacity, tables and checkpoints."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers.backbones import backed_model
from helpers.models import padded, random_ids, switch_checkpointing, tiny_config, tiny_model, tiny_seq2seq_model
from modeling_stablemoe import StableMoEForCausalLM, register_router
from modeling_stablemoe.measure.flops import forward_flops
from modeling_stablemoe.model.configuration_stablemoe import ROUTER_TYPES
from modeling_stablemoe.model.distillation_stablemoe import CountRouter, WordEmbeddingRouter
from modeling_stablemoe.model.experts_stablemoe import drop_overflow
from modeling_stablemoe.model.frozen_stablemoe import FrozenRouter, random_table, repeated_experts
from modeling_stablemoe.model.health_stablemoe import share_in_common
from modeling_stablemoe.model.losses_stablemoe import (
    balance_loss,
    count_expert_load,
    distillation_loss,
    switch_balance_loss,
)
from modeling_stablemoe.model.routing_stablemoe import ROUTERS, LearnedRouter, Routing
from modeling_stablemoe.model.tensors_stablemoe import best_experts


EVERY_ID = torch.arange(99).unsqueeze(0)
IDS = random_ids(4, 9)
KINDS = {
    "stable": {},
    "counts": {"distilled_router": "counts"},
    "bigram": {"distilled_router": "bigram"},
    "hash": {"router_type": "hash"},
    "switch": {"router_type": "switch", "distilled_router": "word_embedding"},
    "limited": {"distilled_router": "counts", "max_frozen_load": 1.3},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str, k: int = 2, **overrides) -> StableMoEForCausalLM:
    return tiny_model(num_experts_per_tok=k, **KINDS[kind], **overrides)


def trained(kind: str, **overrides) -> StableMoEForCausalLM:
    """A model that has seen some tokens, in eval mode."""
    model = model_of(kind, **overrides).train()
    for seed in range(3):
        model(random_ids(6, 12, seed=seed), labels=random_ids(6, 12, seed=seed))
    return model.eval()


def frozen(kind: str, **overrides) -> StableMoEForCausalLM:
    model = trained(kind, **overrides)
    if model.routing_stage == 1:
        model.freeze_router()
    return model


def are_different(experts: torch.Tensor) -> bool:
    return all(len(set(row)) == len(row) for row in experts.flatten(0, -2).tolist())


# The choice


@given(rows=st.integers(1, 9), experts=st.integers(1, 7), levels=st.integers(1, 9), data=st.data())
@settings(deadline=None)
def test_the_best_experts_are_the_first_of_a_stable_sort_and_all_different(rows, experts, levels, data):
    k = data.draw(st.integers(1, experts))
    scores = torch.tensor(
        data.draw(st.lists(st.integers(-levels, levels), min_size=rows * experts, max_size=rows * experts))
    )
    scores = scores.view(rows, experts).float()
    before = scores.clone()
    expected = [sorted(range(experts), key=lambda i: (-row[i], i))[:k] for row in scores.tolist()]
    assert best_experts(scores, k).view(rows, k).tolist() == expected
    assert torch.equal(scores, before)


@given(seed=st.integers(0, 999), k=st.integers(1, 5), count=st.booleans())
@settings(deadline=None, max_examples=30)
def test_rows_of_a_table_are_the_best_of_scores_or_counts_and_ties_go_to_the_lowest_index(seed, k, count):
    torch.manual_seed(seed)
    config = tiny_config(num_experts_per_tok=k, distilled_router="counts" if count else "word_embedding")
    router = (CountRouter if count else WordEmbeddingRouter)(config)
    with torch.no_grad():
        router.embedding.copy_(torch.randint(-2, 3, router.embedding.shape))
        router.centroids.copy_(torch.randint(-1, 2, router.centroids.shape))
    scores = router.embedding @ router.centroids.T
    if count:
        ids = torch.randint(99, (60,))
        experts = torch.rand(60, 5).topk(k).indices
        mask = torch.rand(60) > 0.2
        router.observe(ids, experts, mask)
        counts = torch.zeros(99, 5)
        for token_id, chosen, real in zip(ids.tolist(), experts.tolist(), mask.tolist(), strict=True):
            for expert in chosen:
                counts[token_id, expert] += real
        assert torch.equal(router.counts(), counts)
        scores = torch.where(counts.sum(-1, keepdim=True) > 0, counts, scores)
        logits = (router.embedding @ router.centroids.T)[ids]
        assert torch.equal(router.choose(ids, logits), router.table()[ids])
    expected = [sorted(range(5), key=lambda i: (-row[i], i))[:k] for row in scores.tolist()]
    assert router.table().view(99, k).tolist() == expected


def test_counts_fade_by_tokens_however_many_experts_a_token_has():
    router = CountRouter(tiny_config(num_experts_per_tok=2, distilled_router="counts", counts_half_life=10))
    router.observe(torch.full((10,), 3), torch.tensor([[0, 1]]).expand(10, 2), None)
    router.observe(torch.full((10,), 3), torch.tensor([[1, 2]]).expand(10, 2), None)
    assert router.counts()[3].tolist() == [5.0, 15.0, 10.0, 0.0, 0.0]


@every_kind
def test_every_token_has_different_experts_and_counts_for_each_in_the_loads(kind):
    model = model_of(kind, k=3, moe_layer_positions=[0, 2]).train()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    outputs = model(IDS, attention_mask=mask, labels=IDS, output_router_logits=True)
    assert outputs.expert_load.sum(-1).tolist() == [3 * int(mask.sum())] * 2
    for experts, load in zip(outputs.expert_indices, outputs.expert_load, strict=True):
        assert experts.shape == (4, 9, 3)
        assert are_different(experts)
        assert torch.equal(experts[mask.bool()].flatten().bincount(minlength=5), load)


@pytest.mark.parametrize("k", [2, 5])
def test_a_token_gets_the_sum_of_what_each_of_its_experts_alone_would_add(k):
    layer = frozen("stable", k=k).model.moe_layers[0]
    hidden = torch.randn(4, 9, 32)
    experts = layer.look_up((IDS,))
    single = tiny_model().model.moe_layers[0]
    single.load_state_dict(
        {name: v for name, v in layer.state_dict().items() if "routing_table" not in name}, strict=False
    )
    added = torch.zeros_like(hidden)
    for place in range(k):
        single.frozen_router.freeze(layer.frozen_router.routing_table[:, place])
        added += single.eval()(hidden, IDS) - hidden
    assert experts.shape == (36, k)
    assert_close(layer(hidden, IDS) - hidden, added, rtol=1e-4, atol=1e-5)


# Losses and health


def test_gates_that_are_all_shut_stay_numbers_where_they_are_divided_by_their_sum():
    model = tiny_model(num_experts_per_tok=2, norm_topk_prob=True)
    layer = model.model.moe_layers[0]
    hidden = torch.ones(1, 4, 32)
    with torch.no_grad():
        layer.router.centroids.fill_(-100.0)
    weights = Routing(*layer.router(hidden, torch.tensor([[3, 4, 5, 6]]))[-1]).routing_weights
    assert torch.equal(weights, torch.zeros(4, 2))


def test_experts_of_half_the_width_cost_half_and_two_of_them_what_one_does():
    one, two = (
        tiny_model(intermediate_size=32),
        tiny_model(num_experts_per_tok=2, intermediate_size=32, moe_intermediate_size=16),
    )
    assert forward_flops(one, 8) == forward_flops(two, 8)
    assert two.model.moe_layers[0].expert_stack.sublayers[0].up_proj.shape == (5, 16, 32)
    assert two.model.layers[0].mlp.up_proj.weight.shape == (32, 32)


def test_as_many_experts_as_there_are_make_every_load_even_and_the_balance_loss_zero():
    logits = torch.randn(7, 4).requires_grad_()
    index = torch.argsort(logits.detach())
    loss = balance_loss(router_logits=logits, expert_index=index)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@given(seed=st.integers(0, 999), num_tokens=st.integers(1, 12), experts=st.integers(2, 6), data=st.data())
@settings(deadline=None, max_examples=50)
def test_losses_stay_within_their_bounds(seed, num_tokens, experts, data):
    k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, experts, generator=generator) * 3
    index = torch.rand(num_tokens, experts, generator=generator).topk(k).indices
    assert -k < balance_loss(router_logits=logits, expert_index=index) <= experts - k + 1e-5
    assert 0 <= switch_balance_loss(router_logits=logits, expert_index=index) <= experts / k + 1e-5
    distilled = distillation_loss(distilled_logits=logits, teacher_index=index)
    assert distilled >= -1e-5
    even = torch.zeros(num_tokens, experts)
    centered = balance_loss(router_logits=even, expert_index=index, centered=True)
    assert_close(centered, torch.zeros(()), rtol=0, atol=1e-5)
    load = count_expert_load(expert_index=index, mask=None, num_experts=experts)
    assert int(load.sum()) == k * num_tokens


def test_one_expert_per_token_in_a_matrix_is_one_in_a_list():
    logits, index = torch.randn(9, 5), torch.randint(5, (9,))
    mask = torch.arange(9) > 1
    for function in (balance_loss, switch_balance_loss):
        values = [function(router_logits=logits, expert_index=i, mask=mask) for i in (index, index.unsqueeze(-1))]
        assert torch.equal(*values)
    values = [distillation_loss(distilled_logits=logits, teacher_index=i) for i in (index, index.unsqueeze(-1))]
    assert torch.equal(*values)


def test_distillation_is_least_where_each_of_the_experts_has_its_share():
    logits = torch.zeros(1, 4).requires_grad_()
    index = torch.tensor([[0, 2], [0, 2], [0, 1]])
    optimizer = torch.optim.SGD([logits], lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        distillation_loss(distilled_logits=logits.expand(3, 4), teacher_index=index).backward()
        optimizer.step()
    assert_close(logits.softmax(-1)[0, :3], torch.tensor([3.0, 1.0, 2.0]) / 6, rtol=0, atol=0.01)


def test_agreement_is_the_share_of_experts_in_common_in_any_order():
    first, second = torch.tensor([[0, 1, 2], [3, 4, 0], [1, 2, 3]]), torch.tensor([[2, 1, 0], [0, 1, 2], [0, 4, 0]])
    assert_close(share_in_common(first, second), torch.tensor([1.0, 1 / 3, 0.0]))
    model = model_of("stable").train()
    outputs = model(IDS, labels=IDS, output_router_logits=True)
    teacher = [set(row) for row in outputs.expert_indices[0].flatten(0, 1).tolist()]
    distilled = [set(row) for row in model.route(IDS)[0].flatten(0, 1).tolist()]
    expected = sum(len(a & b) for a, b in zip(teacher, distilled, strict=True)) / (2 * len(teacher))
    assert float(outputs.distillation_agreement) == pytest.approx(expected)
    assert 0 < expected < 1


def test_running_statistics_count_pairs_and_a_window_holds_tokens():
    model = model_of("stable", balance_window_tokens=36, expert_bias_rate=0.25).train()
    outputs = model(IDS, labels=IDS)
    memory = model.model.moe_layers[0].router.memory()
    load = outputs.expert_load[0].float()
    assert torch.equal(memory["recent_load"], load)
    assert_close(memory["expert_bias"], 0.25 * torch.sign(load.mean() - load))
    assert int(memory["tokens"]) == 36
    model(IDS, labels=IDS)  # as many tokens as the window: nothing of the first pass is left
    assert model.model.moe_layers[0].router.memory()["recent_load"].sum() == 72


# Capacity


@given(num_tokens=st.integers(0, 15), factor=st.floats(0.2, 3), data=st.data())
@settings(deadline=None, max_examples=50)
def test_an_expert_keeps_its_first_tokens_up_to_its_share_of_all_pairs(num_tokens, factor, data):
    rows = data.draw(st.lists(st.permutations(range(4)), min_size=num_tokens, max_size=num_tokens))
    index = torch.tensor([row[:2] for row in rows], dtype=torch.long).view(-1, 2)
    kept = drop_overflow(index.flatten(), num_experts=4, capacity_factor=factor).view_as(index)
    capacity, taken, expected = max(1, int(factor * 2 * num_tokens / 4)), [0] * 4, []
    for row in index.tolist():
        expected.append([expert if taken[expert] < capacity else 4 for expert in row])
        for expert in row:
            taken[expert] += 1
    assert kept.tolist() == expected


def test_what_is_over_capacity_is_left_out_and_the_token_keeps_its_other_expert():
    layer = model_of("hash", expert_capacity_factor=1.0).model.moe_layers[0].train()
    table = torch.tensor([[0, 1 + v % 4] for v in range(99)])
    layer.frozen_router.freeze(table)
    hidden, ids = torch.randn(1, 10, 32), torch.arange(10).unsqueeze(0)
    dropping = layer(hidden, ids) - hidden
    alone = layer.eval()(hidden, ids) - hidden
    assert_close(dropping[:, :4], alone[:, :4], rtol=1e-4, atol=1e-5)  # 1.0 * 2 * 10 / 5 tokens of expert 0
    others = tiny_model(router_type="hash").model.moe_layers[0].eval()
    others.expert_stack.load_state_dict(layer.expert_stack.state_dict())
    others.frozen_router.freeze(table[:, 1])
    assert_close(dropping[:, 4:], (others(hidden, ids) - hidden)[:, 4:] / 2, rtol=1e-4, atol=1e-5)


# Frozen


@every_kind
@torch.no_grad()
def test_freezing_keeps_the_experts_that_evaluation_used_unless_it_balances(kind):
    model = trained(kind)
    routes, logits = model.route(IDS), model(IDS).logits
    if kind != "hash":
        model.freeze_router()
    assert model.routing_stage == 2
    assert are_different(model.route(EVERY_ID))
    assert model.route(IDS).shape == (1, 4, 9, 2)
    if kind != "limited":
        assert torch.equal(model.route(IDS), routes)
        assert_close(model(IDS).logits, logits, rtol=0, atol=0)
    outputs = model(IDS, output_router_logits=True)
    assert torch.equal(outputs.expert_indices[0], model.route(IDS)[0])


def test_a_limit_holds_the_load_of_all_experts_of_a_token():
    model = trained("counts", max_frozen_load=1.05)
    (balanced,) = model.freeze_router()
    counts = model.model.moe_layers[0].router.memory()["token_counts"].clamp(min=1)
    table = model.model.moe_layers[0].frozen_router.values()
    load = torch.zeros(5, dtype=torch.long).index_add(0, table.flatten().long(), counts.repeat_interleave(2))
    assert load.sum() == 2 * counts.sum()
    assert load.max() <= 1.05 * 2 * counts.sum() / 5 + 1e-6
    assert_close(balanced.load, load.double())
    assert balanced.agreement <= balanced.best_agreement <= load.sum()


@every_kind
@torch.no_grad()
def test_a_frozen_checkpoint_loads_as_it_was_saved(kind, tmp_path):
    model = frozen(kind)
    model.save_pretrained(tmp_path)
    loaded = StableMoEForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.config.num_experts_per_tok, loaded.routing_stage) == (2, 2)
    assert loaded.router_fingerprint() == model.router_fingerprint() == loaded.config.router_fingerprint
    assert torch.equal(loaded.route(EVERY_ID), model.route(EVERY_ID))
    assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_fingerprint_tells_apart_numbers_of_experts_per_token_and_other_experts():
    model = frozen("stable")
    tables = model.route(EVERY_ID).squeeze(1)
    fingerprints = {model.router_fingerprint(), frozen("bigram").router_fingerprint()}
    fingerprints |= {frozen(kind, k=k).router_fingerprint() for kind in ("stable", "bigram") for k in (1, 3)}
    changed = tables.clone()
    changed[0, 7, 0] = next(expert for expert in range(5) if expert not in tables[0, 7])
    model.set_routing_tables(changed)
    assert len(fingerprints | {model.router_fingerprint()}) == 7
    # sha256 of "stablemoe-routing-1|5 experts, 99 tokens, 2 per token|" and the rows as little-endian int32
    model.set_routing_tables(torch.stack([torch.arange(99) % 5, (torch.arange(99) + 2) % 5], dim=-1).unsqueeze(0))
    assert model.router_fingerprint() == "04bbf3f4f3fccdcdf6c7165a30a928be6dc9912c0ff8dae09da956b823cd937e"


TABLE = "model.moe_layers.0.frozen_router.routing_table"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([2, 2], "token id 3 is sent to expert 2 twice, but a frozen table sends every id to 2 different experts"),
        ([2, -1], "token id 3 has no expert"),
        ([5, 0], "token id 3 is sent to expert 5, but"),
    ],
)
def test_a_damaged_table_is_refused_by_name_however_it_comes(row, message, tmp_path):
    model = frozen("stable")
    weights = copy.deepcopy(model.state_dict())
    weights[TABLE][3] = torch.tensor(row)
    with pytest.raises(ValueError, match=rf"`{re.escape(TABLE)}` is damaged: {message}"):
        model.load_state_dict(weights)
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=rf"`{re.escape(TABLE)}` is damaged: {message}"):
        StableMoEForCausalLM.from_pretrained(tmp_path)
    model.model.moe_layers[0].frozen_router.routing_table[3] = torch.tensor(row)
    with pytest.raises(ValueError, match=f"damaged: {message}"):
        model(IDS)


def test_tables_of_one_s_own_are_set_as_route_gives_them_or_refused():
    model = frozen("stable", moe_layer_positions=[0, 2])
    before, tables = model.router_fingerprint(), model.route(EVERY_ID).squeeze(1)
    assert tables.shape == (2, 99, 2)
    model.set_routing_tables(tables)
    assert model.router_fingerprint() == before
    with pytest.raises(
        ValueError, match=r"of shape \(2, 99, 2\), moe layers x vocabulary x experts per token, got \(2, 99\)"
    ):
        model.set_routing_tables(tables[..., 0])
    tables[1, 4] = 3
    with pytest.raises(
        ValueError, match="2 different experts: those of MoE layer 1 send token id 4 to expert 3 twice"
    ):
        model.set_routing_tables(tables)
    assert model.router_fingerprint() == before


def test_another_number_of_experts_per_token_than_that_of_the_weights_is_refused(tmp_path):
    frozen("stable").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"routing_table is \[99, 2\] in the weights, \[99, 3\] by the config"):
        StableMoEForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=3)


@given(
    num_experts=st.integers(1, 9),
    old=st.integers(1, 20),
    new=st.integers(1, 60),
    data=st.data(),
    learning=st.booleans(),
)
@settings(deadline=None)
def test_new_ids_get_different_experts_and_even_loads(num_experts, old, new, data, learning):
    k = data.draw(st.integers(1, num_experts))
    router = FrozenRouter(tiny_config(vocab_size=old, num_experts=num_experts, num_experts_per_tok=k, pad_token_id=0))
    if not learning:
        router.freeze(random_table(old, num_experts, k))
    before = router.values()
    router.resize(new)
    after = router.values()
    assert after.shape == (new, *before.shape[1:])
    assert torch.equal(after[:old], before[:new])
    if learning:
        assert (after == -1).all()
        return
    added = after[old:].view(-1, k)
    assert not repeated_experts(added).any()
    load = added.flatten().bincount(minlength=num_experts)
    assert load.max() - load.min() <= k
    if k == 1:
        assert added.flatten().tolist() == [v % num_experts for v in range(old, new)]


@every_kind
def test_a_resized_model_routes_old_ids_as_before_and_new_ones_to_different_experts(kind, tmp_path):
    model = frozen(kind)
    before = model.route(EVERY_ID)
    model.resize_token_embeddings(120, mean_resizing=False)
    every_id = torch.arange(120).unsqueeze(0)
    assert torch.equal(model.route(every_id)[:, :, :99], before)
    assert are_different(model.route(every_id))
    model.save_pretrained(tmp_path)
    assert torch.equal(StableMoEForCausalLM.from_pretrained(tmp_path).route(every_id), model.route(every_id))


@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=6))
@settings(deadline=None)
def test_an_expert_counts_as_repeated_from_its_second_place_on(rows):
    expected = [[expert in row[:place] for place, expert in enumerate(row)] for row in rows]
    assert repeated_experts(torch.tensor(rows)).tolist() == expected


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_new_hash_is_random_and_its_experts_are_different_and_equally_likely(k):
    torch.manual_seed(0)
    table = FrozenRouter(tiny_config(vocab_size=4000, router_type="hash", num_experts_per_tok=k)).initial_table()
    assert are_different(table.view(4000, k))
    share = table.flatten().bincount(minlength=5) / (4000 * k)
    assert_close(share.double(), torch.full((5,), 0.2, dtype=torch.double), rtol=0, atol=0.02)


# Whole models


def build(family: str) -> torch.nn.Module:
    options = {"num_experts_per_tok": 2}
    if family == "translation":
        return tiny_seq2seq_model(**options)
    return backed_model(family, **options) if "llama" in family else tiny_model(moe_layer_positions=[0, 2], **options)


families = pytest.mark.parametrize("family", ["causal", "llama", "llama/stack", "translation"])


@families
@pytest.mark.parametrize("stage", [1, 2])
@torch.no_grad()
def test_decoding_with_a_cache_and_left_padding_equals_each_row_alone(family, stage):
    model = build(family).eval()
    if stage == 2:
        model.freeze_router()
    rows = [random_ids(1, length, seed=length, low=4, high=60)[0] for length in (3, 7)]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    pad = model.config.pad_token_id
    side = "right" if family == "translation" else "left"
    ids, mask = padded(rows, pad, side), padded([torch.ones_like(row) for row in rows], 0, side)
    together = model.generate(ids, attention_mask=mask, **options)
    for row, generated in zip(rows, together, strict=True):
        for use_cache in (True, False):
            alone = model.generate(row.unsqueeze(0), use_cache=use_cache, **options)[0]
            assert torch.equal(generated[-6:], alone[-6:])


@families
@pytest.mark.parametrize("stage", [1, 2])
def test_backends_and_checkpointing_give_the_same_loss_and_gradients(family, stage):
    results = []
    for backend, checkpointing in (
        ("eager", False),
        ("grouped_mm", False),
        ("batched_mm", False),
        ("grouped_mm", True),
    ):
        model = build(family)
        if stage == 2:
            model.freeze_router()
        model.set_experts_implementation(backend)
        if checkpointing:
            switch_checkpointing(model)
        ids = random_ids(3, 8, low=4, high=60)
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    for loss, gradients in results[1:]:
        assert_close(loss, results[0][0])
        assert gradients.keys() == results[0][1].keys()
        for name, gradient in gradients.items():
            assert_close(gradient, results[0][1][name], rtol=1e-3, atol=1e-5, msg=name)
    missing = {name for name, _ in model.named_parameters()} - results[0][1].keys()
    assert all("distilled_router" in name for name in missing)
    assert bool(missing) == (stage == 2)


def test_experts_that_are_shared_in_stage_1_stay_equal_while_they_learn():
    model = StableMoEForCausalLM(tiny_config(num_experts_per_tok=2, share_experts_in_stage1=True)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        ids = random_ids(4, 9, seed=seed)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stack = model.model.moe_layers[0].expert_stack
    for name, parameter in stack.named_parameters():
        assert_close(parameter, parameter[:1].expand_as(parameter), rtol=0, atol=1e-6, msg=name)
    assert stack.sublayers[0].down_proj.abs().max() > 0
    shared = model.eval()(IDS).logits
    model.freeze_router()
    assert_close(model(IDS).logits, shared, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
def test_a_compiled_model_computes_the_same(stage, backend):
    model = model_of("stable").eval()
    if stage == 2:
        model.freeze_router()
    model.set_experts_implementation(backend)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for batch in (IDS, random_ids(2, 5, seed=3)):
            assert_close(compiled(batch, use_cache=False).logits, model(batch).logits, rtol=1e-4, atol=1e-5)


# Routers of one's own


@pytest.fixture
def lists():
    """A router whose assignment is what the test says."""

    @register_router("lists")
    class ListRouter(LearnedRouter):
        columns = 2

        def assignment(self, router_logits, token_mask):
            best = router_logits.argsort(-1)[:, : self.columns]  # the lowest scores
            return best.squeeze(-1)

    yield ListRouter
    del ROUTERS["lists"], ROUTER_TYPES["lists"]


def test_a_router_of_one_s_own_gives_as_many_experts_as_the_config_says(lists):
    model = tiny_model(router_type="lists", num_experts_per_tok=2).train()
    outputs = model(IDS, labels=IDS, output_router_logits=True)
    lowest = outputs.router_logits[0].argsort(-1)[:, :2].view(4, 9, 2)
    assert torch.equal(outputs.expert_indices[0], lowest)
    for columns in (1, 3):
        lists.columns = columns
        with pytest.raises(ValueError, match=rf"`assignment` of ListRouter gives {columns} expert\(s\) per token"):
            model(IDS, labels=IDS)
    lists.columns = 1
    assert tiny_model(router_type="lists").train()(IDS, output_router_logits=True).expert_indices[0].shape == (4, 9)


# Config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 0}, r"^`num_experts_per_tok` must be a positive integer below 2\*\*63, got 0\.$"),
        (
            {"num_experts_per_tok": 6},
            r"`num_experts_per_tok` \(6\) is more than there are experts: lower it to `num_experts` \(5\)",
        ),
        (
            {"num_experts_per_tok": 2, "router_type": "base"},
            r"`num_experts_per_tok` \(2\) must be 1 with `router_type` 'base'",
        ),
        ({"norm_topk_prob": True}, "it takes `num_experts_per_tok` > 1 and a router with scores"),
        (
            {"norm_topk_prob": True, "num_experts_per_tok": 2, "router_type": "hash"},
            "it takes `num_experts_per_tok` > 1 and a router with scores",
        ),
    ],
)
def test_a_number_of_experts_per_token_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_one_expert_per_token_has_the_shapes_of_the_paper(tmp_path):
    model = frozen("stable", k=1)
    assert model.config.num_experts_per_tok == 1
    assert model.model.moe_layers[0].frozen_router.routing_table.shape == (99,)
    assert model.route(IDS).shape == (1, 4, 9)
    assert model(IDS, output_router_logits=True).expert_indices[0].shape == (4, 9)
