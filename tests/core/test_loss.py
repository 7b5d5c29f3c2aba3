"""The loss in tiles against the definition over whole logits, in values, gradients and memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import ModelConfig
from jaxlm.core.loss import KEPT, TILE, cross_entropy, cross_entropy_and_gradient
from jaxlm.core.model import init_params, loss_and_gradient

IGNORED = -1


def with_gradients(x, embedding, targets, scale=1.0, dtype="float32", kept=KEPT, tile=TILE, unroll=False):
    none = jnp.zeros(embedding.shape)
    nats, *gradients = cross_entropy_and_gradient(x, embedding, targets, scale, none, dtype, kept, tile, unroll)
    return nats, tuple(gradients)


def cross_entropy_64(x, embedding, targets):
    total = 0.0
    for row, target in zip(x, targets, strict=True):
        if target >= 0:
            logits = embedding @ row
            total += np.log(np.sum(np.exp(logits - logits.max()))) + logits.max() - logits[target]
    return total


def draw(N, D, V):
    rng = np.random.default_rng([N, D, V])
    targets = rng.integers(0, V, N)
    targets[1::4] = IGNORED
    return np.float32(rng.normal(size=(N, D))), np.float32(rng.normal(size=(V, D))), targets


def differences(function, array):
    gradient = np.empty(array.shape)
    for index in np.ndindex(array.shape):
        up, down = array.copy(), array.copy()
        up[index] += 1e-5
        down[index] -= 1e-5
        gradient[index] = (function(up) - function(down)) / 2e-5
    return gradient


def whole_logits_loss(x_ND, embedding_VD, targets_N):
    losses_N = optax.softmax_cross_entropy_with_integer_labels(x_ND @ embedding_VD.T, jnp.maximum(targets_N, 0))
    return jnp.sum(jnp.where(targets_N >= 0, losses_N, 0))


def arrays_of(program):
    """The shapes of all arrays that a traced program computes, those of its inner programs included."""
    found, waiting = [], [program.jaxpr]
    while waiting:
        for equation in waiting.pop().eqns:
            found += [variable.aval.shape for variable in equation.outvars]
            for value in jax.tree.leaves(list(equation.params.values())):
                value = getattr(value, "jaxpr", value)
                if hasattr(value, "eqns"):
                    waiting.append(value)
    return found


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("tile", [1, 3, 10, 11, 20])
@pytest.mark.parametrize("kept", [1, KEPT])
def test_values_and_scaled_gradients(tile, kept, unroll):
    x, embedding, targets = draw(37, 3, 11)
    run = jax.jit(partial(with_gradients, kept=kept, tile=tile, unroll=unroll))
    value, gradients = run(x, embedding, targets, -2.5)
    alone = cross_entropy(x, embedding, targets, "float32", tile, unroll)
    x, embedding = np.float64(x), np.float64(embedding)
    np.testing.assert_allclose([value, alone], cross_entropy_64(x, embedding, targets), rtol=1e-5)
    by_x = differences(lambda a: -2.5 * cross_entropy_64(a, embedding, targets), x)
    by_embedding = differences(lambda a: -2.5 * cross_entropy_64(x, a, targets), embedding)
    np.testing.assert_allclose(gradients[0], by_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], by_embedding, rtol=1e-4, atol=1e-5)


def test_equals_optax_on_whole_logits():
    x, embedding, targets = draw(101, 16, 257)
    found = jax.jit(partial(with_gradients, tile=16, kept=2**14))(x, embedding, targets)
    expected = jax.jit(jax.value_and_grad(lambda *a: whole_logits_loss(*a, targets), (0, 1)))(x, embedding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_a_vocabulary_of_several_tiles():
    x, embedding, targets = draw(5, 2, 2000)
    exact = cross_entropy_64(x.astype(np.float64), embedding.astype(np.float64), targets)
    np.testing.assert_allclose(cross_entropy(x, embedding, targets, "float32"), exact, rtol=1e-5)
    np.testing.assert_allclose(with_gradients(x, embedding, targets)[0], exact, rtol=1e-5)


def test_tokens_without_a_target_have_no_loss_and_no_gradient():
    x, embedding, targets = draw(9, 3, 11)
    run = jax.jit(partial(with_gradients, tile=4))
    value, (by_x, by_embedding) = run(x, embedding, targets)
    assert value > 0
    assert not by_x[targets == IGNORED].any()
    assert by_x[targets != IGNORED].all()
    assert by_embedding.any()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(run(x, embedding, np.full(9, IGNORED))))


def test_large_logits_stay_finite():
    x, embedding, targets = draw(5, 3, 11)
    value, gradients = with_gradients(1e3 * x, embedding, targets, tile=2)
    expected = jax.grad(whole_logits_loss, (0, 1))(1e3 * x, embedding, targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradients, expected)
    np.testing.assert_allclose(value, cross_entropy_64(np.float64(1e3 * x), np.float64(embedding), targets), rtol=1e-5)


@pytest.mark.parametrize("activations", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [(37, 24, 101), (32, 16, 64)])
@pytest.mark.parametrize(("kept", "unroll"), [(1, False), (KEPT, False), (KEPT, True)])
def test_bfloat16_products_lose_no_more_than_their_rounding(activations, size, kept, unroll):
    x, embedding, targets = draw(*size)
    x = jnp.asarray(jnp.asarray(x, jnp.bfloat16), activations)
    embedding = np.float32(jnp.asarray(embedding, jnp.bfloat16))
    run = jax.jit(partial(with_gradients, dtype="bfloat16", tile=16, kept=kept, unroll=unroll))
    found, (by_x, by_embedding) = run(x, embedding, targets)
    exact = cross_entropy_64(np.float64(x), np.float64(embedding), targets)
    assert (by_x.dtype, by_embedding.dtype) == (activations, jnp.float32)
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    expected = jax.jit(jax.grad(lambda *a: whole_logits_loss(*a, targets), (0, 1)))(np.float32(x), embedding)
    for gradient, reference in zip((by_x, by_embedding), expected, strict=True):
        assert np.linalg.norm(np.float64(gradient) - reference) < 2**-8 * np.linalg.norm(reference)


def test_the_gradient_of_the_embedding_is_added_to_a_total():
    x, embedding, targets = draw(49, 3, 11)
    total = np.random.default_rng(0).normal(size=embedding.shape).astype(np.float32)
    _, (_, alone) = with_gradients(x, embedding, targets, tile=4)
    *_, added = cross_entropy_and_gradient(x, embedding, targets, 1.0, total, "float32", kept=1, tile=4)
    assert np.any(alone)
    np.testing.assert_allclose(added, alone + total, rtol=1e-6, atol=1e-6)


def test_whole_logits_never_exist():
    N, D, V, tile = 96, 4, 45, 8
    x, embedding, targets = draw(N, D, V)
    whole = arrays_of(jax.make_jaxpr(jax.value_and_grad(whole_logits_loss, (0, 1)))(x, embedding, targets))
    assert (N, V) in whole
    found = arrays_of(jax.make_jaxpr(lambda *a: cross_entropy(*a, "float32", tile))(x, embedding, targets))
    assert (N, tile) in found
    assert max(map(np.prod, found)) < N * V
    at_once, tiles = 32, 6
    kept = at_once * tiles * tile * 4
    found = arrays_of(jax.make_jaxpr(partial(with_gradients, tile=tile, kept=kept))(x, embedding, targets))
    assert (tiles, at_once, tile) in found
    assert max(map(np.prod, found)) == at_once * tiles * tile


def test_whole_logits_never_exist_in_training_the_preset():
    config = ModelConfig(precision="float32")
    ids = jax.ShapeDtypeStruct((4, config.context), jnp.int32)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    program = jax.make_jaxpr(lambda p, i: loss_and_gradient(config, p, i, i, 1.0, p))(params, ids)
    assert max(map(np.prod, arrays_of(program))) <= KEPT // 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_takes_no_more_memory_than_it_may(optimized_compilation, dtype):
    N, D, V, kept = 512, 64, 9000, 2**23
    x, embedding, targets = map(jax.ShapeDtypeStruct, ((N, D), (V, D), (N,)), (dtype, "float32", "int32"))
    run = jax.jit(partial(cross_entropy_and_gradient, dtype=dtype, kept=kept), donate_argnums=4)
    compiled = run.lower(x, embedding, targets, 1.0, embedding).compile()
    tile = 4 * N * TILE
    assert compiled.memory_analysis().temp_size_in_bytes < kept + 3 * tile
