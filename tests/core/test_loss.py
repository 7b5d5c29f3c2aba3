"""The loss in tiles compared with its definition over whole logits: values, gradients and memory."""

import functools
import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import ModelConfig
from jaxlm.core import ops
from jaxlm.core.decoder import init_params
from jaxlm.core.loss import cross_entropy, cross_entropy_and_grad
from jaxlm.core.model import loss_and_gradient
from tests.core import float64

IGNORED = -1
LARGE = ops.get("xla").exp_buffer_bytes


def record(name="xla", **sizes):
    return replace(ops.get(name), **sizes)


SMALL_TILES = record(vocab_tile=3, exp_buffer_bytes=1)  # four tiles of 11 entries, chunks of 16 tokens


@functools.cache
def compiled(device_ops, dtype):
    return jax.jit(partial(cross_entropy_and_grad, device_ops, matmul_dtype=dtype))


def with_gradients(x, embedding, targets, scale=1.0, accumulator=0.0, device_ops=SMALL_TILES, dtype="float32"):
    accumulator_VD = np.broadcast_to(np.float32(accumulator), embedding.shape)
    loss_sum, *gradients = jax.device_get(compiled(device_ops, dtype)(x, embedding, targets, scale, accumulator_VD))
    return loss_sum, tuple(gradients)


def draw(N, D, V):
    rng = np.random.default_rng([N, D, V])
    targets = rng.integers(0, V, N)
    targets[1::4] = IGNORED
    return np.float32(rng.normal(size=(N, D))), np.float32(rng.normal(size=(V, D))), targets


def whole_logits_loss(x_ND, embedding_VD, targets_N):
    losses_N = optax.softmax_cross_entropy_with_integer_labels(x_ND @ embedding_VD.T, jnp.maximum(targets_N, 0))
    return jnp.sum(jnp.where(targets_N >= 0, losses_N, 0))


def arrays_of(program):
    """The shapes of all arrays that a traced program computes, those of its inner programs included."""
    shapes, waiting = [], [program.jaxpr]
    while waiting:
        for equation in waiting.pop().eqns:
            shapes += [variable.aval.shape for variable in equation.outvars]
            for value in jax.tree.leaves(list(equation.params.values())):
                value = getattr(value, "jaxpr", value)
                if hasattr(value, "eqns"):
                    waiting.append(value)
    return shapes


def fast_and_slow(cases, fast):
    """All cases; those that are not in `fast` are marked slow."""
    assert fast <= set(cases)
    return [case if case in fast else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    "name", [name if name == "xla" else pytest.param(name, marks=pytest.mark.slow) for name in ops.IMPLEMENTATIONS]
)
def test_values_with_the_tiles_of_every_device(name):
    """The fused kernels of a Hopper GPU are tested in ops/test_hopper.py."""
    x, embedding, targets = draw(5, 2, 2000)
    device_ops = ops.get(name)
    exact = float64.cross_entropy(np.float64(x), np.float64(embedding), targets)
    alone = jax.jit(partial(cross_entropy, device_ops, matmul_dtype="float32"))(x, embedding, targets)
    value, _ = with_gradients(x, embedding, targets, device_ops=device_ops)
    np.testing.assert_allclose([alone, value], exact, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "tile", "exp_buffer"),
    fast_and_slow(
        list(itertools.product(("xla", "apple"), (1, 3, 10, 11, 20), (1, LARGE))),
        {("xla", 3, 1), ("xla", 20, LARGE), ("apple", 10, LARGE)},
    ),
)
def test_values_and_scaled_gradients(name, tile, exp_buffer):
    x, embedding, targets = draw(37, 3, 11)
    device_ops = record(name, vocab_tile=tile, exp_buffer_bytes=exp_buffer)
    value, gradients = with_gradients(x, embedding, targets, -2.5, device_ops=device_ops)
    alone = jax.jit(partial(cross_entropy, device_ops, matmul_dtype="float32"))(x, embedding, targets)
    x, embedding = np.float64(x), np.float64(embedding)
    np.testing.assert_allclose([value, alone], float64.cross_entropy(x, embedding, targets), rtol=1e-5)
    by_x = float64.gradient(lambda a: -2.5 * float64.cross_entropy(a, embedding, targets), x)
    by_embedding = float64.gradient(lambda a: -2.5 * float64.cross_entropy(x, a, targets), embedding)
    np.testing.assert_allclose(gradients[0], by_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], by_embedding, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_equals_optax_on_whole_logits():
    x, embedding, targets = draw(101, 16, 257)
    device_ops = record(vocab_tile=16, exp_buffer_bytes=2**14)
    actual = with_gradients(x, embedding, targets, device_ops=device_ops)
    expected = jax.jit(jax.value_and_grad(lambda *a: whole_logits_loss(*a, targets), (0, 1)))(x, embedding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


def test_tokens_without_a_target_have_no_loss_and_no_gradient():
    x, embedding, targets = draw(37, 3, 11)
    value, (by_x, by_embedding) = with_gradients(x, embedding, targets)
    assert value > 0
    assert not by_x[targets == IGNORED].any()
    assert by_x[targets != IGNORED].all()
    assert by_embedding.any()
    ignored = with_gradients(x, embedding, np.full(37, IGNORED))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(ignored))


