"""The operations for NVIDIA's Hopper GPUs (H100, H200): matmuls whose element-wise work stays on the chip.

The element-wise work after the two largest matmuls of a training step (exp after the logits, SwiGLU after its gate and
up matrices) costs more in memory traffic than in arithmetic. Here it is done on each tile of the result while the tile
is in registers. One kernel, `_matmul`, multiplies; its argument `epilogue` computes what then happens to a tile.

The kernels read bfloat16 and sum in float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.core.layers import linear
from jaxlm.core.ops import hopper_qk_norm, xla
from jaxlm.core.ops.cuda import CUDA
from jaxlm.core.ops.record import Ops

BLOCK_M, BLOCK_N, BLOCK_K = 256, 128, 64  # a tile of the result; the part of the contracted axis loaded at a time
HALF_M = BLOCK_M // 2  # two groups of warps compute a tile
GROUP = 64  # columns of gate and of up that are interleaved, so that one tile has both
MAX_LOGIT_GAP = 64.0  # nats; a logit further above the target's than this counts as this far, so that exp stays finite
LOG2_E = 1.4426950408889634
CHUNK = 16_384  # tokens whose logits exist at one time, at most


def fits(width: int, mlp_width: int) -> bool:
    """Whether the kernels take these sizes: whole tiles only."""
    return width % BLOCK_K == 0 and mlp_width % GROUP == 0


def _whole_tiles(x_BTD: jax.Array) -> bool:
    return math.prod(x_BTD.shape[:-1]) % BLOCK_M == 0


def fused_linear(ops: Ops, x_BTD: jax.Array, weights: Sequence[jax.Array], matmul_dtype: Any) -> list[jax.Array]:
    """x times each of several matrices, by one matmul where `swiglu` uses its kernel too."""
    if not _whole_tiles(x_BTD):
        return xla.fused_linear(ops, x_BTD, weights, matmul_dtype)
    out_BTF = linear(x_BTD, jnp.concatenate(weights, axis=1), matmul_dtype, ops.weight_gradient)
    ends = list(accumulate(w_DF.shape[1] for w_DF in weights))
    return jnp.split(out_BTF, ends[:-1], axis=-1)


def swiglu(
    ops: Ops, x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array, matmul_dtype: Any
) -> jax.Array:
    """`xla.swiglu` by the kernel where the rows are whole tiles. The element-wise part is in float32.

    x is bfloat16, and the weights are float32. D is a multiple of BLOCK_K, and F of GROUP.
    """
    if not _whole_tiles(x_BTD):
        return xla.swiglu(ops, x_BTD, gate_DF, up_DF, down_FD, matmul_dtype)
    return _swiglu(x_BTD.reshape(-1, x_BTD.shape[-1]), gate_DF, up_DF, down_FD).reshape(x_BTD.shape)


@jax.custom_vjp
def _swiglu(x_ND, gate_DF, up_DF, down_FD):
    return _swiglu_forward(x_ND, gate_DF, up_DF, down_FD)[0]


def _swiglu_forward(x_ND, gate_DF, up_DF, down_FD):
    D, F = gate_DF.shape
    pairs = jnp.stack([w.astype(x_ND.dtype).T.reshape(-1, GROUP, D) for w in (gate_DF, up_DF)], axis=1)
    gate_up_GD, down_FD = pairs.reshape(2 * F, D), down_FD.astype(x_ND.dtype)
    gate_up_NG, act_NF = _matmul(x_ND, gate_up_GD, _swiglu_epilogue, (2 * F, F))
    return act_NF @ down_FD, (x_ND, gate_up_GD, down_FD, gate_up_NG, act_NF)


def _swiglu_backward(residuals, d_out_ND):
    x_ND, gate_up_GD, down_FD, gate_up_NG, act_NF = residuals
    F, D = down_FD.shape
    (d_gate_up_NG,) = _matmul(
        d_out_ND, down_FD, _swiglu_backward_epilogue, (2 * F,), tiles=(gate_up_NG,), columns=GROUP, stages=3
    )
    d_pairs = xla.weight_gradient(x_ND, d_gate_up_NG).reshape(D, -1, 2, GROUP)
    d_gate_DF, d_up_DF = (d_pairs[:, :, i].reshape(D, F) for i in range(2))
    return d_gate_up_NG @ gate_up_GD, d_gate_DF, d_up_DF, xla.weight_gradient(act_NF, d_out_ND)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _swiglu_epilogue(both, _):
    gate, up = both[:, :GROUP], both[:, GROUP:]
    return [[both], [gate * up * (1 / (1 + jnp.exp(-gate)))]], None


def _swiglu_backward_epilogue(d_act, _, both):
    gate, up = both[:, :GROUP], both[:, GROUP:]
    sigmoid = 1 / (1 + jnp.exp(-gate))
    return [[d_act * up * sigmoid * (1 + gate * (1 - sigmoid)), d_act * gate * sigmoid]], None


def cross_entropy(
    ops: Ops, x_ND: jax.Array, embedding_VD: jax.Array, targets_N: jax.Array, matmul_dtype: Any
) -> jax.Array:
    """`loss.cross_entropy`.

    The exponentials of each token are relative to its target's logit z. Then the loss is log(1 + s), s the sum of
    exp(logits - z) over the other entries, and the gradient by the logits is exp(logits - z) / (1 + s), but
    -s / (1 + s) at the target. One pass over the logits gives all of it, no logits are written, and the exponents lose
    nothing to bfloat16.

    x is bfloat16, and D a multiple of BLOCK_K. The loss of a token is at most about MAX_LOGIT_GAP.
    """
    return _cross_entropy(x_ND, embedding_VD, targets_N)


def cross_entropy_and_grad(
    ops: Ops,
    x_ND: jax.Array,
    embedding_VD: jax.Array,
    targets_N: jax.Array,
    scale: jax.Array | float,
    grad_accumulator_VD: jax.Array,
    matmul_dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`loss.cross_entropy_and_grad`, with the limits of `cross_entropy`."""
    loss_sum, vjp_fn = jax.vjp(lambda *a: _cross_entropy(*a, targets_N), x_ND, embedding_VD)
    d_x_ND, d_embedding_VD = vjp_fn(jnp.float32(scale))
    return loss_sum, d_x_ND, grad_accumulator_VD + d_embedding_VD


