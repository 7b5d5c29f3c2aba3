"""A short run of the real loop on random tokens, to learn what its steps and pauses take here.

It runs in a process of its own, as training does, so that its peak memory and its start are those of a run; and once
before, briefly, so that it finds compiled what a run finds compiled. Where a step would take minutes, it computes one
slice of it, and the optimizer's update by itself.
"""

import contextlib
import dataclasses
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import Config, from_config_dict, to_dict
from jaxlm.core.optimizer import make_optimizer
from jaxlm.data.token_files import TokenFiles
from jaxlm.device import backend
from jaxlm.errors import RunError, UsageError
from jaxlm.interop.huggingface import write_model
from jaxlm.interop.model_card import model_card
from jaxlm.planner.estimate import Timings, flops_per_token
from jaxlm.run import trainer
from jaxlm.run.monitor import Clock

CYCLES, SLICE_CYCLES = 3, 2  # the first one's pauses hold what happens only once
CYCLE_SECONDS = 8.0  # of steps, longer than a save
LEAST_STEPS, MOST_STEPS = 5, 100  # of a cycle
SLICE_BATCHES = 2  # of an evaluation
WHOLE_STEP_SECONDS = 4.0  # a step that is expected to take longer is measured by a slice
EXPECTED_SHARE = 0.4  # of the speed of a matrix product, before anything is measured
TOKENS = 2**20


@dataclass(frozen=True)
class BenchmarkResult:
    """What the short run found; times in seconds, sizes in bytes."""

    batch_size: int  # of its settings, where it computed a slice
    grad_accum_steps: int
    microbatch_chunks: int
    start: float  # from the command to the first step, compilation included
    first: float  # what the first evaluation, texts and save took longer than the next ones
    step: float
    step_fast: float  # a quarter of the steps took less
    step_slow: float  # and a quarter more
    update: float  # of the optimizer, by itself; 0 where whole steps were measured
    evaluation: float  # a batch of it
    samples: float
    save: float
    saving: float
    end: float
    flops_per_second: float  # of a matrix product
    peak_bytes: int
    checkpoint_bytes: int
    model_bytes: int


class _Enough(Exception):
    pass


