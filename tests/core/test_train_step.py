"""The training step: what accumulates, what is skipped and what is reported."""

import functools
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import Config, ModelConfig, OptimizerConfig
from jaxlm.core.decoder import Decoder
from jaxlm.core.model import loss_and_gradient
from jaxlm.core.optimizer import make_optimizer
from jaxlm.core.train_step import init_state, make_eval_step, make_train_step
from tests.core import float64

LEARNING_RATE = 0.01
CONFIG = Config(
    batch_size=8,
    grad_accum_steps=4,
    max_steps=60,
    model=ModelConfig(
        vocab_size=257, context=8, layers=2, heads=2, width=16, mlp_width=24, precision="float32", remat=True
    ),
    optimizer=OptimizerConfig(
        learning_rate=LEARNING_RATE, muon_learning_rate=0.03, warmup_steps=3, clip_norm=10.0, average=0.5
    ),
)
WHOLE = replace(CONFIG, batch_size=32, grad_accum_steps=1, microbatch_chunks=4)
NAN, INF = 255, 256  # a micro-batch that holds one of these gives such a gradient, where `poisoned_step` is used


train_step = functools.cache(make_train_step)


def micro_batches(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 250, (count, size, 9)).astype(np.int32)


def run(step, state, batches):
    """Steps from a copy of the state, because the step donates it."""
    state, reports = jax.tree.map(jnp.copy, state), []
    for ids in batches:
        state, metrics = step(state, ids)
        reports.append(jax.device_get(metrics))
    return jax.device_get(state), reports


