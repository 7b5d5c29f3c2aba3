"""A process of its own for what may hang or crash."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence


def run_isolated(
    arguments: Sequence[str], limit: float, changes: Mapping[str, str] | None = None
) -> tuple[list[str], str]:
    """Runs this Python with `arguments`, such as -m MODULE, for `limit` seconds at most, and with no choice of platform
    in its environment but for what `changes` adds to that.

    Returns:
        The lines that it printed, on stdout and stderr, and how it failed, in words; empty for status 0.
    """
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **(changes or {})}
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        try:
            status = child.wait(limit)
            failure = f"ended with status {status}" if status else ""
            if status < 0:
                failure = f"crashes: its process ended by {signal.Signals(-status).name}"
        except subprocess.TimeoutExpired:
            failure = f"hangs: no end after {limit:g} s"
        finally:
            with contextlib.suppress(OSError):  # none is left; on macOS a group of zombies may not be signalled
                os.killpg(child.pid, signal.SIGKILL)  # and what it started
            with contextlib.suppress(subprocess.TimeoutExpired):  # the system may be stuck in the driver
                child.wait(1)
        output.seek(0)
        return output.read().decode(errors="replace").splitlines(), failure
