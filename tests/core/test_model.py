"""The decoder compared with a forward pass in float64, and how its parameters are drawn."""

import functools
import hashlib
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.core.decoder import Decoder, approx_normal_init, init_params
from jaxlm.core.model import loss_and_gradient, parameter_count
from tests.core import float64

IDS = np.random.default_rng(1).integers(0, 257, (2, 7))


@functools.cache
def fresh(**settings):
    """A model as training starts it."""
    sizes = {"vocab_size": 512, "layers": 3, "width": 64, "heads": 2, "mlp_width": 96, "tied": False}
    config = ModelConfig(**sizes | settings, precision="float32")
    return config, init_params(config, jax.random.key(0))


@pytest.mark.parametrize("model", ["small_model", "small_shared_model", "small_qk_norm_model"])
def test_logits_and_loss_equal_the_float64_forward_pass(request, model):
    config, params = request.getfixturevalue(model)
    targets = np.roll(IDS, 3, axis=1)
    targets[0, 2] = -1

    @jax.jit
    def logits_and_loss(params):
        run = functools.partial(Decoder(config).apply, {"params": params}, IDS)
        return run(), run(targets, method="loss")

    logits, loss = logits_and_loss(params)
    assert logits.dtype == jnp.float32
    expected = np.array([float64.logits(params, ids, config) for ids in IDS])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, float64.loss(params, IDS, targets, config), rtol=1e-5)


@pytest.mark.slow
def test_each_position_depends_on_every_earlier_input_and_on_no_later_one(small_model):
    config, params = small_model
    ids = np.array([[5, 200, 17, 0, 256, 31, 8]])
    direction = np.random.default_rng(0).normal(size=config.width).astype(np.float32)

    def outputs(embedding):
        hidden = Decoder(config).apply({"params": params | {"embedding": embedding}}, ids, method="final_hidden")
        return hidden[0] @ direction

    jacobian_TVD = jax.jit(jax.jacrev(outputs))(params["embedding"])
    by_input_TT = np.abs(jacobian_TVD[:, ids[0]]).max(axis=-1)
    assert (by_input_TT[np.triu_indices(7, 1)] == 0).all()
    assert (by_input_TT[np.tril_indices(7)] > 1e-4).all()


def test_preset_has_59294720_parameters():
    sizes = jax.eval_shape(lambda: init_params(ModelConfig(), jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(sizes)) == 59_294_720
    assert parameter_count(sizes) == 59_294_720
    assert {leaf.dtype for leaf in jax.tree.leaves(sizes)} == {jnp.dtype("float32")}


def test_default_model_is_the_preset():
    assert ModelConfig() == ModelConfig(
        vocab_size=50_257,
        context=1024,
        layers=8,
        heads=8,
        width=512,
        mlp_width=2048,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        qk_norm=False,
        tied=True,
        output_init="scaled",
    )


LARGE = {"vocab_size": 50_257, "layers": 8, "width": 128, "tied": True}


@pytest.mark.parametrize("settings", [{}, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["small", "large"])
def test_loss_of_a_fresh_model_is_that_of_guessing(settings):
    config, params = fresh(**settings)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 65))
    loss = float64.loss(params, ids[:, :-1], ids[:, 1:], config) / 64
    assert loss == pytest.approx(math.log(config.vocab_size), rel=0.02)


@functools.cache
def jitted(config):
    return jax.jit(functools.partial(loss_and_gradient, config))


@pytest.fixture(scope="module")
def loss_and_gradients(small_model):
    _, params = small_model

    @functools.cache
    def of(config):
        return jitted(config)(params, IDS[:, :-1], IDS[:, 1:], 1.0, jax.tree.map(jnp.zeros_like, params))

    return of


