"""Two ways of running a model, compared: against plain loops, with routers that are made to differ, and the script."""

import copy
import json

import pytest
import torch
from packaging.version import Version
from transformers import __version__

from helpers.models import tiny_model, tiny_seq2seq_model
from helpers.moe_families import tiny_moe
from helpers.pages import BYTE_LEVEL_SIZE, byte_level_tokenizer
from helpers.workplaces import load_script
from modeling_stablemoe.tables import (
    PAIRS,
    compare_routings,
    format_mismatch,
    hash_tables,
    install_tables,
    measure_mismatch,
    mismatch_json,
    remove_tables,
    save_tables,
)
from modeling_stablemoe.tables.installing import routers_of


SEQUENCES = torch.randint(3, 90, (6, 14), generator=torch.Generator().manual_seed(0))


def sets_of_experts(model, ids: torch.Tensor, **inputs) -> tuple[list[list[set[int]]], torch.Tensor]:
    """The experts of each token by layer, and the logits, of one pass."""
    seen = []
    handles = [
        router.register_forward_hook(lambda _, args, output: seen.append([set(row.tolist()) for row in output[2]]))
        for router in routers_of(model).values()
    ]
    with torch.no_grad():
        logits = model(ids, **inputs).logits
    for handle in handles:
        handle.remove()
    return seen, logits


def divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    p, q = (torch.distributions.Categorical(logits=logits.double()) for logits in (first, second))
    return torch.distributions.kl_divergence(p, q).sum().item()


def stable_model(**overrides):
    return tiny_model(moe_layer_positions=[0, 2], **overrides).eval()


def test_precisions_differ_by_what_a_plain_count_finds():
    model = tiny_moe("olmoe")
    (measured,) = measure_mismatch(model, SEQUENCES, ["dtype"], batch_size=4)
    first, logits = sets_of_experts(model, SEQUENCES)
    second, half_logits = sets_of_experts(copy.deepcopy(model).bfloat16(), SEQUENCES)
    differs = [[a != b for a, b in zip(*layer, strict=True)] for layer in zip(first, second, strict=True)]
    assert measured.tokens == 6 * 14
    assert measured.differing_tokens == sum(map(any, zip(*differs, strict=True))) > 0
    assert measured.differing_choices == pytest.approx(sum(map(sum, differs)) / (3 * 84))
    assert measured.kl == pytest.approx(divergence(logits, half_logits) / 84, rel=1e-6)
    assert model.dtype == torch.float32


def test_a_padded_batch_is_compared_with_each_sequence_alone():
    # DeepSeek-V4 compresses keys by position, so that padding on the left is not without consequence.
    model = tiny_moe("deepseek_v4")
    (measured,) = measure_mismatch(model, SEQUENCES, ["batch"], batch_size=3)
    tokens, differing, total = 0, 0, 0.0
    for batch in SEQUENCES.split(3):
        starts = [0, 2, 4]  # up to half of 14, in three steps
        mask = torch.tensor([[0] * start + [1] * (14 - start) for start in starts])
        together, batch_logits = sets_of_experts(model, batch, attention_mask=mask)
        for row, start in enumerate(starts):
            alone, logits = sets_of_experts(model, batch[row : row + 1, start:])
            others = [layer[row * 14 + start : row * 14 + 14] for layer in together]
            differing += sum(
                any(a[token] != b[token] for a, b in zip(alone, others, strict=True)) for token in range(14 - start)
            )
            tokens += 14 - start
            total += divergence(logits[0], batch_logits[row, start:])
    assert (measured.tokens, measured.differing_tokens) == (tokens, differing)
    assert differing > 0
    assert measured.kl == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("pair", ["generate", "continuous"])
