"""What a training run tells its listeners: one typed event for each thing that happens.

A listener is a callable that takes an event. Events hold host values only, and the trainer sends them after the next
micro-batch is on the device, so no listener makes the device wait. Two methods are optional: `sync`, which the trainer
calls before a save (if it raises OSError, the save is not made), and `close`, which it calls at the end.

A listener that raises is named on the console and receives no further events. The records
(`jaxlm.run.records.Records`) are the exception: resuming needs them, so an error of theirs ends the run.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class MessageEvent:
    """Lines for the user: what was restored, what will run, where the model is."""

    text: str


@dataclass(frozen=True)
class EvaluationEvent:
    """An evaluation is done."""

    step: int
    val_loss: float  # nats per token
    val_bits_per_byte: float


@dataclass(frozen=True)
class StepEvent:
    """An optimizer step is done."""

    step: int
    loss: float  # nats per token, mean over the step's micro-batches
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # since the start of training
    tokens_per_second: float
    seconds: float  # since the start of training, over all sessions
    step_seconds: float
    seconds_left: float  # estimate
    evaluation: EvaluationEvent | None = None  # of this step; its own event follows

    def row(self) -> dict[str, float]:
        """The row of metrics.jsonl."""
        names = ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds")
        row = {name: getattr(self, name) for name in names}
        if self.evaluation:
            row |= {name: getattr(self.evaluation, name) for name in ("val_loss", "val_bits_per_byte")}
        return row


@dataclass(frozen=True)
class SamplesEvent:
    """Samples are generated."""

    step: int
    samples: tuple[tuple[str, str], ...]  # (prompt, prompt and completion)


@dataclass(frozen=True)
class SkippedEvent:
    """A micro-batch is skipped because its gradients are not finite."""

    step: int  # optimizer steps done
    skipped: int  # micro-batches skipped since the start of training


@dataclass(frozen=True)
class SavingEvent:
    """A save begins; it runs in the background."""

    step: int


@dataclass(frozen=True)
class SavedEvent:
    """A save is complete."""

    step: int


@dataclass(frozen=True)
class NotSavedEvent:
    """A save failed; the next one tries again."""

    step: int
    reason: str


@dataclass(frozen=True)
class PauseEvent:
    """Training paused: for `compilation`, `evaluation`, `samples` or `checkpoint`."""

    kind: str
    seconds: float


@dataclass(frozen=True)
class StoppingEvent:
    """A signal stops the run after this step; a save follows."""

    step: int
    signal: int


Event = (
    MessageEvent
    | StepEvent
    | EvaluationEvent
    | SamplesEvent
    | SkippedEvent
    | SavingEvent
    | SavedEvent
    | NotSavedEvent
    | PauseEvent
    | StoppingEvent
)
Listener = Callable[[Event], None]
