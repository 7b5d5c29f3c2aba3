"""Atomic replacement of files and folders: the data reach the disk before the name points to them."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF}


def sync(path: Path) -> None:
    """Flushes the file or directory at `path` to the disk; nothing if the file system cannot flush a directory.

    Raises OSError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            sync_descriptor(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not path.is_dir():
            raise


def sync_descriptor(descriptor: int) -> None:
    """As `sync`, for an open file."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync leaves the data in the drive's cache
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED:  # network file systems support fsync only
                raise
    os.fsync(descriptor)


def sync_tree(directory: Path) -> None:
    """As `sync`, for a directory and everything in it."""
    for path in [*directory.rglob("*"), directory]:
        with contextlib.suppress(FileNotFoundError):  # removed after it was listed
            sync(path)


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file atomically: after a crash it holds the old bytes or the new. Raises OSError."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a path to write the new contents of `path` to; it replaces `path` at the end. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """As `new_file`, for a folder. The old folder is deleted just before it is replaced."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_tree(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
