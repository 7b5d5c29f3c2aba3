"""The fused GPU kernels, interpreted, against the plain functions that they stand for; and where they are chosen."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.core import layers, loss
from jaxlm.core.model import init_params, loss_and_gradient
from jaxlm.core.ops import hopper
from jaxlm.device import backend
from jaxlm.errors import UsageError

pytestmark = pytest.mark.usefixtures("optimized_compilation")

ROUNDING = 2**-8  # of bfloat16; what one result of one product may be off by


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the kernels on the CPU."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("jax interprets such kernels from 0.11 on")
    import jax.experimental.pallas.mosaic_gpu as plgpu

    kernel = functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(plgpu, "kernel", kernel)


def draw(*shape, scale=1.0, seed=0):
    values = np.random.default_rng([seed, *shape]).normal(0, scale, shape)
    return jnp.asarray(values, jnp.bfloat16).astype(jnp.float32)


def off_by(found, expected):
    found, expected = np.float64(found), np.float64(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(("N", "D", "F"), [(256, 64, 64), (512, 128, 192)])
def test_swiglu_and_its_gradients(interpreted, N, D, F):
    x, d_out = draw(N, D), draw(N, D, seed=1)
    weights = draw(D, F, scale=0.1), draw(D, F, scale=0.1, seed=1), draw(F, D, scale=0.1)
    found, pull = jax.vjp(hopper.swiglu, x.astype(jnp.bfloat16), *weights)

    def swiglu(x, gate, up, down):
        return layers.swiglu_activation(x @ gate, x @ up) @ down

    expected, exact_pull = jax.vjp(swiglu, x, *weights)
    gradients = pull(d_out.astype(jnp.bfloat16))
    assert [g.dtype for g in gradients] == [jnp.bfloat16, *[jnp.float32] * 3]
    for a, b in zip((found, *gradients), (expected, *exact_pull(d_out)), strict=True):
        assert off_by(a, b) < ROUNDING


@pytest.mark.parametrize(("N", "V"), [(1, 257), (300, 300), (1100, 512)])
def test_cross_entropy_and_its_gradients(interpreted, N, V):
    x, embedding = draw(N, 64), draw(V, 64, scale=0.3)
    targets = jnp.asarray(np.random.default_rng(N).integers(0, V, N)).at[1::4].set(-1)

    def run(function, x):
        return jax.value_and_grad(lambda *a: -0.3 * function(*a, targets), (0, 1))(x, embedding)

    found, (by_x, by_embedding) = run(hopper.cross_entropy, x.astype(jnp.bfloat16))
    expected, exact = run(lambda *a: loss.cross_entropy(*a, jnp.float32), x)
    assert (by_x.dtype, by_embedding.dtype) == (jnp.bfloat16, jnp.float32)
    assert by_embedding.shape == embedding.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert off_by(by_x, exact[0]) < ROUNDING
    assert off_by(by_embedding, exact[1]) < ROUNDING
    assert not by_x[targets < 0].any()


def test_a_certain_and_a_hopeless_prediction(interpreted):
    embedding = jnp.eye(257, 64) * 40
    x = jnp.eye(64, dtype=jnp.bfloat16)[:2] * 4
    for targets, expected in (([0, 1], 0.0), ([1, 0], 2 * hopper.FURTHEST)):
        value, by_x = jax.value_and_grad(hopper.cross_entropy)(x, embedding, jnp.asarray(targets))
        np.testing.assert_allclose(value, expected, atol=1e-4)
        assert np.isfinite(by_x).all()


def test_a_model_with_kernels_is_the_plain_one(interpreted):
    sizes = {"vocab_size": 257, "context": 64, "layers": 2, "heads": 2, "width": 64, "mlp_width": 64}
    plain = ModelConfig(**sizes, precision="bf16", attention="plain", kernels="plain", remat=False)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 257, (4, 65)))
    params = init_params(plain, jax.random.key(0))
    total = jax.tree.map(jnp.ones_like, params)

    def run(model):
        run = jax.jit(functools.partial(loss_and_gradient, model))  # eager, it was seen to wait for itself
        return jax.block_until_ready(run(params, ids[:, :-1], ids[:, 1:], -0.5, total))

    (found, gradients), (expected, exact) = (
        run(replace(plain, kernels="fused")),
        run(replace(plain, precision="float32")),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    for a, b in zip(*map(jax.tree.leaves, (gradients, exact)), strict=True):
        assert off_by(a - 1, b - 1) < 8 * ROUNDING


HOPPER = SimpleNamespace(platform="gpu", compute_capability="9.0")
AMPERE = SimpleNamespace(platform="gpu", compute_capability="8.0")
CPU = SimpleNamespace(platform="cpu")


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        (HOPPER, {}, "fused"),
        (HOPPER, {"kernels": "plain"}, "plain"),
        (HOPPER, {"precision": "float32"}, "plain"),
        (HOPPER, {"width": 96, "heads": 4}, "plain"),
        (HOPPER, {"mlp_width": 96}, "plain"),
        (AMPERE, {}, "plain"),
        (CPU, {}, "plain"),
    ],
)
def test_kernels_are_chosen_where_they_fit(monkeypatch, device, settings, expected):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert backend.resolve(ModelConfig(**settings), device).kernels == expected


@pytest.mark.parametrize(("device", "version"), [(AMPERE, (0, 11, 2)), (CPU, (0, 11, 2)), (HOPPER, (0, 10, 2))])
def test_kernels_asked_for_where_they_do_not_fit(monkeypatch, device, version):
    monkeypatch.setattr(jax, "__version_info__", version)
    with pytest.raises(UsageError, match="kernels fused needs"):
        backend.resolve(ModelConfig(kernels="fused"), device)
