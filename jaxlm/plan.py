"""The command that says what a run will cost, before its first step: python -m jaxlm.plan --config configs/m2_60m.py

Takes the flags of jaxlm.main. Memory is that of the compiled step, for which nothing is allocated; times are those of a
short run, unless --no-measure; both are remembered. --json prints the numbers, with their
units in the keys. --check holds what the machine computes against the CPU instead.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxlm.cli import ArgumentParser, read_config, run
from jaxlm.config import Config
from jaxlm.errors import RunError
from jaxlm.planner.tables import tables

WIDTH = 80


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr while something is compiled or measured, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def check(config: Config, as_json: bool) -> None:
    """Prints how far what this machine computes lies from the CPU's, part by part.

    Raises:
        RunError: further than is allowed.
    """
    from jaxlm.device import backend, numerics

    device = backend.start(config.platform, config.deterministic)
    config = backend.resolve_run(config, device)
    parts = numerics.check(config, device)
    numerics.remember(config, device, parts)
    as_dicts = [
        part._asdict() | {"difference": part.difference if math.isfinite(part.difference) else None, "ok": part.ok}
        for part in parts
    ]
    print(json.dumps(as_dicts, indent=2) if as_json else numerics.table(parts))
    numerics.refuse_wrong(parts, device)


def main(argv: list[str]) -> None:
    """Runs the command with `argv`, the words after its name. Raises UsageError and RunError."""
    parser = ArgumentParser(
        prog="python -m jaxlm.plan",
        description="Says what a run will cost. Takes the flags of jaxlm.main as well.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        help="run some steps to know the speed, even if it is remembered; or never (default: if it is not remembered)",
    )
    parser.add_argument("--check", action="store_true", help="see whether this machine computes right, instead")
    args, rest = parser.parse_known_args(argv)
    config, workdir = read_config(rest)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the short run's process needs the memory

    import jax

    from jaxlm.planner.report import make_plan  # only now, as in jaxlm.main

    try:
        if args.check:
            check(config, args.json)
            return
        with _progress() as show:
            report = make_plan(config, workdir, args.measure, show)
    except OSError as error:
        raise RunError(f"cannot write to {workdir} ({error.strerror}): make room or choose another place") from error
    except jax.errors.JaxRuntimeError as error:
        raise RunError(f"the device failed ({str(error).splitlines()[0]}): set model.remat and slices") from error
    if args.json:
        print(json.dumps(report, indent=2))
        return
    console = Console(width=WIDTH, highlight=False, markup=False, emoji=False)
    for part in tables(report, datetime.now()):
        console.print(part)
        console.print()


if __name__ == "__main__":
    run(main)
