#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Continue a text with a StableMoE language model, or answer with one that was trained on chats.

python scripts/generate.py runs/embedded-cpu --prompt "The import statement"
python scripts/generate.py runs/chats --prompt "What is a mixture of experts?" --chat
"""

import argparse
import sys

import torch
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, set_seed

from modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.checkpoints import load_saved
from modeling_stablemoe.runs import OptionParser, cannot_load, help_of


def parse_arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OptionParser(**help_of(__doc__))
    parser.add_argument("model", help="Hub name or folder of a checkpoint")
    parser.add_argument("--prompt", default="", help="text to continue; none: start of a document")
    parser.add_argument("--chat", action="store_true", help="answer the prompt, by the tokenizer's chat template")
    parser.add_argument("--max_new_tokens", type=int, default=80, help="tokens to generate at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top_p", type=float, default=0.95, help="sample from this much probability")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    arguments = parser.parse_args(argv)
    if arguments.chat and not arguments.prompt:
        parser.error("--chat answers a --prompt: name one")
    if arguments.max_new_tokens < 1 or arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        parser.error("--max_new_tokens must be >= 1, --temperature >= 0 and --top_p in (0, 1]")
    return arguments


def encode(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """Return the ids of the prompt, in the words of the chat template if that is asked for."""
    if arguments.chat:
        if tokenizer.chat_template is None:
            raise SystemExit("error: the tokenizer has no chat template: leave out --chat")
        messages = [{"role": "user", "content": arguments.prompt}]
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        return tokenizer.apply_chat_template(messages, **options)
    prompt = arguments.prompt or tokenizer.bos_token
    if prompt is None:
        raise SystemExit("error: the tokenizer has no token for the start of a document: name a --prompt")
    if tokenizer.chat_template is not None:
        print("The tokenizer has a chat template: --chat answers the prompt by it.", file=sys.stderr)
    return tokenizer(prompt, return_tensors="pt")


def main(argv=None):
    """Run the script."""
    arguments = parse_arguments(argv)
    set_seed(arguments.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = load_saved(arguments.model, StableMoEForCausalLM, device_map="auto")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {cannot_load(arguments.model, error)}") from error
    prompt = encode(arguments, tokenizer).to(model.device)
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
    room = model.config.max_position_embeddings - prompt["input_ids"].shape[1]
    if room < 1:
        raise SystemExit(f"error: the prompt leaves no room in the {model.config.max_position_embeddings} positions.")
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=min(arguments.max_new_tokens, room), **sampling)
    stage = "frozen routing" if model.routing_stage == 2 else "routing of stage 1, not frozen"
    print(f"[{arguments.model}: {model.num_parameters():,} parameters, {stage}]")
    # Of a chat the answer alone.
    print(
        tokenizer.decode(output[0, prompt["input_ids"].shape[1] if arguments.chat else 0 :], skip_special_tokens=True)
    )


if __name__ == "__main__":
    main()
