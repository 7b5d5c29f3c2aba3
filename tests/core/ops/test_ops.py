"""Every record of operations passes the same tests: float64 NumPy, finite differences and jax's own control flow.

The fused kernels of the Hopper record have theirs in test_hopper.py, as they need jax 0.11, bfloat16 and whole tiles.
cuDNN's attention does not run here: the CUDA record is tested with what it computes in float32.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

import jaxlm.config
import jaxlm.core
from jaxlm.core import layers, ops
from jaxlm.core.ops import xla
from tests.core import float64
from tests.core.float64 import assert_matches, draw, in_bfloat16

EVERY = pytest.mark.parametrize("device_ops", ops.IMPLEMENTATIONS.values(), ids=ops.IMPLEMENTATIONS)


class State(NamedTuple):
    params: jax.Array


def different(field):
    """One record for each value of a field, so that no function is tested twice."""
    by_value = {getattr(record, field): (name, record) for name, record in reversed(ops.IMPLEMENTATIONS.items())}
    return pytest.mark.parametrize(
        "device_ops", [record for _, record in by_value.values()], ids=[name for name, _ in by_value.values()]
    )


def test_the_names_are_those_of_the_setting():
    assert ("auto", *ops.IMPLEMENTATIONS) == jaxlm.config.IMPLEMENTATIONS
    assert ops.get("auto") is ops.get("xla")
    assert len(set(map(id, ops.IMPLEMENTATIONS.values()))) == 5


def test_the_core_asks_about_devices_in_ops_alone():
    core = Path(jaxlm.core.__path__[0])
    files = [file for file in core.glob("*.py") if file.name != "__init__.py"]
    assert len(files) >= 10
    for file in files:
        assert not re.search(r"default_backend|\.platform\b|unroll", file.read_text()), file.name


@pytest.mark.parametrize(
    ("block", "shape"), [(2, (1, 5, 2, 2)), (128, (2, 3, 1, 4)), pytest.param(1, (1, 1, 1, 2), marks=pytest.mark.slow)]
)
def test_causal_attention(monkeypatch, block, shape):
    monkeypatch.setattr(xla, "QUERY_BLOCK", block)
    arrays = [draw(*shape, seed=seed) for seed in (1, 2, 3)]
    assert_matches(lambda *qkv: xla.causal_attention(*qkv, "float32")[0], float64.causal_attention, *arrays)


@pytest.mark.parametrize(
    ("time", "dtype"),
    [
        (300, "bfloat16"),
        *(pytest.param(time, "bfloat16", marks=pytest.mark.slow) for time in (100, 128)),
        *(pytest.param(time, "float32", marks=pytest.mark.slow) for time in (100, 128, 300)),
    ],
)
def test_causal_attention_in_blocks_is_masked_attention(time, dtype):
    """At one block, a part of one and several."""
    q, k, v, d_out = (jnp.float32(draw(1, time, 2, 16, seed=seed)) for seed in range(4))

    def masked(q, k, v):
        return layers.attention(q, layers.split_heads(k), layers.split_heads(v), jnp.tri(time, dtype=bool)[None])

    def value_and_grads(attend):
        return jax.jit(lambda *qkv: (attend(*qkv), *jax.vjp(attend, *qkv)[1](d_out)))(q, k, v)

    in_blocks = value_and_grads(lambda q, k, v: xla.causal_attention(q, k, v, dtype)[0])
    for found, expected in zip(in_blocks, value_and_grads(masked), strict=True):
        tolerance = 2**-7 if dtype == "bfloat16" else 1e-5
        assert np.linalg.norm(found - expected) < tolerance * max(np.linalg.norm(expected), 1)


def test_causal_attention_with_saved_residuals_computes_only_its_gradient():
    q, k, v, d_out = (jnp.float32(draw(1, 130, 2, 16, seed=seed)) for seed in range(4))

    @jax.jit
    def run(*qkv):
        out, vjp_fn, saved = jax.vjp(lambda *qkv: xla.causal_attention(*qkv, "float32"), *qkv, has_aux=True)
        again = jax.vjp(lambda *qkv: xla.causal_attention(*qkv, "float32", saved)[0], *qkv)[1](d_out)
        return out, saved, vjp_fn(d_out), again

    out, saved, gradients, gradients_again = run(q, k, v)
    for a, b in zip(gradients_again, gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    again = jax.make_jaxpr(lambda *qkv: xla.causal_attention(*qkv, "float32", saved)[0])(q, k, v)
    assert "exp" not in str(again)
    np.testing.assert_array_equal(saved[0], out)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_width", "fused"),
    [
        ("8.0", "bfloat16", 8, True),
        ("8.0", "bfloat16", 6, False),
        ("8.0", "float32", 8, False),
        ("8.0", "bfloat16", 128, True),
        ("8.6", "bfloat16", 256, False),
        ("9.0", "bfloat16", 256, jax.__version_info__ >= (0, 5)),
        ("9.0", "bfloat16", 512, False),
        ("", "bfloat16", 8, False),  # no cuDNN
    ],
)
def test_cudnn_computes_attention_where_jax_lets_it(monkeypatch, capability, dtype, head_width, fused):
    def has_capability(least):
        return float(capability) >= float(least)

    if capability:
        monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", has_capability)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda version: version == capability, raising=False)
    attend = partial(ops.get("cuda").attention, matmul_dtype=dtype)
    arrays = [jax.ShapeDtypeStruct((1, 130, 1, head_width), dtype) for _ in "qkv"]
    jax.clear_caches()  # of what jax checked as it traced
    forward = str(jax.make_jaxpr(attend)(*arrays))
    gradient = str(jax.make_jaxpr(jax.grad(lambda *qkv: attend(*qkv)[0].astype("float32").sum()))(*arrays))
    assert ["dot_product_attention_fwd" in program for program in (forward, gradient)] == [fused] * 2
    assert ("exp" in forward) is not fused


@different("weight_gradient")
def test_linear(device_ops):
    run = partial(layers.linear, matmul_dtype="float32", weight_gradient=device_ops.weight_gradient)
    assert_matches(run, lambda x, w: x @ w, draw(2, 3, 5), draw(5, 4))


@different("weight_gradient")
@pytest.mark.parametrize(("rows", "width", "out"), [(32, 16, 48), (32, 48, 16), (6, 5, 4), (32, 16, 5)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_linear_of_numbers_that_bfloat16_can_hold(device_ops, rows, width, out, dtype):
    """The products are exact with matmuls of either dtype, so the float32 sums are too, also by tiles."""
    x, w, d_out = (in_bfloat16(draw(*shape)) for shape in ((2, rows // 2, width), (width, out), (rows, out)))
    run = partial(layers.linear, matmul_dtype=dtype, weight_gradient=device_ops.weight_gradient)
    found, vjp_fn = jax.vjp(jax.jit(run), x, w)
    d_x, d_w = vjp_fn(d_out.reshape(found.shape))
    assert found.dtype == d_x.dtype == d_w.dtype == jnp.float32
    flat = x.reshape(rows, width)
    np.testing.assert_allclose(found.reshape(rows, out), flat @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_x.reshape(rows, width), d_out @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_w, flat.T @ d_out, rtol=1e-5, atol=1e-5)


@different("weight_gradient")
def test_the_gradient_of_a_weight_is_summed_in_float32(device_ops):
    a, b = (np.random.default_rng(seed).normal(size=(4096, 16)).astype(jnp.bfloat16) for seed in range(2))
    found = device_ops.weight_gradient(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(found, np.float64(a).T @ np.float64(b), rtol=1e-4, atol=1e-4)


@different("fused_linear")
def test_fused_linear(device_ops):
    weights = [draw(5, width, seed=width) for width in (3, 1, 4)]
    assert_matches(
        lambda x, *ws: jnp.concatenate(device_ops.fused_linear(device_ops, x, ws, "float32"), axis=-1),
        lambda x, *ws: x @ np.concatenate(ws, axis=1),
        draw(2, 3, 5),
        *weights,
    )


def test_fused_linear_of_whole_tiles_for_a_hopper_gpu():
    x, weights = np.float32(draw(2, 128, 5)), [np.float32(draw(5, width, seed=width)) for width in (3, 1, 4)]
    hopper = ops.get("hopper")
    for found, w in zip(hopper.fused_linear(hopper, x, weights, "float32"), weights, strict=True):
        np.testing.assert_allclose(found, x @ w, rtol=1e-5, atol=1e-5)
    program = str(jax.make_jaxpr(lambda *a: hopper.fused_linear(hopper, a[0], a[1:], "float32"))(x, *weights))
    assert program.count("dot_general[") == 1


@different("query_key_value")
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_query_key_value(device_ops, kv_heads):
    positions = np.array([[0, 1, 2], [5, 3, 900]])
    cos_sin = layers.rope_cos_sin(jnp.asarray(positions), 4, 100.0)
    widths = 12, 4 * kv_heads, 4 * kv_heads

    def joined(qkv):
        return np.concatenate([a.reshape(2, 3, -1) for a in qkv], axis=-1)

    def run(x, *p):
        qkv = device_ops.query_key_value(device_ops, x, p[:3], p[3:], cos_sin, 0.1, "float32")
        assert [a.shape for a in qkv] == [(2, 3, 3, 4), *[(2, 3, kv_heads, 4)] * 2]
        return jnp.concatenate([a.reshape(2, 3, -1) for a in qkv], axis=-1)

    assert_matches(
        run,
        lambda x, *p: joined(float64.query_key_value(x, p[:3], p[3:], positions, 0.1, 100.0)),
        draw(2, 3, 5),
        *(draw(5, width, seed=seed) for seed, width in enumerate(widths)),
        draw(4, seed=1),
        draw(4, seed=2),
    )


@different("swiglu")
def test_swiglu(device_ops):
    arrays = draw(2, 3, 4), draw(4, 7, seed=1), draw(4, 7, seed=2), draw(7, 4, seed=3)
    assert_matches(lambda *a: device_ops.swiglu(device_ops, *a, "float32"), float64.swiglu, *arrays)


@EVERY
def test_a_decode_layout_is_read_by_linear(device_ops):
    x, w = np.float32(draw(2, 1, 5)), np.float32(draw(5, 4))
    found = layers.linear(x, device_ops.decode_layout(jnp.asarray(w.T)), "float32", device_ops.weight_gradient)
    np.testing.assert_allclose(found, x @ w, rtol=1e-5, atol=1e-5)


@different("scan")
@pytest.mark.parametrize("reverse", [False, True])
def test_scan(device_ops, reverse):
    def body(carry, x):
        return 0.5 * carry + x["a"], (carry, x["b"] * carry)

    xs = {"a": jnp.float32(draw(5, 2)), "b": jnp.arange(5.0)}
    found = jax.jit(lambda xs: device_ops.scan(body, jnp.ones(2), xs, reverse=reverse))(xs)
    carry, outs = np.ones(2), [None] * 5
    for i in range(5)[:: -1 if reverse else 1]:
        carry, outs[i] = 0.5 * carry + xs["a"][i], (carry, i * carry)
    expected = carry, tuple(np.stack(parts) for parts in zip(*outs, strict=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("field", ["cond", "sampling_cond"])
@EVERY
def test_cond(device_ops, field):
    run = jax.jit(
        lambda p, x, y: getattr(device_ops, field)(p, lambda x, y: {"out": x + y}, lambda x, y: {"out": y}, x, y)
    )
    for predicate, expected in ((True, 5.0), (False, 3.0)):
        assert run(predicate, 2.0, 3.0)["out"] == expected


@different("search_loop")
def test_search_loop(device_ops):
    """Twice as much until it is enough; more rounds change nothing."""
    run = jax.jit(
        lambda x: device_ops.search_loop(lambda x: x < 100, lambda x: jnp.where(x < 100, 2 * x, x), x, rounds=9)
    )
    assert [int(run(x)) for x in (1, 3, 200)] == [128, 192, 200]


@different("train_step")
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_train_step_adds_up_its_chunks(device_ops, chunks):
    step = device_ops.train_step(
        lambda params: (jnp.int32(0), jnp.zeros_like(params)),
        lambda params, a, ids: (a[0] + 1, a[1] + params * ids[a[0]]),
        lambda state, a: (State(state.params - a[1]), a[0]),
        chunks,
    )
    state, count = step(State(jnp.array([10.0, 20.0])), jnp.array([0.25, 0.5, 1.0]))
    share = [0.25, 0.5, 1.0][:chunks]
    assert (count, state.params.tolist()) == (chunks, [10 - 10 * sum(share), 20 - 20 * sum(share)])


def test_an_apple_gpu_gets_no_loop_and_no_conditional():
    apple = ops.get("apple")
    tiny = replace(apple, vocab_tile=2, exp_buffer_bytes=1)

    def everything(x, embedding, targets, p):
        loss, *rest = tiny.cross_entropy_and_grad(tiny, x, embedding, targets, 1.0, embedding, "float32")
        value = apple.cond(p, lambda a: a, lambda a: -a, loss)
        found = apple.search_loop(lambda c: c < 5, lambda c: c + 1, value, rounds=3)
        return apple.sampling_cond(p, lambda: found, lambda: value), rest

    program = str(jax.make_jaxpr(everything)(jnp.ones((40, 2)), jnp.ones((5, 2)), jnp.zeros(40, int), True))
    assert not re.search(r"\b(scan|while|cond)\[", program)
