"""The clock of a run: seconds of steps and pauses, and an estimate of the time left."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from statistics import median, median_low

FEW_STEPS = 5  # too few to know the usual step


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
        self.step_began: float | None = None  # as `seconds`; None in a pause and before the first
        self.usual_step = math.inf  # seconds of the median step; inf: not known yet

    def seconds(self) -> float:
        """Seconds since the start of training, over all sessions."""
        return self._now() - self._start

    def step_ended(self, at: float) -> float:
        """Ends a step at the second `at` of `seconds`; returns how long it took."""
        self._steps.append(at - self._mark)
        self._mark = self.step_began = at
        if len(self._steps) >= FEW_STEPS:
            self.usual_step = median(self._steps)
        return self._steps[-1]

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Counts the time spent inside as a pause, not as a step."""
        start, self.step_began = self.seconds(), None
        try:
            yield
        finally:
            seconds = self.seconds() - start
            self._pauses.setdefault(kind, deque(maxlen=5)).append(seconds)
            self._mark += seconds
            self.step_began = self._mark

    def seconds_left(self, steps: int, pauses: Mapping[str, int]) -> float:
        """Estimates the seconds of `steps` steps and of `pauses` (a count for each kind) from the last of each."""
        step = median(self._steps) if self._steps else 0.0
        medians = {kind: median_low(seconds) for kind, seconds in self._pauses.items()}
        return steps * step + sum(count * medians.get(kind, 0.0) for kind, count in pauses.items())
