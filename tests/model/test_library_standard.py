"""What transformers asks of every model that it ships, of both model families in both stages.

`tests/helpers/scripts/run_transformers_suite.py` runs the library's own tests of the same.
"""

import copy
import functools
import inspect

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from helpers.models import TINY, TINY_SEQ2SEQ, random_ids, tiny_model, tiny_seq2seq_model
from modeling_stablemoe.model.blocks_stablemoe import StableMoEBlock
from modeling_stablemoe.model.versions_stablemoe import CACHE_NAME


BACKENDS = ["batched_mm", "grouped_mm"]

pytestmark = [
    pytest.mark.pairs,
    pytest.mark.parametrize("stage", [1, 2]),
    pytest.mark.parametrize("family", ["causal", "seq2seq"]),
]


@functools.cache
def built(family: str, stage: int):
    # Without an end of sequence, so that all continuations are of one length.
    model = tiny_model(eos_token_id=None) if family == "causal" else tiny_seq2seq_model(eos_token_id=None)
    if stage == 2:
        model.freeze_router()
    return model.eval()


@pytest.fixture
def model(family, stage):
    return copy.deepcopy(built(family, stage))


@pytest.fixture
def inputs(family) -> dict[str, torch.Tensor]:
    """Ids of three sequences, the last of them padded on the left."""
    config = TINY if family == "causal" else TINY_SEQ2SEQ
    ids = random_ids(3, 7, low=3, high=config["vocab_size"])
    mask = torch.ones_like(ids)
    mask[2, :3] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, config["pad_token_id"]), "attention_mask": mask}
    if family == "seq2seq":
        inputs["decoder_input_ids"] = random_ids(3, 5, seed=1, low=3, high=config["vocab_size"])
    return inputs


def labelled(family: str, inputs: dict) -> dict:
    labels = inputs["decoder_input_ids"] if family == "seq2seq" else inputs["input_ids"]
    return {**{key: value for key, value in inputs.items() if key != "decoder_input_ids"}, "labels": labels}


def prompt(inputs: dict) -> dict:
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


def generate(model, inputs: dict, **options) -> torch.Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    return model.generate(**prompt(inputs), **options)


def logits(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def flatten(output) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, ModelOutput):
        output = output.to_tuple()
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in flatten(part)]
    return []


# -- Outputs


