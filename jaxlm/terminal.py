"""Writing to a terminal: bars and colours there only, and no control characters of a text."""

import contextlib
import os
import sys
import threading
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.file_proxy import FileProxy
from rich.segment import ControlType, Segment
from rich.text import Text

DRAW_SECONDS = 0.5
ERASE = "\r\x1b[J"  # from the beginning of the line to the end of the screen
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
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


@dataclass(frozen=True)
class _Codes:
    """Control codes, which take no room."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(self.text, None, [(ControlType.CARRIAGE_RETURN,)])


class LiveLines(RenderHook):
    """Lines below what a console prints, drawn again every half second; nothing unless it is a terminal that can.

    Between two draws the cursor stands at their beginning. So a terminal that was resized, whether it breaks lines
    again or cuts them, has the old lines below the cursor, where the next draw erases them.
    """

    def __init__(self, console: Console, lines: Callable[[int], Sequence[Text]]):
        """`lines` returns the lines for a terminal of so many columns. They must be shorter than that."""
        self.shown = console.is_terminal and console.is_interactive
        self._console, self._lines = console, lines
        self._end = threading.Event()
        self._streams = sys.stdout, sys.stderr
        if self.shown:
            sys.stdout, sys.stderr = (FileProxy(console, stream) for stream in self._streams)  # prints go above
            console.push_render_hook(self)
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """What rich prints in place of `renderables`: those, and the lines below them."""
        columns, rows = self._size()
        lines = self._lines(columns)[: max(rows - 1, 1)]
        up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
        return [_Codes(f"{HIDE_CURSOR}{ERASE}"), *renderables, Text("\n", end="").join(lines), _Codes(f"\r{up}")]

    def draw(self) -> None:
        """Draws the lines again."""
        if self.shown:
            self._console.print("", end="")

    def close(self) -> None:
        """Erases the lines, and shows the cursor."""
        if not self.shown or self._end.is_set():
            return
        self._end.set()
        self._thread.join()
        self._console.pop_render_hook()
        sys.stdout, sys.stderr = self._streams
        self._console.print(_Codes(f"{ERASE}{SHOW_CURSOR}"), end="")

    def _run(self) -> None:
        while not self._end.wait(DRAW_SECONDS):
            with contextlib.suppress(OSError):
                self.draw()

    def _size(self) -> tuple[int, int]:
        try:
            return os.get_terminal_size(self._console.file.fileno())
        except (OSError, ValueError):  # it has no descriptor
            return self._console.size


def printable(text: str) -> str:
    """`text` with spaces for the characters that a terminal obeys, except newline and tab.

    It has as many characters as before, so it may be applied to parts of a text.
    """
    return "".join(" " if _is_obeyed(c) else c for c in text)


def _is_obeyed(character: str) -> bool:
    control = unicodedata.category(character) == "Cc" and character not in "\n\t"
    return control or character in _REORDERING
