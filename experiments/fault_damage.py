"""Damage to the files of a run between two sessions: lost power, and damaged checkpoints."""

import contextlib
import functools
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cut_power(home: Path, log: Path) -> None:
    """Truncates each file that a killed session wrote from Python to the size at its last sync.

    Renames are assumed to survive, as in a journaling file system.
    """
    synced: dict[str, int] = {}
    for what, path, *rest in (line.split() for line in log.read_text().splitlines() if " " in line):
        if what == "open":
            synced[path] = min(synced.get(path, int(rest[0])), int(rest[0]))
        elif what == "sync":
            synced[path] = int(rest[0])
        elif what == "remove":
            synced.pop(path, None)
        elif what == "rename":
            synced = {re.sub(rf"^{re.escape(path)}(?=/|$)", rest[0], name): size for name, size in synced.items()}
    for path, size in synced.items():
        with contextlib.suppress(FileNotFoundError):
            if os.path.getsize(home / path) > size:
                os.truncate(home / path, size)


def files(folder: Path, fits: Callable[[Path], Any] = lambda path: True) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and fits(path)]


def truncate(checkpoint: Path, chance: random.Random) -> None:
    path = chance.choice(files(checkpoint, lambda path: path.stat().st_size > 1))
    os.truncate(path, chance.randrange(1, path.stat().st_size))


def flip(checkpoint: Path, chance: random.Random, in_array: bool) -> None:
    """Flips one bit in the files of arrays, or in the others."""
    paths = files(checkpoint, lambda path: (path.parent.name == "d") == in_array)
    (path,) = chance.choices(paths, [path.stat().st_size for path in paths])
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def delete_half(checkpoint: Path, chance: random.Random) -> None:
    for path in chance.sample(files(checkpoint), len(files(checkpoint)) // 2):
        path.unlink()


def lose_item(checkpoint: Path, chance: random.Random) -> None:
    shutil.rmtree(checkpoint / chance.choice(["params", "optimizer", "meta"]))


def leave_unfinished(checkpoint: Path, chance: random.Random) -> None:
    if chance.random() < 0.5:
        delete_half(checkpoint, chance)
    checkpoint.rename(f"{checkpoint}.orbax-checkpoint-tmp")


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "a file truncated": truncate,
    "a file emptied": lambda checkpoint, chance: os.truncate(chance.choice(files(checkpoint)), 0),
    "a bit flipped in an array": functools.partial(flip, in_array=True),
    "a bit flipped elsewhere": functools.partial(flip, in_array=False),
    "a file missing": lambda checkpoint, chance: chance.choice(files(checkpoint)).unlink(),
    "half of its files missing": delete_half,
    "an item missing": lose_item,
    "its save unfinished": leave_unfinished,
}
