"""The study of learning: runs a table of `tables.py`, trial by trial.

    python -m experiments.learning.study TABLE --texts NOVELS.txt.xz MORE.txt.xz --out results.jsonl

Each finished trial is a line of the results, and a trial that has one is not run again: the same command continues an
interrupted table. Several processes, each with a GPU of its own, may share one: each locks a file of the trial beside
the tokens. Without `--texts` the trials train on the corpus of their config. Trials with another loss run only in a
process with this `--loss`. With `--seconds`, none begins a trial that would end later than so many seconds from the
start.
"""

import argparse
import fcntl
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

from experiments.learning import losses
from experiments.learning.data import prepare_tokens
from experiments.learning.tables import TABLES, flops
from experiments.learning.trial import Prepared, Trial, prepare, run
from jaxlm.data.token_files import TokenFiles
from jaxlm.device import backend

PREPARED = 2  # trials that are compiled ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--texts", type=Path, nargs="+", help="the files of novels")
    parser.add_argument("--data", type=Path, default=Path("data/study"), help="directory of the tokens")
    parser.add_argument("--out", type=Path, required=True, help="file of the results")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to end, counted from the start")
    parser.add_argument("--loss", default="", help="run the trials with this loss, such as 'soft-cap 15'")
    parser.add_argument("--prepare-only", action="store_true", help="prepare the tokens, train nothing")
    args = parser.parse_args()
    ends = time.monotonic() + args.seconds
    device = backend.start("auto")
    if args.loss:
        losses.install(args.loss)
    done = finished(args.out)
    trials = [trial for trial in TABLES[args.table] if trial.loss == args.loss and trial.key not in done]

    def tokens_of(trial: Trial) -> TokenFiles:
        return prepare_tokens(trial.config(device), args.texts, args.data)

    if args.prepare_only:
        for trial in trials:
            tokens_of(trial)
        return
    rates: list[float] = []  # FLOP/s of the trials so far
    locks: list[TextIO] = []  # of its trials; the end of this process unlocks them

    def claim() -> Prepared | None:
        for trial in trials:
            late = rates and time.monotonic() + 1.3 * flops(trial) / min(rates) > ends
            lock = None if late else _lock(args.data / "locks" / trial.key.replace("/", ":"))
            if lock and trial.key not in finished(args.out):  # another process may have finished it since
                locks.append(lock)
                return prepare(trial, device)
        return None

    with ThreadPoolExecutor(PREPARED) as pool:  # compiles the next trials while one trains
        pending = [pool.submit(claim) for _ in range(PREPARED)]
        while prepared := pending.pop(0).result():
            pending.append(pool.submit(claim))
            started = time.monotonic()
            row = run(prepared, tokens_of(prepared.trial), device)
            rates.append(flops(prepared.trial) / (time.monotonic() - started))
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{row['trial']:56} {row['val_loss']:.4f} {row['val_bits_per_byte']:.4f} {row['step_ms']:7.2f}",
                flush=True,
            )


def finished(results: Path) -> set[str]:
    """The keys of the trials that the file of results has."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {json.loads(line)["trial"] for line in lines}


def _lock(path: Path) -> TextIO | None:
    """The file, locked until it is closed; None if it is locked already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


if __name__ == "__main__":
    main()
