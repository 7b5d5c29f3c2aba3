"""The short run in its own process, and the times computed from it for a larger run."""

import dataclasses
import glob
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import psutil
import pytest

from jaxlm.cli import read_config
from jaxlm.config import to_dict
from jaxlm.errors import RunError
from jaxlm.planner import measure
from jaxlm.planner.measure import BenchmarkResult
from jaxlm.run.events import PauseEvent, SavedEvent, SavingEvent, StepEvent
from jaxlm.run.memory import min_memory
from tests import tiny_run
from tests.tiny_run import listing


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory) as place:
        yield place


@pytest.fixture(scope="module")
def config(place):
    return tiny_run.resolved(read_config(["--config", "tiny.py"])[0])


def measured(**changes):
    times = dict.fromkeys(("start", "first", "update", "evaluation", "samples", "save", "saving", "end"), 0.0)
    sizes = dict.fromkeys(("peak_bytes", "checkpoint_bytes", "model_bytes"), 1)
    step = {"step": 1.0, "step_fast": 1.0, "step_slow": 1.0, "flops_per_second": 1e9}
    return BenchmarkResult(batch_size=2, grad_accum_steps=2, microbatch_chunks=2, **times | sizes | step | changes)


@pytest.mark.slow
def test_the_short_run_measures_the_trainer_and_leaves_no_files(config):
    device = jax.devices()[0]
    before, shares = listing(Path()), []
    result = measure.measure(config, device, Path(), shares.append)
    assert listing(Path()) == before
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] == 1.0
    assert result.step_fast <= result.step_slow
    values = dataclasses.asdict(result)
    assert all(value > 0 for name, value in values.items() if name not in ("update", "first"))
    assert result.start > result.step
    assert measure.reduced(config, result) == config
    state = min_memory(config)
    assert 0.5 * state.checkpoint_copy < result.checkpoint_bytes < state.checkpoint_copy + 40_000
    assert state.weights < result.model_bytes < state.weights + 5_000_000  # the tokenizer's files


def test_the_stopwatch_separates_steps_beside_pauses_and_saves(config, monkeypatch):
    config = dataclasses.replace(config, eval_interval=5, generation_interval=6, save_interval=7, grad_accum_steps=2)
    monkeypatch.setattr(measure.time, "monotonic", iter([100.0, 103.0, 200.0, 207.0]).__next__)
    shares, last = [], 15
    stopwatch = measure._Stopwatch(last, shares.append)
    for step in range(1, last + 1):
        seconds = 50.0 if step == 1 else 3.0 if step in (8, 9) else 9.0 if step > 4 else 1.0
        stopwatch(StepEvent(step, 1.0, 1.0, 1.0, 1, 1.0, 1.0, seconds, 1.0))
        if step in (7, 14):
            stopwatch(PauseEvent("checkpoint", step / 7))
            stopwatch(SavingEvent(step))
        if step in (9, 15):
            stopwatch(SavedEvent(step))
    assert shares == [step / last for step in range(1, last + 1)]
    assert stopwatch.pauses == {"checkpoint": [1.0, 2.0]}
    assert stopwatch.saves == [3.0, 7.0]
    steps, slowed = measure._step_seconds(stopwatch, measure._ShortRun(config, 2, False), last)
    assert steps == [1.0, 1.0, 1.0]  # 2, 3 and 4
    assert slowed == 2 * 3.0 - 2 * 1.0  # two steps during a save


@pytest.mark.slow
def test_a_short_run_that_fails_is_an_error_of_one_line(config):
    longer = dataclasses.replace(config, sample=dataclasses.replace(config.sample, prompts=("word " * 40,)))
    with pytest.raises(RunError, match="context") as caught:
        measure.measure(longer, jax.devices()[0], Path(), lambda share: None)
    assert tiny_run.is_one_line(caught.value)


@pytest.fixture
def run_child(monkeypatch, tmp_path, config):
    """Runs a shell program in place of the short run's process."""

    def run_child(program):
        (tmp_path / "child").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "child").chmod(0o700)
        monkeypatch.setattr(measure.sys, "executable", str(tmp_path / "child"))
        shares = []
        return measure._run_child(config, 1e9, str(tmp_path), True, shares.append), shares

    return run_child


