"""Experts that are kept off the device: the same outputs, fetched ahead, and what is refused."""

import threading
import time

import accelerate
import pytest
import torch
from torch.testing import assert_close
from transformers import TextGenerationPipeline

from helpers.dense_models import word_tokenizer
from helpers.loaders import on_disk
from helpers.models import random_ids, tiny_config, tiny_model, tiny_seq2seq_model
from modeling_stablemoe import (
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoEForSequenceClassification,
    StableMoEModel,
    experts_on_disk,
    offload_experts,
)
from modeling_stablemoe.model.layer_stablemoe import moe_layers_of
from modeling_stablemoe.offload.expert_store import MemoryRows


pytestmark = pytest.mark.pairs


IDS = random_ids(4, 20)
MASK = torch.ones_like(IDS)
MASK[0, :6] = 0
BACKENDS = ("eager", "grouped_mm", "batched_mm")


def save_frozen(folder, model, **options):
    model.freeze_router()
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two MoE layers, one before the first block, in several files.

    Every row is whole cache lines: a CPU's product rounds its last bit by where a row starts, and slots are elsewhere.
    """
    model = tiny_model(moe_layer_positions=[0, 2], intermediate_size=48)
    return save_frozen(tmp_path_factory.mktemp("causal"), model, max_shard_size="20KB")


@pytest.fixture
def model(checkpoint):
    return load(checkpoint, "memory")


def load(folder, place, model_class=StableMoEForCausalLM, **options):
    if place == "disk":
        options["device_map"] = experts_on_disk(folder, model_class)
    return aligned(model_class.from_pretrained(folder, **options))


def load_offloaded(folder, place="disk", experts_on_device=2, **options):
    model = load(folder, place, **options)
    offload_experts(model, device="cpu", experts_on_device=experts_on_device)
    return model


def aligned(model):
    """Move tensors out of the mapped file, where they start anywhere: a product's last bit depends on it."""
    for values in (*model.parameters(), *model.buffers()):
        values.data = values.data.clone()
    return model


def logits(model, ids=IDS, mask=MASK):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def distinct_experts(model, ids) -> list[int]:
    return [len(layer.unique()) for layer in model.route(ids)]


# The same outputs


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("experts_on_device", [1, 2, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_the_same_bits(checkpoint, model, backend, experts_on_device, place):
    model.set_experts_implementation(backend)
    offloaded = load_offloaded(checkpoint, place, experts_on_device=experts_on_device, experts_implementation=backend)
    for _ in range(2):  # into empty slots, and into full ones
        assert torch.equal(logits(offloaded), logits(model))
        assert torch.equal(logits(offloaded, IDS[:1, :1], MASK[:1, -1:]), logits(model, IDS[:1, :1], MASK[:1, -1:]))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}, {"do_sample": True, "top_k": 5}],
    ids=["beams", "static cache", "sampling"],
)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_generation_is_the_same(checkpoint, model, place, options):
    offloaded = load_offloaded(checkpoint, place)
    torch.manual_seed(1)
    expected = model.generate(IDS, attention_mask=MASK, max_new_tokens=8, **options)
    torch.manual_seed(1)
    assert torch.equal(offloaded.generate(IDS, attention_mask=MASK, max_new_tokens=8, **options), expected)


@pytest.mark.parametrize("k", [1, 2])
def test_encoder_and_decoder_are_offloaded(tmp_path, k):
    save_frozen(tmp_path, tiny_seq2seq_model(num_experts_per_tok=k))
    whole = load(tmp_path, "memory", StableMoEForConditionalGeneration)
    offloaded = load(tmp_path, "disk", StableMoEForConditionalGeneration)
    offload = offload_experts(offloaded, device="cpu", experts_on_device=2)
    source = random_ids(3, 9, low=3, high=91)
    expected = whole.generate(source, num_beams=2, max_new_tokens=6)
    assert torch.equal(offloaded.generate(source, num_beams=2, max_new_tokens=6), expected)
    assert offload.statistics.layer_passes == 1 + 2 * (expected.shape[1] - 1)


def test_experts_of_a_variant_are_read_from_its_file(checkpoint, model, tmp_path):
    tiny_model(seed=1, moe_layer_positions=[0, 2], intermediate_size=48).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="own")
    offloaded = load_offloaded(tmp_path, variant="own")
    assert torch.equal(logits(offloaded), logits(model))


