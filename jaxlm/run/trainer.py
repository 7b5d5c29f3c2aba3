"""The training run: batches in, steps, what happens at the intervals, and a stop that loses nothing."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from jaxlm.config import Config
from jaxlm.core.generate import generate, up_to_end
from jaxlm.core.model import parameter_count, prepare_decode_params
from jaxlm.core.sampling import sampling_params
from jaxlm.core.train_step import Metrics, make_eval_step, make_train_step
from jaxlm.data.token_files import TokenFiles, train_batch_stream, val_batches
from jaxlm.data.tokenizer import encode_prompts, load_tokenizer
from jaxlm.device import backend
from jaxlm.errors import RunError, Stopped
from jaxlm.interop.huggingface import write_model
from jaxlm.interop.model_card import model_card
from jaxlm.run.checkpoint import DIRECTORY, Checkpoints
from jaxlm.run.memory import step_memory
from jaxlm.run.monitor import Clock, Monitor, metrics_line
from jaxlm.run.resume import describe_run, restore_or_init

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EARLY_LINES = (1, 2, 5, 10, 20, 50)  # steps with a console line before the first interval ends


class Trainer:
    """One session of training on one work directory.

    The host counts the micro-batches that it has handed to the device, and takes each to be good until the device
    reports otherwise, one micro-batch later: so the device never waits for the host. At an interval the host waits
    for the last report before it acts, so that it acts on the very state after that step.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        tokens: TokenFiles,
        device: jax.Device,
        ready: Callable[[Any, int], str] | None = None,
    ):
        """Restores the newest checkpoint of `workdir`, or starts anew.

        Args:
            config: the settings, as `backend.resolve_run` gives them.
            workdir: exists.
            tokens: what to train on.
            device: what trains.
            ready: hears the compiled step, and how many are done, before it runs; gives lines to print, or raises.

        Raises:
            UsageError: the checkpoint does not fit the settings or the tokens, or none is whole; a prompt does not
                fit the context.
        """
        self.config, self.workdir, self.tokens, self.device = config, workdir, tokens, device
        self.ready = ready
        self.tokenizer = load_tokenizer(config.model.vocab_size)
        self.prompts = encode_prompts(self.tokenizer, config.sample.prompts, config.model.context)
        self.checkpoints = Checkpoints(workdir, config.max_checkpoints)
        self.state, seconds, self.notes = restore_or_init(self.checkpoints, config, tokens, device)
        self.accepted = int(self.state.step) * config.grad_accum_steps  # micro-batches, by the host's count
        self.skipped = int(self.state.batches) - self.accepted
        self.saved = self.step  # the step of the last whole checkpoint; 0 for none
        self.saving: int | None = None  # the step whose checkpoint is on its way to the disk
        self.clock = Clock(seconds)
        self.monitor = Monitor(workdir, self.step, config.max_steps)
        self.notes += [
            f"{path} had damaged lines; as it was it is {path.name}.damaged" for path in self.monitor.damaged
        ]
        self.losses: list[float] = []  # of the steps since the last console line, and their seconds
        self.seconds: list[float] = []
        self.stop_signal = 0

    @property
    def step(self) -> int:
        """Optimizer steps done, by the host's count."""
        return self.accepted // self.config.grad_accum_steps

    def train(self) -> None:
        """Trains to `max_steps`.

        Raises:
            Stopped: on SIGINT, SIGTERM or SIGHUP, after saving.
            RunError: too many micro-batches in a row had gradients that are not finite, or the last step cannot be
                saved.
        """
        with self._signals(), contextlib.closing(self.monitor):
            self.monitor.say("\n".join([*self.notes, self._header()]))
            if self.step < self.config.max_steps:
                try:
                    self._loop()
                finally:
                    self._announce_saved(wait=True)
            described = describe_run(self.config, self.tokens, 0)["tokens"]
            card = model_card(self.workdir, self.config, self.step, described, parameter_count(self.state.params))
            folder = write_model(self.workdir / "final_model", self.config, self.state.params, card)
            self.monitor.say(f"Done: {self.step:,} steps, the model is in {folder}")

    def _header(self) -> str:
        c, parameters = self.config, parameter_count(self.state.params)
        total, data = c.max_steps * c.tokens_per_step, len(self.tokens.train)
        lines = [
            f"{parameters:,} parameters in {c.model.precision} on {backend.describe(self.device)}",
            f"{c.max_steps:,} steps of {c.tokens_per_step:,} tokens: {total / parameters:.3g} tokens a parameter,"
            f" {total / data:.3g} epochs of {data:,} tokens",
            f"Data in {self.tokens.directory}, work in {self.workdir}",
        ]
        return "\n".join(lines + [f"Going on from step {self.step:,}"] * (self.step > 0))

    def _loop(self) -> None:
        config, accum = self.config, self.config.grad_accum_steps
        with self.clock.pause("compilation"):
            batches = train_batch_stream(
                self.tokens.train, config.model.context, config.batch_size, config.seed, int(self.state.batches)
            )
            shape = jax.ShapeDtypeStruct((config.batch_size, config.model.context + 1), np.int32)
            train_step = make_train_step(config).lower(self.state, shape).compile()
            memory = step_memory(config, train_step)
            backend.keep_freed_memory(memory.gradients + memory.temporaries if memory else 0)
        if self.ready:
            self.monitor.say(self.ready(train_step, self.step))
        self._eval_step = make_eval_step(config)
        in_flight: Metrics | None = None
        while self.step < config.max_steps:
            self.state, metrics = train_step(self.state, jax.device_put(next(batches), self.device))
            self.accepted += 1
            if row := self._absorb(in_flight):
                self._record(row)
            in_flight = metrics
            if self.accepted % accum == 0 and self._something_due():
                row = self._absorb(in_flight)
                in_flight = None
                if row:
                    self._act(row)

    def _absorb(self, metrics: Metrics | None) -> dict[str, float] | None:
        """Waits for a micro-step; gives the row for metrics.jsonl if it completed an optimizer step."""
        if metrics is None:
            return None
        m = jax.device_get(metrics)
        if m.skipped > self.skipped:
            self.skipped = int(m.skipped)
            self.accepted -= 1
            self.monitor.say(f"  → Skipped a micro-batch with gradients that are not finite ({self.skipped} so far)")
        if m.skipped_in_a_row >= self.config.max_nonfinite_microbatches:
            raise RunError(
                f"{m.skipped_in_a_row} micro-batches in a row had gradients that are not finite after step {m.step}:"
                " lower optimizer.learning_rate and start again from the last checkpoint"
            )
        if not m.updated:
            return None
        seconds = self.clock.step_ended()
        return {
            "step": int(m.step),
            "loss": float(m.loss),
            "lr": float(m.lr),
            "grad_norm": float(m.grad_norm),
            "tokens": int(m.step) * self.config.tokens_per_step,
            "tokens_per_second": self.config.tokens_per_step / seconds,
            "seconds": round(self.clock.seconds(), 3),
        }

    def _record(self, row: dict[str, float]) -> None:
        """Writes a step's row, its console line where one is due, and moves the bar."""
        self.monitor.record(row)
        self.losses.append(row["loss"])
        self.seconds.append(self.config.tokens_per_step / row["tokens_per_second"])
        step, left = int(row["step"]), self._seconds_left(int(row["step"]))
        early = step in EARLY_LINES and step < self.config.eval_interval
        if early or step % self.config.eval_interval == 0 or step == self.config.max_steps:
            rate = self.config.tokens_per_step / median(self.seconds)
            self.monitor.say(metrics_line(step, float(np.mean(self.losses)), row["lr"], rate, left))
            self.losses, self.seconds = [], []
        self.monitor.progress(step, row["loss"], row["tokens_per_second"], left, self._next_event(step))
        self._announce_saved()

    def _intervals(self) -> dict[str, int]:
        c = self.config
        return {"evaluation": c.eval_interval, "samples": c.generation_interval, "checkpoint": c.save_interval}

    def _seconds_left(self, step: int) -> float:
        last = self.config.max_steps
        pauses = {kind: last // interval - step // interval for kind, interval in self._intervals().items()}
        return self.clock.seconds_left(last - step, pauses)

    def _next_event(self, step: int) -> str:
        at, kind = min(((step // interval + 1) * interval, kind) for kind, interval in self._intervals().items())
        return f"{kind} at {at}" if at < self.config.max_steps else f"the end at {self.config.max_steps}"

    def _something_due(self) -> bool:
        at_interval = any(self.step % interval == 0 for interval in self._intervals().values())
        return at_interval or self.step == self.config.max_steps or bool(self.stop_signal)

    def _act(self, row: dict[str, float]) -> None:
        """Evaluates, samples, saves, stops: whatever is due after the step of `row`, which is the state's."""
        step, last, stop_signal = self.step, self.step == self.config.max_steps, self.stop_signal
        if step % self.config.eval_interval == 0 or last:
            with self.clock.pause("evaluation"):
                row |= self._evaluate(limit=0 if last else self.config.data.eval_sequences)
        self._record(row)
        if "val_loss" in row:
            self.monitor.say(
                f"  → Validation loss {row['val_loss']:.4f} ({row['val_bits_per_byte']:.4f} bits per byte)"
            )
        if step % self.config.generation_interval == 0 or last:
            with self.clock.pause("samples"):
                self.monitor.samples(step, self._write_samples(step))
        if step % self.config.save_interval == 0 or last or stop_signal:
            with self.clock.pause("checkpoint"):
                self._save(step)
        if last or stop_signal:
            self._announce_saved(wait=True)
            if self.saved != step:
                raise RunError(f"{self.failure}; the same command goes on from step {self.saved}")
        if stop_signal and not last:
            raise Stopped(f"stopped after step {step}: the same command goes on from there", stop_signal)

    def _evaluate(self, limit: int) -> dict[str, float]:
        c = self.config
        nats, count = [], 0
        for inputs, targets in val_batches(self.tokens.val, c.model.context, c.chunk_size, limit):
            nats.append(self._eval_step(self.state.params, inputs, targets))
            count += int((targets >= 0).sum())
        loss = float(np.sum(jax.device_get(nats), dtype=np.float64)) / count
        return {"val_loss": loss, "val_bits_per_byte": float(self.tokens.bits_per_byte(loss))}

    def _write_samples(self, step: int) -> list[tuple[str, str]]:
        """As many texts as configured, their prompts chosen anew for each step."""
        c, end_of_text = self.config.sample, self.tokenizer.end_of_text
        order = np.random.default_rng([self.config.seed, step]).permutation(len(c.prompts))
        chosen = [int(order[i % len(order)]) for i in range(c.texts)]
        key = jax.random.fold_in(jax.random.PRNGKey(self.config.seed), step)
        choice = sampling_params(c)
        ids = [self.prompts[i] for i in chosen]
        weights = prepare_decode_params(self.config.model, self.state.params)
        (tokens_BN,) = generate(self.config.model, weights, ids, choice, key, c.tokens, end_of_text)
        texts = [self.tokenizer.decode(up_to_end(row, end_of_text)) for row in tokens_BN]
        return [(c.prompts[i], c.prompts[i] + text) for i, text in zip(chosen, texts, strict=True)]

    def _save(self, step: int) -> None:
        """Starts saving. What the files say of the steps up to this one is on the disk before the checkpoint is."""
        self._announce_saved(wait=True)
        try:
            self.monitor.sync()
            self.checkpoints.save(step, self.state, describe_run(self.config, self.tokens, self.clock.seconds()))
        except OSError as error:
            self._warn_not_saved(step, f"{self.workdir} does not take the rows before it ({error.strerror})")
        except RunError as error:
            self._warn_not_saved(step, str(error))
        else:
            self.saving = step

    def _announce_saved(self, wait: bool = False) -> None:
        """Says that the last save is whole, or that it failed, once that is known."""
        if self.saving is None or (self.checkpoints.saving() and not wait):
            return
        step, self.saving = self.saving, None
        try:
            self.checkpoints.wait()
        except (OSError, RunError) as error:
            self._warn_not_saved(step, str(error))
        else:
            self.saved = step
            self.monitor.say(f"  → Saved checkpoint: {DIRECTORY}/{step}")

    def _warn_not_saved(self, step: int, reason: str) -> None:
        self.failure = f"step {step} is not saved, {reason}: make room"
        self.monitor.say(f"  → {self.failure[0].upper()}{self.failure[1:]}; the next save tries again")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal to stop does so after the step; a second SIGINT leaves at once."""

        def heed(number: int, frame: Any) -> None:
            self.stop_signal = self.stop_signal or number

        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in STOP_SIGNALS if not (number == signal.SIGHUP and nohup)]
        handlers = {number: signal.signal(number, heed) for number in numbers}
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._answer_signals, args=(reading,), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            os.close(writing)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _answer_signals(self, reading: int) -> None:
        """Answers at once, from a thread of its own, though the main one may be inside a compilation for minutes."""
        asked = False
        while byte := os.read(reading, 1):
            if asked and byte[0] == signal.SIGINT:
                self.monitor.abandon()
                os._exit(128 + signal.SIGINT)
            if byte[0] in STOP_SIGNALS and not asked:
                asked = True
                with contextlib.suppress(OSError):  # the terminal may have gone
                    os.write(2, b"Stopping after this step; Ctrl-C again to leave at once, without saving\n")
        os.close(reading)
