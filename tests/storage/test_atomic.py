"""Atomic replacement, checked by the order of the system calls."""

import contextlib
import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.storage import atomic
from tests.tiny_run import disk_room, listing


@pytest.fixture
def calls(monkeypatch):
    """The syncs (with the contents of the file) and renames, in order."""
    log = []
    fsync, replace = os.fsync, Path.replace

    def logged_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}") if os.path.isdir("/proc/self/fd") else "?")
        log.append(("sync", path, path.read_bytes() if path.is_file() else None))
        fsync(descriptor)

    def logged_replace(self, target):
        log.append(("rename", self, Path(target)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "replace", logged_replace)
    monkeypatch.setattr(Path, "rename", logged_replace)
    return log


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")


@needs_proc
def test_a_file_is_synced_before_its_rename_and_its_directory_after(tmp_path, calls):
    atomic.write_file(tmp_path / "a.json", b"new")
    (first, temporary, content), (second, source, target), (third, directory, _) = calls
    assert (first, content, second, third) == ("sync", b"new", "rename", "sync")
    assert source == temporary != target == tmp_path / "a.json"
    assert directory == tmp_path
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_temporary_file_is_none_of_the_users(tmp_path):
    for name in ("a.tmp", ".a.tmp", ".a.jaxlm-.tmp", ".a.jaxlm-old.tmp", "a.jaxlm-0123456789abcdef.tmp"):
        (tmp_path / name).write_text("mine")
    before = listing(tmp_path)
    atomic.write_file(tmp_path / "a", b"new")
    assert listing(tmp_path) == before | {str(tmp_path / "a"): b"new"}


KILLED = """
import os, sys
from pathlib import Path
from jaxlm.storage import atomic
with atomic.new_file(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    os._exit(9)
"""


def test_what_a_killed_write_left_is_deleted_by_the_next_of_that_file_only(tmp_path):
    names = ("a", "a.jaxlm-0123456789abcdef.tmp", "[a]")
    for name in names:
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / name], check=False)
    assert len(listing(tmp_path)) == 3
    for number, name in enumerate(names, 1):
        assert {atomic.leftover_of(left) for left in os.listdir(tmp_path)} - {None} == set(names[number - 1 :])
        atomic.write_file(tmp_path / name, b"new")
        assert len(listing(tmp_path)) == 3
    assert set(os.listdir(tmp_path)) == set(names)


def test_a_new_directory_goes_on_failure_with_what_was_created_for_it_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyError), atomic.new_directory(tmp_path / "mine" / "a" / "b"):
        raise KeyError
    assert list(listing(tmp_path)) == [str(tmp_path / "mine")]
    with pytest.raises(KeyError), atomic.new_directory(tmp_path / "mine"):
        raise KeyError
    with pytest.raises(KeyError), atomic.new_directory(tmp_path / "mine" / "a" / "b"):
        (tmp_path / "mine" / "a" / "letter").write_text("of another program")
        raise KeyError
    assert {path.name for path in tmp_path.rglob("*")} == {"mine", "a", "letter"}


def test_a_full_disk_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    atomic.write_file(file, b"old")
    with disk_room(10), pytest.raises(OSError):
        atomic.write_file(file, b"new" * 100)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def fail_fsync(monkeypatch, number, kind):
    """Every fsync of a directory (`kind` is stat.S_ISDIR) or file (stat.S_ISREG) raises an error of that number."""
    fsync = os.fsync

    def failing(descriptor):
        if kind(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)


UNSUPPORTED = ["EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF"]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_directory_that_cannot_be_synced_is_written_all_the_same(tmp_path, monkeypatch, name):
    """As on CIFS, VirtualBox's folders and some FUSE file systems."""
    fail_fsync(monkeypatch, getattr(errno, name), stat.S_ISDIR)
    atomic.write_file(tmp_path / "a.json", b"new")
    atomic.sync_tree(tmp_path)
    assert (tmp_path / "a.json").read_bytes() == b"new"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_directory_that_cannot_be_opened_is_written_all_the_same(tmp_path, monkeypatch, name):
    system_open = os.open

    def failing(path, *arguments, **options):
        if os.path.isdir(path):
            raise OSError(getattr(errno, name), name)
        return system_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", failing)
    atomic.write_file(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"


@pytest.mark.parametrize("name", [*UNSUPPORTED, "EIO", "ENOSPC", "EDQUOT"])
def test_a_file_that_cannot_be_synced_is_not_replaced(tmp_path, monkeypatch, name):
    (tmp_path / "a.json").write_bytes(b"old")
    fail_fsync(monkeypatch, getattr(errno, name), stat.S_ISREG)
    with pytest.raises(OSError) as caught:
        atomic.write_file(tmp_path / "a.json", b"new")
    assert caught.value.errno == getattr(errno, name)
    assert (tmp_path / "a.json").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EACCES"])
def test_a_directory_that_fails_is_an_error(tmp_path, monkeypatch, name):
    fail_fsync(monkeypatch, getattr(errno, name), stat.S_ISDIR)
    with pytest.raises(OSError) as caught:
        atomic.write_file(tmp_path / "a.json", b"new")
    assert caught.value.errno == getattr(errno, name)


@pytest.mark.parametrize(("name", "then_fsync"), [("ENOTSUP", True), ("ENOTTY", True), ("EIO", False)])
def test_a_full_sync_that_the_file_system_lacks_is_a_plain_one(tmp_path, monkeypatch, name, then_fsync):
    """On macOS. The drive reports an error once: a plain fsync after it would succeed."""

    def failing(descriptor, command):
        raise OSError(getattr(errno, name), name)

    synced = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", failing)
    monkeypatch.setattr(os, "fsync", synced.append)
    with contextlib.nullcontext() if then_fsync else pytest.raises(OSError, match="EIO"):
        atomic.sync_descriptor(3)
    assert synced == [3] * then_fsync
