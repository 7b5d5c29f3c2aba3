"""The lock on a directory, among real processes."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from jaxlm.errors import UsageError
from jaxlm.storage.lock import is_written, only_writer
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


def test_a_second_process_is_told_the_pid_and_host_of_the_holder(holder, tmp_path):
    for _ in range(2):
        with pytest.raises(UsageError) as caught, only_writer(tmp_path):
            pass
        assert is_one_line(caught.value)
        assert f"process {holder.pid} on {socket.gethostname()}" in str(caught.value)


def test_who_only_looks_is_told_whether_the_holder_runs(holder, tmp_path):
    assert is_written(tmp_path)
    with pytest.raises(UsageError), only_writer(tmp_path):  # the look has taken nothing away
        pass
    holder.kill()
    holder.wait()
    assert (tmp_path / "lock").exists()
    assert not is_written(tmp_path)
    assert not is_written(tmp_path / "none")


def test_a_lock_is_not_deleted_by_the_holder_of_another(tmp_path):
    """The directory of the first run is renamed, and a second run starts in its old place."""
    (tmp_path / "run").mkdir()
    with only_writer(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        second = only_writer(tmp_path / "run")
        second.__enter__()
    with pytest.raises(UsageError, match="is in use"), only_writer(tmp_path / "run"):
        pass
    second.__exit__(None, None, None)
    assert not (tmp_path / "run/lock").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_is_free(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    with only_writer(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_a_leftover_file_is_replaced_by_the_pid_and_host_of_the_holder(tmp_path):
    (tmp_path / "lock").write_text('{"pid": 1, "host": "another"}')
    with only_writer(tmp_path):
        assert json.loads((tmp_path / "lock").read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}


def test_an_exception_releases_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path):
        raise ZeroDivisionError
    with only_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_deleted_between_open_and_flock_is_created_again(tmp_path, monkeypatch):
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


def test_a_child_process_does_not_inherit_the_lock(tmp_path):
    with only_writer(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    with only_writer(tmp_path):
        assert child.poll() is None
    child.communicate()


@pytest.mark.parametrize("left", ["", "not json", "[]", '{"pid": 1}'])
def test_a_lock_without_a_readable_pid_still_holds(holder, tmp_path, left):
    (tmp_path / "lock").write_text(left)
    with pytest.raises(UsageError, match="another process"), only_writer(tmp_path):
        pass


WITHOUT_LOCKS = """
import fcntl, os
def flock(file, operation):
    raise OSError({number}, os.strerror({number}))
fcntl.flock = flock
"""


@pytest.fixture(params=["ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL"])
def unlockable(request, tmp_path, monkeypatch):
    """A directory on a file system without locks, for this process and for the code that is returned."""
    code = WITHOUT_LOCKS.format(number=getattr(errno, request.param))
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # restored after the test
    exec(code)
    return code


def test_without_locks_the_pid_in_the_file_is_the_lock(tmp_path, unlockable):
    command = [sys.executable, "-c", unlockable + HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UsageError) as caught, only_writer(tmp_path):
        pass
    assert is_one_line(caught.value)
    assert f"process {holder.pid} on {socket.gethostname()}" in str(caught.value)
    assert f"if it has ended, move {tmp_path / 'lock'} away" in str(caught.value)
    holder.kill()
    holder.communicate()
    with only_writer(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["", "not json", "[]", '{"pid": 1}', '{"pid": 1%s, "host": "HOST"}' % ("0" * 30)])
def test_without_locks_a_file_that_names_no_process_locks_nobody_out(tmp_path, unlockable, left):
    (tmp_path / "lock").write_text(left.replace("HOST", socket.gethostname()))
    with only_writer(tmp_path):
        pass


def test_without_locks_the_pid_of_this_process_is_one_of_an_earlier_boot(tmp_path, unlockable):
    """In a container each start may have the same pid."""
    (tmp_path / "lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    with only_writer(tmp_path):
        pass


@pytest.mark.parametrize(
    ("pid", "host", "answer"),
    [(999_999, "another", ProcessLookupError), (999_999, socket.gethostname(), PermissionError)],
)
def test_without_locks_a_process_that_may_run_holds(tmp_path, unlockable, monkeypatch, pid, host, answer):
    """One on another host, and one of another user."""

    def kill(pid, number):
        raise answer

    monkeypatch.setattr(os, "kill", kill)
    (tmp_path / "lock").write_text(json.dumps({"pid": pid, "host": host}))
    with pytest.raises(UsageError, match=f"process {pid} on {host}"), only_writer(tmp_path):
        pass
    assert json.loads((tmp_path / "lock").read_text()) == {"pid": pid, "host": host}


def test_a_disk_that_fails_is_not_taken_for_one_without_locks(tmp_path, monkeypatch):
    def failing(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), only_writer(tmp_path):
        pass


def test_a_file_that_another_process_replaced_before_it_was_locked_is_opened_again(tmp_path, monkeypatch):
    path, flock, calls = tmp_path / "lock", fcntl.flock, []

    def flock_after_a_replacement(*arguments):
        if not calls:
            path.unlink()
            path.touch()
        calls.append(arguments)
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock_after_a_replacement)
    with only_writer(tmp_path), pytest.raises(UsageError, match="in use"), only_writer(tmp_path):
        pass