class _RecordingClock(Clock):
    """A clock that keeps the seconds of each pause, by kind."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.pauses: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        start = self.seconds()
        with super().pause(kind):
            yield
        self.pauses.setdefault(kind, []).append(self.seconds() - start)


class _MeasuredRun(trainer.Trainer):
    """A run that ends after some saves, and keeps the seconds of its steps."""

    def __init__(self, *arguments: Any, cycles: int, say: Callable[[int, int], None]):
        super().__init__(*arguments)
        self.clock: _RecordingClock = _RecordingClock()
        self.last, self.say = cycles * self.config.save_interval + 1, say
        self.rows: list[tuple[int, float, bool]] = []  # step, its seconds, whether a save was under way
        self.began_saving = 0.0
        self.savings: list[float] = []

    def _save(self, step: int) -> None:
        super()._save(step)
        self.began_saving = self.clock.seconds()

    def _announce_saved(self, wait: bool = False) -> None:
        before = self.saving
        super()._announce_saved(wait)
        if before is not None and self.saving is None:
            self.savings.append(self.clock.seconds() - self.began_saving)

    def _record(self, row: dict[str, float]) -> None:
        self.rows.append(
            (int(row["step"]), self.config.tokens_per_step / row["tokens_per_second"], self.saving is not None)
        )
        super()._record(row)
        self.say(int(row["step"]), self.last)
        if row["step"] == self.last:
            self._announce_saved(wait=True)
            raise _Enough


def seconds(config: Config, m: BenchmarkResult, val_windows: int) -> Timings:
    """What a resolved config's own steps and pauses take, by what was measured of it or of a slice of it.

    Args:
        config: as it was given to `measure`.
        m: what that found.
        val_windows: windows of `context` tokens in the validation text; 0: not known.
    """
    step = m.step
    if m.update:
        step = config.grad_accum_steps * (config.microbatch_chunks * max(m.step - m.update, 0.0) + m.update)
    counts = [windows for windows in (config.data.eval_sequences, val_windows) if windows] or [1]
    batches, all_batches = (-(-count // config.chunk_size) for count in (min(counts), val_windows or min(counts)))
    return Timings(
        start=m.start + m.first,
        step=step,
        evaluation=batches * m.evaluation,
        last_evaluation=all_batches * m.evaluation,
        samples=m.samples,
        save=m.save,
        saving=m.saving,
        end=m.saving + m.end,
    )


def reduced(config: Config, m: BenchmarkResult) -> Config:
    """The settings that were measured for `config`."""
    return dataclasses.replace(
        config, batch_size=m.batch_size, grad_accum_steps=m.grad_accum_steps, microbatch_chunks=m.microbatch_chunks
    )


def key(config: Config, device: jax.Device) -> list[Any]:
    """All that the cost of a step or a pause hangs on: what computes, the machine around it, settings."""
    settings = to_dict(dataclasses.replace(config, max_checkpoints=1, seed=0, init_from="", platform="auto"))
    settings["data"] = config.data.eval_sequences
    for name in ("eval_interval", "save_interval", "generation_interval", "max_nonfinite_microbatches"):
        del settings[name]
    return [*backend.identity(device), os.cpu_count(), backend.available_memory(device), settings]


def measure(config: Config, device: jax.Device, place: Path, show: Callable[[float], None]) -> BenchmarkResult:
    """Measures what a resolved config takes, in processes of its own that write below the directory `place` and leave
    nothing there; `show` hears which share is done.

    Raises:
        RunError: the run fails, as for lack of memory.
    """
    product = _product_speed(config.model.matmul_dtype, device)  # here: a run has no such arrays
    with tempfile.TemporaryDirectory(dir=place, prefix="jaxlm-measure-") as name:
        if jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
            _child(config, product, Path(name, "brief"), True, lambda share: show(share / 4))
        return BenchmarkResult(
            **_child(config, product, Path(name, "short"), False, lambda share: show(0.25 + 0.75 * share))
        )


def _child(config: Config, product: float, workdir: Path, brief: bool, show: Callable[[float], None]) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_PREALLOCATE"}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    words = [str(workdir), str(int(brief)), str(product), str(time.monotonic()), json.dumps(to_dict(config))]
    command = [sys.executable, "-m", "jaxlm.planner.measure", *words]
    said: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as child,
    ):
        try:
            for line in child.stdout or ():
                if not line.startswith("{"):  # a plugin may print as well
                    continue
                said = json.loads(line)
                if "share" in said:
                    show(said["share"])
        except BaseException:
            child.kill()
            raise
        child.wait()
        errors.seek(0)
        last = next((line.strip() for line in reversed(errors.readlines()) if line.strip()), "")
    if child.returncode or "error" in said or "share" in said:
        reason = said.get("error") or f"status {child.returncode}, {last[:200]!r}"
        raise RunError(f"the short run failed ({reason})")
    return said


def main(argv: list[str]) -> None:
    """The process that measures. Its last line on stdout is a JSON object of all that it found, or of its failure.

    `argv` is the directory to make and write in, whether it is for what is compiled alone (0 or 1), the speed of a
    matrix product, when it was called by the monotonic clock, and the config as JSON. It ends with the process that
    holds the other end of its stdin.
    """
    workdir, brief, product, called = Path(argv[0]), argv[1] == "1", float(argv[2]), float(argv[3])
    console, sys.stdout = sys.stdout, io.TextIOWrapper(open(os.devnull, "wb"))  # noqa: SIM115
    threading.Thread(target=_end_with_stdin, daemon=True).start()

    def say(said: dict[str, Any]) -> None:
        print(json.dumps(said), file=console, flush=True)

    try:
        config = from_config_dict(json.loads(argv[4]))
        device = backend.start(config.platform, config.deterministic)
        found = _measure(config, device, workdir, brief, product, called, lambda share: say({"share": share}))
        say(dataclasses.asdict(found))
    except (UsageError, RunError, jax.errors.JaxRuntimeError) as error:
        say({"error": str(error).splitlines()[0][:200]})
    console.flush()
    os._exit(0)


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(1)


def _measure(
    config: Config,
    device: jax.Device,
    workdir: Path,
    brief: bool,
    product: float,
    called: float,
    show: Callable[[float], None],
) -> BenchmarkResult:
    entered = time.monotonic()
    expected = config.tokens_per_step * flops_per_token(config.model) / (EXPECTED_SHARE * product)
    sliced = expected > WHOLE_STEP_SECONDS
    if sliced:
        expected /= config.microbatch_chunks * config.grad_accum_steps
        config = dataclasses.replace(config, batch_size=config.chunk_size, grad_accum_steps=1, microbatch_chunks=1)
    cycles = 1 if brief else SLICE_CYCLES if sliced else CYCLES
    # the run's own number, which its step is compiled for, if that is enough
    max_steps = max(config.max_steps, CYCLES * (LEAST_STEPS + 2) + 2)
    most = min(MOST_STEPS, (max_steps - 2) // CYCLES - 2)
    interval = 1 if brief else min(max(round(CYCLE_SECONDS / expected), LEAST_STEPS), most)
    intervals = [interval + apart for apart in range(3)]  # what one pause frees the next cannot always use
    batches = SLICE_BATCHES if sliced else max(-(-config.data.eval_sequences // config.chunk_size), 2)
    config = dataclasses.replace(
        config,
        eval_interval=intervals[0],
        generation_interval=intervals[1],
        save_interval=intervals[2],
        max_steps=max_steps,
        init_from="",
        max_checkpoints=1,
        data=dataclasses.replace(config.data, eval_sequences=batches * config.chunk_size),
    )
    draw, vocab, windows = np.random.default_rng(0), config.model.vocab_size, batches * config.chunk_size
    train = draw.integers(vocab, size=max(TOKENS, 2 * config.model.context), dtype=np.uint16)
    val = draw.integers(vocab, size=windows * config.model.context + 1, dtype=np.uint16)
    aside = time.monotonic() - entered  # what no run does
    workdir.mkdir()
    tokens = TokenFiles(workdir, train, val, 1, ("", ""), None)
    run = _MeasuredRun(config, workdir, tokens, device, cycles=cycles, say=lambda step, of: show(min(step / of, 1.0)))
    made = time.monotonic() - called - aside
    with contextlib.suppress(_Enough):
        run.train()
    began = time.monotonic()
    card = model_card(workdir, config, run.step, {}, 0)
    folder = write_model(workdir / "final_model", config, run.state.params, card)
    end = time.monotonic() - began
    sizes = [_size(path) for path in (workdir / "checkpoints").iterdir()]
    model_bytes = _size(folder)
    peak = peak_bytes(device)
    pauses = run.clock.pauses
    later = {kind: mean(seconds[1:] or seconds) for kind, seconds in pauses.items()}
    first = sum(pauses[kind][0] - later[kind] for kind in ("evaluation", "samples", "checkpoint"))
    warm = [row for row in run.rows if row[0] > 1]
    # a micro-batch is reported with the next one, but at an interval at once: the step looks short, the next one long
    around = {step for every in intervals for due in range(every, run.last, every) for step in (due, due + 1)}
    quiet = sorted(seconds for step, seconds, saving in warm if not saving and step not in around) or [warm[-1][1]]
    usual = median(quiet)
    busy = [seconds for step, seconds, saving in warm if saving and step < run.last]
    slowed = max(sum(busy) - usual * (len(busy) + (cycles - 1) / config.grad_accum_steps), 0.0)
    return BenchmarkResult(
        config.batch_size,
        config.grad_accum_steps,
        config.microbatch_chunks,
        start=made + pauses["compilation"][0] + max(run.rows[0][1] - usual, 0.0),
        first=max(first, 0.0),
        step=usual,
        step_fast=quiet[len(quiet) // 4],
        step_slow=quiet[-1 - len(quiet) // 4],
        update=_update_seconds(config, run.state) if sliced else 0.0,
        evaluation=later["evaluation"] / batches,
        samples=later["samples"],
        save=later["checkpoint"] + slowed / max(cycles - 1, 1),
        saving=median(run.savings),
        end=end,
        flops_per_second=product,
        peak_bytes=peak,
        checkpoint_bytes=max(sizes),
        model_bytes=model_bytes,
    )


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def peak_bytes(device: jax.Device) -> int:
    """The most that this process has had: of the allocator on an NVIDIA GPU, of the resident set elsewhere."""
    if device.platform == "gpu":
        return device.memory_stats()["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _product_speed(dtype: str, device: jax.Device) -> float:
    """Floating-point operations a second of a product of two square matrices."""
    size = 2048 if device.platform == "cpu" else 8192 if device.platform == "gpu" else 4096
    a = jax.device_put(np.random.default_rng(0).standard_normal((size, size), np.float32), device).astype(dtype)
    sums = "float32" if device.platform == "cpu" else dtype  # the fast form on each
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=sums))
    return 2 * size**3 / _seconds(lambda: product(a, a))


def _update_seconds(config: Config, state: Any) -> float:
    step = jax.jit(make_optimizer(config).step)
    return _seconds(lambda: step(state.params, state.opt_state, state.params))


def _seconds(compute: Callable[[], Any]) -> float:
    jax.block_until_ready(compute())
    timings = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(compute())
        timings.append(time.perf_counter() - began)
    return median(timings)


if __name__ == "__main__":
    main(sys.argv[1:])
