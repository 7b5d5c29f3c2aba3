"""How a command ends."""

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
