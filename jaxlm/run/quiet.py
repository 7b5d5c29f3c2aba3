"""Quiets libraries below a command, so that each of its errors is one line, and keeps their warnings in a file."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging  # noqa: F401  (sets its logger's level when it is imported)

from jaxlm.device import distributed

LIBRARY_LOG = "library.log"
_LOGGERS = [logging.getLogger(name) for name in ("absl", "asyncio", "jaxlm")]
_BYTES = 200_000  # of a log; the one before is kept as library.log.1


def quiet_libraries() -> None:
    """Hides what absl, asyncio and tensorstore print about errors that are also raised.

    This changes the process: its loggers and `sys.unraisablehook`. Only a command calls it, at its start.
    """
    for logger in _LOGGERS:
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(logging.NullHandler())
    sys.unraisablehook = _unraisable_hook


class _LogFile(logging.Handler):
    """Appends records to a file, without a buffer that an error of the disk would leave full.

    It writes nothing to another folder that has taken the place of the file's.
    """

    def __init__(self, path: Path):
        super().__init__()
        self._path, self._place = path, os.stat(path.parent)
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a lost warning ends no run
            if not os.path.samestat(os.stat(self._path.parent), self._place):
                return
            if self._path.exists() and self._path.stat().st_size > _BYTES:
                self._path.replace(f"{self._path}.1")
            with self._path.open("ab", buffering=0) as file:
                file.write(f"{self.format(record)}\n".encode(errors="backslashreplace"))


@contextlib.contextmanager
def log_libraries(workdir: Path) -> Iterator[None]:
    """Appends the warnings of the libraries to LIBRARY_LOG in `workdir`. If the disk fails, they are lost.

    Of several processes, each but the first has its own file.
    """
    log = Path(LIBRARY_LOG)
    path = workdir.absolute() / (f"{log.stem}-{distributed.index()}{log.suffix}" if distributed.index() else log)
    distributed.capture_stderr(path)
    handler = _LogFile(path)
    for logger in _LOGGERS:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in _LOGGERS:
            logger.removeHandler(handler)


def _unraisable_hook(unraisable: Any) -> None:
    """Python's own hook, except for tensorstore's calls into the event loop of a save or restore that orbax ended."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
