"""What a run shows: lines at the intervals, blocks of samples and, on a terminal, its state below them."""

import contextlib
import os
from collections.abc import Callable, Sequence
from statistics import mean, median

from jaxlm.config import Config
from jaxlm.run.events import (
    EvaluationEvent,
    Event,
    MessageEvent,
    NotSavedEvent,
    PauseStartEvent,
    SamplesEvent,
    SavedEvent,
    SkippedEvent,
    StepEvent,
    WarningEvent,
)
from jaxlm.run.status import Status
from jaxlm.run.workdir import CHECKPOINTS
from jaxlm.terminal import ERASE, SHOW_CURSOR, LiveLines, console, printable
from jaxlm.units import duration

RULE = "=" * 70
EARLY_LINES = (1, 2, 5, 10, 20, 50)  # steps with a line before the first interval ends


def intervals(config: Config) -> dict[str, int]:
    """Optimizer steps between two pauses of each kind."""
    c = config
    return {"evaluation": c.eval_interval, "samples": c.generation_interval, "checkpoint": c.save_interval}


def metrics_line(step: int, loss: float, lr: float, tokens_per_second: float, seconds_left: float) -> str:
    """The console line of a step; `loss` is in nats per token."""
    return (
        f"Step {step:>6} | Loss {loss:.4f} | LR {lr:.2e} | Tokens/s {tokens_per_second:>6.0f}"
        f" | ETA {duration(seconds_left)}"
    )


def samples_block(step: int, samples: Sequence[tuple[str, str]]) -> str:
    """The console block of (prompt, text) pairs, each text on one line."""
    lines = [RULE, f"GENERATION SAMPLES (Step {step})", RULE]
    for number, (prompt, text) in enumerate(samples, 1):
        lines += [f"{number}. Prompt: '{_one_line(prompt)}'", f"   → {_one_line(text)}"]
    return "\n".join([*lines, RULE])


def _one_line(text: str) -> str:
    """Replaces white space and control characters by single spaces."""
    return " ".join(printable(text).split())


class Console:
    """The listener that prints."""

    def __init__(self, config: Config, step: int, memory_bytes: Callable[[], int] = lambda: 0):
        """`step` is that from which the session starts; `memory_bytes` tells the peak so far, 0: it is unknown."""
        self._config = config
        self._losses: list[float] = []  # since the last line
        self._step_seconds: list[float] = []
        self._terminal = console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._status = Status(config, step, memory_bytes)
        self._live = LiveLines(self._terminal, self._status.lines)

    def __call__(self, event: Event) -> None:
        self._status(event)
        match event:
            case MessageEvent(text):
                self._print(text)
            case StepEvent():
                self._step(event)
            case EvaluationEvent(_, loss, bits_per_byte):
                self._print(f"  → Validation loss {loss:.4f} ({bits_per_byte:.4f} bits per byte)")
            case SamplesEvent(step, samples):
                self._print(samples_block(step, samples))
            case SkippedEvent(_, skipped):
                self._print(f"  → Skipped a micro-batch with gradients that are not finite ({skipped} so far)")
            case SavedEvent(step):
                self._print(f"  → Saved checkpoint: {CHECKPOINTS}/{step}")
            case NotSavedEvent(step, reason):
                self._print(f"  → Step {step} is not saved, {reason}; the next save tries again")
            case WarningEvent(_, text):
                self._print(f"  → {text}")
            case PauseStartEvent():
                self._draw()

    def make_room(self) -> None:
        """Erases the state on a terminal, for what another thread or the shell writes next; safe from any thread."""
        if self._live.shown:
            os.write(1, f"{ERASE}{SHOW_CURSOR}".encode())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._live.close()

    def _step(self, event: StepEvent) -> None:
        """Prints a line where one is due."""
        step, interval = event.step, self._config.eval_interval
        self._losses.append(event.loss)
        self._step_seconds.append(event.step_seconds)
        early = step in EARLY_LINES and step < interval
        if early or step % interval == 0 or step == self._config.max_steps:
            rate = self._config.tokens_per_step / median(self._step_seconds)
            self._print(metrics_line(step, mean(self._losses), event.lr, rate, event.seconds_left))
            self._losses, self._step_seconds = [], []

    def _draw(self) -> None:
        with contextlib.suppress(OSError):
            self._live.draw()

    def _print(self, text: str) -> None:
        """Prints lines above the state. Neither a closed pipe nor a full disk ends the run."""
        with contextlib.suppress(OSError):
            self._terminal.print(text)
