"""The schedule against closed forms, AdamW against NumPy, Muon against the singular value decomposition."""

import functools
import math
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from jaxlm.config import Config, OptimizerConfig
from jaxlm.core.optimizer import accumulate, clip_by_norm, make_inner, make_optimizer, make_schedule, orthogonalize

SHAPES = {
    "embedding": (7, 6),
    "blocks": {"attention_norm": (2, 6), "query": (2, 6, 6), "up": (2, 6, 24), "down": (2, 24, 6)},
    "norm": (6,),
}
CONFIG = Config(
    grad_accum_steps=1,
    max_steps=6,
    optimizer=OptimizerConfig(
        name="adamw",
        learning_rate=0.01,
        muon_learning_rate=0.03,
        warmup_steps=2,
        lr_schedule="linear",
        lr_decay_fraction=1.0,
        min_lr_ratio=0.1,
        b1=0.9,
        b2=0.95,
        weight_decay=0.5,
        clip_norm=2.0,
    ),
)
SHARES = [1 / 3, 2 / 3, 1, 0.775, 0.55, 0.325]  # the learning rate of CONFIG's steps, of its peak
MUON = replace(CONFIG, optimizer=replace(CONFIG.optimizer, name="muon"))
BARE_MUON = replace(MUON, optimizer=replace(MUON.optimizer, weight_decay=0.0, clip_norm=1e9))


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: scale * rng.normal(size=shape), SHAPES, is_leaf=lambda shape: isinstance(shape, tuple)
    )


def named_leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def compiled(config):
    optimizer = make_optimizer(config)

    return optimizer.init, jax.jit(lambda params, state, gradient: optimizer.step(gradient, state, params))


def after_each_step(config, params, gradients):
    """The parameters after each update, by their names."""
    params, *gradients = (jax.tree.map(np.float32, tree) for tree in (params, *gradients))
    init, step = compiled(config)
    state, found = init(params), []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        found.append(named_leaves(params))
    return found


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize(
    ("warmup", "steps", "fraction", "floor"), [(0, 10, 1.0, 0.1), (4, 24, 0.5, 0.0), (1, 7, 0.0, 0.3), (5, 6, 1.0, 0.5)]
)
def test_schedule_warms_up_holds_and_decays(decay, warmup, steps, fraction, floor):
    decay_steps = max(1, fraction * (steps - warmup))

    def share(done):
        if done < warmup:
            return (done + 1) / (warmup + 1)
        t = min(1, max(0, done - (steps - decay_steps)) / decay_steps)
        return floor + (1 - floor) * ((1 + math.cos(math.pi * t)) / 2 if decay == "cosine" else 1 - t)

    settings = OptimizerConfig(warmup_steps=warmup, lr_schedule=decay, lr_decay_fraction=fraction, min_lr_ratio=floor)
    found = make_schedule(settings, steps)(np.arange(30))
    np.testing.assert_allclose(found, [share(done) for done in range(30)], rtol=1e-5, atol=1e-6)


def test_schedule_of_a_long_run():
    share = make_schedule(
        OptimizerConfig(warmup_steps=1000, lr_schedule="cosine", lr_decay_fraction=1.0, min_lr_ratio=0.1), 50_000
    )
    done = np.array([0, 499, 999, 1000, 1000 + 49_000 // 4, 25_500, 49_999, 50_000])
    expected = [1 / 1001, 500 / 1001, 1000 / 1001, 1, 0.1 + 0.9 * (2 + 2**0.5) / 4, 0.55, 0.1, 0.1]
    np.testing.assert_allclose(share(done), expected, rtol=1e-4)


def test_adamw_equals_its_definition_in_numpy():
    params, c = draw(0), CONFIG.optimizer
    gradients = [draw(step, scale) for step, scale in enumerate([0.01, 3.0, 0.05, 0.001, 1.0], start=1)]
    found = after_each_step(CONFIG, params, gradients)

    p = named_leaves(params)
    m, v = ({name: np.zeros_like(leaf) for name, leaf in p.items()} for _ in range(2))
    for step, gradient in enumerate(gradients):
        g = named_leaves(gradient)
        norm = math.sqrt(sum(np.sum(leaf**2) for leaf in g.values()))
        for name in p:
            clipped = g[name] * min(1, c.clip_norm / norm)
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.95 * v[name] + 0.05 * clipped**2
            m_hat, v_hat = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            decay = 0 if name in ("['norm']", "['blocks']['attention_norm']") else 0.5 * p[name]
            p[name] = p[name] - 0.01 * SHARES[step] * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay)
            np.testing.assert_allclose(found[step][name], p[name], rtol=0, atol=2e-6, err_msg=f"{name}, step {step}")


def test_the_norm_on_record_is_that_before_clipping():
    params, gradient = (jax.tree.map(np.float32, draw(seed)) for seed in (0, 1))
    init, step = compiled(CONFIG)
    _, state = step(params, init(params), gradient)
    norm = math.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(gradient)))
    assert norm > 2 * CONFIG.optimizer.clip_norm
    assert float(optax.tree_utils.tree_get(state, "grad_norm")) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_without_gradient_matrices_shrink_and_norm_scales_stay(config):
    params = named_leaves(draw(0))
    [found] = after_each_step(config, draw(0), [draw(0, scale=0.0)])
    for name, leaf in params.items():
        peak = 0.03 if config is MUON and "blocks" in name else 0.01
        shrunk = 1.0 if "norm" in name else 1 - peak / 3 * 0.5
        np.testing.assert_allclose(found[name], np.float32(leaf) * shrunk, rtol=0 if "norm" in name else 1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8), (1, 5)])
