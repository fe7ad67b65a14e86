"""The authors' fairseq checkpoints: same logits, same routing, and no file that is not what it should be."""

import pickle
import sys
from argparse import Namespace

import fairseq_reference as fairseq
import pytest
import torch
from conftest import random_ids
from test_checkpoints_loading import run_without_package
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from workplaces import load_script, refuse

from modeling_stablemoe.convert.fairseq_checkpoints import convert_fairseq_checkpoint


convert_fairseq = load_script("convert_fairseq")
IDS = random_ids(3, fairseq.LENGTH, low=4, high=fairseq.VOCAB)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
SETTINGS = {
    "stage 2": {},
    "sinusoidal": {"decoder_learned_pos": False},
    "untied": {"share_decoder_input_output_embed": False, "no_scale_embedding": True},
    "post-norm, gelu": {"decoder_normalize_before": False, "activation_fn": "gelu"},
    "bigram": {"distilled_model": "bigram_emb"},
    "cnn": {"distilled_model": "cnn"},
    "two MoE layers": {"decoder_layers": 6, "moe_layers": 2},
    "BASE": {"assignment_algorithm": "BA", "distill_assignment": False},
    "BASE, distilled": {"assignment_algorithm": "BA"},
    "Switch": {"moe_type": "switch_layer", "distill_assignment": False},
    "Hash": {"moe_type": "hash_layer", "distill_assignment": False},
    "dense": {"moe_layers": 0},
}


@pytest.fixture
def checkpoint(tmp_path):
    return fairseq.write_checkpoint(tmp_path / "saved", fairseq.rank_states())


def rewrite(checkpoint, rank: int, edit):
    """Change the content of a rank's file."""
    path = checkpoint.with_name(f"checkpoint_best-rank-{rank}.pt")
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


def assert_computes_the_same(model, states, **options):
    with torch.no_grad():
        outputs = model(IDS, output_router_logits=True)
    for row, ids in enumerate(IDS):
        logits, experts = fairseq.forward(states, ids, **options)
        torch.testing.assert_close(outputs.logits[row].double(), logits, **CLOSE)
        assert [layer[row].tolist() for layer in outputs.expert_indices or []] == experts
        if model.config.num_moe_layers:
            assert model.route(IDS[row : row + 1])[:, 0].tolist() == experts


@pytest.mark.parametrize("name", SETTINGS)
def test_the_converted_model_computes_and_routes_as_the_authors_code(name, tmp_path):
    options = SETTINGS[name]
    states = fairseq.rank_states(1 if name == "dense" else fairseq.RANKS, **options)
    conversion = convert_fairseq_checkpoint(fairseq.write_checkpoint(tmp_path / "saved", states, **options))
    assert_computes_the_same(conversion.model, states, **options)
    frozen = name == "Hash" or (name != "dense" and {**fairseq.OPTIONS, **options}["distill_assignment"])
    assert conversion.model.routing_stage == (2 if frozen else 1)
    assert len(conversion.files) == len(states)


def test_before_its_transition_a_checkpoint_stays_in_stage_1_and_trains_by_the_backbone_router(tmp_path):
    states = fairseq.rank_states()
    model = convert_fairseq_checkpoint(fairseq.write_checkpoint(tmp_path / "saved", states, num_updates=5999)).model
    assert model.routing_stage == 1
    assert_computes_the_same(model, states)  # evaluation routes by the distilled router
    model.config.expert_capacity_factor = None
    for layer in model.model.moe_layers:
        layer.dispatch.capacity_factor = None
    with torch.no_grad():
        outputs = model.train()(IDS, output_router_logits=True)
    for row, ids in enumerate(IDS):
        logits, [experts] = fairseq.forward(states, ids, evaluates=False)
        assert outputs.expert_indices[0][row].tolist() == experts
        torch.testing.assert_close(outputs.logits[row].double(), logits, **CLOSE)


@pytest.mark.parametrize(("updates", "stage", "expected"), [(5999, "2", 2), (6000, "auto", 2), (60000, "1", 1)])
def test_stage_follows_the_updates_unless_it_is_said(updates, stage, expected, tmp_path):
    saved = fairseq.write_checkpoint(tmp_path / "saved", fairseq.rank_states(), num_updates=updates)
    assert convert_fairseq_checkpoint(saved, stage).model.routing_stage == expected