def whole_loss(params, ids):
    logits = Decoder(CONFIG.model).apply({"params": params}, ids[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def start():
    return init_state(CONFIG)


@pytest.fixture(scope="module")
def accumulated(start, poisoned_step):
    """Two optimizer steps of four micro-batches each: the last state and all metrics."""
    return run(poisoned_step, start, micro_batches(8))


@pytest.fixture(scope="module")
def poisoned_step(start):
    """A train step in which two ids make one number of the gradient non-finite and leave the rest alone."""

    def poisoned(config, params, inputs_BT, targets_BT, scale, accumulator):
        poison = jnp.where(jnp.any(inputs_BT == NAN), jnp.nan, jnp.where(jnp.any(inputs_BT == INF), jnp.inf, 0))
        loss_sum, grads = loss_and_gradient(config, params, inputs_BT, targets_BT, scale, accumulator)
        return loss_sum + poison, grads | {"embedding": grads["embedding"].at[0, 0].add(poison)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxlm.core.train_step.loss_and_gradient", poisoned)
        return make_train_step(CONFIG).lower(start, micro_batches(1)[0]).compile()


@pytest.mark.parametrize("chunks", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_batch_8_accumulated_4_times_is_batch_32_once(start, accumulated, chunks):
    step = train_step(replace(WHOLE, microbatch_chunks=chunks))
    state, reports = run(step, start, micro_batches(8).reshape(2, 32, 9))
    pairs = [(accumulated[1][3], reports[0]), (accumulated[1][7], reports[1])]
    for a, b in pairs:
        assert (a.updated, a.step, a.lr) == (b.updated, b.step, b.lr)
        np.testing.assert_allclose([a.loss, a.grad_norm], [b.loss, b.grad_norm], rtol=1e-5)

    def assert_close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())

    moments = [s.opt_state.inner_opt_state for s in (accumulated[0], state)]
    jax.tree.map(assert_close, *moments)
    for a, b, first in zip(*map(jax.tree.leaves, (accumulated[0].params, state.params, start.params)), strict=True):
        difference, moved = np.abs(a - b), np.abs(b - first)
        assert difference.max() < 1e-3 * LEARNING_RATE
        assert moved.max() > 0.3 * LEARNING_RATE


def test_loss_and_gradient_norm_are_means_over_the_step(start, accumulated):
    value, gradient = jax.jit(jax.value_and_grad(whole_loss))(start.params, micro_batches(8)[:4].reshape(32, 9))
    norm = math.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(gradient)))
    report = accumulated[1][3]
    assert report.loss == pytest.approx(float(value), rel=1e-5)
    assert report.grad_norm == pytest.approx(norm, rel=1e-4)


def test_steps_count_only_whole_ones(start, accumulated):
    state, reports = accumulated
    assert [bool(report.updated) for report in reports] == [False, False, False, True] * 2
    assert [int(report.step) for report in reports] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert (start.step, state.step, state.batches, state.loss_sum) == (0, 2, 8, 0)
    np.testing.assert_allclose([reports[3].lr, reports[7].lr], [LEARNING_RATE / 4, LEARNING_RATE / 2], rtol=1e-6)
    assert [int(report.skipped) for report in reports] == [0] * 8


@pytest.mark.parametrize("poison", [NAN, INF])
def test_nothing_advances_for_a_micro_batch_without_finite_gradients(start, poisoned_step, poison):
    good, bad = micro_batches(6), micro_batches(1, seed=1)[0]
    bad[3, 4] = poison
    for count in (0, 2, 4, 6):
        before, _ = run(poisoned_step, start, good[:count])
        after, [report] = run(poisoned_step, before, [bad])
        assert (int(after.batches), int(after.skipped_in_a_row)) == (count + 1, 1)
        assert (int(report.skipped), int(report.skipped_in_a_row), bool(report.updated)) == (1, 1, False)
        assert report.step == count // 4
        for name in ("mini_step", "gradient_step", "inner_opt_state", "acc_grads"):
            assert_equal(getattr(after.opt_state, name), getattr(before.opt_state, name))
        assert_equal((after.params, after.average, after.loss_sum), (before.params, before.average, before.loss_sum))


def test_the_average_advances_with_the_optimizer_steps_only(start, poisoned_step):
    good = micro_batches(12)
    states = [run(poisoned_step, start, good[:count])[0] for count in (4, 7, 8, 12)]
    weights = [np.float64(state.params["embedding"]) for state in states]
    averages = [np.float64(state.weights["embedding"]) for state in states]
    w1, _, w2, w3 = weights
    expected = (w1, w1, (w1 / 2 + w2) / 1.5, (w1 / 4 + w2 / 2 + w3) / 1.75)
    for average, mean in zip(averages, expected, strict=True):
        np.testing.assert_allclose(average, mean, atol=2e-3 * np.abs(w2 - w1).max())
    assert np.abs(averages[3] - w3).max() > 0.3 * np.abs(w3 - w2).max()


def test_a_run_with_skipped_micro_batches_is_the_run_that_never_saw_them(start, poisoned_step):
    good, bad = micro_batches(8), micro_batches(1, seed=1)[0]
    bad[0, 0] = NAN
    clean, clean_reports = run(poisoned_step, start, good)
    order = [bad, *good[:2], bad, bad, good[2], bad, *good[3:]]
    state, reports = run(poisoned_step, start, order)
    assert [int(report.skipped_in_a_row) for report in reports] == [1, 0, 0, 1, 2, 0, 1, 0, 0, 0, 0, 0]
    assert [int(report.skipped) for report in reports] == [1, 1, 1, 2, 3, 3, 4, 4, 4, 4, 4, 4]
    assert int(state.batches) == 12
    assert_equal(state._replace(batches=clean.batches), clean)
    for found, expected in zip([r for r in reports if r.updated], [r for r in clean_reports if r.updated], strict=True):
        assert_equal(found._replace(skipped=expected.skipped), expected)


def test_the_state_is_donated_buffer_by_buffer(start, poisoned_step):
    leaves = jax.tree.leaves(start)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    given = jax.tree.map(jnp.copy, start)
    taken, _ = poisoned_step(given, micro_batches(1)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given.params, given.opt_state.inner_opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(taken))


@pytest.mark.slow
def test_a_step_by_a_host_loop_is_the_step_on_the_device(start, accumulated):
    by_host = replace(CONFIG, microbatch_chunks=4, model=replace(CONFIG.model, implementation="apple"))
    state, reports = run(train_step(by_host), start, micro_batches(8))

    def assert_close(a, b, atol=0.0):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=atol or 1e-5 * np.abs(b).max())

    jax.tree.map(assert_close, (state.opt_state, reports), (accumulated[0].opt_state, accumulated[1]))
    jax.tree.map(partial(assert_close, atol=1e-3 * LEARNING_RATE), state.params, accumulated[0].params)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_training_learns_a_batch_by_heart(start, optimizer):
    config = replace(WHOLE, optimizer=replace(WHOLE.optimizer, name=optimizer))
    ids = np.tile(micro_batches(1)[0], (4, 1))
    fresh = start._replace(opt_state=make_optimizer(config).init(start.params))
    state, reports = run(train_step(config), fresh, [ids] * 50)
    assert reports[0].loss == pytest.approx(math.log(257), rel=0.02)
    assert reports[-1].loss < 1.5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_evaluation_sums_the_losses_of_all_targets(small_model):
    model, params = small_model
    ids = micro_batches(1)[0]
    targets = ids[:, 1:].copy()
    targets[2:4, 5:] = -1
    loss_sum = make_eval_step(replace(CONFIG, model=model))(params, ids[:, :-1], targets)
    assert loss_sum == pytest.approx(float64.loss(params, ids[:, :-1], targets, model), rel=1e-5)


def test_an_optimizer_may_start_from_other_numbers_than_zeros(monkeypatch):
    optimizer = make_optimizer(CONFIG)

    def init(params):
        opt_state = optimizer.init(params)
        return opt_state._replace(inner_opt_state=(opt_state.inner_opt_state, params))

    monkeypatch.setattr("jaxlm.core.train_step.make_optimizer", lambda *_: optimizer._replace(init=init))
    state = init_state(replace(CONFIG, max_steps=99))  # no other test traces this one
    copies = state.opt_state.inner_opt_state[1]
    for copy, leaf in zip(jax.tree.leaves(copies), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(copy, leaf)
        assert copy.unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()
