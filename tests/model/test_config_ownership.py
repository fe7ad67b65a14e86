"""Tests of whose a config is: a model's own, one for all of its parts, whatever it was built of."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from helpers.models import random_ids, tiny_config, tiny_model, tiny_seq2seq_config
from modeling_stablemoe import (
    StableMoEConfig,
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoEForSequenceClassification,
    StableMoEModel,
)
from modeling_stablemoe.convert.pruning import prune_experts
from modeling_stablemoe.model.pretrained_stablemoe import StableMoEPreTrainedModel


KINDS = [(StableMoEForSequenceClassification, tiny_config), (StableMoEForConditionalGeneration, tiny_seq2seq_config)]


class Scored(StableMoEPreTrainedModel):
    """A head as users write them."""

    def __init__(self, config):
        super().__init__(config)
        self.model = StableMoEModel(config)
        self.head = nn.Linear(config.hidden_size, 1)
        self.post_init()


def routes_of(model) -> torch.Tensor:
    return torch.stack(
        [layer.frozen_router.contents()["routing_table"] for layer in model.moe_layers_by_name.values()]
    )


def configs_of(model) -> set[int]:
    return {id(module.config) for module in model.modules() if hasattr(module, "config")}


@pytest.mark.parametrize(("model_class", "make"), KINDS)
def test_of_two_models_of_one_config_each_is_frozen_saved_and_loaded_by_itself(model_class, make, tmp_path):
    config = make()
    fields = config.to_dict()
    first, second = model_class(config), model_class(config)
    first.freeze_router()
    first.resize_token_embeddings(120)
    second.save_pretrained(tmp_path / "second")
    assert config.to_dict() == fields
    assert (second.config.vocab_size, second.config.router_fingerprint) == (config.vocab_size, None)
    assert model_class.from_pretrained(tmp_path / "second").routing_stage == 1
    second.freeze_router()
    for model in (first, second):
        assert model.config.router_fingerprint == model.router_fingerprint()
        model.save_pretrained(tmp_path / "frozen")
        assert torch.equal(routes_of(model_class.from_pretrained(tmp_path / "frozen")), routes_of(model))


def test_hashes_of_one_config_have_a_fingerprint_each():
    config = tiny_config(router_type="hash")
    models = [StableMoEForCausalLM(config) for _ in range(2)]
    assert [model.config.router_fingerprint for model in models] == [model.router_fingerprint() for model in models]
    assert models[0].router_fingerprint() != models[1].router_fingerprint()
    assert config.router_fingerprint is None


@pytest.mark.parametrize(("model_class", "make"), [*KINDS, (Scored, tiny_config)])
def test_all_parts_of_a_model_read_one_config(model_class, make, tmp_path):
    model = model_class(make())
    model.save_pretrained(tmp_path)
    for each in (model, model_class.from_pretrained(tmp_path), copy.deepcopy(model), model_class._from_config(make())):
        assert configs_of(each) == {id(each.config)}
        each.set_experts_implementation("eager")
        assert all(m.config._experts_implementation == "eager" for m in each.modules() if hasattr(m, "config"))
        each.freeze_router()
        assert configs_of(each) == {id(each.config)}


def test_a_config_is_changed_before_a_model_is_built_or_through_the_model():
    config = tiny_config()
    config.num_labels = 3
    model = StableMoEForSequenceClassification(config)
    assert model.score.out_features == 3
    config.output_router_logits = True
    assert model(random_ids()).router_logits is None
    model.config.output_router_logits = True
    assert model(random_ids()).router_logits is not None


@pytest.mark.parametrize("build", [StableMoEForCausalLM, AutoModelForCausalLM.from_config])
def test_a_model_built_of_a_frozen_and_pruned_config_is_a_new_one(build, tmp_path):
    whole = tiny_model()
    whole.freeze_router()
    pruned = prune_experts(whole, torch.arange(3))
    assert pruned.config.router_fingerprint is not None
    assert pruned.config.pruned_tokens is not None
    fields = pruned.config.to_dict()
    new = build(pruned.config)
    assert (new.routing_stage, new.config.router_fingerprint, new.config.pruned_tokens) == (1, None, None)
    assert pruned.config.to_dict() == {**fields, "dtype": pruned.config.to_dict()["dtype"]}
    new.save_pretrained(tmp_path)
    loaded = StableMoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.routing_stage == 1
    loaded.freeze_router()


def test_a_checkpoint_is_held_against_the_config_that_it_is_loaded_with(tmp_path):
    first, second = (tiny_model(seed) for seed in range(2))
    for model in (first, second):
        model.freeze_router()
    first.save_pretrained(tmp_path)
    loaded = StableMoEForCausalLM.from_pretrained(tmp_path, config=first.config)
    assert loaded.config is not first.config
    assert loaded.router_fingerprint() == first.config.router_fingerprint
    with pytest.raises(ValueError, match="are not those that this checkpoint was saved with"):
        StableMoEForCausalLM.from_pretrained(tmp_path, config=second.config)
    with torch.device("meta"):
        empty = StableMoEForCausalLM(first.config)
    assert empty.config.router_fingerprint == first.config.router_fingerprint  # its weights are still to come


def test_adapters_see_the_config_that_freezing_writes_to():
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    adapted.get_base_model().freeze_router()
    assert adapted.config.router_fingerprint == adapted.get_base_model().router_fingerprint()
    assert isinstance(adapted.config, StableMoEConfig)
