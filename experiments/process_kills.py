"""Kills of one of two processes of a run: python -m experiments.process_kills [--kills 20] [--seed 0]

A small run is trained by two processes on loopback, each with one CPU device, and by one process with two. Then one of
two processes, drawn from the seed, gets SIGKILL at a random moment after the start of the session, up to four times a
run. The other one must end by itself within a minute, with status 1 and one line that names the killed one. The same
command resumes, and the end must equal that of the undisturbed run bit for bit: parameters and optimizer, every row of
metrics.jsonl except its times, samples.jsonl and the exported model. Each kill prints a line on stderr; the table goes
to stdout. The exit status is 0 if nothing was lost, else 1; failed runs are left in place.
"""

import argparse
import itertools
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.cleanup import no_child_left
from experiments.fault_child import TIME_LIMIT, TRAIN, ended, expect, start
from experiments.fault_place import STEPS, Place, contents, lost, newest, steps_recorded

PROCESSES, BURST, AT_ONCE = 2, 4, 5
LIMIT = 60  # seconds for the other process to end
TICK = 0.05


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_all(home: Path) -> list[subprocess.Popen]:
    """Starts the processes of a session."""
    words = (*TRAIN, f"--coordinator=127.0.0.1:{free_port()}", f"--processes={PROCESSES}")
    return [start(home, words=(*words, f"--process={process}")) for process in range(PROCESSES)]


def finish(home: Path) -> None:
    """A session without faults."""
    sessions = [ended(process) for process in start_all(home)]
    for session in sessions:
        expect(session.returncode == 0 and not session.stderr, "it did not reach its end in silence", session)
    expect(not re.sub(r"\[Gloo\].*\n", "", sessions[1].stdout), "process 1 wrote to stdout", sessions[1])


def wait_for(home: Path, processes: list[subprocess.Popen], steps: int) -> None:
    """Returns once the processes have found each other and so many steps are recorded, or one has ended."""
    deadline, lock = time.monotonic() + TIME_LIMIT, home / "run/lock"
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        begun = lock.exists() and f'"pid": {processes[0].pid},' in lock.read_text()  # a killed session leaves its own
        if begun and steps_recorded(home) >= steps:
            return
        time.sleep(0.005)


def kill_one(home: Path, victim: int, steps: int, delay: float) -> float | None:
    """Kills a process of a session so many seconds after a step is recorded.

    Returns the seconds until the other one ended. None: the session ended before.
    """
    processes = start_all(home)
    wait_for(home, processes, steps)
    time.sleep(delay)
    processes[victim].kill()
    seconds = 0.0
    while processes[1 - victim].poll() is None and seconds < TIME_LIMIT:
        time.sleep(TICK)
        seconds += TICK  # not those of a machine that sleeps
    other, killed = ended(processes[1 - victim]), ended(processes[victim])
    if 0 in (other.returncode, killed.returncode):
        return None
    line = rf"error: process {victim} of {PROCESSES} on \S+ has ended, so this run stops: .*\n"
    expect(other.returncode == 1 and re.fullmatch(line, other.stderr), "it does not name the killed one", other)
    expect(seconds < LIMIT, f"it ended after {seconds:.0f} s", other)
    return seconds


def train_alone(home: Path) -> None:
    """One process with as many devices."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={PROCESSES}"
    session = ended(start(home))
    del os.environ["XLA_FLAGS"]
    expect(session.returncode == 0, "it did not reach its end", session)


class Strike(NamedTuple):
    """A kill."""

    victim: int
    seconds: float  # until the other process ended
    repeated: int  # steps that were recorded after the last checkpoint


def try_run(place: Place, reference: dict[str, bytes], seed: int, number: int, kills: int) -> tuple[int, list[Strike]]:
    """Kills a run so often, or if it ends before, another one too; returns the bytes that differ, and the kills."""
    rng, differing, strikes, parts = random.Random(f"{seed} {number}"), 0, list[Strike](), itertools.count()
    while len(strikes) < kills:
        place.furnish(home := place.root / f"run-{number}-{next(parts)}")
        while len(strikes) < kills:
            victim, steps = rng.randrange(PROCESSES), newest(home) + rng.randint(0, STEPS // kills)
            seconds = kill_one(home, victim, steps, rng.uniform(0, 0.2))
            if seconds is None:
                break
            strikes.append(Strike(victim, seconds, max(0, steps_recorded(home) - newest(home))))
            words = f"process {victim} killed after {steps_recorded(home)} steps, {seconds:.1f} s"
            print(f"{home.name}: {words}", file=sys.stderr)
        finish(home)
        parts_lost = lost(reference, contents(home))
        differing += sum(parts_lost.values())
        if any(parts_lost.values()):
            print(f"FAILED ({home}): these differ, by so many bytes: {parts_lost}", file=sys.stderr)
    return differing, strikes


def try_kills(place: Place, kills: int, seed: int) -> bool:
    """Prints the table; returns whether nothing was lost."""
    words = ["the", "king", "dog", "cat", "sun", "old", "man", "saw", "went", "home", "é", "日本"]
    place.text = ".\n".join(" ".join(place.rng.choices(words, k=10)) for _ in range(150))
    place.furnish(place.done)
    train_alone(place.done)
    reference, again = contents(place.done), place.root / "two"
    place.furnish(again)
    finish(again)
    bytes_lost = sum(lost(reference, contents(again)).values())
    sizes = [min(BURST, kills - first) for first in range(0, kills, BURST)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = list(pool.map(lambda run: try_run(place, reference, seed, *run), enumerate(sizes)))
    bytes_lost += sum(run[0] for run in runs)
    strikes = [strike for run in runs for strike in run[1]]
    print("| killed | kills | seconds until the other ended: mean, largest | steps repeated: mean, largest |")
    print("|---|---|---|---|")
    for victim in sorted({strike.victim for strike in strikes}):
        seconds, repeated = zip(
            *[(each.seconds, each.repeated) for each in strikes if each.victim == victim], strict=True
        )
        print(
            f"| process {victim} of {PROCESSES} | {len(seconds)} | {np.mean(seconds):.1f}, {max(seconds):.1f} |"
            f" {np.mean(repeated):.1f}, {max(repeated)} |"
        )
    print(f"\nBytes that differ in {len(runs)} killed runs and one of two processes without kills: {bytes_lost}")
    return not bytes_lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="process-kills-")).resolve()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")
    with no_child_left():
        well = try_kills(Place(root, random.Random(args.seed), BURST), args.kills, args.seed)
    if not well:
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
