"""Each layer compared with its definition in float64: values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import layers
from jaxlm.core.ops.cpu import Transposed
from jaxlm.core.ops.xla import weight_gradient
from tests.core import float64
from tests.core.float64 import assert_matches, draw, in_bfloat16


@pytest.mark.parametrize("shape", [(2, 3, 7), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 1, 1), (5, 8)))])
def test_rms_norm(shape):
    assert_matches(
        lambda x, scale: layers.rms_norm(x, scale, 0.1),
        lambda x, scale: float64.rms_norm(x, scale, 0.1),
        draw(*shape),
        draw(shape[-1]),
    )


def test_rms_norm_of_bfloat16_rounds_only_its_result():
    x = jnp.asarray(draw(4, 257), jnp.bfloat16)
    scale = jnp.float32(draw(257))
    out = jax.jit(layers.rms_norm, static_argnums=2)(x, scale, 1e-6)
    exact = float64.rms_norm(np.float64(x), np.float64(scale), 1e-6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(out), exact, rtol=2**-8)


@pytest.mark.parametrize("shape", [(2, 5, 3, 6), pytest.param((1, 1, 1, 2), marks=pytest.mark.slow)])
def test_rope(shape):
    positions = np.random.default_rng(0).integers(0, 1024, shape[:2])
    assert_matches(
        lambda x: layers.rope(x, layers.rope_cos_sin(jnp.asarray(positions), shape[-1], 100.0)),
        lambda x: float64.rope(x, positions, 100.0),
        draw(*shape),
    )


@pytest.mark.parametrize("shape", [(2, 5, 3, 6), pytest.param((1, 1, 1, 2), marks=pytest.mark.slow)])
def test_rms_norm_rope(shape):
    positions = np.random.default_rng(0).integers(0, 1024, shape[:2])
    cos_sin = layers.rope_cos_sin(jnp.asarray(positions), shape[-1], 100.0)
    assert_matches(
        lambda x, scale: layers.rms_norm_rope(x, scale, cos_sin, 0.1),
        lambda x, scale: float64.rope(float64.rms_norm(x, scale, 0.1), positions, 100.0),
        draw(*shape),
        draw(shape[-1]),
    )


def test_rms_norm_rope_of_bfloat16_rounds_only_its_results_and_saves_only_its_input():
    x, d_out = (jnp.asarray(draw(1, 40, 2, 64, seed=seed), jnp.bfloat16) for seed in range(2))
    scale, positions = jnp.float32(draw(64)), np.arange(40)[None]
    cos_sin = layers.rope_cos_sin(jnp.asarray(positions), 64, 100.0)

    def run(x):
        return jax.vjp(lambda x, scale: layers.rms_norm_rope(x, scale, cos_sin, 1e-6), x, scale)

    out, vjp_fn = jax.jit(run)(x)
    exact = float64.rope(float64.rms_norm(np.float64(x), np.float64(scale), 1e-6), positions, 100.0)
    _, exact_vjp = run(x.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    # a half of the last place; numbers near zero are differences of larger ones
    np.testing.assert_allclose(np.float64(out), exact, rtol=2**-8, atol=1e-5)
    for found, expected in zip(vjp_fn(d_out), exact_vjp(d_out.astype(jnp.float32)), strict=True):
        np.testing.assert_allclose(np.float64(found), expected, rtol=2**-8, atol=1e-4)
    saved = {leaf.dtype for leaf in jax.tree.leaves(vjp_fn) if leaf.size == x.size}
    assert saved == {jnp.dtype("bfloat16")}


def test_rope_scores_depend_on_the_distance_of_positions_alone():
    q, k = jnp.float32(draw(1, 1, 1, 64, seed=1)), jnp.float32(draw(1, 1, 1, 64, seed=2))

    @jax.jit
    def score(q_position, k_position):
        q_cos_sin, k_cos_sin = (layers.rope_cos_sin(at[None, None], 64, 10_000.0) for at in (q_position, k_position))
        return jnp.sum(layers.rope(q, q_cos_sin) * layers.rope(k, k_cos_sin))

    for distance in (0, 1, 30):
        scores = [score(jnp.int32(at + distance), jnp.int32(at)) for at in (0, 1, 17, 900)]
        np.testing.assert_allclose(scores, scores[0], atol=2e-3)
    here, behind, ahead = (float(score(jnp.int32(a), jnp.int32(b))) for a, b in ((0, 0), (1, 0), (0, 1)))
    assert min(abs(here - behind), abs(here - ahead), abs(behind - ahead)) > 0.1


@pytest.mark.parametrize(("batch", "queries", "keys", "heads", "head_width"), [(2, 3, 5, 2, 3), (1, 1, 1, 1, 1)])
def test_attention_under_any_mask(batch, queries, keys, heads, head_width):
    mask = np.random.default_rng(0).random((batch, queries, keys)) < 0.5
    mask[:, :, 0] = True
    assert_matches(
        lambda q, k, v: layers.attention(q, layers.split_heads(k), layers.split_heads(v), jnp.asarray(mask)),
        lambda q, k, v: float64.attention(q, k, v, mask),
        draw(batch, queries, heads, head_width, seed=1) * 2,
        draw(batch, keys, heads, head_width, seed=2),
        draw(batch, keys, heads, head_width, seed=3),
    )


def test_attention_with_nothing_to_see_is_finite():
    q, k, v = (jnp.float32(draw(1, 2, 1, 2, seed=seed)) for seed in (1, 2, 3))
    k, v = layers.split_heads(k), layers.split_heads(v)

    def blind(q):
        return jnp.sum(layers.attention(q, k, v, jnp.zeros((1, 2, 2), bool)))

    value, gradient = jax.jit(jax.value_and_grad(blind))(q)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_attention_of_bfloat16_takes_its_softmax_in_float32():
    """Scores near 850 differ by 0.7, which bfloat16 (steps of 4 there) cannot hold."""
    q = jnp.asarray([64, 1], jnp.bfloat16).reshape(1, 1, 1, 2)
    k = jnp.asarray([[18.75, 0], [18.75, 1]], jnp.bfloat16)[None]
    v = jnp.asarray([[0, 0], [1, 1]], jnp.bfloat16)[None]
    out = jax.jit(layers.attention)(q, k, v, jnp.ones((1, 1, 2), bool))
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0, 0, 0]) == pytest.approx(1 / (1 + np.exp(-(2**-0.5))), rel=2**-8)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_of_a_transposed_matrix(rows, dtype):
    """In numbers that bfloat16 can hold, so that only the sums round."""
    x, w = in_bfloat16(draw(rows, 2, 32)), in_bfloat16(draw(32, 300))
    transposed = Transposed(jnp.asarray(w.T, dtype))
    run = jax.jit(partial(layers.linear, matmul_dtype=dtype, weight_gradient=weight_gradient))
    for array, shape in ((x, (rows, 2, 300)), (x[:1, :1], (1, 1, 300))):
        out = run(array, transposed)
        assert (out.shape, out.dtype) == (shape, jnp.float32)
        np.testing.assert_allclose(out, np.float64(array) @ w, rtol=1e-5, atol=1e-5)


def test_embedding_takes_rows_and_adds_up_their_gradients():
    ids = np.array([[3, 0, 3], [6, 3, 1]])
    assert_matches(
        lambda table: layers.embed(jnp.asarray(ids), table), lambda table: np.eye(7)[ids] @ table, draw(7, 3)
    )


def test_embedding_clips_ids_outside_the_vocabulary():
    table = jnp.arange(5.0)[:, None]
    assert layers.embed(jnp.array([[-1, 5, 99, 4]]), table)[0, :, 0].tolist() == [0, 4, 4, 4]


def test_tied_head():
    assert_matches(layers.tied_head, lambda x, table: x @ table.T, draw(2, 3, 5), draw(7, 5))


def test_tied_head_of_bfloat16_gives_sums_in_float32():
    x, table = jnp.asarray(draw(1, 1, 301), jnp.bfloat16), jnp.asarray(draw(5, 301), jnp.bfloat16)
    out = layers.tied_head(x, table.astype(jnp.float32))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, np.float64(x) @ np.float64(table).T, rtol=1e-5, atol=1e-5)
