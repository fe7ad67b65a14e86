"""Tiny dense models of other families, for the tests of what is converted from them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast


# Heads of 16 features: the root of that is a power of two, so scaling queries or scores is the same to the bit.
GPT2 = {
    "vocab_size": 99,
    "n_positions": 64,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 3,
    "n_inner": 53,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT = {
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "ffn_dim": 53,
    # Where it drops, it draws more random numbers than ours: it leaves embeddings out, but asks whether to drop a block.
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


def shaken(model):
    """Fill what starts at zero or one, so that every tensor counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def tiny_gpt2(**overrides) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return shaken(GPT2LMHeadModel(GPT2Config(**{**GPT2, **overrides})))


def tiny_opt(**overrides) -> OPTForCausalLM:
    torch.manual_seed(0)
    return shaken(OPTForCausalLM(OPTConfig(**{**OPT, **overrides})))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w1 ... w98, for the vocabulary of the tiny models."""
    words = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{i}": i for i in range(1, 99)}}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
