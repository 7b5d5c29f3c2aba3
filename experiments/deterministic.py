"""What the same bits in every session cost on an NVIDIA GPU: python -m experiments.deterministic [--kills 6]

Trains a few steps of the 60M preset, with evaluations and texts, twice as it comes and twice with `deterministic`,
and once more with SIGKILL at random moments; prints tokens/s (the median step's) and what differs within each pair.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

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
    """Starts a session and kills it so many seconds after a step was recorded."""
    session, metrics, began = start(workdir, True), workdir / "metrics.jsonl", time.monotonic()
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < after_step:
        if session.poll() is not None or time.monotonic() - began > TIME_LIMIT:
            sys.exit(f"the session did not reach step {after_step}")
        time.sleep(0.002)
    time.sleep(seconds)
    session.kill()
    session.wait()


def compare(label: str, workdir: Path, other: Path) -> str:
    """A row of the table."""
    runs = [
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()] for place in (workdir, other)
    ]
    rates = [median(row["tokens_per_second"] for row in rows[3:]) for rows in runs]
    times = {"seconds", "tokens_per_second"}
    kept = [[{key: row[key] for key in row.keys() - times} for row in rows] for rows in runs]
    assert len(kept[0]) == len(kept[1]) == STEPS
    first = next((a["step"] for a, b in zip(*kept, strict=True) if a != b), "none")
    names = ("final_model/model.safetensors", "samples.jsonl")
    same = ["same" if (workdir / name).read_bytes() == (other / name).read_bytes() else "differ" for name in names]
    return f"| {label} | {rates[0]:,.0f}, {rates[1]:,.0f} | {first} | {same[0]} | {same[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    place, chance = Path(tempfile.mkdtemp(prefix="deterministic-")), random.Random(args.seed)
    for name, deterministic in (("plain", False), ("plain again", False), ("fixed", True), ("fixed again", True)):
        train(place / name, deterministic)
    for after_step in sorted(chance.randint(0, STEPS - 2) for _ in range(args.kills)):
        kill(place / "killed", after_step, chance.uniform(0, 0.15))
    train(place / "killed", True)
    print("| two runs | tokens/s | first step that differs | weights | texts |\n|---|---|---|---|---|")
    print(compare("as it comes", place / "plain", place / "plain again"))
    print(compare("deterministic", place / "fixed", place / "fixed again"))
    print(compare(f"deterministic, the other killed {args.kills} times", place / "fixed", place / "killed"))


if __name__ == "__main__":
    main()
