"""Names of other libraries that nobody promises us, each with what it is for: a rename fails here, by name.

Named here are the underscored, and those that a library has for its own use or does not document. The last tests look
through the package for names that are missing here.
"""

import ast
import importlib
import inspect
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
DOCUMENTED = (
    "accelerate",
    "datasets",
    "datasets.exceptions",
    "huggingface_hub",
    "huggingface_hub.utils",
    "peft",
    "safetensors",
    "safetensors.torch",
    "torch",
    "torch.autograd",
    "torch.distributed",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.functional",
    "torch.nn.utils.rnn",
    "torch.optim",
    "torch.profiler",
    "torch.utils.benchmark",
    "torch.utils.flop_counter",
    "transformers",
    "transformers.cache_utils",
    "transformers.generation",
    "transformers.modeling_outputs",
)
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
    arguments: int | None = None
    keywords: tuple[str, ...] = ()
    since: str = "5.15"


MODEL = "transformers.modeling_utils:PreTrainedModel"
USES = [
    # Decorators and helpers of transformers' own modeling files.
    Use("transformers.utils.output_capturing:_CAN_RECORD_REGISTRY", "what is recorded of a model that was pickled"),
    Use(
        "transformers.conversion_mapping:register_checkpoint_conversion_mapping",
        "`from_pretrained` reads tensors of earlier checkpoints by their earlier names",
        2,
        ("overwrite",),
    ),
    Use(
        "transformers.core_model_loading:WeightRenaming.reverse_transform", "the same; saves keep the names of now", 1
    ),
    Use("transformers.convert_slow_tokenizer:bytes_to_unicode", "tokens of a byte-level BPE are spelt", 0),
    Use("transformers.utils:CHAT_TEMPLATE_DIR", "chat templates beyond the first are published"),
    Use("transformers.trainer:TRAINER_STATE_NAME", "the newest checkpoint of a run, whose adapters are resumed"),
    Use(
        "transformers.generation:GenerationMixin._prepare_cache_for_generation",
        "a generation that is too long fails before its first step",
        6,
    ),
    Use("torch:_C._are_functorch_transforms_active", "values are not asked for under torch.func"),
    *(
        Use(f"torch:_C._functorch.{name}", "experts compute with operators that torch.func can take")
        for name in ("is_functorch_wrapped_tensor", "is_batchedtensor", "get_unwrapped")
    ),
    Use("transformers.utils.output_capturing:capture_outputs", "collects hidden states and attentions of blocks", 1),
    Use(
        "transformers.utils.output_capturing:OutputRecorder",
        "says which output of an attention module is recorded",
        1,
        ("index", "layer_name"),
    ),
    Use("transformers.utils.generic:merge_with_config_defaults", "arguments not given come from the config", 1),
    Use("transformers.utils:can_return_tuple", "`return_dict=False`", 1),
    Use(
        "transformers.utils.generic:maybe_autocast",
        "routers compute in float32 under autocast",
        0,
        ("device_type", "enabled"),
    ),
    Use("transformers.utils:is_torchdynamo_compiling", "checks of values are left out of compiled code", 0),
    Use("transformers.utils:TransformersKwargs", "types of keyword arguments"),
    Use("transformers.utils:ModelOutput", "wraps an encoder's output that came as a tuple"),
    Use("transformers.utils:logging", "one logger, and what is said once"),
    Use("transformers.processing_utils:Unpack", "types of keyword arguments"),
    Use("transformers.activations:ACT2FN", "`hidden_act` by name"),
    Use("transformers.initialization:copy_", "initialisation that leaves loaded weights alone", 2),
    Use("transformers.initialization:normal_", "initialisation that leaves loaded weights alone", 1, ("mean", "std")),
    Use("transformers.initialization:ones_", "initialisation that leaves loaded weights alone", 1),
    Use("transformers.initialization:zeros_", "initialisation that leaves loaded weights alone", 1),
    Use("transformers.modeling_layers:GradientCheckpointingLayer", "blocks that can be computed again in backward"),
    Use("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS", "`attn_implementation`"),
    Use("transformers.modeling_utils:PreTrainedModel", "the base class"),
    Use("transformers.modeling_utils:AttentionInterface.get_interface", "`attn_implementation`", 3),
    Use(
        "transformers.masking_utils:create_causal_mask",
        "the mask of a decoder",
        0,
        ("config", "inputs_embeds", "attention_mask", CACHE_NAME, "position_ids"),
    ),
    Use(
        "transformers.masking_utils:create_bidirectional_mask",
        "the masks of an encoder and of cross attention",
        0,
        ("config", "inputs_embeds", "attention_mask", "encoder_hidden_states"),
    ),
    Use(
        "transformers.masking_utils:create_masks_for_generate", "a model's own mask for generation with a static cache"
    ),
    # Backends of the experts.
    Use("transformers.integrations.moe:ExpertsInterface", "`experts_implementation` of stacked experts"),
    Use("transformers.integrations.moe:ExpertsInterface._global_mapping", "the backends of a class of experts"),
    Use("transformers.integrations.moe:ExpertsInterface.valid_keys", "the backends by name", 1),
    Use(
        "transformers.integrations.moe:use_experts_implementation",
        "sends a forward pass to the backend",
        0,
        ("experts_interface", "has_bias", "has_gate"),
    ),
    Use("transformers.integrations.moe:_grouped_linear", "one kernel for the products of all experts", 3, ("bias",)),
    Use("transformers.integrations.moe:_batched_linear", "products with the weights of each token's expert", 3),
    Use(f"{MODEL}._can_set_experts_implementation", "says that a model has backends", 0),
    Use(f"{MODEL}.get_correct_experts_implementation", "refuses a backend that there is not", 2),
    Use("transformers:PreTrainedConfig._experts_implementation", "the backend of the moment"),
    Use("transformers:PreTrainedConfig._attn_implementation", "the attention of the moment"),
    # What transformers reads from a model class.
    *(
        Use(f"{MODEL}.{name}", "what a model can do, and how it is saved and taken apart")
        for name in (
            "_auto_class",
            "_can_compile_fullgraph",
            "_can_record_outputs",
            "_no_split_modules",
            "_skip_keys_device_placement",
            "_supports_attention_backend",
            "_supports_flash_attn",
            "_supports_flex_attn",
            "_supports_sdpa",
            "_tied_weights_keys",
            "supports_gradient_checkpointing",
        )
    ),
    Use(f"{MODEL}._init_weights", "initialises what is new", 2),
    Use(f"{MODEL}._from_config", "a model of a config, in a dtype", 1, ("dtype", "attn_implementation")),
    Use(f"{MODEL}._get_resized_embeddings", "resizes the decoder's own embedding", 3, ("mean_resizing",)),
    Use(f"{MODEL}._set_gradient_checkpointing", "refuses re-entrant checkpointing", 3),
    Use(f"{MODEL}.post_init", "routers follow what initialisation has made", 1),
    Use(f"{MODEL}.tie_weights", "ties the modules of two sides", 3),
    Use(f"{MODEL}.is_remote_code", "which code files are saved", 0),
    Use("transformers.dynamic_module_utils:custom_object_save", "saves the code files of a class", 2),
    Use("transformers:PreTrainedConfig.validate_architecture", "checks the fields of a config", 1),
    # Sharding.
    Use(f"{MODEL}.maybe_distribute_model", "ties and checks before a model is sharded", 3),
    Use(f"{MODEL}.init_parallel_plans", "the plans of two sides", 1),
    Use(f"{MODEL}._ep_plan", "the plan of expert parallelism"),
    Use(f"{MODEL}._fsdp_plan", "the plan of FSDP"),
    Use(f"{MODEL}._expand_parallel_plan", "hooks experts after their parameters", 2, since="5.23"),
    Use("transformers.distributed:DistributedConfig", "whether experts are dealt out", 0, ("enable_expert_parallel",)),
    Use(
        "transformers.distributed:consolidate_distributed_checkpoint", "whether shards are joined later", since="5.20"
    ),
    Use("transformers.modeling_utils:is_fsdp_enabled", "whether another process loads the weights", 0),
    Use("transformers.modeling_utils:is_local_dist_rank_0", "whether another process loads the weights", 0),
    # Trainer and its callbacks.
    Use("transformers:Trainer._load_from_checkpoint", "loads weights before another engine wraps the model", 2),
    Use(
        "transformers:Trainer.compute_loss",
        "an evaluation over all targets",
        3,
        ("return_outputs", "num_items_in_batch"),
    ),
    Use("transformers:Trainer.prediction_step", "an evaluation over all targets", 4, ("ignore_keys",)),
    Use("transformers:Trainer.evaluation_loop", "an evaluation over all targets", 3),
    Use("transformers:Trainer.create_model_card", "the place where a model card is put", 1),
    Use("transformers:Trainer.save_model", "a card beside what is saved", 3),
    Use("transformers:Trainer.log", "brings numbers to all reporters", 2),
    Use("transformers.trainer_callback:DefaultFlowCallback", "decides what is logged before others see the step"),
    Use("transformers.trainer_callback:ExportableState", "what `trainer_state.json` keeps of a callback"),
    Use("transformers.trainer_callback:ExportableState.state", "what `trainer_state.json` keeps of a callback", 1),
    Use("transformers.trainer_callback:TrainerState", "what `trainer_state.json` holds"),
    Use("transformers.trainer_pt_utils:get_model_param_count", "the number of parameters, sharded or not", 1),
    Use(
        "transformers.trainer_utils:rotate_checkpoints",
        "deletes older checkpoints",
        0,
        ("output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"),
    ),
    # Files.
    Use("transformers.utils:SAFE_WEIGHTS_NAME", "the file of the weights"),
    Use("transformers.utils:SAFE_WEIGHTS_INDEX_NAME", "the list of the files of the weights"),
    Use("transformers.utils:cached_file", "finds the weights of a checkpoint", 2),
    Use("transformers.utils.hub:get_checkpoint_shard_files", "finds the weights of a sharded checkpoint", 2),
    Use("transformers:AutoModelForCausalLM._model_mapping", "which class belongs to a config"),
    Use("accelerate.utils:OffloadedWeightsLoader", "where offloaded weights are"),
    Use("accelerate.utils:PrefixedDataset", "where offloaded weights are"),
    Use(
        "accelerate.utils:extract_model_from_parallel", "the model in what an engine made", 1, ("keep_torch_compile",)
    ),
    Use("accelerate.utils:broadcast_object_list", "what the first process has found", 1),
    Use("accelerate.utils.constants:FSDP_MODEL_NAME", "files of a checkpoint of FSDP"),
    Use("accelerate.hooks:remove_hook_from_submodules", "takes offloaded experts out of accelerate's hands", 1),
    Use("datasets.fingerprint:Hasher", "names what is cached"),
    Use("datasets.fingerprint:Hasher.hash", "names what is cached", 1),
    Use("torch:Tensor._version", "whether a frozen routing has been written to"),
    # Benchmarks.
    Use("torch:_dynamo.config.recompile_limit", "shapes that a compiled layer is timed at"),
    *(
        Use(f"transformers.models.{module}:{name}", "a layer to be timed beside ours")
        for module, names in {
            "mixtral.modeling_mixtral": ("MixtralRMSNorm", "MixtralSparseMoeBlock"),
            "olmoe.modeling_olmoe": ("OlmoeRMSNorm", "OlmoeSparseMoeBlock"),
            "qwen3_moe.modeling_qwen3_moe": ("Qwen3MoeRMSNorm", "Qwen3MoeSparseMoeBlock"),
            "switch_transformers.modeling_switch_transformers": (
                "SwitchTransformersLayerNorm",
                "SwitchTransformersSparseMLP",
            ),
        }.items()
        for name in names
    ),
]


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
