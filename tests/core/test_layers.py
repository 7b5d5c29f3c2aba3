"""Each layer against its definition in float64 NumPy: values, and gradients by central differences of that."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import layers


def rms_norm_64(x, scale, eps):
    return (
        np.stack([v / np.sqrt(np.dot(v, v) / len(v) + eps) for v in x.reshape(-1, len(scale))]).reshape(x.shape) * scale
    )


def rope_64(x, positions, theta):
    """The pairs as complex numbers, each turned by exp(i position theta^(-2j/K))."""
    half = x.shape[-1] // 2
    turned = np.empty_like(x)
    for j in range(half):
        turn = np.exp(1j * positions * theta ** (-2 * j / x.shape[-1]))
        pair = (x[..., j] + 1j * x[..., j + half]) * turn[:, :, None]
        turned[..., j], turned[..., j + half] = pair.real, pair.imag
    return turned


def attention_64(q, k, v, mask):
    """For one query at a time, over the keys it may see and no others."""
    out = np.empty((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = mask[b if len(mask) > 1 else 0, t]
        weights = np.exp(k[b, seen, h] @ q[b, t, h] / np.sqrt(q.shape[-1]))
        out[b, t, h] = weights @ v[b, seen, h] / weights.sum()
    return out


def swiglu_64(x, gate, up, down):
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def assert_matches(function, reference, *arrays):
    """The values of `function`, and its gradient by every array in a random direction of the result."""
    exact = [np.asarray(array, np.float32).astype(np.float64) for array in arrays]
    values = reference(*exact)
    direction = np.random.default_rng(1).normal(size=values.shape)

    def run(*inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, pull(jnp.asarray(direction, out.dtype))

    out, gradients = jax.jit(run)(*(array.astype(np.float32) for array in arrays))
    np.testing.assert_allclose(out, values, rtol=1e-5, atol=1e-5)
    for which, gradient in enumerate(gradients):
        differences = np.empty(exact[which].shape)
        for index in np.ndindex(differences.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [array.copy() for array in exact]
                moved[which][index] += step
                ends.append(np.sum(reference(*moved) * direction))
            differences[index] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(gradient, differences, rtol=1e-4, atol=1e-4, err_msg=f"gradient by argument {which}")


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 1, 1), (5, 8)])
def test_rms_norm(shape):
    assert_matches(
        lambda x, scale: layers.rms_norm(x, scale, 0.1),
        lambda x, scale: rms_norm_64(x, scale, 0.1),
        draw(*shape),
        draw(shape[-1]),
    )


def test_rms_norm_of_bfloat16_rounds_only_its_result():
    x = jnp.asarray(draw(4, 257), jnp.bfloat16)
    scale = jnp.float32(draw(257))
    out = layers.rms_norm(x, scale, 1e-6)
    exact = rms_norm_64(np.float64(x), np.float64(scale), 1e-6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(out), exact, rtol=2**-8)


@pytest.mark.parametrize(("batch", "time", "heads", "head_width"), [(2, 5, 3, 6), (1, 1, 1, 2), (1, 3, 2, 4)])
def test_rope(batch, time, heads, head_width):
    positions = np.random.default_rng(0).integers(0, 1024, (batch, time))
    assert_matches(
        lambda x: layers.rope(x, layers.rope_cos_sin(jnp.asarray(positions), head_width, 100.0)),
        lambda x: rope_64(x, positions, 100.0),
        draw(batch, time, heads, head_width),
    )


def test_rope_scores_depend_on_the_distance_of_positions_alone():
    q, k = jnp.float32(draw(1, 1, 1, 64, seed=1)), jnp.float32(draw(1, 1, 1, 64, seed=2))

    @jax.jit
    def score(q_position, k_position):
        q_table, k_table = (layers.rope_cos_sin(at[None, None], 64, 10_000.0) for at in (q_position, k_position))
        return jnp.sum(layers.rope(q, q_table) * layers.rope(k, k_table))

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
        lambda q, k, v: layers.attention(q, k, v, jnp.asarray(mask)),
        lambda q, k, v: attention_64(q, k, v, mask),
        draw(batch, queries, heads, head_width, seed=1) * 2,
        draw(batch, keys, heads, head_width, seed=2),
        draw(batch, keys, heads, head_width, seed=3),
    )


def causal_attention(q, k, v, dtype="float32"):
    return layers.causal_attention(q, k, v, dtype)[0]


@pytest.mark.parametrize("queries", [2, 5, 128])
@pytest.mark.parametrize(("batch", "time", "heads", "head_width"), [(2, 5, 3, 2), (1, 1, 1, 2)])
def test_causal_attention(monkeypatch, queries, batch, time, heads, head_width):
    monkeypatch.setattr(layers, "QUERIES", queries)
    mask = np.array([[[s <= t for s in range(time)] for t in range(time)]])
    arrays = [draw(batch, time, heads, head_width, seed=seed) for seed in (1, 2, 3)]
    assert_matches(causal_attention, lambda q, k, v: attention_64(q, k, v, mask), *arrays)


@pytest.mark.parametrize("time", [1, 100, 128, 300])
@pytest.mark.parametrize("narrow", [False, True])
def test_causal_attention_in_blocks_is_masked_attention(time, narrow):
    """At the sizes of a block, one less and several, with the products in either dtype."""
    q, k, v, d_out = (jnp.float32(draw(2, time, 3, 16, seed=seed)) for seed in range(4))
    dtype = jnp.bfloat16 if narrow else jnp.float32

    def whole(q, k, v):
        return layers.attention(q, k, v, jnp.tri(time, dtype=bool)[None])

    def pulled(attend):
        out, pull = jax.jit(lambda *qkv: jax.vjp(attend, *qkv))(q, k, v)
        return out, *pull(d_out)

    for found, expected in zip(pulled(partial(causal_attention, dtype=dtype)), pulled(whole), strict=True):
        assert np.linalg.norm(found - expected) < (2**-7 if narrow else 1e-5) * max(np.linalg.norm(expected), 1)


def test_causal_attention_that_is_known_computes_its_gradient_alone():
    q, k, v, d_out = (jnp.float32(draw(2, 300, 3, 16, seed=seed)) for seed in range(4))
    out, known = layers.causal_attention(q, k, v, "float32")
    _, expected = jax.vjp(causal_attention, q, k, v)

    def again(q, k, v):
        return layers.causal_attention(q, k, v, "float32", known=known)[0]

    found_out, found = jax.vjp(again, q, k, v)
    np.testing.assert_array_equal(found_out, out)
    for got, wanted in zip(found(d_out), expected(d_out), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert "exp" not in str(jax.make_jaxpr(again)(q, k, v))


def test_attention_with_nothing_to_see_is_finite():
    q, k, v = (jnp.float32(draw(1, 2, 1, 2, seed=seed)) for seed in (1, 2, 3))

    def blind(q):
        return jnp.sum(layers.attention(q, k, v, jnp.zeros((1, 2, 2), bool)))

    value, gradient = jax.jit(jax.value_and_grad(blind))(q)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_attention_of_bfloat16_takes_its_softmax_in_float32():
    """Scores near 850 differ by 0.7, which bfloat16 (steps of 4 there) cannot hold."""
    q = jnp.asarray([64, 1], jnp.bfloat16).reshape(1, 1, 1, 2)
    k = jnp.asarray([[18.75, 0], [18.75, 1]], jnp.bfloat16).reshape(1, 2, 1, 2)
    v = jnp.asarray([[0, 0], [1, 1]], jnp.bfloat16).reshape(1, 2, 1, 2)
    out = layers.attention(q, k, v, jnp.ones((1, 1, 2), bool))
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0, 0, 0]) == pytest.approx(1 / (1 + np.exp(-(2**-0.5))), rel=2**-8)


@pytest.mark.parametrize(("width", "hidden"), [(4, 7), (1, 1)])
def test_gated_between_its_products(width, hidden):
    arrays = draw(2, 3, width), draw(width, hidden, seed=1), draw(width, hidden, seed=2), draw(hidden, width, seed=3)

    def swiglu(x, gate, up, down):
        return layers.linear(layers.swiglu_activation(layers.linear(x, gate), layers.linear(x, up)), down)

    assert_matches(swiglu, swiglu_64, *arrays)


def test_linear():
    assert_matches(layers.linear, lambda x, w: x @ w, draw(2, 3, 5), draw(5, 4))


@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_of_a_matrix_that_lies_turned(rows, dtype):
    """Of numbers that bfloat16 holds, as below."""
    x, w = (np.float32(jnp.bfloat16(draw(*shape))) for shape in ((rows, 32), (32, 300)))
    found = jax.jit(lambda x, w_FD: layers.linear(x, layers.Turned(w_FD), dtype))(x, w.T)
    assert (found.shape, found.dtype) == ((rows, 300), jnp.float32)
    np.testing.assert_allclose(found, x @ w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "width", "out"), [(32, 16, 48), (32, 48, 16), (16, 16, 16), (6, 5, 4), (32, 16, 5)])
def test_linear_with_bfloat16_products_of_float32(rows, width, out):
    """Of numbers that bfloat16 holds, the products are exact: so are the sums, to float32, also by tiles."""
    x, w, d_out = (
        np.float32(jnp.bfloat16(draw(*shape))) for shape in ((2, rows // 2, width), (width, out), (rows, out))
    )
    found, pull = jax.vjp(jax.jit(partial(layers.linear, dtype="bfloat16")), x, w)
    d_x, d_w = pull(d_out.reshape(found.shape))
    assert found.dtype == d_x.dtype == d_w.dtype == jnp.float32
    flat = x.reshape(rows, width)
    np.testing.assert_allclose(found.reshape(rows, out), flat @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_x.reshape(rows, width), d_out @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_w, flat.T @ d_out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 8, 13])
def test_linear_with_a_matrix_that_lies_turned(rows, dtype):
    x, w = (np.float32(jnp.bfloat16(draw(*shape))) for shape in ((rows, 1, 5), (5, 7)))
    found = jax.jit(partial(layers.linear, dtype=dtype))(x, layers.Turned(jnp.asarray(w.T, dtype)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.float64(x) @ w, rtol=1e-5, atol=1e-5)


def test_a_gradient_for_the_next_use_of_the_embedding_is_added_to():
    ids, table, later = np.array([[3, 0, 3], [6, 3, 1]]), draw(7, 3), draw(7, 3, seed=1)
    (rows, passed), pull = jax.vjp(lambda table: layers.embed_and_pass(jnp.asarray(ids), table), jnp.float32(table))
    [found] = pull((jnp.ones_like(rows), jnp.float32(later)))
    np.testing.assert_array_equal(passed, np.float32(table))
    np.testing.assert_allclose(found, later + np.bincount(ids.ravel(), minlength=7)[:, None], rtol=1e-6)


def test_linear_of_bfloat16_keeps_the_sums_of_its_weights_gradient():
    x, d_out = (np.random.default_rng(seed).normal(size=(4096, 2)).astype(jnp.bfloat16) for seed in range(2))
    _, pull = jax.vjp(layers.linear, jnp.asarray(x), jnp.ones((2, 2)))
    np.testing.assert_allclose(pull(jnp.asarray(d_out))[1], np.float64(x).T @ np.float64(d_out), rtol=1e-4)


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
