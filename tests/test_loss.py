"""The loss in tiles against the definition over whole logits, in values, gradients and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import ModelConfig
from jaxlm.loss import TILE, cross_entropy
from jaxlm.model import Decoder, init_params

IGNORED = -1


def nats(x, embedding, targets, dtype="float32", tile=TILE, unroll=False):
    return cross_entropy(x, embedding, targets, dtype, tile, unroll)[0]


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
def test_values_and_gradients_scaled_by_the_cotangent(tile, unroll):
    x, embedding, targets = draw(7, 3, 11)
    run = jax.jit(jax.value_and_grad(lambda *a: -2.5 * nats(*a, targets, tile=tile, unroll=unroll), (0, 1)))
    value, gradients = run(x, embedding)
    x, embedding = np.float64(x), np.float64(embedding)
    np.testing.assert_allclose(value, -2.5 * cross_entropy_64(x, embedding, targets), rtol=1e-5)
    by_x = differences(lambda a: -2.5 * cross_entropy_64(a, embedding, targets), x)
    by_embedding = differences(lambda a: -2.5 * cross_entropy_64(x, a, targets), embedding)
    np.testing.assert_allclose(gradients[0], by_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], by_embedding, rtol=1e-4, atol=1e-5)


def test_equals_optax_on_whole_logits():
    x, embedding, targets = draw(101, 16, 257)
    found = jax.jit(jax.value_and_grad(lambda *a: nats(*a, targets, tile=16), (0, 1)))(x, embedding)
    expected = jax.jit(jax.value_and_grad(lambda *a: whole_logits_loss(*a, targets), (0, 1)))(x, embedding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_a_vocabulary_of_several_tiles():
    x, embedding, targets = draw(5, 2, 2000)
    exact = cross_entropy_64(x.astype(np.float64), embedding.astype(np.float64), targets)
    np.testing.assert_allclose(nats(x, embedding, targets), exact, rtol=1e-5)


def test_tokens_without_a_target_have_no_loss_and_no_gradient():
    x, embedding, targets = draw(9, 3, 11)
    run = jax.jit(jax.value_and_grad(lambda t, *a: nats(*a, t, tile=4), (1, 2)))
    value, (by_x, by_embedding) = run(targets, x, embedding)
    assert value > 0
    assert not by_x[targets == IGNORED].any()
    assert by_x[targets != IGNORED].all()
    assert by_embedding.any()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(run(np.full(9, IGNORED), x, embedding)))


def test_large_logits_stay_finite():
    x, embedding, targets = draw(5, 3, 11)
    value = nats(1e3 * x, embedding, targets, tile=2)
    np.testing.assert_allclose(value, cross_entropy_64(np.float64(1e3 * x), np.float64(embedding), targets), rtol=1e-5)


@pytest.mark.parametrize("activations", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [(37, 24, 101), (32, 16, 64)])
def test_bfloat16_products_lose_no_more_than_their_rounding(activations, size):
    x, embedding, targets = draw(*size)
    x = jnp.asarray(jnp.asarray(x, jnp.bfloat16), activations)
    embedding = np.float32(jnp.asarray(embedding, jnp.bfloat16))
    run = jax.jit(jax.value_and_grad(lambda *a: nats(*a, targets, "bfloat16", 16), (0, 1)))
    found, (by_x, by_embedding) = run(x, embedding)
    exact = cross_entropy_64(np.float64(x), np.float64(embedding), targets)
    assert (by_x.dtype, by_embedding.dtype) == (activations, jnp.float32)
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    expected = jax.jit(jax.grad(lambda *a: whole_logits_loss(*a, targets), (0, 1)))(np.float32(x), embedding)
    for gradient, reference in zip((by_x, by_embedding), expected, strict=True):
        assert np.linalg.norm(np.float64(gradient) - reference) < 2**-8 * np.linalg.norm(reference)


def test_a_gradient_for_the_next_use_of_the_embedding_is_added_to():
    x, embedding, targets = draw(9, 3, 11)
    later = np.random.default_rng(0).normal(size=embedding.shape).astype(np.float32)
    _, pull = jax.vjp(lambda e: cross_entropy(x, e, targets, "float32", 4), jnp.asarray(embedding))
    [alone], [added] = pull((jnp.float32(1), jnp.zeros_like(later))), pull((jnp.float32(1), jnp.asarray(later)))
    assert np.any(alone)
    np.testing.assert_allclose(added, alone + later, rtol=1e-6, atol=1e-6)


def test_whole_logits_never_exist():
    N, D, V, tile = 96, 4, 40, 8
    x, embedding, targets = draw(N, D, V)
    whole = arrays_of(jax.make_jaxpr(jax.value_and_grad(whole_logits_loss, (0, 1)))(x, embedding, targets))
    assert (N, V) in whole
    for function in (nats, jax.value_and_grad(nats, (0, 1))):
        found = arrays_of(jax.make_jaxpr(lambda *a, f=function: f(*a, tile=tile))(x, embedding, targets))
        assert (N, tile) in found
        assert max(map(np.prod, found)) < N * V


def test_whole_logits_never_exist_in_training_the_preset():
    config = ModelConfig(dtype="float32")
    ids = jax.ShapeDtypeStruct((4, config.context), jnp.int32)
    params = jax.eval_shape(lambda: {"params": init_params(config, jax.random.key(0))})
    program = jax.make_jaxpr(jax.value_and_grad(lambda p, i: Decoder(config).apply(p, i, i, method="loss")))(
        params, ids
    )
    assert max(map(np.prod, arrays_of(program))) < 4 * config.context * config.vocab_size