def test_older_options_in_one_namespace_and_float16_weights_convert_to_the_same_numbers(tmp_path):
    states = fairseq.rank_states(dtype=torch.float16)
    conversion = convert_fairseq_checkpoint(fairseq.write_checkpoint(tmp_path / "saved", states, legacy=True))
    assert {p.dtype for p in conversion.model.parameters() if p.is_floating_point()} == {torch.float32}
    assert_computes_the_same(conversion.model, states)
    assert any("token ids" in note for note in conversion.notes)
    config = conversion.model.config
    assert (config.balance_loss_coef, config.distillation_loss_coef, config.expert_capacity_factor) == (0.3, 0.3, 2.0)


def test_several_experts_in_a_file_are_numbered_rank_by_rank(tmp_path):
    changes = {"assignment_algorithm": "BA", "distill_assignment": False}
    states = fairseq.rank_states(**changes)

    def pair(first: dict, second: dict) -> dict:
        merged = {name.replace("expert_network", "experts.0"): tensor for name, tensor in first.items()}
        return merged | {n.replace("expert_network", "experts.1"): t for n, t in second.items() if "_network" in n}

    merged = [pair(*states[:2]), pair(*states[2:])]
    saved = fairseq.write_checkpoint(tmp_path / "saved", merged, **changes)
    assert_computes_the_same(convert_fairseq_checkpoint(saved).model, states, **changes)


@pytest.mark.parametrize("rows", [40, 50])
def test_a_routing_embedding_of_another_vocabulary_keeps_the_rows_of_its_tokens(rows, tmp_path):
    states = fairseq.rank_states(routing_rows=rows)
    conversion = convert_fairseq_checkpoint(fairseq.write_checkpoint(tmp_path / "saved", states))
    assert any(f"has {rows} rows for a vocabulary of {fairseq.VOCAB}" in note for note in conversion.notes)
    seen = torch.arange(min(rows, fairseq.VOCAB))
    expected = fairseq.forward(states, seen[: fairseq.LENGTH])[1][0]
    assert conversion.model.route(seen.unsqueeze(0))[0, 0, : fairseq.LENGTH].tolist() == expected
    unseen = torch.arange(fairseq.VOCAB)[rows:]
    assert not conversion.model.route(unseen.unsqueeze(0)).any()


# What is refused


def drop(name):
    return lambda content: content["model"].pop(name)


def put(name, tensor):
    return lambda content: content["model"].update({name: tensor})


def option(**changes):
    return lambda content: vars(content["cfg"]["model"]).update(changes)


FAULTS = {
    "a tensor is missing": (1, drop("decoder.layers.0.fc1.bias"), ["decoder.layers.0.fc1.bias", "rank-1"]),
    "an expert's tensor is missing": (3, drop("decoder.layers.1.expert_network.0.ff1.bias"), ["0.ff1.bias", "rank-3"]),
    "a tensor is left over": (2, put("decoder.layers.0.new", torch.zeros(2)), ["decoder.layers.0.new", "rank-2"]),
    "a shared tensor has another shape": (
        0,
        put("decoder.layers.0.fc1.bias", torch.zeros(3)),
        ["decoder.layers.0.fc1.bias", "[3]", "[17]"],
    ),
    "an expert's tensor has another shape": (
        2,
        put("decoder.layers.1.expert_network.0.norm.bias", torch.zeros(3)),
        ["expert_network.0.norm.bias", "rank-2", "[3]"],
    ),
    "a file is of another run": (
        3,
        put("decoder.layer_norm.bias", torch.ones(12)),
        ["decoder.layer_norm.bias", "rank-3"],
    ),
    "a file is of another step": (
        1,
        lambda content: content["optimizer_history"][-1].update(num_updates=10),
        ["60000", "10", "rank-1"],
    ),
    "the head is not tied": (0, put("decoder.output_projection.weight", torch.zeros(43, 12)), ["output_projection"]),
    "a layer is missing": (
        0,
        lambda content: [content["model"].pop(n) for n in list(content["model"]) if n.startswith("decoder.layers.0.")],
        ["`decoder.layers.0`"],
    ),
    "the sizes are not said": (
        0,
        lambda content: vars(content["cfg"]["model"]).pop("decoder_embed_dim"),
        ["embed_dim"],
    ),
    "the stage is not said": (0, lambda content: content.pop("optimizer_history"), ["num_updates", "stage"]),
    "a router of one number": (
        0,
        put("decoder.layers.1.expert_centroids", torch.zeros(3)),
        ["expert_centroids", "[3]"],
    ),
    "a factor of words": (0, option(capacity_factor="two"), ["capacity_factor", "two"]),
    "no options": (0, lambda content: content.update(cfg=None), ["`args`", "`cfg`"]),
    "no model": (0, lambda content: content.pop("model"), ["`model`"]),
    "a Transformer chooses the expert": (0, option(distilled_model="trm1l"), ["distilled_model", "trm1l"]),
    "nothing is distilled": (0, option(distill_assignment=False), ["distill_assignment"]),
    "another assignment": (0, option(assignment_algorithm="GBA"), ["assignment_algorithm", "GBA"]),
    "an adaptive softmax": (0, option(adaptive_softmax_cutoff="10,20"), ["adaptive_softmax_cutoff"]),
    "dense experts": (0, option(moe_type="dense_base_layer"), ["moe_type", "dense_base_layer"]),
    "blocks are missing": (0, option(decoder_layers=3), ["decoder_layers", "3", "2"]),
    "an encoder": (0, put("encoder.version", torch.zeros(1)), ["encoder"]),
    "MoE layers side by side": (0, lambda content: _side_by_side(content), ["[1, 2]"]),
}


