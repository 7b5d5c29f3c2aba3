"""The proof that nothing is lost: python -m experiments.faults [--short] [--kills 200] [--damage 10] [--seed 0]

A small run is trained without faults, then repeatedly under faults at points drawn from the seed, and resumed each time
until it is done. The result must equal that of the undisturbed run bit for bit: parameters and optimizer, every row of
metrics.jsonl except its times, samples.jsonl, the tokens and the exported model. Each trial prints a line on stderr;
the table goes to stdout. The exit status is 0 if the run survived every fault, else 1; failed runs are left in place.

`steps repeated` were recorded before a fault and trained again after it. `bytes lost` differ from the undisturbed run.
Lost power truncates every file that Python wrote to its last synced size; tensorstore, which writes the arrays, syncs
its files itself.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import fault_damage
from experiments.fault_child import CHANGE, Ended, Failed, Fault, ended, expect, held, start
from experiments.fault_damage import files

STEPS, ACCUMULATED, SAVE_INTERVAL = 24, 2, 3
SLEEP = 10  # seconds that a stopped run sleeps
TIMES = ("seconds", "tokens_per_second")  # what may differ in a row of metrics.jsonl
CONFIG = f"""
from jaxlm.config import default_config


def get_config():
    config = default_config()
    config.update(dict(batch_size=2, grad_accum_steps={ACCUMULATED}, max_steps={STEPS}, max_checkpoints=3))
    config.update(dict(eval_interval=4, generation_interval=4, save_interval={SAVE_INTERVAL}))
    config.model.update(dict(vocab_size=300, context=16, layers=2, heads=2, width=16, mlp_width=24))
    config.model.precision = "float32"
    config.optimizer.update(dict(warmup_steps=2, learning_rate=1e-2))
    config.data.update(dict(corpus="text.txt", val_fraction=0.1, eval_sequences=4))
    config.sample.update(dict(prompts=("Once", "The king", "A"), texts=2, tokens=5))
    return config
"""
logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs damaged checkpoints


@dataclass
class Place:
    """A directory with a text, a config and the undisturbed run, and the random generator."""

    root: Path
    rng: random.Random
    burst: int  # kills in succession on one run
    seconds: float = 0  # that an undisturbed session takes
    events: list[str] = field(default_factory=list)  # its events
    reference: dict[str, bytes] = field(default_factory=dict)  # what it leaves

    def prepare(self) -> None:
        """Trains twice without faults (the first run fills the compilation cache), then stops a run half-way."""
        (self.root / "tiny.py").write_text(CONFIG)
        words = ["the", "king", "dog", "cat", "sun", "old", "man", "saw", "went", "home", "é", "日本"]
        lines = [" ".join(self.rng.choices(words, k=10)) for _ in range(150)]
        (self.root / "text.txt").write_text(".\n".join(lines), encoding="utf-8")
        self.finish(self.root / "reference")
        self.reference = contents(self.root / "reference")
        began, log = time.monotonic(), self.root / "events"
        session = self.session(self.root / "again", log=log)
        self.seconds, self.events = time.monotonic() - began, log.read_text().splitlines()
        expect(not lost(self.reference, contents(self.root / "again")), "two undisturbed runs differ", session)
        expect(steps_recorded(self.root / "again") == STEPS, "metrics.jsonl has not a row for each step", session)
        self.session(self.root / "stopped", self.fault(r"micro-step (1[5-9]|[23]\d)$", "terminate"))

    def fault(self, event: str, act: str, longest: float = 0, **more: Any) -> Fault:
        """A fault at a random one of the events that the undisturbed run had of this kind."""
        count = sum(bool(re.match(event, line)) for line in self.events)
        at = self.rng.randint(1, max(count, 1))
        delay = self.rng.uniform(0, min(longest, self.seconds))
        return {"event": event, "count": at, "delay": delay, "act": act, "share": self.rng.random(), **more}

    def session(self, workdir: Path, *faults: Fault, **options: Any) -> Ended:
        return ended(start(workdir, *faults, **options))

    def finish(self, workdir: Path) -> tuple[int, Ended]:
        """Resumes a disturbed run without faults; returns the steps that it repeats."""
        recorded = steps_recorded(workdir)
        session = self.session(workdir)
        expect(session.returncode == 0, "it did not reach its end", session)
        expect("Traceback" not in session.stderr, "it printed a traceback on its way to the end", session)
        return max(0, recorded - resumed(session)), session


def steps_recorded(workdir: Path) -> int:
    """Whole lines of metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def resumed(session: Ended) -> int:
    """The step from which a session resumed."""
    match = re.search(r"Resuming from step (\d+)", session.stdout)
    return int(match[1]) if match else 0


