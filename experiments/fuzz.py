"""Fuzzing: random and damaged inputs must be accepted, or refused in one line without a trace on the disk.

    python -m experiments.fuzz --cases 10000 --seed 0

Each case calls the function that reads the input, under `jaxlm.cli.status` as in every command. A case fails if it
ends in anything but success or a UsageError or RunError, each in one line, takes too long, leaves a file that is none
of PRODUCTS, changes files although it is refused, or is accepted but inconsistent (see the `_take_` functions). The
command that repeats a failure is printed.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import traceback
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from experiments import fuzz_belongings, fuzz_cases
from experiments.cleanup import temporary_folder
from jaxlm import cli
from jaxlm.errors import RunError, UsageError

KINDS = fuzz_cases.KINDS | fuzz_belongings.KINDS
PACKAGES = ("jaxlm", "experiments")
PRODUCTS = re.compile(  # the names of files that a command writes
    r"(train|val)\.bin|meta\.json|metrics\.jsonl(\.damaged)?|model\.safetensors|README\.md|merges\.txt"
    r"|(vocab|(generation_)?config|tokenizer(_config)?)\.json|.+\.(gguf|Modelfile|html)"
)
MAX_SECONDS, MAX_CHARACTERS = 10.0, 5_000  # of a case; of a message, as a path may have 4,096
EXAMPLES = 5  # of each failure


def try_case(seed: int, kind: str, number: int | str) -> tuple[str, str, str]:
    """Makes a case from the arguments alone, in a directory two levels deep, and runs it: verdict, reason, details."""
    with tempfile.TemporaryDirectory() as outer, contextlib.chdir(tempfile.mkdtemp(dir=outer)):
        call, refusal, details = KINDS[kind](Random(f"{seed} {kind} {number}")), None, ""

        def take(argv: list[str]) -> None:
            nonlocal refusal, details
            try:
                call()
            except (UsageError, RunError) as error:
                refusal, details = error, f"{call}\n{traceback.format_exc()}"
                raise

        before, console, screen = _listing(), io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8")
        signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
        try:
            with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(console):
                cli.status(take, [])
        except (Exception, TimeLimit) as error:
            return "failed", f"{type(error).__name__} {_place(error)}", f"{call}\n{traceback.format_exc()}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        after, lines = _listing(), console.getvalue().splitlines()
    left = {path for path in after.keys() - before.keys() if after[path] is not True}
    if strange := [path for path in left if not PRODUCTS.fullmatch(Path(path).name)]:
        return "failed", f"a file is left: {_shape(min(strange))}", details
    if refusal is None:
        return "accepted", "", details
    if after != before:
        return "failed", f"refused but files changed {_place(refusal)}", details
    messages = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if lines[-len(messages) :] != [f"error: {message}" for message in messages] or not all(map(_is_normal, messages)):
        return "failed", f"a message that is not one line of normal length {_place(refusal)}", details
    return "refused", _shape(messages[-1]), details


class TimeLimit(BaseException):
    """A case takes too long."""


def _is_normal(message: str) -> bool:
    return 0 < len(message.strip()) <= MAX_CHARACTERS


def _stop(*_: object) -> None:
    raise TimeLimit


def _place(error: BaseException) -> str:
    """The innermost line of jaxlm or this file in the traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent.name in PACKAGES]
    return f"in {Path(frames[-1].filename).name}, {frames[-1].name}: {frames[-1].line}"


def _shape(text: str) -> str:
    """A message with its values replaced, so that refusals for the same reason are counted together."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|[\d.]+|[^\x20-\x7e]+|\S{40,}", "_", text[:2000])[:100]


def _listing() -> dict[str, Any]:
    """Every path, with the contents of files."""
    return {str(path): path.read_bytes() if path.is_file() else path.is_dir() for path in Path("..").rglob("*")}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of all kinds (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", metavar="KIND:NUMBER", help="try this case and show all of it")
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.only:
        tried = [try_case(args.seed, *name.split(":")) for name in args.only]
        print(*(f"{details}{verdict}: {reason}" for verdict, reason, details in tried), sep="\n\n")
        return int("failed" in {verdict for verdict, _, _ in tried})
    cases: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    names = [(list(KINDS)[index % len(KINDS)], index // len(KINDS)) for index in range(args.cases)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        verdicts = pool.map(try_case, itertools.repeat(args.seed), *zip(*names, strict=True), chunksize=100)
        for (kind, number), (verdict, reason, _) in zip(names, verdicts, strict=True):
            cases[kind, verdict][reason].append(f"{kind}:{number}")
    print("kind           |    cases | accepted |  refused |   failed | messages")
    for kind in KINDS:
        counts = [sum(map(len, cases[kind, verdict].values())) for verdict in ("accepted", "refused", "failed")]
        columns = (sum(counts), *counts, len(cases[kind, "refused"]))
        print(f"{kind:<14} | {' | '.join(f'{count:8,}' for count in columns)}")
    for reason, cases_of_it in (failures := [item for kind in KINDS for item in cases[kind, "failed"].items()]):
        print(f"\n{reason}, {len(cases_of_it)} times")
        print(f"  python -m experiments.fuzz --seed {args.seed} --only {' --only '.join(cases_of_it[:EXAMPLES])}")
    return int(bool(failures))


if __name__ == "__main__":
    with temporary_folder("fuzz"):
        sys.exit(main(sys.argv[1:]))
