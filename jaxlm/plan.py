"""The command that says what a run will cost, before its first step: python -m jaxlm.plan --config configs/m2_60m.py

Takes the flags of jaxlm.main. Memory is that of the compiled step, for which nothing is allocated; times are those of a
short run, in less than two minutes, unless --no-measure; both are remembered. --json prints the numbers, with their
units in the keys.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxlm.command import ArgumentParser, run
from jaxlm.main import read_config
from jaxlm.plan_tables import tables

WIDTH = 80


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr while something is compiled or measured, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def main(argv: list[str]) -> None:
    """Runs the command with `argv`, the words after its name. Raises RequestError and RunError."""
    parser = ArgumentParser(
        prog="python -m jaxlm.plan",
        description="Says what a run will cost. Takes the flags of jaxlm.main as well.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument(
        "--measure", action=argparse.BooleanOptionalAction, default=True, help="run some steps to know the speed"
    )
    args, rest = parser.parse_known_args(argv)
    config, workdir = read_config(rest)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the short run's process needs the memory

    from jaxlm.planning import make_plan  # only now, as in jaxlm.main

    with _progress() as show:
        report = make_plan(config, workdir, args.measure, show)
    if args.json:
        print(json.dumps(report, indent=2))
        return
    console = Console(width=WIDTH, highlight=False, markup=False, emoji=False)
    for part in tables(report, datetime.now()):
        console.print(part)
        console.print()


if __name__ == "__main__":
    run(main)
