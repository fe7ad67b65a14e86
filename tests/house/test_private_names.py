"""Names of other libraries that nobody promises us, each with what it is for: a rename fails here, by name.

Named here are the underscored, and those that a library has for its own use or does not document. The last tests look
through the package for names that are missing here.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from accelerate.state import GradientState
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from packaging.version import Version
from torch import nn
from transformers.cache_utils import DynamicCache, StaticLayer

import modeling_stablemoe
from modeling_stablemoe import (
    StableMoEConfig,
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoEForSequenceClassification,
    StableMoEModel,
    StableMoESeq2SeqConfig,
    StableMoESeq2SeqModel,
)
from modeling_stablemoe.model.experts_stablemoe import StableMoEExpertsInterface
from modeling_stablemoe.model.versions_stablemoe import CACHE_NAME


PACKAGE = Path(modeling_stablemoe.__file__).parent
VERSION = Version(transformers.__version__)
# Modules whose names are documented, but for the underscored.
DOCUMENTED = """
    accelerate datasets datasets.exceptions huggingface_hub huggingface_hub.utils peft safetensors safetensors.torch torch
    torch.autograd torch.distributed torch.distributed.checkpoint.state_dict torch.distributed.fsdp torch.distributed.tensor
    torch.nn.functional torch.nn.utils.rnn torch.optim torch.profiler torch.utils.benchmark torch.utils.flop_counter
    transformers transformers.cache_utils transformers.generation transformers.modeling_outputs
""".split()
OURS = [
    StableMoEConfig,
    StableMoESeq2SeqConfig,
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoEForSequenceClassification,
    StableMoEModel,
    StableMoESeq2SeqModel,
]


class Use(NamedTuple):
    """A name, and what happens with it.

    Attributes:
        name: module, colon, name in it.
        purpose: what it is for.
        arguments: how many we pass by position, `self` of a method included.
        keywords: those we pass by name.
        since: the first version of transformers that has the name.
    """

    name: str
    purpose: str
    arguments: int | None
    keywords: list[str]
    since: str


def read_uses(text: str) -> Iterator[Use]:
    """Read the names by module, each as `name(arguments, keyword, ...) [since]`, and after a colon the purpose."""
    module = None
    for line in text.replace("\n        ", " ").strip().splitlines():
        if not line.startswith(" "):
            module = line
            continue
        names, _, purpose = line.strip().partition(": ")
        for path, passed, since in re.findall(r"([\w.]+)(?:\(([^)]*)\))?(?: \[([\d.]+)\])?(?:, |$)", names):
            arguments, *keywords = passed.split(", ")
            yield Use(f"{module}:{path}", purpose, int(arguments) if passed else None, keywords, since or "5.15")


USES = list(
    read_uses(f"""
transformers.utils.output_capturing
    _CAN_RECORD_REGISTRY: what is recorded of a model that was pickled
    capture_outputs(1): collects hidden states and attentions of blocks
    OutputRecorder(1, index, layer_name): says which output of an attention module is recorded
transformers.conversion_mapping
    register_checkpoint_conversion_mapping(2, overwrite): `from_pretrained` reads tensors of earlier checkpoints by
        their earlier names
transformers.core_model_loading
    WeightRenaming.reverse_transform(1): the same, the other way: saves keep the names of now
    WeightConverter(2, operations): experts that a checkpoint names one by one become a stack
    MergeModulelist(0, dim), Concatenate(0, dim): the same
transformers.convert_slow_tokenizer
    bytes_to_unicode(0): tokens of a byte-level BPE are spelt
transformers.utils
    CHAT_TEMPLATE_DIR: chat templates beyond the first are published
    can_return_tuple(1): `return_dict=False`
    is_torchdynamo_compiling(0): checks of values are left out of compiled code
    TransformersKwargs: types of keyword arguments
    ModelOutput: wraps an encoder's output that came as a tuple
    logging: one logger, and what is said once
    SAFE_WEIGHTS_NAME: the file of the weights
    SAFE_WEIGHTS_INDEX_NAME: the list of the files of the weights
    cached_file(2): finds the weights of a checkpoint
transformers.trainer
    TRAINER_STATE_NAME: the newest checkpoint of a run, whose adapters are resumed
transformers.generation
    GenerationMixin._prepare_cache_for_generation(6): a generation that is too long fails before its first step
