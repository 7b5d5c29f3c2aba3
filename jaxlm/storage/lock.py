"""A lock on a directory, so that only one process writes to it."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from jaxlm.errors import UsageError
from jaxlm.storage import atomic

NO_LOCKS = atomic.UNSUPPORTED | {errno.ENOLCK}


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Locks `directory`/lock, writes the pid and host of this process into it, and deletes it at the end.

    This is a lock of the kernel (flock), which is released however the process ends. A leftover file locks nobody out.
    Where the file system has no locks, the pid and host in the file are the lock. Then two processes that start within
    a moment are not kept apart, and a file left by a process on another host must be moved away by hand.

    Raises:
        UsageError: another process holds the lock.
        OSError: the file cannot be created.
    """
    path = directory / "lock"
    with _lock(path) as file:
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        try:
            yield
        finally:
            if _is_at(file, path):
                path.unlink(missing_ok=True)


def is_written(directory: Path) -> bool:
    """Whether the process that `directory`/lock names runs; one on another host is taken to. Takes no lock."""
    return _running_holder(directory / "lock") is not None


def _lock(path: Path) -> TextIO:
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_at(file, path):  # the holder deleted it after it was opened here
                    continue
            except BlockingIOError as error:
                raise UsageError(
                    f"{path.parent} is in use by {_name(_holder(path))}: wait for it or stop it"
                ) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                _check_ended(path)
            stack.pop_all()
            return file


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether `path` is this open file: the directory may have been renamed, and another be in its place."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _check_ended(path: Path) -> None:
    """Raises UsageError if the process that the file names may still run."""
    if holder := _running_holder(path):
        raise UsageError(
            f"{path.parent} is in use by {_name(holder)}: wait for it or stop it; if it has ended, move {path} away"
        )


def _running_holder(path: Path) -> tuple[int, str] | None:
    """The holder, if it may still run."""
    holder = _holder(path)
    return holder if holder and (holder[1] != socket.gethostname() or _runs(holder[0])) else None


def _runs(pid: int) -> bool:
    """Whether another process of this host has the pid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid != os.getpid()


def _holder(path: Path) -> tuple[int, str] | None:
    """The pid and the host in the file; None if they are not written yet."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return int(holder["pid"]), str(holder["host"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _name(holder: tuple[int, str] | None) -> str:
    return f"process {holder[0]} on {holder[1]}" if holder else "another process"
