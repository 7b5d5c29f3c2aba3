"""What runs beside the training in a thread of its own: listeners, so that a slow one delays no step, and a timer."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jaxlm.run.events import Event, Listener

CLOSE_SECONDS = 60.0  # that a listener may take, when the run ends, for the events it has not yet seen


class BackgroundListener:
    """Passes events to a listener in its own thread, in order.

    Once the listener has raised, it receives nothing more, and the next call here raises its error.
    """

    def __init__(self, listener: Listener):
        self.listener = listener
        self._error: Exception | None = None
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        self._raise_error()
        self._events.put(event)

    def close(self) -> None:
        """Waits until the listener has seen all events. Raises its error, or TimeoutError if it takes too long."""
        self._events.put(None)
        self._thread.join(CLOSE_SECONDS)
        self._raise_error()
        if self._thread.is_alive():
            raise TimeoutError(f"it has not seen all events after {CLOSE_SECONDS:g} s")

    def _raise_error(self) -> None:
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            while event := self._events.get():
                self.listener(event)
            close: Any = getattr(self.listener, "close", None)
            if close:
                close()
        except Exception as error:
            self._error = error


@contextlib.contextmanager
def calls_every(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """A context in which a thread calls `call` every so many seconds."""
    end = threading.Event()

    def run() -> None:
        while not end.wait(seconds):
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
