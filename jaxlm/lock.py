"""One writer for a directory."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from jaxlm.errors import RequestError


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Holds `directory`/lock, in which the holder's pid and host stand.

    The lock is the kernel's, which frees it when its process ends in whatever way: a file left behind locks nobody out.

    Raises:
        RequestError: another process holds it.
        OSError: the file cannot be made.
    """
    with (directory / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(f"{directory} is in use by {_holder(directory / 'lock')}: wait or stop it") from error
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        yield


def _holder(lock: Path) -> str:
    try:
        said = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {said['pid']} on {said['host']}"
    except (ValueError, TypeError, KeyError):  # caught between taking it and saying so
        return "another process"
