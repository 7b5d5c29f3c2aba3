"""What every command shares: config files and flags, one-line errors and exit statuses."""

import argparse
import contextlib
import dataclasses
import difflib
import glob
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxlm.config import OLD_NAMES, Config, check_name, from_config_dict
from jaxlm.errors import RunError, Stopped, UsageError, disk_advice

_PACKAGE = Path(__file__).parent
PRESETS = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), _PACKAGE)
QUICKSTART = PRESETS / "quickstart.py"
FLAGS_OF_MAIN = tuple(  # declared by `define_flags`
    f"--{name}" for name in ("config", "workdir", "force", "show", "coordinator", "processes", "process")
)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that raises UsageError instead of ending the process.

    For an unknown flag, the error names the nearest. With `parse_known_args`, that may be one of jaxlm.main, which
    then reports it.
    """

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._refuse_unknown(args, passes_on=False)
        return super().parse_args(args, namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._refuse_unknown(args, passes_on=True)
        return super().parse_known_args(args, namespace)

    def _refuse_unknown(self, args: Sequence[str], passes_on: bool) -> None:
        """Raises UsageError for an unknown flag, before the parser misses a required one that it may stand for."""
        flags = list(self._option_string_actions)
        for word in (word.partition("=")[0] for word in args if re.match("--(?!config\\.)", word)):
            known = word in flags or (self.allow_abbrev and any(flag.startswith(word) for flag in flags))
            nearest = _nearest(word, flags + list(FLAGS_OF_MAIN) * passes_on)
            if not known and nearest in flags:
                raise _unknown_flag(word, nearest, self.prog)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}: {self.prog} --help shows the flags")


def _nearest(word: str, flags: Sequence[str]) -> str:
    """The flag whose name is nearest to that of an unknown one; "" if none is near."""
    names = difflib.get_close_matches(word[2:], [flag[2:] for flag in flags if flag.startswith("--")], 1)
    return f"--{names[0]}" if names else ""


def _unknown_flag(word: str, nearest: str, command: str) -> UsageError:
    advice = f"did you mean {nearest}? " if nearest else ""
    return UsageError(f"there is no flag {word}: {advice}{command} --help shows the flags")


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a command and ends the process with its exit status.

    It uses `os._exit`: tensorstore's threads abort the process if they call Python while the interpreter shuts down.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it is closed
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    code = status(main, sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader may have closed it
            stream.flush()
    os._exit(code)


def status(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a command and returns its exit status. Expected errors become one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: printing never fails for a character
    try:
        main(argv)
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_status
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("stopped: run the same command to start again", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


@contextlib.contextmanager
def run_errors(workdir: Path) -> Iterator[None]:
    """Turns errors of the disk and of the device into a RunError that says what to do."""
    import jax  # only now, so that errors in the flags need no jax

    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {workdir} ({error.strerror or error}): {disk_advice(error)}") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise RunError("out of memory: set model.remat and microbatch_chunks, or a smaller batch_size") from error
        reason = str(error).splitlines()[0]
        raise RunError(f"the device failed ({reason}): the same command starts again or resumes") from error


def expand_home(text: str) -> str:
    """`text` with the home directory for a ~ or ~USER at its beginning.

    Raises UsageError if there is no such home directory.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UsageError(f"there is no home directory for {text}: write it in full, or ./{text} for that name itself")
    return expanded


def expand_homes(paths: str) -> str:
    """`expand_home` for each of several paths, separated by commas."""
    return re.sub(r"((?:^|(?<!\\),)\s*)(~[^,/]*)", lambda match: match[1] + expand_home(match[2]), paths)


def path(text: str) -> Path:
    """The path that a person wrote: the type of a flag. Raises UsageError as `expand_home`."""
    return Path(expand_home(text))


def find_config(name: str) -> Path:
    """The config file of that path, or the shipped preset of that name, such as `m2_60m`.

    Raises UsageError if there is neither. It names the nearest.
    """
    if os.path.isfile(name):
        return Path(name)
    presets = [path.stem for path in sorted(PRESETS.glob("*.py")) if path.stem != "__init__"]
    if name in presets:
        return PRESETS / f"{name}.py"
    folder = Path(name).parent
    files = [str(folder / file) for file in sorted(glob.glob("*.py", root_dir=folder))]
    nearest = difflib.get_close_matches(name, files, 1) or difflib.get_close_matches(Path(name).stem, presets, 1)
    advice = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(files + presets)}"
    raise UsageError(f"there is no config file or preset {name}: {advice}")


class Flags(NamedTuple):
    """What the flags of jaxlm.main choose."""

    config: Config
    workdir: Path
    force: bool  # start a run that does not fit
    show: bool  # print the settings instead
    trackio: str  # the project to log the run to; empty: none
    coordinator: str  # HOST:PORT of the first process; empty: as the environment says
    processes: int  # of this run; 0: as the environment says
    process: int  # the number of this one; -1: as the environment says
    config_file: Path
    overridden: list[str]  # settings that have their value from a flag


