"""QK-norm and RoPE for Hopper GPUs, interpreted, compared with their definition and with the plain form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import layers
from jaxlm.core.ops import hopper_qk_norm, xla
from tests.core import float64
from tests.core.ops.test_hopper import ROUNDING, draw, relative_error

D, EPS, THETA = 24, 0.03, 50.0


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Runs the kernels on the CPU; the list of their grids."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("the kernels are for jax from 0.11 on")
    import jax.experimental.pallas as pl

    calls, pallas_call = [], pl.pallas_call

    def interpret(*args, **settings):
        calls.append(settings["grid"])
        return pallas_call(*args, **settings, interpret=True)

    monkeypatch.setattr(pl, "pallas_call", interpret)
    return calls


def arguments(heads, kv_heads, head_width, length):
    weights = [draw(D, count * head_width, scale=0.3, seed=i) for i, count in enumerate((heads, kv_heads, kv_heads))]
    scales = [draw(head_width, seed=i) for i in range(2)]
    d_qkv = [draw(2, length, count, head_width, seed=i) for i, count in enumerate((heads, kv_heads, kv_heads))]
    return draw(2, length, D), weights, scales, d_qkv


def with_gradients(query_key_value, x, weights, scales, d_qkv, positions=None):
    """q, k, v and the gradients of x, of the weights and of the scales, under jit."""
    if positions is None:
        positions = jnp.arange(x.shape[1])[None]
    cos_sin = layers.rope_cos_sin(positions, len(scales[0]), THETA)

    @jax.jit
    def run(x, weights, scales):
        qkv, vjp_fn = jax.vjp(lambda *a: tuple(query_key_value(xla.XLA, *a, cos_sin, EPS, x.dtype)), x, weights, scales)
        return *qkv, *jax.tree.leaves(vjp_fn(tuple(d.astype(x.dtype) for d in d_qkv)))

    return run(x, weights, scales)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_width", "length", "groups"),
    [
        (3, 1, 32, 96, 5),
        *(pytest.param(*s, marks=pytest.mark.slow) for s in ((8, 8, 32, 64, 3), (4, 2, 64, 32, 4), (16, 8, 32, 32, 4))),
    ],
)
def test_the_kernels_are_the_plain_form(calls, heads, kv_heads, head_width, length, groups):
    inputs = arguments(heads, kv_heads, head_width, length)
    found = with_gradients(hopper_qk_norm.query_key_value, *inputs)
    assert calls == [(2 * length // hopper_qk_norm.BLOCK_ROWS, groups)] * 2
    for a, b in zip(found, with_gradients(xla.query_key_value, *inputs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.slow
def test_in_bfloat16(calls):
    x, *others = arguments(4, 2, 64, 64)
    found = with_gradients(hopper_qk_norm.query_key_value, x.astype(jnp.bfloat16), *others)
    assert len(calls) == 2
    assert [a.dtype for a in found] == [jnp.bfloat16] * 4 + [jnp.float32] * 5
    for a, b in zip(found, with_gradients(xla.query_key_value, x, *others), strict=True):
        assert relative_error(a, b) < 2 * ROUNDING


def test_the_definition():
    x, weights, scales, _ = arguments(4, 2, 32, 32)
    cos_sin = layers.rope_cos_sin(jnp.arange(32)[None], 32, THETA)
    run = jax.jit(partial(hopper_qk_norm.query_key_value, xla.XLA, eps=EPS, matmul_dtype="float32"))
    found = run(x, weights, scales, cos_sin)
    exact = [np.float64(x), *([np.float64(a) for a in arrays] for arrays in (weights, scales))]
    for a, b in zip(found, float64.query_key_value(*exact, np.arange(32)[None], EPS, THETA), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_directional_derivative_by_differences():
    x, weights, scales, d_qkv = arguments(2, 1, 32, 32)
    _, _, _, by_x, _, _, _, *by_scales = with_gradients(hopper_qk_norm.query_key_value, x, weights, scales, d_qkv)
    directions = [draw(2, 32, D, seed=7), *(draw(32, seed=5 + i) for i in range(2))]

    def value(step):
        moved = [np.float64(a) + step * np.float64(d) for a, d in zip((x, *scales), directions, strict=True)]
        exact = [np.float64(w) for w in weights]
        qkv = float64.query_key_value(moved[0], exact, moved[1:], np.arange(32)[None], EPS, THETA)
        return sum(np.sum(a * np.float64(d)) for a, d in zip(qkv, d_qkv, strict=True))

    expected = (value(1e-4) - value(-1e-4)) / 2e-4
    found = sum(np.vdot(a, d) for a, d in zip((by_x, *by_scales), directions, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("head_width", "length", "positions"),
    [(32, 33, None), (24, 32, None), (16, 32, None), (32, 32, np.arange(64).reshape(2, 32))],
)
def test_other_sizes_take_the_plain_form(calls, head_width, length, positions):
    inputs = arguments(2, 2, head_width, length)
    found = with_gradients(hopper_qk_norm.query_key_value, *inputs, positions)
    assert not calls
    for a, b in zip(found, with_gradients(xla.query_key_value, *inputs, positions), strict=True):
        np.testing.assert_array_equal(a, b)
