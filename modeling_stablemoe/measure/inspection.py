# Copyright 2026 The modeling_stablemoe authors. Licensed under the Apache License, Version 2.0.
"""Which tokens of a text the experts of a checkpoint receive (StableMoE, table 9).

`route_texts` runs the model, `inspect_routing` measures, `format_report` formats the numbers for people. This works
with any router, also one that depends on context: experts and backbone scores are those of forward passes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_stablemoe.model.health_stablemoe import share_in_common
from modeling_stablemoe.model.tensors_stablemoe import best_experts

from .meter import evenness
from .report import format_table


# Prefixes of each kind of text in the arguments of `forward`, and in its output.
_INPUT_PREFIX = {"text": "", "sources": "", "targets": "decoder_"}
_OUTPUT_PREFIX = {"text": "", "sources": "encoder_", "targets": "decoder_"}
# Visible signs for white space in a table.
_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"})
# How tokenizers with byte fallback spell a byte that is not a character.
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class LayerRouting:
    """The experts of the T tokens of a text in one MoE layer.

    Attributes:
        name (`str`): qualified name of the layer.
        experts (`torch.LongTensor` of shape `(T,)`, or `(T, K)` with K > 1 experts per token): those that inference uses
            (eq. 13 if distilled).
        backbone_experts (`torch.LongTensor` of the same shape, *optional*): argmax of the backbone scores (eqs. 5 and
            6), or those of the K highest; `None` if the router has no scores.
    """

    name: str
    experts: Tensor
    backbone_experts: Tensor | None


@dataclass(frozen=True)
class RoutedText:
    """A text as the model reads it, and the experts of its T tokens in each MoE layer.

    Attributes:
        kind (`str`): "text" (language models), "sources" (of an encoder) or "targets" (of a decoder).
        token_ids (`torch.LongTensor` of shape `(T,)`): all documents, one after the other.
        starts (`list[int]`): index of the first token of each document, or sentence.
        layers (`list[LayerRouting]`): in the order of the model; at least one.
    """

    kind: str
    token_ids: Tensor
    starts: list[int]
    layers: list[LayerRouting]


def route_texts(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]] | None = None,
    *,
    batch_tokens: int = 2048,
    show_progress: bool = False,
) -> list[RoutedText]:
    """Route texts as the model does at inference.

    A language model, or classifier, reads a document in windows of `max_position_embeddings` tokens, as in training. A
    sequence-to-sequence model reads sources and, as decoder input, targets shifted to the right.

    Args:
        model (`PreTrainedModel`): of this package, with any head or none; put into eval mode.
        documents (sequence of sequences of `int`): token ids; the sources of a sequence-to-sequence model. Empty ones
            are left out.
        targets (sequence of sequences of `int`, *optional*): token ids of the target of each source, with the end
            token; without them the decoder's layers are left out.
        batch_tokens (`int`): tokens of a forward pass, padding included; a longer sequence is a batch of its own.
        show_progress (`bool`): show a progress bar.

    Returns:
        `list[RoutedText]`: the text, or sources and targets, that an MoE layer reads; tensors are on the CPU.

    Raises:
        ValueError: if no MoE layer of the model reads these texts, there is no token, an id is outside the vocabulary,
            or a source or target is longer than the model's positions.
    """
    if not model.moe_layers_by_name:
        raise ValueError(
            "This is a dense model (its list of MoE layer positions is empty): there is no routing to see."
        )
    rows, starts = _rows(model.config, documents, targets)
    if not rows:
        raise ValueError("There is no token in the text: nothing to route.")
    _check_rows(rows, model.config)
    places = {kind: list(accumulate((len(row[kind]) for row in rows), initial=0)) for kind in rows[0]}
    # By kind of text, then "experts" or "backbone": `(moe layers, T)`, or `(moe layers, T, K)`.
    routed: dict[str, dict[str, Tensor]] = {kind: {} for kind in places}
    model.eval()
    with tqdm(total=len(rows), desc="Routing", unit=" sequences", disable=not show_progress) as progress:
        for batch in _batches(rows, batch_tokens):
            for kind, choice, index_LBS in _route_batch(model, [rows[row] for row in batch]):
                ends = places[kind]
                shape = (len(index_LBS), ends[-1], *index_LBS.shape[3:])
                chosen = routed[kind].setdefault(choice, index_LBS.new_empty(shape))
                for index_LS, row in zip(index_LBS.unbind(1), batch, strict=True):
                    chosen[:, ends[row] : ends[row + 1]] = index_LS[:, : ends[row + 1] - ends[row]]
            progress.update(len(batch))
    texts, names = [], iter(model.moe_layers_by_name)
    for kind, chosen in routed.items():
        if not chosen or (kind == "targets" and targets is None):
            continue
        backbone = chosen.get("backbone", [None] * len(chosen["experts"]))
        layers = [LayerRouting(next(names), *of_layer) for of_layer in zip(chosen["experts"], backbone, strict=True)]
        token_ids = torch.tensor([token_id for row in rows for token_id in row[kind]])
        texts.append(RoutedText(kind, token_ids, starts[kind], layers))
    if not texts:
        raise ValueError("Only the decoder of this model has MoE layers: give targets for them to route.")
    return texts


def _rows(
    config, documents: Sequence[Sequence[int]], targets: Sequence[Sequence[int]] | None
) -> tuple[list[dict[str, list[int]]], dict[str, list[int]]]:
    """Return the sequences of the forward passes, by kind of text, and where each document starts in its kind."""
    if config.is_encoder_decoder:
        begin = config.decoder_start_token_id
        pairs = zip(documents, targets if targets is not None else [[]] * len(documents), strict=True)
        rows = [
            {"sources": list(source), "targets": [begin, *list(target)[:-1]]} for source, target in pairs if source
        ]
        lengths = {kind: [len(row[kind]) for row in rows] for kind in ("sources", "targets")}
    else:
        window = config.max_position_embeddings
        documents = [list(document) for document in documents if document]
        rows = [
            {"text": document[first : first + window]}
            for document in documents
            for first in range(0, len(document), window)
        ]
        lengths = {"text": [len(document) for document in documents]}
    return rows, {kind: list(accumulate(of_kind, initial=0))[:-1] for kind, of_kind in lengths.items()}


def _check_rows(rows: list[dict[str, list[int]]], config):
    """Refuse ids and lengths that a model on an accelerator would answer with a device assertion."""
    for row in rows:
        for kind, ids in row.items():
            wrong = next((token_id for token_id in ids if not 0 <= token_id < config.vocab_size), None)
            if wrong is not None:
                raise ValueError(
                    f"There is a token id {wrong} in the {kind}, outside the model's vocabulary of {config.vocab_size}. "
                    "Use the tokenizer that the model was trained with, or call `resize_token_embeddings` on the model."
                )
            if len(ids) > config.max_position_embeddings:
                raise ValueError(
                    f"A sequence in the {kind} has {len(ids)} tokens, more than the model's "
                    f"{config.max_position_embeddings} positions: cut it."
                )


def _batches(rows: list[dict[str, list[int]]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of the rows of each forward pass: rows of similar length together, the longest first."""
    lengths = [max(map(len, row.values())) for row in rows]
    batch: list[int] = []
    for row in sorted(range(len(rows)), key=lambda row: -lengths[row]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch


@torch.inference_mode()
def _route_batch(model: PreTrainedModel, rows: list[dict[str, list[int]]]) -> Iterator[tuple[str, str, Tensor]]:
    """Run the model; yield kind of text, "experts" or (with scores) "backbone", and that choice, `(L, B, S, ...)`."""
    inputs = {}
    for kind in rows[0]:
        ids = [torch.tensor(row[kind]) for row in rows]
        mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
        prefix = _INPUT_PREFIX[kind]
        inputs[f"{prefix}input_ids"] = pad_sequence(ids, batch_first=True).to(model.device)
        inputs[f"{prefix}attention_mask"] = mask.to(model.device)
    if model.base_model is model:
        inputs["output_expert_indices"] = True  # a head asks for them with the scores
    elif "text" in rows[0] and model.can_generate():
        inputs["logits_to_keep"] = 1  # nobody reads the predictions
    output = model(**inputs, use_cache=False, output_router_logits=True)
    for kind in rows[0]:
        experts = output.get(f"{_OUTPUT_PREFIX[kind]}expert_indices")
        scores = output.get(f"{_OUTPUT_PREFIX[kind]}router_logits") or [None]
        if experts:
            yield kind, "experts", torch.stack([index.cpu() for index in experts])
        if experts and scores[0] is not None:  # a hash has none
            k = model.config.num_experts_per_tok
            backbone = [
                best_experts(score, k).view_as(index).cpu() for score, index in zip(scores, experts, strict=True)
            ]
            yield kind, "backbone", torch.stack(backbone)


def measure_load(experts: Tensor, num_experts: int) -> dict:
    """Measure how evenly tokens, T > 0, are spread over experts; each counts for all of its own, `(T,)` or `(T, K)`."""
    load = torch.bincount(experts.flatten(), minlength=num_experts)
    share = load.double() / load.sum()
    even = evenness(load.double())
    return {
        "tokens": load.tolist(),
        "share": share.tolist(),
        "max_over_mean": even["load_max_over_mean"].item(),
        "entropy": torch.special.entr(share).sum().item() + 0.0,  # not -0.0
        "entropy_share": even["load_entropy"].item() if num_experts > 1 else None,
        "idle_experts": (load == 0).nonzero().flatten().tolist(),
    }


def count_token_experts(token_ids: Tensor, experts: Tensor) -> list[tuple[int, int, int]]:
    """Return `(token id, expert, tokens)` of all pairs that occur, the most frequent first, then by id and expert."""
    experts_TK = experts.view(len(token_ids), -1)
    token_ids_TK = token_ids.unsqueeze(-1).expand_as(experts_TK)
    pairs, counts = torch.stack([token_ids_TK.flatten(), experts_TK.flatten()]).unique(dim=1, return_counts=True)
    found = zip(*pairs.tolist(), counts.tolist(), strict=True)
    return sorted(found, key=lambda entry: (-entry[2], entry[0], entry[1]))


def measure_agreement(token_ids: Tensor, experts: Tensor, backbone_experts: Tensor) -> dict:
    """Measure how often inference and backbone router choose the same expert, by frequency of the tokens.

    Of several experts per token it is the share that they have in common.
    """
    agrees = share_in_common(*(choice.view(len(token_ids), -1) for choice in (experts, backbone_experts))).double()
    _, inverse, counts = token_ids.unique(return_inverse=True, return_counts=True)
    powers = 2 ** torch.arange(63)
    bin_of_id = torch.bucketize(counts, powers, right=True) - 1
    bin_of_token = bin_of_id[inverse]
    by_frequency = []
    for index in bin_of_id.unique().tolist():
        inside = bin_of_token == index
        by_frequency.append(
            {
                "at_least": 2**index,
                "at_most": 2 ** (index + 1) - 1,
                "distinct_tokens": int((bin_of_id == index).sum()),
                "tokens": int(inside.sum()),
                "agreement": agrees[inside].mean().item(),
            }
        )
    return {"overall": agrees.mean().item(), "by_frequency": by_frequency}


def inspect_routing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[RoutedText], name: str, top_k: int = 20
) -> dict:
    """Measure which tokens of a text each expert of each MoE layer receives (StableMoE, table 9).

    Args:
        model (`PreTrainedModel`): that routed the texts.
        tokenizer (`PreTrainedTokenizerBase`): of the texts.
        texts (sequence of `RoutedText`): of `route_texts`.
        name (`str`): of the checkpoint in the report.
        top_k (`int`): number of tokens to list, of each expert and among those of several experts.

    Returns:
        `dict`, JSON-ready: `checkpoint`, `router_type`, `routing_stage`, `router_fingerprint` (`None` in stage 1),
            `num_experts`, `num_experts_per_tok`, and `layers`, each with

            - `name`, `text` (kind), and the numbers `tokens` and `distinct_tokens`;
            - `load`, in which a token counts for each of its experts: `tokens` and `share` of each expert, `max_over_mean` in
              [1, N], `entropy` of the shares in nats and `entropy_share` of the largest entropy (`None` for one expert),
              `idle_experts` without a token;
            - `experts`, each with its number, `tokens`, `distinct_tokens` and `most_frequent`: `id`, `token`, `count`;
            - `tokens_of_several_experts`, of ids that do not always have the same: the numbers `distinct_tokens` and
              `tokens`, and the `most_frequent`;
            - `agreement` of inference with the backbone router, `None` if that has no scores: `overall`, share of
              tokens, and `by_frequency`, for each range between two powers of two that occurs `at_least` and `at_most`
              (occurrences of a token id in the text), `distinct_tokens`, `tokens` and `agreement`.
    """
    return {
        "checkpoint": name,
        "router_type": model.config.router_type,
        "routing_stage": model.routing_stage,
        "router_fingerprint": model.router_fingerprint(),
        "num_experts": model.config.num_experts,
        "num_experts_per_tok": model.config.num_experts_per_tok,
        "layers": [
            _measure_layer(text, layer, model.config.num_experts, tokenizer, top_k)
            for text in texts
            for layer in text.layers
        ],
    }


