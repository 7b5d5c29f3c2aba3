"""Whether a run fits the memory of this machine, and which slices and remat do."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax

from jaxlm.config import Config
from jaxlm.device import backend
from jaxlm.errors import UsageError
from jaxlm.planner import measure
from jaxlm.planner.measure import BenchmarkResult
from jaxlm.run.memory import Memory, compile_step, least_memory, step_memory
from jaxlm.storage import user_cache
from jaxlm.units import gb

Show = Callable[[str, float], None]  # hears what is being done and which share of it is


def known_memory(config: Config, device: jax.Device, show: Show) -> Memory:
    """The memory that a resolved config takes, remembered, or else by compiling. For an Apple GPU the step is
    compiled for the CPU, as its plugins do not analyse."""
    key = measure.key(config, device)
    if known := user_cache.get("memory", key):
        return Memory(**known)
    show(f"compiling (slices {config.microbatch_chunks}, remat {config.model.remat})", 0.0)
    place = jax.default_device(jax.devices("cpu")[0]) if backend.on_apple(device) else nullcontext()
    with place:
        found = step_memory(config, compile_step(config))
    if found is None:
        return least_memory(config)
    user_cache.put("memory", key, dataclasses.asdict(found))
    return found


def process_bytes(config: Config, device: jax.Device, found: BenchmarkResult | None, show: Show) -> int:
    """What a run takes beside its arrays: runtime, compiled code, a save's buffers.

    The short run's peak, less what the analysis gives for it. Else what this process has on a CPU, which is
    less, and nothing on a GPU.
    """
    if found:
        return max(found.peak_bytes - known_memory(measure.reduced(config, found), device, show).total, 0)
    return 0 if device.platform == "gpu" else measure.peak_bytes(device)


def better_setting(config: Config, device: jax.Device, room: int, memory: Memory, show: Show) -> dict[str, Any] | None:
    """The fastest slices and remat that fit `room` bytes, if they are not those of `config`; None if they are.

    Without recomputation comes before with it, and fewer slices before more. On anything but an NVIDIA GPU, more at a
    time is not faster: there fewer slices are looked for only when `config` does not fit. "fits" is False when nothing
    does.
    """
    fits = memory.total <= room
    divisors = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    if fits and device.platform != "gpu":
        divisors = [config.microbatch_chunks]
    for remat, slices in [(remat, slices) for remat in (False, True) for slices in divisors]:
        if fits and (remat, slices) == (config.model.remat, config.microbatch_chunks):
            return None
        other = dataclasses.replace(
            config, microbatch_chunks=slices, model=dataclasses.replace(config.model, remat=remat)
        )
        try:
            needed = known_memory(other, device, show).total
        except Exception as error:  # a compiler that runs out of memory raises what it likes
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            continue
        if needed <= room:
            return {"microbatch_chunks": slices, "remat": remat, "arrays_bytes": needed, "fits": True}
    return {"fits": False}


def check_memory(config: Config, device: jax.Device, compiled: Any = None) -> None:
    """Raises UsageError if a resolved config takes more memory than the device has for it.

    Goes by the analysis of the compiled step; before that by what is remembered, or by what no setting avoids.
    """
    memory, available = memory_at_hand(config, device, compiled), backend.available_memory(device)
    if memory.total > available:
        raise UsageError(
            f"this run takes {gb(memory.total)} of memory and {gb(available)} is what there is: python -m jaxlm.plan"
            " names the slices and remat that fit, --force begins all the same"
        )


def memory_at_hand(config: Config, device: jax.Device, compiled: Any) -> Memory:
    """By the compiled step; else what is remembered; else the least. Compiles nothing."""
    found = step_memory(config, compiled) if compiled is not None else None
    if found is None and (known := user_cache.get("memory", measure.key(config, device))):
        found = Memory(**known)
    return found or least_memory(config)
