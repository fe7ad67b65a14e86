#!/usr/bin/env python
# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Turn a dense language model into a StableMoE with the same logits, ready for both stages of training.

python scripts/convert_dense.py openai-community/gpt2 runs/gpt2-moe --num_experts 8
python scripts/convert_dense.py HuggingFaceTB/SmolLM2-135M runs/smollm2-moe --num_experts 8 --dtype bfloat16
python scripts/convert_dense.py runs/my-gpt2 runs/moe --model_preset configuration/models/cpu-small.json --dry_run
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer, PreTrainedModel

from modeling_stablemoe import StableMoEForCausalLM
from modeling_stablemoe.checkpoints import require_new_folder
from modeling_stablemoe.convert import (
    check_overrides,
    compare_logits,
    ids_to_compare,
    load_dense,
    routing_of_preset,
    save_converted,
)
from modeling_stablemoe.runs import (
    OptionParser,
    cannot_load,
    help_of,
    one_line_errors,
    parse_overrides,
    quiet_libraries,
)


@dataclass
class ConvertArguments:
    """The StableMoE to make of a dense model."""

    num_experts: int | None = field(
        default=None, metadata={"help": "Experts of each MoE layer. Default: 32, as the paper's base model."}
    )
    moe_layer_positions: list[int] | None = field(
        default=None,
        metadata={
            "help": "MoE layers: k is after block k, 0 before the first. With moe_placement ffn it is in block k. Default: one in "
            "the middle."
        },
    )
    model_preset: str | None = field(
        default=None,
        metadata={
            "help": "Take experts, routing and settings of stage 1 from this file. Some are in configuration/models/. Its "
            "sizes are left out: they are the dense model's."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": 'Further fields of StableMoEConfig, as JSON. \'{"moe_placement": "ffn"}\' puts experts in place of '
            "FFNs. They win over a preset. What the dense model determines cannot be changed."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub checkpoint."})
    dtype: str | None = field(
        default=None, metadata={"help": "float32, bfloat16, ...: of the result. Default: that of the checkpoint."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer to save with it. Default: that of SOURCE; '' saves none."}
    )
    text: str | None = field(
        default=None, metadata={"help": "Compare both models on this text. Default: on 128 random token ids."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Convert and compare, but save nothing."})

    def __post_init__(self):
        """Check what can be checked without the checkpoint."""
        self.overrides = parse_overrides(self.config_overrides)

    def options(self) -> dict:
        """Return the arguments of `from_dense`."""
        named = {name: getattr(self, name) for name in ("num_experts", "moe_layer_positions")}
        preset = routing_of_preset(self.model_preset) if self.model_preset else {}
        return preset | self.overrides | {name: value for name, value in named.items() if value is not None}


def parse_arguments(argv=None):
    """Parse the command line: `(arguments, source, output folder)`."""
    parser = OptionParser(ConvertArguments, **help_of(__doc__))
    # Before the options, as those with several values would take them, too.
    parser.usage = "%(prog)s source output_dir [--option value ...]"
    parser.add_argument("source", help="Hub name or folder of a decoder-only language model")
    parser.add_argument("output_dir", help="new folder for the StableMoE and its tokenizer")
    try:
        args, rest = parser.parse_args_into_dataclasses(args=argv)
    except ValueError as error:
        parser.error(str(error))
    return args, rest.source, rest.output_dir


def load_tokenizer(args: ConvertArguments, source: str):
    """Load the tokenizer to save; `None` if none is wanted."""
    if args.tokenizer_name == "":
        return None
    name, revision = (args.tokenizer_name, None) if args.tokenizer_name else (source, args.revision)
    remedy = "name one with --tokenizer_name, or save none with --tokenizer_name ''"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer loads ({error}); {remedy}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # Without tokenizer files, transformers makes one that has special tokens alone.
        raise ValueError(f"no tokenizer loads ({name!r} has none); {remedy}")
    return tokenizer


def describe(dense: PreTrainedModel, model: StableMoEForCausalLM) -> str:
    """Describe the conversion."""
    config, places = model.config, ", ".join(map(str, model.config.moe_layer_positions))
    kind = f"of {config.num_expert_sublayers} sublayers " if config.expert_type == "stack" else ""
    where = "in place of the FFN of" if config.moe_placement == "ffn" else "after"
    experts = f"{config.num_experts} experts {kind}{where} block {places}" if places else "no experts"
    return (
        f"{dense.config.model_type}, {dense.num_parameters():,} parameters -> StableMoE, {model.num_parameters():,}: "
        f"{experts} of {config.num_hidden_layers}."
    )


def convert(args: ConvertArguments, source: str, output_dir: str) -> str:
    """Convert, compare and save; return the report."""
    require_new_folder(output_dir)
    options = args.options()
    check_overrides(options)
    loading = {name: getattr(args, name) for name in ("revision", "dtype") if getattr(args, name) is not None}
    try:
        dense = load_dense(source, **loading)
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load(source, error)) from error
    tokenizer = load_tokenizer(args, source)
    model = StableMoEForCausalLM.from_dense(dense, **options)
    comparison = compare_logits(dense, model, ids_to_compare(model.config, tokenizer, args.text))
    lines = [describe(dense, model), f"In {str(dense.dtype).removeprefix('torch.')}, {comparison}."]
    if args.dry_run:
        return "\n".join([*lines, "Nothing is saved: this was a dry run."])
    save_converted(model, tokenizer, output_dir)
    stage = "in stage 1" if model.routing_stage == 1 else "its routing fixed from the start"
    return "\n".join([*lines, f"Saved to {output_dir}, {stage}: train it with scripts/run_clm.py."])


def main(argv=None):
    """Run the script."""
    args, source, output_dir = parse_arguments(argv)
    quiet_libraries()
    with one_line_errors():
        print(convert(args, source, output_dir))


if __name__ == "__main__":
    main()
