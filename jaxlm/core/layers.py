"""The layers as pure functions of arrays.

Shape letters, here and in the whole core: B batch, T time (queries), S time (keys), D width, H heads,
K head width, F MLP width, V vocabulary, L layers. A name ends in the shape of its array.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

MASK_VALUE = -1e30  # finite, so that a row with nothing to attend to gives no NaN


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang & Sennrich 2019), in float32; [..., D] like x."""
    return (x_BTD.astype(jnp.float32) * _inverse_rms(x_BTD, eps) * scale_D).astype(x_BTD.dtype)


def _inverse_rms(x_BTD, eps):
    return jax.lax.rsqrt(jnp.mean(jnp.square(x_BTD.astype(jnp.float32)), axis=-1, keepdims=True) + eps)


def _rms_norm_forward(x_BTD, scale_D, eps):
    return rms_norm(x_BTD, scale_D, eps), (x_BTD, scale_D)


def _rms_norm_backward(eps, residuals, d_out_BTD):
    x_BTD, scale_D = residuals
    # without this barrier XLA shares the forward pass's inverse, and a GPU cannot fuse that pass into one kernel
    x_BTD = jax.lax.optimization_barrier(x_BTD)
    inverse_BT1, x32_BTD, d_out_BTD = _inverse_rms(x_BTD, eps), x_BTD.astype(jnp.float32), d_out_BTD.astype(jnp.float32)
    d_normed_BTD = d_out_BTD * scale_D
    projection_BT1 = jnp.mean(d_normed_BTD * x32_BTD, axis=-1, keepdims=True)
    d_x_BTD = inverse_BT1 * d_normed_BTD - x32_BTD * (inverse_BT1**3 * projection_BT1)
    d_scale_D = jnp.sum(d_out_BTD * x32_BTD * inverse_BT1, axis=tuple(range(x_BTD.ndim - 1)))
    return d_x_BTD.astype(x_BTD.dtype), d_scale_D


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def rope_cos_sin(positions_BT: jax.Array, head_width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles position * theta^(-2i/K), i < K/2 (Su et al. 2021): each [B, T, 1, K/2] float32.

    Args:
        positions_BT: integers.
        head_width: K, even.
        theta: base of the frequencies.
    """
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rope(x_BTHK: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x[i], x[i + K/2]) by the angles of their positions (the half-split form, as in Llama)."""
    cos, sin = cos_sin
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def rms_norm_rope(x_BTHK: jax.Array, scale_K: jax.Array, cos_sin: tuple[jax.Array, jax.Array], eps: float) -> jax.Array:
    """`rope` of `rms_norm` for each head's queries or keys (Henry et al. 2020, with a learned scale as in Qwen3).

    The result is rounded once. Backward saves only x; the cosines and sines have no gradient.
    """
    return rope(rms_norm(x_BTHK.astype(jnp.float32), scale_K, eps), cos_sin).astype(x_BTHK.dtype)


def _rms_norm_rope_forward(x_BTHK, scale_K, cos_sin, eps):
    return rms_norm_rope(x_BTHK, scale_K, cos_sin, eps), (x_BTHK, scale_K, cos_sin)


def _rms_norm_rope_backward(eps, residuals, d_out_BTHK):
    x_BTHK, scale_K, (cos, sin) = residuals
    d_normed_BTHK = rope(d_out_BTHK.astype(jnp.float32), (cos, -sin))  # the transpose of a rotation is its inverse
    return *_rms_norm_backward(eps, (x_BTHK, scale_K), d_normed_BTHK), None


rms_norm_rope.defvjp(_rms_norm_rope_forward, _rms_norm_rope_backward)


def split_heads(x_BTHK: jax.Array) -> jax.Array:
    """[G, T, K] with G = B H: each head of each sequence is a batch entry of the matmuls. A cache has this layout."""
    B, T, H, K = x_BTHK.shape
    return x_BTHK.swapaxes(1, 2).reshape(B * H, T, K)


def merge_heads(x_GTK: jax.Array, heads: int) -> jax.Array:
    """The inverse of `split_heads`: [B, T, H, K]."""
    return x_GTK.reshape(-1, heads, *x_GTK.shape[1:]).swapaxes(1, 2)


def attention(q_BTHK: jax.Array, k_GSK: jax.Array, v_GSK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v for each head (Vaswani et al. 2017), the softmax in float32.

    Args:
        q_BTHK: queries.
        k_GSK, v_GSK: keys and values, from `split_heads`.
        mask_BTS: True where a query may attend; its first axis may be 1.

    Returns:
        [B, T, H, K] in the dtype of v.
    """
    B, T, H, K = q_BTHK.shape
    scores_GTS = jnp.einsum("GTK,GSK->GTS", split_heads(q_BTHK), k_GSK, preferred_element_type=jnp.float32)
    scores_BHTS = scores_GTS.reshape(B, H, T, -1) * K**-0.5
    weights_BHTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BHTS, MASK_VALUE), axis=-1)
    weights_GTS = weights_BHTS.reshape(scores_GTS.shape).astype(v_GSK.dtype)
    return merge_heads(jnp.einsum("GTS,GSK->GTK", weights_GTS, v_GSK), H)


@runtime_checkable
class DecodeMatrix(Protocol):
    """A matrix [D, F] in a layout of its device's own, without a gradient: what `Ops.decode_layout` may return."""

    def product(self, x_ND: jax.Array, dtype: Any) -> jax.Array:
        """x times the matrix, [N, F] in the dtype of x, from factors in `dtype`."""


def linear(
    x_BTD: jax.Array,
    w_DF: jax.Array | DecodeMatrix,
    matmul_dtype: Any,
    weight_gradient: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """x w over the last axis, [..., F] in the dtype of x.

    The matmul is [B T, D] by [D, F], so its gradients contract one axis. Other forms do not run on every backend.

    Args:
        x_BTD: [..., D].
        w_DF: the matrix.
        matmul_dtype: dtype that the matmuls read, forward and backward. Sums are float32.
        weight_gradient: as in `ops.record.Ops`.
    """
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    if isinstance(w_DF, DecodeMatrix):
        out_NF = w_DF.product(x_ND, matmul_dtype)
    else:
        out_NF = _matmul(x_ND, w_DF, matmul_dtype, weight_gradient)
    return out_NF.reshape(*x_BTD.shape[:-1], -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x_ND, w_DF, dtype, weight_gradient):
    return jnp.matmul(x_ND.astype(dtype), w_DF.astype(dtype), preferred_element_type=x_ND.dtype)


def _matmul_forward(x_ND, w_DF, dtype, weight_gradient):
    return _matmul(x_ND, w_DF, dtype, weight_gradient), (x_ND, w_DF)


def _matmul_backward(dtype, weight_gradient, residuals, d_out_NF):
    x_ND, w_DF = residuals
    d_lowp_NF = d_out_NF.astype(dtype)
    d_x_ND = jnp.einsum("NF,DF->ND", d_lowp_NF, w_DF.astype(dtype), preferred_element_type=x_ND.dtype)
    return d_x_ND, weight_gradient(x_ND.astype(dtype), d_lowp_NF).astype(w_DF.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def swiglu_activation(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """silu(gate) * up, the activation of SwiGLU (Shazeer 2020)."""
    return jax.nn.silu(gate_BTF) * up_BTF


def embed(ids_BT: jax.Array, embedding_VD: jax.Array) -> jax.Array:
    """The rows [B, T, D] of the embedding. Ids outside 0..V-1 are clipped: data is checked when it is read."""
    return jnp.take(embedding_VD, ids_BT, axis=0, mode="clip")


def tied_head(x_BTD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
    """Logits [B, T, V] float32 from the transposed input embedding (Press & Wolf 2017)."""
    return jnp.einsum("BTD,VD->BTV", x_BTD, embedding_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
