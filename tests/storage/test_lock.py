"""One writer for a directory, among real processes."""

import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from jaxlm.errors import UsageError
from jaxlm.storage.lock import only_writer
from tests.tiny_run import is_one_line

HOLD = """
import sys
from pathlib import Path
from jaxlm.storage.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_refused_with_the_pid_and_host_of_the_first(holder, tmp_path):
    for _ in range(2):
        with pytest.raises(UsageError) as caught, only_writer(tmp_path):
            pass
        assert is_one_line(caught.value)
        assert f"process {holder.pid} on {socket.gethostname()}" in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_is_taken_over(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    with only_writer(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_it_is_free_again_afterwards_whatever_happened_inside(tmp_path):
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path):
        raise ZeroDivisionError
    with only_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_removed_between_opening_and_locking_it_is_taken_anew(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def remove_first(file, operation):
        if not removed:
            removed.append((tmp_path / "lock").unlink())
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with only_writer(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
        monkeypatch.undo()
        with pytest.raises(UsageError), only_writer(tmp_path):
            pass


def test_a_child_that_outlives_the_holder_does_not_hold_it(tmp_path):
    with only_writer(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    with only_writer(tmp_path):
        assert child.poll() is None
    child.communicate()


@pytest.mark.parametrize("left", ["", "not json", "[]", '{"pid": 1}'])
def test_a_lock_file_that_says_nothing_useful_refuses_all_the_same(holder, tmp_path, left):
    (tmp_path / "lock").write_text(left)
    with pytest.raises(UsageError, match="another process"), only_writer(tmp_path):
        pass
