"""Files that only grow: what is appended goes in whole, and waits in memory while the disk is full."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.storage import atomic


class Journal:
    """One append-only file."""

    def __init__(self, path: Path):
        """Opens `path`, made if missing. Raises OSError."""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._whole = os.fstat(self._descriptor).st_size  # bytes, all of them of whole entries
        self._waiting = b""

    def append(self, entry: bytes) -> None:
        """Adds an entry; where there is no room for it, it is written with a later one."""
        self._waiting += entry
        self._write()

    def sync(self) -> None:
        """Returns once the disk holds every entry for good. Raises OSError while it cannot."""
        if failure := self._write():
            raise failure
        atomic.sync_descriptor(self._descriptor)

    def close(self) -> None:
        """Closes the file."""
        self._write()
        os.close(self._descriptor)

    def _write(self) -> OSError | None:
        if not self._waiting:
            return None
        try:
            written = os.write(self._descriptor, self._waiting)
            if written < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._descriptor, self._whole)
            return error
        self._whole += written
        self._waiting = b""
        return None


def to_line(row: Mapping[str, Any]) -> bytes:
    """A row of a .jsonl file."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def keep_up_to(path: Path, step: int) -> bool:
    """Keeps of a .jsonl file the rows of steps up to `step`, and no line that was cut off while being written.

    Returns:
        Whether there were damaged lines besides; then the file as it was stays beside it as *.damaged.
    """
    if not path.exists():
        return False
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [_step_of(line) for line in lines]
    damaged = any(its is None and line.endswith(b"\n") for line, its in zip(lines, steps, strict=True))
    if damaged:
        atomic.write_file(path.with_name(path.name + ".damaged"), b"".join(lines))
    kept = [line for line, its in zip(lines, steps, strict=True) if its is not None and its <= step]
    if len(kept) < len(lines):
        atomic.write_file(path, b"".join(kept))
    return damaged


def rows_up_to(path: Path, step: int) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file, of steps up to `step`; none where there is no file. Raises OSError."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        its = _step_of(line)
        if its is not None and its <= step:
            yield json.loads(line)


def _step_of(line: bytes) -> int | None:
    """The step of a row, None for what is none."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None
