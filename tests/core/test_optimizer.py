"""Schedules against closed forms, AdamW, Muon and the average against NumPy, accumulation against optax."""

import functools
import math
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

import jaxlm.config
from jaxlm.config import Config, ModelConfig, OptimizerConfig
from jaxlm.core import ops, optimizer
from jaxlm.core.average import average_start, average_step, averaged
from jaxlm.core.optimizer import (
    cautious_decay,
    make_optimizer,
    make_schedule,
    multi_steps,
    newton_schulz,
    normalize_neurons,
)
from jaxlm.core.parameters import by_path, tree_of

CONFIG = Config(
    grad_accum_steps=1,
    max_steps=6,
    model=ModelConfig(vocab_size=257, layers=2, heads=1, width=6, mlp_width=12),
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
MUON = replace(CONFIG, optimizer=replace(CONFIG.optimizer, name="muon", muon_weight_decay=0.3))
WHOLE_RECIPE = replace(
    MUON,
    optimizer=replace(
        MUON.optimizer,
        weight_decay=0.0,
        muon_momentum=0.95,
        muon_momentum_warmup=3,
        muon_b2=0.9,
        cautious=True,
        average=0.7,
    ),
)
LR_FRACTIONS = [1 / 3, 2 / 3, 1, 0.775, 0.55, 0.325]  # of the peak, at CONFIG's steps
SLOW = pytest.mark.slow
UNCLIPPED = 0.01  # a scale at which the norm of `draw` stays below clip_norm


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return tree_of(CONFIG.model, lambda parameter: np.float32(scale * rng.normal(size=parameter.shape)))


def named_leaves(tree):
    return {
        "/".join(key.key for key in path): np.float64(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def global_norm(tree):
    return math.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(tree)))


@functools.cache
def compiled(config):
    return tuple(map(jax.jit, make_optimizer(config)))


def after_each_step(config, params, gradients):
    """The parameters after each update, by name, and the last state."""
    init, step = compiled(config)
    state, history = init(params), []
    for gradient in gradients:
        params, state, *_ = step(gradient, state, params)
        history.append(named_leaves(params))
    return history, state


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_schedule_equals_its_closed_form(decay):
    for warmup, steps, fraction, end in [
        (0, 10, 1.0, 0.1),
        (4, 24, 0.5, 0.0),
        (1, 7, 0.0, 0.3),
        (5, 6, 1.0, 0.5),
        (1000, 50_000, 1.0, 0.1),
    ]:
        decay_steps = max(1, fraction * (steps - warmup))

        def expected(step, warmup=warmup, steps=steps, end=end, decay_steps=decay_steps):
            if step < warmup:
                return (step + 1) / (warmup + 1)
            t = min(1, max(0, step - (steps - decay_steps)) / decay_steps)
            return end + (1 - end) * ((1 + math.cos(math.pi * t)) / 2 if decay == "cosine" else 1 - t)

        settings = OptimizerConfig(warmup_steps=warmup, lr_schedule=decay, lr_decay_fraction=fraction, min_lr_ratio=end)
        at = np.arange(30) if steps < 30 else np.r_[0, 499, 999:1002, np.linspace(1002, steps, 25).astype(int)]
        fractions = jax.jit(make_schedule(settings, steps))(at)
        np.testing.assert_allclose(fractions, [expected(step) for step in at], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_second_schedule_equals_its_closed_form(decay):
    warmup, restart, steps, peak, end = 3, 20, 33, 0.4, 0.1
    c = OptimizerConfig(lr_schedule=decay, warmup_steps=warmup, lr_decay_fraction=0.5, min_lr_ratio=end)
    again = replace(c, lr_restart_step=restart, lr_restart_ratio=peak)

    def second(step):
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        t = max(0, step - 8) / 5  # the fall takes half of the 10 steps after the warm-up
        return end + (peak - end) * ((1 + math.cos(math.pi * t)) / 2 if decay == "cosine" else 1 - t)

    fractions = jax.jit(make_schedule(again, steps))(np.arange(steps))
    np.testing.assert_allclose(fractions[:restart], make_schedule(c, restart)(np.arange(restart)), rtol=1e-6)
    np.testing.assert_allclose(fractions[restart:], [second(step) for step in range(steps - restart)], rtol=1e-5)


def test_a_name_without_a_function_raises(monkeypatch):
    """As when a schedule or an optimizer is added to the names in config.py alone."""
    assert tuple(optimizer.SCHEDULES) == jaxlm.config.LR_SCHEDULES
    assert tuple(optimizer.OPTIMIZERS) == jaxlm.config.OPTIMIZERS
    monkeypatch.setattr(jaxlm.config, "check_values", lambda group, prefix: None)
    with pytest.raises(KeyError, match="inverse"):
        make_schedule(OptimizerConfig(lr_schedule="inverse"), 10)
    with pytest.raises(KeyError, match="lion"):
        make_optimizer(replace(CONFIG, optimizer=OptimizerConfig(name="lion", warmup_steps=2)))


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_a_parameter_that_is_not_in_the_table_raises(config):
    params = draw(0)
    params["blocks"]["gain"] = np.ones((2, 6), np.float32)
    init, step = make_optimizer(config)
    state = jax.eval_shape(init, draw(0))
    with pytest.raises(ValueError, match="gain"):
        jax.eval_shape(step, params, state, params)


def test_adamw_equals_its_definition():
    params, c = draw(0), CONFIG.optimizer
    gradients = [draw(step, scale) for step, scale in enumerate([0.01, 3.0, 0.05, 0.001, 1.0], start=1)]
    history, state = after_each_step(CONFIG, params, gradients)

    p = named_leaves(params)
    m, v = ({name: np.zeros_like(leaf) for name, leaf in p.items()} for _ in range(2))
    for step, gradient in enumerate(gradients):
        norm = global_norm(gradient)
        for name, g in named_leaves(gradient).items():
            clipped = g * min(1, c.clip_norm / norm)
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.95 * v[name] + 0.05 * clipped**2
            m_hat, v_hat = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            decay = 0 if name.endswith("norm") else 0.5 * p[name]
            p[name] = p[name] - 0.01 * LR_FRACTIONS[step] * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay)
            np.testing.assert_allclose(history[step][name], p[name], rtol=0, atol=2e-6, err_msg=f"{name}, step {step}")
    assert norm > 2 * c.clip_norm
    assert float(optax.tree_utils.tree_get(state, "grad_norm")) == pytest.approx(norm, rel=1e-5)  # before clipping


def test_the_update_ratios_are_those_of_the_parameters_before_and_after():
    """Of each kind, by Euclidean norms in float64, and 0 where no update is due."""
    config = replace(WHOLE_RECIPE, grad_accum_steps=2)
    init, step = compiled(config)
    params, kinds = draw(0), {"/".join(path): entry.kind for path, entry in by_path(config.model).items()}
    state, average = init(params), average_start(config, params)
    for number in range(1, 7):
        after, state, average, ratios = step(draw(number), state, params, average)
        before, moved = named_leaves(params), named_leaves(after)
        for kind in ("matrix", "embedding", "norm_scale"):
            names = [name for name in before if kinds[name] == kind]
            update = math.sqrt(sum(np.sum((moved[name] - before[name]) ** 2) for name in names))
            weights = math.sqrt(sum(np.sum(before[name] ** 2) for name in names))
            assert float(ratios[kind]) == pytest.approx(update / weights, rel=1e-4), (number, kind)
            assert (ratios[kind] > 0) == (number % 2 == 0)
        params = after
    assert len(ratios) == 3


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_a_zero_gradient_decays_all_but_norm_scales(config):
    [after], _ = after_each_step(config, draw(0), [draw(0, scale=0.0)])
    for name, before in named_leaves(draw(0)).items():
        peak_lr = 0.03 if config is MUON and "blocks" in name else 0.01
        decay = 0.3 if config is MUON and "blocks" in name else 0.5
        factor = 1.0 if name.endswith("norm") else 1 - peak_lr / 3 * decay
        np.testing.assert_allclose(after[name], before * factor, rtol=0 if name.endswith("norm") else 1e-6)


def expected_steps(config, params, gradients):
    """All optimizer steps in float64, by the definitions: the parameters after each, by name."""
    c = config.optimizer
    table = {"/".join(path): parameter for path, parameter in by_path(config.model).items()}
    p = named_leaves(params)
    m, v = ({name: np.zeros_like(leaf) for name, leaf in p.items()} for _ in range(2))
    history = []
    for step, gradient in enumerate(gradients):
        norm = global_norm(gradient)
        for name, g in named_leaves(gradient).items():
            g = g * min(1, c.clip_norm / norm)
            if by_muon := table[name].optimizer == "muon":
                momentum = c.muon_momentum
                if step < c.muon_momentum_warmup:
                    momentum = 0.85 + (c.muon_momentum - 0.85) * step / c.muon_momentum_warmup
                m[name] = g + momentum * m[name]
                u = np.stack([float64_muon(g + momentum * m) for g, m in zip(g, m[name], strict=True)])
                if c.muon_b2:
                    u, v[name] = float64_normuon(u, v[name], c.muon_b2)
            else:
                m[name] = c.b1 * m[name] + (1 - c.b1) * g
                v[name] = c.b2 * v[name] + (1 - c.b2) * g**2
                u = m[name] / (1 - c.b1 ** (step + 1)) / (np.sqrt(v[name] / (1 - c.b2 ** (step + 1))) + 1e-8)
            decay = c.muon_weight_decay if by_muon else c.weight_decay * (not name.endswith("norm"))
            decayed = (np.sign(u) * np.sign(p[name]) >= 0) | (not c.cautious)
            lr = (c.muon_learning_rate if by_muon else c.learning_rate) * LR_FRACTIONS[step]
            p[name] = p[name] - lr * (u + decay * decayed * p[name])
        history.append(dict(p))
    return history


def float64_muon(m):
    """Jordan's quintic polynomial of the singular values, five times; the singular vectors stay."""
    left, values, right = np.linalg.svd(m, full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right * 0.2 * math.sqrt(max(m.shape))


def float64_normuon(u, v, b2):
    """One output at a time: u, and v with the same number for all inputs of an output."""
    new_u, new_v = np.empty_like(u), np.empty_like(v)
    for layer in range(len(u)):
        for output in range(u.shape[2]):
            new_v[layer, :, output] = b2 * v[layer, :, output] + (1 - b2) * np.mean(u[layer, :, output] ** 2)
            new_u[layer, :, output] = u[layer, :, output] / np.sqrt(new_v[layer, 0, output])
        new_u[layer] *= np.linalg.norm(u[layer]) / np.linalg.norm(new_u[layer])
    return new_u, new_v


def test_the_whole_recipe_equals_its_definition():
    """Momentum's warm-up, NorMuon, cautious decay, both optimizers' rates, clipping, the schedule and the average."""
    params = draw(0)
    gradients = [draw(step, scale) for step, scale in enumerate([0.01, 3.0, 0.05, 0.02, 1.0, 0.3], start=1)]
    init, step = compiled(WHOLE_RECIPE)
    actual, state, average = params, init(params), average_start(WHOLE_RECIPE, params)
    expected = expected_steps(WHOLE_RECIPE, params, gradients)
    for count, gradient in enumerate(gradients, start=1):
        before = named_leaves(actual)
        actual, state, average, _ = step(gradient, state, actual, average)
        after = named_leaves(actual)
        allowed = {name: 2e-3 * np.abs(leaf - before[name]).max() for name, leaf in after.items()}
        for name, leaf in after.items():
            np.testing.assert_allclose(leaf, expected[count - 1][name], atol=allowed[name], rtol=0, err_msg=name)
        weights = np.array([0.7 ** (count - i) for i in range(1, count + 1)])
        for name, leaf in named_leaves(averaged(actual, average)).items():
            mean = np.tensordot(weights / weights.sum(), np.stack([each[name] for each in expected[:count]]), 1)
            np.testing.assert_allclose(leaf, mean, atol=allowed[name], rtol=0, err_msg=f"average of {name}")


def test_without_the_new_settings_muon_equals_its_definition():
    gradients = [draw(step, scale) for step, scale in enumerate([0.01, 3.0, 0.05], start=1)]
    history, _ = after_each_step(MUON, draw(0), gradients)
    for actual, expected in zip(history, expected_steps(MUON, draw(0), gradients), strict=True):
        for name, leaf in actual.items():
            np.testing.assert_allclose(leaf, expected[name], atol=1e-4, rtol=0, err_msg=name)


def test_neurons_get_updates_of_one_size_and_the_norm_stays():
    rng = np.random.default_rng(0)
    u = np.float32(rng.normal(size=(3, 8, 5)) * np.geomspace(1, 1e-3, 5))
    u[1, :, 2], u[2] = 0, 0
    transformation = normalize_neurons(0.95)
    out, state = jax.jit(transformation.update)({"a": u}, transformation.init({"a": u}))
    assert state.nu["a"].shape == (3, 1, 5)
    sizes, norms = np.linalg.norm(out["a"], axis=1), np.linalg.norm(u, axis=(1, 2))
    np.testing.assert_allclose(np.linalg.norm(out["a"], axis=(1, 2)), norms, rtol=1e-5)
    np.testing.assert_allclose(sizes[0], norms[0] / math.sqrt(5), rtol=1e-5)
    np.testing.assert_allclose(sizes[1], norms[1] / math.sqrt(4) * np.array([1, 1, 0, 1, 1]), rtol=1e-5)
    assert not sizes[2].any()


def test_cautious_decay_moves_no_weight_away_from_the_update():
    p, u = np.float32([[2, -2, 2, -2, 0]]), np.float32([[1, -1, -1, 1, 1]])  # an update is subtracted
    transformation = cautious_decay(0.5, {"a": True, "b": False})
    out, _ = transformation.update({"a": u, "b": u}, transformation.init({"a": p, "b": p}), {"a": p, "b": p})
    np.testing.assert_array_equal(out["a"], [[2, -2, -1, 1, 1]])
    np.testing.assert_array_equal(out["b"], u)


@pytest.mark.parametrize("decay", [0.5, 0.98, 0.999])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0])
def test_the_average_in_float16_is_that_in_float64(decay, size):
    """Over a random walk that drifts and comes to rest, as weights do under a schedule."""
    rng, steps = np.random.default_rng(0), 400
    update = jax.jit(average_step, static_argnums=0)
    weights = rng.normal(size=2000)
    total = np.zeros(2000)
    average, direction = np.zeros(2000, np.float16), rng.normal(size=2000)
    for count in range(1, steps + 1):
        updates = np.float32(size * (rng.normal(size=2000) + 0.3 * direction) * (1 - (count - 1) / steps))
        weights = weights + updates
        total = decay * total + (1 - decay) * weights
        average = update(decay, np.int32(count - 1), average, updates)
        difference = total / (1 - decay**count) - weights
        error = np.float64(average) / 256 - difference
        assert np.sqrt(np.mean(error**2)) < 3e-3 * np.sqrt(np.mean(difference**2)) + 2e-9, count
        assert abs(np.mean(error)) < 2e-4 * np.sqrt(np.mean(difference**2)) + 2e-9, count
    assert average.dtype == np.float16


