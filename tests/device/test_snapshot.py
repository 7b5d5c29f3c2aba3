"""The copy that a save writes: it stays while training goes on, and its memory returns."""

import errno
import mmap
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.device.snapshot import snapshot
from jaxlm.errors import RunError

RETURNED = """
import jax, jax.numpy as jnp
from jaxlm.device import backend
from jaxlm.device.snapshot import snapshot

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024

size = 2**28
device = backend.start("cpu")
array = jnp.ones(size // 4).block_until_ready()
backend.keep_freed_memory(device, 2 * size)
before = resident()
copy = snapshot([array])
during = resident()
del copy
(array[:1] + 1).block_until_ready()  # jax frees what Python has let go at its next call
assert during - before > 0.9 * size, (before, during)
assert resident() - before < 0.1 * size, (before, resident())
"""


def test_a_snapshot_has_the_same_numbers_and_outlives_the_original():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.int32(7), "c": jnp.zeros((0, 3), jnp.float16)}
    expected = jax.tree.map(np.array, tree)
    copy = snapshot(tree)
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(tree)
    for leaf, numbers in zip(jax.tree.leaves(copy), jax.tree.leaves(expected), strict=True):
        assert (leaf.shape, leaf.dtype) == (numbers.shape, numbers.dtype)
        np.testing.assert_array_equal(leaf, numbers)


def test_a_system_without_memory_for_it_is_told_apart_from_a_disk(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(RunError, match="out of memory"):
        snapshot([jnp.ones(3)])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_of_a_snapshot_returns_to_the_system_where_freed_memory_is_kept():
    subprocess.run([sys.executable, "-c", RETURNED], check=True)
