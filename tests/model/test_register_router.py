# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""A router of one's own, in one file: what a user writes, and what the library then does with it."""

import pytest
import torch
from torch import nn

from helpers.checkpoints import edit_config
from helpers.models import random_ids, tiny_config
from helpers.trainers import make_trainer
from modeling_stablemoe import StableMoEForCausalLM, StageTransitionCallback, register_router
from modeling_stablemoe.model.configuration_stablemoe import ROUTER_TYPES
from modeling_stablemoe.model.losses_stablemoe import switch_balance_loss
from modeling_stablemoe.model.routing_stablemoe import ROUTERS, LearnedRouter


IDS = random_ids(4, 8)


@pytest.fixture
def lottery():
    """A router that sends each token to the expert of the lowest score, with a gate of its probability."""

    @register_router("lottery", balance_loss_coef=0.25)
    class LotteryRouter(LearnedRouter):
        balance_loss = staticmethod(switch_balance_loss)

        def assignment(self, router_logits, token_mask):
            return router_logits.argmin(-1)

        def gate(self, router_logits, expert_index):
            return torch.softmax(router_logits, dim=-1).gather(-1, expert_index)

    yield LotteryRouter
    del ROUTERS["lottery"], ROUTER_TYPES["lottery"]


def test_its_name_makes_a_config_and_a_model(lottery):
    config = tiny_config(router_type="lottery")
    assert config.balance_loss_coef == 0.25
    model = StableMoEForCausalLM(config).train()
    outputs = model(IDS, labels=IDS, output_router_logits=True)
    for logits, index in zip(outputs.router_logits, outputs.expert_indices, strict=True):
        assert torch.equal(index.flatten(), logits.argmin(-1))
    loads = [torch.bincount(index.flatten(), minlength=config.num_experts) for index in outputs.expert_indices]
    pairs = zip(outputs.router_logits, outputs.expert_indices, loads, strict=True)
    expected = sum(
        switch_balance_loss(router_logits=logits, expert_index=index.flatten(), expert_load=load)
        for logits, index, load in pairs
    )
    torch.testing.assert_close(outputs.balance_loss, expected)
    assert float(outputs.aux_loss.detach()) == pytest.approx(0.25 * float(expected.detach()), rel=1e-6)


def test_it_goes_through_both_stages_and_a_checkpoint(lottery, tmp_path):
    config = tiny_config(router_type="lottery", distilled_router="word_embedding")
    trainer = make_trainer(tmp_path, StageTransitionCallback(2), model=StableMoEForCausalLM(config), max_steps=4)
    trainer.train()
    model = trainer.model.eval()
    assert model.routing_stage == 2
    model.save_pretrained(tmp_path / "saved")
    loaded = StableMoEForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert loaded.router_fingerprint() == model.router_fingerprint()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_where_its_file_is_not_imported_the_error_says_so(lottery, tmp_path):
    StableMoEForCausalLM(tiny_config(router_type="lottery")).save_pretrained(tmp_path)
    edit_config(tmp_path, router_type="raffle")
    with pytest.raises(ValueError, match="`router_type` 'raffle' is unknown.*import the file that registers it"):
        StableMoEForCausalLM.from_pretrained(tmp_path)


def test_a_name_stays_with_its_class_but_a_file_may_be_run_again(lottery):
    with pytest.raises(ValueError, match=r"`router_type` 'stable' is StableRouter already"):
        register_router("stable")(lottery)
    again = type("LotteryRouter", (LearnedRouter,), {"__module__": lottery.__module__})
    again.__qualname__ = lottery.__qualname__
    assert register_router("lottery")(again) is again
    assert type(StableMoEForCausalLM(tiny_config(router_type="lottery")).model.moe_layers[0].router) is again


def test_what_is_no_router_is_refused():
    with pytest.raises(ValueError, match="`Linear` must be a subclass of Router"):
        register_router("linear")(nn.Linear)
    assert "linear" not in ROUTER_TYPES
