"""Gradients that are added to an accumulator inside the backward pass.

`grads = add(grads, jax.grad(loss)(params, chunk))` holds two whole sets of gradients: the sum, and those of one chunk.
The functions here need only one. Each also returns the parameters that it has used, for their "next use":

    def scale(x, w):
        return w * x, w

    (y, _), vjp_fn = jax.vjp(scale, 3.0, 2.0)
    _, accumulator = vjp_fn((1.0, 10.0))  # 10 + 1 * 3 = 13

The gradient of w is the sum over its uses. The caller gives the sum so far (10) as the gradient of the next use, so the
backward pass adds the gradient of this use (3) to it. JAX's own rules would first collect the gradients of all blocks.
The custom rules below add to the accumulator in place and, under `remat_blocks`, block by block, so that the gradient
of only one block exists at a time.
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
    """All blocks in order: [B, T, D], and the stacked parameters for their next use.

    Each block saves its input and attention's residuals. The backward pass computes it again, without attention, and
    adds one block after the other. `scan` is that of the device's `Ops`.
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
