"""Signs that a run goes wrong: in its losses, and in a step or a pause that does not end."""

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator

from jaxlm.run.clock import InProgress

BAND_STEPS = 200  # the last ones, whose losses make the band
BAND_WIDTH = 8.0  # standard deviations of the noise
LEAST_NOISE = 0.005  # of the median, where the losses are almost equal
PLATEAU_STEPS = 500  # the shortest plateau
PLATEAU_SHARE = 0.3  # of the steps done: the loss falls ever more slowly
RISE_EVALUATIONS, RISE_SHARE = 5, 0.01  # after the lowest validation loss, and of it; less is noise
LATE_SECONDS, LATE_FACTOR = 60.0, 20.0  # a step is late after both
UNKNOWN_SECONDS = 600.0  # after which the first step is late, and a pause
TICK_SECONDS = 5.0


class LossMonitor:
    """Takes the loss of each step, and warns once when it jumps or stops falling."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=BAND_STEPS)
        self._noise = 0.0  # a standard deviation
        self._outside_at = -BAND_STEPS  # the last step outside the band
        self._sum, self._count = 0.0, 0  # of the losses in this window, without those outside the band
        self._before = math.nan, 0  # the mean loss of the window before, and its steps
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
        """Compares the mean loss of each window with that of the window before, when it ends."""
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count < max(PLATEAU_STEPS, PLATEAU_SHARE * step):
            return ""
        (before, steps_before), last, steps = self._before, self._sum / self._count, self._count
        self._before, self._sum, self._count = (last, steps), 0.0, 0
        if not steps_before:
            return ""
        error = self._noise * math.sqrt(1 / steps_before + 1 / steps)  # the standard error of the difference
        if before - last > error or last >= self._plateau:
            return ""
        self._plateau = last - self._noise
        return (
            f"The loss has not fallen by more than its noise in {steps:,} steps: {last:.4f} on average,"
            f" {before:.4f} in the {steps_before:,} before; another optimizer.learning_rate may help"
        )


class ValidationMonitor:
    """Takes the validation loss of each evaluation; knows the lowest, and warns once when it has risen since."""

    def __init__(self) -> None:
        self.best_step, self._lowest = 0, math.inf
        self._since = 0  # evaluations after the lowest
        self._told = False

    def __call__(self, step: int, loss: float) -> str:
        """A warning, or ""."""
        if loss < self._lowest:
            self.best_step, self._lowest, self._since, self._told = step, loss, 0, False
        else:
            self._since += 1
        if self._told or self._since < RISE_EVALUATIONS or not loss > (1 + RISE_SHARE) * self._lowest:
            return ""
        self._told = True
        return (
            f"The validation loss has risen from {self._lowest:.4f} at step {self.best_step} to {loss:.4f}: the model"
            " now learns its text by heart; more text, a smaller model or fewer steps help"
        )


class StepMonitor:
    """Warns once of each step that lasts many times the usual one, and of each pause that lasts very long.

    It counts the calls of `tick`, one every TICK_SECONDS. A process that is stopped, or a machine that sleeps, makes
    none.
    """

    def __init__(self) -> None:
        self._last: InProgress | None = None
        self._ticks = 0

    def tick(self, now: InProgress) -> str:
        """A warning, or "". `now` is the step or the pause in progress."""
        self._ticks = self._ticks + 1 if now == self._last else 0
        self._last = now
        known = math.isfinite(now.usual)
        limit = max(LATE_SECONDS, LATE_FACTOR * now.usual) if known else UNKNOWN_SECONDS
        if self._ticks != math.ceil(limit / TICK_SECONDS):
            return ""
        what = "This step" if now.kind == "step" else f"This pause ({now.kind})"
        usual = f", and the usual one {now.usual:.3g} s" if known else ""
        return (
            f"{what} has lasted {self._ticks * TICK_SECONDS:.0f} s{usual}: the device or the disk may hang; if nothing"
            " comes, press Ctrl-C twice, and the same command resumes from the last checkpoint"
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
