"""The command that says what a run will cost, before its first step: python -m jaxlm.plan --config configs/m2_60m.py

Takes the flags of jaxlm.main. Memory is that of the compiled step, for which nothing is allocated; times are those of a
short run, in less than two minutes, unless --no-measure; both are remembered. --json prints the numbers, with their
units in the keys. --check holds what the machine computes against the CPU instead.
"""

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxlm.command import ArgumentParser, run
from jaxlm.config import Config
from jaxlm.errors import RequestError, RunError
from jaxlm.main import data_directory, read_config
from jaxlm.monitor import duration
from jaxlm.tokens import TOKEN_DTYPE, TRAIN, VAL

WIDTH = 80
SLOWER = 0.05  # what a long run may lose to heat and to other programs, beside the spread of the measured steps

# what the preset's user was promised
PRESET = {"parameters": 59_294_720, "tokens_per_step": 65_536, "max_steps": 50_000}
PROMISED_GB, PROMISED_ACTIVATIONS_GB = 1.4, 0.3
PROMISED_STEP_SECONDS, PROMISED_DAYS, PROMISED_RATE = 26, (8, 9), (2500, 3000)
PROMISED_AT_DAY_9 = 29_700


def make_plan(config: Config, workdir: Path, measured: bool, show: Callable[[str, float], None]) -> dict[str, Any]:
    """All that is known of a run before its first step: numbers with their units in the keys, None for what is not.

    Args:
        config: as `read_config` gives it.
        workdir: where the run would write; need not exist.
        measured: do a short run where none is remembered.
        show: hears what is being done and which share of it is.

    Raises:
        RequestError: the device does not start, or does not take the settings.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the short run's process needs the memory

    import jax

    from jaxlm import backend, cache, measure
    from jaxlm.estimate import flops_per_token, parameters_by_part

    device = backend.start(config.platform, config.deterministic)
    config = backend.resolve_run(config, device)
    train, val = (_tokens_in(data_directory(config) / name) for name in (TRAIN, VAL))
    available = backend.available_memory(device)
    memory = known_memory(config, device, show)
    key, problem, found = measure.key(config, device), "", None
    if known := cache.recall("measured", key):
        found = measure.Measured(**known)
    elif measured and memory.total > available:
        problem = "it does not fit"
    elif measured:
        try:
            found = measure.measure(config, _existing(workdir), lambda share: show("measuring a short run", share))
            cache.remember("measured", key, dataclasses.asdict(found))
        except RunError as error:
            problem = str(error)
    by_part = parameters_by_part(config.model)
    parameters, flops = sum(by_part.values()), flops_per_token(config.model)
    total = config.max_steps * config.tokens_per_step
    process = process_bytes(config, device, found, show)
    report: dict[str, Any] = {
        "machine": {"device": backend.describe(device), "jax": jax.__version__, "dtype": config.model.dtype},
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
    }
    if found:
        val_windows = -(-(val - 1) // config.model.context) if val else 0
        report["speed"] = _speed(config, found, flops, measure.seconds(config, found, val_windows))
    report["disk"] = _disk(config, workdir, found, parameters, memory.checkpoint_copy, (train or 0) + (val or 0))
    report["schedule"] = _schedule(config, report["speed"])
    if (parameters, config.tokens_per_step, config.max_steps) == tuple(PRESET.values()):
        report["promised"] = _promised(report)
    return report


def known_memory(config: Config, device: Any, show: Callable[[str, float], None]) -> Any:
    """The `estimate.Memory` of a resolved config, remembered, or else by compiling. For an Apple GPU the step is
    compiled for the CPU, as its plugins do not analyse."""
    import jax

    from jaxlm import backend, cache, estimate, measure

    key = measure.key(config, device)
    if known := cache.recall("memory", key):
        return estimate.Memory(**known)
    show(f"compiling (slices {config.slices}, remat {config.model.remat})", 0.0)
    place = jax.default_device(jax.devices("cpu")[0]) if device.platform in backend.APPLE else nullcontext()
    with place:
        found = estimate.memory(config, estimate.compile_step(config))
    if found is None:
        return estimate.least_memory(config)
    cache.remember("memory", key, dataclasses.asdict(found))
    return found


def process_bytes(config: Config, device: Any, found: Any, show: Callable[[str, float], None]) -> int:
    """What a run takes beside its arrays: runtime, compiled code, a save's buffers.

    Measured: the short run's peak, less what the analysis gives for it. Else what this process has on a CPU, which is
    less, and nothing on a GPU.
    """
    import resource
    import sys

    from jaxlm import measure

    if found:
        return found.peak_bytes - known_memory(measure.reduced(config, found), device, show).total
    unit = 1 if sys.platform == "darwin" else 1024
    return 0 if device.platform == "gpu" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def better_setting(
    config: Config, device: Any, room: int, memory: Any, show: Callable[[str, float], None]
) -> dict[str, Any] | None:
    """The fastest slices and remat that fit `room` bytes, if they are not those of `config`; None if they are.

    Without recomputation comes before with it, and fewer slices before more. On anything but an NVIDIA GPU, more at a
    time is not faster: there it is looked for only when `config` does not fit. "fits" is False when nothing does.
    """
    fits = memory.total <= room
    if fits and device.platform != "gpu":
        return None
    divisors = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    for remat, slices in [(remat, slices) for remat in (False, True) for slices in divisors]:
        if fits and (remat, slices) == (config.model.remat, config.slices):
            return None
        other = dataclasses.replace(config, slices=slices, model=dataclasses.replace(config.model, remat=remat))
        try:
            needed = known_memory(other, device, show).total
        except Exception as error:  # a compiler that runs out of memory raises what it likes
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            continue
        if needed <= room:
            return {"slices": slices, "remat": remat, "arrays_bytes": needed, "fits": True}
    return {"fits": False}


def check_memory(config: Config, device: Any, compiled: Any = None) -> None:
    """Raises RequestError if a resolved config takes more memory than the device has for it.

    Goes by the analysis of the compiled step; before that by what is remembered, or by what no setting avoids.
    """
    from jaxlm import backend

    memory, available = _memory_at_hand(config, device, compiled), backend.available_memory(device)
    if memory.total > available:
        raise RequestError(
            f"this run takes {gb(memory.total)} of memory and {gb(available)} is what there is: python -m jaxlm.plan"
            " names the slices and remat that fit, --force begins all the same"
        )


def in_short(config: Config, device: Any, workdir: Path, compiled: Any, step: int) -> str:
    """The plan in three lines, for the start of a run that has done `step` steps; of what is remembered or known
    without a measurement."""
    from jaxlm import backend, cache, measure
    from jaxlm.estimate import seconds_at

    memory = _memory_at_hand(config, device, compiled)
    known = cache.recall("measured", measure.key(config, device))
    found = measure.Measured(**known) if known else None
    disk = _disk(config, workdir, found, memory.weights // 4, memory.checkpoint_copy, 0)
    lines = [
        f"Memory: {gb(memory.step)} for a step and {gb(memory.checkpoint_copy)} while a checkpoint is saved,"
        f" of {gb(backend.available_memory(device))}",
        f"Disk: at most {gb(disk['most_bytes'])}, of {gb(disk['free_bytes'])} free",
        "Time: not measured here; python -m jaxlm.plan with the same flags does",
    ]
    if found:
        s = measure.seconds(config, found, 0)
        left = seconds_at(config, s, config.max_steps) - seconds_at(config, s, step) + s.start
        until = (datetime.now() + timedelta(seconds=left)).strftime("%Y-%m-%d %H:%M")
        lines[-1] = f"Time: {seconds_text(s.step)} a step, {duration(left)} to go, until {until}"
    return "\n".join(lines)


def _memory_at_hand(config: Config, device: Any, compiled: Any) -> Any:
    from jaxlm import cache, estimate, measure

    found = estimate.memory(config, compiled) if compiled is not None else None
    if found is None and (known := cache.recall("memory", measure.key(config, device))):
        found = estimate.Memory(**known)
    return found or estimate.least_memory(config)


def _speed(config: Config, m: Any, flops: int, s: Any) -> dict[str, Any]:
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


def _disk(config: Config, workdir: Path, m: Any, parameters: int, copied: int, tokens: int) -> dict[str, Any]:
    """What the run leaves, and takes at most: one checkpoint more, until the oldest is deleted."""
    from jaxlm.estimate import saves
    from jaxlm.resume import RECORD_BYTES

    checkpoint = m.checkpoint_bytes if m else copied
    model = m.model_bytes if m else 4 * parameters
    count, records = len(saves(config)), RECORD_BYTES * config.max_steps
    kept, most = (checkpoint * min(count, config.max_checkpoints + more) for more in (0, 1))
    free = shutil.disk_usage(_existing(workdir)).free
    return {
        "tokens_bytes": tokens * TOKEN_DTYPE.itemsize or None,
        "checkpoint_bytes": checkpoint,
        "kept_checkpoints_bytes": kept,
        "final_model_bytes": model,
        "records_bytes": records,
        "left_bytes": kept + model + records,
        "most_bytes": most + model + records,
        "free_bytes": free,
        "fits": most + model + records <= free,
    }


def _schedule(config: Config, speed: dict[str, Any] | None) -> dict[str, Any]:
    from jaxlm.estimate import Seconds, deletions, kept, saves, seconds_at, timeline

    deleted = deletions(config)
    steps = {
        "samples": config.generation_interval,
        "evaluation": config.eval_interval,
        "checkpoint": saves(config)[0],
    }
    schedule: dict[str, Any] = {
        "steps": config.max_steps,
        "first_step_of": {name: min(step, config.max_steps) for name, step in steps.items()},
        "every_steps": steps | {"checkpoint": config.save_interval},
        "deleted_after_steps": [list(pair) for pair, _ in zip(deleted, range(3), strict=False)],
        "kept_at_the_end_steps": kept(config, config.max_steps),
    }
    if not speed:
        return schedule
    seconds = Seconds(**{field.name: speed[f"{field.name}_seconds"] for field in dataclasses.fields(Seconds)})

    def at(step: int, took: str = "step_seconds") -> float:
        return seconds_at(config, dataclasses.replace(seconds, step=speed[took]), step)

    unit, passed = timeline(config, seconds)
    last = config.max_steps
    return schedule | {
        "first_after_seconds": {name: at(step) for name, step in schedule["first_step_of"].items()},
        "total_seconds": at(last),
        "total_fast_seconds": at(last, "step_fast_seconds"),
        "total_slow_seconds": (1 + SLOWER) * at(last, "step_slow_seconds"),
        "timeline_unit": unit,
        "timeline": [
            {
                unit: count,
                "step": step,
                "tokens": step * config.tokens_per_step,
                "kept_checkpoints_steps": kept(config, step),
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


def gb(size: float) -> str:
    """Bytes in the unit that a person reads: GB, or MB below one tenth of it."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def seconds_text(seconds: float) -> str:
    """Seconds to three digits below a minute, in the largest fitting unit above."""
    return f"{seconds:.3g} s" if seconds < 60 else duration(seconds)