def test_the_first_average_is_the_first_weights_and_it_stays_finite():
    zeros, updates = np.zeros(3, np.float16), np.float32([1e-3, 1.0, 1e6])
    first = average_step(0.98, np.int32(0), zeros, updates)
    assert not first.any()
    second = np.float64(average_step(0.98, np.int32(1), first, updates)) / 256
    np.testing.assert_allclose(second[:2], -updates[:2] * 0.98 / 1.98, rtol=1e-3)
    assert second[2] == -65504 / 256
    assert averaged({"a": updates}, None)["a"] is updates


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), *(pytest.param(s, marks=SLOW) for s in ((16, 16), (1, 5)))])
def test_newton_schulz_equalises_singular_values_and_keeps_the_vectors(shape):
    rng = np.random.default_rng(0)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    for smallest in (1.0, 0.1, 0.01):
        values = np.geomspace(1, smallest, min(shape))
        matrix = np.float32(left * values @ right * 10.0 ** rng.uniform(-4, 4))
        out = np.asarray(jax.jit(newton_schulz)(matrix[None])[0])
        assert out.shape == shape
        core = left.T @ out @ right.T
        assert (np.diag(core) > 0.65).all()
        assert (np.diag(core) < 1.21).all()
        np.testing.assert_allclose(core - np.diag(np.diag(core)), 0, atol=2e-4)
        np.testing.assert_allclose(out, left @ core @ right, atol=2e-4)
    assert not jax.jit(newton_schulz)(np.zeros((1, *shape), np.float32)).any()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_newton_schulz_in_bfloat16_is_close(shape):
    matrices = np.float32(np.random.default_rng(0).normal(size=(1, *shape)))
    out, exact = (jax.jit(newton_schulz, static_argnums=1)(matrices, dtype) for dtype in ("bfloat16", "float32"))
    assert out.dtype == np.float32
    assert 1e-4 < np.linalg.norm(out - exact) / np.linalg.norm(exact) < 0.04


