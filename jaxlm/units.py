"""Readable sizes, durations and dates."""

from datetime import datetime, timedelta


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