@pytest.mark.parametrize("model_class", [StableMoEForSequenceClassification, StableMoEModel])
def test_other_heads_and_none(checkpoint, model_class):
    torch.manual_seed(0)
    whole = load(checkpoint, "memory", model_class)
    torch.manual_seed(0)  # the classifier's head is new
    offloaded = load(checkpoint, "disk", model_class)
    offload_experts(offloaded, device="cpu", experts_on_device=3)
    with torch.no_grad():
        assert torch.equal(offloaded(IDS, attention_mask=MASK)[0], whole(IDS, attention_mask=MASK)[0])


@pytest.mark.parametrize("options", [{"router_type": "hash"}, {"distilled_router": "bigram"}], ids=["hash", "context"])
def test_every_routing_that_is_frozen_is_known_ahead(options):
    model = tiny_model(**options).eval()
    if model.routing_stage == 1:
        model.freeze_router()
    expected = model.generate(IDS, max_new_tokens=5)
    offload = offload_experts(model, device="cpu", experts_on_device=5)
    assert torch.equal(model.generate(IDS, max_new_tokens=5), expected)
    assert offload.statistics.hit_rate == 1


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", pytest.param("device_map", marks=on_disk)])
def test_models_that_accelerate_has_offloaded(model, checkpoint, tmp_path, how):
    """All of it, embeddings and blocks too."""
    expected = logits(model)
    if how == "device_map":
        places = {"model": "disk", "lm_head": "disk"}
        model = StableMoEForCausalLM.from_pretrained(checkpoint, device_map=places, offload_folder=tmp_path)
    elif how == "cpu_offload":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
    assert model.model.embed_tokens.weight.is_meta
    offload_experts(model, device="cpu", experts_on_device=2)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_close(logits(model), expected)


def test_adapters_of_blocks_stay(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = adapted.generate(input_ids=IDS, max_new_tokens=5)
    offload = offload_experts(adapted, device="cpu", experts_on_device=2)
    assert torch.equal(adapted.generate(input_ids=IDS, max_new_tokens=5), expected)
    offload.remove()
    assert torch.equal(adapted.generate(input_ids=IDS, max_new_tokens=5), expected)


def test_adapters_of_experts_are_refused(model):
    peft = pytest.importorskip("peft")
    targets = [name for name, _ in model.named_parameters() if name.endswith("sublayers.0.up_proj")]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_parameters=targets, lora_dropout=0.0)).eval()
    with pytest.raises(ValueError, match="have adapters: merge them"):
        offload_experts(adapted, experts_on_device=2)


def test_pipelines_take_an_offloaded_model(model):
    offload_experts(model, device="cpu", experts_on_device=2)
    generator = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
    assert generator("w2 w3", max_new_tokens=3)[0]["generated_text"].startswith("w2 w3")


def test_embeddings_in_place_of_ids(model):
    embeddings = model.get_input_embeddings()(IDS).detach()
    expected = model(inputs_embeds=embeddings).logits
    offload_experts(model, device="cpu", experts_on_device=2)
    assert torch.equal(model(inputs_embeds=embeddings).logits, expected)


