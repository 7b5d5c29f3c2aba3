"""A short run of the real trainer on random tokens, which measures the seconds of its steps and pauses.

It runs in its own process, so that its peak memory and its start are those of a run. A brief run comes first and fills
the compilation cache, as an earlier run would. Where a step would take minutes, the short run measures one chunk of a
micro-batch, and the optimizer's update separately.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm.config import Config, from_config_dict, to_dict
from jaxlm.core.optimizer import make_optimizer
from jaxlm.core.train_step import TrainState
from jaxlm.data.token_files import TokenFiles
from jaxlm.data.tokenizer import GPT2_VOCAB_SIZE, Tokenizer, load_tokenizer, make_tokenizer
from jaxlm.device import backend
from jaxlm.device.mesh import make_mesh
from jaxlm.errors import RunError, UsageError
from jaxlm.interop.huggingface import write_model
from jaxlm.interop.model_card import model_card
from jaxlm.planner.estimate import Timings, flops_per_token
from jaxlm.run import trainer
from jaxlm.run.events import Event, NotSavedEvent, PauseEvent, SavedEvent, SavingEvent, StepEvent
from jaxlm.run.memory import peak_bytes
from jaxlm.run.quiet import quiet_libraries

CYCLES, CHUNK_CYCLES = 3, 2  # the first pauses include what happens only once
CYCLE_SECONDS = 8.0  # of steps, longer than a save
MIN_STEPS, MAX_STEPS = 5, 100  # of a cycle
CHUNK_BATCHES = 2  # of an evaluation
WHOLE_STEP_SECONDS = 4.0  # a step that is expected to take longer is measured by one chunk
EXPECTED_SHARE = 0.4  # of the speed of a matmul, before anything is measured
TOKENS = 2**20


@dataclass(frozen=True)
class BenchmarkResult:
    """What the short run measured; times in seconds, sizes in bytes."""

    batch_size: int  # of the short run, which may be one chunk
    grad_accum_steps: int
    microbatch_chunks: int
    start: float  # from the command to the first step, compilation included
    first: float  # extra time of the first evaluation, samples and save
    step: float
    step_fast: float  # a quarter of the steps took less
    step_slow: float  # and a quarter more
    update: float  # of the optimizer alone; 0 if whole steps were measured
    evaluation: float  # one batch
    samples: float
    save: float
    saving: float
    end: float
    flops_per_second: float  # of a matmul
    peak_bytes: int
    checkpoint_bytes: int
    model_bytes: int


class _Stopwatch:
    """The listener that records the seconds of steps, pauses and saves; `show` receives the share that is done."""

    def __init__(self, last: int, show: Callable[[float], None]):
        self.steps: list[tuple[int, float, bool]] = []  # step, its seconds, whether a save was in progress
        self.pauses: dict[str, list[float]] = {}
        self.saves: list[float] = []
        self._last, self._show = last, show
        self._save_start: float | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case StepEvent():
                self.steps.append((event.step, event.step_seconds, self._save_start is not None))
                self._show(min(event.step / self._last, 1.0))
            case PauseEvent(kind, seconds):
                self.pauses.setdefault(kind, []).append(seconds)
            case SavingEvent():
                self._save_start = time.monotonic()
            case SavedEvent() | NotSavedEvent() if self._save_start is not None:
                self.saves.append(time.monotonic() - self._save_start)
                self._save_start = None


def seconds(config: Config, m: BenchmarkResult, val_windows: int) -> Timings:
    """Computes the seconds of a config's steps and pauses from a measurement of it, or of one chunk of it.

    Args:
        config: the resolved config that `measure` was called with.
        m: the result of `measure`.
        val_windows: windows of `context` tokens in the validation data; 0 if unknown.
    """
    step = m.step
    if m.update:
        step = config.grad_accum_steps * (config.microbatch_chunks * max(m.step - m.update, 0.0) + m.update)
    windows = min([count for count in (config.data.eval_sequences, val_windows) if count], default=1)
    batches, all_batches = (math.ceil(count / config.chunk_size) for count in (windows, val_windows or windows))
    return Timings(
        start=m.start + m.first,
        step=step,
        evaluation=batches * m.evaluation + config.keep_best * m.save,  # at most: each may be the best yet
        last_evaluation=all_batches * m.evaluation + config.keep_best * m.save,
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
    """All that the cost of a step or a pause depends on: the device, the machine and the settings."""
    settings = to_dict(dataclasses.replace(config, max_checkpoints=1, seed=0, init_from="", platform="auto"))
    settings["data"] = config.data.eval_sequences
    intervals = ("eval_interval", "save_interval", "save_minutes", "keep_every", "keep_best", "generation_interval")
    for name in (*intervals, "hours", "max_nonfinite_microbatches"):
        del settings[name]
    return [*backend.identity(device), os.cpu_count(), backend.available_memory(device), settings]


def measure(config: Config, device: jax.Device, place: Path, show: Callable[[float], None]) -> BenchmarkResult:
    """Measures a resolved config in subprocesses.

    Args:
        config: the resolved config.
        device: the device that will train.
        place: a directory in which the subprocesses write; they leave nothing there, also where this process is killed.
        show: called with the share that is done.

    Raises RunError if the run fails, for example for lack of memory.
    """
    speed = matmul_speed(config.model.matmul_dtype, device)  # in this process: a run has no such arrays
    with tempfile.TemporaryDirectory(dir=place, prefix="jaxlm-measure-") as name:
        if jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
            _run_child(config, speed, name, True, lambda share: show(share / 4))
        values = _run_child(config, speed, name, False, lambda share: show(0.25 + 0.75 * share))
        return BenchmarkResult(**values)


def _run_child(
    config: Config, matmul_speed: float, folder: str, brief: bool, show: Callable[[float], None]
) -> dict[str, Any]:
    """Runs `main` in a subprocess and returns its last line. Raises RunError if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_PREALLOCATE"}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    request = json.dumps([folder, brief, matmul_speed, time.monotonic(), to_dict(config)])
    command = [sys.executable, "-m", "jaxlm.planner.measure", request]
    pipe = subprocess.PIPE
    message: dict[str, Any] = {}
    last = ""
    options: dict[str, Any] = {"text": True, "errors": "replace", "env": environment}
    options["start_new_session"] = True  # a signal to both would not let it remove the folder
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, **options) as child:
        try:
            for line in child.stdout or ():
                if line.startswith("{"):
                    message = json.loads(line)
                    show(message.get("share", 1.0))
                else:  # of a plugin, or of an exception
                    last = line.strip() or last
        except BaseException:
            child.kill()
            raise
        child.wait()  # before its stdin closes
    if child.returncode or "error" in message or "share" in message:
        raise RunError(f"the short run failed ({message.get('error') or f'status {child.returncode}, {last[:200]!r}'})")
    return message


