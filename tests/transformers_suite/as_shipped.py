"""What makes transformers' own test suite take the models of this package for models that it ships."""

import os
import unittest
from unittest import mock

import torch
from transformers.models.auto import modeling_auto
from transformers.utils import is_torchvision_available, is_vision_available

from modeling_stablemoe.model import experts_stablemoe
from modeling_stablemoe.model.layer_stablemoe import moe_layers_of


# The suite asks these mappings by class name which labels a class takes, and whether it has a head.
_NAMES = {
    "MODEL_MAPPING_NAMES": {"stablemoe": "StableMoEModel", "stablemoe-seq2seq": "StableMoESeq2SeqModel"},
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {"stablemoe": "StableMoEForCausalLM"},
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": {"stablemoe-seq2seq": "StableMoEForConditionalGeneration"},
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": {"stablemoe": "StableMoEForSequenceClassification"},
}


def name_models():
    """Enter the classes by name where the suite looks for transformers' own."""
    for mapping, names in _NAMES.items():
        getattr(modeling_auto, mapping).update(names)
    if os.environ.get("STABLEMOE_SUITE_SHARDED"):
        from tests import test_fsdp_mixin, test_tensor_parallel_mixin

        # On several processes the suite tests a few models of its choice, all of them language models.
        test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES.add("stablemoe")
        test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES.add("stablemoe")


def stand_in_for_vision(test):
    """Let the feature extraction tests ask which configs have an image processor where torchvision is not installed."""
    from tests.pipelines import test_pipelines_feature_extraction as pipeline_tests

    if not is_vision_available() or not is_torchvision_available():
        patch = mock.patch.object(pipeline_tests, "IMAGE_PROCESSOR_MAPPING", {})
        patch.start()
        test.addCleanup(patch.stop)


def show_backends(test):
    """Let a test that watches transformers' registry of expert backends watch that of stacked experts."""
    from tests import test_modeling_common

    backends = ("batched_mm_experts_forward", "grouped_mm_experts_forward")
    patches = [mock.patch.object(test_modeling_common, name, getattr(experts_stablemoe, name)) for name in backends]
    registry = experts_stablemoe.ALL_STABLEMOE_EXPERTS_FUNCTIONS
    patches.append(mock.patch("transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS", registry))
    for patch in patches:
        patch.start()
        test.addCleanup(patch.stop)


class StableMoETestMixin:
    """What the suite's tests need to know of both model families."""

    # The distilled router learns from what the rest has learned, so it needs longer than the suite's 300 steps of 1e-3.
    training_overfit_steps = 600
    training_overfit_learning_rate = 3e-3

    def setUp(self):
        super().setUp()
        if self.model_tester.get_config().expert_type == "stack":
            show_backends(self)
        stand_in_for_vision(self)

    @unittest.skip("re-entrant checkpointing cuts routing losses off from the router; the models refuse it")
    def test_training_gradient_checkpointing_use_reentrant_true(self):
        pass

    @unittest.skip("wants a warning that a name of the cache is on its way out: the models support both")
    def test_bc_cache_name_forward(self):
        pass

    @unittest.skip("wants names of earlier checkpoints back when a model is saved: it is written with those of now")
    def test_reverse_loading_mapping(self):
        pass


class FrozenStableMoETestMixin:
    """What else it needs to know of models in stage 2."""

    # What the table replaced learns no more.
    test_all_params_have_gradient = False

    @unittest.skip("initialises weights that a checkpoint lacks: a frozen routing is not made up, stage 1 runs this")
    def test_can_init_all_missing_weights(self):
        pass

    @unittest.skip("expects tables of a model on the meta device: there is nothing to freeze, stage 1 runs this")
    def test_init_weights_can_init_buffers(self):
        pass

    @unittest.skip("gives frozen weights the config of a new model, in stage 1: refused as mixed from two checkpoints")
    def test_from_pretrained_no_checkpoint(self):
        pass

    @unittest.skip("loads a checkpoint that holds one weight alone: without its frozen routing it is refused")
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass


def in_stage_2(model_class: type) -> type:
    """Derive a class whose new models are in stage 2: built as ever, given experts that do something, then frozen.

    A checkpoint's stage is its own: loading builds on the meta device, where there is nothing to freeze.
    """

    def __init__(self, config, *args, **kwargs):
        super(frozen_class, self).__init__(config, *args, **kwargs)
        if self.device.type != "meta":
            _fill_experts(self)
            self.freeze_router()

    bases = (model_class, *model_class.__bases__[1:])  # the suite looks for GenerationMixin there
    names = {"__init__": __init__, "__module__": model_class.__module__, "__doc__": model_class.__doc__}
    frozen_class = type(model_class.__name__, bases, names)
    return frozen_class


@torch.no_grad()
def _fill_experts(model):
    """Give W2, which starts at zero, values: else no comparison would see the experts."""
    for layer in moe_layers_of(model).values():
        for name, values in layer.expert_module.named_parameters():
            if name.endswith("down_proj"):
                values.normal_(std=model.config.initializer_range)
