"""Checksums of arrays, computed on their own device; the same on every device and with every version of jax."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: its multiples by neighbouring indices are far apart
_PARTS = 8  # of the first axis, which is never split over devices; 16 are slow


@jax.jit
def checksums(tree: Any) -> jax.Array:
    """One checksum for each leaf of `tree`, of 4-byte numbers or float16: [leaves] uint32, in leaf order.

    A bijection mixes each word with its index (the finalizer of MurmurHash3 by Appleby, public domain), and the results
    are added modulo 2**32. A change of one word always changes the sum; a change of several is missed once in 2**32.
    """
    return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(tree)])


@jax.jit  # traced once for each shape
def _checksum(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.float16:
        leaf = leaf.astype(jnp.float32)
    words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):  # no reshape, so that an array that is split over devices stays so
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
        stride *= words.shape[axis]
    x = words ^ (index * jnp.uint32(_GOLDEN))
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    x ^= x >> 16
    if x.ndim > 1:  # XLA for the CPU adds arrays eight times as fast as the numbers of one
        parts = min(_PARTS, len(x))
        rows = len(x) // parts
        added = reduce(jax.lax.add, [jax.lax.slice_in_dim(x, i * rows, (i + 1) * rows) for i in range(parts)])
        rest = jax.lax.slice_in_dim(x, parts * rows, len(x))
        return jnp.sum(added, dtype=jnp.uint32) + jnp.sum(rest, dtype=jnp.uint32)
    return jnp.sum(x, dtype=jnp.uint32)
