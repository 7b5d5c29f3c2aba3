"""Checksums of arrays compared with Python's integers; every change is seen."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.checksum import checksums

pytestmark = pytest.mark.usefixtures("optimized_compilation")


def expected_checksum(array):
    """The sum over all words of MurmurHash3's finalizer of word xor index / golden ratio, in Python's integers."""
    checksum = 0
    for index, word in enumerate(np.asarray(array).ravel().view(np.uint32).tolist()):
        x = word ^ (index * 0x9E3779B9 % 2**32)
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        checksum += x ^ x >> 16
    return checksum % 2**32


TREE = {
    "a": np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32),
    "b": (np.float32(-0.0), np.array([2**31 - 1, -1], np.int32)),
    "c": np.array([[np.nan, np.inf, -np.inf, 1e-45]], np.float32),
    "d": np.random.default_rng(1).normal(size=(19, 3)).astype(np.float32),  # adds parts of two rows, and three more
}


def test_the_checksum_of_each_leaf():
    found = checksums(jax.tree.map(jnp.asarray, TREE))
    assert (found.shape, found.dtype) == ((5,), np.uint32)
    assert found.tolist() == [expected_checksum(leaf) for leaf in jax.tree.leaves(TREE)]


def test_float16_counts_as_float32():
    halves = np.float16([0, -0.0, 6e-8, 1e-5, 1.5, -65504])
    assert checksums([jnp.asarray(halves)]).tolist() == [expected_checksum(np.float32(halves))]


@pytest.mark.parametrize("bit", [0, 1, 15, 22, 31])
def test_every_flipped_bit_changes_the_checksum(bit):
    words = np.random.default_rng(1).integers(0, 2**32, 64, np.uint32)
    flipped = words[None] ^ (np.eye(64, dtype=np.uint32) << np.uint32(bit))
    found = checksums(list(flipped.view(np.float32)))
    assert expected_checksum(words) not in found.tolist()


def test_a_swap_of_two_numbers_or_a_shift_changes_the_checksum():
    values = np.arange(1, 32, dtype=np.float32)
    changed = [np.roll(values, 1)]
    for other in range(1, 31):
        changed.append(values.copy())
        changed[-1][[0, other]] = values[[other, 0]]
    assert expected_checksum(values) not in checksums(changed).tolist()


def test_a_block_of_zeros_changes_the_checksum():
    values = np.random.default_rng(2).normal(size=4096).astype(np.float32)
    lost = [np.where((np.arange(4096) // 512) == block, np.float32(0), values) for block in range(8)]
    assert expected_checksum(values) not in checksums(lost).tolist()


@pytest.mark.slow
def test_eight_devices_compute_the_same_as_one():
    program = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxlm.core.checksum import checksums
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
values = np.random.default_rng(3).normal(size=(64, 33)).astype(np.float32)
layouts = [NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec()), jax.devices()[3]]
print(len(jax.devices()), len({checksums([jax.device_put(values, layout)]).tolist()[0] for layout in layouts}))
"""
    repository = str(Path(__file__).parents[2])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": repository}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["8", "1"]
