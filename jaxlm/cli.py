"""What every command shares: its arguments, its one line on failure and its exit status."""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from jaxlm.errors import RequestError, RunError, Stopped


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are RequestErrors, so that they come out as one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}: {self.prog} --help shows what there is")


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a command and ends the process with its status.

    It does not wait for Python to take itself apart: threads of tensorstore that come back into it then abort it.
    """
    code = status(main, sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def status(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a command: 0, or the exit status of what ended it, after its message on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: no text ends a command by being printed
    try:
        main(argv)
    except (RequestError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_status
    except BrokenPipeError:  # as of any program whose reader has gone away
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("stopped: the same command begins again", file=sys.stderr)
        return 130
    return 0
