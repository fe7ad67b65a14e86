"""Token ids that are routed by the token before them, too: their rows, and what is built on them."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from helpers.backbones import backed_model
from helpers.models import random_ids, tiny_config, tiny_model, tiny_seq2seq_model
from modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.convert import prune_experts
from modeling_stablemoe.convert.rebalancing import rebalance
from modeling_stablemoe.measure.verdict import load_of_frozen
from modeling_stablemoe.model.context_stablemoe import Tokens, whole_sequences


SPLIT = [7, 3]
PAD = 2
SHAPE = {"split_token_ids": SPLIT, "moe_layer_positions": [0, 2], "pad_token_id": PAD}
BUILDERS = {
    "hash": lambda: tiny_model(router_type="hash", **SHAPE),
    "two per token": lambda: tiny_model(router_type="hash", num_experts_per_tok=2, **SHAPE),
    "word embedding": lambda: tiny_model(**SHAPE),
    "counts": lambda: tiny_model(distilled_router="counts", **SHAPE),
    "llama": lambda: backed_model("llama", split_token_ids=SPLIT),
}
every_model = pytest.mark.parametrize("name", BUILDERS)


def rows_of(ids: list[int], vocab_size: int) -> list[int]:
    """The rows of one sequence, written down once more."""
    rows = []
    for place, token_id in enumerate(ids):
        follows = token_id in SPLIT and place > 0
        rows.append((1 + SPLIT.index(token_id)) * vocab_size + ids[place - 1] if follows else token_id)
    return rows


def ids_with_split_ones(length: int, seed: int = 0) -> torch.Tensor:
    return random_ids(1, length, seed=seed, low=3, high=9)[0]


def expected_routes(model, ids: torch.Tensor) -> torch.Tensor:
    rows = torch.tensor(rows_of(ids.tolist(), model.config.vocab_size))
    frozen = model.routing_stage == 2
    tables = [
        layer.frozen_router.values() if frozen else layer.bare_router.distilled_router.table()
        for layer in model.moe_layers_by_name.values()
    ]
    return torch.stack([table.long()[rows] for table in tables])


@every_model
@torch.no_grad()
def test_caches_padding_packed_rows_and_beams_keep_to_the_rows(name):
    model = BUILDERS[name]().eval()
    rows = [ids_with_split_ones(5), ids_with_split_ones(9, seed=1)]
    expected = [expected_routes(model, ids) for ids in rows]
    assert all(model.config.vocab_size <= max(rows_of(ids.tolist(), model.config.vocab_size)) for ids in rows)
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    ids = torch.full_like(mask, PAD).masked_scatter(mask.bool(), torch.cat(rows))

    def routed(expert_indices):
        stacked = torch.stack(expert_indices)
        return stacked[:, mask[:, -stacked.shape[2] :].bool()]

    whole = torch.cat(expected, 1)
    assert torch.equal(model.route(ids, mask)[:, mask.bool()], whole)
    assert torch.equal(routed(model(ids, attention_mask=mask, output_router_logits=True).expert_indices), whole)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
        pieces, begin = [], 0
        for end in (6, 7, 9):
            given = {"attention_mask": mask[:, :end], "past_key_values": cache, "output_router_logits": True}
            pieces.append(torch.stack(model(ids[:, begin:end], **given).expert_indices))
            begin = end
        assert torch.equal(torch.cat(pieces, 2)[:, mask.bool()], whole)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = model(torch.cat(rows)[None], position_ids=positions, use_cache=False, output_router_logits=True)
    assert torch.equal(torch.stack(packed.expert_indices)[:, 0], whole)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask, "num_beams": 2}
    generated = model.generate(ids, **options)
    assert torch.equal(generated, model.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_a_layer_by_itself_finds_the_rows_of_the_context_that_it_is_given():
    layer = BUILDERS["hash"]().model.moe_layers[0]
    ids = ids_with_split_ones(9)[None]
    rows = torch.tensor(rows_of(ids[0].tolist(), 99))
    table = layer.frozen_router.values().long()
    assert torch.equal(layer.route(whole_sequences(ids))[0], table[rows])
    assert torch.equal(layer.look_up(whole_sequences(ids))[:, 0], table[rows])
    assert torch.equal(layer.route(ids)[0], table[ids[0]])  # nothing is known of what stands before
    hidden = torch.randn(1, 9, 32)
    told = Tokens(ids, rows=rows[None])
    assert torch.equal(layer(hidden, whole_sequences(ids)), layer(hidden, tuple(told)))


@pytest.mark.parametrize("stage", [1, 2])
@torch.no_grad()
def test_splitting_moves_no_token_until_tables_say_where(stage, tmp_path):
    model = tiny_model(moe_layer_positions=[0, 2]).eval()
    if stage == 2:
        model.freeze_router()
    ids = torch.stack([ids_with_split_ones(9, seed) for seed in range(4)])
    before, fingerprint = model(ids).logits, model.config.router_fingerprint
    model.split_tokens(SPLIT)
    assert torch.equal(model(ids).logits, before)
    assert (model.config.router_fingerprint == fingerprint) is (stage == 1)
    tables = torch.randint(4, (2, 3 * model.config.vocab_size), generator=torch.Generator().manual_seed(0))
    model.set_routing_tables(tables)
    expected = torch.stack([tables[:, rows_of(row.tolist(), model.config.vocab_size)] for row in ids], 1)
    assert torch.equal(model.route(ids), expected)
    model.save_pretrained(tmp_path)
    loaded = StableMoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.split_token_ids == SPLIT
    assert torch.equal(loaded.route(ids), expected)
    assert_close(loaded(ids).logits, model(ids).logits)
    same_rows_of_others = copy.deepcopy(loaded)
    same_rows_of_others.config.split_token_ids = [3, 7]
    same_rows_of_others.save_pretrained(tmp_path / "others")
    with pytest.raises(ValueError, match="are not those that this checkpoint was saved with"):
        StableMoEForCausalLM.from_pretrained(tmp_path / "others")


@pytest.mark.parametrize("builder", [tiny_model, tiny_seq2seq_model])
@pytest.mark.parametrize("distilled_router", ["word_embedding", "counts"])
def test_stage_1_learns_rows_and_freezing_them_changes_nothing(builder, distilled_router):
    settings = {"distilled_router": distilled_router, "split_token_ids": SPLIT, "max_frozen_load": 2.0}
    model = builder(**settings).train()
    ids = torch.stack([ids_with_split_ones(12, seed) for seed in range(6)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layer = next(iter(model.moe_layers_by_name.values()))
    vocab_size = model.config.vocab_size
    expected = torch.zeros(3 * vocab_size, dtype=torch.long)
    for row in ids.tolist():
        expected += 3 * torch.bincount(torch.tensor(rows_of(row, vocab_size)), minlength=3 * vocab_size)
    assert torch.equal(layer.bare_router.memory()["token_counts"], expected)
    assert torch.equal(
        model.routed_tokens(input_ids=ids, labels=ids)[0][0].flatten().bincount(minlength=3 * vocab_size) * 3, expected
    )
    if distilled_router == "counts":
        assert torch.equal(layer.bare_router.distilled_router.counts().sum(-1).long(), expected)
    (learned,) = {len(parameter) for parameter in (layer.bare_router.distilled_router.embedding,)}
    assert learned == 3 * vocab_size
    balanced = model.freeze_router()
    assert all(item.load.max() <= 2.0 * item.load.mean() + 1e-9 for item in balanced if not len(item.alone))
    counts = expected.unsqueeze(0).expand(len(balanced), -1)
    assert load_of_frozen(model, counts).shape == (len(balanced), model.config.num_experts)


def test_without_a_limit_evaluation_routes_as_stage_2_will():
    model = BUILDERS["counts"]().train()
    ids = torch.stack([ids_with_split_ones(12, seed) for seed in range(6)])
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
        model.freeze_router()
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", ["hash", "two per token", "word embedding", "counts"])
@torch.no_grad()
def test_a_resized_vocabulary_keeps_the_rows_of_old_ids(name):
    model = BUILDERS[name]().eval()
    ids = torch.stack([ids_with_split_ones(9, seed) for seed in range(4)])
    before = model.route(ids)
    model.resize_token_embeddings(110)
    assert model.config.num_routing_rows == 330
    assert torch.equal(model.route(ids), before)
    if name == "hash":
        pair = torch.tensor([[109, 7]])
        assert model.route(pair)[:, 0].tolist() == [[109 % 5, 109 % 5]] * 2  # so is a split id after a new one
    model.resize_token_embeddings(60)
    assert torch.equal(model.route(ids), before)
    with pytest.raises(ValueError, match="leaves out token id 7, one of `split_token_ids`: keep 8 ids at least"):
        model.resize_token_embeddings(7)
    assert model.config.vocab_size == 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split_token_ids": [1, 99]}, r"`split_token_ids` must be different token ids in 0\.\.98, got \[1, 99\]"),
        ({"split_token_ids": [1, 1]}, "`split_token_ids` must be different token ids"),
        ({"split_token_ids": "the"}, "`split_token_ids` must be a list of token ids, or None"),
        (
            {"split_token_ids": [1], "distilled_router": "cnn"},
            "splits rows of routing tables, which `distilled_router` 'cnn'",
        ),
        ({"split_token_ids": [1], "router_type": "switch"}, "`distilled_router` None has not: choose one of"),
    ],
)
def test_ids_that_cannot_be_split_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_what_knows_tables_of_ids_alone_refuses_split_ones():
    model = BUILDERS["hash"]()
    with pytest.raises(ValueError, match="Only tables of token ids alone can be pruned"):
        prune_experts(model, range(9))
    with pytest.raises(ValueError, match="are balanced when they are made"):
        rebalance(model, [], 1.1)
    with pytest.raises(ValueError, match=r"have been split: build another model"):
        model.split_tokens([1])
    with pytest.raises(ValueError, match=r"rows of the vocabulary and of `split_token_ids`, got \(2, 99\)"):
        model.set_routing_tables(torch.zeros(2, 99, dtype=torch.long))
    with pytest.raises(ValueError, match="different token ids"):
        tiny_model().split_tokens([999])
    with pytest.raises(ValueError, match="freezes as weights"):
        tiny_model(distilled_router="cnn").split_tokens([1])
