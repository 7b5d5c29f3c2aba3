"""A run as the page shows it: one dict of plain values, read from its work directory."""

import contextlib
import json
import math
import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import PROMPTS, Config, from_config_dict, groups, settings_of
from jaxlm.errors import RunError, UsageError
from jaxlm.interop.model_card import base_name, base_names
from jaxlm.pages.metrics import Floats, Indices, Metrics, read_metrics, read_rows, running_mean, thin
from jaxlm.pages.plan import planned_lr
from jaxlm.pages.samples import ROOM, read_samples
from jaxlm.run.workdir import BEST, CHECKPOINTS, FINAL_MODEL, METRICS, SAMPLES, SESSIONS, saved_hashes, saved_steps
from jaxlm.storage.lock import is_written
from jaxlm.terminal import printable

BUCKETS = 1000  # of a plot: a wide screen has 2,000 pixels
FEWEST_FOR_MEAN = 100  # rows
MOST_MARKS = 200  # of pauses or of restarts in a plot
MOST_SESSIONS = 20  # in the table
POSITIONS = ("step", "tokens", "seconds")  # what the plots are drawn against


def read_run(workdir: Path, runs: int = 1) -> dict[str, Any]:
    """Everything that the page shows of a run, which may still be written, as JSON's values without NaN.

    Args:
        workdir: its work directory.
        runs: how many runs share the page, and its room.

    Raises UsageError if `workdir` holds no run, RunError if it cannot be read.
    """
    if not any((workdir / name).is_file() for name in (METRICS, "config.json")):
        raise UsageError(f"{workdir} holds no run: name the --workdir of one, which has {METRICS}")
    try:
        metrics = read_metrics(workdir / METRICS)
        samples, damaged = read_samples(workdir / SAMPLES, ROOM // runs)
        sessions = [row for _, row in read_rows(workdir / SESSIONS) if row]
        return _describe(workdir, metrics, sessions, samples, max(BUCKETS // runs, 100)) | {
            "notes": _notes({METRICS: metrics.damaged, SAMPLES: damaged}),
        }
    except OSError as error:
        raise RunError(f"cannot read {workdir} ({error.strerror or error}): check that the disk is there") from error


def _describe(
    workdir: Path,
    metrics: Metrics,
    sessions: list[Mapping[str, Any]],
    samples: list[dict[str, Any]],
    buckets: int,
) -> dict[str, Any]:
    config = _read_config(workdir)
    step = int(metrics.last("step") or 0)
    max_steps = max(config.max_steps if config else 0, step)
    state = "running" if is_written(workdir) else "finished" if config and step >= max_steps else "stopped"
    return {
        "name": printable(base_name(str(workdir))),
        "workdir": printable(str(workdir)),
        "state": state,
        "step": step,
        "max_steps": max_steps,
        "tokens_per_step": config.tokens_per_step if config else None,
        "seconds_left": _number(_seconds_left(metrics, max_steps - step)),
        "metrics": {key: _points(metrics, key, buckets) for key in metrics.columns if key not in POSITIONS},
        "last": {key: _number(column.values[-1]) for key, column in metrics.columns.items()},
        "plan": _plan(config, metrics, sessions, buckets),
        "pauses": _pauses(metrics),
        "restarts": _restarts(metrics, sessions),
        "sessions": [_session(row) for row in sessions[-MOST_SESSIONS:]],
        "settings": _settings(config) if config else {},
        "data": _data(workdir, config),
        "checkpoints": _checkpoints(workdir, metrics),
        "samples": samples,
        "sample_command": _sample_command(workdir, config, samples),
    }


def _sample_command(workdir: Path, config: Config | None, samples: list[dict[str, Any]]) -> str:
    """For a shell. The prompt is the first one of the settings, or else of the samples."""
    prompts = [*(config.sample.prompts if config else ()), *(each["prompt"] for each in samples), *PROMPTS]
    return printable(f"python -m jaxlm.sample {shlex.join(['--workdir', str(workdir), '--prompt', prompts[0]])}")


def _read_config(workdir: Path) -> Config | None:
    """The settings in config.json; None if it is missing, damaged or of another version."""
    try:
        return from_config_dict(json.loads((workdir / "config.json").read_bytes()))
    except (OSError, ValueError, RecursionError, UsageError):
        return None


def _settings(config: Config) -> dict[str, str]:
    """The settings by their whole names. A page may be published, so it has only the last part of each path."""
    every = [setting for prefix, group in groups(config).items() for setting in settings_of(group, prefix)]
    values = {setting.name: setting.value for setting in every} | {
        "data.corpus": base_names(config.data.corpus),
        "data.exclude": [base_name(path) for path in config.data.exclude],
        "data.dir": base_name(config.data.dir),
        "init_from": base_name(config.init_from),
    }
    return {name: printable(str(value)) for name, value in values.items()}


def _data(workdir: Path, config: Config | None) -> str:
    """The names of the tokens' folder or of the text's files, and the hash of the text."""
    if not config:
        return ""
    names = base_name(config.data.dir) or base_names(config.data.corpus)
    sha256, _ = saved_hashes(workdir)
    return printable(f"{names} (sha256 of the text {str(sha256)[:12]}…)" if sha256 else names)


def _points(metrics: Metrics, key: str, buckets: int) -> dict[str, Any]:
    """The points of a plot, and those of the running mean where there are many and most rows have one."""
    rows, values = metrics.columns[key]
    points = _series(metrics, rows, values, buckets) | {"nonfinite": int((~np.isfinite(values)).sum())}
    if len(values) >= max(FEWEST_FOR_MEAN, metrics.count / 2) and key != "lr":
        points["mean"] = _series(metrics, rows, running_mean(values), buckets // 4)
    return points


def _series(metrics: Metrics, rows: Indices, values: Floats, buckets: int) -> dict[str, Any]:
    kept = thin(values, buckets)
    return _at(metrics, rows[kept]) | {"value": _numbers(values[kept])}


def _at(metrics: Metrics, rows: Indices) -> dict[str, Any]:
    return {key: _numbers(metrics.at(key, rows)) for key in POSITIONS}


def _plan(
    config: Config | None, metrics: Metrics, sessions: list[Mapping[str, Any]], buckets: int
) -> dict[str, Any] | None:
    """What the settings and the first session planned. The learning rate is planned to the last step."""
    if not config:
        return None
    plan = sessions[0].get("plan") if sessions else None
    times = plan if isinstance(plan, dict) else {}
    steps = np.unique(np.linspace(1, config.max_steps, buckets // 4).round())
    steps = np.unique([*steps, *np.geomspace(1, config.max_steps, buckets // 4).round()])
    done = metrics.steps
    seconds = np.interp(steps, done, metrics.at("seconds", np.arange(metrics.count))) if len(done) else steps * np.nan
    return {
        "lr": {
            "step": _numbers(steps),
            "tokens": _numbers(steps * config.tokens_per_step),
            "seconds": _numbers(np.where(steps <= (done[-1] if len(done) else 0), seconds, np.nan)),
            "value": _numbers(planned_lr(config.optimizer, config.max_steps, steps)),
        },
        "tokens": config.max_steps * config.tokens_per_step,
        "step_seconds": _positive(times.get("step_seconds")),
        "total_seconds": _positive(times.get("total_seconds")),
    }


def _seconds_left(metrics: Metrics, steps: int) -> float:
    """At the pace of the last twentieth of the rows, pauses included; NaN if unknown."""
    first = metrics.count - 1 - max(metrics.count // 20, min(metrics.count - 1, 100))
    if first < 0 or not steps:
        return math.nan
    rows = np.array([first, metrics.count - 1])
    (begin, end), (began, ended) = metrics.at("step", rows), metrics.at("seconds", rows)
    return steps * (ended - began) / (end - begin) if end > begin else math.nan


def _pauses(metrics: Metrics) -> dict[str, Any]:
    """The pauses: what lies between the end of a step and the beginning of the next. The longest are marked."""
    every = np.arange(metrics.count)
    steps, tokens, seconds, speed = (metrics.at(key, every) for key in (*POSITIONS, "tokens_per_second"))
    with np.errstate(all="ignore"):
        step_seconds = tokens / steps / speed
        pause = np.diff(seconds, prepend=0.0) - step_seconds * np.diff(steps, prepend=0.0)
    pause[~np.isfinite(pause)] = 0
    usual = float(np.nanmedian(step_seconds)) if np.isfinite(step_seconds).any() else 0.0
    (long,) = np.nonzero(pause > max(0.01, usual / 10))
    marked = np.sort(long[np.argsort(pause[long])[-MOST_MARKS:]])
    return _at(metrics, marked) | {
        "length": _numbers(pause[marked]),
        "total": float(pause[long].sum()),
        "count": len(long),
    }


def _restarts(metrics: Metrics, sessions: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The steps after which a session resumed; of very many, some."""
    steps = np.array([row["step"] for row in sessions if 0 < row["step"] <= (metrics.last("step") or 0)], float)
    marked = steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_MARKS)).astype(int))]
    return _at(metrics, np.searchsorted(metrics.steps, marked)) | {"count": len(steps)}


def _session(row: Mapping[str, Any]) -> dict[str, Any]:
    versions = row.get("versions")
    words = [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    texts = {key: printable(str(row.get(key, "")))[:200] for key in ("time", "device", "precision")}
    numbers = {key: _positive(row.get(key)) for key in ("parameters", "data_tokens")}
    return texts | numbers | {"step": row["step"], "versions": printable(", ".join(words))[:300]}


def _checkpoints(workdir: Path, metrics: Metrics) -> list[dict[str, Any]]:
    """The checkpoints on the disk, the best one if the run keeps it, and the finished model."""
    places = [(f"step {step:,}", step, workdir) for step in saved_steps(workdir)]
    places += [(f"step {step:,}, the best", step, workdir / BEST) for step in saved_steps(workdir / BEST)]
    folders = [(name, step, place / CHECKPOINTS / str(step)) for name, step, place in places]
    checkpoints = []
    for name, step, folder in [*folders, (FINAL_MODEL, 0, workdir / FINAL_MODEL)]:
        with contextlib.suppress(FileNotFoundError):  # deleted after it was listed, or not written yet
            checkpoints.append({"name": name} | _checkpoint(folder, step, metrics))
    return checkpoints


def _checkpoint(folder: Path, step: int, metrics: Metrics) -> dict[str, Any]:
    val_losses = metrics.at("val_loss", np.flatnonzero(metrics.steps == step)).tolist()
    return {
        "time": datetime.fromtimestamp(folder.stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "val_loss": _number(val_losses[0]) if val_losses else None,
    }


def _notes(damaged: Mapping[str, int]) -> list[str]:
    return [
        f"{count:,} damaged {'line is' if count == 1 else 'lines are'} left out of {name}"
        for name, count in damaged.items()
        if count
    ]


def _numbers(values: Floats) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    """With nine digits, which tell all float32 apart; None if it is not finite."""
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.9g}")


def _positive(value: Any) -> float | None:
    return _number(float(value)) if type(value) in (int, float) and 0 < value < 1e300 else None
