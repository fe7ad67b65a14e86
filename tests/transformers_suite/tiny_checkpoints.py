"""Tiny checkpoints for the pipeline tests of transformers' suite, in the layout that it looks for them on disk."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as tokenizer_decoders
from transformers import PreTrainedTokenizerFast, set_seed

from modeling_stablemoe import (
    StableMoEForCausalLM,
    StableMoEForConditionalGeneration,
    StableMoEForSequenceClassification,
    StableMoEModel,
    StableMoESeq2SeqModel,
)
from modeling_stablemoe.model.configuration_stablemoe import EXPERT_PARAMETERS
from modeling_stablemoe.model.layer_stablemoe import moe_layers_of


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_experts": 8,
    "num_expert_sublayers": 2,
    "distilled_router_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_CAUSAL, _SEQ2SEQ = {"num_hidden_layers": 2}, {"encoder_layers": 2, "decoder_layers": 2}
_DEPTHS = {
    StableMoEModel: _CAUSAL,
    StableMoEForCausalLM: _CAUSAL,
    StableMoEForSequenceClassification: _CAUSAL,
    StableMoESeq2SeqModel: _SEQ2SEQ,
    StableMoEForConditionalGeneration: _SEQ2SEQ,
}


def write_tiny_checkpoints(folder: Path, stage: int):
    """Write a checkpoint of every class that the package has, and the summary that the suite reads."""
    tokenizer = _train_tokenizer()
    summary = {}
    for model_class, depths in _DEPTHS.items():
        set_seed(0)
        model = model_class(model_class.config_class(vocab_size=len(tokenizer), **depths, **_SIZES))
        for layer in moe_layers_of(model).values():
            for sublayer in layer.expert_stack.sublayers:
                for name in EXPERT_PARAMETERS:
                    getattr(sublayer, name).data.normal_(std=0.1)
        if stage == 2:
            model.freeze_router()
        checkpoint = folder / model.config.model_type / model_class.__name__
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        summary[model_class.__name__] = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))


def _train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizer_decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([__doc__], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=_SIZES["max_position_embeddings"],
        padding_side="left",
    )
