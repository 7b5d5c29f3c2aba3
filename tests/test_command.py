"""How a command ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.command import ArgumentParser, run
from jaxlm.errors import RequestError, RunError, Stopped


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("no such file"), 2),
        (RunError("the disk is full"), 1),
        (Stopped("stopped after step 3", 15), 143),
        (Stopped("stopped after step 3", 2), 130),
    ],
)
def test_an_error_is_one_line_and_a_status(error, status, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as exit:
        run(main)
    captured = capsys.readouterr()
    assert exit.value.code == status
    assert captured.out == ""
    assert captured.err.endswith(f"{error}\n")
    assert captured.err.count("\n") == 1


def test_success_is_status_0_and_silence(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["command", "--flag", "value"])
    with pytest.raises(SystemExit) as exit:
        run(seen.append)
    assert (exit.value.code, seen) == (0, [["--flag", "value"]])
    assert capsys.readouterr() == ("", "")


def test_interrupt_is_status_130_without_a_traceback(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        run(main)
    assert exit.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_command_in_one_line_after_it_has_cleaned_up(number, tmp_path):
    code = f"""
import os, time
from jaxlm.command import run
def main(argv):
    try:
        os.kill(os.getpid(), {int(number)})
        time.sleep(30)
    finally:
        open({str(tmp_path / "cleaned")!r}, "w").close()
run(main)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, env=environment)
    assert done.returncode == 128 + number
    assert done.stderr.startswith("stopped")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "cleaned").exists()


def test_a_command_that_was_told_not_to_mind_a_hangup_does_not(tmp_path):
    code = "import os, signal; from jaxlm.command import run; run(lambda argv: os.kill(os.getpid(), signal.SIGHUP))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(["nohup", sys.executable, "-c", code], capture_output=True, timeout=20, env=environment)
    assert done.returncode == 0


def test_a_defect_keeps_its_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)


@pytest.mark.parametrize(
    ("argv", "named"),
    [(["--coun", "1"], "--coun"), (["--count", "x"], "--count"), (["stray"], "stray"), ([], "--need")],
)
def test_wrong_arguments_are_a_request_error_of_one_line_that_names_them(argv, named, capsys):
    parser = ArgumentParser(prog="command", allow_abbrev=False)
    parser.add_argument("--count", type=int)
    parser.add_argument("--need", required=argv == [])
    with pytest.raises(RequestError) as caught:
        parser.parse_args(argv)
    assert named in str(caught.value)
    assert "--help" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert capsys.readouterr() == ("", "")
