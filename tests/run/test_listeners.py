"""A listener that hangs: a run neither waits for it nor keeps events for it without end."""

import threading

import pytest

from jaxlm.run import listeners
from jaxlm.run.events import MessageEvent
from jaxlm.run.listeners import BackgroundListener, Listeners


def test_a_listener_that_hangs_is_left_out_once_many_events_wait(monkeypatch):
    monkeypatch.setattr(listeners, "MOST_EVENTS", 3)
    seen, shown = [], []
    entered, released = threading.Event(), threading.Event()

    def hanging(event):
        seen.append(event.text)
        entered.set()
        released.wait(60)

    background = BackgroundListener(hanging)
    all_listeners = Listeners(lambda event: shown.append(event.text), [background])
    all_listeners.call("__call__", MessageEvent("0"))
    assert entered.wait(60)
    for number in range(1, 9):
        all_listeners.call("__call__", MessageEvent(str(number)))
    messages = [text for text in shown if "left out" in text]
    assert messages == [
        "  → The listener test_a_listener_that_hangs_is_left_out_once_many_events_wait.<locals>.hanging failed and is"
        " left out (TimeoutError: 3 events wait for it)"
    ]
    with pytest.raises(TimeoutError, match="3 events"):
        background.close()  # at once, though it still hangs
    released.set()
    background._thread.join(60)
    assert seen == ["0"]
