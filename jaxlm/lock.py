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
    """Holds `directory`/lock, in which the holder's pid and host stand, and removes it afterwards.

    The lock is the kernel's, which frees it when its process ends in whatever way: a file left behind locks nobody out.

    Raises:
        RequestError: another process holds it.
        OSError: the file cannot be made.
    """
    path = directory / "lock"
    with contextlib.ExitStack() as stack:
        held = None
        while held is None or not path.exists() or not os.path.samestat(os.fstat(held.fileno()), path.stat()):
            held = stack.enter_context(path.open("a+", encoding="utf-8"))  # again, where another just removed it
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RequestError(f"{directory} is in use by {_holder(path)}: wait for it or stop it") from error
        held.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, held)
        held.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _holder(lock: Path) -> str:
    try:
        said = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {said['pid']} on {said['host']}"
    except (ValueError, TypeError, KeyError):  # caught between taking it and saying so
        return "another process"