torch
    _C._are_functorch_transforms_active: values are not asked for under torch.func
    _C._functorch.is_functorch_wrapped_tensor, _C._functorch.is_batchedtensor, _C._functorch.get_unwrapped: experts
        compute with operators that torch.func can take
    Tensor._version: whether a frozen routing has been written to
    _dynamo.config.recompile_limit: shapes that a compiled layer is timed at
transformers.utils.generic
    merge_with_config_defaults(1): arguments not given come from the config
    maybe_autocast(0, device_type, enabled): routers compute in float32 under autocast
transformers.processing_utils
    Unpack: types of keyword arguments
transformers.activations
    ACT2FN: `hidden_act` by name
transformers.initialization
    copy_(2), normal_(1, mean, std), ones_(1), zeros_(1): initialisation that leaves loaded weights alone
transformers.modeling_layers
    GradientCheckpointingLayer: blocks that can be computed again in backward
transformers.modeling_utils
    ALL_ATTENTION_FUNCTIONS, AttentionInterface.get_interface(3): `attn_implementation`
    PreTrainedModel: the base class
    PreTrainedModel._can_set_experts_implementation(0): says that a model has backends
    PreTrainedModel.get_correct_experts_implementation(2): refuses a backend that there is not
    PreTrainedModel._auto_class, PreTrainedModel._can_compile_fullgraph, PreTrainedModel._can_record_outputs,
        PreTrainedModel._no_split_modules, PreTrainedModel._skip_keys_device_placement,
        PreTrainedModel._supports_attention_backend, PreTrainedModel._supports_flash_attn,
        PreTrainedModel._supports_flex_attn, PreTrainedModel._supports_sdpa, PreTrainedModel._tied_weights_keys,
        PreTrainedModel.supports_gradient_checkpointing: what a model can do, and how it is saved and taken apart
    PreTrainedModel._keys_to_ignore_on_save: keys that Trainer does not miss when it resumes
    PreTrainedModel._init_weights(2): initialises what is new
    PreTrainedModel._from_config(1, dtype, attn_implementation): a model of a config, in a dtype
    PreTrainedModel._get_resized_embeddings(3, mean_resizing): resizes the decoder's own embedding
    PreTrainedModel._set_gradient_checkpointing(3): refuses re-entrant checkpointing
    PreTrainedModel.post_init(1): routers follow what initialisation has made
    PreTrainedModel.tie_weights(3): ties the modules of two sides
    PreTrainedModel.is_remote_code(0): which code files are saved
    PreTrainedModel.maybe_distribute_model(3): ties and checks before a model is sharded
    PreTrainedModel.init_parallel_plans(1): the plans of two sides
    PreTrainedModel._ep_plan: the plan of expert parallelism
    PreTrainedModel._fsdp_plan: the plan of FSDP
    PreTrainedModel._expand_parallel_plan(2) [5.23]: hooks experts after their parameters
    is_fsdp_enabled(0), is_local_dist_rank_0(0): whether another process loads the weights
transformers.masking_utils
    create_causal_mask(0, config, inputs_embeds, attention_mask, {CACHE_NAME}, position_ids): the mask of a decoder
    create_bidirectional_mask(0, config, inputs_embeds, attention_mask, encoder_hidden_states): the masks of an
        encoder and of cross attention
    create_masks_for_generate: a model's own mask for generation with a static cache
transformers.integrations.moe
    ExpertsInterface: `experts_implementation` of stacked experts
    ExpertsInterface._global_mapping: the backends of a class of experts
    ExpertsInterface.valid_keys(1): the backends by name
    use_experts_implementation(0, experts_interface, has_bias, has_gate): sends a forward pass to the backend
    _grouped_linear(3, bias): one kernel for the products of all experts
    _batched_linear(3): products with the weights of each token's expert
transformers
    PreTrainedConfig._experts_implementation: the backend of the moment
    PreTrainedConfig._attn_implementation: the attention of the moment
    PreTrainedConfig.validate_architecture(1): checks the fields of a config
    Trainer._load_from_checkpoint(2): loads weights before another engine wraps the model
    Trainer.compute_loss(3, return_outputs, num_items_in_batch), Trainer.prediction_step(4, ignore_keys),
        Trainer.evaluation_loop(3): an evaluation over all targets
    Trainer.create_model_card(1): the place where a model card is put
    Trainer.save_model(3): a card beside what is saved
    Trainer.log(2): brings numbers to all reporters
    AutoModelForCausalLM._model_mapping: which class belongs to a config
