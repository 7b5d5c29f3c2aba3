"""QK-norm and RoPE for NVIDIA's Hopper GPUs: one kernel forward and one backward, around one matmul.

XLA computes the norms by kernels for the rows' sums, for the gradient of the scales and for the element-wise part, and
each reads the queries and keys again. Here one kernel reads the result of the fused matmul of queries, keys and values
once and writes the three arrays that attention reads. The backward kernel writes the gradient of the fused result,
which the backward matmuls read. All arithmetic is in float32.
"""

import functools
import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.core.layers import linear
from jaxlm.core.ops import xla
from jaxlm.core.ops.record import Ops

BLOCK_ROWS = 64  # tokens that a program computes, by one group of warps
MAX_GROUP = 4  # heads that a program computes, at most


def query_key_value(
    ops: Ops,
    x_BTD: jax.Array,
    weights: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    rope_cos_sin: tuple[jax.Array, jax.Array],
    eps: float,
    matmul_dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Ops.query_key_value` by the kernels: for bfloat16, T of whole blocks, K of 64 or 128 and shared positions."""
    (B, T, _), K = x_BTD.shape, len(scales[0])
    if T % BLOCK_ROWS or K not in (64, 128) or len(rope_cos_sin[0]) > 1 or x_BTD.dtype != jnp.bfloat16:
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
    qkv = _call(heads, eps, fused_NF, scales, cos_sin)
    return tuple(qkv), (fused_NF, scales, cos_sin)


def _norm_rope_backward(eps, heads, residuals, d_qkv):
    d_fused_NF, *d_scales = _call(heads, eps, *residuals, tuple(d_qkv))
    return d_fused_NF, tuple(jnp.sum(d_BHK, axis=(0, 1)) for d_BHK in d_scales), None


_norm_rope.defvjp(_norm_rope_forward, _norm_rope_backward)


def _rotate(x, cos_sin, scale, eps):
    (cos, sin), inverse = cos_sin, _inverse_rms(*x, eps)
    a, b = (part * inverse * s for part, s in zip(x, scale, strict=True))
    return a * cos - b * sin, b * cos + a * sin


def _rotate_back(x, d_out, cos_sin, scale, eps):
    """The gradient of x, as in `layers.rms_norm_rope`, and the terms of that of the scale."""
    (cos, sin), (d_a, d_b), inverse = cos_sin, d_out, _inverse_rms(*x, eps)
    d_out = d_a * cos + d_b * sin, d_b * cos - d_a * sin  # the transpose of a rotation is its inverse
    normed = [part * inverse for part in x]
    terms = [d * part for d, part in zip(d_out, normed, strict=True)]
    projection = _row_mean(*(term * s for term, s in zip(terms, scale, strict=True)))
    d_x = [inverse * (d * s - n * projection) for d, s, n in zip(d_out, scale, normed, strict=True)]
    return d_x, terms


def _inverse_rms(a, b, eps):
    return lax.rsqrt(_row_mean(a * a, b * b) + eps)


def _row_mean(a, b):
    rows, half = a.shape
    return lax.broadcast_in_dim(jnp.sum(a + b, axis=1) / (2 * half), (rows, half), [0])


@partial(jax.jit, static_argnames=("heads", "eps"))
def _call(heads, eps, fused_NF, scales, cos_sin, d_qkv=()):  # noqa: PLR0915
    """A program computes BLOCK_ROWS rows and some heads of one part: 0 queries, 1 keys, 2 values.

    Forward it writes the three parts [N, H K]. With their gradients `d_qkv` it writes that of `fused_NF`, and for
    queries and keys the sums of each program [N / BLOCK_ROWS, programs, K] float32.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    (N, F), (T, half) = fused_NF.shape, cos_sin[0].shape
    K, group = 2 * half, math.gcd(MAX_GROUP, *heads)
    counts = [count // group for count in heads]
    starts = [0, *accumulate(counts)]
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    smem = functools.partial(plgpu.SMEM, dtype=fused_NF.dtype, transforms=swizzle)
    layout = plgpu.Layout.WGMMA

    def kernel(fused, query_scale, key_scale, cos, sin, *refs):
        parts, refs = refs[:3], refs[3:]
        *outs, x_smem, d_smem, out_smem, barriers = refs
        block, program = lax.axis_index("block"), lax.axis_index("program")
        rows = pl.ds(block * BLOCK_ROWS, BLOCK_ROWS)

        def columns(ref, head, part=None):
            first = program if part is None else program - starts[part]
            return ref.at[rows, pl.ds((first * group + head) * K, K)]

        def load(part, with_x=True):
            for head in range(group):
                if with_x:
                    plgpu.copy_gmem_to_smem(columns(fused, head), x_smem.at[head], barriers.at[head])
                if d_qkv:
                    source = columns(parts[part], head, part)
                    plgpu.copy_gmem_to_smem(source, d_smem.at[head], barriers.at[group + head])

        def halves(tile):
            tile = tile.astype(jnp.float32)
            return tile[:, :half], tile[:, half:]

        def store(slot, pair, target):
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            out_smem[slot] = jnp.concatenate(pair, axis=1).astype(fused_NF.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[slot], target)

        def norm_and_rotate(part):
            load(part)
            first_position = lax.rem(block, T // BLOCK_ROWS) * BLOCK_ROWS
            positions = pl.ds(first_position, BLOCK_ROWS)
            angles = [plgpu.load(ref.at[positions], layout=layout, optimized=False) for ref in (cos, sin)]
            scale_ref = (query_scale, key_scale)[part]
            scale = [
                plgpu.load(scale_ref.at[pl.ds(start, half)], layout=layout.reduce(0), optimized=False)
                for start in (0, half)
            ]
            scale = [lax.broadcast_in_dim(s, (BLOCK_ROWS, half), [1]) for s in scale]
            sums = [jnp.zeros((BLOCK_ROWS, half), jnp.float32)] * 2
            for head in range(group):
                plgpu.barrier_wait(barriers.at[head])
                x = halves(x_smem[head])
                if d_qkv:
                    plgpu.barrier_wait(barriers.at[group + head])
                    d_x, terms = _rotate_back(x, halves(d_smem[head]), angles, scale, eps)
                    sums = [s + term for s, term in zip(sums, terms, strict=True)]
                    store(head % 2, d_x, columns(outs[0], head))
                else:
                    store(head % 2, _rotate(x, angles, scale, eps), columns(parts[part], head, part))
            if d_qkv:
                for start, s in zip((0, half), sums, strict=True):
                    outs[1 + part][block, program - starts[part], pl.ds(start, half)] = s.sum(axis=0)

        def copy():
            load(2, with_x=not d_qkv)
            for head in range(group):
                plgpu.barrier_wait(barriers.at[head + group * bool(d_qkv)])
                source = (d_smem if d_qkv else x_smem).at[head]
                plgpu.copy_smem_to_gmem(source, columns(outs[0], head) if d_qkv else columns(parts[2], head, 2))

        for part, run in enumerate((partial(norm_and_rotate, 0), partial(norm_and_rotate, 1), copy)):
            pl.when((program >= starts[part]) & (program < starts[part + 1]))(run)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    if d_qkv:
        sums = [jax.ShapeDtypeStruct((N // BLOCK_ROWS, count, K), jnp.float32) for count in counts[:2]]
        out_type = [jax.ShapeDtypeStruct((N, F), fused_NF.dtype), *sums]
    else:
        out_type = [jax.ShapeDtypeStruct((N, count * K), fused_NF.dtype) for count in heads]
    tiles = group, BLOCK_ROWS, K
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[
            smem(tiles),
            smem(tiles if d_qkv else (1, 8, 64)),
            smem((2, BLOCK_ROWS, K)),
            plgpu.Barrier(num_barriers=2 * group),
        ],
        grid=(starts[-1], N // BLOCK_ROWS),
        grid_names=("program", "block"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(fused_NF, *scales, *cos_sin, *d_qkv)
