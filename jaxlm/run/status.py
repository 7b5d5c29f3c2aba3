"""The state of a run in two lines: what the machine does, progress and time left, loss, speed, last save, memory."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from statistics import median

from rich.text import Text

from jaxlm.config import Config
from jaxlm.run.events import (
    Event,
    NotSavedEvent,
    PauseEvent,
    PauseStartEvent,
    SavedEvent,
    SavingEvent,
    StepEvent,
    StoppingEvent,
)
from jaxlm.units import duration, end_text, gb, sparkline

DOING = {"compilation": "compiling", "evaluation": "evaluating", "samples": "sampling", "checkpoint": "saving"}
SPEED_STEPS = 8  # the speed of the moment is that of the median of so many steps
TREND = 12  # characters of the loss's trend
BAR = 8, 30  # the least and the largest width of the bar
GAP = "  "


class Trend:
    """Means of the losses of equally many steps: from TREND to 2 TREND of them, over all steps of the session."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._sum, self._count, self._size = 0.0, 0, 1

    def add(self, loss: float) -> None:
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count < self._size:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == 2 * TREND:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._size *= 2

    def __str__(self) -> str:
        """The last TREND means: at least the later half of the session."""
        return sparkline(self._means[-TREND:])


class Status:
    """Takes the events of a session, and tells its state in lines that fit a terminal."""

    def __init__(
        self, config: Config, step: int, memory_bytes: Callable[[], int], now: Callable[[], float] = time.time
    ):
        self._config, self._memory_bytes, self._now = config, memory_bytes, now
        self._step = step
        self._doing, self._saving = "starting", False
        self._last: StepEvent | None = None
        self._first: StepEvent | None = None
        self._speeds: deque[float] = deque(maxlen=SPEED_STEPS)
        self._trend = Trend()
        self._start, self._saved, self._stepped = now(), 0.0, 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case StepEvent(step):
                self._step, self._last, self._stepped = step, event, self._now()
                self._first = self._first or event
                self._speeds.append(event.tokens_per_second)
                self._trend.add(event.loss)
            case PauseStartEvent(kind):
                self._doing = DOING[kind]
            case PauseEvent():
                self._doing = "training" if self._step < self._config.max_steps else "finishing"
            case StoppingEvent():
                self._doing = "stopping"
            case SavingEvent():
                self._saving = True
            case SavedEvent():
                self._saving, self._saved = False, self._now()
            case NotSavedEvent():
                self._saving = False

    def lines(self, columns: int) -> list[Text]:
        """Two lines shorter than `columns`; what is least important is left out where they are too long."""
        room = columns - 1
        return [self._progress(room), _fitting(self._numbers(), room)]

    def _progress(self, room: int) -> Text:
        last = self._config.max_steps
        doing = f"{self._doing}, saving" if self._saving and self._doing == "training" else self._doing
        count = f"{self._step:,}/{last:,}"
        line = _fitting([Text(doing, "bold"), Text(count), *map(Text, self._time_left())], room)
        width = min(room - line.cell_len - len(GAP), BAR[1])
        if width < BAR[0]:
            return line
        done = width * self._step // last
        bar = Text.assemble(("━" * done, "cyan"), ("─" * (width - done), "dim"))
        return Text(GAP).join([line[: len(doing)], bar, line[len(doing) + len(GAP) :]])

    def _time_left(self) -> list[str]:
        if not self._last:
            return []
        left = max(self._last.seconds_left - (self._now() - self._stepped), 0.0)
        return [f"{duration(left)} left", f"ends {end_text(datetime.fromtimestamp(self._now()), left)}"]

    def _numbers(self) -> list[Text]:
        """From the most to the least important."""
        if not self._last or not self._first:
            return []
        tokens, seconds = self._last.tokens - self._first.tokens, self._last.seconds - self._first.seconds
        speed = f"{median(self._speeds):,.0f} tokens/s"
        average = f", mean {tokens / seconds:,.0f}" if seconds > 0 else ""
        since = duration(self._now() - (self._saved or self._start))
        loss = Text.assemble(f"loss {self._last.loss:.3f} ", (str(self._trend), "cyan"))
        saved = f"saved {since} ago" if self._saved else f"unsaved for {since}"
        memory = self._memory_bytes()
        return [loss, Text(speed + average), Text(saved), *([Text(gb(memory))] if memory else [])]


def _fitting(parts: Sequence[Text], room: int) -> Text:
    """As many of the parts, from the first, as fit into `room` columns; the first is cut if it does not."""
    for count in range(len(parts), 1, -1):
        line = Text(GAP).join(parts[:count])
        if line.cell_len <= room:
            return line
    line = parts[0].copy() if parts else Text()
    line.truncate(max(room, 0))
    return line
