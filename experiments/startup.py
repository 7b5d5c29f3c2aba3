"""How long the 60M preset takes to its first step, and a checkpoint of it to its first token:

    python -m experiments.startup [--rounds 3] [--computed] [--platform auto]

Starts the training command on the corpus novels, in a new work directory each time: with an empty compilation cache,
and again with what that start left in it. Prints the seconds from the start of the process to each stage, the median
of the rounds. A process ends when the first micro-batch is handed to the device; with `--computed` when the report of
the step has come (minutes, on two CPU cores). Then `python -m jaxlm.sample --tokens 1` from its start to its end,
likewise, with a checkpoint of that size.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

CONFIG = ("--config", "configs/m2_60m.py", "--config.data.corpus=novels")
SMALL = (
    "batch_size=1",
    "microbatch_chunks=1",
    "grad_accum_steps=1",
    "max_steps=1",
    "optimizer.warmup_steps=0",
    "sample.texts=1",
)


class Step:
    """A training step that says when it is compiled and called."""

    def __init__(self, step: Any, say: Callable[[str], None]):
        self.step, self.say, self.calls = step, say, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        self.say(f"micro-batch {self.calls} handed over")  # on a CPU the call computes it
        return self.step(*arguments)

    def lower(self, *arguments: Any) -> "Step":
        return Step(self.step.lower(*arguments), self.say)

    def compile(self) -> "Step":
        compiled = Step(self.step.compile(), self.say)
        self.say("step compiled")
        return compiled


def child(began: float, last: str, argv: list[str]) -> None:
    """The training command up to the stage `last`, and on stderr the seconds from `began` to each stage."""

    def say(stage: str) -> None:
        print(json.dumps([stage, time.monotonic() - began]), file=sys.stderr, flush=True)
        if stage == last:
            os._exit(0)

    def saying(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            result = function(*arguments, **settings)
            say(stage)
            return result

        return wrapped

    import jaxlm.main
    import jaxlm.run.trainer

    say("imported")
    make_train_step = jaxlm.run.trainer.make_train_step
    jaxlm.main.open_data = saying(jaxlm.main.open_data, "data opened")
    jaxlm.run.trainer.restore_or_init = saying(jaxlm.run.trainer.restore_or_init, "parameters drawn")
    jaxlm.run.trainer.make_train_step = lambda config: Step(make_train_step(config), say)
    jaxlm.run.trainer.Trainer._report_step = saying(jaxlm.run.trainer.Trainer._report_step, "first step computed")
    jaxlm.main.main(argv)


def run(arguments: list[str], cache: Path) -> str:
    """Runs Python with this compilation cache; gives what it wrote on stderr."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments} failed:\n{done.stderr}")
    return done.stderr


def start(workdir: Path, cache: Path, last: str, platform: str) -> dict[str, float]:
    """Seconds to each stage of the training command."""
    words = ["--child", str(time.monotonic()), last, *CONFIG, f"--config.platform={platform}"]
    lines = run(["-m", "experiments.startup", *words, "--workdir", str(workdir)], cache).splitlines()
    return dict(json.loads(line) for line in lines if line.startswith("["))


def sample(workdir: Path, cache: Path, platform: str) -> dict[str, float]:
    """Seconds to the end of a command that writes one token."""
    began = time.monotonic()
    words = ["--workdir", str(workdir), "--prompt", "Once upon a time", "--tokens", "1", "--platform", platform]
    run(["-m", "jaxlm.sample", *words], cache)
    return {"first token": time.monotonic() - began}


def table(title: str, rounds: list[tuple[dict[str, float], dict[str, float]]]) -> None:
    print(f"\n| {title} | first start | second start |\n|---|---|---|")
    for stage in rounds[0][0]:
        print(f"| {stage} | " + " | ".join(f"{median(pair[i][stage] for pair in rounds):.2f}" for i in (0, 1)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--computed", action="store_true")
    parser.add_argument("--platform", default="auto")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="startup-"))
    last = "first step computed" if args.computed else "micro-batch 1 handed over"
    small = [f"--config.{setting}" for setting in SMALL]
    run(["-m", "jaxlm.main", *CONFIG, "--workdir", str(place / "small"), *small], place / "cache")  # prepares the text

    import jax

    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {os.cpu_count()} cores; seconds")
    caches = [place / f"cache-{i}" for i in range(args.rounds)]
    starts = [
        tuple(start(place / f"run-{i}-{j}", cache, last, args.platform) for j in (0, 1))
        for i, cache in enumerate(caches)
    ]
    table("python -m jaxlm.main --config configs/m2_60m.py", starts)
    samples = [tuple(sample(place / "small", cache, args.platform) for _ in (0, 1)) for cache in caches]
    table("python -m jaxlm.sample --tokens 1", samples)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
