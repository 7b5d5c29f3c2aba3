"""QK-norm and RoPE for Hopper GPUs (H100, H200): one kernel forward and one backward, around one matmul.

XLA computes the norms by kernels for the rows' sums, for the gradient of the scales and for the element-wise part, and
each reads the queries and keys again. Here one kernel reads the result of the fused matmul of queries, keys and values
once and writes the three arrays that attention reads. The backward kernel writes the gradient of the fused result,
which the backward matmuls read. All arithmetic is in float32.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.layers import linear
from jaxlm.core.ops import xla
from jaxlm.core.ops.record import Ops

BLOCK_ROWS = 32  # tokens that a program computes
MAX_GROUP = 8  # heads that a program computes, at most
WARPS = 4  # of a program


def query_key_value(
    ops: Ops,
    x_BTD: jax.Array,
    weights: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    rope_cos_sin: tuple[jax.Array, jax.Array],
    eps: float,
    matmul_dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Ops.query_key_value` by the kernels, where T is whole blocks, K a power of 2 and positions are shared."""
    (B, T, _), K = x_BTD.shape, len(scales[0])
    if T % BLOCK_ROWS or K.bit_count() > 1 or K < 32 or len(rope_cos_sin[0]) > 1:
        return xla.query_key_value(ops, x_BTD, weights, scales, rope_cos_sin, eps, matmul_dtype)
    fused_BTF = linear(x_BTD, jnp.concatenate(weights, axis=1), matmul_dtype, ops.weight_gradient)
    heads = tuple(w_DF.shape[1] // K for w_DF in weights)
    cos_sin = tuple(array.reshape(T, K // 2) for array in rope_cos_sin)
    qkv = _norm_rope(fused_BTF.reshape(B * T, -1), tuple(scales), cos_sin, eps, heads)
    q_BTHK, k_BTHK, v_BTHK = (part_NF.reshape(B, T, -1, K) for part_NF in qkv)
    return q_BTHK, k_BTHK, v_BTHK


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm_rope(fused_NF, scales, cos_sin, eps, heads):
    """The columns of `fused` as queries, keys and values, [N, H K] each; the first two by `layers.rms_norm_rope`."""
    return _norm_rope_forward(fused_NF, scales, cos_sin, eps, heads)[0]


def _norm_rope_forward(fused_NF, scales, cos_sin, eps, heads):
    qkv = _call(partial(_rotate, eps), heads, fused_NF, scales, cos_sin)
    return qkv, (fused_NF, scales, cos_sin)


def _norm_rope_backward(eps, heads, residuals, d_qkv):
    fused_NF, scales, cos_sin = residuals
    d_fused_NF, *d_scales = _call(partial(_rotate_back, eps), heads, fused_NF, scales, cos_sin, d_qkv)
    return d_fused_NF, tuple(jnp.sum(d_BHK, axis=(0, 1)) for d_BHK in d_scales), None


_norm_rope.defvjp(_norm_rope_forward, _norm_rope_backward)


def _rotate(eps, part, fused, scales, cos_sin, parts):
    if part == 2:
        parts[part][...] = fused[...]
        return
    (cos, sin), (scale_a, scale_b) = (ref[...] for ref in cos_sin), _halves(scales[part])
    for head, (a, b) in enumerate(_heads(fused, len(scales[part]))):
        inverse = _inverse_rms(a, b, eps)
        a, b = a * inverse * scale_a, b * inverse * scale_b
        _store(parts[part], head, a * cos - b * sin, b * cos + a * sin)


def _rotate_back(eps, part, fused, scales, cos_sin, d_parts, d_fused, *d_scales):
    """The gradient as in `layers.rms_norm_rope`. A program sums that of the scale over its rows and heads."""
    if part == 2:
        d_fused[...] = d_parts[part][...]
        return
    K = len(scales[part])
    (cos, sin), (scale_a, scale_b) = (ref[...] for ref in cos_sin), _halves(scales[part])
    d_scale_a = d_scale_b = 0.0
    for head, ((a, b), (d_a, d_b)) in enumerate(zip(_heads(fused, K), _heads(d_parts[part], K), strict=True)):
        d_a, d_b = d_a * cos + d_b * sin, d_b * cos - d_a * sin  # the transpose of a rotation is its inverse
        inverse = _inverse_rms(a, b, eps)
        normed_a, normed_b = a * inverse, b * inverse
        d_scale_a, d_scale_b = d_scale_a + d_a * normed_a, d_scale_b + d_b * normed_b
        d_a, d_b = d_a * scale_a, d_b * scale_b
        projection = _row_mean(d_a * normed_a + d_b * normed_b)
        _store(d_fused, head, inverse * (d_a - normed_a * projection), inverse * (d_b - normed_b * projection))
    d_scales[part][: K // 2], d_scales[part][K // 2 :] = jnp.sum(d_scale_a, axis=0), jnp.sum(d_scale_b, axis=0)


def _halves(scale):
    half = len(scale) // 2
    return scale[:half], scale[half:]


def _heads(ref, K):
    """The halves of each head, float32. They are loaded when they are used, which takes few registers."""
    for column in range(0, ref.shape[1], K):
        middle, end = column + K // 2, column + K
        yield ref[:, column:middle].astype(jnp.float32), ref[:, middle:end].astype(jnp.float32)


def _store(ref, head, a, b):
    half = a.shape[1]
    for column, values in ((2 * head * half, a), ((2 * head + 1) * half, b)):
        ref[:, column : column + half] = values.astype(ref.dtype)


def _inverse_rms(a, b, eps):
    return jax.lax.rsqrt(_row_mean(a * a + b * b) + eps)


def _row_mean(sum_of_halves):
    return jnp.sum(sum_of_halves, axis=1, keepdims=True) / (2 * sum_of_halves.shape[1])


def _call(body, heads, fused_NF, scales, cos_sin, d_qkv=()):
    """Runs `body` on blocks of BLOCK_ROWS rows and some heads of one part: 0 queries, 1 keys, 2 values.

    Forward it writes the three parts [N, H K]. With their gradients `d_qkv` it writes that of `fused_NF`, and for
    queries and keys the sums of each program [N / BLOCK_ROWS, programs, K] float32.
    """
    import jax.experimental.pallas as pl
    from jax.experimental.pallas import triton

    (N, F), (T, half) = fused_NF.shape, cos_sin[0].shape
    K, group = 2 * half, math.gcd(MAX_GROUP, *heads)
    counts = [count // group for count in heads]
    starts = [0, *accumulate(counts)]

    def kernel(fused, query_scale, key_scale, cos, sin, *refs):
        program = pl.program_id(1)
        for part in range(3):
            run = partial(body, part, fused, (query_scale, key_scale), (cos, sin), refs[:3], *refs[3:])
            pl.when((program >= starts[part]) & (program < starts[part + 1]))(run)

    def index_in(part):
        return lambda row, program: (row, jnp.clip(program - starts[part], 0, counts[part] - 1))

    block = BLOCK_ROWS, group * K
    fused = pl.BlockSpec(block, lambda row, program: (row, program))
    scale = pl.BlockSpec((K,), lambda row, program: (0,))
    angles = pl.BlockSpec((BLOCK_ROWS, half), lambda row, program: (row % (T // BLOCK_ROWS), 0))
    parts = [pl.BlockSpec(block, index_in(part)) for part in range(3)]
    if d_qkv:
        sums = [pl.BlockSpec((None, None, K), lambda *i, part=part: (*index_in(part)(*i), 0)) for part in range(2)]
        sum_shapes = [jax.ShapeDtypeStruct((N // BLOCK_ROWS, counts[part], K), jnp.float32) for part in range(2)]
        outs, out_shapes = [fused, *sums], [jax.ShapeDtypeStruct((N, F), fused_NF.dtype), *sum_shapes]
    else:
        outs, out_shapes = parts, [jax.ShapeDtypeStruct((N, count * K), fused_NF.dtype) for count in heads]
    return pl.pallas_call(
        kernel,
        out_shapes,
        grid=(N // BLOCK_ROWS, starts[-1]),
        in_specs=[fused, scale, scale, angles, angles, *parts[: len(d_qkv)]],
        out_specs=outs,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
    )(fused_NF, *scales, *cos_sin, *d_qkv)
