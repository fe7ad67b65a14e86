"""Ways in which programs bring the weights of a checkpoint into a model, and kinds of models to bring."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights, load_checkpoint_and_dispatch, load_checkpoint_in_model
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from helpers.models import TINY, TINY_SEQ2SEQ
from modeling_stablemoe import (
    StableMoEConfig,
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoEForSequenceClassification,
    StableMoESeq2SeqConfig,
)


# Where `device_map` puts all of a model on the disk, "auto" too if nothing fits into memory.
on_disk = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"),
    reason="this accelerate refuses a model that is on the disk as a whole",
)

LIMITED = {"distilled_router": "counts", "max_frozen_load": 1.5}


def build(kind: str, seed: int = 0) -> PreTrainedModel:
    """Build a model of a kind: "stage 1" or what its routing is frozen into."""
    torch.manual_seed(seed)
    if kind == "translation":
        model = StableMoEForConditionalGeneration(StableMoESeq2SeqConfig(**TINY_SEQ2SEQ))
    elif kind == "classifier":
        model = StableMoEForSequenceClassification(StableMoEConfig(**TINY, num_labels=3))
    else:
        options = {
            "counts": LIMITED,
            "counts in stage 1": LIMITED,
            "hash": {"router_type": "hash"},
            "context": {"distilled_router": "cnn"},
            "two experts": {"num_experts_per_tok": 2},
        }
        model = StableMoEForCausalLM(
            StableMoEConfig(**{**TINY, "moe_layer_positions": [0, 2]} | options.get(kind, {}))
        )
    if kind.startswith("counts"):
        ids = torch.randint(99, (8, 12))
        for _ in range(3):
            model.train()(ids, labels=ids)
    if kind not in ("stage 1", "counts in stage 1", "hash"):
        model.freeze_router()
    return model.eval()


KINDS = (
    "stage 1",
    "counts in stage 1",
    "table",
    "counts",
    "hash",
    "context",
    "two experts",
    "translation",
    "classifier",
)


def empty(source: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build a model of the same shape, initialised otherwise and in stage 1 (but for a hash)."""
    config = copy.deepcopy(source.config)
    config.router_fingerprint = None
    torch.manual_seed(1234)
    return type(source)._from_config(config, dtype=dtype or source.dtype).eval()