def test_the_last_line_of_the_process_is_the_result(run_child):
    assert run_child("""echo noise; echo '{"share": 0.5}'; echo '{"step": 2}'""") == ({"step": 2}, [0.5, 1.0])


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("""echo '{"error": "no room"}'""", "no room"),
        ("""echo '{"share": 0.5}'; echo lost >&2; echo >&2; exit 3""", "status 3, 'lost'"),
        ("""echo '{"step": 2}'; exit 4""", "status 4, ''"),
        ("""echo '{"share": 0.5}'""", "status 0, ''"),
    ],
)
def test_a_process_without_a_result_has_failed(run_child, program, reason):
    with pytest.raises(RunError) as caught:
        run_child(program)
    assert str(caught.value) == f"the short run failed ({reason})"


def test_the_process_reports_an_error_in_one_line(monkeypatch, capfd, config, tmp_path):
    longer = dataclasses.replace(config, sample=dataclasses.replace(config.sample, prompts=("word " * 40,)))
    ended = []
    monkeypatch.setattr(measure.os, "_exit", ended.append)
    monkeypatch.setattr(measure.threading.Thread, "start", lambda thread: None)
    monkeypatch.setattr(measure.sys, "stdout", open(1, "w", closefd=False))  # noqa: SIM115  (capfd reads it)
    measure.main(json.dumps([str(tmp_path), True, 1e9, time.monotonic(), to_dict(longer)]))
    message = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert "context" in message["error"]
    assert ended == [0]


@pytest.mark.slow
def test_a_plan_that_is_killed_leaves_nothing_in_the_directory(place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    (place / "dir").mkdir()
    command = [sys.executable, "-m", "jaxlm.plan", "--config", "../tiny.py"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    plan = subprocess.Popen(command, cwd="dir", env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    started = "dir/jaxlm-measure-*/*/*"  # the short run writes
    while not glob.glob(started):
        assert plan.poll() is None
        time.sleep(0.01)
    children = psutil.Process(plan.pid).children()
    plan.kill()
    plan.wait()
    psutil.wait_procs(children, timeout=60)
    assert listing(Path("dir")) == {}


def test_the_process_becomes_one_that_removes_its_directory_when_its_stdin_closes(monkeypatch, tmp_path):
    (tmp_path / "folder/short").mkdir(parents=True)
    monkeypatch.setattr(measure.sys, "stdin", io.StringIO())
    monkeypatch.setattr(measure.os, "execlp", lambda file, *command: subprocess.run(command, check=True))
    measure._end_with_stdin(str(tmp_path / "folder"))
    assert listing(tmp_path) == {}


def test_whole_steps_take_the_measured_time(config):
    s = measure.seconds(config, measured(evaluation=0.5, saving=3.0, end=2.0, start=4.0, first=1.5), 21)
    assert (s.step, s.start, s.end) == (1.0, 5.5, 5.0)
    assert config.chunk_size == 2
    assert (s.evaluation, s.last_evaluation) == (1.0, 5.5)  # 4 windows, and 21, two at a time


def test_a_chunk_counts_once_per_chunk_and_the_update_once_per_micro_batch():
    config, _ = read_config(["--config", "tiny.py", "--config.batch_size=8", "--config.microbatch_chunks=4"])
    s = measure.seconds(config, measured(step=1.25, update=0.25), 0)
    assert s.step == 2 * (4 * 1.0 + 0.25)


def test_a_measurement_is_valid_for_other_intervals_but_not_for_other_shapes(config):
    device = jax.devices()[0]
    key = measure.key(config, device)
    same = {"max_checkpoints": 2, "eval_interval": 7, "save_interval": 9, "seed": 3}
    assert measure.key(dataclasses.replace(config, **same), device) == key
    assert json.loads(json.dumps(key)) == json.loads(json.dumps(measure.key(config, device)))
    for other in (
        dataclasses.replace(config, batch_size=4),
        dataclasses.replace(config, model=dataclasses.replace(config.model, remat=not config.model.remat)),
        dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="muon")),
        dataclasses.replace(config, sample=dataclasses.replace(config.sample, tokens=6)),
    ):
        assert measure.key(other, device) != key


@pytest.mark.parametrize("size", [257, 300, 50_257, 50_258, 65_536])
def test_the_stand_in_of_an_own_tokenizer_has_its_size(size):
    tokenizer = measure._stand_in(size)
    assert tokenizer.vocab_size == size == len({*tokenizer.vocabulary})
    assert tokenizer.decode(tokenizer.encode("Once upon a time")) == "Once upon a time"
