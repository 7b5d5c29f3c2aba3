"""Compares the plan of a run of 200 steps with that run:

    python -m experiments.plan_truth [--platform auto] [--tokens DIR] [--repeat N]

The run evaluates five times, samples four times, saves five times and deletes two checkpoints. On an NVIDIA GPU it is
the 60M preset, elsewhere the quickstart, whose 200 steps take a minute on two CPU cores. The plan and the run start as
processes, one after the other, with empty caches. The tokens are random, unless `--tokens` names a directory with
train.bin and val.bin.

Memory is the peak resident set size, on an NVIDIA GPU the allocator's peak. Time is from the start of the process to
its end. Disk is the size of all files in the work directory. `--repeat` repeats the comparison.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cleanup import temporary_folder
from jaxlm.cli import read_config

STEPS = 200
INTERVALS = {"eval_interval": 40, "generation_interval": 50, "save_interval": 40, "max_checkpoints": 3}
BOUNDS = {"peak memory": 0.10, "time": 0.10, "disk": 0.02}
TRAIN_TOKENS, VAL_TOKENS = 2_000_000, 200_000


def child(argv: list[str]) -> None:
    """Runs the training command and prints its end and its peak memory as the last line."""
    import jax

    from jaxlm.main import main

    main(argv)
    end = time.monotonic()
    from jaxlm.run.memory import peak_bytes

    peak = peak_bytes(jax.devices()[0])
    print(json.dumps({"end": end, "peak": peak}), flush=True)
    os._exit(0)


def run(words: list[str], cache: Path) -> str:
    """Runs Python with this cache; returns its output."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    process = subprocess.run([sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"{words[:2]} failed:\n{process.stdout}")
    return process.stdout


def random_tokens(directory: Path, vocab_size: int) -> Path:
    """Writes token files of uniformly random ids."""
    directory.mkdir()
    draw = np.random.default_rng(0)
    for name, count in (("train.bin", TRAIN_TOKENS), ("val.bin", VAL_TOKENS)):
        draw.integers(vocab_size - 1, size=count, dtype=np.uint16).tofile(directory / name)
    return directory


def compare(words: list[str], workdir: Path, cache: Path) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    """Plans and runs. Returns (predicted, real) for memory in MB, time in s and disk in MB; and the plan."""
    words = [*words, "--workdir", str(workdir)]
    plan = json.loads(run(["-m", "jaxlm.plan", "--json", *words], cache))
    if plan["not_measured_because"]:
        sys.exit(f"the plan measured nothing: {plan['not_measured_because']}")
    start = time.monotonic()
    real = json.loads(run(["-m", "experiments.plan_truth", "--child", *words], cache).splitlines()[-1])
    disk = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())
    return {
        "peak memory": (plan["memory"]["total_bytes"] / 1e6, real["peak"] / 1e6),
        "time": (plan["schedule"]["total_seconds"], real["end"] - start),
        "disk": (plan["disk"]["left_bytes"] / 1e6, disk / 1e6),
    }, plan


def has_nvidia(platform: str) -> bool:
    """Whether the run uses an NVIDIA GPU. Another process asks jax, because the device must stay free."""
    if platform != "auto":
        return platform == "cuda"
    answer = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices()[0].platform)"], stdout=subprocess.PIPE, text=True
    )
    return answer.stdout.split()[-1:] == ["gpu"]


def compare_all(place: Path, args: argparse.Namespace) -> None:
    """Makes each comparison, and prints its table."""
    name = "m2_60m" if has_nvidia(args.platform) else "quickstart"
    vocab_size = read_config([f"--config={name}"])[0].model.vocab_size
    tokens = args.tokens or random_tokens(place / "tokens", vocab_size)
    settings = INTERVALS | {"max_steps": STEPS, "platform": args.platform, "data.dir": tokens, "data.corpus": ""}
    if not args.tokens:
        settings |= {"data.tokenizer": "gpt2"}  # no own vocabulary made them
    words = ["--config", name, *(f"--config.{key}={value}" for key, value in settings.items())]
    for repetition in range(args.repeat):
        results, plan = compare(words, place / f"run-{repetition}", place / f"cache-{repetition}")
        machine = plan["machine"]
        print(f"{name}, {STEPS} steps, {machine['precision']} on {machine['device']}, jax {machine['jax']}")
        print("| | predicted | real | error of the prediction | bound |\n|---|---|---|---|---|")
        for what, (predicted, real) in results.items():
            unit = "s" if what == "time" else "MB"
            error = f"{predicted / real - 1:+.1%}"
            print(
                f"| {what} | {predicted:,.1f} {unit} | {real:,.1f} {unit} | {error} | {BOUNDS[what]:.0%} |", flush=True
            )
        print(json.dumps(plan["speed"] | plan["memory"]), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platform", default="auto")
    parser.add_argument("--tokens", type=Path, help="directory of train.bin and val.bin")
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    with temporary_folder("plan-truth") as place:
        compare_all(place, args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