@jax.custom_vjp
def _cross_entropy(x_ND, embedding_VD, targets_N):
    return _cross_entropy_forward(x_ND, embedding_VD, targets_N)[0]


def _cross_entropy_forward(x_ND, embedding_VD, targets_N):
    (N, D), V = x_ND.shape, embedding_VD.shape[0]
    chunk = min(CHUNK, -(-N // (2 * BLOCK_M)) * BLOCK_M)
    padding = -N % chunk
    x_CND = jnp.pad(x_ND, ((0, padding), (0, 0))).reshape(-1, chunk, D)
    targets_CN = jnp.pad(targets_N, (0, padding), constant_values=-1).reshape(-1, chunk)
    embedding_lowp_VD = jnp.pad(embedding_VD.astype(x_ND.dtype), ((0, -V % BLOCK_N), (0, 0)))
    matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def body(carry, part):
        loss_sum, d_embedding_VD = carry
        x_ND, targets_N = part
        id_N = jnp.maximum(targets_N, 0)
        target_logits_N = jnp.sum(x_ND.astype(jnp.float32) * embedding_lowp_VD[id_N].astype(jnp.float32), axis=-1)
        e_NV, sums_N = _exp_logits(x_ND, embedding_lowp_VD, target_logits_N, V)
        other_exp_N = jnp.maximum(sums_N - 1, 0)
        softmax_scale_N = jnp.where(targets_N >= 0, 1 / (1 + other_exp_N), 0)
        e_NV = e_NV.at[jnp.arange(chunk), id_N].set(
            -other_exp_N.astype(e_NV.dtype), indices_are_sorted=True, unique_indices=True
        )
        d_x_ND = matmul(e_NV, embedding_lowp_VD) * softmax_scale_N[:, None]
        d_embedding_VD += matmul(e_NV.T, (x_ND * softmax_scale_N[:, None]).astype(x_ND.dtype))
        loss_sum += jnp.sum(jnp.where(targets_N >= 0, jnp.log1p(other_exp_N), 0))
        return (loss_sum, d_embedding_VD), d_x_ND.astype(x_ND.dtype)

    zero = (jnp.float32(0), jnp.zeros(embedding_lowp_VD.shape, jnp.float32))
    (loss_sum, d_embedding_VD), d_x_CND = lax.scan(body, zero, (x_CND, targets_CN))
    return loss_sum, (d_x_CND.reshape(-1, D)[:N], d_embedding_VD[:V])


def _cross_entropy_backward(residuals, cotangent):
    d_x_ND, d_embedding_VD = residuals
    return (d_x_ND * cotangent).astype(d_x_ND.dtype), d_embedding_VD * cotangent, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _exp_logits(x_ND, embedding_lowp_VD, shift_N, vocab):
    """exp(x embedding^T - shift) [N, V] in the dtype of x, 0 from column `vocab` on; its row sums [N] float32."""
    epilogue, widths = functools.partial(_exp_epilogue, vocab), embedding_lowp_VD.shape[:1]
    e_NV, sums_PN = _matmul(x_ND, embedding_lowp_VD, epilogue, widths, rows=(shift_N,), sum_rows=True)
    return e_NV, jnp.sum(sums_PN, axis=0)


def _exp_epilogue(vocab, logits, first_column, shift):
    e = jnp.exp2(jnp.minimum(logits * LOG2_E - shift * LOG2_E, MAX_LOGIT_GAP * LOG2_E))

    def without_padding(e):
        return jnp.where(first_column + _columns(e.shape) < vocab, e, 0.0)

    e = lax.cond(first_column + BLOCK_N > vocab, without_padding, lambda e: e, e)
    return [[e]], e


def _columns(shape):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


@functools.partial(jax.jit, static_argnames=("epilogue", "widths", "sum_rows", "columns", "stages"))
def _matmul(
    x_NK: jax.Array,
    w_VK: jax.Array,
    epilogue: Callable[..., tuple[Sequence[Sequence[jax.Array]], jax.Array | None]],
    widths: tuple[int, ...],
    rows: Sequence[jax.Array] = (),
    tiles: Sequence[jax.Array] = (),
    sum_rows: bool = False,
    columns: int = BLOCK_N,
    stages: int = 4,
) -> Any:
    """Multiplies x [N, K] by w^T [K, V] in tiles of [BLOCK_M, columns] and writes the `epilogue` of each.

    Args:
        x_NK, w_VK: the operands, each with its contracted axis last.
        epilogue: takes half a tile of the result [HALF_M, columns] float32, the index of its first column, and the
            matching parts of each of `rows` (broadcast over the columns) and of `tiles`, in float32. It returns for
            each output the adjacent pieces of it, each a multiple of 64 columns wide; and what is summed
            by rows.
        widths: of the outputs, which are [N, width] in the dtype of x.
        rows: [N] float32 each.
        tiles: [N, width] each, in the dtype of x.
        sum_rows: whether there is one more output, [V / columns, N] float32, with the sums.
        columns: of a tile.
        stages: steps of the contracted axis in shared memory at one time; how soon they fill bounds the speed.

    Returns:
        The outputs.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    (N, K), V = x_NK.shape, w_VK.shape[0]
    grid = (N // BLOCK_M, V // columns)
    longer = int(grid[1] > grid[0])
    tile_widths = [columns * tile.shape[1] // V for tile in tiles]
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    smem = functools.partial(plgpu.SMEM, dtype=x_NK.dtype, transforms=swizzle)
    block_spec = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM, transforms=swizzle)

    def kernel(x, w, *refs):
        row_refs, refs = refs[: len(rows)], refs[len(rows) :]
        tile_refs, out_refs = refs[: len(tiles)], refs[len(tiles) :]
        group = lax.axis_index("group")  # two compute, a third loads

        def pipeline(step, context):
            return plgpu.emit_pipeline_warp_specialized(
                step,
                compute_context=context,
                grid=(K // BLOCK_K,),
                in_specs=[
                    block_spec((BLOCK_M, BLOCK_K), lambda k: (0, k)),
                    block_spec((columns, BLOCK_K), lambda k: (0, k)),
                ],
                max_concurrent_steps=stages,
                wg_axis="group",
                num_compute_wgs=2,
                memory_registers=40,
            )

        @functools.partial(
            pl.run_scoped,
            allocations=pipeline(lambda *_: None, lambda _: None).get_allocations(x, w),
            tile_smem=[smem((2, HALF_M, width)) for width in tile_widths],
            out_smem=smem((2, 2, 64, 64)),
            barriers=plgpu.Barrier(num_barriers=2 * max(1, len(tiles))),
            collective_axes="group",
        )
        def scope(allocations, tile_smem, out_smem, barriers):
            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
            def each_tile(loop):
                m, n = plgpu.planar_snake(loop.index[0], grid, longer, 8)  # programs that run together share operands
                first_row = m * BLOCK_M + group * HALF_M
                my_rows = pl.ds(first_row, HALF_M)

                def multiply(_, x_smem, w_smem, sums):
                    plgpu.wgmma(sums, x_smem.at[pl.ds(group * HALF_M, HALF_M)], w_smem.transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    return sums

                def compute(run):
                    for i, width in enumerate(tile_widths):
                        plgpu.copy_gmem_to_smem(
                            tile_refs[i].at[my_rows, pl.ds(n * width, width)],
                            tile_smem[i].at[group],
                            barriers.at[2 * i + group],
                        )
                    by_row = plgpu.Layout.WGMMA.reduce(1)
                    inputs = [plgpu.load(ref.at[my_rows], layout=by_row, optimized=False) for ref in row_refs]
                    inputs = [lax.broadcast_in_dim(row, (HALF_M, columns), [0]) for row in inputs]

                    def half_of_tile(sums):
                        run(sums)
                        return sums[...]

                    half_tile = pl.run_scoped(half_of_tile, plgpu.ACC((HALF_M, columns), jnp.float32))
                    for i in range(len(tiles)):
                        plgpu.barrier_wait(barriers.at[2 * i + group])
                        inputs.append(tile_smem[i][group].astype(jnp.float32))
                    outs, row_terms = epilogue(half_tile, n * columns, *inputs)
                    if sum_rows:
                        out_refs[-1][n, my_rows] = row_terms.sum(axis=1)
                    slot = 0
                    for ref, pieces in zip(out_refs, outs, strict=False):
                        width, first = sum(piece.shape[1] for piece in pieces), 0
                        for piece in pieces:
                            for column in range(0, piece.shape[1], 64):
                                for row in range(0, HALF_M, 64):
                                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                                    out_smem[group, slot] = piece[row : row + 64, column : column + 64].astype(x.dtype)
                                    plgpu.commit_smem()
                                    plgpu.copy_smem_to_gmem(
                                        out_smem.at[group, slot],
                                        ref.at[pl.ds(first_row + row, 64), pl.ds(n * width + first + column, 64)],
                                    )
                                    slot = 1 - slot
                            first += piece.shape[1]

                pipeline(multiply, compute)(
                    x.at[pl.ds(m * BLOCK_M, BLOCK_M), :], w.at[pl.ds(n * columns, columns), :], allocations=allocations
                )

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out_type = [jax.ShapeDtypeStruct((N, width), x_NK.dtype) for width in widths]
    if sum_rows:
        out_type.append(jax.ShapeDtypeStruct((V // columns, N), jnp.float32))
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(_multiprocessors(),),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x_NK, w_VK, *rows, *tiles)


def _multiprocessors() -> int:
    return getattr(jax.devices()[0], "core_count", 1)  # a CPU interprets the kernels, in tests


HOPPER = replace(
    CUDA,
    fused_linear=fused_linear,
    query_key_value=hopper_qk_norm.query_key_value,
    swiglu=swiglu,
    cross_entropy=cross_entropy,
    cross_entropy_and_grad=cross_entropy_and_grad,
)
