"""The functions that add gradients to an accumulator, compared with jax's own gradients of what they compute."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import ops
from jaxlm.core.grad_accumulation import embed_with_accumulator, remat_blocks, unstack_with_accumulator
from tests.core.float64 import draw


def test_the_example_of_the_docstring():
    _, vjp_fn = jax.vjp(lambda x, w: (w * x, w), 3.0, 2.0)
    assert [float(d) for d in vjp_fn((1.0, 10.0))] == [2.0, 13.0]


def test_the_embeddings_gradient_is_added_to_the_accumulator():
    ids, table, so_far = np.array([[3, 0, 3], [6, 3, 1]]), draw(7, 3), draw(7, 3, seed=1)
    (rows, again), vjp_fn = jax.vjp(lambda table: embed_with_accumulator(jnp.asarray(ids), table), jnp.float32(table))
    [found] = vjp_fn((jnp.ones_like(rows), jnp.float32(so_far)))
    np.testing.assert_array_equal(rows, np.float32(table)[ids])
    np.testing.assert_array_equal(again, np.float32(table))
    np.testing.assert_allclose(found, so_far + np.bincount(ids.ravel(), minlength=7)[:, None], rtol=1e-6)


BLOCKS = {"w": jnp.float32(draw(3, 4, 4)), "scale": jnp.float32(draw(3, 4, seed=1))}
X, D_X = jnp.float32(draw(2, 4)), jnp.float32(draw(2, 4, seed=2))


def block(p, x, factor, saved=None):
    """Saves tanh, and uses it if it is given, as attention does."""
    out = jnp.tanh(x @ p["w"]) if saved is None else saved + 0 * jnp.sum(p["w"])
    return x + factor * out * p["scale"], jnp.tanh(x @ p["w"])


def one_after_the_other(blocks, x):
    for layer in range(3):
        x, _ = block(jax.tree.map(lambda stacked, layer=layer: stacked[layer], blocks), x, 0.5)
    return x


def unstacked(blocks, x):
    by_layer, blocks = unstack_with_accumulator(blocks)
    for p in by_layer:
        x, _ = block(p, x, 0.5)
    return x, blocks


def with_remat(blocks, x, scan):
    return remat_blocks(blocks, x, 0.5, lambda p, x, factor, saved=None: block(p, x, factor), scan)


def with_gradients(function, d_outputs):
    """Of a function of BLOCKS and X, in one program: the outputs, and the gradients of the inputs."""
    return jax.jit(lambda *a: (function(*a), jax.vjp(function, *a)[1](d_outputs)))(BLOCKS, X)


@pytest.fixture(scope="module")
def expected():
    return with_gradients(one_after_the_other, D_X)


@pytest.mark.parametrize(
    "run",
    [
        unstacked,
        partial(with_remat, scan=ops.get("xla").scan),
        partial(with_remat, scan=ops.get("apple").scan),
    ],
    ids=["unstacked", "remat", "remat on an Apple GPU"],
)
def test_the_blocks_gradients_are_added_to_the_accumulator(run, expected):
    accumulator = jax.tree.map(np.cos, BLOCKS)
    (out, again), (found_blocks, found_x) = with_gradients(run, (D_X, accumulator))
    expected_out, (expected_blocks, expected_x) = expected
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (out, again, found_blocks, found_x),
        (expected_out, BLOCKS, jax.tree.map(np.add, accumulator, expected_blocks), expected_x),
    )


def test_the_backward_pass_gets_what_each_block_saved():
    """The block multiplies what it saved by its scale, so that the gradient of the scale shows it."""

    def spy(p, x, factor, saved=None):
        return x + (factor if saved is None else saved) * p["scale"], x

    def loss(blocks):
        return jnp.sum(remat_blocks(blocks, jnp.ones((2, 4)), 0.5, spy, ops.get("xla").scan)[0])

    inputs = [1 + 0.5 * BLOCKS["scale"][:layer].sum(0) for layer in range(3)]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(BLOCKS)["scale"], 2 * np.array(inputs), rtol=1e-6)