def tables(report: dict[str, Any], now: datetime) -> Iterator[Table | str]:
    """The plan for a person: tables and lines of at most 80 columns."""
    machine, model, memory = report["machine"], report["model"], report["memory"]
    yield f"{machine['dtype']} on {machine['device']}, jax {machine['jax']}"
    epochs = (
        "data not prepared yet" if model["epochs"] is None else f"{model['epochs']:.3g} of {model['data_tokens']:,}"
    )
    yield _table(
        "Model",
        [(name, f"{count:,}") for name, count in model["parameters_by_part"].items()]
        + [
            ("parameters", f"{model['parameters']:,}"),
            ("FLOPs a token, 6 P + 6 L T D", f"{model['flops_per_token']:,}"),
            ("tokens a step", f"{model['tokens_per_step']:,}"),
            ("tokens in all", f"{model['tokens']:,}"),
            ("tokens a parameter", f"{model['tokens_per_parameter']:.3g}"),
            ("epochs of the tokens there are", epochs),
        ],
    )
    parts = {
        "weights": "weights",
        "moments": "optimizer state",
        "accumulated": "accumulated gradients",
        "gradients": "gradients",
        "temporaries": "activations, temporaries",
        "checkpoint_copy": "a checkpoint's copy, while it is saved",
    }
    process = "the process itself, a save's buffers" + ("" if memory["process_is_measured"] else " (at least)")
    yield _table(
        "Memory",
        [(text, gb(memory[f"{name}_bytes"])) for name, text in parts.items()]
        + [
            (process, gb(memory["process_bytes"])),
            ("at the worst moment", gb(memory["total_bytes"])),
            ("there is", gb(memory["available_bytes"])),
            ("fits", "yes" if memory["fits"] else "NO"),
        ],
    )
    yield _advice(report)
    yield from _speed_lines(report)
    disk = report["disk"]
    yield _table(
        "Disk",
        [
            ("tokens", gb(disk["tokens_bytes"]) if disk["tokens_bytes"] else "not prepared yet"),
            ("a checkpoint", gb(disk["checkpoint_bytes"])),
            ("checkpoints kept", gb(disk["kept_checkpoints_bytes"])),
            ("final model", gb(disk["final_model_bytes"])),
            ("metrics, samples, events, at most", gb(disk["records_bytes"])),
            ("work directory at the end", gb(disk["left_bytes"])),
            ("at most, one more checkpoint", gb(disk["most_bytes"])),
            ("free", gb(disk["free_bytes"])),
            ("fits", "yes" if disk["fits"] else "NO"),
        ],
    )
    yield from _schedule_lines(report["schedule"], now)
    if "promised" in report:
        rows = [
            (row["what"], row["promised"], row["here"] or "not measured") for row in report["promised"] if "what" in row
        ]
        yield _table("Promised", rows, ("", "promised", "here"))
        yield "\n".join(row["contradiction"] for row in report["promised"] if "contradiction" in row)


