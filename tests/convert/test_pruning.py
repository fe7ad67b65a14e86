"""Pruning frozen models to a part of their vocabulary: the same logits there, in memory and from checkpoints."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import ROOT
from helpers.checkpoints import edit_config, edit_weights, run_without_package
from helpers.hub_server import HubServer
from helpers.logs import recorded_warnings
from helpers.matrices import one_fast
from helpers.models import TINY, tiny_config, tiny_model, tiny_seq2seq_model
from helpers.pages import BYTE_LEVEL_SIZE, byte_level_tokenizer
from helpers.workplaces import content, load_script, refuse
from modeling_stablemoe import StableMoEForCausalLM, StableMoEForSequenceClassification, StableMoEModel
from modeling_stablemoe.convert.pruning import load_pruned, prune_experts
from modeling_stablemoe.convert.pruning_report import expected_reach


EVERY_ID = torch.arange(99).unsqueeze(0)
SUBSET = [5, 17, 31, 64, 90]
ROUTINGS = {
    "stable": {},
    "counts": {"distilled_router": "counts", "max_frozen_load": 1.3, "expert_bias_rate": 0.1},
    "base": {"router_type": "base", "distilled_router": "word_embedding"},
    "hash": {"router_type": "hash"},
    "untied": {"tie_word_embeddings": False, "position_embedding_type": "sinusoidal", "do_layer_norm_before": False},
}
WIDE = {"num_experts": 13, "moe_layer_positions": [0, 1, 2]}


@cache
def whole_model(routing: str = "stable", **overrides) -> StableMoEForCausalLM:
    """A frozen model of many experts; equal ones are made once, so tests leave them as they are."""
    model = tiny_model(**{**WIDE, **ROUTINGS[routing], **overrides})
    if model.routing_stage == 1:
        model.freeze_router()
    return model.eval()


def sequences(ids, shape=(3, 11), seed: int = 0) -> torch.Tensor:
    """Random sequences of some token ids."""
    choice = torch.randint(0, len(ids), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(ids)[choice]


def assert_same_state(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


# The same logits


@settings(deadline=None, max_examples=5)
@given(st.sampled_from(sorted(ROUTINGS)), st.sets(st.integers(0, 98), min_size=1, max_size=30), st.integers(0, 9))
@torch.no_grad()
def test_logits_on_the_subset_are_those_of_the_whole_model(routing, subset, seed):
    whole = whole_model(routing)
    pruned = prune_experts(whole, sorted(subset))
    ids = sequences(sorted(subset), seed=seed)
    assert torch.equal(pruned(ids).logits, whole(ids).logits)
    reached = [len(layer.unique()) for layer in whole.route(torch.tensor([[0, 1, *subset]]))]  # 0 and 1 are special
    assert pruned.config.num_experts == max(reached)


@torch.no_grad()
def test_the_dtype_is_kept():
    whole = copy.deepcopy(whole_model()).to(torch.bfloat16)
    pruned, ids = prune_experts(whole, SUBSET), sequences(SUBSET)
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    assert torch.equal(pruned(ids).logits, whole(ids).logits)


@torch.no_grad()
def test_padding_cache_and_backends_go_with_it():
    whole, ids = whole_model(), sequences(SUBSET)
    pruned = prune_experts(whole, SUBSET)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert torch.equal(pruned(ids, attention_mask=mask).logits, whole(ids, attention_mask=mask).logits)
    for implementation in ("eager", "batched_mm"):
        pruned.set_experts_implementation(implementation)
        torch.testing.assert_close(pruned(ids).logits, whole(ids).logits)
    options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": pruned.generation_config.suppress_tokens}
    assert torch.equal(pruned.generate(ids, **options), whole.generate(ids, **options))


@torch.no_grad()
def test_classifier_and_backbone_are_pruned_too(tmp_path):
    classifier = StableMoEForSequenceClassification(tiny_model(**WIDE, num_labels=3).config).eval()
    classifier.model.load_state_dict(whole_model().model.state_dict())
    ids = sequences(SUBSET)
    pruned = prune_experts(classifier, SUBSET)
    assert type(pruned) is StableMoEForSequenceClassification
    assert torch.equal(pruned(ids).logits, classifier(ids).logits)
    classifier.save_pretrained(tmp_path)
    assert_same_state(load_pruned(tmp_path, SUBSET), pruned)
    backbone = prune_experts(whole_model().model, SUBSET)
    assert type(backbone) is StableMoEModel
    assert torch.equal(backbone(ids)[0], whole_model().model(ids)[0])


@cache
def translator():
    model = tiny_seq2seq_model(num_experts=13)
    model.freeze_router()
    return model.eval()


@torch.no_grad()
def test_encoder_and_decoder_have_vocabularies_of_their_own(tmp_path):
    whole, sources, targets = translator(), [3, 4, 5, 6], [50, 51]
    pruned = prune_experts(whole, sources, targets)
    whole.save_pretrained(tmp_path)
    assert_same_state(load_pruned(tmp_path, sources, targets), pruned)
    inputs = {"input_ids": sequences(sources), "decoder_input_ids": sequences([1, *targets])}
    assert torch.equal(pruned(**inputs).logits, whole(**inputs).logits)
    encoder, *decoder = whole.route(torch.tensor([[0, 1, 2, *sources]]))
    needed = [encoder.unique(), *(layer.unique() for layer in whole.route(torch.tensor([[0, 1, 2, *targets]]))[1:])]
    assert pruned.config.num_experts == max(len(experts) for experts in needed)
    suppressed = pruned.generation_config.suppress_tokens
    generated = pruned.generate(inputs["input_ids"], max_new_tokens=9)
    assert torch.equal(generated, whole.generate(inputs["input_ids"], max_new_tokens=9, suppress_tokens=suppressed))
    assert not set(suppressed) & {0, 1, 2, *targets}
    both = prune_experts(whole, sources + targets)
    inputs["decoder_input_ids"] = sequences([1, *sources, *targets])
    assert torch.equal(both(**inputs).logits, whole(**inputs).logits)


# What is kept


def test_a_layer_that_needs_fewer_experts_keeps_the_lowest_of_the_others():
    whole = tiny_model(router_type="hash", num_experts=6, moe_layer_positions=[0, 2])
    tables = torch.zeros(2, 99, dtype=torch.long)
    tables[0], tables[1] = torch.arange(99) % 6, 4
    whole.set_routing_tables(tables)
    pruned = prune_experts(whole, [2, 3])  # 0 and 1 are special: experts 0, 1, 2, 3 and 4
    assert pruned.config.num_experts == 4
    for layer, kept in zip((0, 1), ([0, 1, 2, 3], [0, 1, 2, 4]), strict=True):
        old, new = (model.model.moe_layers[layer].expert_stack.sublayers[1].up_proj for model in (whole, pruned))
        assert torch.equal(new, old[kept])
    expected = torch.stack([torch.where(tables[0] < 4, tables[0], torch.arange(99) % 4), torch.full((99,), 3)])
    assert torch.equal(pruned.route(EVERY_ID)[:, 0], expected)


def test_the_whole_model_stays_as_it_is_and_shares_no_memory():
    whole = tiny_model(**WIDE)
    whole.freeze_router()
    whole.generation_config.suppress_tokens = [SUBSET[0]]
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    pruned = prune_experts(whole, SUBSET)
    assert pruned.training
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    assert whole.config.num_experts == 13
    assert whole.generation_config.suppress_tokens == [SUBSET[0]]
    assert SUBSET[0] in pruned.generation_config.suppress_tokens


def test_special_tokens_always_count():
    whole = tiny_model(router_type="hash", num_experts=99, bos_token_id=7)
    whole.set_routing_tables(torch.arange(99).unsqueeze(0))
    whole.generation_config.eos_token_id = [0, 8]
    pruned = prune_experts(whole, [50])
    assert set(range(99)) - set(pruned.generation_config.suppress_tokens) == {0, 1, 7, 8, 50}
    assert pruned.generation_config.eos_token_id == [0, 8]


def test_all_ids_keep_the_model_as_it_is():
    whole = whole_model()
    pruned = prune_experts(whole, range(99))
    assert pruned.config.router_fingerprint == whole.config.router_fingerprint
    assert pruned.config.pruned_tokens is pruned.generation_config.suppress_tokens is None
    assert torch.equal(pruned(sequences(SUBSET)).logits, whole(sequences(SUBSET)).logits)


# Ids outside the subset


def lost_ids(whole, pruned) -> set[int]:
    """Ids that do not go through the weights that they had, in some layer."""
    lost = set()
    for old, new in zip(whole.model.moe_layers, pruned.model.moe_layers, strict=True):
        ids = torch.arange(99)
        before, after = (layer.expert_stack.sublayers[0].up_proj[layer.route(ids)] for layer in (old, new))
        lost |= set((before != after).flatten(1).any(-1).nonzero().flatten().tolist())
    return lost


def test_generation_avoids_exactly_the_ids_whose_expert_is_gone():
    whole = whole_model()
    pruned = prune_experts(whole, SUBSET)
    assert set(pruned.generation_config.suppress_tokens) == lost_ids(whole, pruned)
    generated = pruned.generate(sequences(SUBSET), do_sample=True, max_new_tokens=40)
    assert not lost_ids(whole, pruned) & set(generated.flatten().tolist())
    free = prune_experts(whole, SUBSET, confine_generation=False)
    assert free.generation_config.suppress_tokens is None


def test_a_forward_pass_says_so_once_when_it_meets_an_id_without_its_expert():
    whole = whole_model()
    pruned = prune_experts(whole, SUBSET)
    inside = sorted(set(range(99)) - lost_ids(whole, pruned))
    lost = min(lost_ids(whole, pruned))
    with recorded_warnings("modeling_stablemoe.model.pretrained_stablemoe") as messages:
        pruned(torch.tensor([inside[:60]]))
        assert messages == []
        pruned(torch.tensor([[SUBSET[0], lost]]))
        pruned(inputs_embeds=pruned.get_input_embeddings()(torch.tensor([[lost]])))
    (message,) = messages
    assert message.startswith(f"Token id {lost} lost its expert")


def test_pruning_twice_remembers_what_was_lost_first():
    whole = whole_model()
    once = prune_experts(whole, [*SUBSET, 40, 41, 42])
    twice = prune_experts(once, SUBSET)
    assert torch.equal(twice(sequences(SUBSET)).logits, whole(sequences(SUBSET)).logits)
    assert set(twice.generation_config.suppress_tokens) == lost_ids(whole, once) | lost_ids(once, twice)


def test_tables_of_ones_own_end_the_warnings_and_added_tokens_are_none():
    pruned = prune_experts(whole_model(), SUBSET)
    packed = pruned.config.pruned_tokens
    pruned.resize_token_embeddings(120, mean_resizing=False)
    pruned(torch.tensor([[119, SUBSET[0]]]))
    assert pruned.config.pruned_tokens == packed
    pruned.set_routing_tables(torch.zeros(3, 120, dtype=torch.long))
    assert pruned.config.pruned_tokens is None


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole"
    whole_model().save_pretrained(path)
    return path


@pytest.mark.parametrize("max_shard_size", ["1GB", "30KB"])
def test_a_checkpoint_is_pruned_while_it_is_read(tmp_path, max_shard_size):
    whole = whole_model("counts")
    whole.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (max_shard_size == "30KB")
    expected, loaded = prune_experts(whole, SUBSET), load_pruned(tmp_path, SUBSET)
    assert_same_state(loaded, expected)
    assert not loaded.training
    assert loaded.config.router_fingerprint == expected.config.router_fingerprint
    assert loaded.config.pruned_tokens == expected.config.pruned_tokens
    assert loaded.generation_config.suppress_tokens == expected.generation_config.suppress_tokens
    assert loaded.config.name_or_path == str(tmp_path)
    half = load_pruned(tmp_path, SUBSET, dtype=torch.bfloat16, device_map="cpu", confine_generation=False)
    assert half.dtype == torch.bfloat16
    assert half.generation_config.suppress_tokens is None


@pytest.mark.parametrize("max_shard_size", one_fast("30KB", "1GB"))
def test_of_the_weights_of_a_variant_no_others_are_read(tmp_path, max_shard_size):
    whole, other = copy.deepcopy(whole_model()), copy.deepcopy(whole_model())
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    other.save_pretrained(tmp_path)
    whole.half().save_pretrained(tmp_path, variant="fp16", max_shard_size=max_shard_size)
    loaded = load_pruned(tmp_path, SUBSET, variant="fp16")
    assert loaded.dtype == torch.float16
    assert_same_state(loaded, prune_experts(whole, SUBSET))
    (tmp_path / "model.safetensors").unlink()
    assert_same_state(load_pruned(tmp_path, SUBSET, variant="fp16"), loaded)
    for variant, name in ((None, "model.safetensors"), ("int8", "model.int8.safetensors")):
        with pytest.raises(ValueError, match=rf"no weights as safetensors \({name}\).*the `variant`"):
            load_pruned(tmp_path, SUBSET, variant=variant)


def test_rows_of_other_experts_are_never_read(checkpoint, monkeypatch):
    read = {}

    class CountingSlice:
        def __init__(self, values, name):
            self.values, self.name = values, name

        def __getitem__(self, index):
            part = self.values[index]
            read[self.name] = read.get(self.name, 0) + part.numel()
            return part

        def get_shape(self):
            return self.values.get_shape()

    class CountingFile:
        def __init__(self, file):
            self.keys, self.get_slice = file.keys, lambda name: CountingSlice(file.get_slice(name), name)

    @contextmanager
    def open_counting(path, framework):
        with safe_open(path, framework=framework) as file:
            yield CountingFile(file)

    monkeypatch.setattr("modeling_stablemoe.convert.pruning.safe_open", open_counting)
    pruned = load_pruned(checkpoint, SUBSET)
    sizes = {name: values.numel() for name, values in (*pruned.named_parameters(), *pruned.named_buffers())}
    assert read == sizes
    assert sum(sizes.values()) < whole_model().num_parameters()


@torch.no_grad()
def test_a_pruned_checkpoint_is_one_like_any_other(checkpoint, tmp_path):
    pruned = load_pruned(checkpoint, SUBSET)
    pruned.save_pretrained(tmp_path / "pruned")
    ids = sequences(SUBSET)
    code = """
        import sys
        import torch
        from transformers import AutoModelForCausalLM
        folder, results = sys.argv[1:]
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        ids = torch.load(results + "/ids.pt")
        with torch.no_grad():
            torch.save((model(ids).logits, model.generate(ids, max_new_tokens=8)), results + "/facts.pt")
    """
    torch.save(ids, tmp_path / "ids.pt")
    run_without_package(code, tmp_path / "elsewhere", tmp_path / "pruned", tmp_path)
    logits, generated = torch.load(tmp_path / "facts.pt")
    assert torch.equal(logits, whole_model()(ids).logits)
    assert torch.equal(generated, pruned.generate(ids, max_new_tokens=8))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert loaded.config.pruned_tokens == pruned.config.pruned_tokens
    assert_same_state(loaded, pruned)
    edit_weights(
        tmp_path / "pruned",
        lambda weights: weights["model.moe_layers.1.frozen_router.routing_table"][5:6].add_(1).remainder_(2),
    )
    with pytest.raises(ValueError, match="are not those that this checkpoint was saved with"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")


@pytest.mark.slow
def test_a_checkpoint_of_the_hub_is_pruned_by_name(checkpoint, tmp_path):
    code = """
        import sys
        from transformers import AutoModelForCausalLM
        import modeling_stablemoe
        from modeling_stablemoe.convert.pruning import load_pruned
        AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("user/whole", max_shard_size="30KB")
        load_pruned("user/whole", [5, 17, 31, 64, 90], revision="main").save_pretrained(sys.argv[2])
    """

    with HubServer(tmp_path / "hub") as hub:
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT), **hub.environment}
        command = [sys.executable, "-c", textwrap.dedent(code), str(checkpoint), str(tmp_path / "pruned")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_state(StableMoEForCausalLM.from_pretrained(tmp_path / "pruned"), prune_experts(whole_model(), SUBSET))


# Refusals


REFUSED = {
    "a softmax gate": (
        {"router_type": "switch", "distilled_router": "word_embedding"},
        "by the scores of all of them",
    ),
    "a router that looks back": ({"distilled_router": "bigram"}, "looks back at earlier tokens"),
    "a dense model": ({"moe_layer_positions": []}, "is a dense model"),
    "stage 1": ({"stage": 1}, r"not frozen \(stage 1\).*freeze_router"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_table_shows_is_refused(case, tmp_path):
    overrides, message = REFUSED[case]
    model = tiny_model(**{name: value for name, value in overrides.items() if name != "stage"})
    if "stage" not in overrides and model.config.num_moe_layers:
        model.freeze_router()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        prune_experts(model, SUBSET)
    with pytest.raises(ValueError, match=message):
        load_pruned(tmp_path, SUBSET)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "holds no token id"),
        ([5, 99], r"holds the id 99, outside the vocabulary 0\.\.98"),
        ([-1], "holds the id -1"),
        ([0.5], "integers"),
        (torch.tensor([True, False]), "integers.*nonzero"),
    ],
)
def test_ids_that_are_none_are_refused(ids, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        prune_experts(whole_model(), ids)
    with pytest.raises(ValueError, match=message):
        load_pruned(checkpoint, ids)


def test_models_that_are_not_wholly_there_are_refused():
    with pytest.raises(ValueError, match="`target_ids` are for encoder-decoders"):
        prune_experts(whole_model(), SUBSET, SUBSET)
    with pytest.raises(ValueError, match="A StableMoEEncoder cannot be pruned"):
        prune_experts(translator().model.encoder, SUBSET)
    with pytest.raises(ValueError, match="not in this process as a whole: .* with `load_pruned`"):
        prune_experts(tiny_model(**WIDE, router_type="hash").to("meta"), SUBSET)
    adapted = tiny_model(**WIDE, router_type="hash")
    adapted.lm_head.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(2, 32)))
    with pytest.raises(ValueError, match=r"`lm_head\.lora_A` .*: merge or unload adapters first"):
        prune_experts(adapted, SUBSET)


def test_a_config_takes_what_pruning_writes_and_nothing_else():
    written = prune_experts(whole_model(), SUBSET).config.pruned_tokens
    assert tiny_config(pruned_tokens=written).pruned_tokens == written
    for value in ("text", [*written, *written]):
        with pytest.raises(ValueError, match="pruned_tokens"):
            tiny_config(pruned_tokens=value)


def cut_rows(weights):
    weights["model.moe_layers.1.router.centroids"] = weights["model.moe_layers.1.router.centroids"][:-1].clone()


def drop_a_table(weights):
    weights.pop("model.moe_layers.1.frozen_router.routing_table")


def change_a_row(weights):
    table = weights["model.moe_layers.1.frozen_router.routing_table"]
    table[5] = (table[5] + 1) % 13


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (cut_rows, r"moe_layers\.1\.router\.centroids is missing or of another shape"),
        (drop_a_table, "routing_table: missing from the weights"),
        (change_a_row, "are not those that this checkpoint was saved with"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, edit, message):
    whole_model().save_pretrained(tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        load_pruned(tmp_path, SUBSET)


def test_what_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    whole_model().save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["SomethingElse"])
    with pytest.raises(ValueError, match="names no model of this package"):
        load_pruned(tmp_path, SUBSET)
    edit_config(tmp_path, architectures=["StableMoEForCausalLM"], quantization_config={"quant_method": "torchao"})
    with pytest.raises(ValueError, match="quantised"):
        load_pruned(tmp_path, SUBSET)
    edit_config(tmp_path, quantization_config=None)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_pruned(tmp_path, SUBSET)
    weights.unlink()
    with pytest.raises(ValueError, match="no weights as safetensors"):
        load_pruned(tmp_path, SUBSET)


# What it is worth


@pytest.mark.parametrize(("num_ids", "num_experts"), [(1, 8), (40, 128)])
def test_the_expected_reach_is_that_of_random_tables(num_ids, num_experts):
    tables = torch.randint(num_experts, (400, num_ids), generator=torch.Generator().manual_seed(0))
    reached = torch.tensor([float(len(table.unique())) for table in tables])
    error = 4 * reached.std() / 400**0.5 + 1e-9
    assert abs(reached.mean() - expected_reach(num_ids, num_experts)) <= error


# The script


TEXT = "the cat and the dog "


@pytest.fixture(scope="module")
def script():
    return load_script("prune_experts")


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "checkpoint"
    model = tiny_model(**{**WIDE, "num_experts": 60, "vocab_size": BYTE_LEVEL_SIZE})
    model.freeze_router()
    model.save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return path


def test_the_script_saves_a_pruned_checkpoint_with_tokenizer_and_card(script, text_checkpoint, tmp_path, capsys):
    out = tmp_path / "pruned"
    script.main([str(text_checkpoint), "--text", TEXT * 9, "--output_dir", str(out)])
    printed = capsys.readouterr().out
    whole, pruned = (AutoModelForCausalLM.from_pretrained(path) for path in (text_checkpoint, out))
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(TEXT * 3, return_tensors="pt").input_ids
    for parameter in (*whole.parameters(), *pruned.parameters()):
        # A product's last digit depends on where in memory a matrix begins, and files are mapped as they are.
        parameter.data = parameter.data.clone()
    assert torch.equal(pruned(ids).logits, whole(ids).logits)
    assert f"{pruned.config.num_experts} of 60 experts of each layer are kept" in printed
    assert f"{whole.num_parameters():,} parameters -> {pruned.num_parameters():,}" in printed
    assert "Against the whole model, the logits of" in printed
    assert pruned.config.router_fingerprint in printed
    assert pruned.generation_config.suppress_tokens
    card = (out / "README.md").read_text()
    assert "pruned for a part of its vocabulary" in card
    assert pruned.config.router_fingerprint in card
    weights = load_file(out / "model.safetensors")
    assert weights["model.moe_layers.0.router.centroids"].shape == (pruned.config.num_experts, TINY["hidden_size"])


def test_a_dry_run_reads_tables_only_and_saves_nothing(script, text_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "load_pruned", None)
    before = content(text_checkpoint)
    script.main([str(text_checkpoint), "--text", TEXT, "--dry_run"])
    printed = capsys.readouterr().out
    assert "of 60 experts of each layer are kept" in printed
    assert "experts of a random table" in printed
    assert content(text_checkpoint) == before


def kept_in(printed: str) -> int:
    return int(printed.split(" of 60 experts of each layer")[0].split()[-1])


def test_options_say_what_of_a_text_counts(script, text_checkpoint, capsys, caplog):
    def kept(*options: str) -> int:
        script.main([str(text_checkpoint), "--text", TEXT * 20 + "script", "--dry_run", *options])
        return kept_in(capsys.readouterr().out)

    assert kept("--min_count", "5") < kept() < kept("--also", "zq0189!?") < kept("--all_bytes")
    assert "tokens of single bytes are not in the text" in caplog.text
    caplog.clear()
    kept("--all_bytes")
    assert "single bytes" not in caplog.text


def test_the_script_prunes_translation_models_by_both_texts(script, tmp_path, capsys):
    model = tiny_seq2seq_model(vocab_size=BYTE_LEVEL_SIZE, num_experts=60)
    model.freeze_router()
    model.save_pretrained(tmp_path / "checkpoint")
    byte_level_tokenizer().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "a").write_text("the cat\nthe dog\n")
    (tmp_path / "b").write_text("script\nthe script\n")
    arguments = [str(tmp_path / "checkpoint"), "--text_files", str(tmp_path / "a")]
    assert "name --target_files" in refuse(script.main, [*arguments, "--dry_run"])
    arguments += ["--target_files", str(tmp_path / "b"), "--output_dir", str(tmp_path / "pruned")]
    script.main(arguments)
    printed = capsys.readouterr().out
    assert printed.count("decoder.moe_layers") == 2
    assert "Against the whole model" in printed
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["num_experts"] == kept_in(printed)
    assert len(config["pruned_tokens"]) == 2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "--output_dir, or --dry_run"),
        (["--dry_run", "--output_dir", "new"], "--output_dir, or --dry_run"),
        (["--dry_run", "--min_count", "0"], "--min_count must be >= 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(script, text_checkpoint, capsys, options, complaint):
    with pytest.raises(SystemExit):
        script.main([str(text_checkpoint), "--text", TEXT, *options])
    assert complaint in capsys.readouterr().err


def test_a_text_without_tokens_or_with_those_of_another_model_is_refused(script, text_checkpoint, checkpoint):
    assert "the text is empty" in refuse(script.main, [str(text_checkpoint), "--text", "", "--dry_run"])
    command = [str(checkpoint), "--tokenizer_name", str(text_checkpoint), "--text", "script", "--dry_run"]
    assert "the model has 99: name its own with --tokenizer_name" in refuse(script.main, command)


def test_a_folder_that_is_taken_and_a_checkpoint_without_tokenizer_are_refused(
    script, text_checkpoint, checkpoint, tmp_path
):
    (tmp_path / "file").write_text("")
    options = ["--text", TEXT, "--output_dir"]
    assert "there already and not empty" in refuse(script.main, [str(text_checkpoint), *options, str(tmp_path)])
    assert "no tokenizer loads" in refuse(script.main, [str(checkpoint), *options, str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
