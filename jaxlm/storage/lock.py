"""One writer for a directory."""

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
    """Holds `directory`/lock, in which the holder's pid and host stand, and removes it afterwards.

    The lock is the kernel's, which frees it when its process ends in whatever way: a file left behind locks nobody out.

    Raises:
        UsageError: another process holds it.
        OSError: the file cannot be made.
    """
    path = directory / "lock"
    with _locked(path) as held:
        held.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, held)
        held.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError as error:
            file.close()
            raise UsageError(f"{path.parent} is in use by {_holder(path)}: wait for it or stop it") from error
        except FileNotFoundError:  # the holder removed it since it was opened here
            pass
        file.close()


def _holder(lock: Path) -> str:
    try:
        said = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {said['pid']} on {said['host']}"
    except (OSError, ValueError, TypeError, KeyError):  # caught between taking it and saying so
        return "another process"
