"""Readable sizes, durations, dates and trends."""

import math
from collections.abc import Sequence
from datetime import datetime, timedelta

_BARS = "▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """Seconds in the unit that fits: 45s, 12.3m, 8.5h, 9.2d."""
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "m"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds:.0f}s" if unit == "s" else f"{seconds / divisor:.1f}{unit}"
    return f"{seconds / 86400:.1f}d"


def gb(size: float) -> str:
    """Bytes in GB (10^9), or in MB (10^6) below 0.1 GB."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def seconds_text(seconds: float) -> str:
    """Seconds with three digits below a minute, else as `duration`."""
    return f"{seconds:.3g} s" if seconds < 60 else duration(seconds)


def date_text(now: datetime, seconds: float) -> str:
    """The date and time `seconds` after `now`."""
    try:
        return (now + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M")
    except OverflowError:
        return "a year beyond 9999"


def end_text(now: datetime, seconds: float) -> str:
    """When `seconds` after `now` is: 07:40 within 12 hours, Sat 07:40 within six days, else `date_text`."""
    if seconds < 12 * 3600:
        return date_text(now, seconds)[-5:]
    return f"{now + timedelta(seconds=seconds):%a %H:%M}" if seconds < 6 * 86400 else date_text(now, seconds)


def sparkline(values: Sequence[float]) -> str:
    """A character for each value, from ▁ at the least to █ at the largest; a space for one that is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((value - low) / step)] if math.isfinite(value) else " " for value in values)
