"""The layers as pure functions of arrays.

Shape letters, here and in the whole core: B batch, T time (queries), S time (keys), D width, H heads,
K head width, F hidden width, V vocabulary, L layers. A name ends in the shape of its array.
"""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row with nothing to attend to gives no NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
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


def rope_table(positions_BT: jax.Array, head_width: int, theta: float) -> tuple[jax.Array, jax.Array]:
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
        table: what `rope_table` gave for their positions.

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
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS * q_BTHK.shape[-1] ** -0.5, MASKED)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BSHK.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, v_BSHK)


def causal_attention(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array) -> jax.Array:
    """`attention` in which position t sees positions 0 to t.

    Args:
        q_BTHK, k_BTHK, v_BTHK: queries, keys and values of the same positions.

    Returns:
        [B, T, H, K] in the dtype of v.
    """
    times = jnp.arange(q_BTHK.shape[1])
    return attention(q_BTHK, k_BTHK, v_BTHK, mask_BTS=(times[:, None] >= times[None, :])[None])


def cudnn_attention(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array) -> jax.Array:
    """As `causal_attention`, by cuDNN's fused kernel: bfloat16 on an NVIDIA GPU, K a multiple of 8."""
    return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="cudnn")


@jax.custom_vjp
def linear(x_BTD: jax.Array, w_DF: jax.Array) -> jax.Array:
    """x w over the last axis, the weights cast to the dtype of x; their gradient stays in float32, as it is summed.

    Args:
        x_BTD: [B, T, D].
        w_DF: [D, F].

    Returns:
        [B, T, F]. The product is taken as [B T, D] by [D, F]: its gradients have one contracted axis, the only
        form that every backend takes.
    """
    return _linear_forward(x_BTD, w_DF)[0]


def _linear_forward(x_BTD, w_DF):
    w_DF = w_DF.astype(x_BTD.dtype)
    out_NF = x_BTD.reshape(-1, w_DF.shape[0]) @ w_DF
    return out_NF.reshape(*x_BTD.shape[:-1], w_DF.shape[1]), (x_BTD, w_DF)


def _linear_backward(residuals, d_out_BTF):
    x_BTD, w_DF = residuals
    x_ND, d_out_NF = (array.reshape(-1, array.shape[-1]) for array in (x_BTD, d_out_BTF))
    d_w_DF = jnp.matmul(x_ND.T, d_out_NF, preferred_element_type=jnp.float32)
    return (d_out_NF @ w_DF.T).reshape(x_BTD.shape), d_w_DF


linear.defvjp(_linear_forward, _linear_backward)


def swiglu(x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """(silu(x gate) * (x up)) down (Shazeer 2020).

    Args:
        x_BTD: [B, T, D].
        gate_DF, up_DF: [D, F].
        down_FD: [F, D].

    Returns:
        [B, T, D].
    """
    return linear(jax.nn.silu(linear(x_BTD, gate_DF)) * linear(x_BTD, up_DF), down_FD)


def embed(ids_BT: jax.Array, embedding_VD: jax.Array) -> jax.Array:
    """The rows of the embedding. Ids outside 0..V-1 are clipped: they are checked where data is read.

    Args:
        ids_BT: [B, T] integers.
        embedding_VD: [V, D].

    Returns:
        [B, T, D].
    """
    return jnp.take(embedding_VD, ids_BT, axis=0, mode="clip")


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