def test_bfloat16_is_read_from_a_checkpoint_of_float32(checkpoint):
    whole = load(checkpoint, "memory", dtype=torch.bfloat16)
    offloaded = load_offloaded(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in offloaded.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert torch.equal(logits(offloaded), logits(whole))


def test_a_cast_and_another_backend_reach_offloaded_experts(model):
    offload_experts(model, device="cpu", experts_on_device=2)
    expected = logits(model)
    for backend in BACKENDS:
        model.set_experts_implementation(backend)
        assert_close(logits(model), expected)
    assert_close(logits(model.double()).float(), expected)


def test_other_tables_need_other_experts(model):
    table = torch.randint(5, (2, 99), generator=torch.Generator().manual_seed(3))
    offload_experts(model, device="cpu", experts_on_device=3)
    before = logits(model)
    model.set_routing_tables(table)
    rerouted = logits(model)
    assert not torch.equal(rerouted, before)
    model.model.moe_layers[0].fetch_experts = None  # nothing is announced
    assert torch.equal(logits(model), rerouted)


def test_threads_do_not_mix_up_experts(model):
    batches = [random_ids(2, 9, seed=seed) for seed in range(3)]
    expected = [logits(model, ids, None) for ids in batches]
    offload_experts(model, device="cpu", experts_on_device=2)
    wrong = []

    def work(ids, right):
        wrong.extend(turn for turn in range(5) if not torch.equal(logits(model, ids, None), right))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# What is fetched, and when


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_every_expert_is_known_ahead(checkpoint, place):
    model = load(checkpoint, place)
    needed = distinct_experts(model, IDS)
    offload = offload_experts(model, device="cpu", experts_on_device=max(needed))
    logits(model, mask=None)
    statistics = offload.statistics
    assert (statistics.layer_passes, statistics.requests, statistics.resident) == (2, sum(needed), 0)
    assert statistics.hits == statistics.requests
    one = sum(
        p[0].numel() * 4 for p in StableMoEForCausalLM(model.config).model.moe_layers[0].expert_stack.parameters()
    )
    assert statistics.bytes_moved == sum(needed) * one
    logits(model, mask=None)
    assert statistics.resident == sum(needed)
    assert statistics.bytes_moved == sum(needed) * one  # they were there
    assert "100.0 % there or on their way in time" in str(offload)
    statistics.reset()
    assert (statistics.requests, statistics.bytes_moved, statistics.seconds_waited) == (0, 0, 0)


def test_all_layers_are_announced_before_the_first_block_runs(model):
    offload = offload_experts(model, device="cpu", experts_on_device=5)
    fetched = []
    stacks = [layer.expert_stack for layer in moe_layers_of(model).values()]
    block = model.model.layers[0]
    block.register_forward_pre_hook(lambda *_: fetched.append([len(stack.slot_of) for stack in stacks]))
    logits(model, mask=None)
    assert fetched == [distinct_experts(model, IDS)]
    assert offload.statistics.hit_rate == 1


@pytest.mark.parametrize("experts_on_device", [2, 5])
def test_layers_wait_for_slow_reads(model, monkeypatch, experts_on_device):
    expected = logits(model)
    offload = offload_experts(model, device="cpu", experts_on_device=experts_on_device)
    read = MemoryRows.read

    def slowly(rows, row, target):
        time.sleep(0.002)
        read(rows, row, target)

    monkeypatch.setattr(MemoryRows, "read", slowly)
    assert torch.equal(logits(model), expected)
    assert offload.statistics.seconds_waited > 0.01


@pytest.mark.parametrize(
    ("passes", "fetched"),
    [
        ([[2], [3], [2], [4], [2]], 3),  # what was needed longest ago makes room
        ([[3], [4], [5, 3]], 3),  # what is needed now does not, were it there for longest: 5 is sent to expert 0
        ([[2], [7], [12]], 1),  # one expert
        ([[2, 3, 4], [4]], 3),  # the last wave stays
    ],
)
def test_experts_stay_until_there_is_need_for_room(passes, fetched):
    model = tiny_model().eval()
    model.set_routing_tables((torch.arange(99) % 5).unsqueeze(0))
    expected = [logits(model, torch.tensor([ids]), None) for ids in passes]
    offload = offload_experts(model, device="cpu", experts_on_device=2)
    for ids, right in zip(passes, expected, strict=True):
        assert_close(logits(model, torch.tensor([ids]), None), right)
    one = sum(p[0].nbytes for p in model.model.moe_layers[0].expert_stack.slots.parameters())
    assert offload.statistics.bytes_moved == fetched * one


def test_what_is_not_announced_is_a_miss(model):
    needed = distinct_experts(model, IDS)
    offload = offload_experts(model, device="cpu", experts_on_device=5)
    for layer in moe_layers_of(model).values():
        layer.fetch_experts = None
    logits(model, mask=None)
    assert (offload.statistics.requests, offload.statistics.hits) == (sum(needed), 0)
    assert offload.statistics.hit_rate == 0


def test_too_few_slots_are_worked_through_in_waves(model):
    offload = offload_experts(model, device="cpu", experts_on_device=2)
    logits(model, mask=None)
    assert offload.statistics.waves == sum(distinct_experts(model, IDS))
    assert 0 < offload.statistics.hit_rate < 1


def test_padding_needs_no_expert(model):
    offload = offload_experts(model, device="cpu", experts_on_device=5)
    padded = torch.cat([torch.full((1, 30), 1), IDS[:1, :1]], dim=1)
    logits(model, padded, (padded != 1).long())
    assert offload.statistics.requests == 2  # one token in two layers


def test_only_slots_are_in_memory(checkpoint):
    whole = load(checkpoint, "memory")
    experts = sum(p.nbytes for layer in whole.model.moe_layers for p in layer.expert_stack.parameters())
    offloaded = load(checkpoint, "disk")
    offload_experts(offloaded, device="cpu", max_bytes=experts // 2)
    assert offloaded.get_memory_footprint() == whole.get_memory_footprint() - experts + 2 * experts // 5
    assert not any(parameter.is_meta for parameter in offloaded.parameters())


# Errors


def test_what_cannot_be_offloaded_is_refused(model, checkpoint):
    with pytest.raises(ValueError, match=r"stage 1.*`freeze_router\(\)` first"):
        offload_experts(tiny_model(), experts_on_device=2)
    with pytest.raises(ValueError, match="no MoE layer of this package"):
        offload_experts(StableMoEForCausalLM(tiny_config(moe_layer_positions=[])), experts_on_device=2)
    with pytest.raises(ValueError, match="one of `experts_on_device` and `max_bytes`"):
        offload_experts(model)
    for count in (0, 6):
        with pytest.raises(ValueError, match=rf"must be in \[1, 5\], got {count}"):
            offload_experts(model, experts_on_device=count)
    with pytest.raises(ValueError, match=r"`max_bytes` is 100, but one expert of each of the 2 MoE layers takes \d+"):
        offload_experts(model, max_bytes=100)
    with pytest.raises(ValueError, match=r"meta device.*experts_on_disk"):
        offload_experts(tiny_frozen_on_meta(model), experts_on_device=1)
    with pytest.raises(ValueError, match="`model_class` must be one of"):
        experts_on_disk(checkpoint, torch.nn.Linear)
    assert torch.equal(logits(model), logits(load(checkpoint, "memory")))  # as it was


def tiny_frozen_on_meta(model):
    for layer in (other := StableMoEForCausalLM(model.config)).model.moe_layers:
        layer.frozen_router.is_frozen = True
        layer.expert_stack.to("meta")
    return other


def test_an_offloaded_model_is_neither_trained_nor_saved_nor_offloaded_again(model, tmp_path):
    offload = offload_experts(model, device="cpu", experts_on_device=2)
    with pytest.raises(ValueError, match=r"training mode: call `model\.eval\(\)`"):
        model.train()(IDS)
    model.eval()
    with pytest.raises(ValueError, match=r"state dict would lack them.*`remove\(\)`"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="state dict would lack them"):
        model.load_state_dict({})
    with pytest.raises(ValueError, match=r"offloaded already: call `remove\(\)`"):
        offload_experts(model, experts_on_device=2)
    offload.remove()
    with pytest.raises(ValueError, match="not offloaded any more"):
        offload.remove()


def test_a_quantised_stack_is_refused(model):
    quantization = pytest.importorskip("torchao.quantization")
    for layer in model.model.moe_layers:
        config = quantization.FqnToConfig({"sublayers.0.up_proj": quantization.Int8WeightOnlyConfig()})
        quantization.quantize_(layer.expert_stack, config, filter_fn=None)
    with pytest.raises(ValueError, match=r"sublayers\.0\.up_proj` is quantised"):
        offload_experts(model, experts_on_device=2)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_removing_it_gives_the_model_back(checkpoint, tmp_path, place):
    whole = load(checkpoint, "memory")
    offloaded = load(checkpoint, place)
    assert offload_experts(offloaded, device="cpu", experts_on_device=2).remove() is offloaded
    assert offloaded.state_dict().keys() == whole.state_dict().keys()
    assert all(
        p.requires_grad == q.requires_grad for p, q in zip(offloaded.parameters(), whole.parameters(), strict=True)
    )
    offloaded.train()(IDS, labels=IDS).loss.backward()
    offloaded.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, "memory")), logits(whole))
    offload_experts(offloaded, device="cpu", experts_on_device=1)
    assert torch.equal(logits(aligned(offloaded)), logits(whole))


