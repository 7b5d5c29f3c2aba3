"""What a work directory holds before a session of training: the settings of its run, and its checkpoints."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.config import Config, differences
from jaxlm.errors import RunError, UsageError, disk_advice

CHECKPOINTS = "checkpoints"
RECORDS = ("metrics.jsonl", "samples.jsonl")
HAS_CHECKPOINTS = "has_checkpoints"  # an empty file in the work directory of a run that has been saved


def saved_steps(workdir: Path) -> list[int]:
    """The steps whose checkpoints are complete, oldest first. Raises RunError if they cannot be listed."""
    folder = workdir / CHECKPOINTS
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()] if os.path.isdir(folder) else []
    except OSError as error:
        raise RunError(f"cannot read {folder} ({error.strerror}): {disk_advice(error)}") from error
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def existing_parent(path: Path) -> Path:
    """`path`, or else the nearest directory above it that exists."""
    return next(directory for directory in (path, *path.absolute().parents) if directory.is_dir())


def check_workdir(workdir: Path, config: Config) -> Mapping[str, Any]:
    """The settings in `workdir`/config.json; none without the file.

    Raises UsageError if `workdir` belongs to a run with other fixed settings, or to one that has lost its checkpoints.
    Raises RunError as `saved_steps`.
    """
    _check_checkpoints(workdir)
    file = workdir / "config.json"
    if not os.path.lexists(file):
        return {}
    try:
        saved = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is damaged: move it away, each checkpoint holds the settings too") from error
    if changes := fixed_differences(saved, config):
        raise UsageError(f"{workdir} belongs to another run: {'; '.join(changes)}; choose another --workdir")
    return saved


def fixed_differences(saved: Any, config: Config) -> list[str]:
    """A phrase for each fixed setting that differs. Raises UsageError as `differences`."""
    different = [change for change in differences(saved, config) if change.fixed]
    return [f"{change.name} is {change.value}, the saved run has {change.saved}" for change in different]


def _check_checkpoints(workdir: Path) -> None:
    """Raises UsageError if a run would start again over the records of one that was saved.

    A session makes `checkpoints/` before the first row of its records, so rows without it are those of a run that has
    lost it. An empty one is that of a run that was never saved, or of one whose disk is not mounted: only the latter
    has HAS_CHECKPOINTS beside it.
    """
    folder = workdir / CHECKPOINTS
    exists = os.path.isdir(folder)
    if saved_steps(workdir) or (exists and not os.path.exists(workdir / HAS_CHECKPOINTS)):
        return
    records = [name for name in RECORDS if os.path.isfile(workdir / name) and os.path.getsize(workdir / name)]
    blocking = records + [CHECKPOINTS] * (os.path.lexists(folder) and not exists)
    if blocking:
        state = "holds no checkpoint" if exists else "is not there"
        raise UsageError(
            f"{folder} {state}, but {workdir} has the records of a run: restore the folder or mount its disk to resume;"
            f" to begin again, choose another --workdir or move {', '.join(blocking)} away"
        )
