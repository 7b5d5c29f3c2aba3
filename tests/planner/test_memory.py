"""The memory check and the advice on settings, with given sizes."""

import dataclasses
from types import SimpleNamespace

import pytest

from configs import m2_60m
from jaxlm.config import Config, from_config_dict
from jaxlm.device import backend
from jaxlm.errors import UsageError
from jaxlm.planner import memory
from jaxlm.run.memory import Memory
from jaxlm.storage import user_cache

PRESET = from_config_dict(m2_60m.get_config())
SIZES = Memory(weights=100, moments=200, accumulated=100, gradients=100, temporaries=50, checkpoint_copy=300)
TOTAL = 850


@pytest.mark.parametrize("source", ["compiled", "cache", "least"])
def test_a_run_fits_to_the_byte_with_its_process(monkeypatch, source):
    """By the compiled step if there is one, else by the cache, else by what no setting avoids."""
    by_source = {
        "compiled": (SIZES, Memory(0, 0, 0, 0, 0, 0)),
        "cache": (None, SIZES),
        "least": (None, None),
    }
    by_analysis, cached = by_source[source]
    monkeypatch.setattr(memory, "step_memory", lambda config, compiled: by_analysis)
    monkeypatch.setattr(memory.measure, "key", lambda *arguments: "key")
    monkeypatch.setattr(user_cache, "get", lambda *key: cached and dataclasses.asdict(cached))
    monkeypatch.setattr(memory, "min_memory", lambda config: SIZES)
    needed = memory.known_memory(Config(), None, 70, "compiled")
    assert (needed.total, needed.step) == (TOTAL + 70, TOTAL + 70 - SIZES.checkpoint_copy)
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
