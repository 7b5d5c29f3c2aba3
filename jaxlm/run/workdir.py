"""What a work directory holds before a session of training: the settings of its run, and its checkpoints."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.config import Config, differences
from jaxlm.errors import RunError, UsageError, disk_advice
from jaxlm.interop.huggingface import WEIGHTS

CHECKPOINTS, FINAL_MODEL = "checkpoints", "final_model"
BEST = "best"  # a folder like a work directory, with the checkpoint of the lowest validation loss
METRICS, SAMPLES, SESSIONS = "metrics.jsonl", "samples.jsonl", "sessions.jsonl"
RECORDS = (METRICS, SAMPLES)  # which belong to steps, and lose those that are trained again
NEVER_SAVED = "never_saved"  # an empty file in the work directory of a run until its first save is complete


def saved_steps(workdir: Path) -> list[int]:
    """The steps whose checkpoints are complete, oldest first. Raises RunError if they cannot be listed."""
    folder = workdir / CHECKPOINTS
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()] if os.path.isdir(folder) else []
    except OSError as error:
        raise RunError(f"cannot read {folder} ({error.strerror}): {disk_advice(error)}") from error
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def saved_hashes(workdir: Path) -> tuple[str | None, str | None]:
    """The hashes of the text and of train.bin in the newest checkpoint; None if it has none or cannot be read."""
    file = workdir / CHECKPOINTS / str(max(saved_steps(workdir), default=0)) / "meta" / "metadata"
    try:
        meta = json.loads(file.read_text())
        return dict(meta.get("source", {})).get("sha256"), dict(meta["tokens"]).get("train_sha256")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None, None


def existing_parent(path: Path) -> Path:
    """`path`, or else the nearest directory above it that exists."""
    return next(directory for directory in (path, *path.absolute().parents) if directory.is_dir())


def saved_settings(workdir: Path) -> Any:
    """What `workdir`/config.json holds; None without the file. Raises UsageError if it is damaged."""
    file = workdir / "config.json"
    if not os.path.lexists(file):
        return None
    try:
        if (saved := json.loads(file.read_text())) is None:
            raise ValueError("it holds nothing")
        return saved
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is damaged: move it away, each checkpoint holds the settings too") from error


def check_workdir(workdir: Path, config: Config) -> Mapping[str, Any]:
    """The settings in `workdir`/config.json; none without the file.

    Raises UsageError if `workdir` belongs to a run with other fixed settings, or to one that has lost its checkpoints.
    Raises RunError as `saved_steps`.
    """
    _check_checkpoints(workdir)
    saved = saved_settings(workdir)
    if saved is not None and (changes := fixed_differences(saved, config)):
        raise UsageError(f"{workdir} belongs to another run: {'; '.join(changes)}; choose another --workdir")
    return saved or {}


def fixed_differences(saved: Any, config: Config) -> list[str]:
    """A phrase for each fixed setting that differs. Raises UsageError as `differences`."""
    different = [each for each in differences(saved, config) if each.fixed]
    return [f"{each.name} is {_shown(each.value)}, the saved run has {_shown(each.saved)}" for each in different]


def _shown(value: Any) -> str:
    return "empty" if value == "" else str(value)


def _check_checkpoints(workdir: Path) -> None:
    """Raises UsageError if a run would start again over the records or the model of one that was saved.

    Without checkpoints, a run has lost them, or their disk is not mounted, unless NEVER_SAVED says otherwise.
    """
    folder = workdir / CHECKPOINTS
    exists = os.path.isdir(folder)
    if saved_steps(workdir) or (exists and os.path.exists(workdir / NEVER_SAVED)):
        return
    left = [name for name in RECORDS if os.path.isfile(workdir / name) and os.path.getsize(workdir / name)]
    left += [FINAL_MODEL] * os.path.lexists(workdir / FINAL_MODEL / WEIGHTS)
    blocking = left + [CHECKPOINTS] * (os.path.lexists(folder) and not exists)
    if blocking:
        state = "holds no checkpoint" if exists else "is not there"
        raise UsageError(
            f"{folder} {state}, but {workdir} has {', '.join(left) or 'its link'} of a run: restore the folder or mount"
            f" its disk to resume; to begin again, choose another --workdir or move {', '.join(blocking)} away"
        )
