"""The public test suite of transformers on a Llama with two experts per token in place of its first FFN."""

from as_shipped import FrozenStableMoETestMixin, in_stage_2
from decoder_only import StableMoEModelTester
from decoder_only import Stage1Test as PaperBlocksTest
from transformers import LlamaConfig

from modeling_stablemoe import (
    StableMoEConfig,
    StableMoEForCausalLM,
    StableMoEForSequenceClassification,
    StableMoEModel,
)


class LlamaBackedModelTester(StableMoEModelTester):
    """A tiny model, of the sizes that the suite has for a Llama."""

    def get_config(self):
        names = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings"
        )
        names += " bos_token_id eos_token_id pad_token_id tie_word_embeddings initializer_range"
        sizes = {name: getattr(self, name) for name in names.split()}
        # Grouped products take widths of whole 16 bytes, which the suite's is not.
        backbone = LlamaConfig(**sizes, intermediate_size=40)
        experts = {"moe_placement": "ffn", "moe_layer_positions": [1], "num_experts": 8, "num_experts_per_tok": 2}
        return StableMoEConfig(backbone_config=backbone, distilled_router_dim=8, num_labels=self.num_labels, **experts)


class FrozenLlamaBackedModelTester(LlamaBackedModelTester):
    base_model_class = in_stage_2(StableMoEModel)
    causal_lm_class = in_stage_2(StableMoEForCausalLM)
    sequence_classification_class = in_stage_2(StableMoEForSequenceClassification)


class Stage1Test(PaperBlocksTest):
    model_tester_class = LlamaBackedModelTester


class Stage2Test(FrozenStableMoETestMixin, Stage1Test):
    model_tester_class = FrozenLlamaBackedModelTester


# The suite would run the other file's tests again.
del PaperBlocksTest