def _advice(report: dict[str, Any]) -> str:
    setting, fits = report["setting"], report["memory"]["fits"]
    if setting is None:
        return "Slices and remat are as they should be."
    if not setting["fits"]:
        return "It fits with no slices and no remat: choose a smaller model, context or batch_size."
    flags = f"--config.slices={setting['slices']} --config.model.remat={str(setting['remat']).lower()}"
    return f"{'There is room to be faster' if fits else 'To fit'}: {flags} ({gb(setting['arrays_bytes'])} of arrays)."


def _speed_lines(report: dict[str, Any]) -> Iterator[Table | str]:
    speed = report["speed"]
    if not speed:
        why = report["not_measured_because"]
        yield f"Speed: not measured ({why})" if why else "Speed: not measured; without --no-measure it is"
        return
    yield _table(
        "Speed",
        [
            ("tokens a second", f"{speed['tokens_per_second']:,.0f}"),
            ("a step", seconds_text(speed["step_seconds"])),
            (
                "  most steps",
                f"{seconds_text(speed['step_fast_seconds'])} to {seconds_text(speed['step_slow_seconds'])}",
            ),
            ("  measured at a time", f"{speed['measured_tokens_per_step']:,} tokens"),
            ("a matrix product's speed", f"{speed['product_flops_per_second'] / 1e9:,.0f} GFLOP/s"),
            ("  of it, in a step", f"{speed['utilisation']:.0%}"),
            ("to the first step", seconds_text(speed["start_seconds"])),
            ("an evaluation", seconds_text(speed["evaluation_seconds"])),
            ("samples", seconds_text(speed["samples_seconds"])),
            ("a save holds up for", seconds_text(speed["save_seconds"])),
            ("  and is whole after", seconds_text(speed["saving_seconds"])),
        ],
    )