def main(request: str) -> None:
    """Measures in this process, and ends it. The last line on stdout is a JSON object: the result, or the error.

    The process also ends when the other end of its stdin closes, and then removes the directory.

    Args:
        request: as JSON, the directory to write in; whether the run is brief and only fills the compilation
            cache; the speed of a matmul; the monotonic clock when the process was started; the config.
    """
    stdout, sys.stdout = sys.stdout, open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    folder, brief, matmul_speed, call_time, settings = json.loads(request)
    threading.Thread(target=_end_with_stdin, args=(folder,), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        print(f"\n{json.dumps(message)}", file=stdout, flush=True)  # after an unfinished line of a plugin

    try:
        plan = _plan_run(from_config_dict(settings), brief, matmul_speed)
        workdir = Path(folder, "brief" if brief else "short")
        result = _measure(plan, workdir, call_time, lambda share: send({"share": share}))
        send(result | {"flops_per_second": matmul_speed})
    except (UsageError, RunError, jax.errors.JaxRuntimeError) as error:
        send({"error": str(error).splitlines()[0][:200]})
    os._exit(0)


def _end_with_stdin(folder: str) -> None:
    sys.stdin.read()
    os.execlp("rm", "rm", "-rf", "--", folder)  # in place of this process, so that no thread writes any more


class _ShortRun(NamedTuple):
    """The short run of a config."""

    config: Config
    cycles: int  # how many times each pause occurs
    is_chunk: bool  # one chunk of a micro-batch stands for the whole step


def _plan_run(config: Config, brief: bool, matmul_speed: float) -> _ShortRun:
    speed = EXPECTED_SHARE * matmul_speed * config.mesh.devices
    expected = config.tokens_per_step * flops_per_token(config.model) / speed
    is_chunk = expected > WHOLE_STEP_SECONDS
    if is_chunk:
        expected /= config.microbatch_chunks * config.grad_accum_steps
        config = dataclasses.replace(config, batch_size=config.chunk_size, grad_accum_steps=1, microbatch_chunks=1)
    cycles = 1 if brief else CHUNK_CYCLES if is_chunk else CYCLES
    # max_steps is compiled into the step: if it is large enough, use the run's own, so that a run finds it compiled
    max_steps = max(config.max_steps, CYCLES * (MIN_STEPS + 2) + 2)
    most = min(MAX_STEPS, (max_steps - 2) // CYCLES - 2)
    interval = 1 if brief else min(max(round(CYCLE_SECONDS / expected), MIN_STEPS), most)
    batches = CHUNK_BATCHES if is_chunk else max(math.ceil(config.data.eval_sequences / config.chunk_size), 2)
    config = dataclasses.replace(
        config,
        eval_interval=interval,  # the intervals differ: what one pause frees the next cannot always use
        generation_interval=interval + 1,
        save_interval=interval + 2,
        max_steps=max_steps,
        init_from="",
        max_checkpoints=1,
        keep_best=False,
        data=dataclasses.replace(config.data, eval_sequences=batches * config.chunk_size),
    )
    return _ShortRun(config, cycles, is_chunk)


def _measure(plan: _ShortRun, workdir: Path, call_time: float, show: Callable[[float], None]) -> dict[str, Any]:
    """Trains for some cycles of pauses in this process; returns the fields of a BenchmarkResult but for the matmul."""
    config, last = plan.config, plan.cycles * plan.config.save_interval + 1
    device = backend.start(config.platform, config.deterministic)
    before = time.monotonic()
    tokens = _random_tokens(config, workdir)
    call_time += time.monotonic() - before  # a run does not do this
    workdir.mkdir()
    stopwatch = _Stopwatch(last, show)
    mesh = make_mesh(config, device)
    run = trainer.Trainer(config, workdir, tokens, device, listeners=[stopwatch], mesh=mesh)
    start = time.monotonic() - call_time
    with contextlib.closing(run):
        run.run_steps(last)
    export_start = time.monotonic()
    card = model_card(workdir, config, run.step, {}, 0)
    folder = write_model(workdir / "final_model", config, run.state.params, tokens.tokenizer, card)
    end = time.monotonic() - export_start
    peak = peak_bytes(device)
    pauses = {kind: mean(seconds[1:] or seconds) for kind, seconds in stopwatch.pauses.items()}
    first = sum(stopwatch.pauses[kind][0] - pauses[kind] for kind in ("evaluation", "samples", "checkpoint"))
    steps, slowed_by_saves = _step_seconds(stopwatch, plan, last)
    return {
        "batch_size": config.batch_size,
        "grad_accum_steps": config.grad_accum_steps,
        "microbatch_chunks": config.microbatch_chunks,
        "start": start + pauses["compilation"] + max(stopwatch.steps[0][1] - median(steps), 0.0),
        "first": max(first, 0.0),
        "step": median(steps),
        "step_fast": steps[len(steps) // 4],
        "step_slow": steps[-1 - len(steps) // 4],
        "update": _update_seconds(config, run.state, mesh) if plan.is_chunk else 0.0,
        "evaluation": pauses["evaluation"] / (config.data.eval_sequences // config.chunk_size),
        "samples": pauses["samples"],
        "save": pauses["checkpoint"] + slowed_by_saves / max(plan.cycles - 1, 1),
        "saving": median(stopwatch.saves),
        "end": end,
        "peak_bytes": peak,
        "checkpoint_bytes": max(_size(path) for path in (workdir / "checkpoints").iterdir()),
        "model_bytes": _size(folder),
    }


def _random_tokens(config: Config, workdir: Path) -> TokenFiles:
    rng, vocab, context = np.random.default_rng(0), config.model.vocab_size, config.model.context
    train = rng.integers(vocab, size=max(TOKENS, 2 * context), dtype=np.uint16)
    val = rng.integers(vocab, size=config.data.eval_sequences * context + 1, dtype=np.uint16)
    return TokenFiles(workdir, _stand_in(vocab), train, val, np.ones(vocab, np.uint8), ("", ""), None)


def _stand_in(vocab_size: int) -> Tokenizer:
    """A tokenizer of this size: an own one is not learnt yet."""
    tokens = dict.fromkeys(load_tokenizer(min(vocab_size, GPT2_VOCAB_SIZE)).vocabulary[:-1])
    tokens |= dict.fromkeys(map(bytes, itertools.product(range(256), repeat=2)))
    return make_tokenizer(list(tokens)[: vocab_size - 1])


def _step_seconds(stopwatch: _Stopwatch, plan: _ShortRun, last: int) -> tuple[list[float], float]:
    """Sorted seconds of the steps beside no pause and no save, and the seconds by which saves slowed steps."""
    warm = stopwatch.steps[1:]
    c = plan.config
    every = (c.eval_interval, c.generation_interval, c.save_interval)
    beside_pauses = {step for n in every for due in range(n, last, n) for step in (due, due + 1)}
    quiet = [seconds for step, seconds, saving in warm if not saving and step not in beside_pauses] or [warm[-1][1]]
    busy = [seconds for step, seconds, saving in warm if saving and step < last]
    return sorted(quiet), max(sum(busy) - median(quiet) * len(busy), 0.0)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def matmul_speed(dtype: str, device: jax.Device) -> float:
    """Floating-point operations per second of a matmul of two square matrices."""
    size = {"cpu": 2048, "gpu": 8192}.get(device.platform, 4096)
    a = jax.device_put(np.random.default_rng(0).standard_normal((size, size), np.float32), device).astype(dtype)
    result_dtype = "float32" if device.platform == "cpu" else dtype  # the fast form on each
    matmul = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=result_dtype))
    return 2 * size**3 / _median_seconds(lambda: matmul(a, a))


def _update_seconds(config: Config, state: TrainState, mesh: Mesh | None) -> float:
    step = jax.jit(make_optimizer(config, mesh=mesh).step)
    return _median_seconds(lambda: step(state.params, state.opt_state, state.params, state.average))


def _median_seconds(compute: Callable[[], Any]) -> float:
    jax.block_until_ready(compute())
    timings = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(compute())
        timings.append(time.perf_counter() - start)
    return median(timings)


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[1])
