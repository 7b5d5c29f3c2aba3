"""An Apple GPU can run every program, and the audit that checks it finds what it cannot run."""

import linecache
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxlm
from experiments.audit import CONVERTED, audit, inspect, preset
from experiments.memory import on_apple
from jaxlm.core import layers, ops
from jaxlm.core.train_step import init_state, make_train_step
from jaxlm.device.backend import APPLE, CONTRACTION_LIMIT
from jaxlm.run.checkpoint import checkpoint_bytes
from jaxlm.run.memory import state_shapes


def linear(x, w):
    return layers.linear(x, w, "float32", ops.get("apple").weight_gradient)


def found(function, *arguments, platform="METAL"):
    return inspect(jax.jit(function), arguments, platform)[1]


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("name", "layers", "platform"),
    [
        ("m2_60m_fast", 2, "METAL"),
        pytest.param("m2_60m_fast", 8, "mps", marks=pytest.mark.slow),
        *(pytest.param("m2_60m", 2, platform, marks=pytest.mark.slow) for platform in APPLE),
    ],
)
def test_training_evaluating_and_writing_as_on_an_apple_gpu_have_no_violation(platform, name, layers):
    config = preset(platform, name)
    seen = list(audit(replace(config, model=replace(config.model, layers=layers)), platform))
    assert [name for name, _, _ in seen] == ["training step", "evaluation step", "sampling", "saving"]
    for name, counts, wrong in seen:
        assert not wrong, f"{name}: {wrong[0]} and {len(wrong) - 1} more"
        assert counts.total() > 300  # the checksums of a save are the smallest program
        assert set(counts) <= set(CONVERTED[platform]["stablehlo"]) - {"while", "case", "if"}


@pytest.mark.slow
def test_the_arrays_of_a_step_of_the_preset_and_of_a_checkpoints_copy_take_less_than_4_gigabytes():
    for name in ("m2_60m", "m2_60m_fast"):
        config = preset(APPLE[0], name)
        assert on_apple(config) + checkpoint_bytes(state_shapes(config)) / 1e9 < 4


@pytest.mark.parametrize("name", ["m2_60m", "m2_60m_fast", "m2_8k_fast"])
def test_a_checkpoint_of_a_preset_takes_at_most_720_megabytes(name):
    assert checkpoint_bytes(state_shapes(preset(APPLE[0], name))) < 0.72e9


@pytest.mark.parametrize("platform", ["METAL", pytest.param("mps", marks=pytest.mark.slow)])
def test_the_step_of_other_devices_is_refused_by_the_lines_of_its_loops_and_branches(platform):
    config = preset(platform)
    config = replace(config, model=replace(config.model, implementation="xla", remat=True))
    state = jax.eval_shape(lambda: init_state(config))
    ids = array(config.batch_size, config.model.context + 1, dtype=np.int32)
    wrong = found(make_train_step(config), state, ids, platform=platform)
    assert {violation.operation for violation in wrong} == {"case"} | ({"while"} if platform == "METAL" else set())
    lines = {
        "case": {"cond("},
        "while": {"scan(", "remat_blocks("},
    }  # or of what has a backward pass
    for violation in wrong:
        name, line = violation.line.split(":")
        source = linecache.getline(str(Path(jaxlm.__file__).parent.parent / name), int(line))
        assert any(call in source for call in lines[violation.operation]), violation


@pytest.mark.parametrize(
    ("operation", "function", "arguments"),
    [
        ("while", lambda x: lax.fori_loop(0, 9, lambda _, y: y * y, x), [array(3)]),
        ("case", lambda p, x: lax.cond(p, lambda x: x, lambda x: -x, x), [array(dtype=bool), array(3)]),
        ("reduce_precision", lambda x: lax.reduce_precision(x, 8, 7), [array(3)]),
        ("reduce_window", lambda x: lax.reduce_window(x, 0.0, lax.add, (3,), (1,), "SAME"), [array(9)]),
        ("complex", lambda x: lax.complex(x, x), [array(3)]),
        ("cbrt", lax.cbrt, [array(3)]),
        ("add", lambda x: x + x, [array(3, dtype=jnp.bfloat16)]),
        ("dot_general", linear, [array(1, 2, CONTRACTION_LIMIT), array(CONTRACTION_LIMIT, 3)]),
        ("dot_general", lambda x: jnp.einsum("BTD,BTD->B", x, x), [array(2, 3, 4)]),
    ],
)
def test_what_metal_cannot_do_is_found(operation, function, arguments):
    assert operation in {violation.operation for violation in found(function, *arguments)}


@pytest.mark.skipif(jax.__version_info__ < (0, 5), reason="this jax writes them as plain ones")
def test_batched_gathers_and_scatters_are_found():
    index = array(2, dtype=jnp.int32)
    assert found(jax.vmap(lambda x, i: x[i]), array(2, 3, 4), index)
    assert found(jax.vmap(lambda x, i: x.at[i].add(1)), array(2, 3), index)


def test_what_both_can_do_is_let_through():
    assert not found(linear, array(1, 2, CONTRACTION_LIMIT - 1), array(CONTRACTION_LIMIT - 1, 3))
    assert not found(lambda x: jnp.einsum("BTD,BSD->BTS", x, x), array(2, 3, 4))
    assert not found(lambda x: lax.fori_loop(0, 9, lambda _, y: y * y, x), array(3), platform="mps")
    assert not found(lambda x: x + x, array(3, dtype=jnp.bfloat16), platform="mps")


@pytest.mark.skipif(jax.__version_info__ < (0, 5), reason="this jax writes it in StableHLO")
def test_what_reaches_a_plugin_whole_is_found_where_it_has_no_converter():
    assert {violation.operation for violation in found(lax.acos, array(3), platform="mps")} == {"chlo.acos"}
    assert not found(lax.acos, array(3), platform="METAL")
    assert not found(lax.square, array(3), platform="METAL")


@pytest.mark.parametrize("platform", APPLE)
def test_numbers_of_64_bits_are_found(platform):
    jax.config.update("jax_enable_x64", True)
    try:
        assert found(lambda x: x + x, array(3, dtype=jnp.float64), platform=platform)
    finally:
        jax.config.update("jax_enable_x64", False)
