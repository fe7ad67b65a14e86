"""MoE layers between the blocks of transformers' own decoders: one contract for all families."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.activations import ACT2FN

from helpers import reference
from helpers.backbones import (
    CASES,
    NOT_IN_PLACE,
    REPRESENTATIVES,
    VOCAB,
    backbone_config,
    backed_config,
    backed_model,
    dense_model,
)
from helpers.checkpoints import run_without_package
from helpers.doubles import arrays
from helpers.models import gradients, padded, random_ids, switch_checkpointing, tiny_model
from helpers.trainers import make_trainer
from modeling_stablemoe import (
    StableMoEConfig,
    StableMoEForCausalLM,
    StableMoEForSequenceClassification,
    StageTransitionCallback,
    offload_experts,
)
from modeling_stablemoe.measure.flops import count_parameters, forward_flops
from modeling_stablemoe.model.decoder_stablemoe import blocks_of, gated_ffn
from modeling_stablemoe.model.versions_stablemoe import CACHE_NAME


def families_with_fast(*fast: str):
    """Every family; of those that are not among the `fast` in the slow set."""
    return pytest.mark.parametrize(
        "family", [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
    )


families = families_with_fast(*REPRESENTATIVES)
one_family = families_with_fast("llama/ffn")
IDS = random_ids(2, 12, low=3, high=VOCAB)
GREEDY = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted({*CASES} - {"gpt2"}))  # gpt2's become the paper's blocks
def test_a_converted_decoder_has_the_same_logits_to_the_bit(family, dtype):
    dense = dense_model(family, dtype)
    options = {"moe_layer_positions": [0, 1, 3]}
    if family.endswith("/ffn"):
        options = {"moe_layer_positions": [1, 3], "moe_placement": "ffn", "num_experts_per_tok": 2}
    model = StableMoEForCausalLM.from_dense(dense, num_experts=4, **options)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)
        model.freeze_router()
        assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-6)
    assert len(model(IDS, output_router_logits=True).expert_indices) == len(options["moe_layer_positions"])


@one_family
def test_experts_in_place_of_ffns_run_as_one_where_a_stage_1_ends(family):
    options = {"moe_layer_positions": [1], "moe_placement": "ffn", "num_experts": 4}
    shares = {
        router: StableMoEForCausalLM.from_dense(dense_model(family), router_type=router, **options).config
        for router in ("stable", "switch", "hash")
    }
    assert [config.share_experts_in_stage1 for config in shares.values()] == [True, False, False]


@families
@pytest.mark.parametrize("stage", [1, 2])
def test_logits_are_those_of_the_decoder_with_layers_of_the_reference_in_it(family, stage):
    model = backed_model(family)
    if stage == 2:
        model.freeze_router()
    dense = dense_model(family)
    dense.base_model.load_state_dict(model.model.decoder.state_dict(), strict=False)
    dense.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    activation = ACT2FN[model.config.hidden_act]

    def apply(layer, hidden):
        tokens = IDS.flatten().tolist()
        routing = {1: "distilled", 2: "frozen"}[stage]
        table = layer.frozen_router.values().tolist() if stage == 2 else None
        after, *_ = reference.moe_layer(
            {name: values.astype(np.float64) for name, values in arrays(layer).items()},
            "",
            hidden.reshape(-1, 32).numpy().astype(np.float64),
            tokens,
            routing=routing,
            table=table,
            k=model.config.num_experts_per_tok,
            activation=lambda x: activation(torch.from_numpy(x)).numpy(),
        )
        return torch.from_numpy(after).to(hidden.dtype).view_as(hidden)

    blocks, experts_of = blocks_of(dense.base_model), model.moe_layers_by_name.values()
    if family.endswith("/ffn"):
        for block, layer in zip((blocks[0], blocks[2]), experts_of, strict=True):
            _, ffn = gated_ffn(block, model.config.hidden_act)
            ffn.register_forward_hook(lambda _, args, output, layer=layer: apply(layer, args[0]) - args[0])
    else:
        before, after = experts_of
        blocks[0].register_forward_pre_hook(lambda _, args: (apply(before, args[0]), *args[1:]))
        blocks[1].register_forward_hook(
            lambda _, args, output: (
                (apply(after, output[0]), *output[1:]) if isinstance(output, tuple) else apply(after, output)
            )
        )
    with torch.no_grad():
        plain = dense_model(family)
        plain.load_state_dict(dense.state_dict())
        expected = dense(IDS, use_cache=False).logits
        assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert (plain(IDS).logits - expected).abs().max() > 0.003, "experts that change nothing would prove nothing"


@families
def test_checkpointing_changes_no_gradient_and_every_parameter_learns(family):
    models = [backed_model(family).train() for _ in range(2)]
    switch_checkpointing(models[1])
    for model in models:
        torch.manual_seed(0)
        outputs = model(IDS, labels=IDS)
        outputs.loss.backward()
        assert outputs.balance_loss > 0
        assert outputs.distillation_loss > 0
    plain, checkpointed = map(gradients, models)
    assert plain.keys() == {name for name, _ in models[0].named_parameters()}
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient, msg=name)


def test_a_checkpointed_block_computes_its_experts_twice_and_no_more():
    model, passes = backed_model("llama").train(), []
    switch_checkpointing(model)
    for layer in model.moe_layers_by_name.values():
        layer.expert_module.register_forward_pre_hook(lambda *_: passes.append(1))
    model(IDS, labels=IDS).loss.backward()
    assert len(passes) == 2 * len(model.moe_layers_by_name)


@families
@pytest.mark.parametrize("router", ["word_embedding", "bigram"])
def test_caches_and_beams_change_no_token(family, router):
    model = backed_model(family, distilled_router=router)
    expected = model.generate(IDS, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(IDS, **GREEDY), expected)
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **beams), model.generate(IDS, use_cache=False, **beams))
    static = {"cache_implementation": "static", "disable_compile": True, **GREEDY}
    windows = getattr(model.config.backbone_config, "layer_types", None) or []
    if (
        router == "bigram"
        and "full_attention" not in windows
        and family.partition("/")[0] in ("mistral", "gemma3_text", "cohere2", "exaone4")
    ):
        with pytest.raises(ValueError, match="sliding windows does not say how many"):
            model.generate(IDS, **static)
    else:
        assert torch.equal(model.generate(IDS, **static), expected)


@families
def test_padding_on_the_left_and_embeddings_in_place_of_ids_change_nothing(family):
    model = backed_model(family)
    rows = padded([IDS[0], IDS[1, :8]], 0, side="left")
    mask = padded([torch.ones(12).long(), torch.ones(8).long()], 0, side="left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        batch = model(rows, attention_mask=mask, position_ids=positions).logits
        assert_close(batch[1, 4:], model(IDS[1:, :8]).logits[0], atol=1e-4, rtol=1e-4)
        embedded = model(inputs_embeds=model.get_input_embeddings()(IDS), output_router_logits=True)
        expected = model(IDS, output_router_logits=True)
    assert_close(embedded.logits, expected.logits)
    assert all(map(torch.equal, embedded.expert_indices, expected.expert_indices))


@one_family
def test_packed_rows_are_apart_where_the_decoder_keeps_them_apart(family):
    rows, positions = IDS.view(1, -1), torch.arange(12).repeat(2).view(1, -1)
    for model in (dense_model(family), backed_model(family), backed_model(family, distilled_router="bigram")):
        with torch.no_grad():
            packed = model(rows, position_ids=positions, use_cache=False).logits.view(2, 12, -1)
            apart = model(IDS, use_cache=False).logits
        if not torch.allclose(packed, apart, atol=1e-4):
            assert family.startswith("gpt_oss")  # whose own second sequence sees the first


@families
def test_a_checkpoint_and_copies_of_a_model_are_the_model(family, tmp_path):
    model = backed_model(family)
    model.freeze_router()
    model.resize_token_embeddings(VOCAB + 6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = IDS + 6
    assert loaded.config.vocab_size == loaded.config.backbone_config.vocab_size == VOCAB + 6
    assert loaded.router_fingerprint() == model.router_fingerprint() is not None
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert_close(other(ids).logits, model(ids).logits)
        assert torch.equal(other.route(ids), model.route(ids))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.route(ids), model.route(ids))


@one_family
def test_a_checkpoint_loads_without_the_package(family, tmp_path):
    model = backed_model(family)
    model.freeze_router()
    model.save_pretrained(tmp_path / "model")
    new = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = json.dumps({"ids": IDS.tolist(), "routes": model.route(IDS).tolist(), "new": new.tolist()})
    code = """
        import json, sys
        import torch
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        expected = json.loads(sys.argv[2])
        ids = torch.tensor(expected["ids"])
        new = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert model.routing_stage == 2
        assert model.route(ids).tolist() == expected["routes"]
        assert new.tolist() == expected["new"]
    """
    run_without_package(code, tmp_path, tmp_path / "model", expected)


@one_family
def test_both_stages_under_the_trainer(family, tmp_path):
    model = backed_model(family)
    transition = StageTransitionCallback(stage1_steps=2)
    rows = [{"input_ids": row} for row in random_ids(8, 16, low=3, high=VOCAB)]
    options = {"max_steps": 4, "gradient_checkpointing": True}
    make_trainer(tmp_path, transition, model=model, train_dataset=rows, **options).train()
    assert model.routing_stage == 2
    assert model.config.router_fingerprint == model.router_fingerprint()


@one_family
def test_adapters_learn_beside_the_frozen_routing(family):
    peft = pytest.importorskip("peft")
    model = backed_model(family)
    model.freeze_router()
    routes = model.route(IDS)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)
    assert torch.equal(adapted.get_base_model().route(IDS), routes)


@families
def test_offloaded_experts_change_nothing(family, tmp_path):
    model = backed_model(family)
    model.freeze_router()
    model.save_pretrained(tmp_path)
    offloaded = StableMoEForCausalLM.from_pretrained(tmp_path)
    offload_experts(offloaded, experts_on_device=2)
    with torch.no_grad():
        assert torch.equal(offloaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("blocks", ["paper", "llama"])
def test_a_batch_in_flight_is_generated_as_each_alone(blocks, tmp_path):
    # Before 5.24 the paged cache reads the outer config, which knows nothing of grouped heads.
    heads = {} if CACHE_NAME == "cache" else {"num_key_value_heads": 4}
    if blocks == "paper":
        model = tiny_model(vocab_size=VOCAB, moe_layer_positions=[0, 2]).eval()
    else:
        model = backed_model("llama", backbone_config=backbone_config("llama", vocab_size=VOCAB, **heads))
    model.freeze_router()
    model.save_pretrained(tmp_path)
    paged = StableMoEForCausalLM.from_pretrained(tmp_path, attn_implementation="paged|sdpa")
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # otherwise most of the machine's memory
    outputs = paged.generate_batch([row.tolist() for row in IDS], options, continuous_batching_config=small).values()
    expected = model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, 12:].tolist()
    assert [output.generated_tokens for output in outputs] == expected


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_operations_are_those_of_the_decoder_and_of_the_layers(family):
    dense, model = dense_model(family), backed_model(family)
    model.freeze_router()
    # Two sublayers of two matrices, one FFN of three, or one more FFN beside that which was there; two operations per
    # multiply-accumulate, sixteen tokens. The scores of the chosen experts are sums of products, and no matrix products.
    products = {"": 3 * 32 * 16, "stack": 2 * 2 * 32 * 16, "ffn": 3 * 32 * 48}[family.partition("/")[2]]
    added = len(model.moe_layers_by_name) * 16 * 2 * products
    assert forward_flops(model, 16) - forward_flops(dense, 16) == added
    assert count_parameters(model)["experts"] > 0


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_outputs_are_recorded_as_the_decoder_records_them(family):
    model = backed_model(family)
    dense = dense_model(family)
    with torch.no_grad():
        own = dense(IDS, output_hidden_states=True)
        outputs = model(IDS, output_hidden_states=True, output_router_logits=True)
    assert len(outputs.hidden_states) == len(own.hidden_states)
    assert [logits.shape for logits in outputs.router_logits] == [(24, 4)] * 2
    assert torch.equal(torch.stack(outputs.expert_indices), model.route(IDS))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama/ffn"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_pass_compiles_to_one_graph(family, stage):
    model = backed_model(family)
    if CACHE_NAME != "cache":  # before 5.24 the backward pass of transformers' grouped_mm breaks the graph on a CPU
        model.set_experts_implementation("batched_mm")
    if stage == 2:
        model.freeze_router()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    model.train()
    # The first pass that records anything installs transformers' hooks, which no graph can hold.
    expected = model(IDS, labels=IDS, use_cache=False).loss
    loss = compiled(IDS, labels=IDS, use_cache=False).loss
    assert_close(loss, expected)
    loss.backward()


def test_a_classifier_of_a_backbone_takes_the_language_model_s_weights(tmp_path):
    model = backed_model("llama")
    model.save_pretrained(tmp_path)
    classifier = StableMoEForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classifier(IDS, labels=torch.tensor([0, 2])).logits.shape == (2, 3)
    assert torch.equal(classifier.route(IDS), model.route(IDS))


def test_a_config_keeps_its_backbone(tmp_path):
    config = backed_config("qwen3")
    config.save_pretrained(tmp_path)
    loaded = StableMoEConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.backbone_config, transformers.Qwen3Config)


def test_what_a_backbone_determines_is_the_same_in_both_configs():
    config = backed_config("llama")
    config.vocab_size = 80
    assert config.backbone_config.vocab_size == 80
    config.get_text_config().vocab_size = 90
    assert StableMoEForCausalLM(config).config.vocab_size == 90


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"hidden_size": 33}, r"`hidden_size` \(33\) is not that of the backbone, a 'llama' with 32"),
        ({"moe_layer_positions": [4]}, r"`moe_layer_positions` \[4\] lie outside 0..num_hidden_layers \(3\)"),
        ({"moe_layer_positions": [1, 1]}, r"`moe_layer_positions` \[1, 1\] names a position twice"),
        ({"scale_embedding": True, "dropout": 0.1}, "`scale_embedding`, `dropout`: of the paper's blocks"),
        ({"moe_intermediate_size": 8}, "`moe_intermediate_size`: of the paper's blocks"),
        ({"backbone_config": {"hidden_size": 3}}, "`backbone_config` has no `model_type`"),
        ({"backbone_config": "llama"}, "`backbone_config` must be a config of transformers"),
        ({"moe_placement": "ffn", "intermediate_size": 16}, r"`intermediate_size` \(16\) is not that of the backbone"),
        (
            {"moe_placement": "ffn", "moe_layer_positions": [0, 1]},
            "`moe_layer_positions` 0 stands before the first block",
        ),
        ({"moe_placement": "ffn", "expert_type": "stack"}, '`moe_placement` "ffn" puts gated experts in place'),
    ],
)
def test_a_config_that_contradicts_its_backbone_is_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        backed_config(
            "llama/ffn" if "moe_placement" in fields else "llama", **{"moe_layer_positions": [1], **fields}
        ) if "backbone_config" not in fields else (StableMoEConfig(**fields))


@pytest.mark.parametrize("family", sorted(NOT_IN_PLACE))
def test_a_block_without_a_gated_ffn_is_refused_for_experts_in_place_of_it(family):
    with pytest.raises(ValueError, match="has no gated FFN without biases and with the activation"):
        StableMoEForCausalLM(backed_config(f"{family}/ffn", moe_layer_positions=[3]))


@pytest.mark.parametrize(
    ("saved", "loaded"), [("llama", "llama/ffn"), ("llama/ffn", "llama"), ("llama", "llama/stack")]
)
def test_weights_with_experts_elsewhere_are_refused(saved, loaded, tmp_path):
    backed_model(saved).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="have other MoE layers than its config: `model.decoder.layers.*` has no place"
    ):
        StableMoEForCausalLM.from_pretrained(tmp_path, config=backed_config(loaded))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (transformers.BertConfig(num_hidden_layers=2), "BertModel has no single list of blocks"),
        (transformers.DistilBertConfig(), "A 'distilbert' model is no decoder-only language model"),
        (transformers.T5Config(), "A 't5' model is no decoder-only language model"),
        (transformers.LlavaConfig(), "A 'llava' model is no decoder-only language model"),
        (
            transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3),
            "The head of a MambaForCausalLM does more with its matrix than multiply by it",
        ),
        (
            transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4),
            "does not hand keyword arguments down",
        ),
        (
            transformers.OPTConfig(
                vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4
            ),
            "OPTModel has no single list of blocks",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_cannot_carry_the_layers_is_refused_by_name(config, complaint):
    with pytest.raises(ValueError, match=complaint):
        StableMoEForCausalLM(StableMoEConfig(backbone_config=config, num_experts=4, moe_layer_positions=[1]))(IDS)