@pytest.mark.parametrize(
    "model", ["small_model", pytest.param("small_shared_model", marks=pytest.mark.slow), "small_qk_norm_model"]
)
def test_scaled_gradients_of_the_loss_are_added_to_the_accumulator(request, model):
    config, params = request.getfixturevalue(model)
    batch = IDS[:, :-1], IDS[:, 1:]
    accumulator = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), params)
    loss_sum, accumulated = jitted(config)(params, *batch, -0.5, accumulator)
    assert loss_sum == pytest.approx(float64.loss(params, *batch, config), rel=1e-5)
    leaves, tree = jax.tree.flatten(params)
    added = jax.tree.leaves(jax.tree.map(np.subtract, accumulated, accumulator))
    for index, leaf in enumerate(leaves):
        direction = np.random.default_rng(index).normal(size=leaf.shape)

        def loss_at(distance, index=index, direction=direction):
            moved = [*leaves[:index], np.float64(leaves[index]) + distance * direction, *leaves[index + 1 :]]
            return float64.loss(jax.tree.unflatten(tree, moved), *batch, config)

        slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
        tolerance = 1e-4 * np.linalg.norm(added[index]) * np.linalg.norm(direction)
        assert abs(slope) > 10 * tolerance
        assert np.sum(added[index] * direction) == pytest.approx(-0.5 * slope, abs=tolerance)


def test_remat_saves_less(small_model):
    without, with_remat = (replace(small_model[0], remat=remat) for remat in (False, True))

    def saved(config):
        def hidden(params, ids):
            return Decoder(config).apply({"params": params}, ids, method="final_hidden")

        ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)
        backward = jax.eval_shape(lambda p, i: jax.vjp(lambda p: hidden(p, i), p)[1], small_model[1], ids)
        return parameter_count(backward)

    assert saved(with_remat) < saved(without) / 4


OTHERS = [("cpu", True), ("cuda", False), ("apple", True), ("xla", False)]


@pytest.mark.parametrize(
    ("implementation", "remat"),
    [("apple", False), *(pytest.param(*settings, marks=pytest.mark.slow) for settings in OTHERS)],
)
def test_every_implementation_computes_the_same(small_model, loss_and_gradients, implementation, remat):
    """With remat and without. The record of a Hopper GPU is tested in ops/test_hopper.py."""
    config, _ = small_model
    other = loss_and_gradients(replace(config, implementation=implementation, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), other, loss_and_gradients(config))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("bf16_matmul", marks=pytest.mark.slow)])
@pytest.mark.parametrize("remat", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_bfloat16_computes_the_same_to_its_rounding(small_model, loss_and_gradients, precision, remat):
    config, _ = small_model
    loss, gradients = loss_and_gradients(replace(config, precision=precision, remat=remat))
    exact_loss, exact_gradients = loss_and_gradients(config)
    assert loss == pytest.approx(float(exact_loss), rel=0.01)
    for found, exact in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact_gradients), strict=True):
        assert found.dtype == jnp.float32
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 0.03


@pytest.mark.parametrize(
    ("implementation", "precision"),
    [
        ("apple", "bf16"),
        *(pytest.param("cpu", precision, marks=pytest.mark.slow) for precision in ("float32", "bf16", "bf16_matmul")),
        *(pytest.param("apple", precision, marks=pytest.mark.slow) for precision in ("float32", "bf16_matmul")),
    ],
)
def test_norms_of_queries_and_keys_without_remat(small_qk_norm_model, implementation, precision):
    """Compared with remat, and plain operations in float32."""
    config, params = small_qk_norm_model
    batch = IDS[:, :-1], IDS[:, 1:], 1.0, jax.tree.map(jnp.zeros_like, params)
    other = replace(config, implementation=implementation, precision=precision, remat=False)
    allowed = 1e-5 if precision == "float32" else 0.03
    loss, gradients = jitted(other)(params, *batch)
    exact_loss, exact_gradients = jitted(config)(params, *batch)
    assert loss == pytest.approx(float(exact_loss), rel=allowed)
    for found, exact in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact_gradients), strict=True):
        assert found.dtype == jnp.float32
        assert np.linalg.norm(found - exact) < allowed * np.linalg.norm(exact)


