"""SIGINT, SIGTERM and SIGHUP: the first one stops a run after it has saved; SIGINT twice ends the process at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPING = "Stopping once the last step is saved; Ctrl-C {} to leave at once, without saving\n"


class StopSignals:
    """A context that records stop signals. On exit, it restores the former handlers."""

    def __init__(self, make_room: Callable[[], None]):
        """`make_room` is called, from another thread, before a message and before a second SIGINT ends the process."""
        self.number = 0  # the first stop signal received; 0: none
        self._make_room = make_room

    def __enter__(self) -> "StopSignals":
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in STOP_SIGNALS if not (number == signal.SIGHUP and nohup)]
        self._handlers = {number: signal.signal(number, self._handle_signal) for number in numbers}
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._answer, args=(read_end,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write_end)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: Any) -> None:
        self.number = self.number or number

    def _answer(self, read_end: int) -> None:
        """Answers at once, from its own thread: the main thread may be in a compilation for minutes."""
        received: list[int] = []
        while byte := os.read(read_end, 1):
            if byte[0] not in STOP_SIGNALS:
                continue
            received.append(byte[0])
            interrupts = received.count(signal.SIGINT)
            if interrupts == 2:
                self._make_room()
                os._exit(128 + signal.SIGINT)
            if len(received) == 1 or byte[0] == signal.SIGINT:
                with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
                    self._make_room()
                    os.write(sys.stderr.fileno(), STOPPING.format("again" if interrupts else "twice").encode())
        os.close(read_end)
