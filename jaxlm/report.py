"""Shows a run as a page: python -m jaxlm.report --workdir runs/quickstart [runs/another ...] [--watch] [--png FILE]

Writes report.html in the first work directory, or --out: one file that holds everything, with plots, samples, plan,
checkpoints and settings. Several runs are drawn into the same plots. The run may be in progress.
"""

import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxlm.cli import ArgumentParser, path, run
from jaxlm.errors import RunError, UsageError, disk_advice
from jaxlm.pages.page import MARK, render
from jaxlm.pages.picture import require_matplotlib, write_loss
from jaxlm.pages.run import read_run
from jaxlm.storage import atomic
from jaxlm.terminal import printable

WATCH_SECONDS = 20.0  # between two pages
WATCH_SHARE = 0.05  # of a core, at most, that --watch takes from the run


def main(argv: list[str]) -> None:
    """Runs the command with the arguments `argv`. Raises UsageError and RunError."""
    parser = ArgumentParser(prog="python -m jaxlm.report", description="Shows runs as a page or as a picture.")
    parser.add_argument("--workdir", type=path, required=True, nargs="+", help="the work directories of the runs")
    parser.add_argument("--out", type=path, help="the page (report.html in the first work directory)")
    parser.add_argument("--png", type=path, help="write this picture of the loss instead; *.svg is one too")
    parser.add_argument("--watch", action="store_true", help="update the page until the run ends")
    args = parser.parse_args(argv)
    if args.png and (args.watch or args.out):
        raise UsageError("--png writes a picture and no page: omit --out and --watch")
    if args.png:
        require_matplotlib()
    out = args.png or args.out or args.workdir[0] / "report.html"
    runs = _read(args.workdir)
    _check_output(out)
    try:
        if args.png:
            write_loss(out, runs)
            _say(out, runs)
        else:
            _write_pages(out, args.workdir, runs, args.watch)
    except OSError as error:
        raise RunError(f"cannot write {out} ({error.strerror or error}): {disk_advice(error)}") from error


def _read(workdirs: list[Path]) -> list[dict[str, Any]]:
    """The runs, by the names of their folders, or by their paths where those are equal."""
    runs = [read_run(workdir, len(workdirs)) for workdir in workdirs]
    if len({each["name"] for each in runs}) < len(runs):
        runs = [each | {"name": each["workdir"]} for each in runs]
    return runs


def _say(out: Path, runs: list[dict[str, Any]], more: str = "") -> None:
    shown = ", ".join(f"{each['step']:,} steps of {each['name']}" for each in runs)
    print(f"{printable(str(out))} shows {shown}{more}", flush=True)


def _check_output(out: Path) -> None:
    """Raises UsageError if `out` is a file that this command did not write."""
    if os.path.lexists(out) and not (out.is_file() and MARK in out.read_bytes()):
        raise UsageError(f"{out} exists and was not written by jaxlm.report: move it away, or name another file")


def _write_pages(out: Path, workdirs: list[Path], runs: list[dict[str, Any]], watch: bool) -> None:
    """Writes the page, and with `watch` again until every run has ended."""
    said = False
    while True:
        start = time.monotonic()
        follows = watch and any(each["state"] == "running" for each in runs)
        written = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        atomic.write_file(out, render(runs, written, WATCH_SECONDS if follows else None))
        if not follows:
            _say(out, runs)
            return
        if not said:
            _say(out, runs, "; it is updated until the run ends (Ctrl-C stops that)")
            said = True
        try:
            time.sleep(max(WATCH_SECONDS, (time.monotonic() - start) / WATCH_SHARE))
        except KeyboardInterrupt:
            atomic.write_file(out, render(runs, written, None))  # an open page need not load again
            raise
        runs = _read(workdirs)


if __name__ == "__main__":
    run(main)
