"""Measures what the setting `deterministic` costs on an NVIDIA GPU.

    python -m experiments.deterministic [--kills 6]

Trains a few steps of the 60M preset, with evaluations and samples: twice with the defaults, twice with
`deterministic`, and once more with `deterministic` and SIGKILL at random times. Prints tokens/s of the median step and
what differs within each pair of runs.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from experiments.cleanup import temporary_folder

STEPS, TIME_LIMIT = 24, 300  # seconds
SETTINGS = (
    *(
        "data.corpus=novels",
        f"max_steps={STEPS}",
        "optimizer.warmup_steps=5",
        "microbatch_chunks=1",
        "sample.tokens=20",
    ),
    *("eval_interval=10", "generation_interval=10", "save_interval=5", "platform=cuda"),
)


def start(workdir: Path, deterministic: bool) -> subprocess.Popen:
    """Starts a session."""
    flags = [f"--config.{setting}" for setting in (*SETTINGS, f"deterministic={deterministic}")]
    command = [sys.executable, "-m", "jaxlm.main", "--config", "configs/m2_60m.py", "--workdir", str(workdir), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def train(workdir: Path, deterministic: bool) -> None:
    """Trains to the end."""
    if start(workdir, deterministic).wait(TIME_LIMIT):
        sys.exit("the run failed")


def kill(workdir: Path, after_step: int, seconds: float) -> None:
    """Starts a session and kills it `seconds` after it records step `after_step`."""
    session, metrics, began = start(workdir, True), workdir / "metrics.jsonl", time.monotonic()
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < after_step:
        if session.poll() is not None or time.monotonic() - began > TIME_LIMIT:
            sys.exit(f"the session did not reach step {after_step}")
        time.sleep(0.002)
    time.sleep(seconds)
    session.kill()
    session.wait()


def compare(label: str, workdir: Path, other: Path) -> str:
    """One row of the table: two runs compared."""
    runs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (workdir, other)
    ]
    rates = [median(row["tokens_per_second"] for row in rows[3:]) for rows in runs]
    times = {"seconds", "tokens_per_second"}
    values = [[{key: row[key] for key in row.keys() - times} for row in rows] for rows in runs]
    assert len(values[0]) == len(values[1]) == STEPS
    first = next((a["step"] for a, b in zip(*values, strict=True) if a != b), "none")
    names = ("final_model/model.safetensors", "samples.jsonl")
    same = ["same" if (workdir / name).read_bytes() == (other / name).read_bytes() else "differ" for name in names]
    return f"| {label} | {rates[0]:,.0f}, {rates[1]:,.0f} | {first} | {same[0]} | {same[1]} |"


def measure(folder: Path, kills: int, rng: random.Random) -> None:
    """Trains all runs, and prints the table."""
    for name in ("default", "default again", "deterministic", "deterministic again"):
        train(folder / name, name.startswith("deterministic"))
    for after_step in sorted(rng.randint(0, STEPS - 2) for _ in range(kills)):
        kill(folder / "killed", after_step, rng.uniform(0, 0.15))
    train(folder / "killed", True)
    print("| two runs | tokens/s | first step that differs | weights | samples |\n|---|---|---|---|---|")
    print(compare("default", folder / "default", folder / "default again"))
    print(compare("deterministic", folder / "deterministic", folder / "deterministic again"))
    print(compare(f"deterministic, the second killed {kills} times", folder / "deterministic", folder / "killed"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with temporary_folder("deterministic") as folder:
        measure(folder, args.kills, random.Random(args.seed))


if __name__ == "__main__":
    main()