def test_what_decoding_alone_routes_elsewhere_is_found_to_the_token(pair):
    model = tiny_moe("mixtral")
    model.config.output_router_logits = True  # which continuous batching does not survive
    (same,) = measure_mismatch(model, SEQUENCES, [pair])
    assert same.reason is None
    assert same.differing_tokens == 0
    assert 0 <= same.kl < 1e-9
    assert model.config.output_router_logits

    def shifted(router, args, output):  # passes of one token per sequence
        logits, weights, index = output
        return (logits, weights, (index + 1) % 8) if len(index) <= 6 else output

    handle = routers_of(model)[1].register_forward_hook(shifted)
    (measured,) = measure_mismatch(model, SEQUENCES, [pair])
    handle.remove()
    # Seven tokens are sampled for each sequence; the last one is read by no pass.
    given = 6 * 7 if pair == "generate" else 7 + 6 + 5 + 4 + 3 + 2
    assert measured.tokens == given + 6 * 6
    assert measured.differing_tokens == 6 * 6
    # A token that only looks back at one that was sent elsewhere may be sent elsewhere, too, in a later layer.
    assert measured.differing_choices >= 36 / (3 * measured.tokens)
    assert measured.kl > 1e-6


def test_backends_of_experts_are_compared_and_the_models_own_comes_back():
    model = tiny_moe("olmoe")
    model.set_experts_implementation("batched_mm")
    attention = model.config._attn_implementation
    model.train()
    measured = measure_mismatch(model, SEQUENCES, ["experts", "continuous"])
    assert [each.differing_tokens for each in measured] == [0, 0]
    assert model.get_experts_implementation()[""] == "batched_mm"
    assert model.config._attn_implementation == attention
    assert model.training


# Frozen routing: no token, whatever the pair


