"""The two kinds of error a person sees: one line each, no traceback."""


class RequestError(Exception):
    """What was asked for is wrong (a flag, a setting, data that does not fit): the command ends with status 2."""

    exit_status = 2


class RunError(Exception):
    """A proper request failed on the way (disk, device, diverged training): the command ends with status 1."""

    exit_status = 1
