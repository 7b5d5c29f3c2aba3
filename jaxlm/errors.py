"""What ends a command early: one line each, no traceback."""


class _OneLine(Exception):
    """Its text is one line of a screenful at most, whatever names and values it repeats."""

    def __str__(self) -> str:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())
        return line if len(line) <= 1000 else f"{line[:600]} ... {line[-395:]}"


class UsageError(_OneLine):
    """What was asked for is wrong (a flag, a setting, data that does not fit): the command ends with status 2."""

    exit_status = 2


class RunError(_OneLine):
    """A proper request failed on the way (disk, device, diverged training): the command ends with status 1."""

    exit_status = 1


class Stopped(Exception):
    """A signal asked the run to stop, and it has saved: the command ends with status 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number


class CorruptCheckpointError(Exception):
    """A checkpoint cannot be read, or is not what was saved; the message is the reason."""
