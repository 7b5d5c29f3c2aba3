"""Faults of a session and its files: signals, exceptions, lost power, a full disk, damaged checkpoints.

Each function trains a run under its fault to the end and returns the steps repeated after each strike.
"""

import json
import math
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import fault_damage
from experiments.fault_child import CHANGE, Failed, Fault, ended, expect, held
from experiments.fault_damage import files
from experiments.fault_place import ACCUMULATED, SAVE_INTERVAL, STEPS, Place, newest, resumed, steps_recorded

SLEEP = 10  # seconds that a stopped run sleeps


def killed(
    event: str,
    place: Place,
    home: Path,
    act: str = "kill",
    longest: float = 0,
    beside: Sequence[Fault] = (),
    **options: Any,
) -> list[int]:
    """SIGKILL at an event, several times in succession unless the run ends before."""
    repeated: list[int] = []
    for _ in range(place.burst):
        recorded = steps_recorded(home)
        session = place.session(home, place.fault(event, act, longest), *beside, **options)
        if repeated and "work in" in session.stdout:
            repeated[-1] = max(0, recorded - resumed(session))
        if session.returncode == 0:
            return repeated
        expect(session.returncode == -signal.SIGKILL, "it ended before it was killed", session)
        repeated.append(0)
    return [*repeated[:-1], place.finish(home)[0]]


def power_lost(place: Place, home: Path) -> list[int]:
    """SIGKILL before any change to the disk; then all that Python wrote without a sync is lost."""
    log = home.with_suffix(".log")
    session = place.session(home, place.fault(CHANGE, "kill"), log=log)
    if session.returncode == 0:  # this one made fewer changes than the undisturbed run
        return []
    expect(session.returncode == -signal.SIGKILL, "it ended before it was killed", session)
    recorded = steps_recorded(home)
    fault_damage.cut_power(home, log)
    return [max(0, recorded - resumed(place.finish(home)[1]))]


def stopped(act: str, status: int, place: Place, home: Path) -> list[int]:
    """A signal to stop: the run prints one line and saves, so no step is repeated."""
    return _stopped([status], place, home, place.fault(r"micro-step [12]?\d$", act, longest=0.05))


def stopped_and_interrupted(place: Place, home: Path) -> list[int]:
    """SIGTERM, and one SIGINT while the run stops: it saves all the same."""
    stop = place.fault(r"micro-step [12]?\d$", "terminate", longest=0.05)
    interrupt = stop | {"act": "interrupt", "delay": stop["delay"] + place.rng.uniform(0.001, 0.02)}
    statuses = 128 + signal.SIGTERM, 128 + signal.SIGINT  # Python handles signals that wait together by their numbers
    return _stopped(statuses, place, home, stop, interrupt)


def stopped_within_a_step(place: Place, home: Path) -> list[int]:
    """SIGTERM before the first micro-batch of a step: the run does not wait for the second."""
    log = home.with_suffix(".log")
    stop = place.fault(r"micro-step ([3579]|[1234][13579])$", "terminate")  # not in the first step
    repeated = _stopped([128 + signal.SIGTERM], place, home, stop, log=log)
    begun = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("micro-step ")]
    if begun[-1] % ACCUMULATED == 0:
        raise Failed(f"it began micro-batch {begun[-1]} before it stopped")
    return repeated


def _stopped(statuses: Sequence[int], place: Place, home: Path, *faults: Fault, **options: Any) -> list[int]:
    session = place.session(home, *faults, **options)
    match = re.search(r"^stopped after step (\d+): .+\n\Z", session.stderr, re.MULTILINE)
    in_order = session.returncode in statuses and match
    expect(in_order, f"it did not stop with {statuses} and its line", session)
    expect(match and int(match[1]) == newest(home) == steps_recorded(home), "that step is not saved", session)
    repeated, _ = place.finish(home)
    expect(repeated == 0, "steps were repeated", session)
    return [repeated]


def stopped_anywhere(place: Place, home: Path) -> list[int]:
    """SIGTERM at any moment of a session that resumes: it ends in order and damages no checkpoint."""
    shutil.copytree(place.half_done, home)
    session = place.session(home, place.fault("start", "terminate", longest=math.inf))
    ends = (0, 128 + signal.SIGTERM, -signal.SIGTERM)  # done before; in order; before Python took the signal over
    expect(session.returncode in ends and "Traceback" not in session.stderr, "it did not end in order", session)
    expect(not list((home / "run/checkpoints").glob("*.damaged")), "a good checkpoint was moved aside", session)
    return [place.finish(home)[0]]


def left(act: str, status: int, place: Place, home: Path) -> list[int]:
    """The session ends at once, without saving."""
    session = place.session(home, place.fault("(compile|micro-step )", act, longest=0.05 if "twice" in act else 0))
    if session.returncode == 0:  # it ended before the delay
        return []
    expect(session.returncode == status and "stopped after" not in session.stderr, f"no {status} at once", session)
    return [place.finish(home)[0]]


