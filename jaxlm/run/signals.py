"""SIGINT, SIGTERM and SIGHUP: the first one stops a run after its step, a second SIGINT ends the process at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """A context that records stop signals. On exit, it restores the former handlers."""

    def __init__(self, before_exit: Callable[[], None]):
        """`before_exit` is called, from another thread, before a second SIGINT ends the process."""
        self.number = 0  # the first stop signal received; 0: none
        self._before_exit = before_exit

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
        stopping = False
        while byte := os.read(read_end, 1):
            if stopping and byte[0] == signal.SIGINT:
                self._before_exit()
                os._exit(128 + signal.SIGINT)
            if byte[0] in STOP_SIGNALS and not stopping:
                stopping = True
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, b"Stopping after this step; Ctrl-C again to leave at once, without saving\n")
        os.close(read_end)
