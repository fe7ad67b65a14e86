"""Tables in models of transformers: the model's own weights for their choice, saving, removing, balance losses, refusals."""

import copy
import pickle
import textwrap

import pytest
import torch
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, __version__

from helpers import ROOT
from helpers.interpreters import interpreters
from helpers.moe_families import FAMILIES, tiny_moe
from modeling_stablemoe.tables import (
    check_tables,
    install_tables,
    installed_layers,
    installed_tables,
    load_tables,
    moe_layers,
    remove_tables,
    save_tables,
)
from modeling_stablemoe.tables.installing import routers_of


# In transformers 5.15 Granite's router returns its choice first, its logits last.
HAS_GRANITE = Version(__version__) >= Version("5.20")
WITH_SEAM = [*(name for name in FAMILIES if name != "granitemoe" or HAS_GRANITE), "deepseek_v4"]
FEW = pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "deepseek_v4"])
ALL = pytest.mark.parametrize("family", WITH_SEAM)


def random_tables(num_layers: int, seed: int = 0, vocab_size: int = 99) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_layers, vocab_size, 8, generator=generator).argsort(-1)[..., :2]


def some_ids(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(0))


def own_choices(model, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, ...]]:
    """What the routers return in a pass, by layer."""
    seen = {}
    handles = [
        router.register_forward_hook(lambda _, args, output, layer=layer: seen.update({layer: output}))
        for layer, router in routers_of(model).items()
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


@ALL
def test_table_of_the_models_own_choice_changes_no_bit_of_logits_and_gradients(family):
    model, ids = tiny_moe(family), torch.arange(3, 50).unsqueeze(0)
    before = model(ids, labels=ids)
    before.loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    choices = own_choices(model, ids)
    learned = [layer for layer, router in routers_of(model).items() if "tid2eid" not in router._buffers]
    tables = random_tables(len(learned))
    for table, layer in zip(tables, learned, strict=True):
        table[3:50] = choices[layer][2]
    install_tables(model, tables, learned)
    after = model(ids, labels=ids)
    after.loss.backward()
    assert torch.equal(after.logits, before.logits)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=0, msg=name)


def softmax_of_all(logits, index):
    return logits.softmax(-1).gather(1, index)


def shares(weights):
    return weights / weights.sum(-1, keepdim=True)


# From logits in float64 and chosen experts to weights, as the modeling file of each family has it.
REFERENCES = {
    "mixtral": lambda logits, index: shares(softmax_of_all(logits, index)),
    "olmoe": softmax_of_all,
    "qwen2_moe": softmax_of_all,
    "qwen3_moe": lambda logits, index: shares(softmax_of_all(logits, index)),
    "deepseek_v2": lambda logits, index: 1.5 * softmax_of_all(logits, index),
    "deepseek_v3": lambda logits, index: 1.5 * shares(logits.sigmoid().gather(1, index)),
    "gpt_oss": lambda logits, index: logits.gather(1, index).softmax(-1),
    "granitemoe": lambda logits, index: logits.gather(1, index).softmax(-1),
    "glm4_moe": lambda logits, index: 1.5 * shares(logits.sigmoid().gather(1, index)),
    "deepseek_v4": lambda logits, index: 1.5 * shares((1 + logits.exp()).log().sqrt().gather(1, index)),
}


@ALL
def test_chosen_experts_are_those_of_the_table_and_their_weights_the_models_formula(family):
    model, ids = tiny_moe(family), some_ids()
    layers = moe_layers(model)
    tables = random_tables(len(layers))
    install_tables(model, tables, layers)
    inputs = {}
    handles = [
        router.register_forward_pre_hook(lambda _, args, layer=layer: inputs.update({layer: args[0]}))
        for layer, router in routers_of(model).items()
    ]
    choices = own_choices(model, ids)
    for handle in handles:
        handle.remove()
    for table, layer in zip(tables, layers, strict=True):
        _, weights, index = choices[layer]
        assert torch.equal(index, table[ids.flatten()])
        router = routers_of(model)[layer]
        logits = inputs[layer].detach().double().reshape(-1, 32) @ router.weight.detach().double().T
        if "bias" in dict(router.named_parameters()):
            logits = logits + router.bias.detach().double()
        torch.testing.assert_close(weights.double(), REFERENCES[family](logits, index), rtol=1e-5, atol=1e-7)


@ALL
def test_removing_restores_model_and_config(family):
    model, ids = tiny_moe(family), some_ids()
    before, classes = model(ids).logits, {name: type(module) for name, module in model.named_modules()}
    state, fields = copy.deepcopy(model.state_dict()), model.config.to_dict()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    layers = moe_layers(model)
    install_tables(model, random_tables(len(layers)), layers)
    assert model.state_dict().keys() == state.keys()
    assert not torch.equal(model(ids).logits, before)
    remove_tables(model, layers[:1])
    assert installed_layers(model) == layers[1:]
    remove_tables(model)
    assert installed_layers(model) == []
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.config.to_dict() == fields


