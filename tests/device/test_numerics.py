"""The numerics check: finds and names planted faults, and passes a device without any.

The faulty device is a stand-in. It computes on the CPU, by programs that damage the result of one operation. What the
check computes on the CPU itself runs as usual.
"""

import contextlib
import functools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.random import threefry2x32_p
from jax.interpreters import mlir

from jaxlm.config import Config, ModelConfig, OptimizerConfig, SampleConfig
from jaxlm.core import ops, train_step
from jaxlm.core.parameters import by_path
from jaxlm.device import numerics
from jaxlm.device.numerics import (
    Part,
    allowed,
    check,
    check_small_model,
    difference,
    refuse_wrong,
    require,
    scale_error,
)
from jaxlm.errors import RunError

SIZES = {"vocab_size": 700, "context": 20, "layers": 2, "heads": 2, "width": 16, "mlp_width": 24}
CONFIG = Config(
    batch_size=4,
    microbatch_chunks=2,
    grad_accum_steps=3,
    max_steps=60,
    model=ModelConfig(**SIZES, precision="float32", implementation="cpu", remat=True),
    optimizer=OptimizerConfig(warmup_steps=3),
    sample=SampleConfig(texts=3, tokens=4),
)
UNROLLED = replace(CONFIG, model=replace(CONFIG.model, implementation="apple", remat=False))
CPU = jax.devices("cpu")[0]
STAND_IN = SimpleNamespace(id=0, platform="mps", device_kind="a stand-in", client=SimpleNamespace(platform_version="1"))
TOKENS = CONFIG.chunk_size * CONFIG.model.context  # that a weight's gradient sums over


def with_model(**model):
    return replace(CONFIG, model=replace(CONFIG.model, **model))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        with_model(precision="bf16"),
        replace(
            with_model(implementation="apple", remat=False, output_init="zero", tied=False, kv_heads=1, qk_norm=True),
            microbatch_chunks=1,
            grad_accum_steps=1,
            optimizer=OptimizerConfig(
                "muon", warmup_steps=0, muon_momentum_warmup=9, muon_b2=0.9, cautious=True, average=0.9
            ),
        ),
    ],
    ids=["bfloat16", "unrolled, muon"],
)
def test_the_cpu_passes_and_every_parameter_is_compared(monkeypatch, expected, config):
    for name, of_config in expected.items():
        monkeypatch.setattr(numerics, name, of_config)
    parts = check(config, CPU)
    assert [part for part in parts if not part.ok] == []
    names = {part.name for part in parts}
    weights = ["embedding", "norm", *(f"blocks/{name}" for name in ("query", "down", "mlp_norm"))]
    weights += ["head"] * (not config.model.tied) + ["blocks/query_norm", "blocks/key_norm"] * config.model.qk_norm
    assert names > {f"{what} of {name}" for what in ("gradient", "update") for name in weights}
    assert numerics.table(parts).count("\n") == len(parts)
    assert max(len(line) for line in numerics.table(parts).splitlines()) <= 80


@contextlib.contextmanager
def broken(primitive, damage):
    """In programs that are compiled here, one operation returns damage(result, operands, parameters)."""
    rules, inside = mlir._platform_specific_lowerings["cpu"], []
    before = rules.get(primitive)
    right = before or mlir._lowerings[primitive]
    right = getattr(right, "rule", right)

    def damaged(*operands, **parameters):
        return damage(primitive.bind(*operands, **parameters), operands, parameters)

    def lowering(context, *operands, **parameters):
        if inside:
            return right(context, *operands, **parameters)
        inside.append(True)
        try:
            return mlir.lower_fun(damaged, primitive.multiple_results)(context, *operands, **parameters)
        finally:
            inside.clear()

    mlir.register_lowering(primitive, lowering, platform="cpu")
    jax.clear_caches()
    try:
        yield
    finally:
        del rules[primitive]
        if before:
            rules[primitive] = before
        jax.clear_caches()


@pytest.fixture(scope="module")
def expected():
    """What the CPU computes for a config, once: the state, and its loss and gradient."""
    gradients, of_config = numerics._expected_training, {}

    def expected_training(config, *arguments):
        if config not in of_config:
            of_config[config] = gradients(config, *arguments)
        return of_config[config]

    return {"_trained": functools.cache(numerics._trained), "_expected_training": expected_training}


@contextlib.contextmanager
def replaced(owner, name, change):
    """In programs that are compiled here, a function or a record of operations is change(it)."""
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(owner, dict):
            patch.setitem(owner, name, change(owner[name]))
        else:
            patch.setattr(owner, name, change(getattr(owner, name)))
        jax.clear_caches()
        yield
    jax.clear_caches()


TRAINS_RIGHT = set()  # configs of which no part of training fails without a fault


