"""StableMoE in float64 NumPy, straight from the paper's equations: one token at a time, shares no code with the package.

Also with k experts per token: what a token gains is the sum over its experts, and whatever the paper counts of tokens and
their experts is counted of pairs.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment


ALPHA = 0.3  # eq. 8, table 7
DISTILLATION = 1.0  # eq. 11
EPS = 1e-5


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def log_softmax(x):
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def layer_norm(x, weight, bias):
    centered = x - x.mean()
    return weight * centered / np.sqrt((centered**2).mean() + EPS) + bias


def sublayers_of(params, prefix, expert):
    """The parameters of one expert's sublayers: `params` holds stacks over experts under the names of a state dict."""
    sublayers = []
    while f"{prefix}sublayers.{len(sublayers)}.up_proj" in params:
        name = f"{prefix}sublayers.{len(sublayers)}."
        kinds = ("layernorm_weight", "layernorm_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
        sublayers.append([params[name + kind][expert] for kind in kinds])
    return sublayers


def expert_stack(h, sublayers):
    """S_i(h): pre-norm residual sublayers x + W2 relu(W1 LayerNorm(x) + b1) + b2."""
    x = h
    for layernorm_weight, layernorm_bias, W1, b1, W2, b2 in sublayers:
        x = x + W2 @ np.maximum(W1 @ layer_norm(x, layernorm_weight, layernorm_bias) + b1, 0.0) + b2
    return x


def silu(x):
    return x * sigmoid(x)


def gated_ffn(x, gate_up, down, activation=silu):
    """W (act(G x) * U x), G above U."""
    gate, up = np.split(gate_up @ x, 2)
    return down @ (activation(gate) * up)


def rms_norm(x, weight):
    return weight * x / np.sqrt((x**2).mean() + EPS)


def expert_change(params, prefix, h, a, g, activation=silu, k=1):
    """What expert a with gate g adds to h: g (S_a(h) - h), or of a gated expert g FFN_a(norm(h)).

    In place of a block's FFN nothing is normalised, and the weight is (1 + c g) / k.
    """
    if f"{prefix}experts.gate_up_proj" not in params:
        return g * (expert_stack(h, sublayers_of(params, f"{prefix}expert_stack.", a)) - h)
    x = rms_norm(h, params[f"{prefix}norm.weight"]) if f"{prefix}norm.weight" in params else h
    if f"{prefix}gate_scale" in params:
        g = (1 + params[f"{prefix}gate_scale"][0] * g) / k
    gate_up, down = params[f"{prefix}experts.gate_up_proj"], params[f"{prefix}experts.down_proj"]
    return g * gated_ffn(x, gate_up[a], down[a], activation)


def shared_change(params, prefix, h, activation=silu):
    """What the experts add that every token takes."""
    if f"{prefix}shared_experts.down_proj.weight" not in params:
        return 0.0
    x = rms_norm(h, params[f"{prefix}norm.weight"]) if f"{prefix}norm.weight" in params else h
    gate, up, down = (params[f"{prefix}shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return gated_ffn(x, np.concatenate([gate, up]), down, activation)


def softmax(x):
    return np.exp(log_softmax(x))


def balanced(scores):
    """The assignment of most affinity that gives every expert as many tokens, which must be possible."""
    num_tokens, num_experts = scores.shape
    slots = np.repeat(np.arange(num_experts), num_tokens // num_experts)
    _, chosen = linear_sum_assignment(-scores[:, slots])
    return slots[chosen]


# Paper table 1: the gate g of a token with scores s on expert a, one of k.
GATES = {
    "stable": lambda s, a, k: sigmoid(s[a]),
    "switch": lambda s, a, k: softmax(s)[a],
    "base": lambda s, a, k: sigmoid(s[a]),
    "hash": lambda s, a, k: 1.0 / k,
}


def top(scores, k):
    """The k experts of the highest scores, the highest first, the first of equal ones first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def experts_of(assigned):
    """The experts of each token, as lists, where `assigned` may have one or several."""
    return np.array(assigned).reshape(len(assigned), -1).tolist()


def moe_layer(
    params,
    prefix,
    hidden,
    token_ids,
    *,
    routing,
    table=None,
    mask=None,
    router="stable",
    activation=silu,
    k=1,
    normalized=False,
):
    """One MoE layer on T tokens.

    `routing` is "greedy" (eq. 6), "balanced" (BASE while it trains), "distilled" (evaluation of what is distilled) or
    "frozen" (eq. 13, by `table`). The gates of a token are divided by their sum where they are `normalized`. Returns h' (T, d), the scores s (T, N), the distilled scores (T, N) and the experts a
    (T,), or (T, k) where k > 1; without such scores, zeros. Where experts stand in place of an FFN their output is h' - h.
    """
    nothing = np.zeros((1, hidden.shape[1]))
    E = params.get(f"{prefix}router.centroids", nothing)
    D = params.get(f"{prefix}router.distilled_router.embedding", np.zeros((max(token_ids) + 1, 1)))
    E_hat = params.get(f"{prefix}router.distilled_router.centroids", np.zeros((1, 1)))
    scores = np.array([[E_i @ h for E_i in E] for h in hidden])  # eq. 5
    distilled_scores = np.array([[E_hat_i @ D[token] for E_hat_i in E_hat] for token in token_ids])  # eq. 12
    real = np.ones(len(hidden), bool) if mask is None else np.array(mask)
    if routing == "frozen":
        assigned = np.array([table[token] for token in token_ids])
    else:
        assigned = np.array([top(s, k) for s in (distilled_scores if routing == "distilled" else scores)])
        assigned = assigned[:, 0] if k == 1 else assigned
    if routing == "balanced":
        assigned[real] = balanced(scores[real])
    outputs = []
    for h, s, experts, is_real in zip(hidden, scores, experts_of(assigned), real, strict=True):
        output, gates = h, [GATES[router](s, a, k) for a in experts]
        share = sum(gates) if normalized else 1.0
        for a, g in zip(experts, gates, strict=True) if is_real else []:
            output = output + expert_change(params, prefix, h, a, g / share, activation, k)
        if is_real:
            output = output + shared_change(params, prefix, h, activation)
        outputs.append(output)  # eqs. 7 and 14
    return np.array(outputs), scores, distilled_scores, assigned


def balance_loss(scores, assigned, centered=False):
    """Eq. 8 without alpha, per token; centred, without the mean of its factors over pairs of token and expert."""
    (T, N), experts = scores.shape, experts_of(assigned)
    n = len(experts[0]) * T / N
    A = [[t for t in range(T) if i in experts[t]] for i in range(N)]
    factors = [(len(A_i) - n) / n for A_i in A]
    mean = np.mean([factors[i] for of_token in experts for i in of_token]) if centered else 0.0
    return sum((factors[i] - mean) * sigmoid(scores[t, i]) for i in range(N) for t in A[i]) / T


def switch_balance_loss(scores, assigned):
    """Fedus et al., eqs. 4 to 6 without alpha: N sum_i f_i P_i."""
    (T, N), pairs = scores.shape, [a for of_token in experts_of(assigned) for a in of_token]
    f = [pairs.count(i) / len(pairs) for i in range(N)]
    P = [sum(softmax(s)[i] for s in scores) / T for i in range(N)]
    return N * sum(f_i * P_i for f_i, P_i in zip(f, P, strict=True))


def distillation_loss(distilled_scores, assigned):
    """Eq. 10, per token; the divergence from the uniform distribution over a token's experts."""
    tokens = zip(distilled_scores, experts_of(assigned), strict=True)
    divergence = [np.mean([-np.log(len(of)) - log_softmax(s_hat)[a] for a in of]) for s_hat, of in tokens]
    return np.mean(divergence)


def linear(params, name, x):
    return params[f"{name}.weight"] @ x + params[f"{name}.bias"]


def norm(params, name, x):
    return layer_norm(x, params[f"{name}.weight"], params[f"{name}.bias"])


def sinusoids(count, width):
    """Vaswani et al., section 3.5: sine and cosine at wavelengths from 2 pi to 10000 * 2 pi, all sines first."""
    table = np.zeros((count, width))
    for position in range(count):
        for i in range(width // 2):
            angle = position / 10000 ** (2 * i / width)
            table[position, i], table[position, width // 2 + i] = np.sin(angle), np.cos(angle)
    return table


def embed(params, prefix, token_ids, *, sinusoidal=False, scale=False):
    """Token embeddings, times sqrt(d) with `scale`, plus the embeddings of positions 0, 1, ..."""
    embedding = params[f"{prefix}embed_tokens.weight"]
    width = embedding.shape[1]
    if sinusoidal:
        positions = sinusoids(len(token_ids), width)
    else:
        positions = params[f"{prefix}embed_positions.weight"][: len(token_ids)]
    return embedding[token_ids] * (np.sqrt(width) if scale else 1.0) + positions


def attention(params, prefix, hidden, source, num_heads, causal):
    """Each of `hidden` (S, d) attends to `source` (S', d), to itself and earlier ones only where `causal`."""

    def heads(kind, states):
        return np.array([linear(params, f"{prefix}{kind}_proj", x) for x in states]).reshape(
            len(states), num_heads, -1
        )

    query, key, value = heads("q", hidden), heads("k", source), heads("v", source)
    outputs = []
    for t in range(len(hidden)):
        seen = slice(0, t + 1 if causal else None)
        mixed = []
        for head in range(num_heads):
            affinity = key[seen, head] @ query[t, head] / np.sqrt(query.shape[-1])
            mixed.append(np.exp(log_softmax(affinity)) @ value[seen, head])
        outputs.append(linear(params, f"{prefix}o_proj", np.concatenate(mixed)))
    return np.array(outputs)


def block(params, prefix, hidden, num_heads, *, before=True, causal=True, source=None):
    """A Transformer block over one sequence (S, d): self-attention, attention to a source if there is one, FFN.

    Each is x + f(LayerNorm(x)) where the norm stands `before`, and LayerNorm(x + f(x)) where it does not.
    """

    def normed(name, states):
        return np.array([norm(params, f"{prefix}{name}", x) for x in states])

    def residual(name, sublayer, states):
        if before:
            return states + sublayer(normed(name, states))
        return normed(name, states + sublayer(states))

    def attend_to_itself(states):
        return attention(params, f"{prefix}self_attn.", states, states, num_heads, causal)

    def attend_to_the_source(states):
        return attention(params, f"{prefix}cross_attn.", states, source, num_heads, False)

    def ffn(states):
        inner = [np.maximum(linear(params, f"{prefix}mlp.up_proj", x), 0) for x in states]
        return np.array([linear(params, f"{prefix}mlp.down_proj", x) for x in inner])

    hidden = residual("input_layernorm", attend_to_itself, hidden)
    if source is not None:
        hidden = residual("cross_attn_layernorm", attend_to_the_source, hidden)
    return residual("post_attention_layernorm", ffn, hidden)


class Stack:
    """Blocks with MoE layers between them; collects what the layers decide, over all sequences that pass."""

    def __init__(
        self, params, prefix, *, num_layers, moe_positions, routing, tables, k=1, before=True, **block_options
    ):
        self.params, self.prefix, self.num_layers, self.moe_positions = params, prefix, num_layers, moe_positions
        self.routing, self.tables, self.k, self.before = routing, tables, k, before
        self.block_options = {"before": before, **block_options}
        self.routed = [([], [], []) for _ in moe_positions]

    def __call__(self, hidden, token_ids, **block_options):
        for position in range(self.num_layers + 1):
            if position > 0:
                options = {**self.block_options, **block_options}
                hidden = block(self.params, f"{self.prefix}layers.{position - 1}.", hidden, **options)
            if position in self.moe_positions:
                index = self.moe_positions.index(position)
                table = None if self.tables is None else self.tables[index]
                hidden, *decided = moe_layer(
                    self.params,
                    f"{self.prefix}moe_layers.{index}.",
                    hidden,
                    token_ids,
                    routing=self.routing,
                    table=table,
                    k=self.k,
                )
                for collected, values in zip(self.routed[index], decided, strict=True):
                    collected.extend(values)
        if self.before:
            hidden = np.array([norm(self.params, f"{self.prefix}norm", x) for x in hidden])
        return hidden

    def losses(self):
        """Balance and distillation, summed over layers; nothing but the task is learned unless routing is greedy."""
        if self.routing != "greedy":
            return 0.0, 0.0
        balance = sum(balance_loss(np.array(scores), assigned) for scores, _, assigned in self.routed)
        distillation = sum(distillation_loss(np.array(scores), assigned) for _, scores, assigned in self.routed)
        return balance, distillation

    def loads(self, num_experts):
        return [np.bincount(np.ravel(assigned), minlength=num_experts).tolist() for *_, assigned in self.routed]


def causal_lm(
    params,
    sequences,
    labels,
    *,
    num_heads,
    num_layers,
    moe_positions,
    routing,
    tables=None,
    k=1,
    before=True,
    sinusoidal=False,
    scale=False,
):
    """The whole language model on sequences without padding, each with its labels (-100: not a target).

    Returns a dict: `logits` (one (S, V) a sequence), `task`, `balance`, `distillation` (summed over layers) and `loss`,
    eq. 11 while the routing is greedy and eq. 15 else.
    """
    stack = Stack(
        params,
        "model.",
        num_layers=num_layers,
        moe_positions=moe_positions,
        routing=routing,
        tables=tables,
        k=k,
        before=before,
        num_heads=num_heads,
    )
    logits, cross_entropies = [], []
    for token_ids, sequence_labels in zip(sequences, labels, strict=True):
        final = stack(embed(params, "model.", token_ids, sinusoidal=sinusoidal, scale=scale), token_ids)
        logits.append(np.array([params["model.embed_tokens.weight"] @ x for x in final]))
        for t, target in enumerate(sequence_labels[1:]):
            if target != -100:
                cross_entropies.append(-log_softmax(logits[-1][t])[target])
    task = sum(cross_entropies) / len(cross_entropies)
    balance, distillation = stack.losses()
    loss = task + ALPHA * balance + DISTILLATION * distillation
    return {"logits": logits, "task": task, "balance": balance, "distillation": distillation, "loss": loss}


def seq2seq(
    params,
    sources,
    targets,
    *,
    num_heads,
    encoder,
    decoder,
    routing,
    start,
    pad,
    smoothing,
    num_experts,
    before,
    sinusoidal,
    scale,
    k=1,
):
    """The whole sequence-to-sequence model on pairs without padding (-100 in a target: not predicted, `pad` as input).

    `encoder` and `decoder` are dicts of `num_layers`, `moe_positions` and `tables`. Returns a dict: `logits` (one (S, V)
    a target), `task`, `balance`, `distillation`, `loss`, and for each side `auxiliary` and the `loads` of its layers.
    """
    common = {"routing": routing, "k": k, "before": before, "num_heads": num_heads}
    encode = Stack(params, "model.encoder.", **encoder, **common, causal=False)
    decode = Stack(params, "model.decoder.", **decoder, **common)
    shared = params["model.encoder.embed_tokens.weight"]
    params = {**params, "model.decoder.embed_tokens.weight": shared}
    logits, losses = [], []
    for source_ids, target in zip(sources, targets, strict=True):
        source = encode(embed(params, "model.encoder.", source_ids, sinusoidal=sinusoidal, scale=scale), source_ids)
        inputs = [start, *(pad if token == -100 else token for token in target[:-1])]
        hidden = embed(params, "model.decoder.", inputs, sinusoidal=sinusoidal, scale=scale)
        logits.append(np.array([shared @ x for x in decode(hidden, inputs, source=source)]))
        for t, token in enumerate(target):
            if token != -100:
                scores = log_softmax(logits[-1][t])
                losses.append(-(1 - smoothing) * scores[token] - smoothing * scores.mean())
    task = sum(losses) / len(losses)
    sides = {"encoder": encode.losses(), "decoder": decode.losses()}
    auxiliary = {name: ALPHA * balance + DISTILLATION * distilled for name, (balance, distilled) in sides.items()}
    return {
        "logits": logits,
        "task": task,
        "balance": sum(balance for balance, _ in sides.values()),
        "distillation": sum(distillation for _, distillation in sides.values()),
        "auxiliary": auxiliary,
        "loss": task + sum(auxiliary.values()),
        "loads": encode.loads(num_experts) + decode.loads(num_experts),
    }


def slope(function, params, name, direction, step=1e-5):
    """The derivative of `function(params)` along `direction` in one of the arrays, by central differences."""
    ahead, behind = (function({**params, name: params[name] + sign * step * direction}) for sign in (1, -1))
    return (ahead - behind) / (2 * step)
