"""The command that predicts what a run costs: python -m jaxlm.plan --config m2_60m

Takes the flags of jaxlm.main. Memory is that of the compiled step; computing it allocates nothing. Times come from a
short run, unless --no-measure. Both are cached. --json prints the numbers, with units in their keys. --check runs the
numerics check instead: it compares what this machine computes with the CPU.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxlm.cli import ArgumentParser, read_shared_flags, run, run_errors
from jaxlm.config import Config
from jaxlm.planner.tables import tables
from jaxlm.terminal import console

WIDTH = 80


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr, if that is a terminal; yields the function that updates it."""
    terminal = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def check(config: Config, as_json: bool) -> None:
    """Runs the numerics check and prints the difference between this machine and the CPU, part by part.

    Raises RunError if a difference is larger than allowed.
    """
    from jaxlm.device import backend, numerics
    from jaxlm.device.mesh import share

    device = backend.start(config.platform, config.deterministic)
    config = share(backend.resolve_run(config, device))
    parts = numerics.check(config, device)
    numerics.store_result(config, device, parts)
    rows = [
        part._asdict() | {"difference": part.difference if math.isfinite(part.difference) else None, "ok": part.ok}
        for part in parts
    ]
    print(json.dumps(rows, indent=2) if as_json else numerics.table(parts))
    numerics.refuse_wrong(parts, device)


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is the command-line arguments. Raises UsageError and RunError."""
    parser = ArgumentParser(
        prog="python -m jaxlm.plan",
        description="Predicts what a run costs. Also takes the flags of jaxlm.main.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        help="measure the speed by a short run, even if it is cached; or never (default: unless it is cached)",
    )
    parser.add_argument("--check", action="store_true", help="check what this machine computes, instead")
    args, rest = parser.parse_known_args(argv)
    flags = read_shared_flags(rest)
    config, workdir = flags.config, flags.workdir
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves the memory to the short run's process

    from jaxlm.planner.report import make_plan  # only now, so that errors in the flags are shown at once
    from jaxlm.planner.sizes import resolve

    with run_errors(workdir):
        config = resolve(config, workdir, flags.overridden, say=lambda line: print(line, file=sys.stderr))
        if args.check:
            check(config, args.json)
            return
        with _progress() as show:
            report = make_plan(config, workdir, args.measure, show)
    if args.json:
        print(json.dumps(report, indent=2))
        return
    terminal = console(width=WIDTH, highlight=False, markup=False, emoji=False)
    for part in tables(report, datetime.now()):
        terminal.print(part)
        terminal.print()


if __name__ == "__main__":
    run(main)