def newest(workdir: Path) -> int:
    """The step of the newest checkpoint."""
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def contents(workdir: Path) -> dict[str, bytes]:
    """Everything that faults must not change."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({key: value for key, value in row.items() if key not in TIMES}) for row in rows]
    names = ("samples.jsonl", "final_model/model.safetensors", "tokens/train.bin", "tokens/val.bin")
    arrays = ocp.args.StandardRestore()
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        step = manager.latest_step()
        state = manager.restore(step, args=ocp.args.Composite(params=arrays, optimizer=arrays))
    leaves, _ = jax.tree_util.tree_flatten_with_path(dict(state))
    return (
        {"metrics.jsonl": "\n".join(lines).encode(), "the last checkpoint's step": str(step).encode()}
        | {name: (workdir / name).read_bytes() for name in names}
        | {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    )


def lost(reference: dict[str, bytes], actual: dict[str, bytes]) -> dict[str, int]:
    """The bytes of each part that differ or that only one of the two has."""
    pairs = {name: (reference.get(name, b""), actual.get(name, b"")) for name in reference | actual}
    return {name: sum(x != y for x, y in itertools.zip_longest(a, b)) for name, (a, b) in pairs.items() if a != b}


# The faults. Each function trains a run under its fault to the end and returns the steps repeated after each strike.


def killed(event: str, place: Place, workdir: Path, act: str = "kill", longest: float = 0, **options: Any) -> list[int]:
    """SIGKILL at an event, several times in succession unless the run ends before."""
    repeated: list[int] = []
    for _ in range(place.burst):
        recorded = steps_recorded(workdir)
        session = place.session(workdir, place.fault(event, act, longest), **options)
        if repeated and "work in" in session.stdout:
            repeated[-1] = max(0, recorded - resumed(session))
        if session.returncode == 0:
            return repeated
        expect(session.returncode == -signal.SIGKILL, "it ended before it was killed", session)
        repeated.append(0)
    return [*repeated[:-1], place.finish(workdir)[0]]


def power_lost(place: Place, workdir: Path) -> list[int]:
    """SIGKILL before any change to the disk; then all that Python wrote without a sync is lost."""
    log = workdir.with_suffix(".log")
    session = place.session(workdir, place.fault(CHANGE, "kill"), log=log)
    if session.returncode == 0:  # this one made fewer changes than the undisturbed run
        return []
    expect(session.returncode == -signal.SIGKILL, "it ended before it was killed", session)
    recorded = steps_recorded(workdir)
    fault_damage.cut_power(workdir, log)
    return [max(0, recorded - resumed(place.finish(workdir)[1]))]


def stopped(act: str, status: int, place: Place, workdir: Path) -> list[int]:
    """A signal to stop: the run prints one line and saves, so no step is repeated."""
    session = place.session(workdir, place.fault(r"micro-step [12]?\d$", act, longest=0.05))
    match = re.search(r"^stopped after step (\d+): .+\n\Z", session.stderr, re.MULTILINE)
    expect(session.returncode == status and match, f"it did not stop with {status} and its line", session)
    expect(match and int(match[1]) == newest(workdir) == steps_recorded(workdir), "that step is not saved", session)
    repeated, _ = place.finish(workdir)
    expect(repeated == 0, "steps were repeated", session)
    return [repeated]


def stopped_anywhere(place: Place, workdir: Path) -> list[int]:
    """SIGTERM at any moment of a session that resumes: it ends in order and damages no checkpoint."""
    shutil.copytree(place.root / "stopped", workdir)
    session = place.session(workdir, place.fault("start", "terminate", longest=math.inf))
    ends = (0, 128 + signal.SIGTERM, -signal.SIGTERM)  # done before; in order; before Python took the signal over
    expect(session.returncode in ends and "Traceback" not in session.stderr, "it did not end in order", session)
    expect(not list((workdir / "checkpoints").glob("*.damaged")), "a good checkpoint was moved aside", session)
    return [place.finish(workdir)[0]]


def left(act: str, status: int, place: Place, workdir: Path) -> list[int]:
    """The session ends at once, without saving."""
    session = place.session(workdir, place.fault("(compile|micro-step )", act, longest=0.05 if "twice" in act else 0))
    if session.returncode == 0:  # it ended before the delay
        return []
    expect(session.returncode == status and "stopped after" not in session.stderr, f"no {status} at once", session)
    return [place.finish(workdir)[0]]


def put_to_sleep(place: Place, workdir: Path) -> list[int]:
    """SIGSTOP, and SIGCONT later: neither ETA nor speed may count the sleep as work.

    Both are compared with the step times of this run, so they may be slow on a loaded machine.
    """
    process = start(workdir, place.fault(r"micro-step 1[2-4]$", "stop"))
    with held(process):
        time.sleep(SLEEP)
    session = ended(process)
    expect(session.returncode == 0, "it did not continue", session)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
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


def second_run(place: Place, workdir: Path) -> list[int]:
    """Another run in the same work directory is refused, and the first is not disturbed."""
    process = start(workdir, place.fault(r"micro-step ", "stop"))
    with held(process):
        second = place.session(workdir)
    first = ended(process)
    expect(second.returncode == 2, "the second run was not refused", second)
    named = str(process.pid) in second.stderr and socket.gethostname() in second.stderr
    expect(named, "it does not name the other process", second)
    expect(first.returncode == 0, "the first run was disturbed", first)
    return [0]


def disk_full(place: Place, workdir: Path) -> list[int]:
    """The disk is full for a while, perhaps from the middle of a save: the run warns and continues."""
    workdir.mkdir()
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", workdir], stderr=subprocess.DEVNULL)
    ballast = None if mounting.returncode else str(workdir / "ballast")
    save, each = place.rng.randint(1, 3), SAVE_INTERVAL * ACCUMULATED
    filled = place.fault(r"mkdir checkpoints/\d+\.[^/]+$", "fill", longest=0.03, ballast=ballast) | {"count": save}
    freed = place.fault("micro-step ", "free", ballast=ballast) | {"count": (save + 3) * each + each // 2}
    session = place.session(workdir, filled, freed)
    expect(session.returncode == 0 and "Traceback" not in session.stderr, "the run did not continue in order", session)
    for step in (SAVE_INTERVAL * (save + 2), SAVE_INTERVAL * (save + 3)):
        expect(re.search(rf"\b{step}\b.* not saved", session.stdout), f"no warning at step {step}", session)
    return [0]


def damaged(damage: Callable[[Path, random.Random], None], place: Place, workdir: Path) -> list[int]:
    """The newest checkpoint is damaged: the run says so and resumes from the previous one, or does not need it."""
    shutil.copytree(place.root / "stopped", workdir)
    step = newest(workdir)
    damage(workdir / "checkpoints" / str(step), place.rng)
    repeated, session = place.finish(workdir)
    match = re.search(rf"^Skipped checkpoints/{step}\b.*: \S", session.stdout, re.MULTILINE)
    expect(resumed(session) == step or match, f"it does not say why it skipped step {step}", session)
    return [repeated]


def all_damaged(place: Place, workdir: Path) -> list[int]:
    """No checkpoint is whole: the run is refused, each time, with the reasons; nothing is deleted."""
    shutil.copytree(place.root / "stopped", workdir)
    checkpoints = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    for path in checkpoints:
        place.rng.choice([fault_damage.delete_half, fault_damage.lose_item])(path, place.rng)
    before = {path: path.read_bytes() for path in files(workdir, lambda path: path.name != "lock")}
    for _ in range(2):
        session = place.session(workdir)
        expect(session.returncode == 2 and session.stderr.count("\n") == 1, "it was not refused in one line", session)
        expect(all(f"/{path.name}: " in session.stderr for path in checkpoints), "it does not name each", session)
        after = {path: path.read_bytes() for path in files(workdir)}
        expect(before.items() <= after.items(), "files are gone", session)
    shutil.rmtree(workdir)
    return [place.finish(workdir)[0]]


KILLS = {
    "SIGKILL at any moment": partial(killed, "start", longest=math.inf),
    "SIGKILL in a step": partial(killed, "micro-step ", longest=0.006),
    "SIGKILL between two micro-batches": partial(killed, r"micro-step \d*[02468]$"),
    "SIGKILL while saving": partial(killed, r"mkdir checkpoints/\d+\.[^/]+$", longest=0.1),
    "SIGKILL while an old one is deleted": partial(killed, r"(remove|rmdir) checkpoints/\d+(/|$)"),
    "SIGKILL in the middle of a line": partial(killed, r"write \w+\.jsonl$", act="tear"),
    "SIGKILL in the first compilation": partial(killed, "compile", longest=1, cache=False),
    "SIGKILL while preparing the data": partial(killed, r"\w+ tokens\b"),
    "SIGKILL before any disk change": partial(killed, CHANGE),
    "power lost before any disk change": power_lost,
}
OTHERS = {
    "SIGTERM": partial(stopped, "terminate", 128 + signal.SIGTERM),
    "SIGTERM at any moment": stopped_anywhere,
    "SIGINT": partial(stopped, "interrupt", 128 + signal.SIGINT),
    "SIGINT twice": partial(left, "interrupt twice", 128 + signal.SIGINT),
    "an exception in a step": partial(left, "fail", 1),
    "SIGSTOP, SIGCONT": put_to_sleep,
    "a second run beside it": second_run,
    "disk full": disk_full,
    **{f"newest: {name}": partial(damaged, damage) for name, damage in fault_damage.DAMAGES.items()},
    "all checkpoints damaged": all_damaged,
}


def try_fault(place: Place, name: str, trial: Callable[[Place, Path], list[int]], wanted: int) -> tuple[str, bool]:
    """Tries a fault until it has struck `wanted` times; returns the row of the table, and whether all passed."""
    tried, repeated, bytes_lost = 0, [], 0
    for attempt in range(2 * wanted + 3):
        workdir = place.root / f"{re.sub('[^a-z]+', '-', name.lower())}-{attempt}"
        began, struck, verdict = time.monotonic(), [0], "equal"
        try:
            struck = trial(place, workdir)
            if differing := lost(place.reference, contents(workdir)):
                bytes_lost += sum(differing.values())
                raise Failed(f"these differ, by so many bytes: {differing}")
            repeated += struck
        except Exception as error:
            verdict = f"FAILED ({workdir}): {error}"
        tried += len(struck)
        print(f"{name}, {tried} of {wanted}, {time.monotonic() - began:.1f} s: {verdict}", file=sys.stderr)
        if os.path.ismount(workdir):
            subprocess.run(["umount", workdir], check=True)
        if verdict == "equal":
            shutil.rmtree(workdir)
        if tried >= wanted:
            break
    else:
        print(f"{name}: FAILED, it struck {tried} times only", file=sys.stderr)
    steps = f"{np.mean(repeated):.1f}, at most {max(repeated)}" if repeated else "-"
    return f"| {name} | {tried} | {len(repeated)} | {steps} | {bytes_lost} |", len(repeated) == tried >= wanted


def become_root() -> None:
    """Restarts this program in its own namespace, where it may mount file systems, if the system allows that."""
    words = ["unshare", "--map-root-user", "--mount"]
    allowed = shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    if os.geteuid() and allowed:
        os.execvp("unshare", [*words, sys.executable, "-m", "experiments.faults", *sys.argv[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="each fault once")
    parser.add_argument("--kills", type=int, default=200, help="over all rows that kill")
    parser.add_argument("--damage", type=int, default=10, help="times for each other fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose name holds this")
    args = parser.parse_args()
    become_root()
    times = dict.fromkeys(KILLS, math.ceil(args.kills / len(KILLS))) | dict.fromkeys(OTHERS, args.damage)
    place = Place(Path(tempfile.mkdtemp(prefix="faults-")).resolve(), random.Random(args.seed), 1 if args.short else 3)
    place.prepare()
    chosen = {name: trial for name, trial in (KILLS | OTHERS).items() if args.only in name}

    def row(name: str) -> tuple[str, bool]:
        seeded_place = dataclasses.replace(place, rng=random.Random(f"{args.seed} {name}"))
        return try_fault(seeded_place, name, chosen[name], 1 if args.short else times[name])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ends = list(pool.map(row, chosen))
    print("| fault | tried | survived | steps repeated | bytes lost |\n|---|---|---|---|---|", *dict(ends), sep="\n")
    if not all(well for _, well in ends):
        sys.exit(1)
    shutil.rmtree(place.root)


if __name__ == "__main__":
    main()
