"""What differs on a CUDA device: grouped kernels, decoding, and that routing does not. Run: `make test-gpu`."""

import pytest
import torch
from conftest import random_ids, tiny_model, tiny_seq2seq_model
from torch.testing import assert_close


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


def test_a_frozen_training_step_waits_for_nothing():
    model, ids = wide_model(torch.bfloat16), random_ids().cuda()
    model.freeze_router()
    model.train()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = model(ids, labels=ids).loss
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


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
