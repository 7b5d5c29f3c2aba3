"""What a run shows and records."""

import contextlib
import io
import json
import re

import pytest

from jaxlm.run.monitor import Clock, Monitor, metrics_line, samples_block
from jaxlm.units import duration


class Time:
    """A clock that is told what time it is."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def environment(monkeypatch):
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def plain(shown):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_console_line_is_the_users():
    line = metrics_line(100, 8.23412, 3e-4, 2567.4, 8.5 * 3600)
    assert line == "Step    100 | Loss 8.2341 | LR 3.00e-04 | Tokens/s   2567 | ETA 8.5h"


def test_console_line_of_the_last_step():
    line = metrics_line(50_000, 10.5, 2.96e-5, 123_456.0, 0)
    assert line == "Step  50000 | Loss 10.5000 | LR 2.96e-05 | Tokens/s 123456 | ETA 0s"


def test_samples_block_is_the_users():
    texts = [("Once upon a time", "Once upon a time\nthere was  a\tking.\n\nHe"), ("She", "She — 日")]
    assert samples_block(50, texts).split("\n") == [
        "=" * 70,
        "GENERATION SAMPLES (Step 50)",
        "=" * 70,
        "1. Prompt: 'Once upon a time'",
        "   → Once upon a time there was a king. He",
        "2. Prompt: 'She'",
        "   → She — 日",
        "=" * 70,
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0s"),
        (45.4, "45s"),
        (59, "59s"),
        (60, "1.0m"),
        (738, "12.3m"),
        (3599, "60.0m"),
        (3600, "1.0h"),
        (8.5 * 3600, "8.5h"),
        (47.9 * 3600, "47.9h"),
        (48 * 3600, "2.0d"),
        (9.2 * 86400, "9.2d"),
    ],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_a_pause_is_no_part_of_the_step_around_it_nor_of_the_next():
    time = Time()
    clock = Clock(now=time)
    time.passes(2)
    with clock.pause("compilation"):
        time.passes(100)
    time.passes(1)
    assert clock.step_ended() == 3
    with clock.pause("evaluation"):
        time.passes(50)
    time.passes(4)
    assert clock.step_ended() == 4
    time.passes(5)
    assert clock.step_ended() == 5


def test_a_pause_that_fails_is_no_part_of_a_step_either():
    time = Time()
    clock = Clock(now=time)
    with pytest.raises(OSError), clock.pause("checkpoint"):
        time.passes(70)
        raise OSError
    time.passes(1)
    assert clock.step_ended() == 1


def test_time_left_is_the_steps_and_the_pauses_to_come():
    time = Time()
    clock = Clock(now=time)
    for _ in range(3):
        time.passes(2)
        clock.step_ended()
    with clock.pause("evaluation"):
        time.passes(30)
    with clock.pause("evaluation"):
        time.passes(10)
    with clock.pause("samples"):
        time.passes(7)
    assert clock.seconds_left(100, {}) == 200
    assert clock.seconds_left(100, {"evaluation": 3, "samples": 2, "checkpoint": 9}) == 200 + 3 * 10 + 2 * 7
    assert clock.seconds_left(0, {"samples": 1}) == 7


def test_time_left_follows_the_last_steps_but_not_a_single_slow_one():
    time = Time()
    clock = Clock(now=time)
    for seconds in [9] * 200 + [1] * 60 + [500]:
        time.passes(seconds)
        clock.step_ended()
    assert clock.seconds_left(10, {}) == 10


def test_a_night_asleep_does_not_change_what_is_left():
    """Neither in a step nor in a pause, where the clock runs on (a stopped process, a suspended virtual machine)."""
    time = Time()
    clock = Clock(now=time)
    for night in (0, 30_000, 0):
        for _ in range(3):
            time.passes(2)
            clock.step_ended()
        time.passes(2 + night)
        clock.step_ended()
        with clock.pause("evaluation"):
            time.passes(10 + night)
        assert clock.seconds_left(100, {"evaluation": 5}) == 250


def test_seconds_count_all_sessions_and_pauses():
    time = Time()
    clock = Clock(seconds_before=5000, now=time)
    time.passes(3)
    clock.step_ended()
    with clock.pause("samples"):
        time.passes(10)
    time.passes(1)
    assert clock.seconds() == 5014


def test_monitor_goes_on_in_the_files_behind_the_step(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"step": {step}, "was": "here"}}\n' for step in (1, 2, 3)))
    monitor = Monitor(tmp_path, 2, 10)
    monitor.record({"step": 3, "loss": 1.5})
    monitor.samples(3, [("é\n", "é\nb")])
    metrics, samples = ((tmp_path / name).read_text("utf-8") for name in ("metrics.jsonl", "samples.jsonl"))
    monitor.close()
    earlier = [{"step": 1, "was": "here"}, {"step": 2, "was": "here"}]
    assert [json.loads(line) for line in metrics.splitlines()] == [*earlier, {"step": 3, "loss": 1.5}]
    expected = {"step": 3, "prompt": "é\n", "text": "é\nb"}
    assert [json.loads(line) for line in samples.splitlines()] == [*earlier, expected]


def test_piped_only_the_lines_appear(tmp_path, capsys):
    monitor = Monitor(tmp_path, 0, 10)
    long_line = "Step 1 [bold] :smile: 3.5 " + "word " * 60
    monitor.say(long_line)
    monitor.progress(1, 2.5, 1000.0, 60.0, "evaluation at 5")
    monitor.say("second")
    monitor.close()
    assert capsys.readouterr() == (f"{long_line}\nsecond\n", "")


@pytest.mark.parametrize("columns", [80, 100])
def test_on_a_terminal_a_bar_shows_where_the_run_is_and_what_comes_next(tmp_path, environment, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with contextlib.redirect_stdout(Terminal()) as terminal:
        monitor = Monitor(tmp_path, 3, 50_000)
        monitor.progress(1234, 8.2341, 2567.0, 8.5 * 3600, "evaluation at 1300")
        monitor.say("a line above")
        monitor.close()
    shown = [line.rstrip() for line in re.split(r"[\r\n]+", plain(terminal.getvalue()))]
    assert "a line above" in shown
    bar = shown[-2]  # drawn anew before the end takes it away
    for part in ("1234/50000", "8.234", "2,567", "8.5h", "evaluation at 1300"):
        assert part in bar
    assert len(bar) < columns


def test_on_a_terminal_the_bar_is_gone_at_the_end_and_the_cursor_back(tmp_path, environment):
    with contextlib.redirect_stdout(Terminal()) as terminal:
        monitor = Monitor(tmp_path, 0, 10)
        monitor.progress(10, 1.0, 1.0, 1.0, "the end at 10")
        monitor.close()
    shown = terminal.getvalue()
    assert shown.endswith("\x1b[2K")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


@pytest.mark.parametrize("code", ["\x1b]0;title\x07", "\x1bc", "\x00", "\x08", "\x7f", "\x9b2J"])
def test_a_text_cannot_steer_the_terminal(tmp_path, capsys, code):
    monitor = Monitor(tmp_path, 0, 10)
    monitor.samples(5, [("A", f"A{code}b")])
    monitor.close()
    shown = capsys.readouterr().out
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown) is None
    assert json.loads((tmp_path / "samples.jsonl").read_text("utf-8"))["text"] == f"A{code}b"
