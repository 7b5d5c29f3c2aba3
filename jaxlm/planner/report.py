"""The plan of a run: what it will cost on this machine, as numbers, with what its user was promised beside them."""

import dataclasses
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import Config
from jaxlm.data.token_files import TOKEN_DTYPE, TRAIN, VAL, data_directory
from jaxlm.device import backend, numerics
from jaxlm.errors import RunError
from jaxlm.planner import estimate, measure
from jaxlm.planner.estimate import Timings
from jaxlm.planner.measure import BenchmarkResult
from jaxlm.planner.memory import Show, better_setting, known_memory, memory_at_hand, process_bytes
from jaxlm.run.resume import RECORD_BYTES
from jaxlm.storage import user_cache
from jaxlm.units import date_text, duration, gb, seconds_text

SLOWER = 0.05  # what a long run may lose to heat and to other programs, beside the spread of the measured steps

# what the preset's user was promised
PRESET = {"parameters": 59_294_720, "tokens_per_step": 65_536, "max_steps": 50_000}
PROMISED_GB, PROMISED_ACTIVATIONS_GB = 1.4, 0.3
PROMISED_STEP_SECONDS, PROMISED_DAYS, PROMISED_RATE = 26, (8, 9), (2500, 3000)
PROMISED_AT_DAY_9 = 29_700


