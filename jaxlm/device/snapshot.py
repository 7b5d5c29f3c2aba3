"""A copy of arrays, to be written while the next step reuses their buffers."""

import mmap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import RunError


def snapshot(tree: Any) -> Any:
    """A copy of each array of a tree, in the same place.

    On a CPU each lies in pages of its own, which return to the system with it. In malloc's heap it would fragment what
    a step needs, and `backend.keep_freed_memory` would keep it. Raises RunError if there is no memory for it.
    """
    tree = jax.tree.map(jnp.asarray, tree)
    if any(len(leaf.devices()) > 1 or leaf.platform() != "cpu" for leaf in jax.tree.leaves(tree)):
        return _copy(tree)
    return jax.tree.map(lambda leaf: jax.device_put(_in_own_pages(leaf), leaf.sharding), tree)


def _in_own_pages(leaf: jax.Array) -> np.ndarray:
    try:
        pages = mmap.mmap(-1, max(leaf.nbytes, 1))
    except OSError as error:
        raise RunError(
            "out of memory for the copy of the state that a save writes: set model.remat and microbatch_chunks, or a"
            " smaller batch_size"
        ) from error
    copy = np.frombuffer(pages, leaf.dtype, leaf.size).reshape(leaf.shape)
    np.copyto(copy, leaf)
    return copy


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
