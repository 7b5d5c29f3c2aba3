"""The memory of a training step, compared with the sizes of what it holds."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import pytest

from configs import m2_60m
from jaxlm.config import Config, MeshConfig, ModelConfig, from_config_dict
from jaxlm.core.train_step import init_state
from jaxlm.device.backend import APPLE, resolve_run
from jaxlm.run.memory import compile_step, min_memory, step_memory

PRESET = from_config_dict(m2_60m.get_config())
SIZES = {"vocab_size": 300, "context": 16, "layers": 1, "heads": 2, "width": 16, "mlp_width": 24}
SMALL = dataclasses.replace(
    Config(), batch_size=64, microbatch_chunks=64, model=ModelConfig(**SIZES, precision="float32", remat=False)
)


@functools.cache
def compiled_memory(config):
    return step_memory(config, compile_step(config))


def test_min_memory_of_the_preset_by_hand():
    least = min_memory(PRESET)
    weights = 4 * 59_294_720
    assert (least.weights, least.accumulated, least.gradients) == (weights,) * 3
    assert least.moments == pytest.approx(2 * weights, abs=100)  # and counters
    assert least.checkpoint_copy == pytest.approx(3 * weights, abs=100)
    assert least.temporaries == 0
    part = min_memory(dataclasses.replace(PRESET, mesh=MeshConfig(data=2, fsdp=8)))
    for name in ("weights", "accumulated", "gradients", "moments", "checkpoint_copy"):
        assert getattr(part, name) == pytest.approx(getattr(least, name) / 8, abs=100)


@pytest.mark.parametrize(("implementation", "chunks"), [("cpu", 64), pytest.param("apple", 2, marks=pytest.mark.slow)])
def test_memory_of_a_step_holds_state_gradients_and_residual_stream(implementation, chunks):
    model = dataclasses.replace(SMALL.model, implementation=implementation)
    config = dataclasses.replace(SMALL, microbatch_chunks=chunks, model=model)
    state = jax.eval_shape(lambda: init_state(config))
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    gradients = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    residual_stream = config.model.layers * config.chunk_size * 16 * 16 * 4
    assert compiled_memory(config).step > state_bytes + gradients + residual_stream


@pytest.mark.slow
def test_fewer_chunks_need_more_memory():
    compiled = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, implementation="cpu"))
    one_chunk = dataclasses.replace(compiled, microbatch_chunks=1)
    assert compiled_memory(compiled).temporaries < compiled_memory(one_chunk).temporaries / 8


@pytest.mark.slow
def test_an_apple_gpu_reuses_no_buffer_so_an_update_holds_two_states():
    config = dataclasses.replace(SMALL, batch_size=4, microbatch_chunks=2)
    memory = compiled_memory(resolve_run(config, SimpleNamespace(platform=APPLE[0])))
    assert memory.step >= 2 * (memory.weights + memory.moments + memory.accumulated) + memory.gradients


def test_without_an_analysis_there_is_no_step_memory():
    assert step_memory(SMALL, SimpleNamespace()) is None
    assert step_memory(SMALL, SimpleNamespace(memory_analysis=lambda: None)) is None
