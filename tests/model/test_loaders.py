"""A frozen checkpoint routes as it was saved, whoever brings its weights into a model; or one error says that it does not."""

import copy
import shutil

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.loaders import KINDS, LOADERS, build, empty, experts_of, fill_in_place, inputs_of
from modeling_stablemoe import StableMoEForCausalLM


pytestmark = pytest.mark.pairs


def with_adapters(model):
    targets = ["q_proj", "v_proj"]
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets))


# Bit patterns made numbers are no weights any more.
REFUSED = {
    ("context", "meta device, all in float32"),
    ("context", "meta device, all in bfloat16"),
    ("counts in stage 1", "meta device, all in float32"),
    ("counts in stage 1", "meta device, all in bfloat16"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    models = {kind: build(kind) for kind in KINDS}
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
    return {kind: (model, folder / kind) for kind, model in models.items()}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_routes_as_it_was_saved(sources, kind, loader):
    source, folder = sources[kind]
    if (kind, loader) in REFUSED:
        with pytest.raises(ValueError, match="is torch|are torch"):
            experts_of(LOADERS[loader](source, folder))
        return
    model = LOADERS[loader](source, folder).eval()
    # Stage 1 evaluates D and its centroids, in the dtype of the model.
    expected = source if source.routing_stage == 2 else copy.deepcopy(source).to(model.dtype)
    assert torch.equal(experts_of(model), experts_of(expected))
    assert model.routing_stage == source.routing_stage
    assert model.router_fingerprint() == source.router_fingerprint()


# Averages


def averaged_state(state, number, dtype):
    return {name: sum(values.to(dtype) / number for _ in range(number)) for name, values in state.items()}


@pytest.mark.parametrize("number", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["stage 1", "table", "hash", "translation"])
def test_an_average_of_equal_models_is_that_model(sources, kind, dtype, number):
    source, _ = sources[kind]
    model = empty(source)
    model.load_state_dict(averaged_state(source.state_dict(), number, dtype))
    assert model.routing_stage == source.routing_stage
    assert model.router_fingerprint() == source.router_fingerprint()


@pytest.mark.parametrize(
    ("kinds", "weights"),
    [(("table", "table"), (0.5, 0.5)), (("table", "table"), (0.9995, 0.0005)), (("stage 1", "table"), (0.5, 0.5))],
    ids=str,
)
def test_an_average_of_different_routings_is_refused(kinds, weights):
    first, second = (build(kind, seed=seed) for kind, seed in zip(kinds, (0, 3), strict=True))
    mixed = {
        name: weights[0] * values.double() + weights[1] * second.state_dict()[name].double()
        for name, values in first.state_dict().items()
    }
    for target in (empty(first), copy.deepcopy(first)):
        with pytest.raises(ValueError, match=r"routing_table` (holds integers|is damaged)"):
            target.load_state_dict(mixed)


def test_an_average_of_bits_is_refused_where_its_dtype_cannot_tell_them_apart():
    source = build("context")
    with pytest.raises(ValueError, match="leave integers out of both"):
        empty(source).load_state_dict(averaged_state(source.state_dict(), 3, torch.float32))


def equal_models_averaged(model, **options):
    average = AveragedModel(model, **options)
    for _ in range(3):
        average.update_parameters(model)
    return average


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9995)], ids=["SWA", "EMA"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_that_trains_beside_a_model_routes_as_it_does(sources, kind, average):
    source, _ = sources[kind]
    module = equal_models_averaged(copy.deepcopy(source), multi_avg_fn=average).module.eval()
    assert torch.equal(experts_of(module), experts_of(source))
    assert module.router_fingerprint() == source.router_fingerprint()


@pytest.mark.parametrize("kind", ["table", "translation"])
def test_an_exponential_average_of_buffers_is_refused_where_it_moves_tokens(sources, kind):
    source, _ = sources[kind]
    # Whether a decay moves a table depends on its rounding: 0.9995 * 3 + 0.0005 * 3 is 3, 0.95 * 3 + 0.05 * 3 is less.
    moved = 0
    for decay in (0.95, 0.9995):
        average = equal_models_averaged(
            copy.deepcopy(source), multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        ).module.eval()
        held = [layer.frozen_router.routing_table for layer in average.moe_layers_by_name.values()]
        own = [layer.frozen_router.routing_table for layer in source.moe_layers_by_name.values()]
        if all(map(torch.equal, held, own)):
            assert torch.equal(experts_of(average), experts_of(source))
            continue
        moved += 1
        with pytest.raises(ValueError, match="use_buffers=False|is damaged"):
            experts_of(average)
        with pytest.raises(ValueError, match="use_buffers=False|is damaged"):
            average.save_pretrained("never-written")
    assert moved


def swap(model, average):
    """Exchange the weights and buffers of two models as Lightning's `WeightAveraging` does around a validation."""
    for own, other in zip(
        (*model.parameters(), *model.buffers()), (*average.parameters(), *average.buffers()), strict=True
    ):
        kept = own.data.clone()
        own.data.copy_(other.data)
        other.data.copy_(kept)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("trains", [True, False], ids=["training mode", "eval mode"])
@pytest.mark.parametrize("kind", ["table", "counts", "context", "hash", "translation"])
def test_an_average_that_is_swapped_in_for_evaluation_routes_as_the_model_or_is_refused(
    sources, kind, trains, use_buffers
):
    source, folder = sources[kind]
    model = type(source).from_pretrained(folder)
    outcomes = set()
    for decay in (0.9995, 0.5):
        average = equal_models_averaged(
            model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers
        ).module
        if trains:
            experts_of(model.train())
            model.eval()  # comes before the swap
        else:  # as Lightning trains what `from_pretrained` gives
            model.eval()(**inputs_of(model))
        swap(model, average)
        is_moved = not all(map(torch.equal, model.buffers(), source.buffers()))
        if is_moved:
            for _ in range(2):
                with pytest.raises(ValueError, match="use_buffers=False|is damaged"):
                    experts_of(model)
        else:
            assert torch.equal(experts_of(model), experts_of(source))
        outcomes.add(is_moved)
        swap(model, average)
        model.train(trains)(**inputs_of(model))
        assert torch.equal(experts_of(model), experts_of(source))
    assert (True in outcomes) == use_buffers


def test_an_average_that_cuts_off_the_marks_of_stage_1_is_no_table(sources):
    # -0.99999994 is 0 as an integer, which would send every token to expert 0.
    model = copy.deepcopy(sources["stage 1"][0])
    experts_of(model)
    for layer in model.moe_layers_by_name.values():
        layer.frozen_router.routing_table.zero_()
    with pytest.raises(ValueError, match="use_buffers=False"):
        experts_of(model)


# Parts of another run


@pytest.mark.parametrize("kind", ["table", "counts", "context", "translation"])
@pytest.mark.parametrize("part", ["frozen_router", "layer", "base model", "whole"])
def test_weights_of_another_run_are_refused_whole_or_in_part(sources, kind, part):
    model, other = copy.deepcopy(sources[kind][0]), build(kind, seed=5)
    fingerprint = model.router_fingerprint()
    name = list(model.moe_layers_by_name)[-1]
    path = {"frozen_router": f"{name}.frozen_router", "layer": name, "base model": "model", "whole": ""}[part]
    with pytest.raises(ValueError, match=r"is not the routing of this model|are not those"):
        model.get_submodule(path).load_state_dict(other.get_submodule(path).state_dict())
    assert model.router_fingerprint() == fingerprint


def test_a_frozen_router_of_the_same_run_is_taken(sources):
    source, _ = sources["table"]
    model = copy.deepcopy(source)
    layer = model.model.moe_layers[1]
    layer.frozen_router.load_state_dict(source.model.moe_layers[1].frozen_router.state_dict())
    assert model.router_fingerprint() == source.router_fingerprint()


def test_a_table_written_in_place_is_followed_and_saved_with_its_fingerprint(sources, tmp_path):
    source, folder = sources["table"]
    model = fill_in_place(empty(source), folder)
    model.save_pretrained(tmp_path)
    loaded = StableMoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.router_fingerprint == source.router_fingerprint()
    assert torch.equal(experts_of(loaded), experts_of(source))


def test_another_table_written_into_a_frozen_model_in_place_is_refused(sources):
    model = copy.deepcopy(sources["table"][0])
    experts_of(model)
    with torch.no_grad():
        model.model.moe_layers[0].frozen_router.routing_table[7] += 1
        model.model.moe_layers[0].frozen_router.routing_table.remainder_(5)
    with pytest.raises(ValueError, match="is not the routing of this model"):
        experts_of(model)


def test_weights_of_stage_1_written_into_a_frozen_model_in_place_learn_again(sources):
    source, folder = sources["stage 1"]
    model = fill_in_place(copy.deepcopy(sources["table"][0]), folder)
    assert torch.equal(experts_of(model), experts_of(source))
    assert (model.routing_stage, model.router_fingerprint()) == (1, None)


# Merged checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_a_merged_checkpoint_whose_table_is_of_another_dtype_loads(sources, dtype, tmp_path):
    source, folder = sources["table"]
    shutil.copytree(folder, tmp_path / "merged")
    state = {
        name: values.to(dtype) if "routing_table" in name else values
        for name, values in load_file(folder / "model.safetensors").items()
    }
    save_file(state, tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    model = StableMoEForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(experts_of(model), experts_of(source))
    assert model.state_dict()["model.moe_layers.0.frozen_router.routing_table"].dtype == torch.int32


# Several processes


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [lambda model: model, with_adapters], ids=["plain", "PEFT"])
@pytest.mark.parametrize("kind", ["counts in stage 1", "table", "context", "translation"])
def test_distributed_data_parallel_does_not_write_to_a_routing(process_group, kind, wrap):
    model = wrap(build(kind).train())
    before = [values._version for values in model.buffers()]
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    wrapped(**inputs_of(model))
    learns = kind.endswith("stage 1")
    assert before
    assert wrapped.modules_buffers == []
    assert learns or [values._version for values in model.buffers()] == before


def test_distributed_data_parallel_gives_all_processes_the_hash_of_the_first(process_group):
    wrapped = DistributedDataParallel(build("hash"))
    assert [values.shape for values in wrapped.modules_buffers] == [(99,)] * 2
    assert torch.equal(experts_of(wrapped.module), experts_of(build("hash")))
