"""Matrix products that finish their work before it leaves the chip, for NVIDIA's Hopper GPUs (H100, H200).

The element-wise work behind the two largest products of a training step (exp behind the logits, SwiGLU behind its
gate and up matrices) costs more in memory traffic than in arithmetic. Here it is done on each tile of the product
while the tile is in registers. One kernel, `_product`, multiplies; what then happens to a tile is its argument.

`cross_entropy` computes what `loss.cross_entropy` does, `swiglu` what `layers.swiglu_activation` does with its
three products; from bfloat16, with float32 sums.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ROWS, COLUMNS, DEPTH = 256, 128, 64  # a tile of the product, and how much of the contracted axis is loaded at a time
HALF = ROWS // 2  # two groups of warps compute a tile
GROUP = 64  # columns of gate and of up that lie side by side, so that one tile has both
FURTHEST = 64.0  # nats; a logit further above the target's than this counts as this far, so that exp stays finite
LOG2_E = 1.4426950408889634
CHUNK = 16_384  # tokens whose logits exist at one time, at most


def fits(tokens: int) -> bool:
    """Whether `swiglu` takes this many rows: whole tiles only."""
    return tokens % ROWS == 0


@jax.custom_vjp
def swiglu(x_ND: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """(silu(x gate) * (x up)) down, the element-wise part in float32.

    Args:
        x_ND: bfloat16; N as it `fits`, D a multiple of DEPTH.
        gate_DF, up_DF: float32; F a multiple of GROUP.
        down_FD: float32.

    Returns:
        [N, D] bfloat16.
    """
    return _swiglu_forward(x_ND, gate_DF, up_DF, down_FD)[0]


def _swiglu_forward(x_ND, gate_DF, up_DF, down_FD):
    D, F = gate_DF.shape
    pairs = jnp.stack([w.astype(x_ND.dtype).T.reshape(-1, GROUP, D) for w in (gate_DF, up_DF)], axis=1)
    gate_up_GD, down_FD = pairs.reshape(2 * F, D), down_FD.astype(x_ND.dtype)
    gate_up_NG, act_NF = _product(x_ND, gate_up_GD, _gated, (2 * F, F))
    return act_NF @ down_FD, (x_ND, gate_up_GD, down_FD, gate_up_NG, act_NF)


def _swiglu_backward(residuals, d_out_ND):
    x_ND, gate_up_GD, down_FD, gate_up_NG, act_NF = residuals
    F, D = down_FD.shape
    (d_gate_up_NG,) = _product(
        d_out_ND, down_FD, _gated_backward, (2 * F,), tiles=(gate_up_NG,), columns=GROUP, stages=3
    )
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    d_pairs = product(x_ND.T, d_gate_up_NG).reshape(D, -1, 2, GROUP)
    d_gate_DF, d_up_DF = (d_pairs[:, :, i].reshape(D, F) for i in range(2))
    return d_gate_up_NG @ gate_up_GD, d_gate_DF, d_up_DF, product(act_NF.T, d_out_ND)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _gated(both, _):
    gate, up = both[:, :GROUP], both[:, GROUP:]
    return [[both], [gate * up * (1 / (1 + jnp.exp(-gate)))]], None


def _gated_backward(d_act, _, both):
    gate, up = both[:, :GROUP], both[:, GROUP:]
    share = 1 / (1 + jnp.exp(-gate))
    return [[d_act * up * share * (1 + gate * (1 - share)), d_act * gate * share]], None


@jax.custom_vjp
def cross_entropy(x_ND: jax.Array, embedding_VD: jax.Array, targets_N: jax.Array) -> jax.Array:
    """Sum of logsumexp(logits) - logits[target] over N tokens, logits = x embedding^T.

    Each token's exponentials are taken relative to its target's logit z: then the loss is log(1 + s), s the sum of
    exp(logits - z) over the others, and the gradient by the logits is exp(logits - z) / (1 + s), with -s / (1 + s) at
    the target. One pass over the logits gives it all, none is written, and the exponents lose nothing to bfloat16.

    Args:
        x_ND: bfloat16; D a multiple of DEPTH.
        embedding_VD: float32.
        targets_N: ids below V; a target below 0 counts nothing.

    Returns:
        [] float32, nats. Tokens whose loss is beyond FURTHEST are cut to about that.
    """
    return _cross_entropy_forward(x_ND, embedding_VD, targets_N)[0]


def _cross_entropy_forward(x_ND, embedding_VD, targets_N):
    (N, D), V = x_ND.shape, embedding_VD.shape[0]
    chunk = min(CHUNK, -(-N // (2 * ROWS)) * ROWS)
    padding = -N % chunk
    x_CND = jnp.pad(x_ND, ((0, padding), (0, 0))).reshape(-1, chunk, D)
    targets_CN = jnp.pad(targets_N, (0, padding), constant_values=-1).reshape(-1, chunk)
    narrow_VD = jnp.pad(embedding_VD.astype(x_ND.dtype), ((0, -V % COLUMNS), (0, 0)))
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def body(carry, part):
        total, d_narrow_VD = carry
        x_ND, targets_N = part
        at_N = jnp.maximum(targets_N, 0)
        target_logits_N = jnp.sum(x_ND.astype(jnp.float32) * narrow_VD[at_N].astype(jnp.float32), axis=-1)
        e_NV, sums_N = _exp_logits(x_ND, narrow_VD, target_logits_N, V)
        others_N = jnp.maximum(sums_N - 1, 0)
        share_N = jnp.where(targets_N >= 0, 1 / (1 + others_N), 0)
        e_NV = e_NV.at[jnp.arange(chunk), at_N].set(
            -others_N.astype(e_NV.dtype), indices_are_sorted=True, unique_indices=True
        )
        d_x_ND = product(e_NV, narrow_VD) * share_N[:, None]
        d_narrow_VD += product(e_NV.T, (x_ND * share_N[:, None]).astype(x_ND.dtype))
        total += jnp.sum(jnp.where(targets_N >= 0, jnp.log1p(others_N), 0))
        return (total, d_narrow_VD), d_x_ND.astype(x_ND.dtype)

    zero = (jnp.float32(0), jnp.zeros(narrow_VD.shape, jnp.float32))
    (total, d_narrow_VD), d_x_CND = lax.scan(body, zero, (x_CND, targets_CN))
    return total, (d_x_CND.reshape(-1, D)[:N], d_narrow_VD[:V])


def _cross_entropy_backward(residuals, cotangent):
    d_x_ND, d_embedding_VD = residuals
    return (d_x_ND * cotangent).astype(d_x_ND.dtype), d_embedding_VD * cotangent, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _exp_logits(x_ND, narrow_VD, shift_N, vocab):
    """exp(x narrow^T - shift) [N, V] in the dtype of x, 0 from column `vocab` on; its row sums [N] float32."""
    finish = functools.partial(_exponential, vocab)
    e_NV, sums_PN = _product(x_ND, narrow_VD, finish, narrow_VD.shape[:1], rows=(shift_N,), summed=True)
    return e_NV, jnp.sum(sums_PN, axis=0)


def _exponential(vocab, logits, first_column, shift):
    e = jnp.exp2(jnp.minimum(logits * LOG2_E - shift * LOG2_E, FURTHEST * LOG2_E))

    def without_padding(e):
        return jnp.where(first_column + _columns(e.shape) < vocab, e, 0.0)

    e = lax.cond(first_column + COLUMNS > vocab, without_padding, lambda e: e, e)
    return [[e]], e


def _columns(shape):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


@functools.partial(jax.jit, static_argnames=("epilogue", "widths", "summed", "columns", "stages"))
def _product(
    x_NK: jax.Array,
    w_VK: jax.Array,
    epilogue: Callable[..., tuple[Sequence[Sequence[jax.Array]], jax.Array | None]],
    widths: tuple[int, ...],
    rows: Sequence[jax.Array] = (),
    tiles: Sequence[jax.Array] = (),
    summed: bool = False,
    columns: int = COLUMNS,
    stages: int = 4,
) -> Any:
    """Multiplies x [N, K] by w^T [K, V] in tiles of [ROWS, columns] and writes what `epilogue` makes of each.

    Args:
        x_NK, w_VK: the operands, each with its contracted axis last.
        epilogue: takes half a tile of the product [HALF, columns] float32, the number of its first column, and its
            share of each of `rows` (spread over the columns) and of `tiles`, in float32. It gives for each output the
            pieces that lie side by side there, each of a multiple of 64 columns; and what is to be summed by rows.
        widths: of the outputs, which are [N, width] in the dtype of x.
        rows: [N] float32 each.
        tiles: [N, width] each, in the dtype of x.
        summed: whether there is an output more, [V / columns, N] float32, of the sums.
        columns: of a tile.
        stages: steps of the contracted axis in shared memory at one time; what bounds the speed is how soon they fill.

    Returns:
        The outputs.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    (N, K), V = x_NK.shape, w_VK.shape[0]
    grid = (N // ROWS, V // columns)
    longer = int(grid[1] > grid[0])
    tile_widths = [columns * tile.shape[1] // V for tile in tiles]
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    shared = functools.partial(plgpu.SMEM, dtype=x_NK.dtype, transforms=swizzled)
    loaded = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM, transforms=swizzled)

    def kernel(x, w, *refs):
        row_refs, refs = refs[: len(rows)], refs[len(rows) :]
        tile_refs, out_refs = refs[: len(tiles)], refs[len(tiles) :]
        group = lax.axis_index("group")  # two compute, a third loads

        def pipeline(step, context):
            return plgpu.emit_pipeline_warp_specialized(
                step,
                compute_context=context,
                grid=(K // DEPTH,),
                in_specs=[
                    loaded((ROWS, DEPTH), lambda k: (0, k)),
                    loaded((columns, DEPTH), lambda k: (0, k)),
                ],
                max_concurrent_steps=stages,
                wg_axis="group",
                num_compute_wgs=2,
                memory_registers=40,
            )

        @functools.partial(
            pl.run_scoped,
            allocations=pipeline(lambda *_: None, lambda _: None).get_allocations(x, w),
            tile_smem=[shared((2, HALF, width)) for width in tile_widths],
            out_smem=shared((2, 2, 64, 64)),
            arrived=plgpu.Barrier(num_barriers=2 * max(1, len(tiles))),
            collective_axes="group",
        )
        def scope(allocations, tile_smem, out_smem, arrived):
            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
            def each_tile(loop):
                m, n = plgpu.planar_snake(loop.index[0], grid, longer, 8)  # interleave_rope_rows in time share operands
                first_row = m * ROWS + group * HALF
                mine = pl.ds(first_row, HALF)

                def multiply(_, x_smem, w_smem, sums):
                    plgpu.wgmma(sums, x_smem.at[pl.ds(group * HALF, HALF)], w_smem.transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    return sums

                def compute(run):
                    for i, width in enumerate(tile_widths):
                        plgpu.copy_gmem_to_smem(
                            tile_refs[i].at[mine, pl.ds(n * width, width)],
                            tile_smem[i].at[group],
                            arrived.at[2 * i + group],
                        )
                    by_row = plgpu.Layout.WGMMA.reduce(1)
                    shares = [plgpu.load(ref.at[mine], layout=by_row, optimized=False) for ref in row_refs]
                    shares = [lax.broadcast_in_dim(share, (HALF, columns), [0]) for share in shares]

                    def product(sums):
                        run(sums)
                        return sums[...]

                    half_tile = pl.run_scoped(product, plgpu.ACC((HALF, columns), jnp.float32))
                    for i in range(len(tiles)):
                        plgpu.barrier_wait(arrived.at[2 * i + group])
                        shares.append(tile_smem[i][group].astype(jnp.float32))
                    outs, to_sum = epilogue(half_tile, n * columns, *shares)
                    if summed:
                        out_refs[-1][n, mine] = to_sum.sum(axis=1)
                    slot = 0
                    for ref, pieces in zip(out_refs, outs, strict=False):
                        width, first = sum(piece.shape[1] for piece in pieces), 0
                        for piece in pieces:
                            for column in range(0, piece.shape[1], 64):
                                for row in range(0, HALF, 64):
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
                    x.at[pl.ds(m * ROWS, ROWS), :], w.at[pl.ds(n * columns, columns), :], allocations=allocations
                )

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out_type = [jax.ShapeDtypeStruct((N, width), x_NK.dtype) for width in widths]
    if summed:
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
