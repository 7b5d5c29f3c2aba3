"""What a run writes down: metrics.jsonl, samples.jsonl, sessions.jsonl and TensorBoard's events."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxlm.config import INT32_MAX, Config, OptimizerConfig, to_dict
from jaxlm.core.parameters import leaves_by_path, parameter_table
from jaxlm.data.beginnings import LONGEST
from jaxlm.run.events import EvaluationEvent, Event, SamplesEvent, StepEvent
from jaxlm.run.workdir import RECORDS, SESSIONS
from jaxlm.storage import atomic, tensorboard
from jaxlm.storage.jsonl import AppendOnlyFile, keep_up_to, rows_up_to, to_line

TOKEN_BYTES = 16  # for a token of a sample, with escapes: three times the mean of stories, twice that of random tokens
SETTINGS_BYTES = 20_000  # of a session in TensorBoard's events, without the prompts
HPARAM_METRICS = ("loss", "val_loss", "val_bits_per_byte")  # beside the hyperparameters in TensorBoard's table
_LONGEST = -2.2250738585072014e-308  # the float with the longest JSON


class Records:
    """The listener that writes metrics.jsonl and samples.jsonl.

    A resumed run relies on these files: they hold every step of a checkpoint before the checkpoint exists. So the
    trainer treats this listener as part of itself: a save is made only after `sync`. What a stop left undone after the
    last step is in `lacks`; its evaluation and its samples, when they come, are added to the rows of that step.
    """

    def __init__(self, workdir: Path, step: int, writes: bool = True):
        """Opens the files and drops the rows after `step`, from which this session resumes. Raises OSError.

        Without `writes` it only reads them, and may get no events.
        """
        files = [workdir / name for name in RECORDS]
        kept = {path: keep_up_to(path, step) for path in files if writes}
        self.damaged = {path: original for path, original in kept.items() if original}  # files that had damaged lines
        self._paths, self._step = files, step
        self._files = [AppendOnlyFile(path) for path in files if writes]
        metrics, samples = (list(rows_up_to(path, step)) for path in files)
        self.evaluations = [(row["step"], row["val_loss"]) for row in metrics if "val_loss" in row]  # up to `step`
        metrics, samples = ([row for row in rows if row["step"] == step] for rows in (metrics, samples))
        self._row = metrics[-1] if metrics else {}
        found = {"evaluation": "val_loss" in self._row, "samples": bool(samples)}
        self.lacks = {kind for kind in found if metrics and not found[kind]}  # of `step`, whether due or not

    def __call__(self, event: Event) -> None:
        match event:
            case StepEvent(step):
                self._write(0, step, [event.row()])
            case EvaluationEvent(step) if step == self._step:
                self._write(0, step, [self._row | vars(event)])
            case SamplesEvent(step, samples):
                self._write(1, step, [{"step": step, "prompt": prompt, "text": text} for prompt, text in samples])

    def _write(self, number: int, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows to a file. Those of the step from which the session resumes replace its former ones."""
        lines = b"".join(map(to_line, rows))
        if step > self._step:
            self._files[number].append(lines)
            return
        path, former = self._paths[number], self._files[number]
        before = b"".join(map(to_line, rows_up_to(path, step - 1)))
        atomic.write_file(path, before + lines)  # a kill leaves the former rows or these
        self._files[number] = AppendOnlyFile(path)
        former.close()

    def sync(self) -> None:
        """Returns once all rows are on the disk. Raises OSError if they cannot be written."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        for file in self._files:
            file.close()


def append_session(workdir: Path, session: Mapping[str, Any]) -> None:
    """Appends a row to sessions.jsonl: the `step` after which a session begins, and what it runs on. Raises OSError."""
    path = workdir / SESSIONS
    keep_up_to(path, INT32_MAX)  # without the incomplete line of a killed session
    with contextlib.closing(AppendOnlyFile(path)) as file:
        file.append(to_line(session))


class TensorBoard:
    """The listener that writes TensorBoard's events: the numbers of metrics.jsonl, samples and settings."""

    def __init__(self, workdir: Path, config: Config, step: int):
        """Opens a file of events after `step`, with the settings as hyperparameters. Raises OSError."""
        self._config = config
        self._events = tensorboard.EventFile(workdir / "tensorboard", step + 1)
        self._events.append(tensorboard.hparams(step + 1, flat_settings(config), HPARAM_METRICS))

    def __call__(self, event: Event) -> None:
        match event:
            case StepEvent():
                self._events.append(_scalars(step_scalars(event, self._config.optimizer)))
            case EvaluationEvent():  # apart, as it may come in a later session than its step
                self._events.append(_scalars(vars(event)))
            case SamplesEvent(step, samples):
                self._events.append(tensorboard.text(step, "samples", "\n\n".join(text for _, text in samples)))

    def sync(self) -> None:
        with contextlib.suppress(OSError):  # the events stay in memory, and the next sync tries again
            self._events.sync()

    def close(self) -> None:
        self._events.close()


def flat_settings(config: Config) -> dict[str, float | str]:
    """The settings by their names, such as `model.width`; a list is its text."""
    settings = leaves_by_path(to_dict(config))
    return {".".join(path): v if isinstance(v, int | float | str) else str(v) for path, v in settings.items()}


def step_scalars(event: StepEvent, config: OptimizerConfig) -> dict[str, float]:
    """The row of a step without its evaluation, and with `lr_muon`, the learning rate of Muon's matrices if any."""
    row = replace(event, evaluation=None).row()
    if config.name == "muon":
        row["lr_muon"] = event.lr / config.learning_rate * config.muon_learning_rate
    return row


def _scalars(row: Mapping[str, Any]) -> bytes:
    return tensorboard.scalars(row["step"], {name: value for name, value in row.items() if name != "step"})


def record_bytes(config: Config, steps: int) -> int:
    """At most the bytes that `steps` steps add to the records and to TensorBoard's events, with TOKEN_BYTES a token."""
    evaluation = EvaluationEvent(INT32_MAX, _LONGEST, _LONGEST)
    numbers = dict.fromkeys(("loss", "lr", "grad_norm", "tokens_per_second", "seconds"), _LONGEST)
    ratios: dict[str, float] = {parameter.kind: _LONGEST for parameter in parameter_table(config.model)}
    event = StepEvent(
        INT32_MAX,
        tokens=2**63,
        step_seconds=0,
        seconds_left=0,
        evaluation=evaluation,
        update_ratios=ratios,
        **numbers,
    )
    scalars = _scalars(event.row() | {"lr_muon": _LONGEST})
    row = len(to_line(event.row())) + len(scalars) + len(_scalars(vars(evaluation)))
    prompt = max((len(json.dumps(prompt)) for prompt in config.sample.prompts), default=6 * LONGEST)
    text = prompt + TOKEN_BYTES * config.sample.tokens
    sample = len(to_line({"step": INT32_MAX, "prompt": "", "text": ""})) + prompt + 2 * text
    samples = config.sample.texts * sample + len(tensorboard.text(INT32_MAX, "samples", ""))
    settings = SETTINGS_BYTES + 8 * sum(map(len, config.sample.prompts))
    return settings + steps * row + (steps // config.generation_interval + 1) * samples
