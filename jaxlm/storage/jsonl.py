"""Append-only files: each entry is written whole, and waits in memory while the disk is full."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.storage import atomic


class AppendOnlyFile:
    """One append-only file."""

    def __init__(self, path: Path):
        """Opens `path`, and creates it if missing. Raises OSError."""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = os.fstat(self._descriptor).st_size  # bytes; a multiple of whole entries
        self._pending = b""

    def append(self, entry: bytes) -> None:
        """Writes an entry. If the disk is full, the entry is written together with a later one."""
        self._pending += entry
        self._write()

    def sync(self) -> None:
        """Flushes every entry to the disk. Raises OSError if it cannot."""
        if failure := self._write():
            raise failure
        atomic.sync_descriptor(self._descriptor)

    def close(self) -> None:
        """Closes the file."""
        self._write()
        os.close(self._descriptor)

    def _write(self) -> OSError | None:
        if not self._pending:
            return None
        try:
            written = 0
            while written < len(self._pending):  # the system says why it wrote a part only when it is asked again
                written += os.write(self._descriptor, self._pending[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, self._size)
            return error
        self._size += written
        self._pending = b""
        return None


def to_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of a .jsonl file."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def keep_up_to(path: Path, step: int) -> Path | None:
    """Deletes the rows after `step` from a .jsonl file, and an incomplete last line.

    Returns:
        Where the original file is kept if there were other damaged lines, which are deleted too; else None.
    """
    if not path.exists():
        return None
    content = path.read_bytes()
    lines = [(line, _step_of(line)) for line in content.splitlines(keepends=True)]
    damaged = any(line_step is None and line.endswith(b"\n") for line, line_step in lines)
    original = atomic.unused(path.with_name(f"{path.name}.damaged")) if damaged else None
    if original:
        atomic.write_file(original, content)
    kept = b"".join([line for line, line_step in lines if line_step is not None and line_step <= step])
    if kept != content:
        atomic.write_file(path, kept)
    return original


def rows_up_to(path: Path, step: int) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file up to `step`, without damaged lines; none if there is no file. Raises OSError."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        if (line_step := _step_of(line)) is not None and line_step <= step:
            yield json.loads(line)


def _step_of(line: bytes) -> int | None:
    """The step of a row; None if the line is incomplete or not a row."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None
