"""A run in trackio, against a stub with the signatures of trackio 0.43."""

import json
import sys
import types

import pytest

from jaxlm.config import Config
from jaxlm.errors import UsageError
from jaxlm.main import _trackio
from jaxlm.run.events import EvaluationEvent, MessageEvent, SamplesEvent, StepEvent
from jaxlm.run.tracker import Trackio


class Run:
    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, metrics: dict, step: int | None = None):
        self.logged.append((step, metrics))

    def finish(self):
        print("* Run finished.")
        self.finished = True


@pytest.fixture
def trackio(monkeypatch):
    """The module, which keeps the arguments of `init` and the run."""
    module = types.ModuleType("trackio")
    module.run, module.Markdown = Run(), lambda text="": ("markdown", text)

    def init(
        project: str,
        name: str | None = None,
        config: dict | None = None,
        resume: str = "never",
        embed: bool = True,
        auto_log_gpu: bool | None = None,
        auto_log_cpu: bool | None = None,
    ):
        print("* Trackio project initialized")
        module.arguments = (project, name, config, resume, embed, auto_log_gpu, auto_log_cpu)
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def events(steps):
    yield MessageEvent("a line")
    for step in steps:
        yield StepEvent(
            step, 1.5, 3e-4, 0.5, 96, 32.0, 9.0, 1.0, 7.0, EvaluationEvent(step, 1.25, 2.5), {"matrix": 0.1}
        )
        yield EvaluationEvent(step, 1.25, 2.5)
        yield SamplesEvent(step, (("Once", "Once é"), ("The", "The end")))


def test_a_run_logs_its_numbers_samples_and_settings(tmp_path, trackio, capsys):
    listener = Trackio("stories", tmp_path / "mine", Config())
    for event in events([1]):
        listener(event)
    listener.close()
    project, name, settings, *others = trackio.arguments
    assert (project, name, settings["model.width"], others) == ("stories", "mine", 512, ["never", False, False, False])
    row = {"loss": 1.5, "lr": 3e-4, "grad_norm": 0.5, "tokens": 96, "tokens_per_second": 32.0, "seconds": 9.0}
    assert trackio.run.logged == [
        (1, row | {"update_ratio_matrix": 0.1}),
        (1, {"val_loss": 1.25, "val_bits_per_byte": 2.5}),
        (1, {"samples": ("markdown", "Once é\n\nThe end")}),
    ]
    assert trackio.run.finished
    assert capsys.readouterr().out == ""


def test_a_session_that_resumes_logs_no_step_twice(tmp_path, trackio):
    """The session before saved step 3 and was killed after step 5."""
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    listener = Trackio("stories", tmp_path, Config())
    for event in events(range(4, 8)):
        listener(event)
    assert trackio.arguments[3] == "allow"
    assert [step for step, _ in trackio.run.logged] == [6] * 3 + [7] * 3


def test_no_run_fails_for_trackio(tmp_path, trackio, monkeypatch, capsys):
    def init(*_, **__):
        raise OSError("no room\nat all")

    monkeypatch.setattr(trackio, "init", init)
    assert not _trackio("stories", tmp_path, Config())
    assert capsys.readouterr().out == "The run is not logged to trackio (OSError: no room at all)\n"
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UsageError, match=r"^--trackio needs the package trackio \(.*\): pip install trackio$"):
        _trackio("stories", tmp_path, Config())
