"""What every command shares: its arguments, its one line on failure and its exit status."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from jaxlm.errors import RequestError, RunError, Stopped


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are RequestErrors, so that they come out as one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}: {self.prog} --help shows what there is")


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a command and ends the process: 0, or the exit status of what ended it, after its message on stderr."""
    try:
        main(sys.argv[1:])
    except (RequestError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
