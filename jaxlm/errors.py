"""Errors that end a command early with one line and no traceback, and advice that fits the cause."""

import errno
import os

_DISK_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "choose a file system that holds larger files",
    errno.EROFS: "make the disk writable, or choose another place",
    errno.EACCES: "check the permissions, or choose another place",
    errno.EPERM: "check the permissions, or choose another place",
    errno.ENOENT: "check that the folder is still there",
    errno.ENOTDIR: "check that each part of the path is a folder",
    errno.ESTALE: "check that the disk is still mounted",
    errno.ENODEV: "check that the disk is still connected",
    errno.EEXIST: "move away what has its name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs",
    errno.EIO: "the disk may be failing: copy what matters, and choose another",
}


def disk_error(error: BaseException) -> OSError | None:
    """The error of the disk in an exception; some libraries give it as text only."""
    if isinstance(error, OSError) and error.errno:
        return error
    reasons = {os.strerror(number): number for number in _DISK_ADVICE}
    reason = max((reason for reason in reasons if reason in str(error)), key=len, default=None)
    return OSError(reasons[reason], reason) if reason else None


def disk_advice(error: BaseException) -> str:
    """What a person can do about an error of the disk, as the end of a sentence."""
    cause = disk_error(error)
    return _DISK_ADVICE.get((cause and cause.errno) or 0, "check the disk, or choose another place")


LONGEST_LINE = 1000  # characters of an error


class _OneLine(Exception):
    """Its text is one line of at most LONGEST_LINE characters, whatever names and values the message repeats."""

    def __str__(self) -> str:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())
        return line if len(line) <= LONGEST_LINE else f"{line[:600]} ... {line[-395:]}"


class UsageError(_OneLine):
    """The request is wrong (a flag, a setting, data that does not fit): the command ends with status 2."""

    exit_status = 2


class RunError(_OneLine):
    """A valid request failed (disk, device, diverged training): the command ends with status 1."""

    exit_status = 1


class Stopped(Exception):
    """A signal stopped the run after it saved: the command ends with status 128 plus the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number


class CorruptCheckpointError(Exception):
    """A checkpoint cannot be read, or is not what was saved; the message is the reason."""
