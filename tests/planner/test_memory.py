"""The memory check and the advice on settings, with given sizes."""

import dataclasses
from types import SimpleNamespace

import pytest

from configs import m2_60m
from jaxlm.config import Config, from_config_dict
from jaxlm.device import backend
from jaxlm.errors import UsageError
from jaxlm.planner import memory
from jaxlm.run import checkpoint
from jaxlm.run.memory import Memory
from jaxlm.storage import user_cache
from tests.eight_devices import run_tests

PRESET = from_config_dict(m2_60m.get_config())
SIZES = Memory(weights=100, moments=200, accumulated=100, gradients=100, temporaries=50, checkpoint_copy=300)
TOTAL = 850


CPU, GPU = SimpleNamespace(platform="cpu"), SimpleNamespace(platform="gpu")
LEAST = dataclasses.replace(SIZES, temporaries=0)


@pytest.fixture
def cache(monkeypatch):
    """What the user's cache holds. The process has a peak of 1,000 bytes."""
    cache = {}
    monkeypatch.setattr(user_cache, "get", lambda *key: cache.get(key))
    monkeypatch.setattr(user_cache, "put", lambda *words: cache.update({words[:-1]: words[-1]}))
    monkeypatch.setattr(memory.measure, "key", lambda config, device: "key")
    monkeypatch.setattr(memory.measure, "peak_bytes", lambda device: 1000)
    monkeypatch.setattr(memory, "step_memory", lambda config, compiled: SIZES if compiled == "compiled" else None)
    monkeypatch.setattr(memory, "min_memory", lambda config: LEAST)
    monkeypatch.setattr(memory, "compile_step", lambda config, mesh: "compiled")
    monkeypatch.setattr(backend, "on_apple", lambda device: False)
    return cache


def plan(device):
    return memory.memory_of(Config(), device, lambda *_: None)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_plan_and_a_run_name_one_number_whichever_comes_first(cache, monkeypatch, device):
    """The first caches it, also the part of the process, which differs between the two."""
    first = plan(device)
    monkeypatch.setattr(memory.measure, "peak_bytes", lambda device: 2000)
    for compiled in (None, "compiled"):
        assert memory.known_memory(Config(), device, None, compiled) == first
    cache.clear()
    first = memory.known_memory(Config(), device, None, "compiled")
    monkeypatch.setattr(memory.measure, "peak_bytes", lambda device: 3000)
    assert plan(device) == first == memory.known_memory(Config(), device, None)


@pytest.mark.parametrize(("options", "buffers"), [({"use_compression": False}, 50), ({}, 200)])
def test_the_process_counts_its_peak_without_the_state_and_the_buffers_of_a_save(cache, monkeypatch, options, buffers):
    monkeypatch.setattr(checkpoint, "_UNCOMPRESSED", options)
    assert memory.known_memory(Config(), CPU, None) == dataclasses.replace(LEAST, process=1000 + buffers)
    assert cache == {}  # not yet compiled
    by_step = memory.known_memory(Config(), CPU, None, "compiled")
    assert by_step == dataclasses.replace(SIZES, process=1000 - 400 + buffers)
    cache.clear()
    assert plan(CPU) == dataclasses.replace(SIZES, process=1000 + buffers)
    cache.clear()
    assert plan(GPU) == SIZES  # its memory is not that of the process


def test_a_benchmark_tells_the_process(cache, monkeypatch):
    monkeypatch.setattr(memory.measure, "reduced", lambda config, benchmark: config)
    benchmark = SimpleNamespace(peak_bytes=TOTAL + 70)
    for compiled in (None, "compiled"):
        assert memory.known_memory(Config(), CPU, benchmark, compiled).process == 70


def test_a_run_fits_to_the_byte_with_its_process(monkeypatch):
    needed = dataclasses.replace(SIZES, process=70)
    assert (needed.total, needed.arrays) == (TOTAL + 70, TOTAL)
    monkeypatch.setattr(backend, "available_memory", lambda device: TOTAL + 70)
    memory.check_memory(needed, None)
    monkeypatch.setattr(backend, "available_memory", lambda device: TOTAL + 69)
    with pytest.raises(UsageError, match=r"python -m jaxlm\.plan"):
        memory.check_memory(needed, None)


def test_faster_settings_are_named_on_a_gpu_with_room(monkeypatch):
    gpu = SimpleNamespace(platform="gpu")
    monkeypatch.setattr(memory, "memory_of", lambda c, *_: Memory(0, 0, 0, 0, 100 * c.chunk_size + c.model.remat, 0))

    def better(chunks, remat, room):
        model = dataclasses.replace(PRESET.model, remat=remat)
        config = dataclasses.replace(PRESET, microbatch_chunks=chunks, model=model)
        return memory.better_setting(config, gpu, room, memory.memory_of(config, gpu, None), lambda *_: None)

    assert better(8, True, 1700) == {"microbatch_chunks": 2, "remat": False, "arrays_bytes": 1600, "fits": True}
    assert better(1, False, 3300) is None


@pytest.mark.slow
def test_the_memory_on_a_mesh_is_that_of_its_compiled_programs():
    run_tests("planner/memory_on_eight.py")
