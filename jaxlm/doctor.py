"""The command that reports how jaxlm runs on a machine: python -m jaxlm.doctor [--out jaxlm-doctor.txt]

Writes the versions, tests each plugin of jax, runs the numerics check on the platform to be used, and plans the run,
which measures its speed: about two minutes in all. Takes the flags of jaxlm.main; the settings are those of
configs/m2_60m.py unless --config names others. Each part runs in a process of its own, so that the report has the other
parts even if one fails, hangs or crashes the machine.
"""

import os
import platform as machine
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from jaxlm.cli import ArgumentParser, path, read_config, run
from jaxlm.config import Config
from jaxlm.device import plugins
from jaxlm.device.isolated import run_isolated
from jaxlm.errors import UsageError
from jaxlm.storage import atomic

LIMIT = 3600.0  # seconds for a part
LAST_LINES = 200  # of a part that fails: enough for the whole table of the check
DISTRIBUTIONS = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-dtypes")


def main(argv: list[str]) -> None:
    """Runs the command with `argv`, the command-line arguments. Raises UsageError."""
    parser = ArgumentParser(prog="python -m jaxlm.doctor", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--out", type=path, default=Path("jaxlm-doctor.txt"), help="the report (%(default)s)")
    parser.add_argument("--config", default="m2_60m", help="as of jaxlm.main, like --config.NAME=VALUE")
    args, others = parser.parse_known_args(argv)
    flags = [f"--config={args.config}", *others]
    config, _ = read_config(flags)
    if os.path.lexists(args.out):
        raise UsageError(f"{args.out} already exists: move it, or name another file with --out")
    write_report(args.out, _parts(config, flags))
    print(f"The report is in {args.out}")


def write_report(out: Path, parts: Iterable[tuple[str, Callable[[], str]]]) -> None:
    """Writes the report again after each part, which is a title and a function that returns its text.

    Raises UsageError if the file cannot be written.
    """
    report = f"jaxlm doctor, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n"
    _write(out, report)
    for title, compute in parts:
        start = time.monotonic()
        print(f"{title} ...", flush=True)
        text = compute()
        report += f"\n== {title} ({time.monotonic() - start:.0f} s)\n\n{text}\n"
        _write(out, report)


def _write(out: Path, report: str) -> None:
    try:
        atomic.write_file(out, report.encode())
    except OSError as error:
        raise UsageError(f"cannot write {out} ({error.strerror}): name another file with --out") from error


def _parts(config: Config, flags: Sequence[str]) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "Machine and versions", versions
    usable: list[str] = []  # platforms, to which _verify adds
    for plugin in plugins.installed():
        if plugin.platform and config.platform in ("auto", plugin.platform):
            yield f"Plugin {plugin}", partial(_verify, plugin, usable)
    platform = usable[0] if usable else "cpu"
    flags = [*flags, f"--config.platform={platform}"]
    if usable:
        yield f"Numerics check on {platform}", partial(run_part, ["-m", "jaxlm.plan", "--check", *flags])
    yield f"Plan of the run on {platform}, with its speed", partial(run_part, ["-m", "jaxlm.plan", "--measure", *flags])


def versions() -> str:
    """The machine, the system and the installed versions, a line each. Starts no part of jax, which could fail."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    chip = subprocess.run(command, capture_output=True, text=True).stdout.strip() if sys.platform == "darwin" else ""
    return "\n".join(
        [
            f"{machine.platform()}, {chip or machine.machine()}, {os.cpu_count()} cores, {memory / 1e9:.1f} GB",
            f"Python {sys.version}",
            *(f"{name} {plugins.version_of(name) or 'is not installed'}" for name in DISTRIBUTIONS),
            *(f"{plugin} (plugin {plugin.module})" for plugin in plugins.installed()),
        ]
    )


def _verify(plugin: plugins.Plugin, usable: list[str]) -> str:
    """Tests a plugin and adds its platform to `usable` if it passes; returns the result in words."""
    try:
        name = plugins.verify(plugin, refresh=True)
    except plugins.PluginError as error:
        return f"FAILED: {error}"
    usable.append(plugin.platform)
    return f"computes a small model's logits, loss and gradients as the CPU does, as jax's platform {name}"


def run_part(arguments: Sequence[str], limit: float = LIMIT) -> str:
    """Runs Python in a process of its own; returns what it prints, or how it failed and its last lines."""
    lines, failure = run_isolated(arguments, limit)
    return "\n".join([f"FAILED, {failure}", *lines[-LAST_LINES:]] if failure else lines)


if __name__ == "__main__":
    run(main)