def _side_by_side(content):
    model = content["model"]
    for name in [name for name in model if name.startswith("decoder.layers.2.")]:
        model[name.replace("layers.2", "layers.3")] = model.pop(name)
    model |= {
        n.replace("layers.1", "layers.2"): t for n, t in list(model.items()) if n.startswith("decoder.layers.1.")
    }
    vars(content["cfg"]["model"])["moe_layers"] = 2


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_error_that_names_it(fault, checkpoint, tmp_path):
    rank, edit, mentions = FAULTS[fault]
    rewrite(checkpoint, rank, edit)
    message = refuse(convert_fairseq.main, [str(checkpoint), "--output_dir", str(tmp_path / "out")])
    assert message.startswith("error: ")
    assert not [text for text in mentions if text not in message], message
    assert not (tmp_path / "out").exists()


def test_a_missing_rank_is_named_and_so_is_one_too_many(checkpoint):
    extra = checkpoint.with_name("checkpoint_best-rank-4.pt")
    extra.write_bytes(b"")
    with pytest.raises(ValueError, match="rank-4"):
        convert_fairseq_checkpoint(checkpoint)
    extra.unlink()
    checkpoint.with_name("checkpoint_best-rank-2.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint_best-rank-2.pt is missing"):
        convert_fairseq_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="neither"):
        convert_fairseq_checkpoint(checkpoint.with_name("checkpoint_last.pt"))


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (eval, ("__import__('sys').modules.__setitem__('harmed_by_a_pickle', True)",))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(rank, zipped, checkpoint):
    path = checkpoint.with_name(f"checkpoint_best-rank-{rank}.pt")
    content = torch.load(path, weights_only=False)
    content["cfg"]["model"] = Malicious()
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="was not loaded: it holds (builtins.eval|more)") as refused:
        convert_fairseq_checkpoint(checkpoint)
    assert "\n" not in str(refused.value)
    assert "harmed_by_a_pickle" not in sys.modules


@pytest.mark.parametrize("damage", ["cut off", "empty", "text", "plain pickle of a Namespace"])
def test_a_damaged_file_is_refused(damage, checkpoint):
    path = checkpoint.with_name("checkpoint_best-rank-1.pt")
    contents = {
        "cut off": path.read_bytes()[:2000],
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1",
        "plain pickle of a Namespace": pickle.dumps(Namespace(model={})),
    }
    path.write_bytes(contents[damage])
    with pytest.raises(ValueError, match="checkpoint_best-rank-1.pt"):
        convert_fairseq_checkpoint(checkpoint)


def test_files_of_torch_before_1_6_convert_too(checkpoint):
    expected = convert_fairseq_checkpoint(checkpoint).model
    for rank in range(fairseq.RANKS):
        path = checkpoint.with_name(f"checkpoint_best-rank-{rank}.pt")
        torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    model = convert_fairseq_checkpoint(checkpoint).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


# The command and what it writes


def write_dictionary(path, symbols):
    path.write_text("".join(f"{symbol} {100 - i}\n" for i, symbol in enumerate(symbols)))
    return path


def test_the_command_writes_a_model_that_the_auto_classes_load(checkpoint, tmp_path, capsys):
    words = write_dictionary(tmp_path / "dict.txt", [f"word{i}" for i in range(fairseq.VOCAB - 4)])
    output = tmp_path / "out"
    convert_fairseq.main([str(checkpoint), "--dict", str(words), "--output_dir", str(output)])
    printed = capsys.readouterr().out
    assert "stage: 2, frozen" in printed
    assert "4 files" in printed
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.router_fingerprint in printed
    assert_computes_the_same(model, fairseq.rank_states())
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("word0  unheard word38\n")["input_ids"]
    assert ids == [2, 4, 3, 42]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "word0 word38"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, model.config.pad_token_id) == (1, 2, 1)
    prompt = tokenizer("word3 word4", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] <= 6
    again = refuse(convert_fairseq.main, [str(checkpoint), "--output_dir", str(output)])
    assert "not empty" in again


