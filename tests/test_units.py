"""Readable sizes, durations and dates."""

from datetime import datetime

import pytest

from jaxlm.units import date_text, duration, gb, seconds_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (60, "1.0m"),
        (738, "12.3m"),
        (3600, "1.0h"),
        (30_600, "8.5h"),
        (172_799, "48.0h"),
        (172_800, "2.0d"),
        (794_880, "9.2d"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 MB"), (99_900_000, "99.9 MB"), (100_000_000, "0.10 GB"), (1_234_567_890_123, "1,234.57 GB")],
)
def test_gb(size, text):
    assert gb(size) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.01234, "0.0123 s"), (26.18, "26.2 s"), (90, "1.5m")])
def test_seconds_text(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(86_400, "2025-01-01 12:00"), (1e15, "a year beyond 9999")])
def test_date_text(seconds, text):
    assert date_text(datetime(2024, 12, 31, 12), seconds) == text
