"""Atomic replacement of files and folders: the data reach the disk before the name points to them."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Flushes the file or directory at `path` to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """As `sync`, for an open file."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync leaves the data in the drive's cache
        with contextlib.suppress(OSError):  # network file systems support fsync only
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def sync_tree(directory: Path) -> None:
    """As `sync`, for a directory and everything in it."""
    for path in [*directory.rglob("*"), directory]:
        with contextlib.suppress(FileNotFoundError):  # removed after it was listed
            sync(path)


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file atomically: after a crash it holds the old bytes or the new. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        replace_file(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(temporary: Path, path: Path) -> None:
    """Moves the finished file `temporary` to `path`. Raises OSError."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Moves the finished folder `temporary` to `folder`, whose old contents are deleted. Raises OSError."""
    sync_tree(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync(folder.parent)
