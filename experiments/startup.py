"""Measures the time from a start of the 60M preset to its first step, and from a checkpoint to the first token.

    python -m experiments.startup [--rounds 3] [--computed] [--platform auto]

Starts the training command on the corpus novels, each time in a new work directory: first with an empty compilation
cache, then with the cache that the first start filled. Prints the seconds from the start of the process to each stage:
the median of the rounds, with the least and the greatest in brackets. A process ends when it dispatches the first
micro-batch, or with `--computed` when the metrics of the first step arrive (minutes on two CPU cores). Then it measures
`python -m jaxlm.sample --tokens 1` in the same way, on a checkpoint of that size.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.cleanup import temporary_folder
from experiments.rounds import median_and_range

CONFIG = ("--config", "configs/m2_60m.py", "--config.data.corpus=novels")
SMALL = (
    "batch_size=1",
    "microbatch_chunks=1",
    "grad_accum_steps=1",
    "max_steps=1",
    "optimizer.warmup_steps=0",
    "sample.texts=1",
)


class ReportingStep:
    """A training step that reports when it is compiled and called; else it is the step."""

    def __init__(self, step: Any, report: Callable[[str], None]):
        self.step, self.report, self.calls = step, report, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        self.report(f"micro-batch {self.calls} dispatched")  # before the call, which on a CPU computes
        return self.step(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def lower(self, *arguments: Any) -> "ReportingStep":
        return ReportingStep(self.step.lower(*arguments), self.report)

    def compile(self) -> "ReportingStep":
        compiled = ReportingStep(self.step.compile(), self.report)
        self.report("step compiled")
        return compiled


def child(began: float, last: str, argv: list[str]) -> None:
    """Runs the training command up to the stage `last`; prints the seconds from `began` to each stage on stderr."""

    def report(stage: str) -> None:
        print(json.dumps([stage, time.monotonic() - began]), file=sys.stderr, flush=True)
        if stage == last:
            os._exit(0)

    def reporting(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            result = function(*arguments, **settings)
            report(stage)
            return result

        return wrapped

    import jaxlm.main
    import jaxlm.run.trainer

    report("imported")
    make_train_step = jaxlm.run.trainer.make_train_step
    jaxlm.main.open_data = reporting(jaxlm.main.open_data, "data opened")
    jaxlm.run.trainer.restore_or_init = reporting(jaxlm.run.trainer.restore_or_init, "parameters initialized")
    jaxlm.run.trainer.make_train_step = lambda *a: ReportingStep(make_train_step(*a), report)
    jaxlm.run.trainer.Trainer._report_step = reporting(jaxlm.run.trainer.Trainer._report_step, "first step computed")
    jaxlm.main.main(argv)


def run(arguments: list[str], cache: Path) -> str:
    """Runs Python with this compilation cache; returns its stderr."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    process = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{arguments} failed:\n{process.stderr}")
    return process.stderr


def start(workdir: Path, cache: Path, last: str, platform: str) -> dict[str, float]:
    """Seconds to each stage of the training command."""
    flags = ["--child", str(time.monotonic()), last, *CONFIG, f"--config.platform={platform}"]
    lines = run(["-m", "experiments.startup", *flags, "--workdir", str(workdir)], cache).splitlines()
    return dict(json.loads(line) for line in lines if line.startswith("["))


def sample(workdir: Path, cache: Path, platform: str) -> dict[str, float]:
    """Seconds from the start to the end of a command that samples one token."""
    began = time.monotonic()
    flags = ["--workdir", str(workdir), "--prompt", "Once upon a time", "--tokens", "1", "--platform", platform]
    run(["-m", "jaxlm.sample", *flags], cache)
    return {"first token": time.monotonic() - began}


def table(title: str, rounds: list[tuple[dict[str, float], dict[str, float]]]) -> None:
    print(f"\n| {title} | first start | second start |\n|---|---|---|")
    for stage in rounds[0][0]:
        print(f"| {stage} | {' | '.join(median_and_range([pair[i][stage] for pair in rounds]) for i in (0, 1))} |")


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Starts all commands, and prints the two tables."""
    last = "first step computed" if args.computed else "micro-batch 1 dispatched"
    small = [f"--config.{setting}" for setting in SMALL]
    # prepares the data and leaves a checkpoint
    run(["-m", "jaxlm.main", *CONFIG, "--workdir", str(folder / "small"), *small], folder / "cache")

    caches = [folder / f"cache-{i}" for i in range(args.rounds)]
    starts = [
        tuple(start(folder / f"run-{i}-{j}", cache, last, args.platform) for j in (0, 1))
        for i, cache in enumerate(caches)
    ]
    caches = [folder / f"sample-cache-{i}" for i in range(args.rounds)]
    samples = [tuple(sample(folder / "small", cache, args.platform) for _ in (0, 1)) for cache in caches]

    import jax  # only now: the device is free for what is timed

    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {os.cpu_count()} cores; seconds")
    table("python -m jaxlm.main --config configs/m2_60m.py", starts)
    table("python -m jaxlm.sample --tokens 1", samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--computed", action="store_true")
    parser.add_argument("--platform", default="auto")
    args = parser.parse_args()
    with temporary_folder("startup") as folder:
        compare(folder, args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