def _measure_layer(text: RoutedText, layer: LayerRouting, num_experts: int, tokenizer, top_k: int) -> dict:
    counted = count_token_experts(text.token_ids, layer.experts)
    load = measure_load(layer.experts, num_experts)
    backbone, num_experts_per_tok = layer.backbone_experts, layer.experts[0].numel()
    experts = []
    for expert, num_tokens in enumerate(load["tokens"]):
        own = [(token_id, count) for token_id, index, count in counted if index == expert]
        names = readable_tokens(tokenizer, [token_id for token_id, _ in own[:top_k]])
        most_frequent = [
            {"id": token_id, "token": token, "count": count}
            for (token_id, count), token in zip(own, names, strict=False)
        ]
        experts.append(
            {"expert": expert, "tokens": num_tokens, "distinct_tokens": len(own), "most_frequent": most_frequent}
        )
    return {
        "name": layer.name,
        "text": text.kind,
        "tokens": len(text.token_ids),
        "distinct_tokens": len({token_id for token_id, _, _ in counted}),
        "load": load,
        "experts": experts,
        "tokens_of_several_experts": _tokens_of_several_experts(counted, num_experts_per_tok, tokenizer, top_k),
        "agreement": None if backbone is None else measure_agreement(text.token_ids, layer.experts, backbone),
    }


