"""A pseudo-terminal and the screen that it shows, emulated by pyte."""

import contextlib
import fcntl
import os
import pty
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator

import pyte


class PseudoTerminal:
    """A terminal of so many columns and rows; `file` is what a program writes to."""

    def __init__(self, columns: int, rows: int = 24):
        self._master, self.descriptor = pty.openpty()
        self.file = os.fdopen(self.descriptor, "w")
        self.received = b""
        self._screen = pyte.Screen(columns, rows)
        self._set_size(columns, rows)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._lock = threading.Lock()
        self._stream = pyte.ByteStream(self._screen)
        self._thread.start()

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65536):
                with self._lock:
                    self.received += data
                    self._stream.feed(data)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    @property
    def lines(self) -> list[str]:
        """What the screen shows, without empty lines at the end."""
        with self._lock:
            lines = [line.rstrip() for line in self._screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def cursor(self) -> pyte.screens.Cursor:
        return self._screen.cursor

    def wait_for(self, seen: Callable[[], bool]) -> None:
        """Returns once `seen` is true, within a minute."""
        end = time.monotonic() + 60
        while not seen():
            assert time.monotonic() < end, "\n".join(self.lines)
            time.sleep(0.01)

    def resize(self, columns: int, reflow: bool) -> None:
        """Changes the width. With `reflow` lines are broken again, as most terminals do; else they are cut."""
        with self._lock:
            screen = self._screen
            if reflow:
                before = [line.rstrip() for line in screen.display]
                row = screen.cursor.y
                screen = self._screen = pyte.Screen(columns, screen.lines)
                self._stream = pyte.ByteStream(screen)
                self._stream.feed("".join(line + "\r\n" for line in before[:row]).encode())
                place = f"\x1b[{screen.cursor.y + 1};1H"
                self._stream.feed("\r\n".join(before[row : row + 3]).encode() + place.encode())
            else:
                screen.resize(columns=columns)
        self._set_size(columns, screen.lines)

    def close(self) -> None:
        self.file.close()
        self._thread.join(10)
        os.close(self._master)


@contextlib.contextmanager
def pseudo_terminal(columns: int, rows: int = 24) -> Iterator[PseudoTerminal]:
    terminal = PseudoTerminal(columns, rows)
    try:
        yield terminal
    finally:
        terminal.close()
