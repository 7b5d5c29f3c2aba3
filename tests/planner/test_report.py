"""The numbers of the plan that follow from a benchmark."""

import dataclasses

import jax
import pytest

from jaxlm.config import Config
from jaxlm.planner import estimate, measure, report
from jaxlm.planner.estimate import Timings
from jaxlm.run.memory import Memory
from jaxlm.storage import user_cache
from jaxlm.units import duration
from tests.test_plan import BENCHMARK

CONFIG = Config(max_steps=10_000)
TIMINGS = Timings(60.0, 4.0, 0.5, 5.0, 0.25, 0.125, 1.0, 30.0)  # a step has twice the tokens of the benchmark's
MEMORY = Memory(1000, 2000, 1000, 1000, 500, 3000)


def test_the_spread_is_that_of_the_measured_steps_in_proportion():
    speed = report._speed(CONFIG, BENCHMARK, TIMINGS)
    assert (speed["step_fast_seconds"], speed["step_slow_seconds"]) == pytest.approx((3.8, 4.4))


def test_the_slow_end_has_the_slow_steps_and_a_share_for_other_programs():
    speed = report._speed(CONFIG, BENCHMARK, TIMINGS)
    dates = report._dates(CONFIG, TIMINGS, speed, {})
    total = estimate.seconds_at(CONFIG, TIMINGS, 10_000)
    assert dates["total_seconds"] == total
    assert dates["total_fast_seconds"] == pytest.approx(total - 10_000 * 0.2)
    assert dates["total_slow_seconds"] == pytest.approx(1.05 * (total + 10_000 * 0.4))


@pytest.mark.parametrize("step", [0, 5000])
def test_a_run_that_resumes_needs_its_start_again(monkeypatch, tmp_path, step):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = jax.devices("cpu")[0]
    user_cache.put("measured", measure.key(CONFIG, device), dataclasses.asdict(BENCHMARK))
    monkeypatch.setattr(measure, "seconds", lambda *_: Timings(7 * 86400.0, *[4.0] * 7))
    done, total = (estimate.seconds_at(CONFIG, measure.seconds(), last) for last in (step, 10_000))
    assert f"{duration(total - done + 7 * 86400)} to go" in report.summary(CONFIG, device, tmp_path, MEMORY, step)


def test_the_planned_seconds_are_those_of_the_cached_benchmark(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = jax.devices("cpu")[0]
    assert report.planned_seconds(CONFIG, device) == {}
    user_cache.put("measured", measure.key(CONFIG, device), dataclasses.asdict(BENCHMARK))
    monkeypatch.setattr(measure, "seconds", lambda *_: TIMINGS)
    total = estimate.seconds_at(CONFIG, TIMINGS, 10_000)
    assert report.planned_seconds(CONFIG, device) == {"step_seconds": 4.0, "total_seconds": total}


def test_what_a_run_has_written_is_room_for_what_it_will_write(monkeypatch, tmp_path):
    usage = report.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(report.shutil, "disk_usage", lambda _: usage._replace(free=0))
    most = report._disk(CONFIG, tmp_path, None, 0)["most_bytes"]
    for size, fits in ((most - 1, False), (most, True)):
        with (tmp_path / "metrics.jsonl").open("wb") as file:
            file.truncate(size)  # gigabytes that take no room
        assert report._disk(CONFIG, tmp_path, None, 0)["fits"] == fits
