"""Atomic replacement of files: the data reach the disk before the name points to them."""

import contextlib
import errno
import fcntl
import itertools
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF}


def sync(path: Path) -> None:
    """Flushes a file or directory to the disk. Does nothing if the file system cannot flush a directory.

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
    """Yields a path to write the new contents of `path` to; it replaces `path` at the end. Raises OSError.

    Its name is random, so that it is no file of the user's. Leftovers of killed writes are deleted.
    """
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.jaxlm-{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Deletes what killed writes of `path` left beside it. Raises OSError."""
    for file in path.parent.iterdir():
        if leftover_of(file.name) == path.name:
            file.unlink(missing_ok=True)


def leftover_of(name: str) -> str | None:
    """The file whose killed write left the file `name`; None if `name` is no leftover."""
    match = re.fullmatch(r"\.(.+)\.jaxlm-[0-9a-f]{16}\.tmp", name, re.DOTALL)
    return match and match[1]


def unused(path: Path) -> Path:
    """`path`, or with the first of the endings -2, -3, ... that no file has."""
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], others) if not os.path.lexists(each))


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[None]:
    """Creates the directory `path` and its parents; on failure, deletes those that it created and that are empty.

    Raises OSError, ENOENT if one of them is a link to what is missing.
    """
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            raise FileNotFoundError(errno.ENOENT, f"the target of the link {each} is missing", os.readlink(each))
    created = [each for each in (path, *path.parents) if not os.path.lexists(each)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in created:
            with contextlib.suppress(OSError):  # not empty: another program uses it
                each.rmdir()
        raise
