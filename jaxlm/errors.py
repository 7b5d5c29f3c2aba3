"""Errors that end a command early with one line and no traceback."""


class _OneLine(Exception):
    """Its text is one line of at most 1,000 characters, whatever names and values the message repeats."""

    def __str__(self) -> str:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())
        return line if len(line) <= 1000 else f"{line[:600]} ... {line[-395:]}"


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
