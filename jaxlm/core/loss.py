"""Next-token cross-entropy from the residual stream, in tiles of the vocabulary: the whole logits never exist.

Whole, the logits of 32 x 1024 tokens over 50,257 entries take 6.6 GB in float32, and their gradient as much again.
Here the loss goes by tiles of the vocabulary, as in Wijmans et al. 2024 (arXiv 2411.09009). But they compute the logits
a second time for the gradient; here it is taken at once, of so many tokens at a time that their exponentials can be
kept: a quarter fewer products.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.layers import MASKED, embed, product_over_rows, scan

TILE = 1536
GPU_TILE = 6144
UNROLLED_TILE = 12_565  # a quarter of GPT-2's vocabulary: few enough tiles to write out, none as wide as 32,767
KEPT = 2**27  # bytes of exponentials: less than a block's backward pass takes in the preset
KEPT_ON_GPU = 2**30  # products want many rows there
ROWS = 16  # a chunk of the tokens has a multiple of them, as fast products need


def cross_entropy(
    x_ND: jax.Array, embedding_VD: jax.Array, targets_N: jax.Array, dtype: Any, tile: int = TILE, unroll: bool = False
) -> jax.Array:
    """Sum of logsumexp(logits) - logits[target] over N tokens, logits = x embedding^T.

    To be evaluated: jax's own gradient of it keeps all logits.

    Args:
        x_ND: what the tied head reads.
        embedding_VD: float32.
        targets_N: ids below V; a target below 0 counts nothing.
        dtype: of what the products read; their sums and all else are float32.
        tile: entries of the vocabulary whose logits exist at one time.
        unroll: write the tiles out, one after the other, instead of looping.

    Returns:
        [] float32, nats.
    """
    narrow_ND = x_ND.astype(dtype)
    logsumexp_N, _ = _logsumexp(narrow_ND, embedding_VD, tile, unroll, keep=False)
    return _nats(narrow_ND, embedding_VD, targets_N, logsumexp_N)


def cross_entropy_and_gradient(
    x_ND: jax.Array,
    embedding_VD: jax.Array,
    targets_N: jax.Array,
    scale: jax.Array | float,
    total_VD: jax.Array,
    dtype: Any,
    kept: int = KEPT,
    tile: int = TILE,
    unroll: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cross_entropy`, and its gradients times `scale`: by x, and by the embedding, added to `total` where it lies.

    Args:
        x_ND, embedding_VD, targets_N, dtype, tile, unroll: as of `cross_entropy`.
        scale: [], of the gradients.
        total_VD: float32, what the embedding's gradient is added to.
        kept: bytes of exponentials that exist at one time, at most, or those of ROWS tokens.

    Returns:
        [] float32, nats; [N, D] in the dtype of x; [V, D].
    """
    (N, D), V = x_ND.shape, len(embedding_VD)
    bytes_of_token = -(-V // tile) * min(tile, V) * jnp.dtype(dtype).itemsize
    chunks = -(-N // max(ROWS, kept // bytes_of_token // ROWS * ROWS))
    padding = -N % (chunks * ROWS) if chunks > 1 else 0
    x_CND = jnp.pad(x_ND, ((0, padding), (0, 0))).reshape(chunks, -1, D)
    targets_CN = jnp.pad(targets_N, (0, padding), constant_values=-1).reshape(chunks, -1)

    def add_chunk(total_VD, chunk):
        x_ND, targets_N = chunk
        narrow_ND = x_ND.astype(dtype)
        logsumexp_N, kept = _logsumexp(narrow_ND, embedding_VD, tile, unroll, keep=True)
        d_nats_N1 = jnp.where(targets_N >= 0, scale, 0)[:, None]

        def add_tile(carry, of_tile):
            (d_x_ND, total_VD), (place, (e_NW, largest_N)) = carry, of_tile
            ids_W, rows_WD = _tile_of(embedding_VD, tile, place, dtype)
            if e_NW.dtype == jnp.uint16:
                e_NW = jax.lax.bitcast_convert_type(e_NW, jnp.bfloat16)
            softmax_NW = e_NW * jnp.exp(largest_N - logsumexp_N)[:, None]
            d_logits_NW = ((softmax_NW - (ids_W == targets_N[:, None])) * d_nats_N1).astype(dtype)
            d_x_ND += jnp.matmul(d_logits_NW, rows_WD, preferred_element_type=jnp.float32)
            return (d_x_ND, _add_rows(total_VD, product_over_rows(d_logits_NW, narrow_ND), place[0])), None

        start = (jnp.zeros(x_ND.shape, jnp.float32), total_VD)
        (d_x_ND, total_VD), _ = scan(add_tile, start, (_places(V, tile), kept), unroll=unroll)
        nats = _nats(narrow_ND, embedding_VD, targets_N, logsumexp_N)
        return total_VD, (nats, d_x_ND.astype(x_ND.dtype))

    total_VD, (nats_C, d_x_CND) = scan(add_chunk, total_VD, (x_CND, targets_CN), unroll=unroll)
    return jnp.sum(nats_C), d_x_CND.reshape(-1, D)[:N], total_VD


def _logsumexp(narrow_ND, embedding_VD, tile, unroll, keep):
    """logsumexp(logits) [N]; and to `keep`, of each tile exp(logits - largest) [N, W] in the dtype of x, and the
    largest logits [N] up to this tile. In a loop bfloat16 is kept as its bits: XLA for the CPU would convert the tiles
    of all turns to float32 before the next loop."""

    def add_tile(carry, place):
        largest_N, total_N = carry
        ids_W, rows_WD = _tile_of(embedding_VD, tile, place, narrow_ND.dtype)
        logits_NW = jnp.einsum("ND,WD->NW", narrow_ND, rows_WD, preferred_element_type=jnp.float32)
        logits_NW = jnp.where(ids_W >= 0, logits_NW, MASKED)
        larger_N = jnp.maximum(largest_N, jnp.max(logits_NW, axis=1))
        e_NW = jnp.exp(logits_NW - larger_N[:, None])
        total_N = total_N * jnp.exp(largest_N - larger_N) + jnp.sum(e_NW, axis=1)
        if not keep:
            return (larger_N, total_N), None
        e_NW = e_NW.astype(narrow_ND.dtype)
        if e_NW.dtype == jnp.bfloat16 and not unroll:
            e_NW = jax.lax.bitcast_convert_type(e_NW, jnp.uint16)
        return (larger_N, total_N), (e_NW, larger_N)

    N = len(narrow_ND)
    start = jnp.full(N, MASKED), jnp.zeros(N)
    (largest_N, total_N), kept = scan(add_tile, start, _places(len(embedding_VD), tile), unroll=unroll)
    return largest_N + jnp.log(total_N), kept


def _nats(narrow_ND, embedding_VD, targets_N, logsumexp_N):
    rows_ND = embed(targets_N, embedding_VD).astype(narrow_ND.dtype)
    picked_N = jnp.sum(narrow_ND.astype(jnp.float32) * rows_ND.astype(jnp.float32), axis=1)
    return jnp.sum(jnp.where(targets_N >= 0, logsumexp_N - picked_N, 0))


def _places(V: int, tile: int) -> tuple[jax.Array, jax.Array]:
    """Where each tile starts, and its first id that no tile before it has: the last one overlaps, to end with V."""
    first = jnp.arange(0, V, tile)
    return jnp.minimum(first, max(V - tile, 0)), first


def _tile_of(embedding_VD, tile, place, dtype):
    """A tile's ids [W] and its rows of the embedding [W, D]. An id that another tile has counted is -2, no target."""
    start, first = place
    W = min(tile, len(embedding_VD))
    rows_WD = jax.lax.dynamic_slice_in_dim(embedding_VD, start, W).astype(dtype)
    ids_W = start + jnp.arange(W)
    return jnp.where(ids_W >= first, ids_W, -2), rows_WD


def _add_rows(a_VD, rows_WD, start):
    before_WD = jax.lax.dynamic_slice_in_dim(a_VD, start, len(rows_WD))
    return jax.lax.dynamic_update_slice_in_dim(a_VD, before_WD + rows_WD, start, 0)
