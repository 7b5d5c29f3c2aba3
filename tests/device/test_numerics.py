"""The soundness check: planted faults are caught and named, and what is sound passes.

The device that computes wrong is a stand-in: each operation of what it is given is run on its own, on the CPU, and the
result of one of them is damaged. What the check gives to the CPU runs as usual.
"""

import contextlib
import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.random import threefry2x32_p

from jaxlm.config import Config, ModelConfig, OptimizerConfig, SampleConfig
from jaxlm.core import model
from jaxlm.device import numerics
from jaxlm.device.numerics import Part, check, difference, refuse_wrong, require
from jaxlm.errors import RunError

CONFIG = Config(
    batch_size=4,
    microbatch_chunks=2,
    grad_accum_steps=3,
    max_steps=60,
    model=ModelConfig(vocab_size=700, context=20, layers=2, heads=2, width=16, mlp_width=24, precision="float32"),
    optimizer=OptimizerConfig(warmup_steps=3),
    sample=SampleConfig(texts=3, tokens=4),
)
UNROLLED = replace(CONFIG, model=replace(CONFIG.model, implementation="apple", remat=False))
CPU = jax.devices("cpu")[0]
STAND_IN = SimpleNamespace(platform="mps", device_kind="a stand-in", client=SimpleNamespace(platform_version="1"))
TOKENS = CONFIG.chunk_size * CONFIG.model.context  # that a weight's gradient is summed over


def forms(**model):
    return replace(CONFIG, model=replace(CONFIG.model, **model))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        forms(precision="bf16"),
        replace(
            forms(implementation="apple", remat=False, output_init="zero", tied=False, kv_heads=1),
            microbatch_chunks=1,
            grad_accum_steps=1,
            optimizer=OptimizerConfig("muon", warmup_steps=0),
        ),
    ],
    ids=["bfloat16", "unrolled, muon"],
)
def test_a_sound_device_passes_with_every_parameter_compared(config):
    parts = check(config, CPU)
    assert [part for part in parts if not part.ok] == []
    names = {part.name for part in parts}
    weights = ["embedding", "norm", *(f"blocks/{name}" for name in ("query", "down", "mlp_norm"))]
    weights += ["head"] * (not config.model.tied)
    assert names > {f"{what} of {name}" for what in ("gradient", "update") for name in weights}
    assert numerics.table(parts).count("\n") == len(parts)
    assert max(len(line) for line in numerics.table(parts).splitlines()) <= 80


@contextlib.contextmanager
def broken(primitive, damage):
    """One operation gives damage(result, operands, parameters) instead of its result."""
    sound = primitive.impl

    def impl(*operands, **parameters):
        result = sound(*operands, **parameters)
        return damage(result, operands, parameters)

    primitive.def_impl(impl)
    try:
        yield
    finally:
        primitive.def_impl(sound)


@pytest.fixture(scope="module")
def trained():
    return functools.cache(numerics._trained)


def failing(monkeypatch, trained, config, kind, primitive, damage):
    """The names of the parts that differ where the stand-in computes: of the random, sampling or training ones."""
    sound = numerics.compute

    def compute(function, device, *arguments):
        if device is not STAND_IN:
            return sound(function, device, *arguments)
        with jax.disable_jit(), broken(primitive, damage):
            return sound(function, CPU, *arguments)

    monkeypatch.setattr(numerics, "_trained", trained)
    # flax draws the parameters that it is given once more, to see their shapes: not jitted, row by row
    monkeypatch.setattr(model, "approx_normal_init", lambda key, shape, std: jnp.zeros(shape))
    for other in {"random", "sampling", "training"} - {kind}:
        monkeypatch.setattr(numerics, f"_{other}", lambda *_: ())
    monkeypatch.setattr(numerics, "compute", compute)
    return {part.name for part in check(config, STAND_IN) if not part.ok}


def unharmed(result, operands, parameters):
    return result


def product_over_many(result, operands, parameters):
    """As on M1 and M2: numbers behind the operands are added, where so many are contracted."""
    (axes, _), _ = parameters["dimension_numbers"]
    many = np.prod([operands[0].shape[axis] for axis in axes]) >= TOKENS
    return result + 0.01 if many else result


def one_row_of_a_product(result, operands, parameters):
    return result.at[-1].multiply(0.5) if result.shape == (CONFIG.model.width, CONFIG.model.mlp_width) else result


def sum_of_many(result, operands, parameters):
    """A sum over as many numbers as there are tokens loses the last."""
    (array,), axes = operands, parameters["axes"]
    many = array.shape[:1] == (TOKENS,) and axes == (0,)
    return result - array[-1] if many else result


def random_stream(result, operands, parameters):
    first, second = result
    return [first.at[..., -1].set(first[..., -1] ^ 1), second] if first.size > 1000 else result


def order(result, operands, parameters):
    return [array.at[..., :2].set(array[..., 1::-1]) for array in result]


def place_in_the_cache(result, operands, parameters):
    """The cached value of one head at one position."""
    cached = result.ndim == 3 and result.shape[1] == 16 + CONFIG.sample.tokens and operands[1].shape[1] == 1
    return result.at[0, 15, 0].add(1.0) if cached else result


def root_of_a_moment(result, operands, parameters):
    """AdamW's divisor, for one row of one parameter."""
    return result.at[7].multiply(1.1) if result.shape == (CONFIG.model.vocab_size, CONFIG.model.width) else result


def cosine(result, operands, parameters):
    """As by a range reduction that goes wrong for large angles."""
    return jnp.where(operands[0] > 3, 1 - result, result)


def row_of_the_embedding(result, operands, parameters):
    return result.at[0].multiply(1.5) if operands[0].ndim == 2 else result


