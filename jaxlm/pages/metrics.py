"""metrics.jsonl as columns, and the few points of a column that a screen can show."""

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MEAN_SHARE = 0.02  # of the rows, over which the running mean is taken
LARGEST_STEP = 2**53  # numbers of JavaScript are exact up to there

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Column(NamedTuple):
    """The values of a key, and the numbers of the rows that have it."""

    rows: Indices
    values: Floats


@dataclass(frozen=True)
class Metrics:
    """The rows of metrics.jsonl: 16 bytes for each number."""

    columns: dict[str, Column]  # of numeric keys
    damaged: int  # lines that are no row, or whose step is not above the one before

    def at(self, key: str, rows: Indices) -> Floats:
        """The values of a key in these rows; NaN where a row lacks it."""
        values = np.full(self.count, np.nan)
        column = self.columns.get(key)
        if column:
            values[column.rows] = column.values
        return values[rows]

    def last(self, key: str) -> float | None:
        """The last value of a key."""
        column = self.columns.get(key)
        return float(column.values[-1]) if column else None

    @property
    def steps(self) -> Floats:
        return self.columns["step"].values if self.columns else np.zeros(0)

    @property
    def count(self) -> int:
        return len(self.steps)


def read_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    """The place and the row of each line of a .jsonl file, one line in memory at a time; None for a damaged line.

    The line that is being written is left out. Raises OSError, but not if there is no file.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        place = 0
        for line in file:
            if line.endswith(b"\n"):
                yield place, _row(line)
            place += len(line)


def _row(line: bytes) -> Mapping[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if type(step) is int and 0 <= step < LARGEST_STEP else None


def read_metrics(path: Path) -> Metrics:
    """Reads metrics.jsonl. Raises OSError."""
    rows: dict[str, array[int]] = {}
    values: dict[str, array[float]] = {}
    count, last, damaged = 0, -1, 0
    for _, row in read_rows(path):
        if row is None or row["step"] <= last:
            damaged += 1
            continue
        for key, value in row.items():
            if type(value) in (int, float):
                rows.setdefault(key, array("q")).append(count)
                values.setdefault(key, array("d")).append(_as_float(value))
        count, last = count + 1, row["step"]
    columns = {key: Column(np.frombuffer(rows[key], np.int64), np.frombuffer(values[key])) for key in rows}
    return Metrics(columns, damaged)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an int of hundreds of digits
        return np.inf if value > 0 else -np.inf


def thin(values: Floats, buckets: int) -> Indices:
    """The numbers of the values that a plot of this many buckets needs.

    They are the first and the last value, and of each bucket the least, the greatest and the first that is not finite.
    A quarter of the buckets divides the logarithm of the number, so that the beginning of a run keeps its shape on an
    axis of either kind.
    """
    count = len(values)
    if count <= 2 * buckets:
        return np.arange(count)
    linear, logarithmic = np.linspace(0, count, 3 * buckets // 4 + 1), np.geomspace(1, count, buckets // 4)
    edges = np.unique(np.concatenate([linear, logarithmic]).astype(int))
    finite = np.isfinite(values)
    least, greatest = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
    kept = [0, count - 1]
    for start, end in pairwise(edges):
        kept += [start + least[start:end].argmin(), start + greatest[start:end].argmax()]
        kept += [start + finite[start:end].argmin()] * (not finite[start:end].all())
    return np.unique(kept)


def running_mean(values: Floats) -> Floats:
    """The mean of the finite values around each: 1% of all on either side, fewer at the beginning. NaN if none is."""
    numbers = np.arange(len(values))
    half = np.minimum(numbers // 2, int(len(values) * MEAN_SHARE / 2))
    finite = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.where(finite, values, 0), finite))
    start, end = numbers - half, np.minimum(numbers + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[start]) / (counts[end] - counts[start])
