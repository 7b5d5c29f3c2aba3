"""The stop signals."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_second_ctrl_c_leaves_at_once_though_python_is_deep_in_other_code():
    """For example in a compilation, where the handlers of the main thread have to wait."""
    code = """
import hashlib, os, threading
from jaxlm.run.signals import StopSignals
with StopSignals(lambda: os.write(1, b"left")):
    for seconds in (0.2, 0.6):
        threading.Timer(seconds, os.kill, (os.getpid(), 2)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40, env=environment)
    assert done.returncode == 130
    assert done.stdout == "left"
    assert done.stderr == "Stopping after this step; Ctrl-C again to leave at once, without saving\n"
