"""Tests of the batches by number of tokens and of their padding."""

import pickle
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from modeling_stablemoe.data.token_batches import TokenBatchCollator, TokenBatches, sort_by_length


PAD = 1


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": PAD}, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def dataset_of(lengths) -> Dataset:
    """Rows of the given (source, target) lengths, all of whose source tokens are 100 + the row's index."""
    return Dataset.from_dict(
        {
            "pair": ["de-en"] * len(lengths),
            "input_ids": [[100 + row] * source for row, (source, _) in enumerate(lengths)],
            "labels": [[100 + row] * target for row, (_, target) in enumerate(lengths)],
        }
    )


def translation_lengths(num_pairs, seed=0) -> list[tuple[int, int]]:
    """Lengths that look like sentences and their translations."""
    generator = np.random.default_rng(seed)
    sources = generator.lognormal(3.0, 0.6, num_pairs).clip(1, 200)
    targets = (sources * generator.lognormal(0, 0.25, num_pairs)).clip(1, 200)
    return list(zip(sources.astype(int).tolist(), targets.astype(int).tolist(), strict=True))


def lengths_of(batch) -> list[tuple[int, int]]:
    return [(len(row["input_ids"]), len(row["labels"])) for row in batch]


def rows_of(batch) -> list[int]:
    return [row["input_ids"][0] - 100 for row in batch]


def all_batches(batches) -> list[list[dict]]:
    return [batches[index] for index in range(len(batches))]


LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=40)


# --- batches ---


@settings(max_examples=25, deadline=None)
@given(
    lengths=LENGTHS, max_tokens=st.integers(20, 200), max_pairs=st.none() | st.integers(1, 9), seed=st.integers(0, 9)
)
def test_every_pair_is_in_one_batch_and_no_batch_exceeds_its_limits(lengths, max_tokens, max_pairs, seed):
    batches = TokenBatches(dataset_of(lengths), max_tokens, seed, max_pairs)
    items = all_batches(batches)
    assert sorted(row for batch in items for row in rows_of(batch)) == list(range(len(lengths)))
    for row in (row for batch in items for row in batch):
        token = row["input_ids"][0]
        source, target = lengths[token - 100]
        assert row == {"input_ids": [token] * source, "labels": [token] * target}
    for batch in items:
        assert len(batch) * max(max(pair) for pair in lengths_of(batch)) <= max_tokens
        assert len(batch) <= (max_pairs or len(lengths))


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, max_tokens=st.integers(20, 200), max_pairs=st.none() | st.integers(1, 9))
def test_batches_are_grouped_by_length_and_full(lengths, max_tokens, max_pairs):
    items = all_batches(TokenBatches(dataset_of(lengths), max_tokens, 0, max_pairs))
    sizes = [[max(pair) for pair in lengths_of(batch)] for batch in items]
    assert [size for batch in sizes for size in batch] == sorted(max(pair) for pair in lengths)
    for batch, following in zip(sizes, sizes[1:], strict=False):
        assert (len(batch) + 1) * following[0] > max_tokens or len(batch) == max_pairs


def test_padding_is_counted_and_small():
    lengths = translation_lengths(5000)
    batches = TokenBatches(dataset_of(lengths), max_tokens=1024)
    assert batches.num_pairs == 5000
    assert batches.num_tokens == sum(source + target for source, target in lengths)
    padded = sum(
        len(batch) * (max(source for source, _ in pairs) + max(target for _, target in pairs))
        for batch in all_batches(batches)
        for pairs in [lengths_of(batch)]
    )
    assert batches.padding_share == pytest.approx(1 - batches.num_tokens / padded)
    assert batches.padding_share < 0.085  # 0.103 if pairs of one size were in random order


def test_same_seed_gives_the_same_batches_and_another_seed_other_ones():
    dataset = dataset_of([(3, 3)] * 50)
    first, same, other = (
        [rows_of(batch) for batch in all_batches(TokenBatches(dataset, 21, seed))] for seed in (0, 0, 1)
    )
    assert first == same
    assert first != other
    assert sorted(sum(first, [])) != sum(first, [])


def test_selected_and_formatted_rows_are_honoured():
    dataset = dataset_of([(1 + row % 7, 1 + row % 5) for row in range(40)])
    chosen = dataset.filter(lambda row: row["input_ids"][0] % 2 == 0).shuffle(seed=3).select(range(15))
    expected = sorted(row["input_ids"][0] - 100 for row in chosen)
    for view in (chosen, chosen.with_format("torch"), chosen.with_format("numpy", columns=["pair"])):
        items = all_batches(TokenBatches(view, 14))
        assert sorted(row for batch in items for row in rows_of(batch)) == expected
        assert all(isinstance(row["labels"], list) for batch in items for row in batch)
        assert all(len(batch) * max(max(pair) for pair in lengths_of(batch)) <= 14 for batch in items)


def test_batches_of_100_000_pairs_are_formed_in_seconds():
    tokens = np.arange(200).tolist()
    lengths = translation_lengths(1000) * 100
    dataset = Dataset.from_dict(
        {
            "input_ids": [tokens[:source] for source, _ in lengths],
            "labels": [tokens[:target] for _, target in lengths],
        }
    )
    start = time.process_time()
    batches = TokenBatches(dataset, 4096)
    assert batches.num_pairs == 100_000
    assert batches.num_tokens == sum(source + target for source, target in lengths)
    assert time.process_time() - start < 5