def test_never_run_model_can_be_restored_too():
    model = tiny_moe("mixtral")
    install_tables(model, random_tables(3))
    remove_tables(model)
    assert type(routers_of(model)[0]).__mro__[1] is torch.nn.Module


@ALL
def test_generation_with_a_cache_takes_the_experts_of_each_new_token(family):
    model = tiny_moe(family)
    install_tables(model, random_tables(len(moe_layers(model))), moe_layers(model))
    ids = some_ids(length=5)
    generated = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    logits = model(generated, use_cache=False).logits
    logits[..., 2] = -torch.inf  # `min_new_tokens` forbids the end
    assert torch.equal(generated[:, 5:], logits[:, 4:-1].argmax(-1))


@FEW
def test_saved_tables_load_with_one_call(family, tmp_path):
    model, other, ids = tiny_moe(family), tiny_moe(family), some_ids()
    layers = moe_layers(model)[1:]
    install_tables(model, random_tables(len(layers)), layers)
    assert save_tables(model, tmp_path) == tmp_path / "routing_tables.safetensors"
    load_tables(other, tmp_path)
    assert installed_layers(other) == layers
    assert torch.equal(installed_tables(other), random_tables(len(layers)))
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_replaced_tables_are_those_that_route():
    model, other, ids = tiny_moe("olmoe"), tiny_moe("olmoe"), some_ids()
    install_tables(model, random_tables(3, seed=1))
    install_tables(model, random_tables(3, seed=2))
    install_tables(other, random_tables(3, seed=2))
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_damaged_foreign_and_missing_files_are_refused(tmp_path):
    model = tiny_moe("olmoe")
    with pytest.raises(ValueError, match="No tables have been installed"):
        save_tables(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="no routing tables"):
        load_tables(model, tmp_path)
    install_tables(model, random_tables(3))
    file = save_tables(model, tmp_path)
    with safe_open(file, "pt") as opened:
        metadata, tables = opened.metadata(), opened.get_tensor("tables")
    save_file({"tables": tables.flip(-1).contiguous()}, file, metadata=metadata)
    with pytest.raises(ValueError, match="are damaged: restore the file"):
        load_tables(model, file)
    save_file({"tables": tables}, file)
    with pytest.raises(ValueError, match="was not written by `save_tables`"):
        load_tables(model, file)
    file.write_text("text")
    with pytest.raises(ValueError, match="is no file of routing tables, or a damaged one"):
        load_tables(model, file)
    save_tables(model, tmp_path)
    with pytest.raises(ValueError, match="are of 8 experts, layer 0 has 4"):
        load_tables(tiny_moe("olmoe", num_experts=4), file)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_no_loss_balances_a_layer_with_a_table(family):
    model, ids = tiny_moe(family, output_router_logits=True), some_ids()
    install_tables(model, random_tables(2), [0, 2])
    outputs = model(ids, labels=ids)
    assert len(outputs.router_logits) == 1
    logits = outputs.router_logits[0].double()
    chosen = torch.nn.functional.one_hot(logits.topk(2).indices, 8).double().mean(0)
    expected = 8 * (chosen * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(outputs.aux_loss.double(), expected, rtol=1e-5, atol=0)
    install_tables(model, random_tables(1), [1])
    assert model.config.output_router_logits is False
    assert model(ids, labels=ids).aux_loss is None
    with pytest.raises(ValueError, match="all MoE layers route by tables"):
        model(ids, output_router_logits=True)
    remove_tables(model, [0])
    assert model.config.output_router_logits is True
    remove_tables(model)
    assert len(model(ids).router_logits) == 3


@FEW
def test_copies_pickles_and_checkpointed_gradients_route_by_the_tables(family):
    model, ids = tiny_moe(family), some_ids()
    install_tables(model, random_tables(len(moe_layers(model))), moe_layers(model))
    logits = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, logits)
        remove_tables(other)
        assert not torch.equal(other(ids).logits, logits)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(map(torch.equal, *gradients))


def test_tables_stay_integers_and_chosen_in_half_precision():
    model, ids = tiny_moe("deepseek_v3"), some_ids()
    tables = random_tables(2)
    install_tables(model, tables)
    model.to(torch.bfloat16)
    choices = own_choices(model, ids)
    assert all(
        torch.equal(choices[layer][2], table[ids.flatten()]) for layer, table in zip((1, 2), tables, strict=True)
    )
    assert torch.equal(installed_tables(model), tables)


