"""The layers by their definitions in float64 NumPy, and gradients by central differences of these."""

import jax
import jax.numpy as jnp
import numpy as np


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def in_bfloat16(array):
    """The nearest numbers that bfloat16 can hold, in float32."""
    return np.float32(jnp.asarray(array, jnp.bfloat16))


def rms_norm(x, scale, eps):
    rows = [v / np.sqrt(np.dot(v, v) / len(v) + eps) for v in x.reshape(-1, len(scale))]
    return np.stack(rows).reshape(x.shape) * scale


def rope(x, positions, theta):
    """The pairs as complex numbers, each multiplied by exp(i position theta^(-2j/K))."""
    half = x.shape[-1] // 2
    rotated = np.empty_like(x)
    for j in range(half):
        factor = np.exp(1j * positions * theta ** (-2 * j / x.shape[-1]))
        pair = (x[..., j] + 1j * x[..., j + half]) * factor[:, :, None]
        rotated[..., j], rotated[..., j + half] = pair.real, pair.imag
    return rotated


def query_key_value(x, weights, scales, positions, eps, theta):
    head_width = len(scales[0])
    q, k, v = ((x @ w).reshape(*x.shape[:2], -1, head_width) for w in weights)
    return *(rope(rms_norm(a, scale, eps), positions, theta) for a, scale in zip((q, k), scales, strict=True)), v


def attention(q, k, v, mask):
    """For one query at a time, over only the keys that it may attend to."""
    out = np.empty((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(q.shape[:3]):
        keys = mask[b if len(mask) > 1 else 0, t]
        weights = np.exp(k[b, keys, h] @ q[b, t, h] / np.sqrt(q.shape[-1]))
        out[b, t, h] = weights @ v[b, keys, h] / weights.sum()
    return out


def causal_attention(q, k, v):
    return attention(q, k, v, np.tri(q.shape[1], dtype=bool)[None])


def swiglu(x, gate, up, down):
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def cross_entropy(x, embedding, targets):
    loss_sum = 0.0
    for row, target in zip(x, targets, strict=True):
        if target >= 0:
            logits = embedding @ row
            loss_sum += np.log(np.sum(np.exp(logits - logits.max()))) + logits.max() - logits[target]
    return loss_sum


def logits(params, ids, config):
    """One sequence, one position, one head at a time, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    half = config.width // config.heads // 2
    sharing = config.heads // (config.kv_heads or config.heads)

    def normed(x, scale):
        return scale * x / np.sqrt(x @ x / len(x) + config.norm_eps)

    def rotated(x, position, scale=None):
        if config.qk_norm:
            x = np.concatenate([normed(head, scale) for head in x.reshape(-1, 2 * half)])
        angles = position / config.rope_theta ** (np.arange(half) / half)
        pairs = np.exp(1j * angles) * (x.reshape(-1, 2, half)[:, 0] + 1j * x.reshape(-1, 2, half)[:, 1])
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    stream = [p["embedding"][i].copy() for i in ids]
    for layer in range(config.layers):
        b = {name: stacked[layer] for name, stacked in p["blocks"].items()}
        keys, values = [], []
        for position, x in enumerate(stream):
            h = normed(x, b["attention_norm"])
            keys.append(rotated(h @ b["key"], position, b.get("key_norm")))
            values.append((h @ b["value"]).reshape(-1, 2 * half))
            queries = rotated(h @ b["query"], position, b.get("query_norm"))
            mixed = []
            for head in range(config.heads):
                weights = np.exp([queries[head] @ key[head // sharing] / np.sqrt(2 * half) for key in keys])
                mixed.append(weights / weights.sum() @ [value[head // sharing] for value in values])
            x += np.concatenate(mixed) @ b["output"]
            h = normed(x, b["mlp_norm"])
            gate = h @ b["gate"]
            x += (gate / (1 + np.exp(-gate)) * (h @ b["up"])) @ b["down"]
    head = p["embedding"] if config.tied else p["head"]
    return np.array([head @ normed(x, p["norm"]) for x in stream])


def loss(params, inputs, targets, config):
    """The sum of -ln p(target) over the targets that are not below 0."""
    values = np.array([logits(params, ids, config) for ids in inputs])
    losses = np.log(np.exp(values).sum(-1)) - np.take_along_axis(values, targets[..., None], -1)[..., 0]
    return losses[targets >= 0].sum()


def gradient(function, array):
    """Of a function of one array to a number."""
    slopes = np.empty(array.shape)
    for index in np.ndindex(array.shape):
        ends = []
        for step in (1e-5, -1e-5):
            moved = array.copy()
            moved[index] += step
            ends.append(function(moved))
        slopes[index] = (ends[0] - ends[1]) / 2e-5
    return slopes


def assert_matches(function, reference, *arrays):
    """Compares the values of `function`, and its gradient with respect to every array in a random direction."""
    exact = [np.asarray(array, np.float32).astype(np.float64) for array in arrays]
    values = reference(*exact)
    direction = np.random.default_rng(1).normal(size=values.shape)

    def run(*inputs):
        out, vjp_fn = jax.vjp(function, *inputs)
        return out, vjp_fn(jnp.asarray(direction, out.dtype))

    out, gradients = jax.jit(run)(*(array.astype(np.float32) for array in arrays))
    np.testing.assert_allclose(out, values, rtol=1e-5, atol=1e-5)
    for which, found in enumerate(gradients):

        def along(moved, which=which):
            return np.sum(reference(*exact[:which], moved, *exact[which + 1 :]) * direction)

        np.testing.assert_allclose(
            found, gradient(along, exact[which]), rtol=1e-4, atol=1e-4, err_msg=f"gradient of argument {which}"
        )