transformers.dynamic_module_utils
    custom_object_save(2): saves the code files of a class
transformers.distributed
    DistributedConfig(0, enable_expert_parallel): whether experts are dealt out
    consolidate_distributed_checkpoint [5.20]: whether shards are joined later
transformers.integrations
    INTEGRATION_TO_CALLBACK, get_available_reporting_integrations(0): which reporters there are, and which are installed
transformers.trainer_callback
    DefaultFlowCallback: decides what is logged before others see the step
    ExportableState, ExportableState.state(1): what `trainer_state.json` keeps of a callback
    TrainerState: what `trainer_state.json` holds
transformers.trainer_pt_utils
    get_model_param_count(1): the number of parameters, sharded or not
transformers.trainer_utils
    rotate_checkpoints(0, output_dir, save_total_limit, best_model_checkpoint, use_mtime): deletes older checkpoints
transformers.utils.hub
    get_checkpoint_shard_files(2): finds the weights of a sharded checkpoint
accelerate.utils
    OffloadedWeightsLoader, PrefixedDataset: where offloaded weights are
    extract_model_from_parallel(1, keep_torch_compile): the model in what an engine made
    broadcast_object_list(1): what the first process has found
accelerate.utils.constants
    FSDP_MODEL_NAME: files of a checkpoint of FSDP
accelerate.hooks
    remove_hook_from_submodules(1): takes offloaded experts out of accelerate's hands
datasets.fingerprint
    Hasher, Hasher.hash(1): names what is cached
transformers.models.mixtral.modeling_mixtral
    MixtralExperts._apply_gate(2): what a class of gated experts is given, the activation of the gate times the rest
    MixtralRMSNorm, MixtralSparseMoeBlock: a layer to be timed beside ours
transformers.models.olmoe.modeling_olmoe
    OlmoeRMSNorm, OlmoeSparseMoeBlock: a layer to be timed beside ours
transformers.models.qwen3_moe.modeling_qwen3_moe
    Qwen3MoeRMSNorm, Qwen3MoeSparseMoeBlock: a layer to be timed beside ours
transformers.models.switch_transformers.modeling_switch_transformers
    SwitchTransformersLayerNorm, SwitchTransformersSparseMLP: a layer to be timed beside ours
