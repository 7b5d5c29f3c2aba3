"""The memory check: whether a run fits this machine, and which settings do."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxlm.config import Config
from jaxlm.device import backend
from jaxlm.device.mesh import is_here, make_mesh
from jaxlm.errors import UsageError
from jaxlm.planner import measure
from jaxlm.planner.measure import BenchmarkResult
from jaxlm.run.checkpoint import writer_bytes
from jaxlm.run.memory import Memory, compile_step, memory_elsewhere, min_memory, step_memory
from jaxlm.storage import user_cache
from jaxlm.units import gb

ShowProgress = Callable[[str, float], None]  # receives the current activity and the share of it that is done


def memory_of(config: Config, device: jax.Device, show: ShowProgress) -> Memory:
    """The memory that a resolved config takes: from the user's cache, or by compiling its step.

    If there are fewer devices than those of its mesh, the memory is an upper bound.
    """
    if cached := _cached(config, device):
        return cached
    show(f"compiling (microbatch_chunks {config.microbatch_chunks}, remat {config.model.remat})", 0.0)
    with backend.where_memory_is_analysed(device):
        if is_here(config, device):
            memory = step_memory(config, compile_step(config, make_mesh(config, device)))
        else:
            memory = memory_elsewhere(config)
    return _with_process(config, device, memory, allocated=0)


def known_memory(config: Config, device: jax.Device, benchmark: BenchmarkResult | None, compiled: Any = None) -> Memory:
    """The memory of a resolved config, without compiling or measuring.

    What an earlier run or plan cached, so that all print one number; else by the compiled step, if it is given, beside
    the arrays of the state; else the least that it can be.
    """
    if not (memory := _cached(config, device)):
        least = min_memory(config)
        by_step = step_memory(config, compiled) if compiled is not None else None
        state = least.weights + least.moments + least.accumulated if compiled is not None else 0
        memory = _with_process(config, device, by_step, allocated=state)
    return by_benchmark(memory, config, device, benchmark)


def by_benchmark(
    memory: Memory,
    config: Config,
    device: jax.Device,
    benchmark: BenchmarkResult | None,
    show: ShowProgress = lambda activity, share: None,
) -> Memory:
    """With a benchmark, `memory` with the process as measured: the peak minus the memory of the arrays."""
    if not benchmark:
        return memory
    arrays = memory_of(measure.reduced(config, benchmark), device, show).arrays
    return dataclasses.replace(memory, process=max(benchmark.peak_bytes - arrays, 0))


def _with_process(config: Config, device: jax.Device, memory: Memory | None, allocated: int) -> Memory:
    """Adds what a run takes beside its arrays, outside an NVIDIA GPU; caches it if the compiled step is known.

    The runtime and the compiler take the peak of this process, without the bytes of arrays that it has allocated.
    """
    least = memory or min_memory(config)
    if device.platform != "gpu":
        in_own_pages = device.platform == "cpu" and config.mesh.devices == 1  # as `snapshot` copies
        buffers = writer_bytes(least.checkpoint_copy, in_own_pages)
        process = max(measure.peak_bytes(device) - allocated, 0) + buffers
        least = dataclasses.replace(least, process=process)
    if memory:
        user_cache.put("run_memory", measure.key(config, device), dataclasses.asdict(least))
    return least


def _cached(config: Config, device: jax.Device) -> Memory | None:
    cached = user_cache.get("run_memory", measure.key(config, device))
    return Memory(**cached) if cached else None


def cached_benchmark(config: Config, device: jax.Device) -> BenchmarkResult | None:
    """What an earlier plan measured here for a resolved config."""
    cached = user_cache.get("measured", measure.key(config, device))
    return BenchmarkResult(**cached) if cached else None


def better_setting(
    config: Config, device: jax.Device, room: int, memory: Memory, show: ShowProgress
) -> dict[str, Any] | None:
    """The fastest microbatch_chunks and remat whose arrays fit `room` bytes; None if `config` has them.

    No recomputation is faster than recomputation, and fewer chunks are faster than more. Outside NVIDIA GPUs fewer
    chunks are not faster, so they are only tried if `config` does not fit. "fits" is False if nothing fits.
    """
    fits = memory.arrays <= room
    rows = config.batch_size // config.mesh.devices
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    if fits and device.platform != "gpu":
        divisors = [config.microbatch_chunks]
    for remat, chunks in [(remat, chunks) for remat in (False, True) for chunks in divisors]:
        if fits and (remat, chunks) == (config.model.remat, config.microbatch_chunks):
            return None
        model = dataclasses.replace(config.model, remat=remat)
        candidate = dataclasses.replace(config, microbatch_chunks=chunks, model=model)
        try:
            needed = memory_of(candidate, device, show).arrays
        except Exception as error:  # compilers raise various types when they run out of memory
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            continue
        if needed <= room:
            return {"microbatch_chunks": chunks, "remat": remat, "arrays_bytes": needed, "fits": True}
    return {"fits": False}


def check_memory(memory: Memory, device: jax.Device) -> None:
    """Raises UsageError if a run does not fit the device."""
    available = backend.available_memory(device)
    if memory.total > available:
        raise UsageError(
            f"this run needs {gb(memory.total)} of memory and {gb(available)} is available: python -m jaxlm.plan"
            " finds settings that fit, --force starts the run anyway"
        )
