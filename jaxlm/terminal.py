"""Writing to a terminal: bars and colours there only, and no control characters of a text."""

import sys
import unicodedata
from typing import Any

from rich.console import Console

_REORDERING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # reorder a line of bidirectional text


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError, as `print` does, instead of ending the process. Later output is dropped."""
        self.quiet = True
        raise BrokenPipeError


def console(*, stderr: bool = False, **options: Any) -> Console:
    """A rich console with bars and colours on a terminal only.

    Variables such as FORCE_COLOR, which rich reads, cannot bring them into a file or a pipe.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return _Console(stderr=stderr, force_terminal=None if terminal else False, **options)


def printable(text: str) -> str:
    """`text` with spaces for the characters that a terminal obeys, except newline and tab.

    It has as many characters as before, so it may be applied to parts of a text.
    """
    return "".join(" " if _is_obeyed(c) else c for c in text)


def _is_obeyed(character: str) -> bool:
    control = unicodedata.category(character) == "Cc" and character not in "\n\t"
    return control or character in _REORDERING
