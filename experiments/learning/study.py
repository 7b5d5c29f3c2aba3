"""The study of learning: runs a table of `tables.py`, trial by trial.

    python -m experiments.learning.study TABLE --texts NOVELS.txt.xz MORE.txt.xz --out results.jsonl

Each finished trial is a line of the results, and a trial that has one is not run again: the same command continues an
interrupted table. Several processes, each with a GPU of its own, may share one: each locks a folder of the trial beside
the tokens. Without `--texts` the trials train on the corpus of their config. Trials with another loss run only in a
process with this `--loss`. With `--seconds`, none begins a trial that would end later than so many seconds from the
start.
"""

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path

from experiments.learning import losses
from experiments.learning.data import prepare_tokens
from experiments.learning.tables import TABLES, flops
from experiments.learning.trial import Trial, run
from jaxlm.data.token_files import TokenFiles
from jaxlm.device import backend
from jaxlm.errors import UsageError
from jaxlm.storage.lock import only_writer


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
    for trial in trials:
        if rates and time.monotonic() + 1.3 * flops(trial) / min(rates) > ends:
            continue
        with ExitStack() as lock:
            locked = _lock(lock, args.data / "locks" / trial.key.replace("/", ":"))
            if not locked or trial.key in finished(args.out):  # by another process since
                continue
            started = time.monotonic()
            row = run(trial, tokens_of(trial), device)
            rates.append(flops(trial) / (time.monotonic() - started))
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(
            f"{row['trial']:56} {row['val_loss']:.4f} {row['val_bits_per_byte']:.4f} {row['step_ms']:7.2f}", flush=True
        )


def finished(results: Path) -> set[str]:
    """The keys of the trials that the file of results has."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {json.loads(line)["trial"] for line in lines}


def _lock(lock: ExitStack, directory: Path) -> bool:
    """Locks a directory until `lock` is closed; False if it is locked already."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        lock.enter_context(only_writer(directory))
    except UsageError:
        return False
    return True


if __name__ == "__main__":
    main()