def read_config(argv: list[str]) -> tuple[Config, Path]:
    """The settings and the work directory. Raises UsageError as `read_shared_flags`."""
    flags = read_shared_flags(argv)
    return flags.config, flags.workdir


def read_shared_flags(argv: list[str]) -> Flags:
    """Reads the flags of jaxlm.main for another command. Raises UsageError as `read_flags`, and for `--show`."""
    flags = read_flags(argv)
    if flags.show:
        raise UsageError("--show is a flag of python -m jaxlm.main only")
    return flags


def read_flags(argv: list[str]) -> Flags:
    """Reads the flags of jaxlm.main and the config file.

    Raises UsageError for an unknown flag, a config file that is missing or fails, or a wrong setting.
    """
    parser = ArgumentParser(prog="python -m jaxlm.main", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-config", type=expand_home, default=str(QUICKSTART))
    for name in ("corpus", "exclude"):  # absl takes one word for a flag
        flag = f"-config.data.{name}"
        parser.add_argument(f"-{flag}", flag, dest=name, type=expand_homes, nargs="+", action="extend")
    args, others = parser.parse_known_args(argv)
    config_file = find_config(args.config)
    overridden = re.findall(r"(?m)^--?(?:no)?config\.([\w.]+)", "\n".join(argv))
    for setting in overridden:
        check_name(setting)
    words = ["jaxlm.main", f"--config={config_file}", *others]
    values = define_flags(words)
    try:
        rest = values(words)
        settings = values.config
    except flags.UnrecognizedFlagError as error:
        word = f"--{error.flagname}"
        raise _unknown_flag(word, _nearest(word, FLAGS_OF_MAIN), "python -m jaxlm.main") from error
    except Exception as error:  # the config file is a program: it can raise anything
        text = str(error) or type(error).__name__
        reason = " ".join((text[text.rindex('File "') :] if "Traceback" in text else text).split())
        raise UsageError(f"{reason} (python -m jaxlm.main --help shows the flags)") from error
    if rest[1:]:
        several_paths = "; several paths follow --config.data.corpus after a blank, not after =" * bool(args.corpus)
        raise UsageError(f"unexpected argument {rest[1]!r}: flags begin with --{several_paths}")
    settings = _without_old_names_of(overridden, settings)
    several = {name: value for name in ("corpus", "exclude") if (value := getattr(args, name)) is not None}
    if several and isinstance(settings, dict) and isinstance(settings.setdefault("data", {}), dict):
        settings["data"] |= several
    workdir = path(values.workdir) if values.workdir else Path("runs", config_file.stem)
    config = _with_homes(from_config_dict(settings))
    group = values.coordinator, values.processes, values.process
    return Flags(config, workdir, values.force, values.show, values.trackio, *group, config_file, overridden)


def _with_homes(config: Config) -> Config:
    """The config with home directories in the settings that are paths, and an absolute `init_from`, which is fixed."""
    corpus, directory = expand_homes(config.data.corpus), expand_home(config.data.dir)
    data = dataclasses.replace(config.data, corpus=corpus, dir=directory)
    init_from = config.init_from and str(path(config.init_from).absolute())
    return dataclasses.replace(config, data=data, init_from=init_from)


def _without_old_names_of(overridden: list[str], settings: Any) -> Any:
    """The settings of an old config file without the old names of those that a flag overrides."""
    if not isinstance(settings, ConfigDict):
        return settings  # which is refused later
    kept = settings.to_dict()
    for old, new in OLD_NAMES.items():
        group, _, name = old.rpartition(".")
        if new in overridden:
            (kept[group] if group else kept).pop(name, None)
    return kept


def define_flags(words: list[str]) -> flags.FlagValues:
    """The flags of jaxlm.main, not yet parsed. `words` is the whole command line, which the settings are read from."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        str(QUICKSTART),
        "config file, or name of a shipped preset; --config.NAME=VALUE changes a setting",
        values,
        sys_argv=words,
    )
    flags.DEFINE_string("workdir", "", "work directory; empty: runs/NAME-OF-THE-CONFIG", flag_values=values)
    flags.DEFINE_string("trackio", "", "log the run to this trackio project; empty: no", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of the first of several processes", flag_values=values)
    flags.DEFINE_integer("processes", 0, "how many processes train this run together", 0, flag_values=values)
    flags.DEFINE_integer("process", -1, "the number of this process, from 0", -1, flag_values=values)
    flags.DEFINE_bool("force", False, "start a run even if it does not fit in memory", flag_values=values)
    flags.DEFINE_bool("show", False, "print every setting and what set it, and start nothing", flag_values=values)
    return values
