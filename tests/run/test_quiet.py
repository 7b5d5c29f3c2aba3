"""What other libraries print: unchanged by an import, quiet in a command."""

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
from jaxlm.run.quiet import quiet_libraries


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


def test_quiet_libraries_hides_errors_that_are_raised_as_well(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    try:
        quiet_libraries()
        assert not any(logger.isEnabledFor(logging.ERROR) for logger in loggers)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    passed_on = []
    monkeypatch.setattr(sys, "__unraisablehook__", lambda unraisable: passed_on.append(str(unraisable.exc_value)))
    for text in ("Event loop is closed", "another error"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert passed_on == ["another error"]
