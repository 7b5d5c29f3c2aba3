"""Programs in experiments/ leave no process and no temporary folder behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from experiments.cleanup import temporary_folder

ROOT = Path(__file__).parents[2]
PROGRAM = """
import signal, subprocess, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
from experiments.cleanup import temporary_folder
parent = '''
import subprocess, sys, tempfile, time
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(child.pid, tempfile.mkdtemp(), flush=True)
time.sleep(60)
'''
with temporary_folder("test") as folder:
    (folder / "file").write_text("text")
    print(folder, flush=True)
    if sys.argv[1] == "run":
        subprocess.run([sys.executable, "-c", parent])
    child = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    print(child.stdout.readline(), flush=True)
    raise ZeroDivisionError
"""


def is_running(process):
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def test_a_program_that_is_stopped_or_fails_leaves_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    stops = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, None
    programs = [subprocess.Popen([sys.executable, "-c", PROGRAM, "run" if stop else "fail"], **pipes) for stop in stops]
    for stop, program in zip(stops, programs, strict=True):
        folder, (child, inner) = Path(program.stdout.readline().strip()), program.stdout.readline().split()
        assert folder.parent == tmp_path
        assert Path(inner).parent == folder
        if stop:
            assert is_running(int(child))
            program.send_signal(stop)
        _, errors = program.communicate(timeout=20)
        assert program.returncode == (128 + stop if stop else 1)
        assert ("ZeroDivisionError" in errors) == (not stop)
        assert not is_running(int(child))
    assert not list(tmp_path.iterdir())


def test_a_killed_child_still_has_its_status():
    """So that what started it, such as a pool of processes, sees its end."""
    code = """
import subprocess
from experiments.cleanup import kill_children
child = subprocess.Popen(["sleep", "60"])
kill_children()
print(child.wait())
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment).stdout == b"-9\n"


def test_the_signals_and_the_environment_are_as_before_afterwards():
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers], dict(os.environ)
    with temporary_folder("test") as folder:
        assert os.environ["TMPDIR"] == str(folder)
    assert ([signal.getsignal(number) for number in numbers], dict(os.environ)) == before
    assert not folder.exists()


def test_every_program_with_processes_or_temporary_folders_cleans_up():
    sources = {file.name: file.read_text() for file in (ROOT / "experiments").rglob("*.py")}
    programs = {name for name, text in sources.items() if "__main__" in text and name != "fault_child.py"}
    starts = {name for name in programs if re.search(r"\b(subprocess|tempfile|Process\w*)\b", sources[name])}
    assert "startup.py" in starts
    assert {name for name in starts if "from experiments.cleanup import" not in sources[name]} == set()
