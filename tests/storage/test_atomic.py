"""Atomic replacement, checked by the order of the system calls."""

import os
from pathlib import Path

import pytest

from jaxlm.storage import atomic
from tests.tiny_run import disk_room


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


@needs_proc
def test_a_folder_is_synced_before_its_rename(tmp_path, calls):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_bytes(b"")
    with atomic.new_folder(tmp_path / "folder") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_bytes(b"new")
    order = [(kind, path.relative_to(tmp_path).as_posix()) for kind, path, _ in calls]
    before = order[: order.index(("rename", "folder.tmp"))]
    assert {("sync", f"folder.tmp{path}") for path in ("/deep/file", "/deep", "")} <= set(before)
    assert order[-1] == ("sync", ".")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted((tmp_path / "folder").rglob("*"))] == [
        "folder/deep",
        "folder/deep/file",
    ]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    atomic.write_file(file, b"old")
    with disk_room(10), pytest.raises(OSError):
        atomic.write_file(file, b"new" * 100)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