def test_the_written_model_loads_where_the_package_is_not_installed(checkpoint, tmp_path):
    output = tmp_path / "out"
    convert_fairseq.main([str(checkpoint), "--output_dir", str(output)])
    code = """
        import sys
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        ids = torch.load(sys.argv[2] + "/ids.pt")
        with torch.no_grad():
            torch.save([model(ids).logits, model.route(ids)], sys.argv[2] + "/facts.pt")
    """
    torch.save(IDS[:1], tmp_path / "ids.pt")
    run_without_package(code, tmp_path / "elsewhere", output, tmp_path)
    logits, routes = torch.load(tmp_path / "facts.pt")
    expected, experts = fairseq.forward(fairseq.rank_states(), IDS[0])
    torch.testing.assert_close(logits[0].double(), expected, **CLOSE)
    assert routes[:, 0].tolist() == experts


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(checkpoint, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    convert_fairseq.main([str(checkpoint), "--dry_run", "--dtype", "float16", "--stage", "1"])
    printed = capsys.readouterr().out
    assert '"moe_layer_positions": [1]' in printed
    assert "float16" in printed
    assert "stage: 1, not frozen" in printed
    assert "Nothing was written" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_half_precision_keeps_the_routing(checkpoint, tmp_path):
    folders = []
    for dtype in ("float32", "float16", "bfloat16"):
        folders.append(tmp_path / dtype)
        convert_fairseq.main([str(checkpoint), "--dtype", dtype, "--output_dir", str(folders[-1])])
    models_ = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    assert [model.dtype for model in models_] == [torch.float32, torch.float16, torch.bfloat16]
    assert len({model.router_fingerprint() for model in models_}) == 1


def train_bpe() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=30, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat that the cat saw"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.mark.parametrize("symbols", ["ids", "pieces"])
def test_a_dictionary_of_a_byte_pair_encoding_gives_its_tokens_the_ids_of_the_dictionary(symbols, tmp_path):
    bpe = train_bpe()
    pieces = sorted(set(bpe.get_vocab()) - {"<|endoftext|>"}, key=lambda piece: hash_of(piece))
    names = [str(bpe.convert_tokens_to_ids(piece)) if symbols == "ids" else piece for piece in pieces]
    path = write_dictionary(tmp_path / "dict.txt", [*names, "madeupword0000"])
    bpe.save_pretrained(tmp_path / "bpe")
    states = [_cut(state, len(pieces) + 5) for state in fairseq.rank_states()]
    checkpoint = fairseq.write_checkpoint(tmp_path / "saved", states)
    arguments = [str(checkpoint), "--dict", str(path), "--output_dir", str(tmp_path / "out")]
    convert_fairseq.main([*arguments, "--bpe_tokenizer", str(tmp_path / "bpe")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the cat sat on that mat"
    expected = [4 + pieces.index(piece) for piece in bpe.tokenize(text)]
    assert tokenizer(text)["input_ids"] == [2, *expected]
    assert len(expected) < len(text)
    assert tokenizer.decode([2, *expected], skip_special_tokens=True) == text
    assert len(tokenizer) == len(pieces) + 5


def hash_of(piece: str) -> int:
    return sum(ord(letter) * 7**i for i, letter in enumerate(piece)) % 1009


def _cut(state: dict, size: int) -> dict:
    return {name: tensor[:size] if tensor.shape[:1] == (fairseq.VOCAB,) else tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["12 3"] * 2, "twice"),
        ([f"{i} 1" for i in range(39)], "--bpe_tokenizer"),
        (["word 1"], "5 symbols"),
        (["word"], "line 1"),
    ],
)
def test_a_dictionary_that_gives_no_tokenizer_is_refused(lines, message, checkpoint, tmp_path):
    (tmp_path / "dict.txt").write_text("\n".join(lines) + "\n")
    arguments = [str(checkpoint), "--dict", str(tmp_path / "dict.txt"), "--output_dir", str(tmp_path / "out")]
    assert message in refuse(convert_fairseq.main, arguments)
    assert not (tmp_path / "out").exists()
