"""Next-token cross-entropy from the residual stream, in tiles of the vocabulary: the whole logits never exist.

Whole, the logits of 32 x 1024 tokens over 50,257 entries take 6.6 GB in float32, and their gradient as much
again. Here a tile's logits live only while its part of the sum is taken, and once more backward, while its part of
the gradient is: a third more products, next to no memory (the idea of Wijmans et al. 2024, arXiv 2411.09009).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.layers import MASKED, embed, product_over_rows, scan

TILE = 768
UNROLLED_TILE = 12_565  # a quarter of GPT-2's vocabulary: few enough tiles to write out, none as wide as 32,767


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def cross_entropy(
    x_ND: jax.Array, embedding_VD: jax.Array, targets_N: jax.Array, dtype: Any, tile: int = TILE, unroll: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Sum of logsumexp(logits) - logits[target] over N tokens, logits = x embedding^T.

    Args:
        x_ND: what the tied head reads.
        embedding_VD: float32.
        targets_N: ids below V; a target below 0 counts nothing.
        dtype: of what the products read; their sums and all else are float32.
        tile: entries of the vocabulary whose logits exist at one time.
        unroll: write the tiles out, one after the other, instead of looping.

    Returns:
        [] float32, nats; and the embedding, for its next use. Backward, the gradient of that next use arrives whole
        and this one is added to it where it lies.
    """
    return _forward(x_ND, embedding_VD, targets_N, dtype, tile, unroll)[0]


def _forward(x_ND, embedding_VD, targets_N, dtype, tile, unroll):
    narrow_ND = x_ND.astype(dtype)

    def add_tile(carry, place):
        largest_N, total_N = carry
        _, logits_NW, _ = _tile_logits(narrow_ND, embedding_VD, tile, place)
        larger_N = jnp.maximum(largest_N, jnp.max(logits_NW, axis=1))
        total_N = total_N * jnp.exp(largest_N - larger_N) + jnp.sum(jnp.exp(logits_NW - larger_N[:, None]), axis=1)
        return (larger_N, total_N), None

    start = jnp.full(len(x_ND), MASKED), jnp.zeros(len(x_ND))
    (largest_N, total_N), _ = scan(add_tile, start, _tiles(len(embedding_VD), tile), unroll=unroll)
    logsumexp_N = largest_N + jnp.log(total_N)
    rows_ND = embed(targets_N, embedding_VD).astype(dtype)
    picked_N = jnp.sum(narrow_ND.astype(jnp.float32) * rows_ND.astype(jnp.float32), axis=1)
    nats = jnp.sum(jnp.where(targets_N >= 0, logsumexp_N - picked_N, 0))
    return (nats, embedding_VD), (x_ND, embedding_VD, targets_N, logsumexp_N)


def _backward(dtype, tile, unroll, residuals, d_outputs):
    x_ND, embedding_VD, targets_N, logsumexp_N = residuals
    d_nats, d_embedding_VD = d_outputs
    narrow_ND, d_nats_N1 = x_ND.astype(dtype), jnp.where(targets_N >= 0, d_nats, 0)[:, None]

    def add_tile(carry, place):
        d_x_ND, d_embedding_VD = carry
        ids_W, logits_NW, rows_WD = _tile_logits(narrow_ND, embedding_VD, tile, place)
        softmax_NW = jnp.exp(logits_NW - logsumexp_N[:, None])
        d_logits_NW = ((softmax_NW - (ids_W == targets_N[:, None])) * d_nats_N1).astype(dtype)
        d_x_ND += jnp.matmul(d_logits_NW, rows_WD, preferred_element_type=jnp.float32)
        d_rows_WD = product_over_rows(d_logits_NW, narrow_ND)
        return (d_x_ND, _add_rows(d_embedding_VD, d_rows_WD, place[0])), None

    start = (jnp.zeros(x_ND.shape, jnp.float32), d_embedding_VD)
    (d_x_ND, d_embedding_VD), _ = scan(add_tile, start, _tiles(len(embedding_VD), tile), unroll=unroll)
    return d_x_ND.astype(x_ND.dtype), d_embedding_VD, None


def _tiles(V: int, tile: int) -> tuple[jax.Array, jax.Array]:
    """Where each tile starts, and its first id that no tile before it has: the last one overlaps, to end with V."""
    first = jnp.arange(0, V, tile)
    return jnp.minimum(first, max(V - tile, 0)), first


def _tile_logits(narrow_ND, embedding_VD, tile, place):
    """A tile's ids [W], its logits [N, W] and its rows of the embedding [W, D].

    What another tile has counted is id -2, which is no target, with logits that weigh nothing.
    """
    start, first = place
    W = min(tile, len(embedding_VD))
    rows_WD = jax.lax.dynamic_slice_in_dim(embedding_VD, start, W).astype(narrow_ND.dtype)
    ids_W = start + jnp.arange(W)
    logits_NW = jnp.einsum("ND,WD->NW", narrow_ND, rows_WD, preferred_element_type=jnp.float32)
    return jnp.where(ids_W >= first, ids_W, -2), jnp.where(ids_W >= first, logits_NW, MASKED), rows_WD


def _add_rows(a_VD, rows_WD, start):
    before_WD = jax.lax.dynamic_slice_in_dim(a_VD, start, len(rows_WD))
    return jax.lax.dynamic_update_slice_in_dim(a_VD, before_WD + rows_WD, start, 0)


cross_entropy.defvjp(_forward, _backward)