def failing_parts(monkeypatch, expected, config, kind, fault):
    """The names of the parts that fail on the stand-in, of one group: random, sampling or training."""
    original = numerics.compute

    def compute(function, device, *arguments):
        if device is not STAND_IN:
            return original(function, device, *arguments)
        with fault():
            return original(function, CPU, *arguments)

    for name, of_config in expected.items():
        monkeypatch.setattr(numerics, name, of_config)
    for other in {"random", "sampling", "training"} - {kind}:
        monkeypatch.setattr(numerics, f"_{other}", lambda *_: ())
    monkeypatch.setattr(numerics, "compute", compute)
    return {part.name for part in check(config, STAND_IN) if not part.ok}


def assert_trains_right(monkeypatch, expected, config):
    if config not in TRAINS_RIGHT:
        assert failing_parts(monkeypatch, expected, config, "training", contextlib.nullcontext) == set()
        TRAINS_RIGHT.add(config)


def matmul_over_many(result, operands, parameters):
    """As on M1 and M2: matmuls that contract many numbers add what lies behind the operands."""
    (axes, _), _ = parameters["dimension_numbers"]
    many = np.prod([operands[0].shape[axis] for axis in axes]) >= TOKENS
    return result + 0.01 if many else result


def one_row_of_a_matmul(result, operands, parameters):
    return result.at[-1].multiply(0.5) if result.shape == (CONFIG.model.width, CONFIG.model.mlp_width) else result


def sum_of_many(result, operands, parameters):
    """A sum over all tokens loses the last one."""
    (array,), axes = operands, parameters["axes"]
    many = array.shape[:1] == (TOKENS,) and axes == (0,)
    return result - array[-1] if many else result


def random_stream(result, operands, parameters):
    first, second = result
    return [first.at[..., -1].set(first[..., -1] ^ 1), second] if first.size > 1000 else result


def order(result, operands, parameters):
    return [array.at[..., :2].set(array[..., 1::-1]) for array in result]


def cache_position(result, operands, parameters):
    """The cached value of one head at one position."""
    cached = result.ndim == 3 and result.shape[1] == 16 + CONFIG.sample.tokens and operands[1].shape[1] == 1
    return result.at[0, 15, 0].add(1.0) if cached else result


def root_of_a_moment(result, operands, parameters):
    """AdamW's divisor, for one row of one parameter."""
    return result.at[7].multiply(1.1) if result.shape == (CONFIG.model.vocab_size, CONFIG.model.width) else result


def cosine(result, operands, parameters):
    """As if large angles were reduced wrong."""
    return jnp.where(operands[0] > 3, 1 - result, result)


def row_of_the_embedding(result, operands, parameters):
    return result.at[0].multiply(1.5) if operands[0].ndim == 2 else result


