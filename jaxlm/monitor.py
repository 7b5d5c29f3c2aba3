"""What a run shows and records: console lines, the progress bar, metrics and samples files, TensorBoard; its clock."""

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

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


def duration(seconds: float) -> str:
    """Seconds in the largest fitting unit: 45s, 12.3m, 8.5h, 9.2d."""
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "m"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds:.0f}s" if unit == "s" else f"{seconds / divisor:.1f}{unit}"
    return f"{seconds / 86400:.1f}d"


class Clock:
    """Splits a run's time into steps and pauses (compilation, evaluation, sampling, saving).

    It does not run while the machine sleeps. Steps overlap with the host's work, so a step lasts from the end of the
    one before, or of the pause between them, to its own end.
    """

    def __init__(self, seconds_before: float = 0.0, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._start = now() - seconds_before
        self._mark = now()
        self._steps: deque[float] = deque(maxlen=50)
        self._pauses: dict[str, float] = {}

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
            self._pauses[kind] = self._now() - start
            self._mark += self._pauses[kind]

    def seconds_left(self, steps: int, pauses: Mapping[str, int]) -> float:
        """What so many steps and so many pauses of each kind will take, by the last ones of each."""
        step = median(self._steps) if self._steps else 0.0
        return steps * step + sum(count * self._pauses.get(kind, 0.0) for kind, count in pauses.items())


class Monitor:
    """The console and the files of one work directory."""

    def __init__(self, workdir: Path, step: int, max_steps: int):
        """Opens the files and drops what an earlier session recorded after `step`, where this one goes on."""
        keep_up_to(workdir / "metrics.jsonl", step)
        keep_up_to(workdir / "samples.jsonl", step)
        self._metrics = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
        self._samples = (workdir / "samples.jsonl").open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
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
        """Prints lines above the progress bar. A reader that has gone away does not end the run."""
        with contextlib.suppress(SystemExit):  # rich's answer to a closed pipe; afterwards its console is quiet
            self._console.print(text)

    def progress(self, step: int, loss: float, tokens_per_second: float, seconds_left: float, next_event: str) -> None:
        """Moves the progress bar to `step`."""
        state = f"loss {loss:.3f} | {tokens_per_second:,.0f} tok/s | ETA {duration(seconds_left)} | {next_event}"
        self._bar.update(self._task, completed=step, description=state)

    def record(self, row: Mapping[str, float]) -> None:
        """Appends one optimizer step to metrics.jsonl and TensorBoard."""
        _append(self._metrics, row)
        for name, value in row.items():
            if name != "step":
                self._tensorboard.add_scalar(name, value, row["step"])

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Prints a block of samples and appends them to samples.jsonl."""
        self.say(samples_block(step, texts))
        for prompt, text in texts:
            _append(self._samples, {"step": step, "prompt": prompt, "text": text})
        self._tensorboard.add_text("samples", "\n\n".join(text for _, text in texts), step)

    def abandon(self) -> None:
        """Gives a terminal its cursor back, for a process that ends at once; safe in a signal handler."""
        if self._console.is_terminal:
            os.write(1, b"\x1b[?25h\n")

    def close(self) -> None:
        """Removes the bar and closes the files."""
        self._bar.stop()
        self._metrics.close()
        self._samples.close()
        self._tensorboard.close()


def _append(file: Any, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def keep_up_to(path: Path, step: int) -> None:
    """Drops from a .jsonl file all lines after `step`, and a last line that was cut off while being written."""
    if not path.exists():
        return
    with path.open("rb") as file:
        lines = [line for line in file if line.endswith(b"\n") and json.loads(line)["step"] <= step]
    beside = path.with_suffix(".tmp")
    beside.write_bytes(b"".join(lines))
    beside.replace(path)