def test_muon_follows_nesterov_momentum_with_the_rms_of_adam():
    gradients = [draw(1, UNCLIPPED), draw(2, UNCLIPPED)]
    for gradient in gradients:
        gradient["blocks"]["up"][0] *= 1e-3  # each layer is scaled by itself
    (first, second), _ = after_each_step(MUON, draw(0), gradients)
    previous, current = map(named_leaves, gradients)
    matrices = [name for name, leaf in first.items() if leaf.ndim == 3]
    assert len(matrices) == 7
    for name in matrices:
        lr = 0.03 * LR_FRACTIONS[1]
        updates = second[name] - first[name] * (1 - lr * 0.3)
        directions = current[name] + 0.9 * (current[name] + 0.9 * previous[name])
        for update, direction in zip(updates, directions, strict=True):
            assert np.sqrt(np.mean(update**2)) == pytest.approx(0.2 * lr, rel=0.3)
            left, _, right = np.linalg.svd(-direction, full_matrices=False)
            core = left.T @ update @ right.T / (lr * 0.2 * math.sqrt(max(direction.shape)))
            assert (np.diag(core) > 0.3).all()
            np.testing.assert_allclose(core - np.diag(np.diag(core)), 0, atol=1e-3)


def test_muon_updates_embedding_and_norm_scales_by_adamw():
    gradients = [draw(1, UNCLIPPED), draw(2, UNCLIPPED)]
    (_, adamw), (_, muon) = (after_each_step(config, draw(0), gradients)[0] for config in (CONFIG, MUON))
    same = {name for name in adamw if np.array_equal(adamw[name], muon[name])}
    assert same == {"embedding", "norm", "blocks/attention_norm", "blocks/mlp_norm"}


