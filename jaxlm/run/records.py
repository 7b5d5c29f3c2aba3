"""What a run writes down: metrics.jsonl, samples.jsonl and TensorBoard's events."""

import contextlib
from pathlib import Path

from jaxlm.run.events import Event, SamplesEvent, StepEvent
from jaxlm.storage.jsonl import AppendOnlyFile, keep_up_to, to_line
from jaxlm.storage.tensorboard import EventFile


class Records:
    """The listener that writes metrics.jsonl and samples.jsonl.

    A resumed run relies on these files: they hold every step of a checkpoint before the checkpoint exists. So the
    trainer treats this listener as part of itself: a save is made only after `sync`.
    """

    def __init__(self, workdir: Path, step: int):
        """Opens the files and drops the rows after `step`, from which this session resumes. Raises OSError."""
        files = [workdir / "metrics.jsonl", workdir / "samples.jsonl"]
        self.damaged = [path for path in files if keep_up_to(path, step)]  # files that had damaged lines
        self._metrics, self._samples = map(AppendOnlyFile, files)

    def __call__(self, event: Event) -> None:
        match event:
            case StepEvent():
                self._metrics.append(to_line(event.row()))
            case SamplesEvent(step, samples):
                for prompt, text in samples:
                    self._samples.append(to_line({"step": step, "prompt": prompt, "text": text}))

    def sync(self) -> None:
        """Returns once all rows are on the disk. Raises OSError if they cannot be written."""
        self._metrics.sync()
        self._samples.sync()

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()


class TensorBoard:
    """The listener that writes TensorBoard's events."""

    def __init__(self, workdir: Path, step: int):
        """Opens a file of events after `step`. Raises OSError."""
        self._events = EventFile(workdir / "tensorboard", step + 1)

    def __call__(self, event: Event) -> None:
        match event:
            case StepEvent():
                self._events.scalars(event.step, {name: value for name, value in event.row().items() if name != "step"})
            case SamplesEvent(step, samples):
                self._events.text(step, "samples", "\n\n".join(text for _, text in samples))

    def sync(self) -> None:
        with contextlib.suppress(OSError):  # the events stay in memory, and the next sync tries again
            self._events.sync()

    def close(self) -> None:
        self._events.close()
