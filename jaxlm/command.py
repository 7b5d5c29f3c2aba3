"""What every command shares: its arguments, its one line on failure and its exit status."""

import argparse
import io
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from jaxlm.errors import RequestError, RunError, Stopped


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are RequestErrors, so that they come out as one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}: {self.prog} --help shows what there is")


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a command and ends the process: 0, or the exit status of what ended it, after its message on stderr."""
    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: no text ends a command by being printed
    status = 0
    try:
        main(sys.argv[1:])
    except (RequestError, RunError, Stopped) as end:
        print(end if isinstance(end, Stopped) else f"error: {end}", file=sys.stderr)
        status = end.exit_status
    except KeyboardInterrupt:
        print("stopped: the same command begins again", file=sys.stderr)
        status = 130
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)  # nothing is left to put in order
    sys.exit(status)


def _stop(number: int, frame: Any) -> NoReturn:
    """Ends a command as Ctrl-C does, so that nothing half done is left."""
    raise Stopped("stopped: the same command begins again", number)
