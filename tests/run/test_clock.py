"""The clock of a run."""

import pytest

from jaxlm.run.clock import Clock


class Time:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def test_a_pause_is_not_part_of_a_step():
    time = Time()
    clock = Clock(now=time)
    time.passes(2)
    with clock.pause("compilation"):
        time.passes(100)
    time.passes(1)
    assert clock.step_ended(clock.seconds()) == 3
    with clock.pause("evaluation"):
        time.passes(50)
    time.passes(4)
    assert clock.step_ended(clock.seconds()) == 4
    time.passes(5)
    assert clock.step_ended(clock.seconds()) == 5


def test_a_pause_that_raises_is_not_part_of_a_step():
    time = Time()
    clock = Clock(now=time)
    with pytest.raises(OSError), clock.pause("checkpoint"):
        time.passes(70)
        raise OSError
    time.passes(1)
    assert clock.step_ended(clock.seconds()) == 1


def test_time_left_is_that_of_the_remaining_steps_and_pauses():
    time = Time()
    clock = Clock(now=time)
    for _ in range(3):
        time.passes(2)
        clock.step_ended(clock.seconds())
    with clock.pause("evaluation"):
        time.passes(30)
    with clock.pause("evaluation"):
        time.passes(10)
    with clock.pause("samples"):
        time.passes(7)
    assert clock.seconds_left(100, {}) == 200
    assert clock.seconds_left(100, {"evaluation": 3, "samples": 2, "checkpoint": 9}) == 200 + 3 * 10 + 2 * 7
    assert clock.seconds_left(0, {"samples": 1}) == 7


def test_time_left_follows_the_last_steps_but_ignores_one_slow_step():
    time = Time()
    clock = Clock(now=time)
    for seconds in [9] * 200 + [1] * 60 + [500]:
        time.passes(seconds)
        clock.step_ended(clock.seconds())
    assert clock.seconds_left(10, {}) == 10


def test_a_suspended_process_does_not_change_the_time_left():
    """In a step or in a pause; the clock may run meanwhile (a stopped process, a suspended virtual machine)."""
    time = Time()
    clock = Clock(now=time)
    for gap in (0, 30_000, 0):
        for _ in range(3):
            time.passes(2)
            clock.step_ended(clock.seconds())
        time.passes(2 + gap)
        clock.step_ended(clock.seconds())
        with clock.pause("evaluation"):
            time.passes(10 + gap)
        assert clock.seconds_left(100, {"evaluation": 5}) == 250


def test_seconds_include_all_sessions_and_pauses():
    time = Time()
    clock = Clock(seconds_before=5000, now=time)
    time.passes(3)
    clock.step_ended(clock.seconds())
    with clock.pause("samples"):
        time.passes(10)
    time.passes(1)
    assert clock.seconds() == 5014


def test_time_left_follows_the_last_five_pauses_of_a_kind():
    time = Time()
    clock = Clock(now=time)
    for seconds in [1] * 9 + [7] * 3 + [1] * 2:
        with clock.pause("checkpoint"):
            time.passes(seconds)
    assert clock.seconds_left(0, {"checkpoint": 1}) == 7


def test_time_left_follows_the_last_fifty_steps():
    time = Time()
    clock = Clock(now=time)
    for seconds in [1] * 60 + [9] * 26 + [1] * 24:
        time.passes(seconds)
        clock.step_ended(clock.seconds())
    assert clock.seconds_left(1, {}) == 9
