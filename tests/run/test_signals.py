"""The stop signals."""

import os
import subprocess
import sys
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

import pytest

ROOM = "[room]"
AGAIN = f"{ROOM}Stopping once the last step is saved; Ctrl-C again to leave at once, without saving\n"
TWICE = AGAIN.replace("again", "twice")


def receive(signals, busy="hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"):
    """A process that receives the signals 0.4 s after each other, while Python is deep in other code."""
    code = f"""
import hashlib, os, signal, threading, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
from jaxlm.run.signals import StopSignals
with StopSignals(lambda: os.write(2, b"{ROOM}")) as signals:
    for index, number in enumerate({[int(number) for number in signals]}):
        threading.Timer(0.2 + 0.4 * index, os.kill, (os.getpid(), number)).start()
    {busy}
    print(signals.number)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40, env=environment)


@pytest.mark.parametrize(
    ("signals", "lines"),
    [
        ((SIGINT, SIGINT), AGAIN),
        ((SIGTERM, SIGINT, SIGINT), TWICE + AGAIN),
        ((SIGINT, SIGTERM, SIGINT), AGAIN),
    ],
)
def test_ctrl_c_twice_leaves_at_once_though_python_is_deep_in_other_code(signals, lines):
    """For example in a compilation, where the handlers of the main thread have to wait."""
    done = receive(signals)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", lines + ROOM)


@pytest.mark.parametrize(
    ("signals", "lines"),
    [
        ((SIGTERM, SIGINT), TWICE + AGAIN),
        pytest.param((SIGTERM, SIGTERM), TWICE, marks=pytest.mark.slow),
        pytest.param((SIGINT, SIGTERM), AGAIN, marks=pytest.mark.slow),
        ((SIGHUP,), TWICE),
    ],
)
def test_other_signals_never_leave_without_saving(signals, lines):
    done = receive(signals, "time.sleep(2)")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{int(signals[0])}\n", lines)
