"""The kernels for Hopper GPUs, interpreted, compared with plain ones; and the devices that get them."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.core import layers, ops
from jaxlm.core.decoder import init_params
from jaxlm.core.model import loss_and_gradient
from jaxlm.core.ops import hopper, xla
from jaxlm.device import backend
from jaxlm.errors import UsageError
from tests.core import float64

ROUNDING = 2**-8  # of bfloat16: the largest relative error of one matmul


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


def relative_error(found, expected):
    found, expected = np.float64(found).ravel(), np.float64(expected).ravel()
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(("N", "D", "F"), [(256, 64, 64), pytest.param(512, 128, 192, marks=pytest.mark.slow)])
def test_swiglu_and_its_gradients(interpreted, N, D, F):
    x, d_out = draw(N, D), draw(N, D, seed=1)
    weights = draw(D, F, scale=0.1), draw(D, F, scale=0.1, seed=1), draw(F, D, scale=0.1)
    run = functools.partial(hopper.swiglu, hopper.HOPPER, matmul_dtype="bfloat16")
    found, vjp_fn = jax.vjp(run, x.astype(jnp.bfloat16).reshape(2, N // 2, D), *weights)

    def swiglu(x, gate, up, down):
        return layers.swiglu_activation(x @ gate, x @ up) @ down

    expected, exact_vjp = jax.vjp(swiglu, x, *weights)
    gradients = vjp_fn(d_out.astype(jnp.bfloat16).reshape(found.shape))
    assert [g.dtype for g in gradients] == [jnp.bfloat16, *[jnp.float32] * 3]
    for a, b in zip((found, *gradients), (expected, *exact_vjp(d_out)), strict=True):
        assert relative_error(a, b) < ROUNDING


@pytest.mark.parametrize(
    ("N", "V"), [(1, 257), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((300, 300), (1100, 512)))]
)
def test_cross_entropy_and_its_gradients(interpreted, N, V):
    x, embedding, accumulator = draw(N, 64), draw(V, 64, scale=0.3), draw(V, 64, seed=2)
    targets = jnp.asarray(np.random.default_rng(N).integers(0, V, N)).at[1::4].set(-1)

    def run(device_ops, x, dtype):
        return device_ops.cross_entropy_and_grad(device_ops, x, embedding, targets, -0.3, accumulator, dtype)

    found, by_x, by_embedding = run(hopper.HOPPER, x.astype(jnp.bfloat16), "bfloat16")
    expected, exact_by_x, exact_by_embedding = run(xla.XLA, x, "float32")
    alone = hopper.cross_entropy(hopper.HOPPER, x.astype(jnp.bfloat16), embedding, targets, "bfloat16")
    exact = float64.cross_entropy(np.float64(x), np.float64(embedding), np.asarray(targets))
    assert (by_x.dtype, by_embedding.dtype) == (jnp.bfloat16, jnp.float32)
    assert by_embedding.shape == embedding.shape
    np.testing.assert_allclose([found, alone, expected], exact, rtol=1e-5)
    assert relative_error(by_x, exact_by_x) < ROUNDING
    assert relative_error(by_embedding - accumulator, exact_by_embedding - accumulator) < ROUNDING
    assert not by_x[targets < 0].any()


@pytest.mark.slow
def test_a_certain_and_a_hopeless_prediction(interpreted):
    embedding = jnp.eye(257, 64) * 40
    x = jnp.eye(64, dtype=jnp.bfloat16)[:2] * 4
    for targets, expected in (([0, 1], 0.0), ([1, 0], 2 * hopper.MAX_LOGIT_GAP)):
        value, by_x, _ = hopper.cross_entropy_and_grad(
            hopper.HOPPER, x, embedding, jnp.asarray(targets), 1.0, jnp.zeros_like(embedding), "bfloat16"
        )
        np.testing.assert_allclose(value, expected, atol=1e-4)
        assert np.isfinite(by_x).all()


@pytest.mark.slow
def test_a_model_with_the_kernels_is_the_plain_one(monkeypatch, interpreted):
    monkeypatch.setitem(
        ops.IMPLEMENTATIONS, "hopper", replace(hopper.HOPPER, attention=xla.causal_attention)
    )  # no cuDNN
    sizes = {"vocab_size": 257, "context": 64, "layers": 2, "heads": 2, "width": 64, "mlp_width": 64}
    plain = ModelConfig(**sizes, precision="float32", implementation="xla", remat=False)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 257, (4, 65)))
    params = init_params(plain, jax.random.key(0))
    ones = jax.tree.map(jnp.ones_like, params)

    def run(model):
        run = jax.jit(functools.partial(loss_and_gradient, model))  # not eager: the interpreter could deadlock
        return jax.block_until_ready(run(params, ids[:, :-1], ids[:, 1:], -0.5, ones))

    found, gradients = run(replace(plain, precision="bf16", implementation="hopper"))
    expected, exact = run(plain)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    for a, b in zip(*map(jax.tree.leaves, (gradients, exact)), strict=True):
        assert relative_error(a - 1, b - 1) < 8 * ROUNDING


HOPPER = SimpleNamespace(platform="gpu", compute_capability="9.0")
AMPERE = SimpleNamespace(platform="gpu", compute_capability="8.0")
CPU = SimpleNamespace(platform="cpu")


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        (HOPPER, {}, "hopper"),
        (HOPPER, {"implementation": "cuda"}, "cuda"),
        (HOPPER, {"implementation": "xla"}, "xla"),
        (HOPPER, {"precision": "float32"}, "cuda"),
        (HOPPER, {"width": 96, "heads": 4}, "cuda"),
        (HOPPER, {"mlp_width": 96}, "cuda"),
        (AMPERE, {}, "cuda"),
        (CPU, {}, "cpu"),
        (CPU, {"implementation": "apple"}, "apple"),
        (SimpleNamespace(platform="tpu"), {}, "xla"),
    ],
)
def test_the_implementation_that_fits_is_chosen(monkeypatch, device, settings, expected):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert backend.resolve(ModelConfig(**settings), device).implementation == expected


@pytest.mark.parametrize(
    ("device", "version", "implementation"),
    [
        (AMPERE, (0, 11, 2), "hopper"),
        (CPU, (0, 11, 2), "hopper"),
        (HOPPER, (0, 10, 2), "hopper"),
        (CPU, (0, 11, 2), "cuda"),
    ],
)
def test_an_implementation_that_does_not_fit_is_refused(monkeypatch, device, version, implementation):
    monkeypatch.setattr(jax, "__version_info__", version)
    with pytest.raises(UsageError, match=f"implementation {implementation} needs"):
        backend.resolve(ModelConfig(implementation=implementation), device)
