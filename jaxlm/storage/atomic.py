"""Writing that a power cut cannot undo by half: data reach the disk before a name points to them."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Returns once the disk holds what the file or directory at `path` holds. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """As `sync`, for an open file."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: there fsync leaves the data in the drive's own cache
        with contextlib.suppress(OSError):  # network file systems know fsync only
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def sync_tree(directory: Path) -> None:
    """As `sync`, for a directory and everything in it."""
    for path in [*directory.rglob("*"), directory]:
        with contextlib.suppress(FileNotFoundError):  # gone since it was listed
            sync(path)


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file as a whole: whatever happens, it holds the old bytes or the new. Raises OSError."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(data)
        replace_file(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def replace_file(beside: Path, path: Path) -> None:
    """Moves the finished file `beside` into the place of `path`. Raises OSError."""
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def replace_folder(beside: Path, folder: Path) -> None:
    """Moves the finished folder `beside` into the place of `folder`. Raises OSError."""
    sync_tree(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    sync(folder.parent)
