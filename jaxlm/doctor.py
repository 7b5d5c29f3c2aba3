"""The command whose report tells how jaxlm does on a machine: python -m jaxlm.doctor [--out jaxlm-doctor.txt]

Made for a first day on a Mac. Writes down the versions, tries each plugin of jax, checks that the one to be used
computes what the CPU does, and plans the run, which measures its speed: about two minutes in all. Takes the flags of
jaxlm.main; the settings are those of configs/m2_60m.py unless --config names others. Each part has a process of its
own, so that a part that fails, hangs or takes the machine down leaves a report of the others.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from jaxlm.cli import ArgumentParser, read_config, run
from jaxlm.config import Config
from jaxlm.device import plugins
from jaxlm.device.isolated import run_isolated
from jaxlm.errors import UsageError
from jaxlm.storage import atomic

LIMIT = 3600.0  # seconds for one part
LAST_LINES = 200  # of a part that fails: the check's whole table too
DISTRIBUTIONS = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-dtypes")


def main(argv: list[str]) -> None:
    """Runs the command with `argv`, the words after its name. Raises UsageError."""
    parser = ArgumentParser(prog="python -m jaxlm.doctor", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--out", type=Path, default=Path("jaxlm-doctor.txt"), help="the report (%(default)s)")
    parser.add_argument("--config", default="m2_60m", help="as of jaxlm.main, like --config.NAME=VALUE")
    args, others = parser.parse_known_args(argv)
    flags = [f"--config={args.config}", *others]
    config, _ = read_config(flags)
    if os.path.lexists(args.out):
        raise UsageError(f"{args.out} is there already: move it, or name another file with --out")
    write_report(args.out, _parts(config, flags))
    print(f"The report is in {args.out}")


def write_report(out: Path, parts: Iterator[tuple[str, Callable[[], str]]]) -> None:
    """Writes down what each part, a title and what gives its text, has to say, the file whole after each.

    Raises:
        UsageError: the file cannot be written.
    """
    report = f"jaxlm doctor, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n"
    _write(out, report)
    for title, tell in parts:
        began = time.monotonic()
        print(f"{title} ...", flush=True)
        text = tell()
        report += f"\n== {title} ({time.monotonic() - began:.0f} s)\n\n{text}\n"
        _write(out, report)


def _write(out: Path, report: str) -> None:
    try:
        atomic.write_file(out, report.encode())
    except OSError as error:
        raise UsageError(f"cannot write {out} ({error.strerror}): name another file with --out") from error


def _parts(config: Config, flags: Sequence[str]) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "Machine and versions", versions
    fit: list[str] = []
    for plugin in plugins.installed():
        if plugin.platform and config.platform in ("auto", plugin.platform):
            yield f"Plugin {plugin}", partial(_try, plugin, fit)
    chosen = fit[0] if fit else "cpu"
    flags = [*flags, f"--config.platform={chosen}"]
    if fit:
        yield f"What {chosen} computes", partial(told, ["-m", "jaxlm.plan", "--check", *flags])
    yield f"Plan of the run on {chosen}, with its speed", partial(told, ["-m", "jaxlm.plan", "--measure", *flags])


def versions() -> str:
    """The machine, the system, and what is installed, a line each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = ["sysctl", "-n", "machdep.cpu.brand_string"]
    chip = subprocess.run(words, capture_output=True, text=True).stdout.strip() if sys.platform == "darwin" else ""
    lines = [
        f"{platform.platform()}, {chip or platform.machine()}, {os.cpu_count()} cores, {memory / 1e9:.1f} GB",
        f"Python {sys.version}",
    ]
    lines += [f"{name} {plugins.version_of(name) or 'is not installed'}" for name in DISTRIBUTIONS]
    return "\n".join(lines + [f"{plugin} (plugin {plugin.module})" for plugin in plugins.installed()])


def _try(plugin: plugins.Plugin, fit: list[str]) -> str:
    """Says how a plugin did; the platform of a fit one is added to `fit`."""
    try:
        name = plugins.try_out(plugin, anew=True)
    except plugins.PluginError as error:
        return f"UNFIT: {error}"
    fit.append(plugin.platform)
    return f"computes a small model's logits, loss and gradients as NumPy does, as jax's platform {name}"


def told(arguments: Sequence[str], limit: float = LIMIT) -> str:
    """What a Python of its own prints; where it fails, that it does and the end of it."""
    lines, failure = run_isolated(arguments, limit)
    return "\n".join([f"FAILED, {failure}", *lines[-LAST_LINES:]] if failure else lines)


if __name__ == "__main__":
    run(main)
