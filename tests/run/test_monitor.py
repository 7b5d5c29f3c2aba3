"""The signs that a run goes wrong, on synthetic curves."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxlm.run.clock import InProgress
from jaxlm.run.monitor import (
    BAND_STEPS,
    LATE_SECONDS,
    TICK_SECONDS,
    UNKNOWN_SECONDS,
    LossMonitor,
    StepMonitor,
    ValidationMonitor,
)

GOLDEN = Path(__file__).parents[1] / "golden_losses"
STEPS = np.arange(1, 50_001)
FALLING = 1.5 + 9.0 * (STEPS + 10) ** -0.3  # as a loss falls without noise


def said_of(losses, first=1):
    """(step, kind) of each sign."""
    monitor = LossMonitor()
    return [(step, kind) for step, loss in enumerate(losses, first) for kind in monitor(step, float(loss))]


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]


def noise(seed, size=50_000):
    return np.random.default_rng(seed).normal(0, 0.05, size)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loss_that_falls_with_noise_is_normal(seed):
    assert said_of(FALLING + noise(seed)) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("curve", "deviation"),
    [(1.3 + 6 * (STEPS + 30) ** -0.35, 0.1), (2.5 + 8 * (STEPS + 100) ** -0.5, 0.06), (FALLING, 0.2)],
)
def test_a_fall_that_noise_does_not_hide_is_no_plateau(curve, deviation, seed):
    assert said_of(curve + np.random.default_rng(seed).normal(0, deviation, len(curve))) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_alone_has_no_spike_and_is_one_plateau(seed):
    assert [kind for _, kind in said_of(3 + noise(seed, 20_000))] == ["plateau"]


def test_a_warm_up_and_the_golden_losses_are_normal():
    curves = [json.loads(file.read_text()) for file in GOLDEN.glob("*.json")]
    assert len(curves) == 9
    curves += [np.concatenate([np.linspace(11, 15, BAND_STEPS), FALLING[:800]])]  # it rises in the warm-up
    assert [said_of(curve) for curve in curves] == [[]] * 10


@pytest.mark.parametrize("first", [1, 40_000])
def test_a_spike_is_told_once(first):
    losses = (FALLING + noise(0))[first - 1 : first + 4999]
    losses[1000:1100] += np.where(np.arange(100) % 3, 2.0, 0.0)  # in and out of its band
    losses[3000] += 2.0
    assert said_of(losses, first) == [(first + 1001, "spike"), (first + 3000, "spike")]


def test_a_loss_that_stays_high_is_one_spike():
    losses = FALLING[:6000] + noise(1, 6000)
    losses[5000:] += 3.0
    assert [(step, kind) for step, kind in said_of(losses) if kind == "spike"] == [(5001, "spike")]


def test_a_plateau_is_told_once_and_again_after_the_loss_has_fallen():
    """Within two windows, of three tenths of the steps done each."""
    flat = lambda level, size: np.full(size, level)  # noqa: E731
    losses = np.concatenate([np.linspace(6, 4, 2000), flat(4, 4000), np.linspace(4, 3, 2000), flat(3, 16_000)])
    signs = said_of(losses + noise(2, len(losses)))
    assert [kind for _, kind in signs] == ["plateau"] * 2
    assert 2500 < signs[0][0] < 6000
    assert 8500 < signs[1][0] < 8000 / 0.7**3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_a_spike_and_leave_the_band_as_it_is(value):
    losses = FALLING[:1500] + noise(3, 1500)
    losses[[50, 700, 1300]] = value
    assert said_of(losses) == [(701, "spike"), (1301, "spike")]
    assert said_of([value] * 3000) == []


def test_equal_losses_have_a_band():
    losses = np.full(400, 2.0)
    losses[300], losses[350] = 2.01, 2.5
    assert said_of(losses) == [(351, "spike")]


def test_the_lines_name_the_numbers_and_what_to_do():
    monitor = LossMonitor()
    for step in range(1, 301):
        monitor(step, 2.0)
    spike = monitor(301, 9.0)["spike"]
    for part in ("step 301", "9.0000", "2.0000", "learning_rate"):
        assert part in spike
    for step in range(302, 2000):
        said = monitor(step, 2.0)
        if said:
            break
    for part in ("more than its noise in 500 steps", "2.0000", "learning_rate"):
        assert part in said["plateau"]


def rises(losses):
    """The evaluations, counted from 1, after which the monitor said something, and what it said last."""
    monitor, said = ValidationMonitor(), {}
    for number, loss in enumerate(losses, 1):
        if text := monitor(10 * number, loss):
            said[number] = text
    return list(said), next(reversed(said.values()), "")


def test_a_validation_loss_that_rises_for_long_is_told_once_for_each_lowest():
    fall, rise = list(np.linspace(5, 3, 20)), list(np.linspace(3.02, 4, 20))
    at, text = rises(fall + rise)
    assert at == [25]
    for part in ("3.0000 at step 200", "by heart"):
        assert part in text
    assert rises(fall + rise + [2.9] + rise)[0] == [25, 46]
    assert rises(fall + [3.5] * 4 + [2.9])[0] == []
    assert rises(fall + [3.02] * 100)[0] == []
    assert rises(fall + [3.02] * 100 + [3.04])[0] == [121]
    assert rises(fall + [math.nan] * 10)[0] == []


def ticks(monitor, count, *in_progress):
    """The numbers of the ticks that said something."""
    return [tick for tick in range(1, count + 1) if monitor.tick(InProgress(*in_progress))]


@pytest.mark.parametrize(("usual", "seconds"), [(0.01, LATE_SECONDS), (3.0, 60.0), (22.0, 440.0), (math.inf, 600.0)])
def test_a_step_that_lasts_many_times_the_usual_is_told_once(usual, seconds):
    monitor = StepMonitor()
    assert ticks(monitor, 1000, "step", 5.0, usual) == [seconds / TICK_SECONDS + 1]  # the first tick finds a new step
    assert ticks(monitor, 1000, "step", 900.0, usual) == [seconds / TICK_SECONDS + 1]


def test_steps_and_pauses_that_end_are_not_late():
    monitor = StepMonitor()
    assert not any(monitor.tick(InProgress("step", float(step), 0.1)) for step in range(1000))
    kinds = ("step", "evaluation", "step", "samples")  # each as long as the first step may take
    assert [ticks(monitor, int(UNKNOWN_SECONDS / TICK_SECONDS), kind, 5.0) for kind in kinds] == [[]] * 4


@pytest.mark.parametrize(
    ("in_progress", "parts"),
    [
        (InProgress("step", 5.0, 2.0), ("This step has lasted 60 s", "usual one 2 s")),
        (InProgress("step", 5.0), ("This step has lasted 600 s:",)),
        (InProgress("samples", 5.0), ("This pause (samples) has lasted 600 s:",)),
    ],
)
def test_the_line_of_what_does_not_end_says_what_to_do(in_progress, parts):
    monitor = StepMonitor()
    (text,) = filter(None, (monitor.tick(in_progress) for _ in range(200)))
    for part in (*parts, "Ctrl-C twice", "last checkpoint"):
        assert part in text
