"""What a run shows and records: console lines, the progress bar, metrics and samples files, TensorBoard; its clock."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, median_low

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jaxlm.storage.jsonl import AppendOnlyFile, keep_up_to, to_line
from jaxlm.storage.tensorboard import EventFile
from jaxlm.units import duration

RULE = "=" * 70


def metrics_line(step: int, loss: float, lr: float, tokens_per_second: float, seconds_left: float) -> str:
    """The console line of a step: loss in nats a token, seconds_left as `duration` writes it."""
    return (
        f"Step {step:>6} | Loss {loss:.4f} | LR {lr:.2e} | Tokens/s {tokens_per_second:>6.0f}"
        f" | ETA {duration(seconds_left)}"
    )


def samples_block(step: int, texts: Sequence[tuple[str, str]]) -> str:
    """The console block of (prompt, text) pairs, each text on one line."""
    lines = [RULE, f"GENERATION SAMPLES (Step {step})", RULE]
    for number, (prompt, text) in enumerate(texts, 1):
        lines += [f"{number}. Prompt: '{_one_line(prompt)}'", f"   → {_one_line(text)}"]
    return "\n".join([*lines, RULE])


def _one_line(text: str) -> str:
    """The text without line breaks, nor codes that would steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class Clock:
    """Splits a run's time into steps and pauses (compilation, evaluation, sampling, saving).

    It does not run while the machine sleeps, and what it foretells goes by medians, so that a step or a pause during
    which the process was stopped does not count. Steps overlap with the host's work, so a step lasts from the end of
    the one before, or of the pause between them, to its own end.
    """

    def __init__(self, seconds_before: float = 0.0, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._start = now() - seconds_before
        self._mark = now()
        self._steps: deque[float] = deque(maxlen=50)
        self._pauses: dict[str, deque[float]] = {}

    def seconds(self) -> float:
        """Since training began, over all its sessions."""
        return self._now() - self._start

    def step_ended(self) -> float:
        """Seconds the step took that ends now."""
        now = self._now()
        self._steps.append(now - self._mark)
        self._mark = now
        return self._steps[-1]

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Time spent inside counts as a pause, not as a step."""
        start = self._now()
        try:
            yield
        finally:
            seconds = self._now() - start
            self._pauses.setdefault(kind, deque(maxlen=5)).append(seconds)
            self._mark += seconds

    def seconds_left(self, steps: int, pauses: Mapping[str, int]) -> float:
        """What so many steps and so many pauses of each kind will take, by the last ones of each."""
        step = median(self._steps) if self._steps else 0.0
        known = {kind: median_low(seconds) for kind, seconds in self._pauses.items()}
        return steps * step + sum(count * known.get(kind, 0.0) for kind, count in pauses.items())


class Monitor:
    """The console and the files of one work directory."""

    def __init__(self, workdir: Path, step: int, max_steps: int):
        """Opens the files and drops what an earlier session recorded after `step`, where this one goes on."""
        files = [workdir / "metrics.jsonl", workdir / "samples.jsonl"]
        self.damaged = [path for path in files if keep_up_to(path, step)]
        self._metrics, self._samples = map(AppendOnlyFile, files)
        self._events = EventFile(workdir / "tensorboard", step + 1)
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._bar = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=max_steps, completed=step)
        self._bar.start()

    def say(self, text: str) -> None:
        """Prints lines above the progress bar. A reader that has gone away, or a full disk, does not end the run."""
        with contextlib.suppress(SystemExit, OSError):  # rich exits on a closed pipe; afterwards its console is quiet
            self._console.print(text)

    def progress(self, step: int, loss: float, tokens_per_second: float, seconds_left: float, next_event: str) -> None:
        """Moves the progress bar to `step`."""
        state = f"loss {loss:.3f} | {tokens_per_second:,.0f} tok/s | ETA {duration(seconds_left)} | {next_event}"
        self._bar.update(self._task, completed=step, description=state)

    def record(self, row: Mapping[str, float]) -> None:
        """Appends one optimizer step to metrics.jsonl and TensorBoard."""
        self._metrics.append(to_line(row))
        self._events.scalars(int(row["step"]), {name: value for name, value in row.items() if name != "step"})

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Prints a block of samples and appends them to samples.jsonl."""
        self.say(samples_block(step, texts))
        for prompt, text in texts:
            self._samples.append(to_line({"step": step, "prompt": prompt, "text": text}))
        self._events.text(step, "samples", "\n\n".join(text for _, text in texts))

    def sync(self) -> None:
        """Returns once the disk holds for good all that was recorded. Raises OSError while it cannot."""
        for file in (self._metrics, self._samples, self._events):
            file.sync()

    def abandon(self) -> None:
        """Gives a terminal its cursor back, for a process that ends at once; safe from any thread."""
        if self._console.is_terminal:
            os.write(1, b"\x1b[?25h\n")

    def close(self) -> None:
        """Removes the bar and closes the files."""
        self._bar.stop()
        for file in (self._metrics, self._samples, self._events):
            file.close()