@pytest.mark.parametrize(
    ("every", "implementation"),
    [(3, "xla"), (1, "apple"), pytest.param(1, "xla", marks=SLOW), pytest.param(3, "apple", marks=SLOW)],
)
def test_multi_steps_equals_that_of_optax(every, implementation):
    """After each of eight gradients, two of them not finite, the state and the parameters are the same."""
    inner = optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(lambda step: 0.1 / (step + 1)))
    ours = multi_steps(inner, every, ops.get(implementation).cond)
    reference = optax.MultiSteps(inner, every, should_skip_update_fn=optax.skip_not_finite)
    rng = np.random.default_rng(0)
    params, *gradients = [
        {"a": np.float32(rng.normal(size=3)), "b": np.float32(rng.normal(size=(2, 3)))} for _ in range(9)
    ]
    gradients[1]["a"][2], gradients[4]["b"][0, 0] = np.nan, np.inf
    actual, expected = (params, jax.jit(ours.init)(params)), (params, jax.jit(reference.init)(params))
    step, update = jax.jit(ours.step), jax.jit(reference.update)
    assert ("stablehlo.case" in step.lower(gradients[0], *actual[::-1]).as_text()) == (implementation == "xla")
    for gradient in gradients:
        *actual, average, _ = step(gradient, actual[1], actual[0])
        assert average is None
        updates, state = update(gradient, expected[1], expected[0])
        expected = jax.tree.map(np.add, expected[0], updates), state
        assert (actual[1].mini_step, actual[1].gradient_step) == (state.mini_step, state.gradient_step)
        assert bool(actual[1].skip_state["should_skip"]) == bool(state.skip_state["should_skip"])
        acc_grads = () if every == 1 else state.acc_grads
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            (actual[0], actual[1].inner_opt_state, actual[1].acc_grads),
            (expected[0], state.inner_opt_state, acc_grads),
        )
    assert int(actual[1].gradient_step) == 6 // every


