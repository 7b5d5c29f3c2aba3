"""Quiets libraries below a command, so that each of its errors is one line, and keeps their warnings in a file."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import absl.logging  # noqa: F401  (sets its logger's level when it is imported)

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


@contextlib.contextmanager
def log_libraries(workdir: Path) -> Iterator[None]:
    """Appends the warnings of the libraries to LIBRARY_LOG in `workdir`. A disk that fails costs the warning only."""
    handler = RotatingFileHandler(workdir / LIBRARY_LOG, maxBytes=_BYTES, backupCount=1, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    for logger in _LOGGERS:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in _LOGGERS:
            logger.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def _unraisable_hook(unraisable: Any) -> None:
    """Python's own hook, except for tensorstore's calls into the event loop of a save or restore that orbax ended."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