def make_plan(config: Config, workdir: Path, measured: bool | None, show: Show) -> dict[str, Any]:
    """All that is known of a run before its first step: numbers with their units in the keys, None for what is not.

    Args:
        config: as `read_config` gives it.
        workdir: where the run would write; need not exist.
        measured: do a short run; None: where none is remembered.
        show: hears what is being done and which share of it is.

    Raises:
        UsageError: the device does not start, or does not take the settings.
        RunError: the device runs out of memory compiling.
    """
    device = backend.start(config.platform, config.deterministic)
    config = backend.resolve_run(config, device)
    train, val = (_tokens_in(data_directory(config) / name) for name in (TRAIN, VAL))
    available = backend.available_memory(device)
    memory = known_memory(config, device, show)
    key, problem, unsound, found = measure.key(config, device), "", "", None
    if not measured and (known := user_cache.get("measured", key)):
        found = BenchmarkResult(**known)
    elif measured is not False and memory.total > available:
        problem = "it does not fit"
    elif measured is not False:
        if device.platform != "cpu":
            try:
                numerics.require(config, device)  # as a run would, whose time this is not
            except RunError as error:
                unsound = str(error)
        try:
            found = measure.measure(
                config, device, _existing(workdir), lambda share: show("measuring a short run", share)
            )
            if not unsound:
                user_cache.put("measured", key, dataclasses.asdict(found))
        except RunError as error:
            problem = str(error)
    by_part = estimate.parameters_by_part(config.model)
    parameters, flops = sum(by_part.values()), estimate.flops_per_token(config.model)
    total = config.max_steps * config.tokens_per_step
    process = process_bytes(config, device, found, show)
    report: dict[str, Any] = {
        "machine": {"device": backend.describe(device), "jax": jax.__version__, "precision": config.model.precision},
        "model": {
            "parameters": parameters,
            "parameters_by_part": by_part,
            "flops_per_token": flops,
            "tokens_per_step": config.tokens_per_step,
            "tokens": total,
            "tokens_per_parameter": total / parameters,
            "data_tokens": train,
            "epochs": total / train if train else None,
        },
        "memory": {f"{name}_bytes": size for name, size in dataclasses.asdict(memory).items()}
        | {
            "process_bytes": process,
            "process_is_measured": found is not None,
            "total_bytes": memory.total + process,
            "available_bytes": available,
            "fits": memory.total + process <= available,
        },
        "setting": better_setting(config, device, available - process, memory, show),
        "speed": None,
        "not_measured_because": problem or None,
        "not_sound_because": unsound or None,
    }
    if found:
        val_windows = -(-(val - 1) // config.model.context) if val else 0
        report["speed"] = _speed(config, found, flops, measure.seconds(config, found, val_windows))
    report["disk"] = _disk(config, workdir, found, parameters, memory.checkpoint_copy, (train or 0) + (val or 0))
    report["schedule"] = _schedule(config, report["speed"])
    if (parameters, config.tokens_per_step, config.max_steps) == tuple(PRESET.values()):
        report["promised"] = _promised(report)
    return report


def in_short(config: Config, device: jax.Device, workdir: Path, compiled: Any, step: int) -> str:
    """The plan in three lines, for the start of a run that has done `step` steps; of what is remembered or known
    without a measurement."""
    memory = memory_at_hand(config, device, compiled)
    known = user_cache.get("measured", measure.key(config, device))
    found = BenchmarkResult(**known) if known else None
    disk = _disk(config, workdir, found, memory.weights // 4, memory.checkpoint_copy, 0)
    lines = [
        f"Memory: {gb(memory.step)} for a step and {gb(memory.checkpoint_copy)} while a checkpoint is saved,"
        f" of {gb(backend.available_memory(device))}",
        f"Disk: at most {gb(disk['most_bytes'])}, of {gb(disk['free_bytes'])} free",
        "Time: not measured here; python -m jaxlm.plan with the same flags does",
    ]
    if found:
        s = measure.seconds(config, found, 0)
        left = estimate.seconds_at(config, s, config.max_steps) - estimate.seconds_at(config, s, step) + s.start
        until = date_text(datetime.now(), left)
        lines[-1] = f"Time: {seconds_text(s.step)} a step, {duration(left)} to go, until {until}"
    return "\n".join(lines)


def _speed(config: Config, m: BenchmarkResult, flops: int, s: Timings) -> dict[str, Any]:
    rate = config.tokens_per_step / s.step
    return {
        "tokens_per_second": rate,
        "step_seconds": s.step,
        "step_fast_seconds": s.step * m.step_fast / m.step,
        "step_slow_seconds": s.step * m.step_slow / m.step,
        "measured_tokens_per_step": m.batch_size * m.grad_accum_steps * config.model.context,
        "product_flops_per_second": m.flops_per_second,
        "utilisation": rate * flops / m.flops_per_second,
        "start_seconds": s.start,
        "evaluation_seconds": s.evaluation,
        "last_evaluation_seconds": s.last_evaluation,
        "samples_seconds": s.samples,
        "save_seconds": s.save,
        "saving_seconds": s.saving,
        "end_seconds": s.end,
    }


def _disk(
    config: Config, workdir: Path, m: BenchmarkResult | None, parameters: int, copied: int, tokens: int
) -> dict[str, Any]:
    """What the run leaves, and takes at most: one checkpoint more, until the oldest is deleted."""
    checkpoint = m.checkpoint_bytes if m else copied
    model = m.model_bytes if m else 4 * parameters
    count, records = len(estimate.saves(config)), RECORD_BYTES * config.max_steps
    kept, most = (checkpoint * min(count, config.max_checkpoints + more) for more in (0, 1))
    free = shutil.disk_usage(_existing(workdir)).free
    there = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())  # which counts as part of it
    return {
        "tokens_bytes": tokens * TOKEN_DTYPE.itemsize or None,
        "checkpoint_bytes": checkpoint,
        "kept_checkpoints_bytes": kept,
        "final_model_bytes": model,
        "records_bytes": records,
        "left_bytes": kept + model + records,
        "most_bytes": most + model + records,
        "free_bytes": free,
        "fits": most + model + records <= free + there,
    }


def _schedule(config: Config, speed: dict[str, Any] | None) -> dict[str, Any]:
    deleted = estimate.deletions(config)
    steps = {
        "samples": config.generation_interval,
        "evaluation": config.eval_interval,
        "checkpoint": estimate.saves(config)[0],
    }
    schedule: dict[str, Any] = {
        "steps": config.max_steps,
        "first_step_of": {name: min(step, config.max_steps) for name, step in steps.items()},
        "every_steps": steps | {"checkpoint": config.save_interval},
        "deleted_after_steps": [list(pair) for pair, _ in zip(deleted, range(3), strict=False)],
        "kept_at_the_end_steps": estimate.kept(config, config.max_steps),
    }
    if not speed:
        return schedule
    seconds = Timings(**{field.name: speed[f"{field.name}_seconds"] for field in dataclasses.fields(Timings)})

    def at(step: int, took: str = "step_seconds") -> float:
        return estimate.seconds_at(config, dataclasses.replace(seconds, step=speed[took]), step)

    unit, passed = estimate.timeline(config, seconds)
    last = config.max_steps
    return schedule | {
        "first_after_seconds": {name: at(step) for name, step in schedule["first_step_of"].items()},
        "total_seconds": at(last),
        "total_fast_seconds": at(last, "step_fast_seconds"),
        "others_share": SLOWER,
        "total_slow_seconds": (1 + SLOWER) * at(last, "step_slow_seconds"),
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


def _promised(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The user's promises beside what is found here, and what follows from one promise of another."""
    memory, speed, schedule = report["memory"], report["speed"], report["schedule"]
    day = 86400
    at_day_9 = total = None
    if speed:
        total = schedule["total_seconds"]
        at_day_9 = min(round(9 * day / total * PRESET["max_steps"]), PRESET["max_steps"])
    low, high = PROMISED_RATE
    days = PROMISED_STEP_SECONDS * PRESET["max_steps"] / day
    rows = [
        ("memory", f"{PROMISED_GB} GB", gb(memory["total_bytes"])),
        (
            "  arrays of a step",
            "",
            gb(memory["total_bytes"] - memory["process_bytes"] - memory["checkpoint_copy_bytes"]),
        ),
        ("  activations, at batch 32", f"{PROMISED_ACTIVATIONS_GB} GB", gb(memory["temporaries_bytes"])),
        ("a step", f"{PROMISED_STEP_SECONDS} s", speed and seconds_text(speed["step_seconds"])),
        ("tokens a second", f"{low:,} to {high:,}", speed and f"{speed['tokens_per_second']:,.0f}"),
        ("50,000 steps", "{} to {} days".format(*PROMISED_DAYS), total and f"{total / day:.1f} days"),
        ("step on day 9", f"{PROMISED_AT_DAY_9:,}", at_day_9 and f"{at_day_9:,}"),
        (
            "checkpoints",
            "every 300, 5 kept",
            "every {}, {} kept".format(schedule["every_steps"]["checkpoint"], len(schedule["kept_at_the_end_steps"])),
        ),
    ]
    shortest, longest = (PRESET["tokens_per_step"] / rate for rate in (high, low))
    against = [
        f"{PROMISED_STEP_SECONDS} s a step for 50,000 steps are {days:.1f} days, not {PROMISED_DAYS[0]} to"
        f" {PROMISED_DAYS[1]}: these need {PROMISED_DAYS[1] * day / PRESET['max_steps']:.1f} s a step,"
        f" {PRESET['tokens_per_step'] * PRESET['max_steps'] / (PROMISED_DAYS[1] * day):,.0f} tokens a second.",
        f"{low:,} to {high:,} tokens a second are {shortest:.0f} to {longest:.0f} s a step.",
        f"Step {PROMISED_AT_DAY_9:,} on day 9 is {9 * day / PROMISED_AT_DAY_9:.1f} s a step, 15 days in all.",
        f"{PROMISED_ACTIVATIONS_GB} GB of activations at batch 32 leave no room for its logits,"
        f" {32 * 1024 * 50257 * 4 / 1e9:.1f} GB: jaxlm never has them whole.",
    ]
    return [{"what": what, "promised": promised, "here": here} for what, promised, here in rows] + [
        {"contradiction": text} for text in against
    ]


def _tokens_in(file: Path) -> int | None:
    return file.stat().st_size // TOKEN_DTYPE.itemsize if file.is_file() else None


def _existing(place: Path) -> Path:
    return next(path for path in (place, *place.absolute().parents) if path.is_dir())