def test_large_logits_stay_finite():
    x, embedding, targets = draw(37, 3, 11)
    value, gradients = with_gradients(1e3 * x, embedding, targets)
    expected = jax.jit(jax.grad(whole_logits_loss, (0, 1)))(1e3 * x, embedding, targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradients, expected)
    exact = float64.cross_entropy(np.float64(1e3 * x), np.float64(embedding), targets)
    np.testing.assert_allclose(value, exact, rtol=1e-5)


ODD, EVEN = (37, 24, 101), (32, 16, 64)  # N, D and V; a CPU has a matmul of its own for multiples of 16


@pytest.mark.parametrize(
    ("activations", "name", "size", "exp_buffer"),
    fast_and_slow(
        list(itertools.product(("bfloat16", "float32"), ("cpu", "apple"), (ODD, EVEN), (1, LARGE))),
        {("bfloat16", "cpu", ODD, 1), ("float32", "cpu", EVEN, LARGE)},
    ),
)
def test_bfloat16_matmuls_lose_no_more_than_their_rounding(activations, name, size, exp_buffer):
    x, embedding, targets = draw(*size)
    x = jnp.asarray(float64.in_bfloat16(x), activations)
    embedding = float64.in_bfloat16(embedding)
    device_ops = record(name, vocab_tile=16, exp_buffer_bytes=exp_buffer)
    value, (by_x, by_embedding) = with_gradients(x, embedding, targets, device_ops=device_ops, dtype="bfloat16")
    exact = float64.cross_entropy(np.float64(x), np.float64(embedding), targets)
    assert (by_x.dtype, by_embedding.dtype) == (activations, jnp.float32)
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    expected = jax.jit(jax.grad(lambda *a: whole_logits_loss(*a, targets), (0, 1)))(np.float32(x), embedding)
    for gradient, reference in zip((by_x, by_embedding), expected, strict=True):
        assert np.linalg.norm(np.float64(gradient) - reference) < 2**-8 * np.linalg.norm(reference)


def test_the_gradient_of_the_embedding_is_added_to_the_accumulator():
    x, embedding, targets = draw(37, 3, 11)
    accumulator = np.random.default_rng(0).normal(size=embedding.shape).astype(np.float32)
    _, (_, alone) = with_gradients(x, embedding, targets)
    _, (_, added) = with_gradients(x, embedding, targets, accumulator=accumulator)
    assert np.any(alone)
    np.testing.assert_allclose(added, alone + accumulator, rtol=1e-6, atol=1e-6)


def test_whole_logits_never_exist():
    N, D, V, tile = 96, 4, 45, 8
    x, embedding, targets = draw(N, D, V)
    whole = arrays_of(jax.make_jaxpr(jax.value_and_grad(whole_logits_loss, (0, 1)))(x, embedding, targets))
    assert (N, V) in whole
    evaluation = partial(cross_entropy, record(vocab_tile=tile), matmul_dtype="float32")
    shapes = arrays_of(jax.make_jaxpr(evaluation)(x, embedding, targets))
    assert (N, tile) in shapes
    assert max(map(np.prod, shapes)) < N * V
    rows, tiles = 32, 6
    device_ops = record(vocab_tile=tile, exp_buffer_bytes=rows * tiles * tile * 4)
    shapes = arrays_of(jax.make_jaxpr(compiled(device_ops, "float32"))(x, embedding, targets, 1.0, embedding))
    assert (tiles, rows, tile) in shapes
    assert max(map(np.prod, shapes)) == rows * tiles * tile


@pytest.mark.parametrize(("limit", "width"), [(101, 101), (90, 64), (60, 60), (50, 48), (16, 16)])
def test_tiles_are_evenly_wide_in_multiples_of_16_up_to_their_limit(limit, width):
    x, embedding, targets = draw(96, 4, 101)
    evaluation = partial(cross_entropy, record(vocab_tile=limit), matmul_dtype="float32")
    shapes = arrays_of(jax.make_jaxpr(evaluation)(x, embedding, targets))
    assert {shape for shape in shapes if len(shape) == 2 and shape[0] == 96 and shape[1] > 4} == {(96, width)}


@pytest.mark.slow
def test_whole_logits_never_exist_in_training_the_preset():
    config = ModelConfig(precision="float32")
    ids = jax.ShapeDtypeStruct((4, config.context), jnp.int32)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    program = jax.make_jaxpr(lambda p, i: loss_and_gradient(config, p, i, i, 1.0, p))(params, ids)
    assert max(map(np.prod, arrays_of(program))) <= LARGE // 4


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_the_exp_buffer_takes_no_more_memory_than_it_may(optimized_compilation, dtype):
    N, D, V, limit = 512, 64, 9000, 2**23
    x, embedding, targets = map(jax.ShapeDtypeStruct, ((N, D), (V, D), (N,)), (dtype, "float32", "int32"))
    device_ops = record("cpu", exp_buffer_bytes=limit)
    run = jax.jit(partial(cross_entropy_and_grad, device_ops, matmul_dtype=dtype), donate_argnums=4)
    compiled = run.lower(x, embedding, targets, 1.0, embedding).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < limit + 3 * 4 * N * device_ops.vocab_tile