@pytest.mark.parametrize(
    "family",
    [
        "olmoe",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v4")
        ),
    ],
)
def test_no_token_of_a_model_with_tables_is_sent_elsewhere(family):
    model = tiny_moe(family)
    before = model(SEQUENCES).logits
    measured = compare_routings(model, SEQUENCES)
    assert list(measured) == ["learned", "frozen"]
    assert [each.pair for each in measured["frozen"]] == list(PAIRS)
    assert [each.differing_tokens for each in measured["frozen"]] == [0] * 5
    assert family != "olmoe" or sum(each.differing_tokens for each in measured["learned"]) > 0
    # DeepSeek's attention has no paged cache.
    for pairs in measured.values():
        assert [each.pair for each in pairs if each.reason] == (["continuous"] if "deepseek" in family else [])
    assert "frozen" in compare_routings(model, SEQUENCES, ["dtype"])  # and nothing else
    remove_tables(model)
    assert torch.equal(model(SEQUENCES).logits, before)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(
            {"num_experts_per_tok": 2, "expert_type": "gated", "num_expert_sublayers": 1, "intermediate_size": 40},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_no_token_of_a_frozen_stablemoe_is_sent_elsewhere(settings):
    model = stable_model(**settings)
    measured = compare_routings(model, SEQUENCES)
    assert model.routing_stage == 2
    assert [each.reason for each in measured["frozen"]] == [None] * 5
    assert [each.differing_tokens for each in measured["frozen"]] == [0] * 5
    assert [each.tokens for each in measured["frozen"]] == [84, 69, 84, 78, 63]
    assert list(compare_routings(model, SEQUENCES, ["dtype"])) == ["frozen"]


# What cannot be measured is said


def test_a_routing_that_cannot_be_frozen_is_measured_as_it_is():
    for model, reason in (
        (stable_model(router_type="switch"), "cannot be frozen"),
        (tiny_moe("phimoe"), "cannot be told"),
    ):
        measured = compare_routings(model, SEQUENCES, ["dtype", "generate"])
        assert [each.reason for each in measured["learned"]] == [None, None]
        assert all(reason in each.reason for each in measured["frozen"])
        table = format_mismatch(measured)
        assert table.count(reason) == 1
        assert "Not measured (frozen): " in table
        assert json.loads(mismatch_json(measured))["frozen"][1]["reason"] == measured["frozen"][1].reason


def test_a_way_that_a_model_cannot_run_is_said_with_the_reason():
    model = tiny_model(moe_layer_positions=[1], max_position_embeddings=8).eval()
    measured = {each.pair: each for each in measure_mismatch(model, SEQUENCES, ["dtype", "generate"])}
    assert "max_position_embeddings" in measured["dtype"].reason
    assert "max_position_embeddings" in measured["generate"].reason
    attention = measure_mismatch(tiny_moe("deepseek_v3"), SEQUENCES, ["dtype", "continuous"])
    assert "Not measured (learned, continuous batching / forward): `generate_batch` failed" in format_mismatch(
        {"learned": attention}
    )


def test_what_is_not_for_it_is_refused():
    with pytest.raises(
        ValueError, match="There is no pair 'dtypes'; choose of dtype, batch, experts, generate, continuous"
    ):
        measure_mismatch(tiny_moe("olmoe"), SEQUENCES, ["dtypes"])
    with pytest.raises(ValueError, match=r"`sequences` is of shape \(6, 3\)"):
        measure_mismatch(tiny_moe("olmoe"), SEQUENCES[:, :3])
    with pytest.raises(ValueError, match="has an encoder"):
        measure_mismatch(tiny_seq2seq_model(), SEQUENCES)
    with pytest.raises(ValueError, match="has no MoE layer"):
        measure_mismatch(tiny_model(moe_layer_positions=[]), SEQUENCES)
    with pytest.raises(ValueError, match="`tables` are for other models"):
        compare_routings(stable_model(), SEQUENCES, ["dtype"], tables="tables")


def test_script_writes_table_and_json(tmp_path, capsys):
    model = tiny_moe("olmoe", vocab_size=BYTE_LEVEL_SIZE)
    model.save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    install_tables(model, hash_tables(torch.ones(BYTE_LEVEL_SIZE), 3, 8, 2))
    (tmp_path / "tables").mkdir()
    save_tables(model, tmp_path / "tables")
    (tmp_path / "text.txt").write_text("the cat and the dog and the script, the end of it. " * 30)
    script, folder = load_script("measure_routing_mismatch"), str(tmp_path)
    options = [f"{folder}/model", "--text_files", f"{folder}/text.txt", "--block_size", "16", "--num_sequences", "8"]
    files = ["--json", f"{folder}/mismatch.json", "--tables", f"{folder}/tables"]
    script.main([*options, *files, "--pairs", "dtype", "batch"])
    printed = capsys.readouterr().out
    measured = json.loads((tmp_path / "mismatch.json").read_text())
    assert {name: [each["pair"] for each in pairs] for name, pairs in measured.items()} == {
        "learned": ["dtype", "batch"],
        "frozen": ["dtype", "batch"],
    }
    assert [each["tokens"] for each in measured["frozen"]] == [128, 100]
    assert printed.count("| frozen ") == 2
    for wrong, message in (
        (["--pairs", "dtype", "speed"], "2"),  # with the usage, before the work
        (["--block_size", "5000"], "shorter than a sequence of 5000 tokens"),
        (["--json", f"{folder}/nowhere/mismatch.json"], "--json: there is no folder"),
        (["--tables", f"{folder}/text.txt"], "error: .*text.txt is no file of routing tables"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main([*options, "--pairs", "dtype", *wrong])
    assert "--pairs: there is no speed; choose of dtype, batch" in capsys.readouterr().err


HAS_OTHER_ORDER = Version(__version__) < Version("5.20")


@pytest.mark.skipif(not HAS_OTHER_ORDER, reason="routers return their choice last")
def test_granites_old_router_which_returns_its_choice_first_is_measured():
    (measured,) = measure_mismatch(tiny_moe("granitemoe"), SEQUENCES, ["generate"])
    assert measured.reason is None
    assert measured.differing_tokens == 0
