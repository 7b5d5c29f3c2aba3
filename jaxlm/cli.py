"""What every command shares: its arguments, its one line on failure and its exit status."""

import argparse
import contextlib
import difflib
import glob
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

from jaxlm.config import Config, check_name, from_config_dict
from jaxlm.errors import RunError, Stopped, UsageError


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are RequestErrors, so that they come out as one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}: {self.prog} --help shows what there is")


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
    except (UsageError, RunError) as error:
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


QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


def read_config(argv: list[str]) -> tuple[Config, Path]:
    """The settings that the flags ask for, and the work directory. Raises UsageError as `read_flags`."""
    return read_flags(argv)[:2]


def read_flags(argv: list[str]) -> tuple[Config, Path, bool]:
    """The settings that the flags ask for, the work directory, and whether to begin a run that does not fit.

    Raises:
        UsageError: an unknown flag, a config file that is missing or fails, a setting that is wrong.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    known, others = parser.parse_known_args(argv)
    if not os.path.isfile(known.config):
        raise UsageError(f"there is no config file {known.config}{_nearest_file(known.config)}")
    for setting in re.findall(r"(?m)^--config\.([\w.]+)", "\n".join(others)):
        check_name(setting)
    words = ["jaxlm.main", f"--config={known.config}", *others]
    values = define_flags(words)
    try:
        rest = values(words)
        settings = values.config
    except Exception as error:  # the config file is a program: it can raise anything
        text = str(error) or type(error).__name__
        reason = " ".join((text[text.rindex('File "') :] if "Traceback" in text else text).split())
        raise UsageError(f"{reason} (python -m jaxlm.main --help shows the flags)") from error
    if rest[1:]:
        raise UsageError(f"unexpected argument {rest[1]!r}: flags begin with --")
    return from_config_dict(settings), Path(values.workdir or Path("runs", known.config.stem)), values.force


def define_flags(words: list[str]) -> flags.FlagValues:
    """The flags of this command, not yet parsed; `words` is the whole command line, for the settings in it."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", str(QUICKSTART), "config file; --config.NAME=VALUE changes a setting", values, sys_argv=words
    )
    flags.DEFINE_string("workdir", "", "work directory; empty: runs/NAME-OF-THE-CONFIG", flag_values=values)
    flags.DEFINE_bool("force", False, "begin a run though the machine has not the memory for it", flag_values=values)
    return values


def _nearest_file(file: Path) -> str:
    known = sorted(str(file.parent / name) for name in glob.glob("*.py", root_dir=file.parent))
    nearest = difflib.get_close_matches(str(file), known, n=1)
    if nearest:
        return f": did you mean {nearest[0]}?"
    return f": there is {', '.join(known)}" if known else ": name one with --config"
