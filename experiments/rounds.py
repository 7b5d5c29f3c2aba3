"""Formats the rounds of a measurement: the median, the least and the greatest."""

from collections.abc import Iterable
from statistics import median


def median_and_range(values: Iterable[float], form: str = "{:.2f}") -> str:
    """`median [least, greatest]`, or only the median where all three look the same."""
    values = sorted(values)
    low, middle, high = (form.format(value) for value in (values[0], median(values), values[-1]))
    return middle if low == high else f"{middle} [{low}, {high}]"


def ratios(values: Iterable[float], peers: Iterable[float]) -> list[float]:
    """The ratio to the peer in each round."""
    return [value / peer for value, peer in zip(values, peers, strict=True)]