def whole_state(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, tied ones under both names."""
    state = load_file(folder / "model.safetensors")
    for tied, name in (
        ("lm_head.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "model.encoder.embed_tokens.weight"),
        ("model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight"),
    ):
        if name in state and tied not in state and "score.weight" not in state:
            state[tied] = state[name]
    return state


def fill_in_place(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    state = whole_state(folder)
    with torch.no_grad():
        for name, values in model.state_dict().items():
            values.copy_(state[name])
    return model


def fill_data(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    state = whole_state(folder)
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        values.data.copy_(state[name])
    return model


def fill_after_a_pass(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    ids = torch.ones(1, 2, dtype=torch.long)
    model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return fill_data(model, folder)


def meta_then_fill(source: PreTrainedModel, folder: Path, dtype: torch.dtype, is_cast: bool) -> PreTrainedModel:
    """Build everything on the meta device, buffers in the model's dtype too if `is_cast`, then fill it."""
    with init_empty_weights(include_buffers=True):
        model = type(source)(copy.deepcopy(source.config))
    if is_cast:
        for module in model.modules():
            for name, values in module._buffers.items():
                module._buffers[name] = torch.empty_like(values, dtype=dtype)
    model = model.to(dtype).to_empty(device="cpu").eval()
    model.tie_weights()
    return fill_data(model, folder)


def through_dcp(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process
        path = folder / "dcp"
        dcp.save(whole_state(folder), checkpoint_id=path)
        dcp.load(model.state_dict(), checkpoint_id=path)
    return model


def through_pickle(model: PreTrainedModel) -> PreTrainedModel:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def loaded(model: PreTrainedModel, state: dict[str, Tensor], **options) -> PreTrainedModel:
    model.load_state_dict(state, **options)
    return model


def with_base_loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    state = whole_state(folder)
    model.base_model.load_state_dict({n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.")})
    return model


def with_layers_loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    state = whole_state(folder)
    for name, layer in model.moe_layers_by_name.items():
        layer.load_state_dict({n.removeprefix(f"{name}."): v for n, v in state.items() if n.startswith(f"{name}.")})
    return model


def sharded(source: PreTrainedModel, folder: Path) -> PreTrainedModel:
    source.save_pretrained(folder / "shards", max_shard_size="20KB")
    return type(source).from_pretrained(folder / "shards")


def from_subfolder(source: PreTrainedModel, folder: Path) -> PreTrainedModel:
    source.save_pretrained(folder / "part")
    return type(source).from_pretrained(folder, subfolder="part")


def averaged(source: PreTrainedModel, number: int) -> dict[str, Tensor]:
    """Average equal models, as a soup does."""
    state = source.state_dict()
    return {name: sum(values.double() / number for _ in range(number)) for name, values in state.items()}


# By name: from the model that was saved and its folder, whose checkpoint is plain, to what was loaded.
LOADERS: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "from_pretrained": lambda source, folder: type(source).from_pretrained(folder),
    'from_pretrained(device_map="auto")': lambda source, folder: type(source).from_pretrained(
        folder, device_map="auto"
    ),
    "from_pretrained(dtype=bfloat16)": lambda source, folder: type(source).from_pretrained(
        folder, dtype=torch.bfloat16
    ),
    "from_pretrained, sharded": sharded,
    "from_pretrained(subfolder=)": from_subfolder,
    "half()": lambda source, folder: copy.deepcopy(source).half(),
    "deepcopy": lambda source, folder: copy.deepcopy(source),
    "pickle": lambda source, folder: pickle.loads(pickle.dumps(type(source).from_pretrained(folder))),
    "torch.save, torch.load": lambda source, folder: through_pickle(type(source).from_pretrained(folder)),
    "load_state_dict": lambda source, folder: loaded(empty(source), whole_state(folder)),
    "load_state_dict(assign=True)": lambda source, folder: loaded(empty(source), whole_state(folder), assign=True),
    "load_state_dict of the base model": lambda source, folder: with_base_loaded(empty(source), folder),
    "load_state_dict of each MoE layer": lambda source, folder: with_layers_loaded(empty(source), folder),
    "load_state_dict of an average of three": lambda source, folder: loaded(empty(source), averaged(source, 3)),
    "load_checkpoint_and_dispatch": lambda source, folder: load_checkpoint_and_dispatch(
        empty(source), str(folder), device_map={"": "cpu"}
    ),
    "load_checkpoint_in_model": lambda source, folder: (
        load_checkpoint_in_model(model := empty(source), str(folder)),
        model,
    )[1],
    "copy into .data": lambda source, folder: fill_data(empty(source), folder),
    "copy into .data after a forward pass": lambda source, folder: fill_after_a_pass(empty(source), folder),
    "copy into state_dict()": lambda source, folder: fill_in_place(empty(source), folder),
    "dcp.load into state_dict()": lambda source, folder: through_dcp(empty(source), folder),
    "meta device, then filled": lambda source, folder: meta_then_fill(source, folder, torch.float32, False),
    "meta device, all in float32": lambda source, folder: meta_then_fill(source, folder, torch.float32, True),
    "meta device, all in bfloat16": lambda source, folder: meta_then_fill(source, folder, torch.bfloat16, True),
}


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Make a batch that holds every id at some place."""
    size = model.config.vocab_size
    ids = torch.arange(size - size % 9).view(-1, 9).flip(0)
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})}


@torch.no_grad()
def experts_of(model: PreTrainedModel) -> Tensor:
    """Return the experts of a forward pass, `(MoE layers, rows, length)`."""
    outputs = model(**inputs_of(model), output_router_logits=True)
    return torch.stack(outputs.expert_indices)