def _schedule_lines(schedule: dict[str, Any], now: datetime) -> Iterator[Table | str]:
    after = schedule.get("first_after_seconds", {})
    rows = [
        (name, f"{step:,}", duration(after[name]) if after else "", f"{schedule['every_steps'][name]:,}")
        for name, step in schedule["first_step_of"].items()
    ]
    yield _table("Schedule", rows, ("first", "step", "after", "then every"))
    lines = [f"Checkpoint {old:,} is deleted when {new:,} is whole." for old, new in schedule["deleted_after_steps"]]
    lines += ["At the end there are " + ", ".join(f"{step:,}" for step in schedule["kept_at_the_end_steps"]) + "."]
    yield "\n".join(lines)
    if not after:
        return
    unit = schedule["timeline_unit"]
    total, fast, slow = (schedule[f"total_{which}seconds"] for which in ("", "fast_", "slow_"))
    rows = []
    for row in schedule["timeline"]:
        kept = row["kept_checkpoints_steps"]
        span = f"{kept[0]:,} to {kept[-1]:,}" if kept else "none yet"
        rows += [(f"{row[unit]:,}", f"{row['step']:,}", f"{row['tokens'] / 1e6:,.1f}", span)]
    yield _table("Timeline", rows, (unit, "step", "million tokens", "checkpoints"))
    when = [(now + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M") for seconds in (total, fast, slow)]
    yield f"{schedule['steps']:,} steps take {duration(total)}: begun now, until {when[0]}."
    yield (
        f"As steps varied, and with {SLOWER:.0%} for heat and other programs: {duration(fast)} to {duration(slow)},"
        f"\n{when[1]} to {when[2]}."
    )


def _table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ("", "")) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=any(header), pad_edge=False
    )
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr while something is compiled or measured, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def check(config: Config, as_json: bool) -> None:
    """Prints how far what this machine computes lies from the CPU's, part by part.

    Raises:
        RunError: further than is allowed.
    """
    from jaxlm import backend, soundness

    device = backend.start(config.platform, config.deterministic)
    parts = soundness.check(backend.resolve_run(config, device), device)
    as_dicts = [part._asdict() | {"ok": part.ok} for part in parts]
    print(json.dumps(as_dicts, indent=2) if as_json else soundness.table(parts))
    soundness.refuse_wrong(parts, device)


def main(argv: list[str]) -> None:
    """Runs the command with `argv`, the words after its name. Raises RequestError and RunError."""
    parser = ArgumentParser(
        prog="python -m jaxlm.plan",
        description="Says what a run will cost. Takes the flags of jaxlm.main as well.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument(
        "--measure", action=argparse.BooleanOptionalAction, default=True, help="run some steps to know the speed"
    )
    parser.add_argument("--check", action="store_true", help="see whether this machine computes right, instead")
    args, rest = parser.parse_known_args(argv)
    config, workdir = read_config(rest)
    if args.check:
        check(config, args.json)
        return
    with _progress() as show:
        report = make_plan(config, workdir, args.measure, show)
    if args.json:
        print(json.dumps(report, indent=2))
        return
    console = Console(width=WIDTH, highlight=False, markup=False, emoji=False)
    for part in tables(report, datetime.now()):
        console.print(part)
        console.print()


if __name__ == "__main__":
    run(main)
