"""Counting routes, tables of them, other vocabularies and experts: against plain loops, and interrupted work that goes on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import tiny_model
from helpers.moe_families import tiny_moe
from modeling_stablemoe.solvers.balancing import balanced_table
from modeling_stablemoe.tables import (
    check_tables,
    count_routes,
    counts_of_tables,
    hash_tables,
    install_tables,
    make_tables,
    making,
    remap_tables,
)
from modeling_stablemoe.tables.installing import routers_of


def some_batches(number: int = 3, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = [{"input_ids": torch.randint(3, 60, (2, 9), generator=generator)} for _ in range(number)]
    batches[-1]["attention_mask"] = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    return batches


def counted_by_loop(model, batches):
    """The counts of every route, one token after the other."""
    num_layers = len(routers_of(model))
    chosen, first = torch.zeros(2, num_layers, 99, 8, dtype=torch.int32)
    tokens = torch.zeros(99, dtype=torch.long)
    for batch in batches:
        seen = []
        handles = [
            router.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
            for router in routers_of(model).values()
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().tolist()
        for place, token in enumerate(batch["input_ids"].flatten().tolist()):
            if not mask[place]:
                continue
            tokens[token] += 1
            for layer, output in enumerate(seen):
                # In transformers 5.15 Granite's router returns its choice first, its logits last.
                weights, index = output[1], next(values for values in output if not values.is_floating_point())
                first[layer, token, index[place, weights[place].argmax()]] += 1
                for expert in index[place]:
                    chosen[layer, token, expert] += 1
    return tokens, chosen, first


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "granitemoe"])
def test_counts_are_those_of_every_real_token(family):
    model, batches = tiny_moe(family), some_batches()
    counts = count_routes(model.train(), batches, with_first=True)
    assert model.training
    tokens, chosen, first = counted_by_loop(model.eval(), batches)
    assert torch.equal(counts.tokens, tokens)
    assert torch.equal(counts.chosen, chosen)
    assert torch.equal(counts.first, first)
    assert counts.k == 2
    assert counts.layers == list(routers_of(model))
    some = count_routes(model, batches, counts.layers[1:])
    assert torch.equal(some.chosen, chosen[1:])
    assert some.first is None


@pytest.mark.parametrize("k", [1, 2])
def test_stablemoe_is_a_teacher_too(k):
    model, batches = tiny_model(num_experts_per_tok=k), some_batches()
    counts = count_routes(model, batches, with_first=True)
    model.eval()
    chosen, first = torch.zeros_like(counts.chosen), torch.zeros_like(counts.first)
    for batch in batches:
        routes = model.route(**batch).view(len(chosen), 18, k).tolist()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().tolist()
        for layer, experts in enumerate(routes):
            for place, token in enumerate(batch["input_ids"].flatten().tolist()):
                first[layer, token, experts[place][0]] += mask[place]
                for expert in experts[place]:
                    chosen[layer, token, expert] += mask[place]
    assert torch.equal(counts.chosen, chosen)
    assert torch.equal(counts.first, first)
    assert counts.k == k
    assert make_tables(counts, 2.0).tables.shape == (len(chosen), 99, k)


def test_interrupted_count_goes_on_where_it_was_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "SAVE_EVERY", 2)
    model, batches = tiny_moe("olmoe"), some_batches(5)

    class Interrupted(list):
        def __getitem__(self, number):
            if number == 3:
                raise KeyboardInterrupt
            return super().__getitem__(number)

    with pytest.raises(KeyboardInterrupt):
        count_routes(model, Interrupted(batches), folder=tmp_path)
    assert not routers_of(model)[0]._forward_hooks
    passes = []
    handle = model.model.register_forward_hook(lambda *args: passes.append(args))
    counts = count_routes(model, batches, folder=tmp_path)
    assert len(passes) == 3  # the last of the kept ones was the second
    count_routes(model, batches, folder=tmp_path)
    assert len(passes) == 3
    handle.remove()
    whole = count_routes(model, batches)
    for name in ("tokens", "chosen", "k", "layers"):
        assert torch.equal(*(torch.as_tensor(getattr(each, name)) for each in (counts, whole)))
    for other in (batches[:2], [*batches[1:], batches[0]]):
        with pytest.raises(ValueError, match="counts of another text"):
            count_routes(model, other, folder=tmp_path)
    with pytest.raises(ValueError, match="counts of another model or other layers"):
        count_routes(model, batches, [1], folder=tmp_path)
    with pytest.raises(ValueError, match="counts of another model or other layers"):
        count_routes(model, batches, folder=tmp_path, with_first=True)


def test_tables_are_the_balanced_ones_and_unseen_ids_are_spread(tmp_path):
    model, batches = tiny_moe("olmoe"), some_batches()
    counts = count_routes(model, batches)
    made = make_tables(counts, 1.2, folder=tmp_path)
    check_tables(made.tables, 99, 8, 2)
    seen = counts.tokens > 0
    for layer in range(3):
        expected = balanced_table(counts.chosen[layer], counts.tokens, 1.2, k=2)
        assert torch.equal(made.tables[layer][seen], expected.table[seen])
        assert made.balanced[layer][1:5] == expected[1:5]
        assert torch.equal(made.balanced[layer].load, expected.load)
    assert made.tables[0, 97].tolist() == [1, 2]
    install_tables(model, made.tables)
    again = make_tables(counts, 1.2, folder=tmp_path)
    assert torch.equal(again.tables, made.tables)
    assert again.balanced[1][1:5] == made.balanced[1][1:5]
    assert make_tables(counts, 1.2, k=3).tables.shape == (3, 99, 3)
    assert make_tables(counts, 1.2, k=1).tables.shape == (3, 99, 1)


def test_kept_table_of_other_counts_is_made_again_and_a_kept_one_is_not(tmp_path, monkeypatch):
    counts = counts_of_tables(hash_tables(torch.arange(99), 2, 8, 2), torch.arange(99), 8)
    made = make_tables(counts, 1.5, folder=tmp_path)
    counts.chosen[1, 50] = torch.arange(8)
    calls = []

    def watched(*args, **kwargs):
        calls.append(args)
        return balanced_table(*args, **kwargs)

    monkeypatch.setattr(making, "balanced_table", watched)
    again = make_tables(counts, 1.5, folder=tmp_path)
    assert len(calls) == 1
    assert torch.equal(again.tables[0], made.tables[0])
    assert again.tables[1, 50].tolist() == [7, 6]


def test_hash_tables_differ_by_layer_and_are_even():
    counts = torch.arange(99)
    tables = hash_tables(counts, 3, 8, 2)
    check_tables(tables, 99, 8, 2)
    assert not torch.equal(tables[0], tables[1])
    for table in tables:
        load = torch.zeros(8).index_add(0, table.flatten(), counts.repeat_interleave(2).float())
        assert load.max() <= load.mean() + 98
    assert hash_tables(counts, 2, 8, 1).shape == (2, 99, 1)


def test_tables_of_tables_stay_where_no_limit_binds():
    tables, counts = hash_tables(torch.arange(1, 100), 2, 8, 2), torch.arange(1, 100)
    made = make_tables(counts_of_tables(tables, counts, 8), 4.0)
    assert torch.equal(made.tables.sort(-1).values, tables.sort(-1).values)
    wider = make_tables(counts_of_tables(tables, counts, 12), 1.05)
    assert wider.balanced[0].load.min() > 0


def filled_by_loop(row: list[int], token: int, num_experts: int) -> list[int]:
    row = list(row)
    for place, expert in enumerate(row):
        if expert == -1:
            row[place] = next(
                (token + step) % num_experts for step in range(num_experts) if (token + step) % num_experts not in row
            )
    return row


@given(
    kept=st.permutations(range(6)),
    num_kept=st.integers(2, 6),
    token_ids=st.lists(st.integers(-1, 19), min_size=1, max_size=30),
    seed=st.integers(0, 9),
)
@settings(max_examples=50, deadline=None)
def test_pruned_experts_and_new_ids_get_the_next_that_are_free(kept, num_kept, token_ids, seed):
    kept = kept[:num_kept]
    tables = torch.rand(2, 20, 6, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :2]
    new = remap_tables(tables, num_kept, kept, token_ids=torch.tensor(token_ids))
    check_tables(new, len(token_ids), num_kept, 2)
    number = {old: position for position, old in enumerate(kept)}
    for layer in range(2):
        for token, old in enumerate(token_ids):
            row = [-1, -1] if old == -1 else [number.get(e, -1) for e in tables[layer, old].tolist()]
            assert new[layer, token].tolist() == filled_by_loop(row, token, num_kept)


def test_resized_vocabulary_keeps_its_ids():
    tables = hash_tables(torch.arange(20), 2, 8, 2)
    larger = remap_tables(tables, 8, vocab_size=30)
    assert torch.equal(larger[:, :20], tables)
    assert larger[0, 25].tolist() == [1, 2]
    assert torch.equal(remap_tables(larger, 8, vocab_size=7), tables[:, :7])
    assert torch.equal(remap_tables(tables, 12), tables)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 3, "kept_experts": [0, 1]}, r"`kept_experts` is \[0, 1\]; pass 3 different old numbers"),
        ({"num_experts": 2, "kept_experts": [1, 1]}, "pass 2 different"),
        ({"num_experts": 1, "kept_experts": [1]}, "`num_experts` is 1, but a token has 2"),
        ({"num_experts": 8, "vocab_size": 3, "token_ids": torch.arange(3)}, "are both given"),
        ({"num_experts": 8, "token_ids": torch.tensor([20])}, "pass ids below 20, or -1"),
        ({"num_experts": 4}, r"pass 2 different ones in \[0, 4\)"),
    ],
)
def test_impossible_changes_are_refused(options, message):
    tables = hash_tables(torch.arange(20), 2, 8, 2)
    before = tables.clone()
    with pytest.raises(ValueError, match=message):
        remap_tables(tables, **options)
    assert torch.equal(tables, before)


def test_layers_without_experts_cannot_be_counted():
    with pytest.raises(ValueError, match=r"`layers` is \[1\]; pass some of those with experts: \[0, 2\]"):
        count_routes(tiny_moe("qwen3_moe"), some_batches(), [1])