def _tokens_of_several_experts(
    counted: list[tuple[int, int, int]], num_experts_per_tok: int, tokenizer, top_k: int
) -> dict:
    """Count and list the token ids that a router which sees context sends to more experts than a token has."""
    experts_of: dict[int, list[dict]] = {}
    for token_id, expert, count in counted:
        experts_of.setdefault(token_id, []).append({"expert": expert, "count": count})
    several = {
        token_id: sum(entry["count"] for entry in entries) // num_experts_per_tok
        for token_id, entries in experts_of.items()
        if len(entries) > num_experts_per_tok
    }
    listed = sorted(several, key=lambda token_id: (-several[token_id], token_id))[:top_k]
    return {
        "distinct_tokens": len(several),
        "tokens": sum(several.values()),
        "most_frequent": [
            {"id": token_id, "token": token, "count": several[token_id], "experts": experts_of[token_id]}
            for token_id, token in zip(listed, readable_tokens(tokenizer, listed), strict=True)
        ],
    }


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[bytes]:
    """Spell each token on its own as UTF-8, with leading spaces, characters cut where the tokenizer cuts them.

    The tokenizer is a byte-level BPE, or one that writes a space as U+2581. An id that it does not know becomes "<7>".
    """
    decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
    byte_of = (
        {character: byte for byte, character in bytes_to_unicode().items()} if "ByteLevel" in repr(decoder) else None
    )
    added = set(tokenizer.get_added_vocab())
    spelt = []
    for token_id, piece in zip(token_ids, tokenizer.convert_ids_to_tokens(list(token_ids)), strict=True):
        byte = _BYTE_PIECE.fullmatch(piece or "")
        if piece is None:
            spelt.append(f"<{token_id}>".encode())
        elif piece in added:
            spelt.append(piece.encode())
        elif byte_of is not None:
            spelt.append(bytes(byte_of[character] for character in piece))
        elif byte:
            spelt.append(bytes.fromhex(byte[1]))
        else:
            spelt.append(piece.replace("\u2581", " ").encode())
    return spelt


