"""What a training run tells its listeners: one typed event for each thing that happens.

A listener is a callable that takes an event; `close`, if it has that, is called at the end. It runs in a thread of its
own, so it delays no step. If it raises, it is named on the console and receives no further events. Events hold host
values only. Between intervals the trainer sends them after it has dispatched the next micro-batch; the seconds of a
step are the device's all the same.

The trainer's own listeners are the console, TensorBoard and the records, which it calls itself. The records
(`jaxlm.run.records.Records`) are never left out, because resuming needs them: while their rows cannot be written, no
checkpoint is saved.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


class Event:
    """Something that happened in a run."""


Listener = Callable[[Event], None]


@dataclass(frozen=True)
class MessageEvent(Event):
    text: str  # lines for the user: what was restored, what will run, where the model is


@dataclass(frozen=True)
class EvaluationEvent(Event):
    step: int  # whose event came before, or in the session that stopped after it
    val_loss: float  # nats per token
    val_bits_per_byte: float


@dataclass(frozen=True)
class StepEvent(Event):
    """An optimizer step is done. The fields up to `seconds`, and the ratios, are those of metrics.jsonl."""

    step: int
    loss: float  # nats per token, mean over the step's micro-batches
    lr: float  # AdamW's; Muon's is in proportion
    grad_norm: float  # before clipping
    tokens: int  # since the start of training
    tokens_per_second: float
    seconds: float  # since the start of training, over all sessions
    step_seconds: float
    seconds_left: float  # estimate
    evaluation: EvaluationEvent | None = None  # of this step; its own event follows
    update_ratios: Mapping[str, float] = field(default_factory=dict)  # ||update|| / ||weights|| by kind of parameter

    def row(self) -> dict[str, float]:
        """The row of metrics.jsonl."""
        names = ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds")
        row = {name: getattr(self, name) for name in names}
        row |= {f"update_ratio_{kind}": ratio for kind, ratio in self.update_ratios.items()}
        return row | vars(self.evaluation) if self.evaluation else row


@dataclass(frozen=True)
class SamplesEvent(Event):
    step: int
    samples: tuple[tuple[str, str], ...]  # (prompt, prompt and completion)


@dataclass(frozen=True)
class SkippedEvent(Event):  # a micro-batch with gradients that are not finite
    step: int  # optimizer steps done
    skipped: int  # micro-batches skipped since the start of training


@dataclass(frozen=True)
class WarningEvent(Event):  # a sign that the run goes wrong
    kind: str  # `spike` or `plateau` of the loss, `rise` of the validation loss, `step`: a step or a pause without end
    text: str


@dataclass(frozen=True)
class SavingEvent(Event):
    step: int  # whose save begins; it runs in the background


@dataclass(frozen=True)
class SavedEvent(Event):
    step: int  # whose save is complete


@dataclass(frozen=True)
class NotSavedEvent(Event):
    step: int  # whose save failed; the next save tries again
    reason: str  # with what to do


@dataclass(frozen=True)
class PauseStartEvent(Event):
    kind: str  # `compilation`, `evaluation`, `samples` or `checkpoint`


@dataclass(frozen=True)
class PauseEvent(Event):  # at the end of a pause
    kind: str
    seconds: float


@dataclass(frozen=True)
class StoppingEvent(Event):
    step: int  # after which a signal stops the run; a save follows, unless that step is saved already
    signal: int