def second_share(result, operands, parameters):
    """The second micro-batch's gradient is subtracted from the mean."""
    return jnp.where(operands[1] == 2, -result, result) if result.shape == () else result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kind", "primitive", "damage", "named", "only"),
    [
        (UNROLLED, "training", lax.dot_general_p, matmul_over_many, {"gradient of blocks/down"}, "gradient"),
        (
            with_model(precision="bf16"),
            "training",
            lax.dot_general_p,
            one_row_of_a_matmul,
            {"gradient of blocks/gate"},
            "gradient",
        ),
        (CONFIG, "training", lax.reduce_sum_p, sum_of_many, {"training loss", "evaluation loss"}, ""),
        (CONFIG, "training", lax.scatter_add_p, row_of_the_embedding, {"gradient of embedding"}, "gradient of emb"),
        (CONFIG, "training", lax.sqrt_p, root_of_a_moment, {"update of embedding"}, "update of embedding"),
        (CONFIG, "training", lax.div_p, second_share, {"gradient of norm", "gradient of embedding"}, ""),
        (CONFIG, "random", threefry2x32_p, random_stream, {"random bits"}, "random bits"),
        (CONFIG, "random", lax.sort_p, order, {"sort"}, "sort"),
        (
            CONFIG,
            "sampling",
            lax.dynamic_update_slice_p,
            cache_position,
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
def test_a_planted_fault_is_found_and_named(monkeypatch, expected, config, kind, primitive, damage, named, only):
    """All parts in `named` fail, and only parts whose names start with `only`."""
    failing = failing_parts(monkeypatch, expected, config, kind, partial(broken, primitive, damage))
    assert failing >= named
    assert [name for name in failing if not name.startswith(only)] == []


def weight_gradients(factor):
    def change(record):
        return replace(record, weight_gradient=lambda *ab: factor * record.weight_gradient(*ab))

    return partial(replaced, ops.IMPLEMENTATIONS, "cpu", change)


def attention(change_query):
    def change(record):
        return replace(record, attention=lambda q, *kv, **others: record.attention(change_query(q), *kv, **others))

    return partial(replaced, ops.IMPLEMENTATIONS, "cpu", change)


def last_layer(error):
    def change(loss_and_gradient):
        def changed(config, params, inputs_BT, targets_BT, scale, before):
            loss_sum, grads = loss_and_gradient(config, params, inputs_BT, targets_BT, scale, before)
            old, new = before["blocks"], grads["blocks"]
            return loss_sum, grads | {"blocks": jax.tree.map(lambda g, b: g.at[-1].add(error * (g - b)[-1]), new, old)}

        return changed

    return partial(replaced, train_step, "loss_and_gradient", change)


def optimizer(**changes):
    def change(make_optimizer):
        def changed(config, *mesh):
            return make_optimizer(replace(config, optimizer=replace(config.optimizer, **changes)), *mesh)

        return changed

    return partial(replaced, train_step, "make_optimizer", change)


@pytest.mark.slow
def test_a_wrong_average_or_momentum_is_found(monkeypatch, expected):
    recipe = OptimizerConfig("muon", warmup_steps=3, muon_momentum_warmup=9, muon_b2=0.9, average=0.9)
    config = replace(CONFIG, optimizer=recipe)
    assert_trains_right(monkeypatch, expected, config)
    for fault, named in (
        (optimizer(average=0.8, muon_momentum=0.5), {"update of embedding", "update of blocks/query"}),
        (optimizer(muon_b2=0.999), {"update of blocks/query"}),
    ):
        assert failing_parts(monkeypatch, expected, config, "training", fault) >= named


BLOCKS = {f"gradient of blocks/{name}: scale" for name in ("query", "key", "value", "output", "gate", "up", "down")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "fault", "named"),
    [
        ("float32", weight_gradients(0.999), BLOCKS),
        ("bf16", weight_gradients(0.95), BLOCKS),
        ("bf16", attention(lambda q: 1.1 * q), {"gradient of blocks/query: scale"}),
        ("bf16", attention(lambda q: q[:, :, ::-1]), {"gradient of blocks/query", "gradient of blocks/query: scale"}),
        ("bf16", optimizer(weight_decay=0.0), {"update of blocks/query"}),
        ("bf16", optimizer(b2=0.999), {"update of blocks/query"}),
    ],
    ids=[
        "gradients x 0.999, float32",
        "gradients x 0.95",
        "logits x 1.1",
        "heads swapped",
        "no weight decay",
        "second moment",
    ],
)
def test_a_fault_of_scale_is_found_beside_rounding(monkeypatch, expected, precision, fault, named):
    config = with_model(precision=precision)
    assert_trains_right(monkeypatch, expected, config)
    assert failing_parts(monkeypatch, expected, config, "training", fault) >= named


@pytest.mark.parametrize(
    ("platform", "dtype", "rounding"),
    [("cpu", "float32", 1e-4), ("cpu", "bfloat16", 0.22), ("gpu", "float32", 0.22 / 4), ("gpu", "bfloat16", 0.22)],
)
def test_the_limit_allows_rounding_and_finds_a_halved_row(platform, dtype, rounding):
    limit = allowed(SimpleNamespace(platform=platform), dtype).row
    expected = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    halved = expected.copy()
    halved[7] *= 0.5
    for actual, ok in ((halved, False), (expected * (1 + rounding), True)):
        assert Part("gradient", difference(actual, expected), limit).ok is ok


def test_one_wrong_row_or_column_shows_in_full():
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


@pytest.mark.parametrize(
    ("platform", "dtype", "rounding", "fault"),
    [("gpu", "bfloat16", 0.2, 0.05), ("gpu", "float32", 0.05, 0.01), ("mps", "float32", 5e-4, 4e-4)],
)
def test_the_scale_of_an_array_is_known_where_its_rows_are_not(platform, dtype, rounding, fault):
    """Rounding that a row may have hides in it what the whole array shows."""
    rng, limits = np.random.default_rng(0), allowed(SimpleNamespace(platform=platform), dtype)
    right = rng.normal(size=(512, 300)).astype(np.float32)
    rounded = right * (1 + rounding * rng.uniform(-1, 1, right.shape)).astype(np.float32)
    for factor, ok in ((1, True), (1 - fault, False), (1 + fault, False)):
        rows, scale = numerics._compare("gradient", np.float32(factor) * rounded, right, limits)
        assert (rows.ok, scale.ok) == (True, ok)


def test_the_scale_is_that_of_the_norm_or_of_the_projection():
    right = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    assert scale_error(right, right) == 0
    assert scale_error(0.8 * right, right) == pytest.approx(0.2, rel=1e-6)
    assert scale_error(-right, right) == pytest.approx(2)  # its norm is right
    assert scale_error(right[::-1], right) == pytest.approx(1, abs=0.1)
    across = np.concatenate([right, 0.75 * right])
    assert scale_error(across, np.concatenate([right, 0 * right])) == pytest.approx(0.25)  # the projection is right
    assert scale_error(0 * right, 0 * right) == 0
    assert scale_error(right, 0 * right) == np.inf
    assert not Part("gradient", scale_error(np.nan * right, right), 1.0).ok


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change_scales", "named"),
    [
        (lambda query_K, key_K: (query_K, 1.1 * key_K), "gradient of blocks/query_norm: scale"),
        (lambda query_K, key_K: (query_K[::-1], key_K), "gradient of blocks/query_norm"),
    ],
    ids=["keys x 1.1", "scales reversed"],
)
def test_a_fault_of_the_norms_of_queries_and_keys_is_found(monkeypatch, expected, change_scales, named):
    def change(record):
        def changed(ops, x_BTD, weights, scales, *others):
            return record.query_key_value(ops, x_BTD, weights, change_scales(*scales), *others)

        return replace(record, query_key_value=changed)

    config, fault = with_model(precision="bf16", qk_norm=True), partial(replaced, ops.IMPLEMENTATIONS, "cpu", change)
    assert_trains_right(monkeypatch, expected, config)
    assert named in failing_parts(monkeypatch, expected, config, "training", fault)


