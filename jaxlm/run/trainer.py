"""The training run: the loop, what happens at the intervals, and a stop that loses nothing."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.config import Config
from jaxlm.core.generate import generate, up_to_end
from jaxlm.core.model import parameter_count, prepare_decode_params
from jaxlm.core.sampling import sampling_params
from jaxlm.core.train_step import Metrics, make_eval_step, make_train_step
from jaxlm.data.beginnings import beginnings
from jaxlm.data.token_files import TokenFiles, bits_per_byte, train_batch_stream, val_batches
from jaxlm.data.tokenizer import encode_prompts
from jaxlm.device import backend, distributed
from jaxlm.device.mesh import batch_sharding, local_rows, on_one_device, place_rows
from jaxlm.errors import RunError, Stopped
from jaxlm.interop.huggingface import edited_texts, write_model
from jaxlm.interop.model_card import model_card
from jaxlm.run.agreement import Agreement
from jaxlm.run.best import BestCheckpoint
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.clock import Clock
from jaxlm.run.console import Console, intervals
from jaxlm.run.events import (
    EvaluationEvent,
    Event,
    Listener,
    MessageEvent,
    PauseEvent,
    PauseStartEvent,
    SamplesEvent,
    SkippedEvent,
    StepEvent,
    StoppingEvent,
    WarningEvent,
)
from jaxlm.run.listeners import BackgroundListener, Listeners
from jaxlm.run.memory import batch_shape, peak_bytes, step_memory
from jaxlm.run.monitor import TICK_SECONDS, LossMonitor, StepMonitor, ValidationMonitor, calls_every
from jaxlm.run.records import Records, TensorBoard
from jaxlm.run.resume import describe_run, restore_or_init
from jaxlm.run.saver import Saver
from jaxlm.run.signals import StopSignals
from jaxlm.run.workdir import FINAL_MODEL


class InFlight(NamedTuple):
    """A micro-batch that the device may still compute."""

    metrics: Metrics
    ended_at: Future[float]  # by the run's clock
    vote: Any  # of the agreement, after it


class Trainer:
    """One session of training in one work directory.

    The host counts the micro-batches that it has dispatched. It takes each to be good until the device reports
    otherwise, one micro-batch later, so the device never waits for the host. At an interval the host waits for the
    last report, so evaluation, samples and checkpoint see exactly the state after that step.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        tokens: TokenFiles,
        device: jax.Device,
        ready: Callable[[Any, int], str] | None = None,
        listeners: Sequence[Listener] = (),
        mesh: Mesh | None = None,
    ):
        """Restores the newest checkpoint of `workdir`, or initialises the parameters.

        Args:
            config: the settings, as `backend.resolve_run` returns them.
            workdir: an existing directory.
            tokens: the training and validation tokens.
            device: the device to train on, or the one of `mesh` that samples and whose memory is reported.
            ready: takes the compiled step and the number of steps done; returns lines to print, or raises.
            listeners: each is called with every event, in its own thread; see `jaxlm.run.events`.
            mesh: the devices to train on, as `mesh.make_mesh` returns them; None: `device` alone.

        Raises UsageError as `restore_or_init` does, or if a prompt does not fit the context.
        """
        self.config, self.workdir, self.tokens, self.device = config, workdir, tokens, device
        self.mesh, self._ready = mesh, ready
        sharding = batch_sharding(mesh, device)
        self._place, self._rows = partial(place_rows, sharding=sharding), partial(local_rows, sharding)
        self._tokenizer = tokens.tokenizer
        self._prompts = config.sample.prompts or beginnings(tokens)
        self._prompt_ids = encode_prompts(self._tokenizer, self._prompts, config.model.context)
        checkpoints = Checkpoints(workdir, config.max_checkpoints, config.keep_every)
        self.state, seconds, self._notes = restore_or_init(checkpoints, config, tokens, device, mesh)
        self._accepted = int(self.state.step) * config.grad_accum_steps  # micro-batches, by the host's count
        self._skipped = int(self.state.batches) - self._accepted
        self._step_batches = int(self.state.batches)  # read up to the end of the last optimizer step
        self._clock = Clock(seconds)
        self._timer = ThreadPoolExecutor(1)  # waits for the device, to know when each micro-batch ends
        self._loss_monitor, self._step_monitor = LossMonitor(), StepMonitor()
        self._records = Records(workdir, self.step, writes=distributed.is_first())
        self._validation_monitor = ValidationMonitor()
        for evaluation in self._records.evaluations:
            self._validation_monitor(*evaluation)
        self._best = BestCheckpoint(workdir, self.step) if config.keep_best else None
        console = Console(config, self.step, partial(peak_bytes, device))
        others: list[Listener] = [BackgroundListener(listener) for listener in listeners]
        try:
            if distributed.is_first():
                others.append(TensorBoard(workdir, config, self.step))
        except OSError as error:
            self._notes.append(f"TensorBoard's events are not written ({error.strerror or error})")
        self._listeners = Listeners(console, others)
        self._describe = partial(describe_run, config, tokens)
        self._saver = Saver(config, checkpoints, self._clock, self.step, self._describe, self._sync_records, self._emit)
        self._signals = StopSignals(console.make_room)
        distributed.before_exit(console.make_room)
        self._agreement = Agreement(mesh, lambda: self._signals.number, self._saver.is_late)
        self._notes += [
            f"{path} had damaged lines; {original.name} holds the original"
            for path, original in self._records.damaged.items()
        ]

    @property
    def step(self) -> int:
        """Optimizer steps done, by the host's count."""
        return self._accepted // self.config.grad_accum_steps

    def train(self) -> None:
        """Trains to `max_steps` and writes the final model.

        Raises Stopped on SIGINT, SIGTERM or SIGHUP, after saving; RunError if too many micro-batches in a row had
        gradients that are not finite, if the last step cannot be saved, or if the work directory is gone.
        """
        with self._signals, contextlib.closing(self):
            self._emit(MessageEvent("\n".join([*self._notes, self._header()])))
            if self.step < self.config.max_steps or self._records.lacks:
                self.run_steps(self.config.max_steps)
            self._stop_if_signalled()
            self._write_final_model()

    def _write_final_model(self) -> None:
        """Writes the model of the last step, or of the best one if the run keeps it."""
        step, weights = self.step, self.state.weights
        if self._best and (best := self._best.weights(self._validation_monitor.best_step, weights)):
            step, weights = self._validation_monitor.best_step, best
        weights = on_one_device(weights)
        if not distributed.is_first():
            return
        card = model_card(self.workdir, self.config, step, self._describe(0), parameter_count(weights))
        folder = write_model(self.workdir / FINAL_MODEL, self.config, weights, self._tokenizer, card)
        lines = [f"{folder / name} stays as it was edited" for name in edited_texts(folder)]
        which = "" if step == self.step else f" of step {step:,}, whose validation loss was the lowest,"
        self._emit(MessageEvent("\n".join([*lines, f"Done: {self.step:,} steps, the model{which} is in {folder}"])))

    def run_steps(self, last: int) -> None:
        """Trains to step `last`, with all that is due on the way, and waits for the save in progress."""
        try:
            batches, train_step = self._compile()
            with calls_every(TICK_SECONDS, self._look_at_step):
                self._catch_up()
                self._run_steps(last, batches, train_step)
        finally:
            self._saver.report(wait=True)
            if self._best:
                self._best.wait()

    def _compile(self) -> tuple[Iterator[np.ndarray], Any]:
        """The stream of batches and the compiled step."""
        c, done = self.config, int(self.state.batches)
        with self._pause("compilation"):
            rows = self._rows(c.batch_size)
            batches = train_batch_stream(self.tokens.train, c.model.context, c.batch_size, c.seed, done, rows)
            shape = batch_shape(c, batch_sharding(self.mesh, self.device) if self.mesh else None)
            train_step = make_train_step(c, self.mesh).lower(self.state, shape).compile()
            memory = step_memory(c, train_step)
            backend.keep_freed_memory(self.device, memory.gradients + memory.temporaries if memory else 0)
        distributed.exchange("compiled")  # collectives on CPUs wait for 30 s only
        if self._ready:
            self._emit(MessageEvent(self._ready(train_step, self.step)))
        self._eval_step = make_eval_step(c, self.mesh)
        return batches, train_step

    def _run_steps(self, last: int, batches: Iterator[np.ndarray], train_step: Any) -> None:
        in_flight: InFlight | None = None
        while self.step < last:
            self.state, metrics = train_step(self.state, self._place(next(batches)))
            self._accepted += 1
            if event := self._process_metrics(in_flight):
                self._report_step(event)
            in_flight = InFlight(metrics, self._timer.submit(self._wait_for, metrics), self._agreement.vote())
            step_ends = self._accepted % self.config.grad_accum_steps == 0
            if self._agreement.signal or (step_ends and (self.step == last or self._any_due())):
                event, in_flight = self._process_metrics(in_flight), None
                if event:
                    self._run_due_events(event)
                self._stop_if_signalled()

    def _wait_for(self, metrics: Metrics) -> float:
        jax.block_until_ready(metrics)
        return self._clock.seconds()

    def _process_metrics(self, in_flight: InFlight | None) -> StepEvent | None:
        """Waits for a micro-step; returns the event of the optimizer step that it completed, if any."""
        if in_flight is None:
            return None
        metrics, ended_at, vote = in_flight
        m = jax.device_get(metrics)
        self._agreement.take(vote)
        if m.skipped > self._skipped:
            self._skipped = int(m.skipped)
            self._accepted -= 1
            self._emit(SkippedEvent(int(m.step), self._skipped))
        if m.skipped_in_a_row >= self.config.max_nonfinite_microbatches:
            raise RunError(
                f"{m.skipped_in_a_row} micro-batches in a row had gradients that are not finite after step {m.step}:"
                " lower optimizer.learning_rate and resume from the last checkpoint"
            )
        if not m.updated:
            return None
        step, seconds = int(m.step), ended_at.result()
        step_seconds = self._clock.step_ended(seconds)
        self._step_batches = step * self.config.grad_accum_steps + self._skipped
        return StepEvent(
            step=step,
            loss=float(m.loss),
            lr=float(m.lr),
            grad_norm=float(m.grad_norm),
            tokens=step * self.config.tokens_per_step,
            tokens_per_second=self.config.tokens_per_step / step_seconds,
            seconds=round(seconds, 3),
            step_seconds=step_seconds,
            seconds_left=self._seconds_left(step),
            update_ratios={kind: float(ratio) for kind, ratio in m.update_ratios.items()},
        )

    def _seconds_left(self, step: int) -> float:
        last = self.config.max_steps
        pauses = {kind: last // every - step // every for kind, every in intervals(self.config).items()}
        return self._clock.seconds_left(last - step, pauses)

    def _report_step(self, event: StepEvent) -> None:
        self._emit(event)
        for kind, text in self._loss_monitor(event.step, event.loss).items():
            self._emit(WarningEvent(kind, text))
        self._saver.report()

    def _any_due(self) -> bool:
        return any(self.step % every == 0 for every in intervals(self.config).values()) or self._save_is_due()

    def _save_is_due(self) -> bool:
        return self._saver.due(self.step, self._agreement.is_late)

    def _run_due_events(self, event: StepEvent) -> None:
        """Evaluates, samples and saves: whatever is due after the step of `event`, which is the state's.

        After a signal, nothing is computed any more: the state is saved, and the session that resumes catches up.
        """
        step, last = self.step, self.step == self.config.max_steps
        if evaluation := self._evaluate_if_due():
            event = dataclasses.replace(event, evaluation=evaluation, seconds_left=self._seconds_left(step))
        self._report_step(event)
        if evaluation:
            self._report_evaluation(evaluation)
        self._stop_if_signalled()
        self._sample_if_due()
        self._stop_if_signalled()
        if last or self._save_is_due():
            save = self._saver.finish if last else self._saver.save
            with self._pause("checkpoint"):
                save(step, self.state)

    def _catch_up(self) -> None:
        """Evaluates and samples if that was due after the last step and its session stopped before."""
        if "evaluation" in self._records.lacks and (evaluation := self._evaluate_if_due()):
            self._report_evaluation(evaluation)
        self._stop_if_signalled()
        if "samples" in self._records.lacks:
            self._sample_if_due()
        self._stop_if_signalled()

    def _is_due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.config.max_steps

    def _evaluate_if_due(self) -> EvaluationEvent | None:
        """The evaluation of this step; None if none is due or if a signal ends it."""
        if not self._is_due(self.config.eval_interval) or self._agreement.signal:
            return None
        with self._pause("evaluation"):
            last = self.step == self.config.max_steps
            return self._evaluate(self.step, limit=0 if last else self.config.data.eval_sequences)

    def _report_evaluation(self, event: EvaluationEvent) -> None:
        """Reports an evaluation of the state, warns if the loss rises, and saves the state if it is the best one."""
        self._emit(event)
        if text := self._validation_monitor(event.step, event.val_loss):
            self._emit(WarningEvent("rise", text))
        if self._best and self._validation_monitor.best_step == event.step:
            with self._pause("checkpoint"):
                self._best.save(event.step, self.state, self._describe(self._clock.seconds()))

    def _sample_if_due(self) -> None:
        if self._is_due(self.config.generation_interval):
            with self._pause("samples"):
                self._emit(SamplesEvent(self.step, self._generate_samples(self.step)))

    def _evaluate(self, step: int, limit: int) -> EvaluationEvent | None:
        """The validation loss over `limit` sequences (0: over all); None if a signal ends it."""
        c = self.config
        weights = self.state.weights
        loss_sums: list[jax.Array] = []
        count = text_bytes = 0
        rows, vote = self._rows(c.chunk_size), None
        for inputs, targets in val_batches(self.tokens.val, c.model.context, c.chunk_size, limit):
            self._agreement.take(vote)
            if self._agreement.signal:
                return None
            vote = self._agreement.vote()
            jax.block_until_ready(loss_sums[-2:-1])  # so a stop waits for two batches at most
            loss_sums.append(self._eval_step(weights, self._place(inputs[rows]), self._place(targets[rows])))
            count += int((targets >= 0).sum())
            text_bytes += self.tokens.text_bytes(targets)
        loss = float(np.sum(jax.device_get(loss_sums), dtype=np.float64)) / count
        return EvaluationEvent(step, loss, bits_per_byte(loss, count, text_bytes))

    def _generate_samples(self, step: int) -> tuple[tuple[str, str], ...]:
        """(prompt, prompt and completion) pairs; each step draws its prompts from the configured ones."""
        c, end_of_text = self.config.sample, self._tokenizer.end_of_text
        order = np.random.default_rng([self.config.seed, step]).permutation(len(self._prompts))
        chosen = [int(order[i % len(order)]) for i in range(c.texts)]
        key = jax.random.fold_in(jax.random.PRNGKey(self.config.seed), step)
        ids = [self._prompt_ids[i] for i in chosen]
        params = prepare_decode_params(self.config.model, on_one_device(self.state.weights))
        (tokens_BN,) = generate(self.config.model, params, ids, sampling_params(c), key, c.tokens, end_of_text)
        prompts = [self._prompts[i] for i in chosen]
        return tuple((prompt, prompt + self._completion(row)) for prompt, row in zip(prompts, tokens_BN, strict=True))

    def _completion(self, row: np.ndarray) -> str:
        """The text of new tokens, or why there is none: samples end no run."""
        try:
            return self._tokenizer.decode(up_to_end(row, self._tokenizer.end_of_text))
        except FloatingPointError as error:
            return f" ({error})"

    def _stop_if_signalled(self) -> None:
        if self._agreement.now():
            self._stop()

    def _stop(self) -> None:
        """Saves the state after the last optimizer step, and raises Stopped.

        What the next step has accumulated is dropped: its micro-batches are computed again.
        """
        step, signal = self.step, self._agreement.signal
        self._emit(StoppingEvent(step, signal))
        if step == 0:
            raise Stopped("stopped before the first step was done: nothing is saved", signal)
        with self._pause("checkpoint"):
            batches = jax.device_put(np.int32(self._step_batches), self.state.batches.sharding)
            self._saver.finish(step, self.state._replace(batches=batches))
        raise Stopped(f"stopped after step {step}: the same command resumes from there", signal)

    def _look_at_step(self) -> None:
        if text := self._step_monitor.tick(self._clock.in_progress):
            self._emit(WarningEvent("step", text))

    def _header(self) -> str:
        c, parameters, mesh = self.config, parameter_count(self.state.params), self.mesh
        each = backend.describe(self.device)
        devices = f"{mesh.size} x {each} (data {mesh.shape['data']}, fsdp {mesh.shape['fsdp']})" if mesh else each
        run_tokens, data_tokens = c.max_steps * c.tokens_per_step, len(self.tokens.train)
        lines = [
            f"{parameters:,} parameters in {c.model.precision}{' with remat' * bool(c.model.remat)} on {devices}",
            f"{c.max_steps:,} steps of {c.tokens_per_step:,} tokens: {run_tokens / parameters:.3g} tokens a parameter,"
            f" {run_tokens / data_tokens:.3g} epochs of {data_tokens:,} tokens",
            f"Data in {self.tokens.directory}, work in {self.workdir}",
        ]
        if sys.platform == "darwin":
            lines.append("A Mac that sleeps does not train: keep it awake with `caffeinate -i` before the command")
        return "\n".join(lines + [f"Resuming from step {self.step:,}"] * (self.step > 0))

    def _sync_records(self) -> None:
        """Returns once the rows of all steps are on the disk. Raises OSError."""
        self._records.sync()
        self._listeners.call("sync")

    @contextlib.contextmanager
    def _pause(self, kind: str) -> Iterator[None]:
        """Counts the time spent inside as a pause."""
        start = self._clock.seconds()
        self._emit(PauseStartEvent(kind))
        with self._clock.pause(kind):
            yield
        self._emit(PauseEvent(kind, self._clock.seconds() - start))

    def _emit(self, event: Event) -> None:
        """Sends an event to the records, and then to the listeners; of several processes, the first one does."""
        if distributed.is_first():
            self._records(event)
            self._listeners.call("__call__", event)

    def close(self) -> None:
        """Closes the records and the listeners."""
        self._timer.shutdown(wait=False)
        self._listeners.call("close")
        self._records.close()
