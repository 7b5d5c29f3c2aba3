"""How a command ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.cli import ArgumentParser, status
from jaxlm.errors import RunError, Stopped, UsageError


@pytest.mark.parametrize(
    ("error", "its_status"),
    [
        (UsageError("no such file"), 2),
        (RunError("the disk is full"), 1),
        (Stopped("stopped after step 3", 15), 143),
        (Stopped("stopped after step 3", 2), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_is_one_line_and_a_status(error, its_status, capsys):
    def main(argv):
        raise error

    assert status(main, []) == its_status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(f"{error}\n")
    assert captured.err.count("\n") == 1


def test_success_is_status_0_and_silence(capsys):
    seen = []
    assert status(seen.append, ["--flag", "value"]) == 0
    assert seen == [["--flag", "value"]]
    assert capsys.readouterr() == ("", "")


def test_a_defect_keeps_its_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        status(main, [])


def command(code, *argv, **options):
    """A process whose command is this code, with what it wrote."""
    program = f"from jaxlm.cli import run\nimport os, sys, time\ndef main(argv):\n    {code}\nrun(main)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    options = {"capture_output": True, "text": True, "timeout": 20, "env": environment} | options
    return subprocess.run([sys.executable, "-c", program, *argv], **options)


def test_the_process_ends_with_the_status_and_all_that_was_written():
    done = command("print(argv, 'x' * 9999)", "a", "b")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"['a', 'b'] {'x' * 9999}\n"


def test_the_process_ends_with_the_status_of_a_defect():
    done = command("1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_ctrl_c_is_one_line():
    heed = "signal.signal(2, signal.default_int_handler)"  # a process in the background begins without it
    done = command(f"import signal; {heed}; os.kill(os.getpid(), 2); time.sleep(20)")
    assert (done.returncode, done.stderr.count("\n")) == (130, 1)


def test_a_reader_that_has_gone_away_gets_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    done = command("print('x' * 100)", capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode in (0, 128 + 13)  # where it is seen while writing
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("argv", "named"),
    [(["--coun", "1"], "--coun"), (["--count", "x"], "--count"), (["stray"], "stray"), ([], "--need")],
)
def test_wrong_arguments_are_a_request_error_of_one_line_that_names_them(argv, named, capsys):
    parser = ArgumentParser(prog="command", allow_abbrev=False)
    parser.add_argument("--count", type=int)
    parser.add_argument("--need", required=argv == [])
    with pytest.raises(UsageError) as caught:
        parser.parse_args(argv)
    assert named in str(caught.value)
    assert "--help" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert capsys.readouterr() == ("", "")
