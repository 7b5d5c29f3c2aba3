"""The listeners of a run: one that raises is left out, and a slow one delays no step."""

import contextlib
import queue
import sys
import threading
from collections.abc import Sequence
from typing import Any

from jaxlm.run.events import Event, Listener, MessageEvent

MOST_EVENTS = 10_000  # that may wait for a listener
CLOSE_SECONDS = 60.0  # for a listener, at the end of a run, to see the remaining events


class Listeners:
    """The console and other listeners. One that raises is named and left out."""

    def __init__(self, console: Listener, others: Sequence[Listener]):
        self._console = console
        self._listeners: list[Any] = [console, *others]

    def call(self, method: str, *arguments: Any) -> None:
        """Calls a method of each listener that has it."""
        for listener in tuple(self._listeners):
            try:
                if listener in self._listeners and hasattr(listener, method):
                    getattr(listener, method)(*arguments)
            except Exception as error:
                self._leave_out(listener, error)

    def _leave_out(self, listener: Any, error: Exception) -> None:
        try:
            self._listeners.remove(listener)
        except ValueError:  # another thread has left it out
            return
        with contextlib.suppress(Exception):
            listener.close()
        source = getattr(listener, "listener", listener)
        name = getattr(source, "__qualname__", type(source).__qualname__)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        message = f"  → The listener {name} failed and is left out ({reason})"
        if listener is self._console:
            with contextlib.suppress(OSError):
                print(message, file=sys.stderr)
        self.call("__call__", MessageEvent(message))


class BackgroundListener:
    """Passes events to a listener in its own thread, in order.

    Once the listener has raised, or MOST_EVENTS wait for it, it receives nothing more, and the next call here raises.
    """

    def __init__(self, listener: Listener):
        self.listener = listener
        self._error: Exception | None = None
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        if self._events.qsize() >= MOST_EVENTS:
            self._error = self._error or TimeoutError(f"{MOST_EVENTS:,} events wait for it")
        self._raise_error()
        self._events.put(event)

    def close(self) -> None:
        """Waits until the listener has seen all events. Raises its error, or TimeoutError if it takes too long."""
        self._raise_error()
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
            while not self._error and (event := self._events.get()):
                self.listener(event)
            close: Any = getattr(self.listener, "close", None)
            if close:
                close()
        except Exception as error:
            self._error = error