""")
)


def offloaded_layer() -> nn.Module:
    layer = nn.Linear(1, 1)
    return add_hook_to_module(
        layer, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=layer.state_dict())
    )


def filled_layer():
    layer = StaticLayer(max_cache_len=2)
    layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), cache_position=torch.zeros(1, dtype=torch.long))
    return layer


# Of objects: how to get one, the names, and what they are for.
ATTRIBUTES = {
    "a cache": (
        DynamicCache,
        ("layers", "offloading", "layer_class_to_replicate"),
        "token ids for routers that look back",
    ),
    "a layer of a cache": (
        filled_layer,
        ("is_initialized", "is_compileable", "keys", "max_cache_len", "get_seq_length"),
        "token ids for routers that look back",
    ),
    "an offloaded module": (
        offloaded_layer,
        ("_hf_hook.offload", "_hf_hook.weights_map"),
        "parameters that a hook brings: their values, and that they are no lost ones",
    ),
    "several hooks": (
        lambda: SequentialHook(AlignDevicesHook()),
        ("hooks",),
        "parameters that one of several hooks brings",
    ),
    "part of offloaded weights": (lambda: PrefixedDataset({}, "a."), ("dataset", "prefix"), "the file of a weight"),
    "offloaded weights": (
        lambda: OffloadedWeightsLoader(state_dict={}),
        ("state_dict", "index"),
        "the file of a weight",
    ),
    "a module": (
        nn.Module,
        ("_buffers", "_forward_hooks", "_modules"),
        "integers that casts of a model have reached; models that are pickled without the hooks of recording",
    ),
    "accelerate's last batch": (GradientState, ("end_of_dataloader", "remainder"), "rows that fill up a last batch"),
}


def find(use: Use):
    module, _, path = use.name.partition(":")
    try:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{use.name} is gone ({error}); it is for: {use.purpose}", pytrace=False)
    return found


@pytest.mark.parametrize("use", USES, ids=lambda use: use.name)
def test_a_name_is_there_and_takes_what_is_passed(use):
    if Version(use.since) > VERSION:
        pytest.skip(f"in transformers from {use.since}")
    found = find(use)
    if use.arguments is None:
        return
    try:
        inspect.signature(found).bind(*range(use.arguments), **dict.fromkeys(use.keywords))
    except TypeError as error:
        pytest.fail(f"{use.name}{inspect.signature(found)}: {error}; it is for: {use.purpose}", pytrace=False)


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_an_object_has_what_is_read_of_it(kind):
    make, names, purpose = ATTRIBUTES[kind]
    thing = make()
    for name in names:
        value = thing
        for part in name.split("."):
            assert hasattr(value, part), f"{kind} has no `{name}` any more; it is for: {purpose}"
            value = getattr(value, part)


def overridden(name: str, model_class: type) -> tuple[object, object] | None:
    """Find a name in a class of ours and in the nearest class of others that it stands before."""
    holders = [each for each in model_class.__mro__ if name in vars(each) and each is not object]
    ours = [each for each in holders if each.__module__.startswith("modeling_stablemoe")]
    theirs = [each for each in holders if each not in ours and each is not nn.Module]
    return (getattr(ours[0], name), getattr(theirs[0], name)) if ours and theirs else None


@pytest.mark.parametrize("model_class", OURS, ids=lambda each: each.__name__)
def test_a_method_takes_all_that_the_one_it_stands_before_takes(model_class):
    seen = []
    for name in dir(model_class):
        methods = overridden(name, model_class)
        if methods is None or not all(map(inspect.isroutine, methods)) or name in ("__init__", "forward"):
            continue
        seen.append(name)
        ours, theirs = map(inspect.signature, methods)
        kinds = {each.kind for each in ours.parameters.values()}
        if inspect.Parameter.VAR_KEYWORD in kinds:
            continue
        missing = [each for each in theirs.parameters if each not in ours.parameters and each != "kwargs"]
        assert not missing, f"{name} is now called with {missing}, which {model_class.__name__} does not take"
    assert seen


@cache
def nodes(kind: type) -> list[tuple[str, ast.AST]]:
    """The places of one kind in the source, each with the name of its file."""
    return [(file, node) for file, node in all_nodes() if isinstance(node, kind)]


@cache
def all_nodes() -> list[tuple[str, ast.AST]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [(path.name, node) for path in files for node in ast.walk(ast.parse(path.read_text()))]


def named(module: str, name: str) -> bool:
    return any(use.name == f"{module}:{name}" or use.name.startswith(f"{module}:{name}.") for use in USES)


def test_every_undocumented_import_of_the_package_is_named():
    libraries = {module.partition(".")[0] for module in DOCUMENTED}
    missing = [
        f"{node.module}:{alias.name} in {file}"
        for file, node in nodes(ast.ImportFrom)
        if not node.level and node.module.partition(".")[0] in libraries
        for alias in node.names
        if node.module not in DOCUMENTED or alias.name.startswith("_")
        if not named(node.module, alias.name)
        # Modules are no names of their own: what is read of them is named.
        if not any(use.name.startswith(f"{node.module}.{alias.name}:") for use in USES)
    ]
    assert not missing, f"name in USES, with what it is for: {missing}"


def test_every_underscored_name_of_others_is_named():
    attributes = [(file, node) for file, node in nodes(ast.Attribute) if node.attr.startswith("_")]
    known = {"_asdict", "_fields", "_replace"}  # of named tuples
    known |= {node.name for _, node in nodes(ast.FunctionDef | ast.ClassDef)}
    known |= {node.attr for _, node in attributes if isinstance(node.ctx, ast.Store)}
    known |= {node.id for _, node in nodes(ast.Name) if isinstance(node.ctx, ast.Store)}
    names = {part for use in USES for part in use.name.partition(":")[2].split(".")}
    names |= {part for _, read, _ in ATTRIBUTES.values() for name in read for part in name.split(".")}
    missing = {
        f"{node.attr} in {file}"
        for file, node in attributes
        if not node.attr.startswith("__") and node.attr not in known | names
    }
    # What a class of ours sets for its base to read.
    missing |= {
        f"{name} of {each.__name__}"
        for each in (*OURS, StableMoEExpertsInterface)
        for name in dir(each)
        if name.startswith("_") and not name.startswith(("__", "_abc_"))
        if name not in names and overridden(name, each)
    }
    assert not missing, f"name in USES, with what it is for: {missing}"
