"""The folder of a proof: its text, its config, the undisturbed run, and what faults must not change."""

import itertools
import json
import logging
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.fault_child import Ended, Failed, Fault, ended, expect, start

STEPS, ACCUMULATED, SAVE_INTERVAL = 24, 2, 3
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
    """A folder of runs, each in its own home: a folder with a text, a config and the work directory `run`."""

    root: Path
    rng: random.Random
    burst: int  # kills in succession on one run
    seconds: float = 0  # that an undisturbed session takes
    events: list[str] = field(default_factory=list)  # its events
    text: str = ""
    reference: dict[str, bytes] = field(default_factory=dict)  # what an undisturbed run leaves
    stopped: Event = field(default_factory=Event)  # no session may start any more

    def prepare(self) -> None:
        """Trains twice without faults (the first run fills the compilation cache), then stops a run half-way."""
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(self.root / "compiled")
        words = ["the", "king", "dog", "cat", "sun", "old", "man", "saw", "went", "home", "é", "日本"]
        self.text = ".\n".join(" ".join(self.rng.choices(words, k=10)) for _ in range(150))
        self.finish(self.done)
        self.reference = contents(self.done)
        again, log = self.root / "again", self.root / "events"
        began = time.monotonic()
        session = self.session(again, log=log)
        self.seconds, self.events = time.monotonic() - began, log.read_text().splitlines()
        expect(not lost(self.reference, contents(again)), "two undisturbed runs differ", session)
        expect(steps_recorded(again) == STEPS, "metrics.jsonl has not a row for each step", session)
        self.session(self.half_done, self.fault(r"micro-step (1[5-9]|[23]\d)$", "terminate"))

    @property
    def done(self) -> Path:
        """The home of the undisturbed run."""
        return self.root / "reference"

    @property
    def half_done(self) -> Path:
        """The home of a run that was stopped."""
        return self.root / "stopped"

    def fault(self, event: str, act: str, longest: float = 0, **more: Any) -> Fault:
        """A fault at a random one of the events that the undisturbed run had of this kind."""
        count = sum(bool(re.match(event, line)) for line in self.events)
        at = self.rng.randint(1, max(count, 1))
        delay = self.rng.uniform(0, min(longest, self.seconds))
        return {"event": event, "count": at, "delay": delay, "act": act, "share": self.rng.random(), **more}

    def start(self, home: Path, *faults: Fault, **options: Any) -> subprocess.Popen:
        """Starts a session in `home`, which is furnished if it is new."""
        if self.stopped.is_set():
            raise Failed("the program is stopped")
        if not home.exists():
            self.furnish(home)
        return start(home, *faults, **options)

    def furnish(self, home: Path) -> None:
        home.mkdir(parents=True)
        (home / "tiny.py").write_text(CONFIG)
        (home / "text.txt").write_text(self.text, encoding="utf-8")

    def session(self, home: Path, *faults: Fault, **options: Any) -> Ended:
        return ended(self.start(home, *faults, **options))

    def finish(self, home: Path) -> tuple[int, Ended]:
        """Resumes a disturbed run without faults; returns the steps that it repeats."""
        recorded = steps_recorded(home)
        session = self.session(home)
        expect(session.returncode == 0, "it did not reach its end", session)
        expect("Traceback" not in session.stderr, "it printed a traceback on its way to the end", session)
        return max(0, recorded - resumed(session)), session


def steps_recorded(home: Path) -> int:
    """Whole lines of metrics.jsonl."""
    file = home / "run/metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def resumed(session: Ended) -> int:
    """The step from which a session resumed."""
    match = re.search(r"Resuming from step (\d+)", session.stdout)
    return int(match[1]) if match else 0


def newest(home: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max((int(path.name) for path in home.glob("run/checkpoints/*") if path.name.isdigit()), default=0)


def contents(home: Path) -> dict[str, bytes]:
    """Everything that faults must not change."""
    rows = [json.loads(line) for line in (home / "run/metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({key: value for key, value in row.items() if key not in TIMES}) for row in rows]
    paths = [home / "run/samples.jsonl", home / "run/final_model/model.safetensors", *home.glob("data/*/*.bin")]
    items = ("params", "optimizer")
    with tempfile.TemporaryDirectory() as place:  # orbax cannot read below every name
        shutil.copytree(home / "run/checkpoints" / str(newest(home)), Path(place, "0"))
        with ocp.CheckpointManager(place) as manager:
            restore = {item: ocp.args.StandardRestore(_like(Path(place, "0", item))) for item in items}
            state = manager.restore(0, args=ocp.args.Composite(**restore))
    leaves, _ = jax.tree_util.tree_flatten_with_path(dict(state))
    return (
        {"metrics.jsonl": "\n".join(lines).encode(), "the last checkpoint's step": str(newest(home)).encode()}
        | {str(path.relative_to(home)): path.read_bytes() for path in paths}
        | {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    )


def _like(item: Path) -> Any:
    """The arrays of an item of a checkpoint, placed on one device, as their shapes."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        ocp.StandardCheckpointHandler().metadata(item).tree,
        is_leaf=lambda leaf: hasattr(leaf, "dtype"),
    )


def lost(reference: dict[str, bytes], actual: dict[str, bytes]) -> dict[str, int]:
    """The bytes of each part that differ or that only one of the two has."""
    pairs = {name: (reference.get(name, b""), actual.get(name, b"")) for name in reference | actual}
    return {name: sum(x != y for x, y in itertools.zip_longest(a, b)) for name, (a, b) in pairs.items() if a != b}
