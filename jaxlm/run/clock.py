"""The clock of a run: seconds of steps and pauses, and an estimate of the time left."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from statistics import median, median_low
from typing import NamedTuple


class InProgress(NamedTuple):
    """The step or the pause that a run is in."""

    kind: str  # `step`, or of a pause
    began: float  # the second of the run
    usual: float = math.inf  # seconds of the median step; inf: a pause, or not known yet


class Clock:
    """Splits a run's time into steps and pauses (compilation, evaluation, samples, checkpoint).

    The clock does not run while the machine sleeps. Estimates use medians, so a step or a pause during which the
    process was stopped does not count. Steps overlap with the host's work: a step lasts from the end of the previous
    step, or of the pause between them, to its own end on the device.
    """

    def __init__(self, seconds_before: float = 0.0, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._start = now() - seconds_before
        self._mark = seconds_before
        self._steps: deque[float] = deque(maxlen=50)
        self._pauses: dict[str, deque[float]] = {}
        self.in_progress = InProgress("step", seconds_before)

    def seconds(self) -> float:
        """Seconds since the start of training, over all sessions."""
        return self._now() - self._start

    def step_ended(self, at: float) -> float:
        """Ends a step at the second `at` of `seconds`; returns how long it took."""
        self._steps.append(at - self._mark)
        self._begin_step(at)
        return self._steps[-1]

    def _begin_step(self, at: float) -> None:
        self._mark = at
        self.in_progress = InProgress("step", at, median(self._steps) if self._steps else math.inf)

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Counts the time spent inside as a pause, not as a step."""
        start = self.seconds()
        self.in_progress = InProgress(kind, start)
        try:
            yield
        finally:
            seconds = self.seconds() - start
            self._pauses.setdefault(kind, deque(maxlen=5)).append(seconds)
            self._begin_step(self._mark + seconds)

    def seconds_left(self, steps: int, pauses: Mapping[str, int]) -> float:
        """Estimates the seconds of `steps` steps and of `pauses` (a count for each kind) from the last of each."""
        step = median(self._steps) if self._steps else 0.0
        medians = {kind: median_low(seconds) for kind, seconds in self._pauses.items()}
        return steps * step + sum(count * medians.get(kind, 0.0) for kind, count in pauses.items())