def test_orthogonalize_keeps_singular_vectors_and_evens_out_singular_values(shape):
    rng = np.random.default_rng(0)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    for smallest in (1.0, 0.1, 0.01):
        values = np.geomspace(1, smallest, min(shape))
        matrix = np.float32(left * values @ right * 10.0 ** rng.uniform(-4, 4))
        out = np.asarray(jax.jit(orthogonalize)(matrix))
        assert out.shape == shape
        core = left.T @ out @ right.T
        assert (np.diag(core) > 0.65).all()
        assert (np.diag(core) < 1.21).all()
        np.testing.assert_allclose(core - np.diag(np.diag(core)), 0, atol=2e-4)
        np.testing.assert_allclose(out, left @ core @ right, atol=2e-4)


def test_orthogonalize_of_nothing_is_nothing():
    assert not orthogonalize(np.zeros((3, 4), np.float32)).any()


def test_muon_steps_are_as_long_as_adams_in_every_matrix():
    params, gradient = draw(0), draw(1)
    gradient["blocks"]["up"][0] *= 1e-3
    [found] = after_each_step(BARE_MUON, params, [gradient])
    for name in ("query", "up", "down"):
        moved = found[f"['blocks']['{name}']"] - np.float32(params["blocks"][name])
        for layer in moved:
            assert np.sqrt(np.mean(layer**2)) == pytest.approx(0.2 * 0.03 / 3, rel=0.25)


def test_muon_follows_the_nesterov_momentum_of_each_matrix():
    gradients = [draw(1), draw(2)]
    first, second = after_each_step(BARE_MUON, draw(0), gradients)
    for name in ("query", "up", "down"):
        moved = np.float64(second[f"['blocks']['{name}']"]) - first[f"['blocks']['{name}']"]
        before, now = (gradient["blocks"][name] for gradient in gradients)
        direction = now + 0.9 * (now + 0.9 * before)
        for layer in range(2):
            left, _, right = np.linalg.svd(-direction[layer], full_matrices=False)
            core = left.T @ moved[layer] @ right.T / (0.03 * 2 / 3 * 0.2 * math.sqrt(max(direction.shape[1:])))
            assert (np.diag(core) > 0.3).all()
            np.testing.assert_allclose(core - np.diag(np.diag(core)), 0, atol=1e-3)


def test_under_muon_embedding_and_norm_scales_go_by_adam():
    gradients = [draw(1), draw(2)]
    adamw, muon = (after_each_step(config, draw(0), gradients)[-1] for config in (CONFIG, MUON))
    for name in adamw:
        same = np.array_equal(adamw[name], muon[name])
        assert same == (name in ("['embedding']", "['norm']", "['blocks']['attention_norm']")), name


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulation_is_that_of_optax_multi_steps(every, optimizer, conditional):
    """Over good gradients and bad ones, in the same state after each as optax's own MultiSteps."""
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, name=optimizer, clip_norm=3.0))
    inner = make_inner(config)
    ours = accumulate(inner, every, conditional)
    optax_own = optax.MultiSteps(inner, every, should_skip_update_fn=optax.skip_not_finite)
    params = jax.tree.map(np.float32, draw(0))
    gradients = [jax.tree.map(np.float32, draw(seed, scale=seed % 3)) for seed in range(1, 9)]
    gradients[1]["norm"][2], gradients[4]["embedding"][0, 0] = np.nan, np.inf
    found, expected = (params, ours.init(params)), (params, optax_own.init(params))
    step, update = jax.jit(ours.step), jax.jit(optax_own.update)
    assert ("stablehlo.case" in step.lower(gradients[0], *found[::-1]).as_text()) == conditional
    for gradient in gradients:
        found = step(gradient, found[1], found[0])
        updates, state = update(gradient, expected[1], expected[0])
        expected = optax.apply_updates(expected[0], updates), state
        assert (found[1].mini_step, found[1].gradient_step) == (state.mini_step, state.gradient_step)
        assert bool(found[1].skip_state["should_skip"]) == bool(state.skip_state["should_skip"])
        if every == 1:
            state = state._replace(acc_grads=())
        same = (
            (found[0], found[1].inner_opt_state, found[1].acc_grads),
            (expected[0], state.inner_opt_state, state.acc_grads),
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *same)
    assert int(found[1].gradient_step) == 6 // every


def test_clipping_is_that_of_optax():
    gradient = jax.tree.map(np.float32, draw(1))
    for largest in (1e-3, 2.0, 1e9):
        ours, theirs = clip_by_norm(largest), optax.clip_by_global_norm(largest)
        found, _ = ours.update(gradient, ours.init(gradient))
        expected, _ = theirs.update(gradient, theirs.init(gradient))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
