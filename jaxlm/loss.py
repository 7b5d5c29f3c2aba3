"""Next-token cross-entropy from the residual stream, in chunks of tokens: the whole logits never exist.

Whole, the logits of 32 x 1024 tokens over 50,257 entries take 6.6 GB in float32, and their gradient as much
again. Here each chunk's logits live only while its loss is taken; when a gradient will be wanted, the chunk's
share of it is computed at the same time, since softmax(logits) - onehot(target) is at hand.
"""

from functools import partial

import jax
import jax.numpy as jnp

CHUNK = 1024  # tokens whose logits exist at one time


def cross_entropy(x_ND: jax.Array, embedding_VD: jax.Array, targets_N: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """Sum of logsumexp(logits) - logits[target] over N tokens, logits = x embedding^T.

    Args:
        x_ND: what the tied head reads, in the dtype of the computation.
        embedding_VD: float32; cast to the dtype of x for the products, whose sums are float32.
        targets_N: ids below V; a target below 0 counts nothing.
        chunk: tokens at a time.

    Returns:
        [] float32, nats.
    """
    padding = -x_ND.shape[0] % chunk
    x_CND = jnp.pad(x_ND, ((0, padding), (0, 0))).reshape(-1, chunk, x_ND.shape[1])
    targets_CN = jnp.pad(targets_N, (0, padding), constant_values=-1).reshape(-1, chunk)
    return _chunked(x_CND, embedding_VD, targets_CN)


@jax.custom_vjp
def _chunked(x_CND: jax.Array, embedding_VD: jax.Array, targets_CN: jax.Array) -> jax.Array:
    embedding_VD = embedding_VD.astype(x_CND.dtype)

    def body(total, chunk):
        return total + _chunk_loss(*chunk, embedding_VD)[0], None

    return jax.lax.scan(body, jnp.float32(0), (x_CND, targets_CN))[0]


def _chunk_loss(x_ND: jax.Array, targets_N: jax.Array, embedding_VD: jax.Array) -> tuple[jax.Array, ...]:
    """Loss of one chunk, and what its gradient is made of: logits, logsumexp, and where the targets are."""
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    logits_NV = product(x_ND, embedding_VD.T)
    logsumexp_N = jax.nn.logsumexp(logits_NV, axis=-1)
    onehot_NV = jnp.arange(logits_NV.shape[1])[None] == targets_N[:, None]
    picked_N = jnp.sum(jnp.where(onehot_NV, logits_NV, 0), axis=-1)
    loss = jnp.sum(jnp.where(targets_N >= 0, logsumexp_N - picked_N, 0))
    return loss, logits_NV, logsumexp_N, onehot_NV


def _forward(x_CND, embedding_VD, targets_CN):
    narrow_VD = embedding_VD.astype(x_CND.dtype)
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)

    def body(carry, chunk):
        total, d_embedding_VD = carry
        x_ND, targets_N = chunk
        loss, logits_NV, logsumexp_N, onehot_NV = _chunk_loss(x_ND, targets_N, narrow_VD)
        softmax_NV = jnp.exp(logits_NV - logsumexp_N[:, None])
        d_logits_NV = jnp.where(targets_N[:, None] >= 0, softmax_NV - onehot_NV, 0).astype(x_ND.dtype)
        d_x_ND = product(d_logits_NV, narrow_VD).astype(x_ND.dtype)
        return (total + loss, d_embedding_VD + product(d_logits_NV.T, x_ND)), d_x_ND

    zero = (jnp.float32(0), jnp.zeros(embedding_VD.shape, jnp.float32))
    (total, d_embedding_VD), d_x_CND = jax.lax.scan(body, zero, (x_CND, targets_CN))
    return total, (d_x_CND, d_embedding_VD)


def _backward(residuals, cotangent):
    d_x_CND, d_embedding_VD = residuals
    return d_x_CND * cotangent.astype(d_x_CND.dtype), d_embedding_VD * cotangent, None


_chunked.defvjp(_forward, _backward)
