"""Writing that a power cut cannot undo by half, seen in the order of the calls that reach the disk."""

import os
from pathlib import Path

import pytest

from jaxlm.storage import atomic
from tests.tiny_run import disk_room


@pytest.fixture
def calls(monkeypatch):
    """What was synced (with what the disk then holds of it) and renamed, in order."""
    log = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}") if os.path.isdir("/proc/self/fd") else "?")
        log.append(("sync", path, path.read_bytes() if path.is_file() else None))
        fsync(descriptor)

    def watched_replace(self, target):
        log.append(("rename", self, Path(target)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    monkeypatch.setattr(Path, "rename", watched_replace)
    return log


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")


@needs_proc
def test_a_file_is_on_the_disk_before_its_name_is_and_the_name_before_the_return(tmp_path, calls):
    atomic.write_file(tmp_path / "a.json", b"new")
    (synced, beside, held), (renamed, source, target), (last, directory, _) = calls
    assert (synced, held, renamed, last) == ("sync", b"new", "rename", "sync")
    assert source == beside != target == tmp_path / "a.json"
    assert directory == tmp_path
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@needs_proc
def test_a_folder_is_on_the_disk_before_it_takes_the_place(tmp_path, calls):
    beside = tmp_path / "beside"
    (beside / "deep").mkdir(parents=True)
    (beside / "deep" / "file").write_bytes(b"held")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_bytes(b"")
    atomic.replace_folder(beside, tmp_path / "folder")
    order = [(kind, path.relative_to(tmp_path).as_posix()) for kind, path, _ in calls]
    before = order[: order.index(("rename", "beside"))]
    assert {("sync", "beside/deep/file"), ("sync", "beside/deep"), ("sync", "beside")} <= set(before)
    assert order[-1] == ("sync", ".")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted((tmp_path / "folder").rglob("*"))] == [
        "folder/deep",
        "folder/deep/file",
    ]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    atomic.write_file(file, b"old")
    with disk_room(10), pytest.raises(OSError):
        atomic.write_file(file, b"new" * 100)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
