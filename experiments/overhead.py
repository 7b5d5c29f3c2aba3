"""Measures how much of the 60M preset's time is not spent in training steps.

    python -m experiments.overhead [--rounds 2] [--platform auto]

Runs the trainer for three periods of 300 steps. In each, the preset samples 6 times, evaluates 3 times and saves once.
The third period is measured, because it compiles nothing. Then the jitted step alone runs as often from the same
weights, on batches that are already on the device. (A GPU at its power limit slows down as it warms up, and its speed
depends on the numbers.) The difference is the time of the pauses, by kind, and the time between steps.

On a CPU 300 steps would take a day. There each interval is a fiftieth of the preset's, a step reads one sequence and
an evaluation four sequences. The time of a step is then multiplied by 64 and that of an evaluation by 16. Samples and
checkpoints are as large as the preset's.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import os
import time
from pathlib import Path
from statistics import median

import jax

from experiments.cleanup import temporary_folder
from jaxlm.cli import read_config
from jaxlm.config import Config
from jaxlm.core.train_step import TrainState, make_train_step
from jaxlm.data.token_files import TokenFiles, train_batch_stream
from jaxlm.device import backend
from jaxlm.main import open_data
from jaxlm.prepare import prepare
from jaxlm.run import trainer
from jaxlm.run.events import Event, PauseEvent, StepEvent

PERIOD = 300  # optimizer steps
PAUSES = {"samples": 6, "evaluation": 3, "checkpoint": 1}  # number in a period
CPU_PERIOD, CPU_EVAL_SEQUENCES = 6, 4
BATCHES = 32  # the bare step cycles through them


class Stopwatch:
    """The listener that keeps when each pause ended, its kind and its seconds, and when each period ended."""

    def __init__(self, period: int):
        self.period = period
        self.ends: list[float] = []
        self.pauses: list[tuple[float, str, float]] = []
        self.start = time.monotonic()

    def __call__(self, event: Event) -> None:
        if isinstance(event, PauseEvent):
            self.pauses.append((time.monotonic() - self.start, event.kind, event.seconds))
        elif isinstance(event, StepEvent) and event.step % self.period == 0:
            self.ends.append(time.monotonic() - self.start)


def preset(platform: str) -> tuple[Config, TokenFiles, jax.Device]:
    """The preset, smaller on a CPU as described above, with enough validation text for its evaluation."""
    flags = ["--config", "configs/m2_60m.py", "--config.data.corpus=novels", "--config.data.val_fraction=0.1"]
    config, _ = read_config([*flags, "--config.data.dir=data/overhead", f"--config.platform={platform}"])
    prepare("novels", Path(config.data.dir), config.model.vocab_size, config.data.val_fraction)
    tokens = open_data(config)
    device = backend.start(platform)
    config = backend.resolve_run(config, device)
    if device.platform == "cpu":
        divisor = PERIOD // CPU_PERIOD
        names = ("eval_interval", "save_interval", "generation_interval")
        config = dataclasses.replace(
            config,
            **dict.fromkeys(("batch_size", "grad_accum_steps", "microbatch_chunks"), 1),
            **{name: getattr(config, name) // divisor for name in names},
            data=dataclasses.replace(config.data, eval_sequences=CPU_EVAL_SEQUENCES),
        )
    return config, tokens, device


def bare_step(config: Config, state: TrainState, tokens: TokenFiles, device: jax.Device, steps: int) -> float:
    """Seconds of an optimizer step alone."""
    stream = train_batch_stream(tokens.train, config.model.context, config.batch_size, config.seed)
    batches = [jax.device_put(ids, device) for ids in itertools.islice(stream, BATCHES)]
    step = make_train_step(config).lower(state, batches[0]).compile()
    for count in (1, steps):
        jax.block_until_ready(state)
        start = time.perf_counter()
        for index in range(count * config.grad_accum_steps):
            state, _ = step(state, batches[index % BATCHES])
        jax.block_until_ready(state)
    return (time.perf_counter() - start) / steps


def looped_step(config: Config, tokens: TokenFiles, device: jax.Device) -> tuple[float, dict[str, float], TrainState]:
    """Seconds of a step in the third period, without pauses; the median pause of each kind; the final state."""
    with temporary_folder("overhead") as workdir, contextlib.redirect_stdout(io.StringIO()):
        stopwatch = Stopwatch(config.save_interval)
        run = trainer.Trainer(config, workdir, tokens, device, listeners=[stopwatch])
        with contextlib.closing(run):
            run.run_steps(3 * config.save_interval)
    _, start, end = stopwatch.ends
    pauses = [(kind, seconds) for ended, kind, seconds in stopwatch.pauses if start <= ended - seconds < end]
    by_kind = {name: [seconds for kind, seconds in pauses if kind == name] for name in PAUSES}
    assert {name: len(seconds) for name, seconds in by_kind.items()} == PAUSES
    step = (end - start - sum(seconds for _, seconds in pauses)) / config.save_interval
    return step, {name: median(seconds) for name, seconds in by_kind.items()}, run.state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--platform", default="auto")
    args = parser.parse_args()
    config, tokens, device = preset(args.platform)
    steps, full = config.save_interval, Config()
    bare, looped, pauses = [], [], []
    for _ in range(args.rounds):
        step, by_kind, state = looped_step(config, tokens, device)
        looped.append(step)
        pauses.append(by_kind)
        bare.append(bare_step(config, state, tokens, device, steps))

    scale = full.tokens_per_step / config.tokens_per_step
    step, between = scale * median(bare), median(a - b for a, b in zip(looped, bare, strict=True))
    seconds = {name: median(by_kind[name] for by_kind in pauses) for name in PAUSES}
    seconds["evaluation"] *= full.data.eval_sequences / config.data.eval_sequences
    counts = PAUSES | {"between steps": PERIOD}
    seconds["between steps"] = between
    total = PERIOD * step + sum(counts[name] * seconds[name] for name in counts)
    print(f"jax {jax.__version__} on {backend.describe(device)}, {os.cpu_count()} cores, {config.model.precision}")
    print(
        f"bare step {median(bare):.4f} s of {config.tokens_per_step} tokens, in the loop {median(looped):.4f} s;",
        end="",
    )
    print(f" the preset's step {step:.4f} s")
    print(f"| | seconds | number in {PERIOD} steps | share |\n|---|---|---|---|")
    for name, count in counts.items():
        print(f"| {name} | {seconds[name]:.4f} | {count} | {100 * count * seconds[name] / total:.3f}% |")
    print(f"| all | | | {100 * (1 - PERIOD * step / total):.3f}% |")


if __name__ == "__main__":
    main()
