"""Quiets libraries below a command, so that each of its errors is one line."""

import logging
import sys
from typing import Any

import absl.logging  # noqa: F401  (sets its logger's level when it is imported)


def quiet_libraries() -> None:
    """Hides what absl, asyncio and tensorstore print about errors that are also raised.

    This changes the process: logging levels and `sys.unraisablehook`. Only a command calls it, at its start.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable_hook


def _unraisable_hook(unraisable: Any) -> None:
    """Python's own hook, except for tensorstore's calls into the event loop of a save or restore that orbax ended."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
