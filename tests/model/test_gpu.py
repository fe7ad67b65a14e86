"""What differs on a CUDA device: grouped kernels, waits, CUDA graphs, decoding, and that routing does not. Run: `make test-gpu`."""

from contextlib import contextmanager

import pytest
import torch
from torch.testing import assert_close
from transformers import StaticCache

from helpers.models import random_ids, tiny_model, tiny_seq2seq_model


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def wide_model(dtype=torch.float32):
    """Rows of whole 16 bytes, so that the grouped kernel itself runs."""
    return tiny_model(intermediate_size=48).to("cuda", dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
def test_backends_agree_with_eager_on_cuda(backend, dtype, tolerance):
    model, ids = wide_model(dtype).eval(), random_ids().cuda()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model.set_experts_implementation("eager")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    model.set_experts_implementation(backend)
    actual = model(ids, attention_mask=mask).logits[mask.bool()]
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_a_router_frozen_on_the_cpu_routes_alike_on_cuda():
    model = tiny_model()
    model.freeze_router()
    every_id = torch.arange(99).unsqueeze(0)
    routes, fingerprint = model.route(every_id), model.router_fingerprint()
    model.to("cuda", torch.bfloat16)
    assert torch.equal(model.route(every_id.cuda()).cpu(), routes)
    assert model.router_fingerprint() == fingerprint


def test_cuda_freezes_what_its_evaluation_used():
    model = wide_model().eval()
    every_id = torch.arange(99, device="cuda").unsqueeze(0)
    routes = model.route(every_id)
    model.freeze_router()
    assert torch.equal(model.route(every_id), routes)


def of_stage(stage: int, dtype=torch.bfloat16, backend: str = "grouped_mm"):
    model = wide_model(dtype)
    model.set_experts_implementation(backend)
    if stage == 2:
        model.freeze_router()
    return model


@contextmanager
def no_wait():
    """Let whatever waits for the device raise."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_step_waits_for_nothing(stage, backend, use_cache):
    model, ids = of_stage(stage, backend=backend).train(), random_ids().cuda()
    with no_wait():
        loss = model(ids, labels=ids, use_cache=use_cache).loss
        loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_step_in_mixed_precision_waits_for_nothing(stage):
    model, ids = of_stage(stage, torch.float32).train(), random_ids().cuda()
    with no_wait():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    assert torch.isfinite(loss)


def test_a_training_step_of_encoder_and_decoder_waits_for_nothing():
    model = tiny_seq2seq_model(hidden_size=24, intermediate_size=48).to("cuda", torch.bfloat16).train()
    source, labels = random_ids(3, 9, high=91).cuda(), random_ids(3, 5, high=91).cuda()
    mask = torch.ones_like(source)
    mask[0, 5:] = 0
    with no_wait():
        loss = model(source, attention_mask=mask, labels=labels).loss
        loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_compiled_training_step_has_the_loss_and_the_gradients_of_a_plain_one(stage):
    model, ids = of_stage(stage).train(), random_ids().cuda()
    torch.compiler.reset()
    losses, gradients = [], []
    # The plain pass comes first: transformers installs what records the routing at the first one, which is not compiled.
    for step in (model, torch.compile(model, fullgraph=True)):
        losses.append(step(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        gradients.append({name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert_close(losses[1], losses[0], rtol=2e-2, atol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        error = (gradients[1][name] - gradient).norm()
        assert error <= 0.1 * gradient.norm() + 1e-4, name


def decode(model, step, ids, cache) -> torch.Tensor:
    """Decode the tokens after the fifth, given one at a time: logits `(batch, tokens, vocabulary)`."""
    cache.reset()
    model(ids[:, :5], past_key_values=cache, use_cache=True)
    return torch.cat([step(ids[:, t : t + 1]).clone() for t in range(5, ids.shape[1])], 1)


@pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("stage", [1, 2])
@torch.no_grad()
def test_a_decoding_step_compiles_to_a_cuda_graph(stage, backend):
    model, ids = of_stage(stage, backend=backend).eval(), random_ids(3, 11).cuda()
    cache = StaticCache(config=model.config, max_cache_len=16)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")

    def plain(token):
        return model(token, past_key_values=cache, use_cache=True).logits

    def step(token):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(token, past_key_values=cache, use_cache=True).logits

    expected = decode(model, plain, ids, cache)
    for _ in range(2):  # the first steps warm up and record
        assert_close(decode(model, step, ids, cache), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("stage", [1, 2])
@torch.no_grad()
def test_a_decoding_step_that_a_cuda_graph_holds_decodes_as_it_runs(stage, backend):
    model, ids = of_stage(stage, backend=backend).eval(), random_ids(3, 11).cuda()
    cache, token = StaticCache(config=model.config, max_cache_len=16), ids[:, :1].clone()

    def plain(new_token):
        return model(new_token, past_key_values=cache, use_cache=True).logits

    expected = decode(model, plain, ids, cache)
    # On another stream first, so that libraries are set up before the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cache.reset()
        for _ in range(3):
            plain(token)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = plain(token)

    def replay(new_token):
        token.copy_(new_token)
        graph.replay()
        return logits

    assert_close(decode(model, replay, ids, cache), expected, rtol=1e-2, atol=1e-2)


def test_generation_on_cuda_is_the_same_with_and_without_cache():
    model, ids = wide_model().eval(), random_ids().cuda()
    model.freeze_router()
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_translation_on_cuda_routes_by_the_tables_with_and_without_cache():
    model = tiny_seq2seq_model()
    model.freeze_router()
    model.eval().to("cuda")
    source = random_ids(3, 9).cuda()
    cached, uncached = (
        model.generate(source, num_beams=3, max_new_tokens=12, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    output = model(source, decoder_input_ids=cached, output_router_logits=True)
    sides = [source] * len(output.encoder_expert_indices) + [cached] * len(output.decoder_expert_indices)
    for layer, (used, ids) in enumerate(zip(output.expert_indices, sides, strict=True)):
        assert torch.equal(used, model.route(ids)[layer])
