"""Models as programs: `torch.export`, `torch.jit.trace` and ONNX, with batches and lengths other than the example's."""

import functools
import itertools
import warnings

import pytest
import torch
from torch.testing import assert_close

from helpers.models import random_ids, tiny_classifier, tiny_model, tiny_seq2seq_model


BUILDERS = {
    "language model": functools.partial(tiny_model, num_hidden_layers=1),
    "translation": tiny_seq2seq_model,
    "classifier": tiny_classifier,
}


class Program(torch.nn.Module):
    """Logits and experts of a model, by position: what programs without Python take and return."""

    def __init__(self, kind: str, stage: int, backend: str, **overrides):
        super().__init__()
        self.model = BUILDERS[kind](**overrides).eval()
        if stage == 2:
            self.model.freeze_router()
        self.model.set_experts_implementation(backend)

    def forward(self, input_ids, attention_mask, decoder_input_ids=None):
        targets = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_router_logits=True, **targets
        )
        return outputs.logits, *outputs.expert_indices

    def inputs(self, batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """A batch whose first row is padded."""
        ids = random_ids(batch, length, seed=seed, high=91)
        mask = torch.ones_like(ids)
        ids[0, -2:], mask[0, -2:] = self.model.config.pad_token_id, 0
        if not self.model.config.is_encoder_decoder:
            return ids, mask
        return ids, mask, random_ids(batch, length - 2, seed=seed + 1, high=91)

    def dynamic_shapes(self) -> tuple[dict, ...]:
        batch, length, targets = (torch.export.Dim(name, min=1, max=40) for name in ("batch", "length", "targets"))
        sizes = {0: batch, 1: length}
        return (sizes, sizes, {0: batch, 1: targets}) if self.model.config.is_encoder_decoder else (sizes, sizes)

    def assert_is_computed_by(self, run):
        """Batches of other sizes and other loads, one of which sends all tokens to one expert."""
        for batch, length, seed in ((3, 7, 0), (2, 11, 5), (5, 4, 6), (1, 3, 7)):
            inputs = self.inputs(batch, length, seed)
            self._assert_same(run, inputs)
        ids, *others = self.inputs(3, 7)
        self._assert_same(run, (torch.full_like(ids, 3), *others))

    @torch.no_grad()
    def _assert_same(self, run, inputs):
        for result, right in zip(run(*inputs), self(*inputs), strict=True):
            assert_close(torch.as_tensor(result), right, rtol=1e-4, atol=1e-5)


def exported(program: Program):
    with torch.no_grad():
        return torch.export.export(program, program.inputs(3, 7), dynamic_shapes=program.dynamic_shapes())


def traced(program: Program):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about Python values
        return torch.jit.trace(program, program.inputs(3, 7), check_trace=False)


EXPORTED = list(itertools.product(BUILDERS, [2, 1], ["bigram", "word_embedding", "counts", "cnn", "transformer_1"]))
TRACED = list(itertools.product(BUILDERS, [2, 1], ["grouped_mm", "batched_mm", "eager"]))


def fast_are(cases: list[tuple], *fast: tuple) -> list:
    return [case if case in fast else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("kind", "stage", "router"), fast_are(EXPORTED, ("language model", 2, "bigram")))
def test_an_exported_program_takes_batches_and_lengths_of_any_size(kind, stage, router):
    program = Program(kind, stage, "grouped_mm", distilled_router=router)
    program.assert_is_computed_by(exported(program).module())


@pytest.mark.parametrize(
    ("kind", "stage", "backend"),
    fast_are(
        TRACED, ("language model", 1, "grouped_mm"), ("translation", 2, "batched_mm"), ("classifier", 2, "eager")
    ),
)
def test_a_traced_program_routes_its_own_tokens_and_not_the_example_s(kind, stage, backend):
    program = Program(kind, stage, backend)
    program.assert_is_computed_by(traced(program))


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("stage", [1, 2])
def test_programs_route_each_token_to_several_experts(kind, stage):
    for backend, convert in (("grouped_mm", exported), ("batched_mm", traced)):
        program = Program(kind, stage, backend, num_experts_per_tok=2)
        run = convert(program)
        program.assert_is_computed_by(run.module() if convert is exported else run)


@pytest.mark.parametrize("router", ["bigram", "transformer_1"])
def test_a_router_whose_weights_are_bits_says_that_it_cannot_be_traced(router):
    with pytest.raises(ValueError, match="torch.jit.trace.*torch.export"):
        traced(Program("language model", 2, "grouped_mm", distilled_router=router))


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_frozen_model_routes_alike_in_onnxruntime(kind, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    program = Program(kind, 2, "batched_mm")
    file = tmp_path / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(
            program, program.inputs(3, 7), file, dynamic_shapes=program.dynamic_shapes(), dynamo=True, verbose=False
        )
    session = onnxruntime.InferenceSession(file)
    names = [each.name for each in session.get_inputs()]
    program.assert_is_computed_by(
        lambda *inputs: session.run(None, {n: value.numpy() for n, value in zip(names, inputs, strict=True)})
    )
