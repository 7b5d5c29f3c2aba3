"""Next-token cross-entropy from the residual stream, in tiles of the vocabulary: the whole logits never exist.

The logits of 32 x 1024 tokens over 50,257 entries take 6.6 GB in float32, and their gradient as much again. Here the
loss is computed by tiles of the vocabulary, as in Wijmans et al. 2024 (arXiv 2411.09009). They compute the logits
twice. Here the gradient follows at once, for so many tokens that their exponentials fit in a buffer.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxlm.core.layers import MASK_VALUE, embed

if TYPE_CHECKING:
    from jaxlm.core.ops.record import Ops

ROW_MULTIPLE = 16  # a chunk of tokens has a multiple of so many rows, for fast matmuls


def cross_entropy(
    ops: "Ops", x_ND: jax.Array, embedding_VD: jax.Array, targets_N: jax.Array, matmul_dtype: Any
) -> jax.Array:
    """Sum of logsumexp(logits) - logits[target] over N tokens, logits = x embedding^T, for evaluation.

    Args:
        ops: the device's operations; they set the size of a tile.
        x_ND: the input of the head.
        embedding_VD: float32.
        targets_N: ids below V; a target below 0 is ignored.
        matmul_dtype: dtype that the matmuls read; their sums and all else are float32.

    Returns:
        [] float32, in nats.
    """
    x_lowp_ND = x_ND.astype(matmul_dtype)
    logsumexp_N, _ = _logsumexp(ops, x_lowp_ND, embedding_VD, save=False)
    return _loss_sum(x_lowp_ND, embedding_VD, targets_N, logsumexp_N)


def cross_entropy_and_grad(
    ops: "Ops",
    x_ND: jax.Array,
    embedding_VD: jax.Array,
    targets_N: jax.Array,
    scale: jax.Array | float,
    grad_accumulator_VD: jax.Array,
    matmul_dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cross_entropy`; `scale` times its gradient by x, in the dtype of x; `grad_accumulator_VD` plus `scale` times its
    gradient by the embedding, in place and in float32."""
    (N, D), V = x_ND.shape, len(embedding_VD)
    bytes_per_token = -(-V // ops.vocab_tile) * _tile_width(ops, V) * jnp.dtype(matmul_dtype).itemsize
    chunks = -(-N // max(ROW_MULTIPLE, ops.exp_buffer_bytes // bytes_per_token // ROW_MULTIPLE * ROW_MULTIPLE))
    padding = -N % (chunks * ROW_MULTIPLE) if chunks > 1 else 0
    x_CND = jnp.pad(x_ND, ((0, padding), (0, 0))).reshape(chunks, -1, D)
    targets_CN = jnp.pad(targets_N, (0, padding), constant_values=-1).reshape(chunks, -1)

    def add_chunk(grad_accumulator_VD, chunk):
        x_ND, targets_N = chunk
        x_lowp_ND = x_ND.astype(matmul_dtype)
        logsumexp_N, saved = _logsumexp(ops, x_lowp_ND, embedding_VD, save=True)
        d_loss_N1 = jnp.where(targets_N >= 0, scale, 0)[:, None]

        def add_tile(carry, tile):
            (d_x_ND, grad_accumulator_VD), (tile_start, (exp_NW, max_N)) = carry, tile
            ids_W, rows_WD = _vocab_tile(ops, embedding_VD, tile_start, matmul_dtype)
            if exp_NW.dtype == jnp.uint16:
                exp_NW = jax.lax.bitcast_convert_type(exp_NW, jnp.bfloat16)
            softmax_NW = exp_NW * jnp.exp(max_N - logsumexp_N)[:, None]
            d_logits_NW = ((softmax_NW - (ids_W == targets_N[:, None])) * d_loss_N1).astype(matmul_dtype)
            d_x_ND += jnp.matmul(d_logits_NW, rows_WD, preferred_element_type=jnp.float32)
            d_rows_WD = ops.weight_gradient(d_logits_NW, x_lowp_ND)
            d_rows_WD = jax.lax.dynamic_slice_in_dim(grad_accumulator_VD, tile_start[0], len(d_rows_WD)) + d_rows_WD
            return (d_x_ND, jax.lax.dynamic_update_slice_in_dim(grad_accumulator_VD, d_rows_WD, tile_start[0], 0)), None

        carry = (jnp.zeros(x_ND.shape, jnp.float32), grad_accumulator_VD)
        (d_x_ND, grad_accumulator_VD), _ = ops.scan(add_tile, carry, (_tile_starts(ops, V), saved))
        loss_sum = _loss_sum(x_lowp_ND, embedding_VD, targets_N, logsumexp_N)
        return grad_accumulator_VD, (loss_sum, d_x_ND.astype(x_ND.dtype))

    grad_accumulator_VD, (loss_C, d_x_CND) = ops.scan(add_chunk, grad_accumulator_VD, (x_CND, targets_CN))
    return jnp.sum(loss_C), d_x_CND.reshape(-1, D)[:N], grad_accumulator_VD


def _logsumexp(ops, x_lowp_ND, embedding_VD, save):
    """logsumexp(logits) [N]; with `save` also exp(logits - max) [N, W] of each tile, in the dtype of x, and the running
    maximum of the logits [N]."""

    def add_tile(carry, tile_start):
        max_N, sum_N = carry
        ids_W, rows_WD = _vocab_tile(ops, embedding_VD, tile_start, x_lowp_ND.dtype)
        logits_NW = jnp.einsum("ND,WD->NW", x_lowp_ND, rows_WD, preferred_element_type=jnp.float32)
        logits_NW = jnp.where(ids_W >= 0, logits_NW, MASK_VALUE)
        new_max_N = jnp.maximum(max_N, jnp.max(logits_NW, axis=1))
        exp_NW = jnp.exp(logits_NW - new_max_N[:, None])
        sum_N = sum_N * jnp.exp(max_N - new_max_N) + jnp.sum(exp_NW, axis=1)
        if not save:
            return (new_max_N, sum_N), None
        exp_NW = exp_NW.astype(x_lowp_ND.dtype)
        if exp_NW.dtype == jnp.bfloat16 and ops.exp_buffer_as_bits:
            exp_NW = jax.lax.bitcast_convert_type(exp_NW, jnp.uint16)
        return (new_max_N, sum_N), (exp_NW, new_max_N)

    N = len(x_lowp_ND)
    carry = jnp.full(N, MASK_VALUE), jnp.zeros(N)
    (max_N, sum_N), saved = ops.scan(add_tile, carry, _tile_starts(ops, len(embedding_VD)))
    return max_N + jnp.log(sum_N), saved


def _loss_sum(x_lowp_ND, embedding_VD, targets_N, logsumexp_N):
    rows_ND = embed(targets_N, embedding_VD).astype(x_lowp_ND.dtype)
    target_logits_N = jnp.sum(x_lowp_ND.astype(jnp.float32) * rows_ND.astype(jnp.float32), axis=1)
    return jnp.sum(jnp.where(targets_N >= 0, logsumexp_N - target_logits_N, 0))


def _tile_width(ops, V):
    """As many tiles as `ops.vocab_tile` needs, but evenly wide, so that the last one overlaps little."""
    tiles = -(-V // ops.vocab_tile)
    return min(-(-V // (tiles * ROW_MULTIPLE)) * ROW_MULTIPLE, ops.vocab_tile, V)


def _tile_starts(ops, V):
    """Where each tile starts, and its first id that is in no tile before it: the last tile overlaps, to end with V."""
    W = _tile_width(ops, V)
    first = jnp.arange(0, V, W)
    return jnp.minimum(first, V - W), first


def _vocab_tile(ops, embedding_VD, tile_start, dtype):
    """A tile's ids [W] and its rows of the embedding [W, D]. An id that another tile counts is -2, no target."""
    start, first = tile_start
    W = _tile_width(ops, len(embedding_VD))
    rows_WD = jax.lax.dynamic_slice_in_dim(embedding_VD, start, W).astype(dtype)
    ids_W = start + jnp.arange(W)
    return jnp.where(ids_W >= first, ids_W, -2), rows_WD