def test_norms_of_queries_and_keys_leave_what_else_is_drawn():
    drawn, other = fresh(qk_norm=True)[1], fresh()[1]
    norms = [drawn["blocks"].pop(name) for name in ("query_norm", "key_norm")]
    assert all((leaf == 1).all() and leaf.shape == (3, 32) for leaf in norms)
    jax.tree.map(np.testing.assert_array_equal, drawn, other)


def test_initial_spread_of_every_matrix():
    _, params = fresh()
    narrow = 0.02 / math.sqrt(2 * 3)
    stds = {"query": 0.02, "key": 0.02, "value": 0.02, "output": narrow, "gate": 0.02, "up": 0.02, "down": narrow}
    drawn = [(params["embedding"], 0.02), (params["head"], 0.02)]
    drawn += [(layer, std) for name, std in stds.items() for layer in params["blocks"][name]]
    for values, std in drawn:
        assert abs(np.mean(values)) < 0.05 * std
        assert np.std(values) == pytest.approx(std, rel=0.05)
        assert np.mean(np.abs(values) > 2 * std) == pytest.approx(0.0455, abs=0.01)
    first_rows = {tuple(np.round(values[0] / std, 4).tolist()) for values, std in drawn}
    assert len(first_rows) == len(drawn) == 2 + 7 * 3
    for scale in (params["norm"], params["blocks"]["attention_norm"], params["blocks"]["mlp_norm"]):
        assert (np.asarray(scale) == 1).all()


@pytest.mark.slow
def test_zero_initialised_outputs_leave_the_stream_alone():
    blocks, scaled = fresh(output_init="zero")[1]["blocks"], fresh()[1]["blocks"]
    for name in blocks:
        expected = 0 if name in ("output", "down") else scaled[name]
        np.testing.assert_array_equal(blocks[name], np.broadcast_to(expected, scaled[name].shape))


def test_a_parameter_is_a_sum_of_random_bytes_rounded_once():
    key, std = jax.random.key(3), 0.02 / math.sqrt(6)
    words = np.array([jax.random.bits(one, (2, 5, 7), jnp.uint32) for one in jax.random.split(key, 4)])
    sums = words[..., None].view(np.uint8).sum(axis=(1, -1), dtype=np.int32)
    scale = std / math.sqrt(8 * np.arange(256).var())
    expected = np.float32(sums - 8 * np.arange(256).mean()) * np.float32(scale)
    np.testing.assert_array_equal(approx_normal_init(key, (4, 5, 7), std), expected)


def test_parameters_are_approximately_normal():
    draws = np.asarray(approx_normal_init(jax.random.key(1), (16, 1 << 14), 3.0), np.float64).ravel() / 3.0
    assert abs(draws.mean()) < 4 / len(draws) ** 0.5
    assert draws.std() == pytest.approx(1, rel=3e-3)
    assert np.mean(draws**3) == pytest.approx(0, abs=0.02)
    assert np.mean(draws**4) == pytest.approx(3 - 0.15, abs=0.03)
    assert abs(draws).max() < 4.9
    for bound in (-3, -2, -1, 0, 1, 2, 3):
        assert np.mean(draws < bound) == pytest.approx(math.erfc(-bound / 2**0.5) / 2, abs=4e-3)


def optimized():
    """`fresh`, compiled as in a run: the tests compile with few optimizations."""
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    config, key = fresh()[0], jax.random.key(0)
    return config, init_params.lower(config, key).compile(compiler_options=options)(key)


@pytest.mark.parametrize("draw", [fresh, pytest.param(optimized, marks=pytest.mark.slow)])
def test_a_seed_gives_the_same_parameters_on_every_version_of_jax_and_flax(draw):
    leaves = jax.tree.leaves(draw()[1])
    found = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    assert found == "5dc8fc76df14743f3d348ac66a00019ebfb0547a448f1ee23ee3436ee20f834b", (
        "Seed 0 draws other parameters than before: no run can be repeated by its seed."
        " If the change is intended, replace this hash; if not, find which"
        " setting or version of jax or flax changed (jaxlm/device/backend.py sets jax_threefry_partitionable)."
    )