@pytest.fixture
def single_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path / "model.safetensors"


def test_a_deleted_checkpoint_is_still_read(single_file, model):
    offloaded = load_offloaded(single_file.parent)
    single_file.unlink()
    assert torch.equal(logits(offloaded), logits(model))


def test_a_checkpoint_that_is_cut_off_is_one_clear_error(single_file, model):
    offloaded = load_offloaded(single_file.parent, experts_on_device=5)
    known = IDS[:1, :1]
    expected = logits(model, known, None)
    assert torch.equal(logits(offloaded, known, None), expected)
    with single_file.open("r+b") as file:
        file.truncate(single_file.stat().st_size // 2)
    for _ in range(2):
        with pytest.raises(
            OSError, match=r"cannot be read from .*model\.safetensors: it has been written to or cut off"
        ):
            logits(offloaded)
    assert torch.equal(logits(offloaded, known, None), expected)  # its experts are there


def test_a_read_that_fails_for_a_while_is_tried_again(checkpoint, model, monkeypatch):
    offloaded = load_offloaded(checkpoint)
    rows = offloaded.model.moe_layers[1].expert_stack.rows["sublayers.1.up_proj"]
    with monkeypatch.context() as broken:
        broken.setattr(rows.file, "state", None)
        with pytest.raises(
            OSError, match=r"`model\.moe_layers\.1\.expert_stack\.sublayers\.1\.up_proj` cannot be read"
        ):
            logits(offloaded)
    assert torch.equal(logits(offloaded), logits(model))


def test_a_backward_pass_through_another_expert_is_refused(checkpoint):
    offloaded = load_offloaded(checkpoint, experts_on_device=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        offloaded(IDS, labels=IDS).loss.backward()


# On a CUDA device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("experts_on_device", [1, 2, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_the_same_on_cuda(tmp_path, backend, experts_on_device, place):
    save_frozen(tmp_path, tiny_model(moe_layer_positions=[0, 2], intermediate_size=48))
    whole = StableMoEForCausalLM.from_pretrained(tmp_path, experts_implementation=backend).cuda()
    offloaded = load(tmp_path, place, experts_implementation=backend)
    offload = offload_experts(offloaded, device="cuda", experts_on_device=experts_on_device)
    ids, mask = IDS.cuda(), MASK.cuda()
    for _ in range(3):
        assert_close(logits(offloaded, ids, mask), logits(whole, ids, mask), rtol=1e-4, atol=1e-4)
    expected = whole.generate(ids, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(offloaded.generate(ids, attention_mask=mask, max_new_tokens=8), expected)
    assert offload.statistics.seconds_waited >= 0
    if experts_on_device == 5:
        assert offload.statistics.hit_rate == 1
    assert_close(logits(offload.remove("cuda"), ids, mask), logits(whole, ids, mask), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layers_wait_for_nothing_on_cuda():
    """The tokens are asked for before the first block; the layers only queue work."""
    model = tiny_model(moe_layer_positions=[0, 2], intermediate_size=48)
    model.freeze_router()
    offload_experts(model.eval(), device="cuda", experts_on_device=5)
    ids = IDS.cuda()
    logits(model, ids, None)
    model.model.layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    model.model.norm.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    try:
        logits(model, ids, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_experts_of_a_plain_device_map_on_cuda(tmp_path):
    """Experts that accelerate would move, all of a layer at a time."""
    save_frozen(tmp_path, tiny_model(moe_layer_positions=[0, 2], intermediate_size=48))
    whole = StableMoEForCausalLM.from_pretrained(tmp_path).cuda()
    places = {name: 0 if place == "cpu" else "cpu" for name, place in experts_on_disk(tmp_path).items()}
    offloaded = StableMoEForCausalLM.from_pretrained(tmp_path, device_map=places)
    offload_experts(offloaded, device="cuda", experts_on_device=2)
    assert_close(logits(offloaded, IDS.cuda(), None), logits(whole, IDS.cuda(), None), rtol=1e-4, atol=1e-4)
