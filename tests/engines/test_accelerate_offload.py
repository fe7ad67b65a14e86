"""Tests of models that accelerate has offloaded, buffers or not: they route, are saved and loaded as they were."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch

from helpers.loaders import KINDS, build, experts_of, on_disk
from helpers.models import tiny_model


def map_of(model, where: str) -> dict[str, str]:
    """Send the MoE layers `where`, all else to the CPU, which counts as the device that computes."""
    away = set(model.moe_layers_by_name)

    def entries(module, prefix):
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path in away:
                yield path, where
            elif any(other.startswith(f"{path}.") for other in away):
                yield from entries(child, f"{path}.")
            else:
                yield path, "cpu"

    return dict(entries(model, ""))


def dispatched(source, folder, tmp_path, offload_buffers: bool = True):
    with init_empty_weights():
        model = type(source)(source.config)
    model.tie_weights()
    return load_checkpoint_and_dispatch(
        model, str(folder), map_of(source, "disk"), offload_folder=str(tmp_path), offload_buffers=offload_buffers
    ).eval()


def mapped(source, folder, tmp_path, device_map, **options):
    return type(source).from_pretrained(folder, device_map=device_map, offload_folder=tmp_path, **options)


WAYS = {
    "all on disk": lambda source, folder, tmp: mapped(source, folder, tmp, {"": "disk"}),
    "MoE layers on disk": lambda source, folder, tmp: mapped(source, folder, tmp, map_of(source, "disk")),
    "MoE layers and buffers on disk": lambda source, folder, tmp: mapped(
        source, folder, tmp, map_of(source, "disk"), offload_buffers=True
    ),
    "auto": lambda source, folder, tmp: mapped(
        source, folder, tmp, "auto", max_memory={"cpu": 40_000}, offload_buffers=True
    ),
    "cpu_offload": lambda source, folder, tmp: cpu_offload(type(source).from_pretrained(folder), "cpu"),
    "cpu_offload, buffers": lambda source, folder, tmp: cpu_offload(
        type(source).from_pretrained(folder), "cpu", offload_buffers=True
    ),
    "disk_offload": lambda source, folder, tmp: disk_offload(type(source).from_pretrained(folder), tmp, "cpu"),
    "disk_offload, buffers": lambda source, folder, tmp: disk_offload(
        type(source).from_pretrained(folder), tmp, "cpu", offload_buffers=True
    ),
    "load_checkpoint_and_dispatch, buffers": lambda source, folder, tmp: dispatched(source, folder, tmp),
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    source, folder = build(request.param), tmp_path_factory.mktemp("saved")
    source.save_pretrained(folder)
    return source, folder


@pytest.mark.pairs
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=on_disk) if way in ("all on disk", "auto") else way for way in WAYS]
)
def test_an_offloaded_model_routes_and_is_saved_as_it_was(saved, way, tmp_path):
    source, folder = saved
    model = WAYS[way](source, folder, tmp_path / "offloaded")
    assert any(values.is_meta for values in model.parameters())
    assert model.routing_stage == source.routing_stage
    assert model.config.router_fingerprint == source.config.router_fingerprint
    assert torch.equal(experts_of(model), experts_of(source))
    model.save_pretrained(tmp_path / "again")
    again = type(source).from_pretrained(tmp_path / "again").state_dict()
    assert again.keys() == source.state_dict().keys()
    for name, values in source.state_dict().items():
        assert torch.equal(again[name], values), name


@pytest.mark.parametrize("kind", ["counts in stage 1", "table", "context"])
def test_buffers_that_accelerate_leaves_in_the_file_are_an_error(kind, tmp_path):
    source, folder = build(kind), tmp_path / "saved"
    source.save_pretrained(folder)
    # Else a frozen model would come out in stage 1, and one that counts without its counts.
    with pytest.raises(ValueError, match=r"(routing_table|expert_counts|embedding) is on the meta device"):
        dispatched(source, folder, tmp_path, offload_buffers=False)


def test_a_routing_that_is_offloaded_is_not_changed():
    model = cpu_offload(tiny_model(), "cpu")
    for change in (model.freeze_router, lambda: model.set_routing_tables(torch.zeros(1, 99, dtype=torch.long))):
        with pytest.raises(ValueError, match=r"router\.centroids.* are offloaded\. Load the model without offloading"):
            change()
    assert model.routing_stage == 1
    counting = cpu_offload(tiny_model(distilled_router="counts"), "cpu", offload_buffers=True)
    router = next(iter(counting.moe_layers_by_name.values())).router.distilled_router
    with pytest.raises(ValueError, match="is offloaded, so nothing can be added to it"):
        router.observe(torch.tensor([3]), torch.tensor([1]), None)