def test_v4_ships_zeros_and_gets_the_table_into_its_checkpoint():
    model, ids = tiny_moe("deepseek_v4"), some_ids()
    tables = random_tables(2)
    install_tables(model, tables)
    assert installed_layers(model) == [0, 1]
    assert torch.equal(model.state_dict()["model.layers.1.mlp.gate.tid2eid"], tables[1])
    assert all(len(set(choice[2].flatten().tolist())) > 2 for choice in own_choices(model, ids).values())
    remove_tables(model)
    assert not model.state_dict()["model.layers.1.mlp.gate.tid2eid"].any()


def test_models_without_the_seam_are_refused_by_name():
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    )
    with pytest.raises(ValueError, match="A LlamaForCausalLM has no routers beside experts"):
        install_tables(dense, random_tables(2))
    # An expert far from the best has no weight at all in its formula.
    with pytest.raises(ValueError, match=r"How a PhimoeTopKRouter \(layer 0\) weighs its experts cannot be told"):
        install_tables(tiny_moe("phimoe", num_local_experts=8), random_tables(3))
    if not HAS_GRANITE:
        with pytest.raises(ValueError, match="How a GraniteMoeTopKRouter"):
            install_tables(tiny_moe("granitemoe"), random_tables(3))


def test_passes_without_token_ids_are_refused():
    model, ids = tiny_moe("mixtral"), some_ids()
    install_tables(model, random_tables(3))
    with pytest.raises(ValueError, match="pass `input_ids`, or take the tables out"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="was not told the token ids: call the whole model"):
        routers_of(model)[0](torch.zeros(4, 32))
    assert model(ids).logits.isfinite().all()


def twice_the_same(tables: torch.Tensor) -> torch.Tensor:
    tables[1, 7] = 3
    return tables


@pytest.mark.parametrize(
    ("tables", "layers", "message"),
    [
        (random_tables(2), None, r"There are 2 tables for 3 layers \(\[0, 1, 2\]\)"),
        (random_tables(1), [5], r"`layers` is \[5\]; pass different ones of those with experts: \[0, 1, 2\]"),
        (random_tables(2), [1, 1], r"`layers` is \[1, 1\]; pass different ones"),
        (random_tables(3)[:, :50], None, r"do not fit: this model takes integers of shape \(layers, 99, 2\)"),
        (random_tables(3)[..., :1], None, "do not fit"),
        (random_tables(3).float(), None, "Tables of torch.float32"),
        (
            random_tables(3) + 1,
            None,
            r"sends token id \d+ to the experts \[\d, \d\]; pass 2 different ones in \[0, 8\)",
        ),
        (random_tables(3) - 1, None, "sends token id"),
        (twice_the_same(random_tables(3)), None, r"sends token id 7 to the experts \[3, 3\]"),
    ],
)
def test_tables_that_do_not_fit_are_refused_and_change_nothing(tables, layers, message):
    model = tiny_moe("qwen2_moe")
    with pytest.raises(ValueError, match=message):
        install_tables(model, tables, layers)
    assert installed_layers(model) == []
    with pytest.raises(ValueError, match="No table was installed in layer 1, only in"):
        remove_tables(model, [1])


def test_check_accepts_what_a_model_takes():
    check_tables(random_tables(2), 99, 8, 2)


@pytest.mark.slow
@ALL
def test_fresh_interpreter_loads_model_and_tables(family, tmp_path):
    model, ids = tiny_moe(family), some_ids()
    layers = moe_layers(model)
    install_tables(model, random_tables(len(layers)), layers)
    model.save_pretrained(tmp_path)
    save_tables(model, tmp_path)
    torch.save((ids, model(ids).logits), tmp_path / "expected.pt")
    code = """
        import sys, torch
        sys.path.insert(0, ROOT)
        from transformers import AutoModelForCausalLM
        from modeling_stablemoe.tables import load_tables, remove_tables
        ids, logits = torch.load("expected.pt")
        model = AutoModelForCausalLM.from_pretrained(".").eval()
        assert type(model).__module__.startswith("transformers.")
        load_tables(model, ".")
        assert torch.equal(model(ids).logits, logits)
        model.generate(ids, max_new_tokens=3)
        remove_tables(model)
        assert not torch.equal(model(ids).logits, logits)
    """
    done = interpreters().run("-c", textwrap.dedent(code).replace("ROOT", repr(str(ROOT))), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@FEW
def test_compiled_model_computes_the_same(family):
    model, ids = tiny_moe(family), some_ids()
    model.set_experts_implementation("batched_mm")
    install_tables(model, random_tables(len(moe_layers(model))), moe_layers(model))
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
