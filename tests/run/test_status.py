"""The state of a run on a terminal, read back from the screen."""

import contextlib
import math
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

import jaxlm.terminal
from jaxlm.config import Config
from jaxlm.prepare import prepare
from jaxlm.run.console import Console
from jaxlm.run.events import (
    MessageEvent,
    NotSavedEvent,
    PauseEvent,
    PauseStartEvent,
    SavedEvent,
    SavingEvent,
    StoppingEvent,
)
from jaxlm.run.status import TREND, Status, Trend
from tests.run.test_console import environment, step_event
from tests.screen import pseudo_terminal
from tests.tiny_run import workplace

__all__ = ["environment"]
CONFIG = Config(max_steps=50_000, batch_size=1, grad_accum_steps=1)


class Clock:
    now = datetime(2026, 11, 27, 8, 0).timestamp()  # a Friday

    def __call__(self):
        return self.now


def text(status, columns=200):
    return [str(line) for line in status.lines(columns)]


def test_the_lines_tell_the_state():
    clock = Clock()
    status = Status(CONFIG, 1000, lambda: 3_410_000_000, clock)
    assert text(status) == [f"starting  {'─' * 30}  1,000/50,000", ""]
    status(PauseStartEvent("compilation"))
    assert text(status)[0].startswith("compiling ")
    status(PauseEvent("compilation", 9.0))
    for step in (20_000, 20_001, 20_002):
        speed = {20_000: 900.0, 20_001: 2567.0, 20_002: 2600.0}[step]
        status(step_event(step, loss=3.0, tokens=1024 * step, seconds=0.5 * step, tokens_per_second=speed))
    clock.now += 90
    progress, numbers = text(status)
    bar = "━" * 12 + "─" * 18
    assert progress == f"training  {bar}  20,002/50,000  8.5h left  ends 16:30"
    assert numbers == "loss 3.000 ▁▁▁  2,567 tokens/s, mean 2,048  unsaved for 1.5m  3.41 GB"
    status(SavingEvent(20_002))
    assert text(status)[0].startswith("training, saving  ━")
    status(SavedEvent(20_002))
    clock.now += 3600
    progress, numbers = text(status)
    assert progress == f"training  {bar}  20,002/50,000  7.5h left  ends 16:30"
    assert "  saved 1.0h ago  " in numbers
    status(SavingEvent(20_003))
    status(NotSavedEvent(20_003, "the disk is full"))
    for event, doing in (
        (PauseStartEvent("evaluation"), "evaluating"),
        (PauseStartEvent("samples"), "sampling"),
        (PauseStartEvent("checkpoint"), "saving"),
        (StoppingEvent(20_003, 2), "stopping"),
    ):
        status(event)
        assert text(status)[0].startswith(f"{doing}  ━")
    status(step_event(50_000, seconds_left=5 * 86400.0))
    status(PauseEvent("checkpoint", 1.0))
    assert text(status)[0].startswith(f"finishing  {'━' * 30}  50,000/50,000  5.0d left  ends Wed 09:01")


def test_the_trend_covers_at_least_the_later_half_with_means_of_equally_many_steps():
    trend, losses = Trend(), [10 - 9 * step / 1000 for step in range(1000)]
    for count, loss in enumerate(losses, 1):
        trend.add(loss)
        assert len(str(trend)) == min(count, TREND)
    assert list(str(trend)) == sorted(str(trend), reverse=True)  # it falls
    assert str(trend)[0] == "█"
    assert str(trend)[-1] == "▁"
    flat = Trend()
    for loss in (2.0, math.nan, 2.0, math.inf):
        flat.add(loss)
    assert str(flat) == "▁ ▁ "


@contextlib.contextmanager
def console_on(terminal):
    """A console on a terminal after 59 steps, lines and a save."""
    with contextlib.redirect_stdout(terminal.file):
        console = Console(CONFIG, 0, lambda: 3_410_000_000)
        for step in range(1, 60):
            console(step_event(step, tokens=1024 * step, seconds=0.5 * step))
        console(MessageEvent("a line"))
        print("what another library prints")
        console(SavedEvent(59))
        console(PauseStartEvent("evaluation"))
        try:
            yield console
        finally:
            console.close()


@pytest.mark.parametrize("columns", [120, 80, 60, 40, 14])
def test_the_state_fits_below_the_lines(environment, columns):
    with pseudo_terminal(columns) as terminal:
        with console_on(terminal):
            terminal.wait_for(lambda: is_drawn(terminal))
            *above, progress, numbers = terminal.lines
            everything = "".join(line.ljust(columns) for line in above)
            for line in ("a line", "what another library prints", "  → Saved checkpoint: checkpoints/59"):
                assert line in everything
            assert "\n".join(terminal.lines).count("evaluating") == 1
            parts = ["evaluating", "59/50,000", "8.5h left", "ends ", "──────"]
            assert [part in progress for part in parts] == [columns >= width for width in (0, 22, 33, 45, 55)]
            parts = ["loss 8.23", "2,567 tokens/s, mean 2,048", "saved 0s ago", "3.41 GB"]
            assert [part in numbers for part in parts] == [columns >= width for width in (0, 52, 66, 75)]
            assert (terminal.cursor.x, terminal.cursor.y, terminal.cursor.hidden) == (0, len(above), True)
        terminal.wait_for(lambda: not terminal.cursor.hidden)
        assert terminal.lines == above
        assert (terminal.cursor.x, terminal.cursor.y) == (0, len(above))