def test_an_apple_gpu_gets_an_optimizer_without_branches():
    for implementation in ("xla", "apple"):
        init, step = make_optimizer(replace(CONFIG, model=replace(CONFIG.model, implementation=implementation)))
        jaxpr = str(jax.make_jaxpr(step)(draw(1), jax.eval_shape(init, draw(0)), draw(0)))
        assert ("cond[" in jaxpr) == (implementation == "xla")


def test_a_gradient_whose_norm_overflows_is_skipped():
    init, step = map(jax.jit, multi_steps(optax.sgd(1.0), 1))
    params = {"a": np.ones(2, np.float32)}
    after, state, *_ = step({"a": np.full(2, 1e20, np.float32)}, init(params), params)
    np.testing.assert_array_equal(after["a"], params["a"])
    assert (int(state.gradient_step), bool(state.skip_state["should_skip"])) == (0, True)


def test_clipping_equals_that_of_optax():
    gradient = {"a": np.float32([3, -4]), "b": np.float32([[12], [0]])}
    clip = jax.jit(lambda norm: optimizer.clip_by_global_norm(norm).update(gradient, optax.EmptyState())[0])
    reference = jax.jit(lambda norm: optax.clip_by_global_norm(norm).update(gradient, optax.EmptyState())[0])
    for norm in (1e-3, 2.0, 1e9):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clip(norm), reference(norm))
