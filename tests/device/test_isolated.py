import pytest

from jaxlm.device.isolated import run_isolated


@pytest.mark.parametrize(
    ("program", "limit", "lines", "failure"),
    [
        ("import sys; print('a', flush=True); print('b\\n', file=sys.stderr)", 60, ["a", "b", ""], ""),
        ("import sys; sys.stdout.buffer.write(b'\\xff')", 60, ["\ufffd"], ""),
        ("import sys; sys.exit(5)", 60, [], "ended with status 5"),
        ("import os; print('a', flush=True); os.abort()", 60, ["a"], "crashes: its process ended by SIGABRT"),
        ("import time; time.sleep(600)", 0.5, [], "hangs: no end after 0.5 s"),
        ("import sys; print(sys.stdin.read())", 60, [""], ""),
    ],
)
def test_the_output_and_the_failure_of_a_process(program, limit, lines, failure):
    assert run_isolated(["-c", program], limit) == (lines, failure)


def test_a_process_gets_the_same_modules_and_no_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "only_here.py").touch()
    program = "import os, only_here; print(os.environ.get('JAX_PLATFORMS'), os.environ['X'])"
    assert run_isolated(["-c", program], 60, {"X": "y"}) == (["None y"], "")
