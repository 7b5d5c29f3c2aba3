"""A lock on a directory, so that only one process writes to it."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from jaxlm.errors import UsageError


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Locks `directory`/lock, writes the pid and host of this process into it, and deletes it at the end.

    This is a lock of the kernel (flock), which is released however the process ends. A leftover file locks nobody out.

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
            path.unlink(missing_ok=True)


def _lock(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError as error:
            file.close()
            raise UsageError(f"{path.parent} is in use by {_holder(path)}: wait for it or stop it") from error
        except FileNotFoundError:  # the holder deleted the file after it was opened here
            pass
        file.close()


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, TypeError, KeyError):  # locked, but its pid is not written yet
        return "another process"
