"""The command that shows a run."""

import json
import signal
import sys

import pytest

from jaxlm import report
from jaxlm.errors import UsageError
from tests import tiny_run
from tests.pages.made_run import metrics, write_rows, write_run


def data_of(page):
    text = page.read_text()
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def test_watching_writes_the_page_until_the_run_ends(tmp_path, monkeypatch, capsys):
    workdir = write_run(tmp_path / "run", steps=20)
    (workdir / "lock").write_text(json.dumps({"pid": 1, "host": "another"}))
    seen = []

    def train_on(seconds):
        data = data_of(workdir / "report.html")
        seen.append((data["runs"][0]["step"], data["refresh_seconds"]))
        write_rows(workdir / "metrics.jsonl", metrics(30))
        if len(seen) == 2:
            (workdir / "lock").unlink()

    monkeypatch.setattr(report.time, "sleep", train_on)
    report.main(["--workdir", str(workdir), "--watch"])
    assert capsys.readouterr().out.count(" shows ") == 2
    data = data_of(workdir / "report.html")
    assert [*seen, (data["runs"][0]["step"], data["refresh_seconds"])] == [(20, 20.0), (30, 20.0), (30, None)]


def test_an_open_page_stops_when_watching_is_stopped(tmp_path, monkeypatch):
    workdir = write_run(tmp_path / "run", steps=20)
    (workdir / "lock").write_text(json.dumps({"pid": 1, "host": "another"}))
    monkeypatch.setattr(report.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        report.main(["--workdir", str(workdir), "--watch"])
    assert data_of(workdir / "report.html")["refresh_seconds"] is None


def test_several_runs_are_in_one_page(tmp_path):
    both = tmp_path / "both.html"
    a, b, other = (write_run(tmp_path / name, steps) for name, steps in (("a", 40), ("b", 30), ("new/a", 20)))
    for workdirs, names in (((a, b), ["a", "b"]), ((a, other), [str(a), str(other)])):
        report.main(["--workdir", *map(str, workdirs), "--out", str(both)])
        assert [run["name"] for run in data_of(both)["runs"]] == names


def test_a_picture_has_the_format_of_its_suffix(tmp_path):
    for suffix, begin, steps in (
        ("png", b"\x89PNG", 1),
        ("png", b"\x89PNG", 40),
        ("svg", b"<?xml", 120),
        ("pdf", b"%PDF", 40),
    ):
        out = tmp_path / f"loss.{suffix}"
        report.main(["--workdir", str(write_run(tmp_path / "run", steps, 120)), "--png", str(out)])
        assert out.read_bytes().startswith(begin)
        report._check_output(out)  # its own, so it may be replaced
    assert (tmp_path / "loss.svg").read_text().count("<!-- validation, at the end 2.830 -->") == 1
    assert not (tmp_path / "run" / "report.html").exists()


def test_wrong_requests_are_one_line(tmp_path, monkeypatch):
    workdir, mine = str(write_run(tmp_path / "run")), tmp_path / "mine.html"
    mine.write_text("<p>My notes on jaxlm.report")
    for arguments, message in (
        (["--workdir", str(tmp_path)], "holds no run: name the --workdir of one"),
        (["--workdir", workdir, "--out", str(mine)], "mine.html exists and was not written by jaxlm.report"),
        (["--workdir", workdir, "--png", str(tmp_path / "loss.txt")], "must end in one of .png, .svg, .pdf"),
        (["--workdir", workdir, "--png", str(tmp_path / "loss.png"), "--watch"], "omit --out and --watch"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            report.main(arguments)
        assert tiny_run.is_one_line(caught.value)
    assert mine.read_text() == "<p>My notes on jaxlm.report"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'jaxlm\[plots\]'"):
        report.main(["--workdir", workdir, "--png", str(tmp_path / "loss.png")])