def readable_tokens(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """Spell tokens for people: with visible white space, and bytes that are not a whole character as in "\\xc3"."""
    return [spelt.decode(errors="backslashreplace").translate(_VISIBLE) for spelt in token_bytes(tokenizer, token_ids)]


_EXPERT_HEADINGS = {
    "expert": "expert",
    "tokens": "tokens",
    "share": "share",
    "distinct_tokens": "distinct tokens",
    "most_frequent": "most frequent tokens",
}
_SEVERAL_HEADINGS = {"token": "token of several experts", "count": "tokens", "experts": "expert: tokens"}
_AGREEMENT_HEADINGS = {
    "occurrences": "occurrences of a token",
    "distinct_tokens": "distinct tokens",
    "tokens": "tokens",
    "agreement": "agreement",
}


def format_report(report: dict) -> str:
    """Format a report of `inspect_routing` as Markdown, without a newline at the end."""
    frozen = f"frozen routing {report['router_fingerprint']}" if report["routing_stage"] == 2 else "not frozen"
    per_token = f", {report['num_experts_per_tok']} per token" if report["num_experts_per_tok"] > 1 else ""
    head = (
        f"# {report['checkpoint']}\n\nStage {report['routing_stage']} ({frozen}), router {report['router_type']!r}, "
        f"{report['num_experts']} experts{per_token}."
    )
    return "\n\n".join([head, *(_format_layer(layer, report["num_experts_per_tok"]) for layer in report["layers"])])


def _format_layer(layer: dict, num_experts_per_tok: int) -> str:
    load = layer["load"]
    share = "" if load["entropy_share"] is None else f" ({load['entropy_share']:.1%} of the largest)"
    idle = ", ".join(map(str, load["idle_experts"])) or "none"
    parts = [
        f"## {layer['name']}: {layer['tokens']} tokens of the {layer['text']}, {layer['distinct_tokens']} distinct",
        f"Load max/mean {load['max_over_mean']:.2f}, entropy {load['entropy']:.3f} nats{share}; experts without "
        f"tokens: {idle}.",
    ]
    rows = [
        {
            **expert,
            "share": f"{load['share'][expert['expert']]:.1%}",
            "most_frequent": ", ".join(
                f"{_code(entry['token'])} {entry['count']}" for entry in expert["most_frequent"]
            ),
        }
        for expert in layer["experts"]
    ]
    parts.append(format_table(rows, _EXPERT_HEADINGS))
    several = layer["tokens_of_several_experts"]
    if several["distinct_tokens"]:
        number = "several experts" if num_experts_per_tok == 1 else f"more than {num_experts_per_tok} experts"
        parts.append(
            f"{several['distinct_tokens']} distinct tokens ({several['tokens']} tokens) go to {number}; the most frequent:"
        )
        rows = [
            {
                "token": _code(entry["token"]),
                "count": entry["count"],
                "experts": ", ".join(f"{of['expert']}: {of['count']}" for of in entry["experts"]),
            }
            for entry in several["most_frequent"]
        ]
        parts.append(format_table(rows, _SEVERAL_HEADINGS))
    chance = num_experts_per_tok / len(layer["experts"])
    return "\n\n".join([*parts, _format_agreement(layer["agreement"], chance)])


def _format_agreement(agreement: dict | None, chance: float) -> str:
    if agreement is None:
        return "This router has no backbone scores to agree with."
    rows = [
        {
            **row,
            "occurrences": f"{row['at_least']}-{row['at_most']}" if row["at_least"] > 1 else "1",
            "agreement": f"{row['agreement']:.1%}",
        }
        for row in agreement["by_frequency"]
    ]
    head = (
        f"Agreement on this text: on {agreement['overall']:.1%} of its tokens inference routes as the backbone router would "
        f"now (chance: {chance:.1%}). In stage 1 it tells how faithful the routing is that would be frozen. In stage 2 the backbone router only "
        "weighs the frozen experts, and little agreement is no fault."
    )
    return f"{head}\n\n{format_table(rows, _AGREEMENT_HEADINGS)}"


def _code(token: str) -> str:
    """Quote a token as code in a Markdown table, whatever it holds."""
    ticks = max(map(len, re.findall("`+", token)), default=0)
    fence, space = "`" * (ticks + 1), " " * bool(ticks)
    return f"{fence}{space}{token}{space}{fence}".replace("|", "\\|")
