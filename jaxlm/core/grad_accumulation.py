"""Gradients that are added to an accumulator inside the backward pass.

Adding up the gradients of many chunks the usual way, `total + jax.grad(loss)(params)`, holds two sets of gradients at
once: the sum, and those of the chunk. The functions here hold one. Each also returns the parameters it has used:

    def scale_with_accumulator(x, w):  # w x, and w again
        return w * x, w

The second output is an alias of w for its "next use". Its cotangent is whatever the caller gives to the backward pass,
so the caller gives the sum so far. The backward pass must return one gradient for w, which is the sum over both uses,
so a custom rule adds this use's gradient to the accumulator in place (d_out * x, to what arrives for the alias):

    (y, _), vjp_fn = jax.vjp(scale_with_accumulator, 3.0, 2.0)  # x = 3, w = 2
    _, accumulator = vjp_fn((1.0, 10.0))  # 10 so far: 10 + 1 * 3 = 13

A block's gradient is added as soon as the block's backward pass has run, so only one block's gradient exists at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.layers import embed

Block = Callable[..., tuple[jax.Array, Any]]  # parameters, x_BTD, rope_cos_sin, saved=None -> x_BTD, residuals
Stacked = dict[str, jax.Array]  # the parameters of all blocks, stacked along a leading axis L


@jax.custom_vjp
def embed_with_accumulator(ids_BT: jax.Array, embedding_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`layers.embed`, and the embedding for its next use."""
    return embed(ids_BT, embedding_VD), embedding_VD


def _embed_backward(ids_BT, d_outputs):
    d_rows_BTD, accumulator_VD = d_outputs
    return None, accumulator_VD.at[ids_BT.ravel()].add(d_rows_BTD.reshape(-1, d_rows_BTD.shape[-1]), mode="clip")


embed_with_accumulator.defvjp(
    lambda ids_BT, embedding_VD: (embed_with_accumulator(ids_BT, embedding_VD), ids_BT), _embed_backward
)


@jax.custom_vjp
def unstack_with_accumulator(blocks: Stacked) -> tuple[list[Stacked], Stacked]:
    """The parameters of each block, and all of them stacked for their next use. Backward adds all blocks at once."""
    layers = len(jax.tree.leaves(blocks)[0])
    return [jax.tree.map(lambda stacked, layer=layer: stacked[layer], blocks) for layer in range(layers)], blocks


def _unstack_backward(_, d_outputs):
    d_blocks, accumulator = d_outputs
    return (jax.tree.map(lambda stacked, *parts: stacked + jnp.stack(parts), accumulator, *d_blocks),)


unstack_with_accumulator.defvjp(lambda blocks: (unstack_with_accumulator(blocks), None), _unstack_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def remat_blocks(
    blocks: Stacked, x_BTD: jax.Array, rope_cos_sin: tuple[jax.Array, jax.Array], block: Block, scan: Callable
) -> tuple[jax.Array, Stacked]:
    """All blocks in order. Each saves its input and attention's residuals; the backward pass computes it again.

    Args:
        blocks: the stacked parameters.
        x_BTD: the residual stream.
        rope_cos_sin: RoPE's cosines and sines.
        block: one block; with `saved`, its residuals, it need not compute attention again.
        scan: `jax.lax.scan`, or what stands for it.

    Returns:
        [B, T, D]; and the parameters for their next use. Backward adds one block after the other.
    """
    return _remat_forward(blocks, x_BTD, rope_cos_sin, block, scan)[0]


def _remat_forward(blocks, x_BTD, rope_cos_sin, block, scan):
    def run(x_BTD, p):
        out_BTD, residuals = block(p, x_BTD, rope_cos_sin)
        return out_BTD, (x_BTD, residuals)

    out_BTD, saved = scan(run, x_BTD, blocks)
    return (out_BTD, blocks), (blocks, saved, rope_cos_sin)


def _remat_backward(block, scan, residuals, d_outputs):
    blocks, saved, rope_cos_sin = residuals

    def add_block(carry, layer):
        d_x_BTD, accumulator = carry
        p, (x_BTD, saved_by_block) = jax.tree.map(
            lambda stacked: jax.lax.dynamic_index_in_dim(stacked, layer, 0, False), (blocks, saved)
        )
        _, vjp_fn, _ = jax.vjp(lambda p, x_BTD: block(p, x_BTD, rope_cos_sin, saved_by_block), p, x_BTD, has_aux=True)
        d_p, d_x_BTD = vjp_fn(d_x_BTD)

        def add(stacked, part):
            before = jax.lax.dynamic_index_in_dim(stacked, layer, 0, False)
            return jax.lax.dynamic_update_index_in_dim(stacked, before + part, layer, 0)

        return (d_x_BTD, jax.tree.map(add, accumulator, d_p)), None

    layers = jnp.arange(len(jax.tree.leaves(blocks)[0]))
    (d_x_BTD, accumulator), _ = scan(add_block, d_outputs, layers, reverse=True)
    return accumulator, d_x_BTD, None


remat_blocks.defvjp(_remat_forward, _remat_backward)
