"""What a run shows: lines at the intervals, blocks of samples and, on a terminal, a progress bar below them."""

import contextlib
import os
from collections.abc import Sequence
from statistics import mean, median

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jaxlm.config import Config
from jaxlm.run.events import (
    EvaluationEvent,
    Event,
    MessageEvent,
    NotSavedEvent,
    SamplesEvent,
    SavedEvent,
    SkippedEvent,
    StepEvent,
    WarningEvent,
)
from jaxlm.run.workdir import CHECKPOINTS
from jaxlm.terminal import console, printable
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

    def __init__(self, config: Config, step: int):
        self._config = config
        self._losses: list[float] = []  # since the last line
        self._step_seconds: list[float] = []
        self._terminal = console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        columns = BarColumn(bar_width=10), MofNCompleteColumn(), TextColumn("{task.description}")
        hidden = not self._terminal.is_terminal
        self._bar = Progress(*columns, console=self._terminal, transient=True, disable=hidden)
        self._task = self._bar.add_task("compiling", total=config.max_steps, completed=step)
        self._bar.start()

    def __call__(self, event: Event) -> None:
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

    def show_cursor(self) -> None:
        """Gives a terminal its cursor back, for a process that ends at once; safe from any thread."""
        if self._terminal.is_terminal:
            os.write(1, b"\x1b[?25h\n")

    def close(self) -> None:
        self._bar.stop()

    def _step(self, event: StepEvent) -> None:
        """Prints a line where one is due, and moves the bar."""
        step, interval = event.step, self._config.eval_interval
        self._losses.append(event.loss)
        self._step_seconds.append(event.step_seconds)
        early = step in EARLY_LINES and step < interval
        if early or step % interval == 0 or step == self._config.max_steps:
            rate = self._config.tokens_per_step / median(self._step_seconds)
            self._print(metrics_line(step, mean(self._losses), event.lr, rate, event.seconds_left))
            self._losses, self._step_seconds = [], []
        state = (
            f"loss {event.loss:.3f} | {event.tokens_per_second:,.0f} tok/s | ETA {duration(event.seconds_left)}"
            f" | {self._next_pause(step)}"
        )
        self._bar.update(self._task, completed=step, description=state)

    def _next_pause(self, step: int) -> str:
        last = self._config.max_steps
        at, kind = min(((step // every + 1) * every, kind) for kind, every in intervals(self._config).items())
        return f"{kind} at {at}" if at < last else f"the end at {last}"

    def _print(self, text: str) -> None:
        """Prints lines above the bar. Neither a closed pipe nor a full disk ends the run."""
        with contextlib.suppress(OSError):
            self._terminal.print(text)
