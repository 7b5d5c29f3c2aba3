"""The proof that nothing is lost: python -m experiments.faults [--short] [--kills 200] [--damage 10] [--seed 0]

A small run is trained without faults, then repeatedly under faults at points drawn from the seed, and resumed each time
until it is done. The result must equal that of the undisturbed run bit for bit: parameters and optimizer, every row of
metrics.jsonl except its times, samples.jsonl, the tokens and the exported model. Each trial prints a line on stderr;
the table goes to stdout. The exit status is 0 if the run survived every fault, else 1; failed runs are left in place.

`steps repeated` were recorded before a fault and trained again after it. `bytes lost` differ from the undisturbed run.
A row fails also if its own promise is broken, such as that a person's files stay; the function of the row says which.
Lost power truncates every file that Python wrote to its last synced size; tensorstore, which writes the arrays, syncs
its files itself.
"""

import argparse
import dataclasses
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from experiments import fault_damage
from experiments import fault_surroundings as surroundings
from experiments import fault_trials as trials
from experiments.cleanup import kill_children, no_child_left
from experiments.fault_child import CHANGE, Failed
from experiments.fault_place import Place, contents, lost
from experiments.fault_trials import killed, stopped

HEADER = "| fault | trials | survived | steps repeated: mean, largest | bytes lost |\n|---|---|---|---|---|"
KILLS = {
    "SIGKILL at any moment": partial(killed, "start", longest=math.inf),
    "SIGKILL in a step": partial(killed, "micro-step ", longest=0.006),
    "SIGKILL between two micro-batches": partial(killed, r"micro-step \d*[02468]$"),
    "SIGKILL while saving": partial(killed, r"mkdir run/checkpoints/\d+\.[^/]+$", longest=0.1),
    "SIGKILL while an old checkpoint is deleted": partial(
        killed, r"rename run/checkpoints/\d+ |(mkdir|remove|rmdir) run/checkpoints/old\."
    ),
    "SIGKILL with saves by time": surroundings.killed_with_saves_by_time,
    "SIGKILL while the final model is written": partial(killed, r"\w+ run/\.?final_model"),
    "SIGKILL in the middle of a line": partial(killed, r"write run/\w+\.jsonl$", act="tear"),
    "SIGKILL in the first compilation": partial(killed, "compile", longest=1, cache=False),
    "SIGKILL while preparing the data": partial(killed, r"\w+ data\b"),
    "SIGKILL before any disk change": partial(killed, CHANGE),
    "SIGKILL with a person's files in our folders": surroundings.foreign_files,
    "SIGKILL in a folder with an odd name": surroundings.odd_names,
    "SIGKILL with the final model on another disk": surroundings.linked_model,
    "SIGKILL while an export is replaced": surroundings.export_killed,
    "SIGKILL on a slow disk": surroundings.killed_on_a_slow_disk,
    "power lost before any disk change": trials.power_lost,
}
OTHERS = {
    "SIGTERM": partial(stopped, "terminate", 128 + signal.SIGTERM),
    "SIGTERM within an optimizer step": trials.stopped_within_a_step,
    "SIGTERM at any moment": trials.stopped_anywhere,
    "SIGTERM, then SIGINT": trials.stopped_and_interrupted,
    "SIGINT": partial(stopped, "interrupt", 128 + signal.SIGINT),
    "SIGINT twice": partial(trials.left, "interrupt twice", 128 + signal.SIGINT),
    "an exception in a step": partial(trials.left, "fail", 1),
    "SIGSTOP, SIGCONT": trials.put_to_sleep,
    "a second run in the same work directory": trials.second_run,
    "the work directory renamed": surroundings.workdir_renamed,
    "the checkpoints moved away": surroundings.checkpoints_moved,
    "the text changed or gone": surroundings.corpus_changed,
    "disk full": trials.disk_full,
    "a slow disk": surroundings.slow_disk,
    "a disk without sync of directories": surroundings.no_directory_sync,
    "a disk without locks": surroundings.no_locks,
    "a small container": surroundings.small_container,
    **{f"newest checkpoint: {name}": partial(trials.damaged, damage) for name, damage in fault_damage.DAMAGES.items()},
    "all checkpoints damaged": trials.all_damaged,
}
SHORT = (  # those for which .ci/run has the time
    "SIGKILL in a step",
    "SIGKILL while saving",
    "SIGKILL while an old checkpoint is deleted",
    "SIGKILL while the final model is written",
    "SIGKILL in the middle of a line",
    "SIGKILL in the first compilation",
    "SIGKILL while preparing the data",
    "SIGKILL with a person's files in our folders",
    "SIGKILL while an export is replaced",
    "power lost before any disk change",
    "SIGTERM within an optimizer step",
    "SIGINT twice",
    "a second run in the same work directory",
    "the work directory renamed",
    "disk full",
    "a small container",
    "newest checkpoint: a bit flipped in an array",
    "newest checkpoint: its save unfinished",
    "all checkpoints damaged",
)