def share_of_the_second(result, operands, parameters):
    """The second micro-batch's gradient is taken off the mean, not added."""
    return -result if result.shape == () and operands[1] == 2 else result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kind", "primitive", "damage", "named", "only"),
    [
        (CONFIG, "training", lax.dot_general_p, unharmed, set(), "nothing"),
        (UNROLLED, "training", lax.dot_general_p, product_over_many, {"gradient of blocks/down"}, "gradient"),
        (CONFIG, "training", lax.dot_general_p, product_over_many, {"gradient of embedding"}, "gradient"),
        (CONFIG, "training", lax.dot_general_p, one_row_of_a_product, {"gradient of blocks/gate"}, "gradient"),
        (CONFIG, "training", lax.reduce_sum_p, sum_of_many, {"training loss", "evaluation loss"}, ""),
        (CONFIG, "training", lax.scatter_add_p, row_of_the_embedding, {"gradient of embedding"}, "gradient of emb"),
        (CONFIG, "training", lax.sqrt_p, root_of_a_moment, {"update of embedding"}, "update of embedding"),
        (CONFIG, "training", lax.div_p, share_of_the_second, {"gradient of norm", "gradient of embedding"}, ""),
        (CONFIG, "random", threefry2x32_p, random_stream, {"random bits"}, "random bits"),
        (CONFIG, "random", lax.sort_p, order, {"sort"}, "sort"),
        (
            CONFIG,
            "sampling",
            lax.dynamic_update_slice_p,
            place_in_the_cache,
            {f"sampling: logits after {CONFIG.sample.tokens} more tokens"},
            "sampling",
        ),
        (
            CONFIG,
            "sampling",
            lax.cos_p,
            cosine,
            {f"sampling: logits after {CONFIG.sample.tokens} more tokens"},
            "sampling",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_caught_and_named(monkeypatch, trained, config, kind, primitive, damage, named, only):
    found = failing(monkeypatch, trained, config, kind, primitive, damage)
    assert found >= named
    assert [name for name in found if not name.startswith(only)] == []


def test_one_row_or_column_that_is_wrong_shows_in_full():
    right = np.random.default_rng(0).normal(size=(3, 40, 1000)).astype(np.float32)
    for place in ((1, 7), (2, slice(None), 9)):
        wrong = right.copy()
        wrong[place] *= -1
        assert difference(wrong, right) == pytest.approx(2)
    assert difference(right, right) == 0
    assert difference(np.nextafter(right, 9, dtype=np.float32), right) == 0
    assert np.isnan(difference(np.full(3, np.nan), np.ones(3)))
    assert difference(np.ones(3), np.zeros(3)) == np.inf
    assert difference(np.float32([4.0]), np.float32([2.0]), np.float32([1.0])) == pytest.approx(2, rel=1e-6)


WRONG = (Part("sort", 0.0, 0.0), Part("gradient of norm", 0.5, 0.25), Part("update of norm", 0.4, 0.001))


def test_a_device_that_passes_is_checked_once_for_its_shapes_and_versions(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checked = []
    monkeypatch.setattr(numerics, "check", lambda config, device: checked.append(config) or WRONG)
    for _ in range(2):
        with pytest.raises(RunError, match=r"update of norm differs by 0.4 .* \(and 1 other") as caught:
            require(CONFIG, STAND_IN)
        assert len(str(caught.value).splitlines()) == 1
    monkeypatch.setattr(numerics, "check", lambda config, device: checked.append(config) or WRONG[:1])
    newer = SimpleNamespace(**vars(STAND_IN) | {"client": SimpleNamespace(platform_version="2")})
    for config in (CONFIG, UNROLLED, replace(CONFIG, max_steps=70)):
        require(config, STAND_IN)
    require(CONFIG, newer)
    assert checked == [CONFIG, CONFIG, CONFIG, UNROLLED, CONFIG]
    numerics.remember(CONFIG, STAND_IN, WRONG)  # by a later check
    require(CONFIG, STAND_IN)
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    require(CONFIG, STAND_IN)
    assert checked[5:] == [CONFIG, CONFIG]


def test_a_device_that_raises_is_told_with_the_parts_that_it_computed(monkeypatch, trained):
    def compute(function, device, *arguments):
        if device is STAND_IN and function is jnp.sort:
            raise NotImplementedError("no rule for sort\nand more")
        return sound(function, CPU, *arguments)

    sound = numerics.compute
    monkeypatch.setattr(numerics, "compute", compute)
    monkeypatch.setattr(numerics, "_trained", trained)
    monkeypatch.setattr(numerics, "_sampling", lambda *_: [Part("sampling", 0.0, 0.0)])
    monkeypatch.setattr(numerics, "_training", lambda *_: [])
    parts = check(CONFIG, STAND_IN)
    assert [(part.name, part.ok) for part in parts] == [
        ("random bits", True),
        ("random numbers and draws", False),
        ("sampling", True),
    ]
    assert "FAILED: NotImplementedError: no rule for sort\n" in numerics.table(parts)
    with pytest.raises(RunError, match=r"fails in the check of random numbers and draws \(NotImpl.*platform=cpu"):
        refuse_wrong(parts, STAND_IN)


def test_a_device_out_of_memory_is_left_to_whoever_asked(monkeypatch, trained):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(numerics, "_trained", trained)
    monkeypatch.setattr(numerics, "compute", exhausted)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        check(CONFIG, STAND_IN)


def test_not_a_number_is_the_furthest_off():
    with pytest.raises(RunError, match="embedding differs by nan"):
        refuse_wrong([*WRONG, Part("embedding", float("nan"), 0.25)], STAND_IN)