def test_index_out_of_range_ends_an_iteration():
    batches = TokenBatches(dataset_of([(2, 3)] * 4), max_tokens=6)
    assert len(batches) == len(list(batches)) == 2
    with pytest.raises(IndexError):
        batches[2]
    assert rows_of(batches[-1]) == rows_of(batches[1])


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([(1, 1)], {"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
        ([(1, 1)], {"max_tokens": 9, "max_pairs": 0}, "max_pairs must be at least 1; got 0"),
        ([], {"max_tokens": 9}, "data set is empty.*Check its split"),
        ([(1, 1), (3, 10)], {"max_tokens": 9}, "max_tokens is 9, but pair 1 has a side of 10 .*at least 10, or drop"),
        ([(11, 1), (3, 10)], {"max_tokens": 9}, "max_tokens is 9, but pair 0 has a side of 11"),
    ],
)
def test_impossible_batches_are_refused(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        TokenBatches(dataset_of(lengths), **options)


def test_missing_column_is_named():
    dataset = Dataset.from_dict({"input_ids": [[1]], "text": ["x"]})
    with pytest.raises(ValueError, match="no column 'labels' of token ids; it has: input_ids, text"):
        TokenBatches(dataset, 9)
    with pytest.raises(ValueError, match="no column 'input_ids'"):
        sort_by_length(dataset.remove_columns("input_ids"))


# --- padding ---


def test_collator_pads_both_sides_and_drops_texts(tokenizer):
    rows = list(dataset_of([(2, 1), (3, 4)]))
    batch = TokenBatchCollator(tokenizer)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[100, 100, PAD], [101, 101, 101]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [[100, -100, -100, -100], [101, 101, 101, 101]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_collator_joins_batches_and_takes_them_like_rows(tokenizer):
    rows = list(dataset_of([(2, 1), (3, 4), (1, 1)]))
    collate = TokenBatchCollator(tokenizer)
    for features in ([rows], [rows[:1], rows[1:]]):
        joined, plain = collate(features), collate(rows)
        assert joined.keys() == plain.keys()
        assert all(torch.equal(joined[name], plain[name]) for name in plain)


def test_collator_rounds_lengths_up_and_keeps_a_given_mask(tokenizer):
    batch = TokenBatchCollator(tokenizer, pad_to_multiple_of=8)(list(dataset_of([(2, 1), (3, 9)])))
    assert (batch["input_ids"].shape, batch["labels"].shape) == ((2, 8), (2, 16))
    batch = TokenBatchCollator(tokenizer)([{"input_ids": [5, 6], "attention_mask": [0, 1], "labels": [7]}])
    assert batch["attention_mask"].tolist() == [[0, 1]]


# --- with PyTorch and the Trainer ---


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_data_loader_sees_every_pair_once_an_epoch_in_changing_order(tokenizer, num_workers):
    batches = TokenBatches(dataset_of(translation_lengths(60)), max_tokens=400)
    loader = DataLoader(
        batches, batch_size=1, shuffle=True, num_workers=num_workers, collate_fn=TokenBatchCollator(tokenizer)
    )
    epochs = [[batch["input_ids"][:, 0].sub(100).tolist() for batch in loader] for _ in range(2)]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == list(range(60))
        assert sorted(epoch) == sorted(rows_of(batch) for batch in batches)
    assert epochs[0] != epochs[1]


def test_batches_survive_pickling_for_spawned_workers():
    batches = TokenBatches(dataset_of(translation_lengths(30)), max_tokens=400)
    assert all_batches(pickle.loads(pickle.dumps(batches))) == all_batches(batches)


class Recorder(torch.nn.Module):
    """A model that notes the rows that it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, input_ids, attention_mask, labels):
        self.seen.append(input_ids[:, 0].sub(100).tolist())
        return {"loss": self.weight * attention_mask.sum()}


def train(folder, tokenizer, batches, max_steps, **options) -> list[list[int]]:
    model = Recorder()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=max_steps,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=batches, data_collator=TokenBatchCollator(tokenizer))
    trainer.train(**options)
    return model.seen


def test_trainer_accumulates_and_resumes_batches_like_rows(tmp_path, tokenizer):
    batches = TokenBatches(dataset_of(translation_lengths(60)), max_tokens=200)
    steps = len(batches) // 2
    assert steps >= 3
    seen = train(tmp_path, tokenizer, batches, steps)
    assert len(seen) == 2 * steps
    frozen = [rows_of(batch) for batch in batches]
    assert all(rows in frozen for rows in seen)
    assert len({rows[0] for rows in seen}) == len(seen)
    assert seen != frozen[: len(seen)]
    resumed = train(tmp_path, tokenizer, batches, steps, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed == seen[4:]


# --- evaluation ---


def test_rows_sorted_for_evaluation_start_with_the_longest_source_and_can_be_restored():
    dataset = dataset_of([(2, 1), (9, 2), (2, 3), (5, 4)]).select([3, 2, 1, 0])
    ordered, order = sort_by_length(dataset)
    assert order.tolist() == [2, 0, 1, 3]  # those of one length in their order
    assert ordered.column_names == dataset.column_names
    restored = np.empty(4, dtype=object)
    restored[order] = list(ordered)
    assert restored.tolist() == list(dataset)
    assert len(sort_by_length(dataset.select([]))[0]) == 0
