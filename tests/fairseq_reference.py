"""Checkpoints in the layout of the authors' fairseq code, and what that code computes with them, in float64.

Written from its behaviour, one token and one expert at a time, and with nothing of the package: what is converted must
agree with it. A rank is one process of the training run, which holds one expert (`expert_network`).
"""

import math
from argparse import Namespace
from pathlib import Path

import torch
from torch.nn.functional import layer_norm


VOCAB, WIDTH, INNER, HEADS, RANKS, SUBLAYERS, LENGTH, ROUTING = 43, 12, 17, 3, 4, 2, 11, 5
OPTIONS = {
    "arch": "transformer_lm_BaseGPT_x1_small",
    "activation_fn": "relu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "decoder_embed_dim": WIDTH,
    "decoder_ffn_embed_dim": INNER,
    "decoder_attention_heads": HEADS,
    "decoder_layers": 2,
    "decoder_learned_pos": True,
    "decoder_normalize_before": True,
    "no_decoder_final_norm": False,
    "no_scale_embedding": False,
    "share_decoder_input_output_embed": True,
    "tokens_per_sample": LENGTH,
    "max_target_positions": LENGTH,
    "moe_type": "base_layer",
    "moe_layers": 1,
    "moe_sublayers": SUBLAYERS,
    "assignment_algorithm": "GA",
    "distill_assignment": True,
    "distilled_model": "wordemb",
    "two_stage_updates": 6000,
    "balance_loss": "balance",
    "capacity_factor": 2.0,
    "vocab_size": VOCAB,
}


class Noise:
    """Random tensors of a state dict, in fairseq's order of names."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape, scale=0.3) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.dtype)

    def affine(self, name: str, *shape) -> dict:
        return {f"{name}.weight": self(*shape), f"{name}.bias": self(shape[0])}

    def norm(self, name: str) -> dict:
        return {f"{name}.weight": 1 + self(WIDTH), f"{name}.bias": self(WIDTH)}


def rank_states(num_ranks: int = RANKS, routing_rows: int = VOCAB, dtype=torch.float32, **changes) -> list[dict]:
    """The state of the model of every rank; experts differ, all else is shared."""
    options, noise = {**OPTIONS, **changes}, Noise(dtype)
    shared = {"decoder.version": torch.tensor([3.0]), "decoder.embed_tokens.weight": noise(VOCAB, WIDTH)}
    if options["decoder_learned_pos"]:
        shared["decoder.embed_positions.weight"] = noise(LENGTH + 2, WIDTH)
    else:
        shared["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    tied = options["share_decoder_input_output_embed"]
    head = shared["decoder.embed_tokens.weight"] if tied else noise(VOCAB, WIDTH)
    shared["decoder.output_projection.weight"] = head
    kinds = ["block"] * options["decoder_layers"]
    for i in range(options["moe_layers"]):
        kinds.insert((i + 1) * options["decoder_layers"] // (options["moe_layers"] + 1), "moe")
    experts = [{} for _ in range(num_ranks)]
    for number, kind in enumerate(kinds):
        layer = f"decoder.layers.{number}"
        if kind == "block":
            shared |= _block_state(noise, layer)
            continue
        shared |= _router_state(noise, layer, num_ranks, routing_rows, options)
        for state in experts:
            for sublayer in range(options["moe_sublayers"]):
                name = f"{layer}.expert_network.{sublayer}"
                state |= noise.norm(f"{name}.norm")
                state |= noise.affine(f"{name}.ff1", INNER, WIDTH) | noise.affine(f"{name}.ff2", WIDTH, INNER)
    if options["decoder_normalize_before"]:
        shared |= noise.norm("decoder.layer_norm")
    return [{**shared, **state} for state in experts]


def _block_state(noise: Noise, layer: str) -> dict:
    state = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        state |= noise.affine(f"{layer}.self_attn.{name}", WIDTH, WIDTH)
    state |= noise.norm(f"{layer}.self_attn_layer_norm") | noise.norm(f"{layer}.final_layer_norm")
    return state | noise.affine(f"{layer}.fc1", INNER, WIDTH) | noise.affine(f"{layer}.fc2", WIDTH, INNER)


def _router_state(noise: Noise, layer: str, num_ranks: int, routing_rows: int, options: dict) -> dict:
    if options["moe_type"] == "hash_layer":
        return {f"{layer}.hash_dict": torch.randint(num_ranks, (VOCAB,), generator=noise.generator)}
    state = {f"{layer}.expert_centroids": noise(num_ranks, WIDTH)}
    if options["distill_assignment"]:
        state[f"{layer}.distill_expert_centroids"] = noise(num_ranks, ROUTING)
        state[f"{layer}.routing_emb.weight"] = noise(routing_rows, ROUTING, scale=1.0)
    if options["distilled_model"] == "cnn":
        state[f"{layer}.routing_kernel"] = noise(5, scale=1.0)
    return state


def write_checkpoint(
    folder: Path, states: list[dict], num_updates: int = 60000, legacy: bool = False, **changes
) -> Path:
    """Write the files of all ranks as fairseq does; return the name that its commands take."""
    options = {**OPTIONS, **changes}
    folder.mkdir(exist_ok=True)
    for rank, state in enumerate(states):
        # The options of a model that is chosen by `--arch` are a Namespace, which the pickle then holds.
        sections = {
            "distributed_training": {"distributed_world_size": len(states), "distributed_rank": rank},
            "criterion": Namespace(balance_factor=0.3, distill_factor=0.3),
            "task": {"_name": "language_modeling", "tokens_per_sample": LENGTH},
            "model": Namespace(**options),
        }
        content = {
            "args": Namespace(**options, balance_factor=0.3, distill_factor=0.3) if legacy else None,
            "cfg": None if legacy else sections,
            "model": state,
            "optimizer_history": [{"criterion_name": "XEntropyAuxCriterion", "num_updates": num_updates}],
            "extra_state": {"train_iterator": {"epoch": 3}, "val_loss": 3.1},
            "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        }
        name = f"checkpoint_best-rank-{rank}.pt" if options["moe_layers"] else "checkpoint_best.pt"
        torch.save(content, folder / name)
    return folder / "checkpoint_best.pt"


def forward(states: list[dict], ids: torch.Tensor, evaluates: bool = True, **changes):
    """What the authors' code computes of one sequence: logits `(S, V)` and the expert of each token, a list a MoE layer."""
    options = {**OPTIONS, **changes}
    ranks = [{name: tensor.double() for name, tensor in state.items() if "hash" not in name} for state in states]
    shared = ranks[0]
    hidden = shared["decoder.embed_tokens.weight"][ids]
    if not options["no_scale_embedding"]:
        hidden = hidden * math.sqrt(WIDTH)
    # The first token is number 2: 0 is not used, 1 is the padding's.
    hidden = hidden + torch.stack([_position(shared, 2 + place, options) for place in range(len(ids))])
    routed = []
    for number in range(options["decoder_layers"] + options["moe_layers"]):
        name = f"decoder.layers.{number}"
        if f"{name}.fc1.weight" in shared:
            hidden = _block(shared, name, hidden, options)
        else:
            experts = _choose(states[0], shared, name, hidden, ids, evaluates, options)
            hidden = torch.stack([_expert(ranks, name, e, h, options) for e, h in zip(experts, hidden, strict=True)])
            routed.append(experts)
    if options["decoder_normalize_before"]:
        hidden = _norm(shared, "decoder.layer_norm", hidden)
    return hidden @ shared["decoder.output_projection.weight"].T, routed


