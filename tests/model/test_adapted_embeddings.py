"""Tokens that come as `inputs_embeds` of an adapted or wrapped embedding are routed as by their ids."""

import pytest
import torch
from accelerate import cpu_offload

from helpers.models import random_ids, tiny_classifier, tiny_model, tiny_seq2seq_model


peft = pytest.importorskip("peft")

# PEFT's, about weights that are tied.
pytestmark = [pytest.mark.pairs, pytest.mark.filterwarnings("ignore:.*tie:UserWarning")]

IDS = random_ids(3, 7, high=91)
TARGETS = random_ids(3, 5, seed=1, high=91)
EMBEDDING = {"target_modules": ["embed_tokens"]}
WAYS = {
    "LoRA": EMBEDDING,
    "DoRA": {**EMBEDDING, "use_dora": True},
    "a copy": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": list(range(2, 60))}},
}
every_way = pytest.mark.parametrize("way", WAYS)


def adapted(model, way):
    """Put two adapters on the embedding, each of which moves tokens far; the first one is active."""
    model.freeze_router()
    config = peft.LoraConfig(r=2, lora_alpha=6, **WAYS[way])
    model = peft.get_peft_model(model, config)
    model.add_adapter("another", config)
    torch.manual_seed(1)
    learned = ("lora_embedding", "modules_to_save", "trainable_tokens_delta")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in learned):
                parameter.normal_()
    return model.eval()


@torch.no_grad()
def assert_routed_as_by_ids(model, core):
    """`core` is the StableMoE model inside `model`."""
    inputs, embeds = {"input_ids": IDS}, {"inputs_embeds": core.get_input_embeddings()(IDS)}
    if core.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TARGETS
        embeds["decoder_inputs_embeds"] = core.get_decoder().embed_tokens(TARGETS)
    expected, actual = model(**inputs, output_router_logits=True), model(**embeds, output_router_logits=True)
    for index, right in zip(actual.expert_indices, expected.expert_indices, strict=True):
        assert torch.equal(index, right)
    assert torch.equal(actual.logits, expected.logits)
    return expected.logits


@every_way
@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_model(moe_layer_positions=[0, 2]),
        lambda: tiny_model(moe_layer_positions=[0, 2], distilled_router="bigram", scale_embedding=True),
        lambda: tiny_classifier(moe_layer_positions=[0, 2], scale_embedding=True),
        tiny_seq2seq_model,
        lambda: tiny_seq2seq_model(tie_word_embeddings=False),
    ],
    ids=["language model", "router that looks back", "classifier", "translation", "translation, untied"],
)
def test_embeddings_of_an_adapted_embedding_are_routed_as_the_tokens(way, build):
    core = build()
    model = adapted(core, way)
    forms = {"adapted": assert_routed_as_by_ids(model, core)}
    model.set_adapter("another")
    forms["another"] = assert_routed_as_by_ids(model, core)
    with model.disable_adapter():
        forms["disabled"] = assert_routed_as_by_ids(model, core)
    # Each form embeds otherwise: else this would show nothing.
    assert not any(torch.allclose(forms["disabled"], forms[name], atol=0.1) for name in ("adapted", "another"))
    if way != "a copy":
        model.merge_adapter()
        assert_routed_as_by_ids(model, core)
        model.unmerge_adapter()
    core = model.merge_and_unload()
    assert_routed_as_by_ids(core, core)


def test_generation_from_adapted_embeddings_is_that_of_the_tokens():
    core = tiny_model(moe_layer_positions=[0, 2])
    model = adapted(core, "LoRA")
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    generated = model.generate(inputs_embeds=core.get_input_embeddings()(IDS), **options)
    assert torch.equal(generated, model.generate(input_ids=IDS, **options)[:, IDS.shape[1] :])


def test_embeddings_are_found_where_the_embedding_is_offloaded(frozen_model):
    embeds = frozen_model.get_input_embeddings()(IDS)
    expected = frozen_model(input_ids=IDS).logits
    cpu_offload(frozen_model, execution_device=torch.device("cpu"))
    assert frozen_model.model.embed_tokens.weight.is_meta
    assert torch.equal(frozen_model(inputs_embeds=embeds).logits, expected)


@pytest.mark.slow
def test_an_adapted_model_that_takes_embeddings_can_be_exported():
    core = tiny_model(moe_layer_positions=[0, 2])
    adapted(core, "LoRA")
    embeds = core.get_input_embeddings()(IDS).detach()
    program = torch.export.export(core, (), {"inputs_embeds": embeds, "use_cache": False}).module()
    others = core.get_input_embeddings()(IDS.flip(0)).detach()
    torch.testing.assert_close(
        program(inputs_embeds=others, use_cache=False).logits, core(input_ids=IDS.flip(0)).logits
    )