def try_fault(place: Place, name: str, trial: Callable[[Place, Path], list[int]], wanted: int) -> tuple[str, bool]:
    """Tries a fault until it has struck `wanted` times; returns the row of the table, and whether all passed."""
    tried, repeated, bytes_lost = 0, [], 0
    for attempt in range(2 * wanted + 3):
        home = place.root / f"{re.sub('[^a-z]+', '-', name.lower())}-{attempt}"
        began, struck, verdict = time.monotonic(), [0], "equal"
        try:
            struck = trial(place, home)
            if differing := lost(place.reference, contents(next(home.rglob("tiny.py")).parent)):
                bytes_lost += sum(differing.values())
                raise Failed(f"these differ, by so many bytes: {differing}")
            repeated += struck
        except Exception as error:
            verdict = f"FAILED ({home}): {error}"
        tried += len(struck)
        print(f"{name}, {tried} of {wanted}, {time.monotonic() - began:.1f} s: {verdict}", file=sys.stderr)
        for folder in filter(os.path.ismount, home.glob("*")):
            subprocess.run(["umount", folder], check=True)
        if verdict == "equal":
            shutil.rmtree(home)
        if tried >= wanted:
            break
    else:
        print(f"{name}: FAILED, it struck {tried} times only", file=sys.stderr)
    steps = f"{np.mean(repeated):.1f}, {max(repeated)}" if repeated else "-"
    return f"| {name} | {tried} | {len(repeated)} | {steps} | {bytes_lost} |", len(repeated) == tried >= wanted


def become_root() -> None:
    """Restarts this program in its own namespace, where it may mount file systems, if the system allows that."""
    words = ["unshare", "--map-root-user", "--mount"]
    allowed = shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    if os.geteuid() and allowed:
        os.execvp("unshare", [*words, sys.executable, "-m", "experiments.faults", *sys.argv[1:]])


def try_all(place: Place, args: argparse.Namespace) -> bool:
    """Tries the chosen faults and prints the table; returns whether the run survived them."""
    times = dict.fromkeys(KILLS, math.ceil(args.kills / len(KILLS))) | dict.fromkeys(OTHERS, args.damage)
    place.prepare()
    trials_of = KILLS | OTHERS
    chosen = {name: trials_of[name] for name in (SHORT if args.short else trials_of) if args.only in name}

    def row(name: str) -> tuple[str, bool]:
        seeded_place = dataclasses.replace(place, rng=random.Random(f"{args.seed} {name}"))
        return try_fault(seeded_place, name, chosen[name], 1 if args.short else times[name])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            ends = list(pool.map(row, chosen))
        except BaseException:  # a signal; the rows that are being tried fail, the others are not begun
            place.stopped.set()
            kill_children()
            raise
    print(HEADER, *dict(ends), sep="\n")
    return all(well for _, well in ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="some of the faults, once each")
    parser.add_argument("--kills", type=int, default=200, help="over all rows that kill")
    parser.add_argument("--damage", type=int, default=10, help="times for each other fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose name holds this")
    args = parser.parse_args()
    become_root()
    root = Path(tempfile.mkdtemp(prefix="faults-")).resolve()
    place = Place(root, random.Random(args.seed), 1 if args.short else 3)
    try:
        with no_child_left():
            well = try_all(place, args)
    except SystemExit:  # by a signal
        shutil.rmtree(root)
        raise
    if not well:
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