def _position(state: dict, number: int, options: dict) -> torch.Tensor:
    if options["decoder_learned_pos"]:
        return state["decoder.embed_positions.weight"][number]
    half = WIDTH // 2
    angles = [number * 10000 ** (-i / (half - 1)) for i in range(half)]
    return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)


def _norm(state: dict, name: str, hidden):
    return layer_norm(hidden, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)


def _linear(state: dict, name: str, hidden):
    return hidden @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _activate(inner, options: dict):
    if options["activation_fn"] == "gelu":
        return inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return inner.clamp(min=0)


def _block(state: dict, name: str, hidden, options: dict):
    before = options["decoder_normalize_before"]

    def attend(normed):
        parts = [_linear(state, f"{name}.self_attn.{p}_proj", normed).view(len(normed), HEADS, -1) for p in "qkv"]
        query, key, value = (part.transpose(0, 1) for part in parts)
        scores = query * (WIDTH // HEADS) ** -0.5 @ key.transpose(1, 2)
        hides = torch.ones(len(normed), len(normed), dtype=torch.bool).triu(1)
        attended = scores.masked_fill(hides, -math.inf).softmax(-1) @ value
        return _linear(state, f"{name}.self_attn.out_proj", attended.transpose(0, 1).flatten(1))

    def feed(normed):
        return _linear(state, f"{name}.fc2", _activate(_linear(state, f"{name}.fc1", normed), options))

    for sublayer, norm in ((attend, f"{name}.self_attn_layer_norm"), (feed, f"{name}.final_layer_norm")):
        if before:
            hidden = hidden + sublayer(_norm(state, norm, hidden))
        else:
            hidden = _norm(state, norm, hidden + sublayer(hidden))
    return hidden


def _choose(raw: dict, state: dict, name: str, hidden, ids, evaluates: bool, options: dict) -> list[int]:
    if options["moe_type"] == "hash_layer":
        return raw[f"{name}.hash_dict"][ids].tolist()
    if not (evaluates and options["distill_assignment"]):
        return (hidden @ state[f"{name}.expert_centroids"].T).argmax(-1).tolist()
    embedded = state[f"{name}.routing_emb.weight"][ids]
    features = []
    for t in range(len(ids)):
        if options["distilled_model"] == "bigram_emb":
            features.append((embedded[t] + embedded[max(t - 1, 0)]) / 2)
        elif options["distilled_model"] == "cnn":
            kernel = state[f"{name}.routing_kernel"]
            features.append(sum(kernel[back] * embedded[t - back] for back in range(5) if t >= back))
        else:
            features.append(embedded[t])
    return (torch.stack(features) @ state[f"{name}.distill_expert_centroids"].T).argmax(-1).tolist()


def _expert(ranks: list[dict], name: str, expert: int, token, options: dict):
    state, output = ranks[expert], token
    for sublayer in range(options["moe_sublayers"]):
        part = f"{name}.expert_network.{sublayer}"
        inner = _activate(_linear(state, f"{part}.ff1", _norm(state, f"{part}.norm", output)), options)
        output = output + _linear(state, f"{part}.ff2", inner)
    if options["moe_type"] == "hash_layer":
        return output
    scores = state[f"{name}.expert_centroids"] @ token
    gate = scores.softmax(0)[expert] if options["moe_type"] == "switch_layer" else scores[expert].sigmoid()
    return gate * output + (1 - gate) * token