def test_a_tuple_holds_what_the_output_holds(model, inputs):
    options = {
        "output_hidden_states": True,
        "output_attentions": True,
        "output_router_logits": True,
        "use_cache": False,
    }
    model.set_attn_implementation("eager")
    with torch.no_grad():
        named, plain = model(**inputs, **options), model(**inputs, **options, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(flatten(named)) == len(flatten(plain)) > 10
    for one, other in zip(flatten(named), flatten(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_hidden_states_and_attentions_keep_their_gradients(family, model, inputs):
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    sides = ["encoder_", "decoder_"] if family == "seq2seq" else [""]
    kept = [outputs[f"{side}{name}"][0] for side in sides for name in ("hidden_states", "attentions")]
    for tensor in kept:
        tensor.retain_grad()
    outputs.logits[:, -1].sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in kept)


def test_each_row_of_a_batch_has_the_logits_it_has_alone(model, inputs):
    together = logits(model, inputs)
    for row in range(len(together)):
        alone = logits(model, {name: values[row : row + 1] for name, values in inputs.items()})
        real = inputs["attention_mask"][row].bool() if "decoder_input_ids" not in inputs else slice(None)
        torch.testing.assert_close(alone[0][real], together[row][real], rtol=1e-4, atol=1e-5)


# -- Weights


def test_the_backbone_loads_from_the_checkpoint_of_its_head_and_the_other_way_round(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "head")
    backbone = type(model.base_model).from_pretrained(tmp_path / "head").eval()
    with torch.no_grad():
        hidden_states = backbone(**inputs).last_hidden_state
    expected = logits(model, inputs)
    torch.testing.assert_close(model.lm_head(hidden_states), expected, rtol=1e-5, atol=1e-6)
    backbone.save_pretrained(tmp_path / "backbone")
    again = type(model).from_pretrained(tmp_path / "backbone").eval()  # the head is the embedding
    torch.testing.assert_close(logits(again, inputs), expected, rtol=1e-5, atol=1e-6)


def test_a_larger_vocabulary_keeps_the_logits_of_old_tokens(family, model, inputs):
    before, vocab_size = logits(model, inputs), model.config.vocab_size
    model.resize_token_embeddings(vocab_size + 10)
    assert model.config.vocab_size == vocab_size + 10
    after = logits(model, inputs)
    torch.testing.assert_close(after[..., :vocab_size], before, rtol=1e-5, atol=1e-6)
    new = {**inputs, "input_ids": torch.full_like(inputs["input_ids"], vocab_size + 9)}
    assert logits(model, new).isfinite().all()
    model.resize_token_embeddings(vocab_size)
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-5, atol=1e-6)


# -- Compiled


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_compiles_to_one_graph_with_every_backend_of_the_experts(family, model, inputs, backend):
    model.set_experts_implementation(backend)
    expected = logits(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, inputs), expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.slow
def test_a_compiled_training_step_has_the_loss_and_the_gradients_of_a_plain_one(family, model, inputs):
    if family == "seq2seq":
        model.config.label_smoothing = 0.0
    # The backward pass of grouped_mm that transformers has for CPUs asks for loads, which breaks the graph.
    model.set_experts_implementation("batched_mm")
    batch = labelled(family, inputs)
    losses, gradients = [], []
    # The plain pass comes first: transformers installs what records the routing at the first one, which is not compiled.
    for each in (model.train(), torch.compile(model, fullgraph=True, backend="aot_eager")):
        losses.append(each(**batch).loss)
        losses[-1].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


# -- Generation


@pytest.mark.slow
def test_generation_with_a_compiled_forward_pass_continues_as_without(model, inputs):
    expected = generate(model, inputs)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    generated = generate(model, inputs, cache_implementation="static", disable_compile=True)
    torch.compiler.reset()
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("assistant", ["same", "other"])
def test_assisted_decoding_gives_the_tokens_of_greedy_decoding(family, stage, model, inputs, assistant):
    alone = {name: values[:1] for name, values in inputs.items()}  # transformers assists one sequence at a time
    helper = model if assistant == "same" else built(family, 3 - stage)
    helper = copy.deepcopy(helper)
    helper.generation_config.num_assistant_tokens = 3
    helper.generation_config.assistant_confidence_threshold = 0.0
    assisted = generate(model, alone, assistant_model=helper, max_new_tokens=10)
    assert torch.equal(assisted, generate(model, alone, max_new_tokens=10))


def test_a_generation_in_two_parts_over_one_cache_gives_the_same_tokens(family, model, inputs):
    alone = {name: values[:1] for name, values in inputs.items()}
    whole = generate(model, alone, max_new_tokens=6)
    first = generate(model, alone, max_new_tokens=3, return_dict_in_generate=True)
    options = {"past_key_values": first.past_key_values, "max_new_tokens": 3, "do_sample": False}
    if family == "seq2seq":
        mask = torch.ones_like(first.sequences)
        second = model.generate(
            **prompt(alone), decoder_input_ids=first.sequences, decoder_attention_mask=mask, **options
        )
    else:
        second = model.generate(first.sequences, attention_mask=torch.ones_like(first.sequences), **options)
    assert torch.equal(second, whole)


def test_signatures_name_the_cache_as_generate_does_and_as_tracers_find_it_in_the_code(model):
    """fx tracers take arguments from the signature and call what `inspect.unwrap` finds."""
    for module in model.modules():
        shown = inspect.signature(module.forward).parameters
        called = inspect.signature(inspect.unwrap(module.forward).__get__(module)).parameters
        assert called.keys() <= shown.keys()
        if isinstance(module, PreTrainedModel) and "cache" in called:
            assert CACHE_NAME in shown


def test_block_wise_programs_find_the_blocks_alone(model):
    """auto-round takes what is called a `ModuleList`, by its class's name, for a chain of blocks."""
    lists = [module for module in model.modules() if type(module).__name__ == "ModuleList"]
    assert lists
    assert all(isinstance(block, StableMoEBlock) for blocks in lists for block in blocks)