def put_to_sleep(place: Place, home: Path) -> list[int]:
    """SIGSTOP, and SIGCONT later: neither ETA nor speed may count the sleep as work.

    Both are compared with the step times of this run, so they may be slow on a loaded machine.
    """
    process = place.start(home, place.fault(r"micro-step 1[2-4]$", "stop"))
    with held(process):
        time.sleep(SLEEP)
    session = ended(process)
    expect(session.returncode == 0, "it did not continue", session)
    rows = [json.loads(line) for line in (home / "run/metrics.jsonl").read_text().splitlines()]
    step_tokens = rows[0]["tokens"]
    step_seconds = [step_tokens / row["tokens_per_second"] for row in rows]
    expect(max(step_seconds) > SLEEP, "no step holds the sleep", session)
    lines = re.findall(r"Step +(\d+) .* Tokens/s +(\d+) \| ETA ([\d.]+)([smh])", session.stdout)
    steps = [int(step) for step, *_ in lines]
    expect(steps[-1:] == [STEPS], "the lines are not as expected", session)
    for previous, step, (_, speed, eta, unit) in zip([0, *steps], steps, lines, strict=False):
        median = np.median(step_seconds[previous:step])
        expect(abs(float(speed) - step_tokens / median) <= 1, f"Tokens/s is off at step {step}", session)
        if step >= 8:  # after the sleep; of each pause so far, at most 4 times as many are ahead
            pauses = rows[step - 1]["seconds"] - rows[0]["seconds"] - sum(step_seconds[1:step])
            longest = (STEPS - step) * np.median(step_seconds[:step]) + 4 * pauses
            seconds = float(eta) * {"s": 1, "m": 60, "h": 3600}[unit]
            expect(seconds <= 1.1 * longest + 1, f"ETA is off at step {step}", session)
    return [0]


def second_run(place: Place, home: Path) -> list[int]:
    """Another run in the same work directory is refused, and the first is not disturbed."""
    process = place.start(home, place.fault(r"micro-step ", "stop"))
    with held(process):
        second = place.session(home)
    first = ended(process)
    expect(second.returncode == 2, "the second run was not refused", second)
    named = str(process.pid) in second.stderr and socket.gethostname() in second.stderr
    expect(named, "it does not name the other process", second)
    expect(first.returncode == 0, "the first run was disturbed", first)
    return [0]


def mounted(folder: Path) -> bool:
    """Makes a folder, with a small disk of its own if the system allows it; returns whether it does."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    return subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0


def disk_full(place: Place, home: Path) -> list[int]:
    """The disk is full for a while, perhaps from the middle of a save: the run warns and continues."""
    place.furnish(home)
    ballast = str(home / "run/ballast") if mounted(home / "run") else None
    save, each = place.rng.randint(1, 3), SAVE_INTERVAL * ACCUMULATED
    filled = place.fault(r"mkdir run/checkpoints/\d+\.[^/]+$", "fill", longest=0.03, ballast=ballast) | {"count": save}
    freed = place.fault("micro-step ", "free", ballast=ballast) | {"count": (save + 3) * each + each // 2}
    session = place.session(home, filled, freed)
    expect(session.returncode == 0 and "Traceback" not in session.stderr, "the run did not continue in order", session)
    for step in (SAVE_INTERVAL * (save + 2), SAVE_INTERVAL * (save + 3)):
        expect(re.search(rf"\b{step}\b.* not saved", session.stdout), f"no warning at step {step}", session)
    return [0]


def damaged(damage: Callable[[Path, random.Random], None], place: Place, home: Path) -> list[int]:
    """The newest checkpoint is damaged: the run says so and resumes from the previous one, or does not need it."""
    shutil.copytree(place.half_done, home)
    step = newest(home)
    damage(home / "run/checkpoints" / str(step), place.rng)
    repeated, session = place.finish(home)
    match = re.search(rf"^(Skipped|Deleted) checkpoints/{step}\b.*[:,] \S", session.stdout, re.MULTILINE)
    expect(resumed(session) == step or match, f"it does not say why it skipped step {step}", session)
    return [repeated]


def all_damaged(place: Place, home: Path) -> list[int]:
    """No checkpoint is whole: the run is refused, each time, with the reasons; nothing is deleted."""
    shutil.copytree(place.half_done, home)
    checkpoints = [path for path in (home / "run/checkpoints").iterdir() if path.name.isdigit()]
    for path in checkpoints:
        place.rng.choice([fault_damage.delete_half, fault_damage.lose_item])(path, place.rng)
    before = {path: path.read_bytes() for path in files(home / "run", lambda path: path.name != "lock")}
    for _ in range(2):
        session = place.session(home)
        expect(session.returncode == 2 and session.stderr.count("\n") == 1, "it was not refused in one line", session)
        expect(all(f"/{path.name}: " in session.stderr for path in checkpoints), "it does not name each", session)
        after = {path: path.read_bytes() for path in files(home / "run")}
        expect(before.items() <= after.items(), "files are gone", session)
    shutil.rmtree(home / "run")
    return [place.finish(home)[0]]
