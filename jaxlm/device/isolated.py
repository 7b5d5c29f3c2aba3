"""Runs what may hang or crash in a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence


def run_isolated(
    arguments: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
) -> tuple[list[str], str]:
    """Runs this Python in a new process and stops it, with all that it started, after `limit` seconds.

    Args:
        arguments: of Python, such as -m MODULE.
        limit: in seconds.
        environment: variables to set. The others are inherited, but for JAX_PLATFORMS.

    Returns:
        The lines that it printed on stdout and stderr, and how it failed, in words; empty if it ended with status 0.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    path = {"PYTHONPATH": os.pathsep.join(directory for directory in sys.path if directory)}
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=inherited | path | dict(environment or {}),
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
            with contextlib.suppress(OSError):  # no process is left; macOS refuses to signal a group of zombies
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # the process may be stuck in the driver
                child.wait(1)
        output.seek(0)
        return output.read().decode(errors="replace").splitlines(), failure
