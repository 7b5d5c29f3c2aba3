"""Programs that leave nothing behind when they fail or are stopped: no process and no temporary folder."""

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TIME_LIMIT = 10.0  # seconds until a killed process is gone


@contextlib.contextmanager
def no_child_left() -> Iterator[None]:
    """Kills the processes that this one started, and those that they started, on an exception or a signal of STOPS.

    A signal that is not ignored raises SystemExit with the status 128 + its number. Others after it are ignored.
    """
    heeded = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, _stop) for number in heeded}
    try:
        yield
    except BaseException:
        kill_children()
        raise
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is _stop:
                signal.signal(number, handler)


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A folder that is deleted at the end, after `no_child_left`. The temporary files of children are in it too."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder, no_child_left():
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)


def kill_children() -> None:
    """Kills all descendants of this process and waits for their end."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    deadline = time.monotonic() + TIME_LIMIT
    while any(map(_is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _is_running(process: psutil.Process) -> bool:
    """Whether it still runs. It is not reaped: what started it would wait for its end forever."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _stop(number: int, _: object) -> NoReturn:
    for other in STOPS:
        signal.signal(other, signal.SIG_IGN)
    kill_children()  # here, because subprocess.run kills its child first, and then those of the child have no parent
    sys.exit(128 + number)
