"""The public test suite of transformers on the translation model; see `tests/helpers/scripts/run_transformers_suite.py`."""

import unittest

from as_shipped import FrozenStableMoETestMixin, StableMoETestMixin, in_stage_2, name_models
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_pipeline_mixin import PipelineTesterMixin

from modeling_stablemoe import StableMoEForConditionalGeneration, StableMoESeq2SeqConfig, StableMoESeq2SeqModel


name_models()


class StableMoESeq2SeqModelTester:
    """A tiny model and its inputs, of the sizes that the suite gives its encoder-decoders."""

    config_class = StableMoESeq2SeqConfig
    base_model_class = StableMoESeq2SeqModel
    seq2seq_class = StableMoEForConditionalGeneration
    batch_size = 13
    # Of one length: the suite masks the target with the mask of the source.
    encoder_seq_length = decoder_seq_length = seq_length = 7
    is_training = True
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> StableMoESeq2SeqConfig:
        return StableMoESeq2SeqConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_attention_heads=self.num_attention_heads,
            encoder_layers=self.num_hidden_layers,
            decoder_layers=self.num_hidden_layers,
            encoder_moe_layer_positions=[1],
            decoder_moe_layer_positions=[1],
            max_position_embeddings=128,
            initializer_range=0.02,
            num_experts=8,
            num_expert_sublayers=2,
            distilled_router_dim=8,
            label_smoothing=0.0,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=1,
        )

    def prepare_config_and_inputs_for_common(self):
        source, target = (self.batch_size, self.encoder_seq_length), (self.batch_size, self.decoder_seq_length)
        inputs = {
            "input_ids": ids_tensor(source, self.vocab_size),
            "attention_mask": ids_tensor(source, 2),
            "decoder_input_ids": ids_tensor(target, self.vocab_size),
            "decoder_attention_mask": ids_tensor(target, 2),
        }
        # Else `generate` would put it first, in front of the mask, too, when it is asked to continue.
        inputs["decoder_input_ids"][:, 0] = 1
        return self.get_config(), inputs


class FrozenStableMoESeq2SeqModelTester(StableMoESeq2SeqModelTester):
    base_model_class = in_stage_2(StableMoESeq2SeqModel)
    seq2seq_class = in_stage_2(StableMoEForConditionalGeneration)


# The parts that the suite's own encoder-decoders take: the others know decoders alone.
class Stage1Test(StableMoETestMixin, ModelTesterMixin, GenerationTesterMixin, PipelineTesterMixin, unittest.TestCase):
    model_tester_class = StableMoESeq2SeqModelTester
    is_encoder_decoder = True

    def setUp(self):
        super().setUp()
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(self, config_class=StableMoESeq2SeqConfig, hidden_size=32)
        self.all_model_classes = (self.model_tester.base_model_class, self.model_tester.seq2seq_class)
        self.pipeline_model_mapping = {"feature-extraction": self.model_tester.base_model_class}

    def test_config(self):
        self.config_tester.run_common_tests()


class Stage2Test(FrozenStableMoETestMixin, Stage1Test):
    model_tester_class = FrozenStableMoESeq2SeqModelTester
