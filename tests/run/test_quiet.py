"""What other libraries print: unchanged by an import, quiet in a command."""

import contextlib
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import jaxlm.cli
import jaxlm.run.quiet
from jaxlm.run.quiet import LIBRARY_LOG, log_libraries, quiet_libraries
from tests.tiny_run import disk_room


def test_importing_the_trainer_changes_no_other_library():
    code = """
import logging, sys
import absl.logging, orbax.checkpoint
hook, levels = sys.unraisablehook, [logging.getLogger(name).level for name in ("absl", "asyncio")]
import jaxlm.run.trainer, jaxlm.sample
assert sys.unraisablehook is hook
assert [logging.getLogger(name).level for name in ("absl", "asyncio")] == levels
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", ["main", "sample", "export"])
def test_a_command_is_quiet_before_it_runs(command, monkeypatch):
    calls = []
    monkeypatch.setattr(jaxlm.run.quiet, "quiet_libraries", lambda: calls.append("quiet"))
    monkeypatch.setattr(jaxlm.cli, "run", lambda main: calls.append("run"))
    runpy.run_module(f"jaxlm.{command}", run_name="__main__")
    assert calls == ["quiet", "run"]


@pytest.fixture
def quiet(monkeypatch):
    """The libraries are quiet until the test ends."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "jaxlm")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    quiet_libraries()
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers


def test_quiet_libraries_hides_errors_that_are_raised_as_well(quiet, monkeypatch, capfd):
    for name in ("absl", "asyncio", "jaxlm.run.checkpoint"):
        logging.getLogger(name).error("also raised")
    assert capfd.readouterr() == ("", "")
    passed_on = []
    monkeypatch.setattr(sys, "__unraisablehook__", lambda unraisable: passed_on.append(str(unraisable.exc_value)))
    for text in ("Event loop is closed", "another error"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert passed_on == ["another error"]


def test_warnings_of_libraries_are_kept_in_the_work_directory(quiet, tmp_path, capfd):
    with log_libraries(tmp_path):
        assert list(tmp_path.iterdir()) == []
        for number, name in enumerate(("absl", "asyncio", "jaxlm.run.checkpoint")):
            logging.getLogger(name).warning("warning %d", number)
            logging.getLogger(name).info("not a warning")
    logging.getLogger("absl").warning("after the run")
    lines = (tmp_path / LIBRARY_LOG).read_text().splitlines()
    assert [line.split("WARNING: ")[1] for line in lines] == [f"warning {number}" for number in range(3)]
    with log_libraries(tmp_path):
        logging.getLogger("absl").warning("of the next session")
    assert len((tmp_path / LIBRARY_LOG).read_text().splitlines()) == 4
    assert capfd.readouterr() == ("", "")


def test_the_log_of_libraries_is_bounded(quiet, tmp_path):
    with log_libraries(tmp_path):
        for number in range(3000):
            logging.getLogger("absl").warning("%d %s", number, "x" * 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LIBRARY_LOG, f"{LIBRARY_LOG}.1"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 500_000
    assert "2999 x" in (tmp_path / LIBRARY_LOG).read_text()


@pytest.mark.parametrize("fault", ["full", "gone", "a folder"])
def test_a_log_that_cannot_be_written_costs_only_the_warning(quiet, tmp_path, capfd, fault):
    (tmp_path / "run").mkdir()
    with disk_room(0) if fault == "full" else contextlib.nullcontext(), log_libraries(tmp_path / "run"):
        if fault == "gone":
            (tmp_path / "run").rmdir()
        if fault == "a folder":
            (tmp_path / "run" / LIBRARY_LOG).mkdir()
        logging.getLogger("absl").warning("lost")
    assert capfd.readouterr() == ("", "")


def test_nothing_is_written_to_a_folder_that_takes_the_place_of_the_work_directory(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with log_libraries(workdir):
        workdir.rename(tmp_path / "moved")
        workdir.mkdir()
        logging.getLogger("absl").warning("lost")
    assert list(workdir.iterdir()) == []
