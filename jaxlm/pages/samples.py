"""The samples of a run by prompt: as many steps of each prompt, and as much of each text, as a page has room for."""

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.pages.metrics import read_rows
from jaxlm.terminal import printable

MOST_PROMPTS = 100
MOST_CHARACTERS = 3000  # of a text
ROOM = 700_000  # bytes of all samples of a page


def read_samples(path: Path, room: int = ROOM) -> tuple[list[dict[str, Any]], int]:
    """The samples of samples.jsonl by prompt, in at most about `room` bytes of JSON, and the number of damaged lines.

    Each prompt has its first and its last sample. Control characters become spaces. Raises OSError.
    """
    places: dict[str, array[int]] = {}
    sizes, count, damaged = 0, 0, 0
    for place, row in read_rows(path):
        if row is None or not (isinstance(row.get("prompt"), str) and isinstance(row.get("text"), str)):
            damaged += 1
            continue
        places.setdefault(row["prompt"], array("q")).append(place)
        sizes, count = sizes + len(json.dumps(row["text"][:MOST_CHARACTERS])) + 60, count + 1
    if not count:
        return [], damaged
    shown = list(places)[-MOST_PROMPTS:]
    each = max(int(room * count / sizes / len(shown)), 2)
    with path.open("rb") as file:
        return [_of_prompt(file, prompt, places[prompt], each) for prompt in shown], damaged


def _of_prompt(file: Any, prompt: str, places: "array[int]", most: int) -> dict[str, Any]:
    indices = np.arange(len(places)) if len(places) <= most else _spread(len(places), most)
    entries = []
    for place in np.frombuffer(places, np.int64)[indices]:
        file.seek(place)
        row = json.loads(file.readline())
        entries.append({"step": row["step"], "text": _shortened(row["text"])})
    return {"prompt": _shortened(prompt), "count": len(places), "entries": entries}


def _spread(count: int, most: int) -> Any:
    """At most `most` numbers below `count`, the first and the last among them, closer together at the beginning."""
    half = most // 2
    return np.unique(
        [*np.geomspace(1, count, half + most % 2).astype(int) - 1, *np.linspace(0, count - 1, half).astype(int)]
    )


def _shortened(text: str) -> str:
    text = printable(text)
    left = len(text) - MOST_CHARACTERS
    return text if left <= 0 else f"{text[:MOST_CHARACTERS]} … ({left:,} characters more)"
