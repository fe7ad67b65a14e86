"""StableMoE in float64 NumPy, straight from the paper's equations: one token at a time, shares no code with the package."""

import numpy as np


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
        kinds = ("norm_weight", "norm_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
        sublayers.append([params[name + kind][expert] for kind in kinds])
    return sublayers


def expert_stack(h, sublayers):
    """S_i(h): pre-norm residual sublayers x + W2 relu(W1 LayerNorm(x) + b1) + b2."""
    x = h
    for norm_weight, norm_bias, W1, b1, W2, b2 in sublayers:
        x = x + W2 @ np.maximum(W1 @ layer_norm(x, norm_weight, norm_bias) + b1, 0.0) + b2
    return x


def moe_layer(params, prefix, hidden, token_ids, *, routing, table=None, mask=None):
    """One MoE layer on T tokens.

    `routing` is "greedy" (stage 1, training: eq. 6), "distilled" (stage 1, evaluation) or "frozen" (stage 2: eq. 13,
    by `table`). Returns h' (T, d), the scores s (T, N), the distilled scores (T, N) and the experts a (T,).
    """
    E = params[f"{prefix}router.centroids"]
    D = params[f"{prefix}router.distilled_router.embedding"]
    E_hat = params[f"{prefix}router.distilled_router.centroids"]
    outputs, scores, distilled_scores, assigned = [], [], [], []
    for t, (h, token) in enumerate(zip(hidden, token_ids, strict=True)):
        s = np.array([E_i @ h for E_i in E])  # eq. 5
        s_hat = np.array([E_hat_i @ D[token] for E_hat_i in E_hat])  # eq. 12
        a = {
            "greedy": np.argmax(s),
            "distilled": np.argmax(s_hat),
            "frozen": table[token] if table is not None else -1,
        }
        a = int(a[routing])
        output = h
        if mask is None or mask[t]:
            output = h + sigmoid(s[a]) * (expert_stack(h, sublayers_of(params, f"{prefix}expert_stack.", a)) - h)
        outputs.append(output)  # eqs. 7 and 14
        scores.append(s)
        distilled_scores.append(s_hat)
        assigned.append(a)
    return np.array(outputs), np.array(scores), np.array(distilled_scores), np.array(assigned)


def balance_loss(scores, assigned):
    """Eq. 8 without alpha, per token."""
    T, N = scores.shape
    n = T / N
    total = 0.0
    for i in range(N):
        A_i = [t for t in range(T) if assigned[t] == i]
        total += (len(A_i) - n) / n * sum(sigmoid(scores[t, i]) for t in A_i)
    return total / T


def distillation_loss(distilled_scores, assigned):
    """Eq. 10, per token."""
    return -sum(log_softmax(s_hat)[a] for s_hat, a in zip(distilled_scores, assigned, strict=True)) / len(assigned)


def linear(params, name, x):
    return params[f"{name}.weight"] @ x + params[f"{name}.bias"]


def norm(params, name, x):
    return layer_norm(x, params[f"{name}.weight"], params[f"{name}.bias"])


def block(params, prefix, hidden, num_heads):
    """A pre-norm Transformer block over one sequence (S, d): causal attention, then the FFN."""
    normed = [norm(params, f"{prefix}input_layernorm", x) for x in hidden]
    query, key, value = (
        np.array([linear(params, f"{prefix}self_attn.{kind}_proj", x) for x in normed]).reshape(
            len(hidden), num_heads, -1
        )
        for kind in "qkv"
    )
    outputs = []
    for t, x in enumerate(hidden):
        heads = []
        for head in range(num_heads):
            affinity = key[: t + 1, head] @ query[t, head] / np.sqrt(query.shape[-1])
            heads.append(np.exp(log_softmax(affinity)) @ value[: t + 1, head])
        x = x + linear(params, f"{prefix}self_attn.o_proj", np.concatenate(heads))
        inner = np.maximum(
            linear(params, f"{prefix}mlp.up_proj", norm(params, f"{prefix}post_attention_layernorm", x)), 0
        )
        outputs.append(x + linear(params, f"{prefix}mlp.down_proj", inner))
    return np.array(outputs)


def causal_lm(params, sequences, labels, *, num_heads, num_layers, moe_positions, routing, tables=None):
    """The whole language model on sequences without padding, each with its labels (-100: not a target).

    Returns a dict: `logits` (one (S, V) a sequence), `task`, `balance`, `distillation` (summed over layers) and `loss`,
    eq. 11 while the routing is greedy and eq. 15 else.
    """
    logits, cross_entropies = [], []
    routed = [([], [], []) for _ in moe_positions]
    for token_ids, sequence_labels in zip(sequences, labels, strict=True):
        hidden = (
            params["model.embed_tokens.weight"][token_ids] + params["model.embed_positions.weight"][: len(token_ids)]
        )
        for position in range(num_layers + 1):
            if position > 0:
                hidden = block(params, f"model.layers.{position - 1}.", hidden, num_heads)
            if position in moe_positions:
                index = moe_positions.index(position)
                table = None if tables is None else tables[index]
                hidden, *routing_of_tokens = moe_layer(
                    params, f"model.moe_layers.{index}.", hidden, token_ids, routing=routing, table=table
                )
                for collected, values in zip(routed[index], routing_of_tokens, strict=True):
                    collected.extend(values)
        final = [norm(params, "model.norm", x) for x in hidden]
        logits.append(np.array([params["model.embed_tokens.weight"] @ x for x in final]))
        for t, target in enumerate(sequence_labels[1:]):
            if target != -100:
                cross_entropies.append(-log_softmax(logits[-1][t])[target])
    task = sum(cross_entropies) / len(cross_entropies)
    balance = distillation = 0.0
    if routing == "greedy":
        for scores, distilled_scores, assigned in routed:
            balance += balance_loss(np.array(scores), assigned)
            distillation += distillation_loss(np.array(distilled_scores), assigned)
    loss = task + ALPHA * balance + DISTILLATION * distillation
    return {"logits": logits, "task": task, "balance": balance, "distillation": distillation, "loss": loss}


def slope(function, params, name, direction, step=1e-5):
    """The derivative of `function(params)` along `direction` in one of the arrays, by central differences."""
    ahead, behind = (function({**params, name: params[name] + sign * step * direction}) for sign in (1, -1))
    return (ahead - behind) / (2 * step)
