"""The plan of a run as numbers: model, memory, speed, disk and schedule."""

import dataclasses
import math
import shutil
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import Config
from jaxlm.data.directories import data_directory
from jaxlm.data.token_files import TOKEN_DTYPE, TRAIN, VAL
from jaxlm.device import backend, numerics
from jaxlm.device.mesh import is_here, share
from jaxlm.errors import RunError
from jaxlm.planner import estimate, measure
from jaxlm.planner.estimate import Timings
from jaxlm.planner.measure import BenchmarkResult
from jaxlm.planner.memory import ShowProgress, better_setting, by_benchmark, cached_benchmark, memory_of
from jaxlm.run.memory import Memory, min_memory
from jaxlm.run.records import record_bytes
from jaxlm.run.workdir import existing_parent
from jaxlm.storage import user_cache
from jaxlm.units import date_text, duration, gb, seconds_text

SLOWDOWN = 0.05  # share of its time that a long run may lose to heat and other programs


def make_plan(config: Config, workdir: Path, measured: bool | None, show: ShowProgress) -> dict[str, Any]:
    """Everything known about a run before its first step: numbers with units in their keys, None for unknown ones.

    Args:
        config: as `read_config` returns it.
        workdir: where the run would write; it need not exist.
        measured: whether to run a benchmark; None: only if the cache has none.
        show: receives the progress.

    Raises:
        UsageError: the device does not start, or does not support the settings.
        RunError: the device runs out of memory while compiling.
    """
    device = backend.start(config.platform, config.deterministic)
    config = backend.resolve_run(config, device)
    train, val = (_token_count(data_directory(config) / name) for name in (TRAIN, VAL))
    available = backend.available_memory(device)
    memory = memory_of(config, device, show)
    benchmark, problem, wrong_numbers = None if measured else cached_benchmark(config, device), "", ""
    if benchmark is None and measured is not False:
        problem = "it does not fit" if is_here(config, device) else "it needs more devices than are here"
        if memory.total <= available and is_here(config, device):
            benchmark, problem, wrong_numbers = run_benchmark(config, device, workdir, show)
    memory = by_benchmark(memory, config, device, benchmark, show)
    setting = better_setting(config, device, available - memory.process, memory, show)
    speed, schedule = None, _schedule(config)
    if benchmark:
        val_sequences = math.ceil((val - 1) / config.model.context) if val else 0
        timings = measure.seconds(config, benchmark, val_sequences)
        speed = _speed(config, benchmark, timings)
        schedule |= _dates(config, timings, speed, schedule["first_step_of"])
    return {
        "machine": {
            "device": backend.describe(device),
            "data_devices": config.mesh.data,
            "fsdp_devices": config.mesh.fsdp,
            "jax": jax.__version__,
            "precision": config.model.precision,
        },
        "model": _model(config, train),
        "memory": _memory(memory, available) | {"process_is_measured": benchmark is not None},
        "setting": setting,
        "speed": speed,
        "not_measured_because": problem or None,
        "numerics_check_failure": wrong_numbers or None,
        "disk": _disk(config, workdir, benchmark, (train or 0) + (val or 0)),
        "schedule": schedule,
    }


def summary(config: Config, device: jax.Device, workdir: Path, memory: Memory, step: int) -> str:
    """The plan in three lines, for the start of a run that has done `step` steps. Measures and compiles nothing."""
    benchmark = cached_benchmark(config, device)
    disk = _disk(config, workdir, benchmark, tokens=0)
    time = "Time: not measured here; python -m jaxlm.plan with the same flags does"
    if benchmark:
        timings = measure.seconds(config, benchmark, 0)
        done, total = (estimate.seconds_at(config, timings, last) for last in (step, config.max_steps))
        remaining = total - done + timings.start
        end = date_text(datetime.now(), remaining)
        time = f"Time: {seconds_text(timings.step)} a step, {duration(remaining)} to go, until {end}"
    return (
        f"Memory: at most {gb(memory.total)}, {gb(memory.checkpoint_copy)} of it while a checkpoint is saved,"
        f" of {gb(backend.available_memory(device))}\n"
        f"Disk: at most {gb(disk['most_bytes'])}, of {gb(disk['free_bytes'])} free\n"
        f"{time}"
    )


def planned_seconds(config: Config, device: jax.Device) -> dict[str, float]:
    """The seconds of a step and of the whole run by the cached benchmark; empty without one."""
    benchmark = cached_benchmark(config, device)
    if not benchmark:
        return {}
    timings = measure.seconds(config, benchmark, 0)
    return {"step_seconds": timings.step, "total_seconds": estimate.seconds_at(config, timings, config.max_steps)}


def run_benchmark(
    config: Config, device: jax.Device, workdir: Path, show: ShowProgress
) -> tuple[BenchmarkResult | None, str, str]:
    """The benchmark's result, why there is none, and what the numerics check found wrong; caches it if it passed."""
    wrong_numbers = ""
    try:
        if device.platform != "cpu":
            numerics.require(share(config), device)  # first, as in a run: its time is not the benchmark's
    except RunError as error:
        wrong_numbers = str(error)
    try:
        benchmark = measure.measure(config, device, existing_parent(workdir), partial(show, "measuring a short run"))
    except RunError as error:
        return None, str(error), wrong_numbers
    if not wrong_numbers:
        store_benchmark(config, device, benchmark)
    return benchmark, "", wrong_numbers


