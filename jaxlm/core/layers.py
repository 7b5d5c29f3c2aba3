"""The layers as pure functions of arrays.

Shape letters, here and in the whole core: B batch, T time (queries), S time (keys), D width, H heads,
K head width, F hidden width, V vocabulary, L layers. A name ends in the shape of its array.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

QUERIES = 128  # of causal attention, taken at a time
GPU_MULTIPLE = 8  # of a bfloat16 product's sizes on a GPU, which pads what is none anew for each product
MASKED = -1e30  # finite, so that a row with nothing to attend to gives no NaN


def scan(body: Callable, carry: Any, xs: Any, *, reverse: bool = False, unroll: bool = False) -> tuple[Any, Any]:
    """`jax.lax.scan`, or the same written out, with no loop in the program (jax's own `unroll` leaves one on 0.4.34).

    A turn that is written out waits for the one before, as in a loop: a compiler that heeds the barrier lets turns
    share their memory, and takes nothing that one computes again from another. (XLA's for the CPU does not heed it.)
    """
    if not unroll:
        return jax.lax.scan(body, carry, xs, reverse=reverse)
    order, outs = range(len(jax.tree.leaves(xs)[0])), []
    for index in order[::-1] if reverse else order:
        x = jax.tree.map(lambda stacked, index=index: jax.lax.index_in_dim(stacked, index, keepdims=False), xs)
        carry, out = body(*jax.lax.optimization_barrier((carry, x)))
        outs.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *(outs[::-1] if reverse else outs))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (Zhang & Sennrich 2019).

    Args:
        x_BTD: [..., D].
        scale_D: [D].
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of x.
    """
    return (x_BTD.astype(jnp.float32) * _unit_scale(x_BTD, eps) * scale_D).astype(x_BTD.dtype)


def _unit_scale(x_BTD, eps):
    return jax.lax.rsqrt(jnp.mean(jnp.square(x_BTD.astype(jnp.float32)), axis=-1, keepdims=True) + eps)


def _rms_norm_forward(x_BTD, scale_D, eps):
    return rms_norm(x_BTD, scale_D, eps), (x_BTD, scale_D)


def _rms_norm_backward(eps, residuals, d_out_BTD):
    x_BTD, scale_D = residuals
    # were the scale of the forward pass taken from there, the GPU could not compute that pass in one kernel
    x_BTD = jax.lax.optimization_barrier(x_BTD)
    unit_BT1, x32_BTD, d_out_BTD = _unit_scale(x_BTD, eps), x_BTD.astype(jnp.float32), d_out_BTD.astype(jnp.float32)
    d_unit_BTD = d_out_BTD * scale_D
    along_BT1 = jnp.mean(d_unit_BTD * x32_BTD, axis=-1, keepdims=True)
    d_x_BTD = unit_BT1 * d_unit_BTD - x32_BTD * (unit_BT1**3 * along_BT1)
    d_scale_D = jnp.sum(d_out_BTD * x32_BTD * unit_BT1, axis=tuple(range(x_BTD.ndim - 1)))
    return d_x_BTD.astype(x_BTD.dtype), d_scale_D


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def rope_cos_sin(positions_BT: jax.Array, head_width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles position * theta^(-2i/K), i < K/2 (Su et al. 2021).

    Args:
        positions_BT: [B, T] integers.
        head_width: K, even.
        theta: base of the frequencies.

    Returns:
        cos, sin: each [B, T, 1, K/2] float32, to be applied to [B, T, H, K].
    """
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rope(x_BTHK: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (x[i], x[i + K/2]) by the table's angles (the half-split form, as in Llama).

    Args:
        x_BTHK: queries or keys.
        table: what `rope_cos_sin` gave for their positions.

    Returns:
        [B, T, H, K] in the dtype of x.
    """
    cos, sin = table
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


def attention(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v for each head (Vaswani et al. 2017), the softmax in float32.

    Args:
        q_BTHK: queries.
        k_BSHK: keys.
        v_BSHK: values.
        mask_BTS: True where a query may attend; its first axis may be 1.

    Returns:
        [B, T, H, K] in the dtype of v.
    """
    return attention_with_cache(q_BTHK, *to_cache_layout(k_BSHK, v_BSHK), mask_BTS)


def to_cache_layout(k_BSHK: jax.Array, v_BSHK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [G, S, K], G = B H, as the products of `attention_with_cache` read them."""
    return _by_head(k_BSHK, k_BSHK.dtype), _by_head(v_BSHK, v_BSHK.dtype)


def attention_with_cache(q_BTHK: jax.Array, k_GSK: jax.Array, v_GSK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """`attention` to keys and values as `to_cache_layout` gives them."""
    B, T, H, K = q_BTHK.shape
    scores_GTS = _products("GTK,GSK->GTS", _by_head(q_BTHK, q_BTHK.dtype), k_GSK)
    scores_BHTS = scores_GTS.reshape(B, H, T, -1) * K**-0.5
    weights_BHTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BHTS, MASKED), axis=-1)
    weights_GTS = weights_BHTS.reshape(scores_GTS.shape).astype(v_GSK.dtype)
    return jnp.einsum("GTS,GSK->GTK", weights_GTS, v_GSK).reshape(B, H, T, K).swapaxes(1, 2)


def causal_attention(
    q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, dtype: Any, known: Any = None
) -> tuple[jax.Array, Any]:
    """`attention` in which position t sees positions 0 to t, in blocks of queries.

    A block's scores over the positions it may see exist only while it is computed, forward and, a second time,
    backward; what the mask hides beyond the block is skipped (the idea of Dao et al. 2022, the gradient as in their
    appendix B).

    Args:
        q_BTHK, k_BTHK, v_BTHK: queries, keys and values of the same positions.
        dtype: of what the products read; their sums and the softmax are float32.
        known: what an earlier call with the same arrays gave to know; then only the gradient is computed.

    Returns:
        [B, T, H, K] in the dtype of v; and what to know of it, which has no gradient of its own.
    """
    known = _causal(q_BTHK, k_BTHK, v_BTHK, known, dtype)
    return known[0], known


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _causal(q_BTHK, k_BTHK, v_BTHK, known, dtype):
    return known or _by_query_blocks(q_BTHK, k_BTHK, v_BTHK, dtype)


def _by_query_blocks(q_BTHK, k_BTHK, v_BTHK, dtype):
    """[B, T, H, K], and the logarithms [G, T] of what the weights of each query are divided by."""
    q, k, v = (_by_head(x, dtype) for x in (q_BTHK * q_BTHK.shape[-1] ** -0.5, k_BTHK, v_BTHK))
    out, logsumexp = [], []
    for block in _query_blocks(q.shape[1]):
        seen = slice(block.stop)
        scores_GTS = jnp.where(_visible(block), _products("GTK,GSK->GTS", q[:, block], k[:, seen]), MASKED)
        largest_GT1 = jnp.max(scores_GTS, axis=-1, keepdims=True)
        weights_GTS = jnp.exp(scores_GTS - largest_GT1)
        total_GT1 = jnp.sum(weights_GTS, axis=-1, keepdims=True)
        out.append(_products("GTS,GSK->GTK", weights_GTS.astype(dtype), v[:, seen]) / total_GT1)
        logsumexp.append((largest_GT1 + jnp.log(total_GT1))[..., 0])
    return _from_heads(jnp.concatenate(out, axis=1), v_BTHK), jnp.concatenate(logsumexp, axis=1)


def _causal_forward(q_BTHK, k_BTHK, v_BTHK, known, dtype):
    known = _causal(q_BTHK, k_BTHK, v_BTHK, known, dtype)
    return known, (q_BTHK, k_BTHK, v_BTHK, *known)


def _causal_backward(dtype, residuals, d_known):
    d_out_BTHK, _ = d_known
    q_BTHK, k_BTHK, v_BTHK, out_BTHK, logsumexp_GT = residuals
    scale = q_BTHK.shape[-1] ** -0.5
    q, k, v, d_out = (_by_head(x, dtype) for x in (q_BTHK * scale, k_BTHK, v_BTHK, d_out_BTHK))
    # the sum over S of weights * d_weights
    mean_GT = jnp.sum(_by_head(out_BTHK, dtype).astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    k_GKT = k.swapaxes(1, 2)
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for block in _query_blocks(q.shape[1]):
        seen = slice(block.stop)
        scores_GST = _products("GSK,GTK->GST", k[:, seen], q[:, block])
        weights_GST = jnp.where(_visible(block).T, jnp.exp(scores_GST - logsumexp_GT[:, block][:, None]), 0)
        d_weights_GST = _products("GSK,GTK->GST", v[:, seen], d_out[:, block])
        d_scores_GST = (weights_GST * (d_weights_GST - mean_GT[:, block][:, None])).astype(dtype)
        d_v = _add_to_start(d_v, _products("GST,GTK->GSK", weights_GST.astype(dtype), d_out[:, block]))
        d_k = _add_to_start(d_k, _products("GST,GTK->GSK", d_scores_GST, q[:, block]))
        d_q.append(_products("GKS,GST->GKT", k_GKT[:, :, seen], d_scores_GST))
    d_q_GTK = (jnp.concatenate(d_q, axis=2) * scale).swapaxes(1, 2)
    return *(_from_heads(d, x) for d, x in ((d_q_GTK, q_BTHK), (d_k, k_BTHK), (d_v, v_BTHK))), None


def _add_to_start(total_GSK: jax.Array, part_GSK: jax.Array) -> jax.Array:
    """The sum, where the part has only the first positions."""
    return jax.lax.dynamic_update_slice(total_GSK, total_GSK[:, : part_GSK.shape[1]] + part_GSK, (0, 0, 0))


def _query_blocks(times: int) -> list[slice]:
    return [slice(start, min(start + QUERIES, times)) for start in range(0, times, QUERIES)]


def _visible(block: slice) -> jax.Array:
    """[T, S]: which of the positions before the end of a block its queries see."""
    return jnp.arange(block.start, block.stop)[:, None] >= jnp.arange(block.stop)[None]


def _by_head(x_BTHK: jax.Array, dtype: Any) -> jax.Array:
    """[G, T, K] with G = B H."""
    B, T, H, K = x_BTHK.shape
    return x_BTHK.astype(dtype).swapaxes(1, 2).reshape(B * H, T, K)


def _from_heads(x_GTK: jax.Array, like_BTHK: jax.Array) -> jax.Array:
    B, T, H, K = like_BTHK.shape
    return x_GTK.reshape(B, H, T, K).swapaxes(1, 2).astype(like_BTHK.dtype)


_products = partial(jnp.einsum, preferred_element_type=jnp.float32)
_causal.defvjp(_causal_forward, _causal_backward)


def cudnn_attention(
    q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, known: None = None
) -> tuple[jax.Array, None]:
    """As `causal_attention`, by cuDNN's fused kernel: bfloat16 on an NVIDIA GPU, K a multiple of 8."""
    return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="cudnn"), known


class Turned(NamedTuple):
    """A matrix [D, F] that lies turned, as rows of D numbers each."""

    w_FD: jax.Array


def linear(x_BTD: jax.Array, w_DF: jax.Array | Turned, dtype: Any = None) -> jax.Array:
    """x w over the last axis, in the dtype of x.

    Args:
        x_BTD: [B, T, D].
        w_DF: [D, F]; one that lies turned gives no gradient.
        dtype: of what the products read, forward and backward; None: that of x. Sums are float32.

    Returns:
        [B, T, F]. The product is taken as [B T, D] by [D, F]: its gradients have one contracted axis, the only
        form that every backend takes.
    """
    x_ND, dtype = x_BTD.reshape(-1, x_BTD.shape[-1]), dtype or x_BTD.dtype
    out_NF = _product_of_turned(x_ND, w_DF.w_FD, dtype) if isinstance(w_DF, Turned) else _product(x_ND, w_DF, dtype)
    return out_NF.reshape(*x_BTD.shape[:-1], -1)


def _product_of_turned(x_ND, w_FD, dtype):
    """x w^T as a CPU computes it fastest: it reads each row of w once, as it lies."""
    N, narrow_ND, w_FD = len(x_ND), x_ND.astype(dtype), w_FD.astype(dtype)
    if w_FD.dtype != jnp.bfloat16:
        return jnp.einsum("ND,FD->NF", narrow_ND, w_FD, preferred_element_type=x_ND.dtype)
    # XLA would pack such a matrix on the right (the barrier keeps it on the left), and write it in float32 for one row
    narrow_ND = jnp.pad(narrow_ND, ((0, N == 1), (0, 0)))
    out_FN = jax.lax.optimization_barrier(jnp.einsum("FD,ND->FN", w_FD, narrow_ND, preferred_element_type=x_ND.dtype))
    return out_FN[:, :N].T


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x_ND, w_DF, dtype):
    return jnp.matmul(x_ND.astype(dtype), w_DF.astype(dtype), preferred_element_type=x_ND.dtype)


def _product_backward(dtype, residuals, d_out_NF):
    x_ND, w_DF = residuals
    narrow_NF = d_out_NF.astype(dtype)
    d_x_ND = jnp.einsum("NF,DF->ND", narrow_NF, w_DF.astype(dtype), preferred_element_type=x_ND.dtype)
    return d_x_ND, product_over_rows(x_ND.astype(dtype), narrow_NF).astype(w_DF.dtype)


_product.defvjp(lambda x_ND, w_DF, dtype: (_product(x_ND, w_DF, dtype), (x_ND, w_DF)), _product_backward)


def product_over_rows(a_ND: jax.Array, b_NF: jax.Array) -> jax.Array:
    """a^T b, [D, F] float32: the gradient of a weight from its inputs and that of its outputs.

    XLA has fast bfloat16 products on a CPU, but for this form. There the narrower side is transposed first, by tiles
    of 16 x 16: a plain transpose it would fold back into the product.
    """
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    by_tiles = not any(size % 16 for size in (*a_ND.shape, *b_NF.shape))
    if a_ND.dtype == jnp.bfloat16 and by_tiles and jax.default_backend() == "cpu":
        narrower_is_a = a_ND.shape[1] <= b_NF.shape[1]
        return product(_turned(a_ND), b_NF) if narrower_is_a else _turned(product(_turned(b_NF), a_ND))
    return product(a_ND.T, b_NF)


def _turned(x_ND: jax.Array) -> jax.Array:
    N, D = x_ND.shape
    return x_ND.reshape(N // 16, 16, D // 16, 16).transpose(2, 3, 0, 1).reshape(D, N)


def swiglu_activation(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """silu(gate) * up, which SwiGLU has between its matrices (Shazeer 2020)."""
    return jax.nn.silu(gate_BTF) * up_BTF


def embed(ids_BT: jax.Array, embedding_VD: jax.Array) -> jax.Array:
    """The rows of the embedding. Ids outside 0..V-1 are clipped: they are checked where data is read.

    Args:
        ids_BT: [B, T] integers.
        embedding_VD: [V, D].

    Returns:
        [B, T, D].
    """
    return jnp.take(embedding_VD, ids_BT, axis=0, mode="clip")


@jax.custom_vjp
def embed_and_pass(ids_BT: jax.Array, embedding_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`embed`, and the embedding for its next use.

    Backward, the gradient of that next use arrives whole, and this one is added to it where it lies.
    """
    return embed(ids_BT, embedding_VD), embedding_VD


embed_and_pass.defvjp(
    lambda ids_BT, embedding_VD: (embed_and_pass(ids_BT, embedding_VD), ids_BT),
    lambda ids_BT, d: (None, d[1].at[ids_BT.ravel()].add(d[0].reshape(-1, d[0].shape[-1]), mode="clip")),
)


def tied_head(x_BTD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
    """Logits from the transposed input embedding (Press & Wolf 2017).

    Args:
        x_BTD: [B, T, D].
        embedding_VD: [V, D].

    Returns:
        [B, T, V] float32.
    """
    embedding_VD = embedding_VD.astype(x_BTD.dtype)
    return jnp.einsum("BTD,VD->BTV", x_BTD, embedding_VD, preferred_element_type=jnp.float32)
