"""Signs that a run goes wrong: a loss that jumps or no longer falls, and a step that does not end."""

import contextlib
import math
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator

BAND_STEPS = 200  # the last ones, whose losses make the band
BAND_WIDTH = 8.0  # standard deviations of the noise
LEAST_NOISE = 0.005  # of the median, where the losses are almost equal
PLATEAU_STEPS = 500  # the shortest plateau
PLATEAU_SHARE = 0.1  # of the steps done: the loss falls ever more slowly
LATE_SECONDS, LATE_FACTOR = 60.0, 20.0  # a step is late after both
TICK_SECONDS = 5.0


class LossMonitor:
    """Takes the loss of each step, and warns once when it jumps or stops falling."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=BAND_STEPS)
        self._noise = 0.0  # a standard deviation
        self._outside_at = -BAND_STEPS  # the last step outside the band
        self._sums = array("d", [0.0])  # of the losses of this session, without those outside the band
        self._plateau = math.inf  # the loss must fall below this before the next plateau

    def __call__(self, step: int, loss: float) -> dict[str, str]:
        """Takes the loss of `step`; returns warnings by their kind: `spike` or `plateau`."""
        ordered, spike = sorted(self._recent), ""
        if math.isfinite(loss):
            self._recent.append(loss)
        if len(ordered) == BAND_STEPS:
            low, middle, high = (ordered[BAND_STEPS * quarter // 4] for quarter in (1, 2, 3))
            self._noise = max((high - low) / 1.349, LEAST_NOISE * abs(middle))  # 1.349: a normal distribution's
            if not loss <= middle + BAND_WIDTH * self._noise:  # nan too
                spike, loss = self._spike(step, loss, middle), middle
        warnings = {"spike": spike, "plateau": self._not_falling(step, loss) if math.isfinite(loss) else ""}
        return {kind: text for kind, text in warnings.items() if text}

    def _spike(self, step: int, loss: float, usual: float) -> str:
        previous, self._outside_at = self._outside_at, step
        if step - previous <= BAND_STEPS:
            return ""
        return (
            f"The loss of step {step} is {loss:.4f}, far above the usual {usual:.4f}: if it does not come back, stop"
            " and resume with a lower optimizer.learning_rate"
        )

    def _not_falling(self, step: int, loss: float) -> str:
        """Compares the mean loss of the last steps with that of as many before."""
        self._sums.append(self._sums[-1] + loss)
        steps = max(PLATEAU_STEPS, int(PLATEAU_SHARE * step))
        if len(self._sums) <= 2 * steps:
            return ""
        before, last = ((self._sums[end] - self._sums[end - steps]) / steps for end in (-1 - steps, -1))
        if last < before or last >= self._plateau:
            return ""
        self._plateau = last - self._noise
        return (
            f"The loss has not fallen for {steps:,} steps: {last:.4f} on average, {before:.4f} in the {steps:,} before;"
            " another optimizer.learning_rate may help"
        )


class StepMonitor:
    """Warns once of each step that lasts many times the usual one.

    It counts the calls of `tick`, one every TICK_SECONDS. A process that is stopped, or a machine that sleeps, makes
    none.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._ticks = 0

    def tick(self, began: float | None, usual: float) -> str:
        """A warning, or "". The step began at the second `began` (None: a pause); `usual` is inf if it is not known."""
        self._ticks = self._ticks + 1 if began == self._began else 0
        self._began = began
        limit = math.ceil(max(LATE_SECONDS, LATE_FACTOR * usual) / TICK_SECONDS) if math.isfinite(usual) else math.inf
        if began is None or self._ticks != limit:
            return ""
        return (
            f"This step has lasted {self._ticks * TICK_SECONDS:.0f} s, and the usual one {usual:.3g} s: the device or"
            " the disk may hang; if nothing comes, press Ctrl-C twice, and the same command resumes from the last"
            " checkpoint"
        )


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