def store_benchmark(config: Config, device: jax.Device, benchmark: BenchmarkResult) -> None:
    """Caches a benchmark of a resolved config, or of one that differs only in its number of steps."""
    user_cache.put("measured", measure.key(config, device), dataclasses.asdict(benchmark))


def _model(config: Config, data_tokens: int | None) -> dict[str, Any]:
    by_part = estimate.parameters_by_part(config.model)
    parameters, tokens = sum(by_part.values()), config.max_steps * config.tokens_per_step
    return {
        "parameters": parameters,
        "parameters_by_part": by_part,
        "flops_per_token": estimate.flops_per_token(config.model),
        "tokens_per_step": config.tokens_per_step,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "data_tokens": data_tokens,
        "epochs": tokens / data_tokens if data_tokens else None,
    }


def _memory(memory: Memory, available: int) -> dict[str, Any]:
    return {f"{name}_bytes": size for name, size in dataclasses.asdict(memory).items()} | {
        "total_bytes": memory.total,
        "available_bytes": available,
        "fits": memory.total <= available,
    }


def _speed(config: Config, benchmark: BenchmarkResult, timings: Timings) -> dict[str, Any]:
    rate = config.tokens_per_step / timings.step
    flops = estimate.flops_per_token(config.model)
    return {
        "tokens_per_second": rate,
        "step_fast_seconds": timings.step * benchmark.step_fast / benchmark.step,
        "step_slow_seconds": timings.step * benchmark.step_slow / benchmark.step,
        "measured_tokens_per_step": benchmark.batch_size * benchmark.grad_accum_steps * config.model.context,
        "matmul_flops_per_second": benchmark.flops_per_second,
        "utilisation": rate * flops / (benchmark.flops_per_second * config.mesh.devices),
    } | {f"{name}_seconds": seconds for name, seconds in dataclasses.asdict(timings).items()}


def _disk(config: Config, workdir: Path, benchmark: BenchmarkResult | None, tokens: int) -> dict[str, Any]:
    """What the run writes. At the peak there are two checkpoints more than at the end: a rolling one and the next."""
    whole = min_memory(share(config))
    checkpoint = benchmark.checkpoint_bytes if benchmark else whole.checkpoint_copy
    model, records = benchmark.model_bytes if benchmark else whole.weights, record_bytes(config, config.max_steps)
    count = len(estimate.kept(config, config.max_steps))
    replaced = len(estimate.saves(config)) > config.max_checkpoints
    count += config.keep_best
    kept, most = checkpoint * count, checkpoint * (count + replaced + 1 + config.keep_best) + model + records
    free = shutil.disk_usage(existing_parent(workdir)).free
    written = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())
    return {
        "tokens_bytes": tokens * TOKEN_DTYPE.itemsize or None,
        "checkpoint_bytes": checkpoint,
        "kept_checkpoints_bytes": kept,
        "final_model_bytes": model,
        "records_bytes": records,
        "left_bytes": kept + model + records,
        "most_bytes": most,
        "free_bytes": free,
        "fits": most <= free + written,
    }


def _schedule(config: Config) -> dict[str, Any]:
    every = {
        "samples": config.generation_interval,
        "evaluation": config.eval_interval,
        "checkpoint": config.save_interval,
    }
    return {
        "steps": config.max_steps,
        "first_step_of": {name: min(step, config.max_steps) for name, step in every.items()},
        "every_steps": every,
        "rolling_after_seconds": 60 * config.save_minutes,
        "deleted_after_steps": [list(pair) for pair in islice(estimate.deletions(config), 3)],
        "kept_at_the_end_steps": estimate.kept(config, config.max_steps),
    }


def _dates(config: Config, timings: Timings, speed: dict[str, Any], first_steps: dict[str, int]) -> dict[str, Any]:
    """The seconds after which each part of the schedule is reached."""
    total, fast, slow = (
        estimate.seconds_at(config, dataclasses.replace(timings, step=speed[f"step_{which}seconds"]), config.max_steps)
        for which in ("", "fast_", "slow_")
    )
    unit, passed = estimate.timeline(config, timings)
    return {
        "first_after_seconds": {name: estimate.seconds_at(config, timings, step) for name, step in first_steps.items()},
        "total_seconds": total,
        "total_fast_seconds": fast,
        "others_share": SLOWDOWN,
        "total_slow_seconds": (1 + SLOWDOWN) * slow,
        "timeline_unit": unit,
        "timeline": [
            {
                unit: count,
                "step": step,
                "tokens": step * config.tokens_per_step,
                "kept_checkpoints_steps": estimate.kept(config, step),
            }
            for count, step in passed
        ],
    }


def _token_count(file: Path) -> int | None:
    return file.stat().st_size // TOKEN_DTYPE.itemsize if file.is_file() else None