@pytest.mark.parametrize("reflow", [True, False])
def test_a_resized_terminal_has_the_state_once(environment, monkeypatch, reflow):
    monkeypatch.setattr(jaxlm.terminal, "DRAW_SECONDS", 1000)  # none between the two halves of `resize`
    with pseudo_terminal(100, 100) as terminal, console_on(terminal) as console:
        for columns in (30, 45, 100, 20):
            terminal.wait_for(lambda: is_drawn(terminal))
            terminal.resize(columns, reflow)
            console(MessageEvent(f"{columns} columns"))
            terminal.wait_for(lambda: is_drawn(terminal) and terminal.lines[-3] == f"{columns} columns")  # noqa: B023
            shown = "\n".join(terminal.lines)
            assert (shown.count("evaluating"), shown.count("loss")) == (1, 1)


def is_drawn(terminal):
    """The cursor stands before the two lines of the state, which are the last."""
    lines, row = terminal.lines, terminal.cursor.y
    return terminal.cursor.x == 0 and len(lines) == row + 2 and lines[row].startswith("evaluating")


def test_a_terminal_of_one_or_two_rows_has_one_line_of_state(environment):
    for rows in (1, 2):
        with pseudo_terminal(80, rows) as terminal, console_on(terminal):
            terminal.wait_for(lambda: "evaluating" in "".join(terminal.lines[-1:]))
            assert "loss" not in "".join(terminal.lines)


def test_without_colours_the_state_is_the_same(environment, monkeypatch):
    screens = []
    for variable in ("UNUSED", "NO_COLOR"):
        monkeypatch.setenv(variable, "1")
        with pseudo_terminal(80) as terminal, console_on(terminal):
            terminal.wait_for(lambda: "evaluating" in "\n".join(terminal.lines))
            screens.append(terminal.lines)
        assert bool(re.search(rb"\x1b\[[0-9;]*3[0-7]m", terminal.received)) == (variable == "UNUSED")
    assert screens[0] == screens[1]


def test_a_dumb_terminal_gets_the_lines_only(environment, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with pseudo_terminal(80) as terminal:
        with console_on(terminal) as console:
            console.make_room()
        terminal.wait_for(lambda: "Saved" in "\n".join(terminal.lines))
    assert b"\x1b" not in terminal.received
    assert b"evaluating" not in terminal.received


def train_on(terminal, command, place):
    """Starts a shell command on the terminal, as its session's leader."""
    environment = os.environ | {"TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {"COMMAND": f"{sys.executable} -m jaxlm.main --config tiny.py --workdir run"}
    leader = "import os, sys; os.login_tty(0); os.execvp('sh', ['sh', '-c', sys.argv[1]])"
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.descriptor)
    return subprocess.Popen([sys.executable, "-c", leader, command], cwd=place, env=environment, **streams)


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_a_clean_terminal(tmp_path_factory):
    with workplace(tmp_path_factory) as place, pseudo_terminal(100, 200) as terminal:
        prepare("text.txt", Path("tokens"), 300, 0.1)
        process = train_on(terminal, "exec $COMMAND --config.max_steps=100000 --config.save_interval=1000", place)
        terminal.wait_for(lambda: "compiling" in "\n".join(terminal.lines))
        terminal.wait_for(lambda: "tokens/s, mean" in "\n".join(terminal.lines))
        terminal.type("\x03")
        assert process.wait(60) == 130
        terminal.wait_for(lambda: "the same command resumes" in terminal.lines[-1])
        (message,) = [line for line in terminal.lines if "Ctrl-C" in line]
        assert message.endswith("Stopping once the last step is saved; Ctrl-C again to leave at once, without saving")
        for word in ("tokens/s, mean", "━", "─"):
            assert word not in "\n".join(terminal.lines)
        assert not terminal.cursor.hidden


@pytest.mark.slow
def test_logs_through_tee_and_nohup_have_the_lines_only(tmp_path_factory):
    with workplace(tmp_path_factory) as place:
        prepare("text.txt", Path("tokens"), 300, 0.1)
        for command, log in (("$COMMAND 2>&1 | tee log", "log"), ("nohup $COMMAND", "nohup.out")):
            with pseudo_terminal(100, 200) as terminal:
                assert train_on(terminal, command, place).wait(120) == 0
                written = (place / log).read_text()
                if log == "log":
                    terminal.wait_for(lambda: "Done:" in "\n".join(terminal.lines))
                    assert terminal.lines == [line.rstrip() for line in written.splitlines()]
            assert not re.search(r"[\x00-\x09\x0b-\x1f]|tokens/s|━|─", written)
            assert "Done: 12 steps" in written
            (place / "run").rename(place / f"run of {log}")