@pytest.mark.slow
def test_a_fault_of_scale_in_one_of_many_layers_is_found(monkeypatch, expected):
    config = with_model(precision="bf16", layers=12)
    assert failing_parts(monkeypatch, expected, config, "training", last_layer(-0.1)) >= BLOCKS


def test_the_small_model_compares_logits_loss_and_every_gradient(monkeypatch):
    shapes = []

    def compute(function, device, *arguments):
        if not shapes:
            shapes.extend(jax.tree.flatten(jax.eval_shape(function, *arguments)))
        leaves = [np.ones(leaf.shape, np.float32) for leaf in shapes[0]]
        if device is STAND_IN:
            leaves[faulty] *= 0.5
        return jax.tree.unflatten(shapes[1], leaves)

    monkeypatch.setattr(numerics, "compute", compute)
    gradients = sorted(f"gradient of {'/'.join(path)}" for path in by_path(numerics.SMALL_MODEL))
    for index, name in enumerate(["logits", "loss", *gradients]):
        faulty = index
        parts = check_small_model(STAND_IN)
        assert [part.name for part in parts] == ["logits", "loss", *gradients]
        assert [part.name for part in parts if not part.ok] == [name]
        assert numerics.failure(parts).startswith(f"computes wrong numbers: {name} differs by 0.5 from the CPU's")
    assert numerics.failure(check_small_model(CPU)) == ""


WRONG = (Part("sort", 0.0, 0.0), Part("gradient of norm", 0.5, 0.25), Part("update of norm", 0.4, 0.001))


def test_a_device_is_checked_until_it_passes_for_each_shape_and_version(monkeypatch, tmp_path):
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
    require(CONFIG, SimpleNamespace(**vars(STAND_IN) | {"id": 1}))  # another card of this kind
    assert checked == [CONFIG, CONFIG, CONFIG, UNROLLED, CONFIG, CONFIG]
    numerics.store_result(CONFIG, STAND_IN, WRONG)  # as a later check may find
    require(CONFIG, STAND_IN)
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    require(CONFIG, STAND_IN)
    assert checked[6:] == [CONFIG, CONFIG]


def test_a_device_that_raises_fails_with_its_other_parts_listed(monkeypatch):
    def compute(function, device, *arguments):
        if device is STAND_IN and function is jnp.sort:
            raise NotImplementedError("no rule for sort\nand more")
        return original(function, CPU, *arguments)

    original = numerics.compute
    monkeypatch.setattr(numerics, "compute", compute)
    monkeypatch.setattr(numerics, "_trained", lambda config: None)
    monkeypatch.setattr(numerics, "_sampling", lambda *_: [Part("sampling", 0.0, 0.0)])
    monkeypatch.setattr(numerics, "_training", lambda *_: [])
    parts = check(CONFIG, STAND_IN)
    assert [(part.name, part.ok) for part in parts] == [
        ("random bits", True),
        ("random numbers", False),
        ("sampling", True),
    ]
    assert "FAILED: NotImplementedError: no rule for sort\n" in numerics.table(parts)
    with pytest.raises(RunError, match=r"fails in the check of random numbers \(NotImpl.*platform=cpu"):
        refuse_wrong(parts, STAND_IN)


def test_out_of_memory_is_raised(monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(numerics, "_trained", lambda config: None)
    monkeypatch.setattr(numerics, "compute", exhausted)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        check(CONFIG, STAND_IN)


def test_nan_is_the_worst_difference():
    with pytest.raises(RunError, match="embedding differs by nan"):
        refuse_wrong([*WRONG, Part("embedding", float("nan"), 0.25)], STAND_IN)
